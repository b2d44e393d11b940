"""Say what a large job costs before it is started: products, bytes, seconds and machines.

The model of a pass is simple: the products take their operations at the machine's rate, or the time
to read the weights if that is longer; what passes between them is read and written from memory;
each block has a fixed overhead. ``benchmarks/scale_check.py`` compares it with measured runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.engines.architecture import Architecture
    from workbench.models.sites import Site


STORED_BYTES = 4
"""Bytes of a number of a cached activation: float32 whatever the model's type."""
PROMPT_BYTES = (150, 4.5)
"""Bytes of a prompt in a file or between machines: the fixed part, and those of a token."""
ANSWER_BYTES = (155, 11)
"""Bytes of an answer's line in a file: the fixed part, and those of a token with its id."""
LOG_PROB_BYTES = 10
"""Bytes of a token's log-probability, which answers of the unsteered model have."""
VERDICT_BYTES = 180
"""Bytes of a verdict's line in a file."""
START_SECONDS = 6.0
"""Seconds in which Ray and its workers start, beside loading the model."""
SPARE = 0.1
"""Share of a device's memory that is left to what passes through the layers."""


@dataclass(frozen=True)
class Machine:
    """Hold what a machine can do.

    Attributes:
        name: What it is called.
        product: Operations a second of one device in products of matrices, in the type of the
            weights; a product of an m x k and a k x n matrix has 2 m k n.
        bandwidth: Bytes a second that one device reads from its memory.
        memory: Bytes of one device.
        devices: GPUs, or 1 for a processor.
        link: Bytes a second between two devices of the machine.
        network: Bytes a second between machines.
        disk: Bytes a second from and to its disk.
        rows: Answers that are written together on a device, at most.
        overhead: Seconds that each block of each pass takes beside its work.
    """

    name: str
    product: float
    bandwidth: float
    memory: float
    devices: int = 1
    link: float = 64e9
    network: float = 3e9
    disk: float = 2e9
    rows: int = 256
    overhead: float = 0.0


REACHED = (0.5, 0.7)
"""Shares of a data sheet's product rate and bandwidth that are taken for reached: an assumption,
which measured rates replace."""


def _of_sheet(
    name: str, product: float, bandwidth: float, memory: float, devices: int, link: float
) -> Machine:
    rate, reading = product * REACHED[0], bandwidth * REACHED[1]
    return Machine(name, rate, reading, memory, devices, link, overhead=2e-5)


HARDWARE = {
    one.name: one
    for one in (
        _of_sheet("nvidia-l40s", 362e12, 864e9, 48e9, 8, 32e9),
        _of_sheet("nvidia-a100", 312e12, 2.04e12, 80e9, 8, 300e9),
        _of_sheet("nvidia-h100", 989e12, 3.35e12, 80e9, 8, 450e9),
        _of_sheet("nvidia-h200", 989e12, 4.8e12, 141e9, 8, 450e9),
        Machine("two-cores", 1.5e11, 1.5e10, 16e9, rows=96, overhead=2e-4),
    )
}
"""Machines by name: the makers' data sheets (dense bfloat16 products, SXM where there is a choice)
times ``REACHED``, eight devices each, and a processor of two cores."""


@dataclass(frozen=True)
class Work:
    """Say what is to be done with each prompt.

    Attributes:
        prompts: How many there are.
        prompt_tokens: Tokens of a prompt behind what all begin with, padding included.
        prefix_tokens: Tokens that all begin with, computed once.
        new_tokens: Tokens of an answer.
        conditions: Answers to each prompt: unsteered, steered, controls.
        sites: Sites whose activations are cached.
        judge_tokens: Tokens that a judge reads for an answer beside its words and the prompt's:
            what stands behind them, for its rubric is computed once.
        weight_bytes: Bytes of a weight and of an activation.
    """

    prompts: int = 1_000_000
    prompt_tokens: float = 20
    prefix_tokens: float = 25
    new_tokens: float = 64
    conditions: int = 2
    sites: tuple[Site, ...] = ()
    judge_tokens: float = 20
    weight_bytes: float = 2

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens", "conditions", "weight_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")

    @property
    def answers(self) -> int:
        """Count the answers."""
        return self.prompts * self.conditions


@dataclass(frozen=True)
class Cost:
    """Hold what a job costs.

    Attributes:
        job: "caching", "answers" or "judging".
        tokens: Tokens that pass through the model.
        flops: Operations.
        seconds: On one machine with all its devices; on as few machines as hold the model where it
            does not fit into one.
        disk: Bytes that are kept.
        network: Bytes to and from a machine that works alone: prompts, results, and the weights
            once; between the machines of a model that needs several, what they exchange too.
    """

    job: str
    tokens: float
    flops: float
    seconds: float
    disk: float
    network: float


@dataclass(frozen=True)
class Fit:
    """Say how a model fits into a machine.

    Attributes:
        devices: Devices that hold one copy of the model: a power of two.
        copies: Copies that one machine works with side by side; 0 where it holds none.
        machines: Machines that hold one copy.
        rows: Answers that a copy writes together.
    """

    devices: int
    copies: int
    machines: int
    rows: int


def fit(model: Architecture, machine: Machine, work: Work) -> Fit:
    """Choose how many devices share a copy of a model.

    They are the fewest, by powers of two, that also hold the keys and values of a full batch; where
    a machine has not so many, as many as it has; where it does not hold the model, several machines
    with one share of the blocks each.
    """
    weights = model.parameters * work.weight_bytes
    context = work.prefix_tokens + work.prompt_tokens + work.new_tokens
    of_row = model.kv_width * context * work.weight_bytes

    def rows_on(devices: int) -> int:
        return int((devices * machine.memory * (1 - SPARE) - weights) / of_row)

    devices = 1
    while 2 * devices <= machine.devices and rows_on(devices) < machine.rows:
        devices *= 2
    while rows_on(devices) < 1:
        devices *= 2
    machines = math.ceil(devices / machine.devices)
    return Fit(devices, machine.devices // devices, machines, min(machine.rows, rows_on(devices)))


def forward_flops(
    model: Architecture,
    tokens: float,
    pairs: float,
    logits: float = 0.0,
    n_layers: int | None = None,
) -> float:
    """Count the operations of a forward pass.

    Args:
        model: What runs.
        tokens: Tokens that pass through it.
        pairs: Pairs of a token and a position that attention compares, masked ones too.
        logits: Tokens whose logits are computed.
        n_layers: Blocks that run; all by default.
    """
    layers = model.n_layers if n_layers is None else n_layers
    attention = 4 * model.n_heads * model.d_head * layers * pairs
    return 2 * model.products(n_layers) * tokens + attention + 2 * model.head_products * logits


def pass_seconds(
    model: Architecture,
    machine: Machine,
    work: Work,
    *,
    rows: float,
    tokens: float,
    context: float,
    logits: float = 0.0,
    n_layers: int | None = None,
    devices: int = 1,
) -> float:
    """Estimate the time of one pass on one copy of a model.

    Args:
        model: What runs.
        machine: Where.
        work: Bytes of a weight.
        rows: Rows of the batch.
        tokens: Tokens of a row.
        context: Positions that a token is compared with.
        logits: Rows whose logits are computed.
        n_layers: Blocks that run; all by default.
        devices: Devices that share the copy: the heads and neurons of a block inside a machine
            (tensor parallel), the blocks between machines, which are kept busy with several
            batches (pipeline parallel).
    """
    layers = model.n_layers if n_layers is None else n_layers
    n = rows * tokens
    share = layers / model.n_layers
    flops = forward_flops(model, n, n * context, logits, n_layers)
    weights = model.weights_read(n, with_head=False) * share + model.head_products * bool(logits)
    products = max(flops / machine.product, weights * work.weight_bytes / machine.bandwidth)
    cached = rows * model.kv_width * share * context
    passing = n * layers * _passing(model) + logits * model.vocabulary
    memory = (cached + passing) * work.weight_bytes / machine.bandwidth
    seconds = (products + memory) / devices + layers * machine.overhead
    inside = min(devices, machine.devices)
    machines = devices / inside
    seconds += _exchanged(model, n, layers, inside, work) / machine.link / machines
    if machines > 1:  # each hands the residual stream on to the next one
        seconds += n * model.d_model * work.weight_bytes / machine.network
    return seconds


def _passing(model: Architecture) -> float:
    """Count the numbers that a token's elementwise functions read and write in a block.

    Two norms and two sums read and write the residual stream, ten times its width together; queries
    and keys are turned; the MLP's two products become one.
    """
    heads = (model.n_heads + 2 * model.n_kv_heads) * model.d_head
    return 10 * model.d_model + 3 * heads + 6 * model.d_mlp


def _exchanged(
    model: Architecture, tokens: float, n_layers: int, devices: int, work: Work
) -> float:
    """Count the bytes that a device sends where a copy is shared: two sums over all in a block."""
    of_sum = tokens * model.d_model * work.weight_bytes
    return 2 * n_layers * 2 * (devices - 1) / devices * of_sum


def caching(model: Architecture, machine: Machine, work: Work) -> Cost:
    """Estimate what it costs to cache the activations of all prompts at the sites.

    Blocks above the last site do not run, nor does the head.
    """
    n_layers = max((site.layer for site in work.sites), default=model.n_layers - 1) + 1
    context = work.prefix_tokens + work.prompt_tokens
    tokens = work.prompts * work.prompt_tokens
    placed = fit(model, machine, replace(work, new_tokens=1))
    rows = min(placed.rows, 32.0)
    seconds = (
        work.prompts
        / rows
        * pass_seconds(
            model,
            machine,
            work,
            rows=rows,
            tokens=work.prompt_tokens,
            context=context,
            n_layers=n_layers,
            devices=placed.devices,
        )
    )
    width = sum(model.width_of(site.kind) for site in work.sites)
    disk = work.prompts * width * STORED_BYTES
    flops = forward_flops(model, tokens, tokens * context, n_layers=n_layers)
    exchanged = _handed_on(model, placed, tokens, work)
    return _cost("caching", model, machine, work, placed, tokens, flops, seconds, disk, exchanged)


def answering(model: Architecture, machine: Machine, work: Work) -> Cost:
    """Estimate what it costs to answer all prompts under all conditions.

    Steering itself costs nothing that would be seen: it adds a vector.
    """
    placed = fit(model, machine, work)
    read = work.prefix_tokens + work.prompt_tokens
    context = read + work.new_tokens / 2  # on average
    rows = min(float(placed.rows), work.answers)
    reading = pass_seconds(
        model,
        machine,
        work,
        rows=rows,
        tokens=work.prompt_tokens,
        context=read,
        logits=rows,
        devices=placed.devices,
    )
    step = pass_seconds(
        model,
        machine,
        work,
        rows=rows,
        tokens=1,
        context=context,
        logits=rows,
        devices=placed.devices,
    )
    steps = max(0.0, work.new_tokens - 1)  # the first token comes with the reading
    seconds = work.answers / rows * (reading + steps * step)
    of_prompts, of_steps = work.answers * work.prompt_tokens, work.answers * steps
    flops = forward_flops(
        model,
        of_prompts + of_steps,
        of_prompts * read + of_steps * context,
        work.answers * (1 + steps),
    )
    disk = work.answers * (ANSWER_BYTES[0] + ANSWER_BYTES[1] * work.new_tokens)
    disk += work.prompts * LOG_PROB_BYTES * work.new_tokens  # one of the conditions is unsteered
    tokens = of_prompts + of_steps
    exchanged = _handed_on(model, placed, tokens, work)
    return _cost("answers", model, machine, work, placed, tokens, flops, seconds, disk, exchanged)


def judging(judge: Architecture, machine: Machine, work: Work) -> Cost:
    """Estimate what it costs to have a model read all answers with their prompts, once each."""
    of_answer = work.prompt_tokens + work.new_tokens + work.judge_tokens
    reads = replace(
        work,
        prompts=work.answers,
        conditions=1,
        prompt_tokens=of_answer,
        new_tokens=1,
    )
    cost = answering(judge, machine, reads)
    return replace(cost, job="judging", disk=work.answers * VERDICT_BYTES)


def _handed_on(model: Architecture, placed: Fit, tokens: float, work: Work) -> float:
    """Count the bytes that the machines of one copy hand on: the residual stream of all tokens."""
    return (placed.machines - 1) * tokens * model.d_model * work.weight_bytes


def _cost(
    job: str,
    model: Architecture,
    machine: Machine,
    work: Work,
    placed: Fit,
    tokens: float,
    flops: float,
    seconds: float,
    disk: float,
    exchanged: float,
) -> Cost:
    """Put a cost together; what is written to disk takes the time of the slower of the two."""
    texts = work.prompts * (PROMPT_BYTES[0] + PROMPT_BYTES[1] * work.prompt_tokens)
    network = texts + disk + model.parameters * work.weight_bytes + exchanged
    seconds = max(seconds / max(1, placed.copies), disk / machine.disk)
    return Cost(job, tokens, flops, seconds, disk, network)


def load_seconds(model: Architecture, machine: Machine, work: Work) -> float:
    """Estimate the time to read a model's weights from disk or over the network."""
    return model.parameters * work.weight_bytes / min(machine.disk, machine.network)


def machines_for(seconds: float, hours: float) -> int:
    """Count the machines that do the work of one machine's seconds in some hours."""
    return max(1, math.ceil(seconds / (3600 * hours)))


def pays_from(costs: Sequence[Cost], model: Architecture, machine: Machine, work: Work) -> int:
    """Find the number of prompts from which a second machine saves four tenths of the time.

    Two machines halve the work; Ray's start, and loading the model, they do not halve.
    """
    of_prompt = sum(cost.seconds for cost in costs) / work.prompts
    loading = load_seconds(model, machine, work)
    return math.ceil((START_SECONDS + 0.4 * loading) / (0.1 * of_prompt))
