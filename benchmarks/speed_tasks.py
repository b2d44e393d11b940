"""Do each task with workbench, with plain PyTorch and with the peers, on one model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import speed_plain
import torch
from speed_measure import Check, Contender, Spent, same_tokens, same_values, timed, work
from speed_peers import WORK_OF
from speed_plain import KINDS, Rows, Values
from speed_workers import Worker

import workbench as wb
from workbench.generation.reading import read_rows, with_answers
from workbench.models.forward import plain, shared_prefix_length, without_shared_prefix
from workbench.models.tokens import encode, pad_id, token_ids
from workbench.stats.selectivity import Threshold

RHO = 0.1
"""Strength of the steering: what is added does not change what adding costs."""
NATS_WITHIN = 3e-4
"""Largest difference of log-probabilities that is taken for rounding."""


RAW = "raw Hugging Face hooks"
OURS = "workbench"
GENERATE, HOOKED = "Hugging Face generate", "Hugging Face generate, steered by a hook"
UNSTEERED, STEERED = "workbench, unsteered", "workbench, steered"
GATED = "workbench, steered behind an open gate"
LOOPS, SWEEP = "loop of Hugging Face generations, each with a hook", "workbench, one sweep"
PLAIN = "plain PyTorch"


@dataclass(frozen=True)
class Sizes:
    """How much of each work is done, so that a whole run takes 25 minutes on two cores.

    Attributes:
        rounds: Rounds of each work.
        n_short: Prompts of the extraction.
        n_long: Texts of about ``long_tokens`` tokens.
        long_tokens: Length of these.
        n_rows: Prompts that are answered.
        n_new: Tokens of an answer.
        sweep_rows: Prompts of the sweep.
        sweep_new: Tokens of an answer of the sweep.
        n_conditions: Conditions of the sweep.
        loops_a_round: Conditions of the loop that are measured a round, others in the next round;
            their time counts for all.
        n_attributed: Prompts of each side of an attribution.
        scored: Conditions whose answers are scored, and prompts of each.
        decoded: Tokens of the shorter and the longer answers that decoding alone is told from, and
            None where it is not measured.
        core_new: Tokens of an answer on one core.
        wide: Rows at which decoding alone is measured.
    """

    rounds: int = 5
    n_short: int = 32
    n_long: int = 8
    long_tokens: int = 200
    n_rows: int = 16
    n_new: int = 48
    sweep_rows: int = 16
    sweep_new: int = 16
    n_conditions: int = 12
    loops_a_round: int = 3
    n_attributed: int = 24
    scored: tuple[int, int] = (3, 16)
    decoded: tuple[int, int] | None = (4, 12)
    core_new: int = 12
    wide: int = 96


FIRST = Sizes()
"""Sizes for the first model, which has 135 million weights by default."""


LARGER = Sizes(
    n_short=12,
    n_long=4,
    n_new=12,
    sweep_rows=8,
    sweep_new=8,
    n_attributed=4,
    scored=(2, 8),
    decoded=None,
)
"""Sizes for the models after it."""


QUICK = Sizes(
    rounds=1,
    n_short=6,
    n_long=2,
    n_rows=4,
    n_new=6,
    sweep_rows=2,
    sweep_new=4,
    n_attributed=4,
    scored=(2, 2),
    decoded=(2, 4),
    core_new=4,
    wide=8,
)
"""Sizes that show that the script works; the times mean little."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: one model, hooked and as transformers loads it, and its prompts."""

    name: str
    model: Any
    raw: Any
    folder: Path
    prompts: Sequence[wb.Prompt]
    sizes: Sizes
    clock: str = "cpu"

    @property
    def layer(self) -> int:
        """The layer that is steered: the one at half depth."""
        return self.model.cfg.n_layers // 2

    def spread(self, n: int) -> list[wb.Prompt]:
        """Take n prompts from all over the set, in its order."""
        n = min(n, len(self.prompts))
        return [self.prompts[i * len(self.prompts) // n] for i in range(n)]

    def measured(self, title: str, contenders: dict[str, Contender], **settings: Any) -> Any:
        """Measure a work on this model."""
        given = {"compare": same_values, "rounds": self.sizes.rounds, "clock": self.clock}
        found = work(f"{self.name}: {title}", contenders, **{**given, **settings})
        return found | {"title": title}


def words(n: int, start: int) -> str:
    """Make n words of the project's prompts that make no sentence."""
    known = [word for prompt in wb.load_prompts() for word in prompt.text.split()]
    return " ".join(known[(start * 977 + k * 31) % len(known)] for k in range(n))


def text_of(model: Any, n_tokens: int, start: int) -> str:
    """Make a text that is about ``n_tokens`` long with the template around it."""
    around = len(encode(model, [wb.Prompt("p", "a", None, "harmless", "neutral", "speed")])[0].ids)
    pieces = words(n_tokens, start).split()
    ends = itertools.accumulate(len(token_ids(model, f" {piece}")) for piece in pieces)
    n = sum(end <= n_tokens - around for end in ends)
    return " ".join(pieces[: max(1, n)])


def long_prompts(model: Any, n: int, n_tokens: int) -> list[wb.Prompt]:
    """Make texts of about so many tokens that share no beginning but the template."""
    return [
        wb.Prompt(f"long-{i}", text_of(model, n_tokens, i), None, "harmless", "neutral", "speed")
        for i in range(n)
    ]


def values_of(activations: Any) -> Values:
    """Give activations by kind and layer, as the plain code does."""
    return {(site.kind, site.layer): read.values for site, read in activations.items()}


def extraction(
    subject: Subject,
    prompts: Sequence[wb.Prompt],
    title: str,
    workers: Sequence[Worker] | None = None,
) -> dict[str, Any]:
    """Measure reading activations at every layer, beside raw hooks.

    Args:
        subject: What is measured.
        prompts: What is read.
        title: What the prompts are.
        workers: Peers that take part, and with them TransformerLens and the slower routes; None
            where only raw hooks and workbench are asked for.
    """
    encoded = encode(subject.model, prompts)
    content: Rows = [(list(row.ids), list(row.content)) for row in encoded]
    last: Rows = [(list(row.ids), [len(row.ids) - 1, len(row.ids)]) for row in encoded]
    n_layers = subject.model.cfg.n_layers
    everywhere = [wb.Site(n, kind) for kind in KINDS for n in range(n_layers)]
    stream = [wb.Site(n, "resid_post") for n in range(n_layers)]
    asked: dict[str, tuple[list[wb.Site], str, Rows, str]] = {
        "all kinds": (everywhere, "content", content, "attention, residual stream and neurons"),
        "residual stream": (stream, "content", content, "the residual stream alone"),
        # What repeng gives as the last layer's is behind the final norm.
        "last token": (stream[:-1], "last", last, "the residual stream, last token, without the "
                       "last layer"),
    }  # fmt: skip
    works = []
    for what, (sites, span, rows, said) in asked.items():
        peers = [worker for worker in workers or () if WORK_OF[worker.name] == what]
        if what != "all kinds" and not peers:
            continue
        contenders = _readers(subject, prompts, rows, sites, span)
        if what == "all kinds" and workers is not None:
            contenders |= _slower(subject, prompts, rows, sites)
        for peer in peers:
            contenders[f"{peer.name} {peer.version}"] = _peer(peer, rows)
        n_tokens = sum(len(row.ids) for row in encoded)
        works.append(subject.measured(f"{title}, {said}", contenders, amount=n_tokens))
    return {"works": works, "shared": shared(encoded), "computed": computed_tokens(encoded)}


def _readers(
    subject: Subject, prompts: Sequence[wb.Prompt], rows: Rows, sites: Sequence[wb.Site], span: str
) -> dict[str, Contender]:
    """Name raw hooks and workbench, which read the same activations."""
    kinds, layers = {site.kind for site in sites}, sorted({site.layer for site in sites})
    return {
        RAW: Contender(lambda: speed_plain.extraction(subject.raw, rows, kinds, layers)),
        OURS: Contender(
            lambda: values_of(wb.cache_activations(subject.model, prompts, sites, span=span))
        ),
    }


def _slower(
    subject: Subject, prompts: Sequence[wb.Prompt], rows: Rows, sites: Sequence[wb.Site]
) -> dict[str, Contender]:
    """Name the slower ways to read the same in this process."""
    model = subject.model

    def without_prefix() -> Values:
        with without_shared_prefix():
            return values_of(wb.cache_activations(model, prompts, sites))

    def plainly() -> Values:
        with plain(model):
            return values_of(wb.cache_activations(model, prompts, sites))

    return {
        "workbench, no shared prefix": Contender(without_prefix),
        "workbench, plain routes": Contender(plainly),
        "TransformerLens run_with_cache": Contender(lambda: _transformer_lens(model, sites, rows)),
    }


def _transformer_lens(model: Any, sites: Sequence[wb.Site], rows: Rows) -> Values:
    """Read with TransformerLens's own cache, all of its components in use."""
    means, names = speed_plain.Means(), {site.hook_name for site in sites}
    with torch.no_grad(), plain(model):
        for batch in speed_plain.batches_of(rows, 32, device_of(model)):
            means.batch = batch
            _, cache = model.run_with_cache(
                batch.tokens, attention_mask=batch.mask, names_filter=lambda name: name in names
            )
            for site in sites:
                means.keep(site.kind, site.layer, cache[site.hook_name])
    return means.values()


def device_of(model: Any) -> torch.device:
    """Say where a model's weights are."""
    return next(model.parameters()).device


def _peer(peer: Worker, rows: Rows) -> Contender:
    """Let a peer do a work; the rows are handed over before it is compared."""

    def result() -> Values:
        peer.give(rows)
        return peer.result()

    return Contender(peer.run, result)


def shared(encoded: Sequence[Any]) -> str:
    """Say in words which tokens of the prompts need not be run at all."""
    mean = sum(len(row.ids) for row in encoded) / len(encoded)
    behind = sum(len(row.ids) - row.content[1] for row in encoded) / len(encoded)
    gain = mean * len(encoded) / computed_tokens(encoded)
    return (
        f"Of {mean:.0f} tokens on average {prefix_of(encoded)} are the shared template prefix and "
        f"{behind:.0f} come behind what is read: leaving both out is a gain of {gain:.2f} by itself"
    )


def prefix_of(encoded: Sequence[Any]) -> int:
    """Count the tokens that all prompts begin with."""
    return shared_prefix_length(encoded, keep=lambda row: row.content[0])


def computed_tokens(encoded: Sequence[Any]) -> int:
    """Count the tokens to be run: the shared prefix once, then each row up to what is read."""
    n_prefix = prefix_of(encoded)
    return n_prefix + sum(row.content[1] - n_prefix for row in encoded)


def vectors(subject: Subject, n: int) -> list[wb.SteeringVector]:
    """Make random vectors with the norm of one that was fitted."""
    twins = [p for p in wb.load_prompts() if p.pair_id]
    unsafe = [p for p in twins if p.label == "unsafe"][:4]
    safe = [p for p in twins if p.label == "safe"][:4]
    like = wb.steering_vector(subject.model, unsafe, safe, layer=subject.layer)
    return [wb.random_vector(like, seed=seed) for seed in range(n)]


def push_of(intervention: Any) -> torch.Tensor:
    """Give what an intervention adds."""
    return intervention.edit.multiplier * intervention.edit.vector


def one_gate(subject: Subject, vector: wb.SteeringVector, threshold: float) -> wb.Gate:
    """Make a gate that reads at the first layer and opens above a threshold."""
    generator = torch.Generator().manual_seed(0)
    width = subject.model.cfg.d_model
    limits = {"neutral": Threshold(threshold, 0.02, 0.0, 1.0, 50)}
    return wb.Gate(
        wb.Site(0, "resid_post"), "content", (vector.category,),
        torch.randn(1, width, generator=generator), torch.zeros(1), limits, 1.0,
        wb.model_info(subject.model),
    )  # fmt: skip


def generation(subject: Subject, *, n_new: int, whole: bool = True) -> dict[str, Any]:
    """Measure answering: unsteered, steered, behind a gate, beside Hugging Face's generate."""
    model, sizes = subject.model, subject.sizes
    prompts = subject.spread(sizes.n_rows)
    encoded = encode(model, prompts)
    ids, pad = [list(row.ids) for row in encoded], pad_id(model)
    [vector] = vectors(subject, 1)
    steering = [wb.add_vector(vector, rho=RHO)]
    push = push_of(steering[0])

    def behind(threshold: float) -> list[Any]:
        return wb.gated({vector.category: steering}, one_gate(subject, vector, threshold))

    def answer(interventions: Any) -> list[list[int]]:
        answers = wb.generate(model, prompts, interventions, wb.Decoding(max_new_tokens=n_new))
        return [list(one.tokens) for one in answers]

    def hooked(starts: Sequence[int] | None = None) -> list[list[int]]:
        with speed_plain.pushed(subject.raw, subject.layer, push, starts):
            return speed_plain.generation(subject.raw, ids, n_new, pad)

    def gate_check(_: Any, got: Any) -> Check:
        """Compare with a hook from the user's words on, and a closed gate with no steering."""
        width = max(map(len, ids))
        starts = [width - len(row.ids) + row.content[0] for row in encoded]
        opened = same_tokens(hooked(starts), got)
        closed = same_tokens(answer(()), answer(behind(float("inf"))))
        said = f"{opened.words} steered by a hook from the user's words on; closed: {closed.words}"
        return Check(opened.same and closed.same, said)

    contenders = {
        GENERATE: Contender(lambda: speed_plain.generation(subject.raw, ids, n_new, pad)),
        HOOKED: Contender(hooked, like=HOOKED),
        UNSTEERED: Contender(lambda: answer(())),
        STEERED: Contender(lambda: answer(steering), like=HOOKED),
    }
    if whole:
        contenders[GATED] = Contender(lambda: answer(behind(-float("inf"))), compare=gate_check)
    title = f"answers, {len(prompts)} prompts x {n_new} tokens"
    return {"works": [subject.measured(title, contenders, compare=same_tokens, amount=n_tokens)]}


def n_tokens(answers: Sequence[Sequence[int]]) -> int:
    """Count the tokens of answers."""
    return sum(map(len, answers))


def sweep(subject: Subject) -> dict[str, Any]:
    """Measure answering under many conditions at once, beside one after the other."""
    model, sizes = subject.model, subject.sizes
    prompts = subject.spread(sizes.sweep_rows)
    ids, pad = [list(row.ids) for row in encode(model, prompts)], pad_id(model)
    steering = [[wb.add_vector(one, rho=RHO)] for one in vectors(subject, sizes.n_conditions)]
    conditions = {f"c{k}": one for k, one in enumerate(steering)}
    decoding = wb.Decoding(max_new_tokens=sizes.sweep_new)

    def at_once() -> list[list[int]]:
        return [list(one.tokens) for one in wb.sweep(model, prompts, conditions, decoding)]

    def loop(some: Sequence[Any]) -> list[list[int]]:
        answers = []
        for [intervention] in some:
            with speed_plain.pushed(subject.raw, subject.layer, push_of(intervention)):
                answers += speed_plain.generation(subject.raw, ids, sizes.sweep_new, pad)
        return answers

    turns = itertools.cycle(
        [
            steering[k : k + sizes.loops_a_round]
            for k in range(0, len(steering), sizes.loops_a_round)
        ]
    )

    def some_loops() -> Spent:
        some = next(turns)
        spent, share = timed(lambda: loop(some)), len(some) / len(steering)
        return Spent(spent.cpu / share, spent.wall / share)

    contenders = {
        LOOPS: Contender(some_loops, lambda: loop(steering)),
        SWEEP: Contender(at_once),
    }
    title = f"{len(steering)} conditions x {len(prompts)} prompts x {sizes.sweep_new} tokens"
    return {"works": [subject.measured(title, contenders, compare=same_tokens, amount=n_tokens)]}


def attribution(subject: Subject) -> dict[str, Any]:
    """Measure splitting a difference along a direction into heads and neurons."""
    model, n = subject.model, subject.sizes.n_attributed
    site = wb.Site(subject.layer, "resid_post")
    direction = vectors(subject, 1)[0].vector
    twins = [p for p in wb.load_prompts() if p.pair_id]
    unsafe, safe = ([p for p in twins if p.label == label][:n] for label in ("unsafe", "safe"))
    sides: list[Rows] = [
        [(list(row.ids), list(row.content)) for row in encode(model, side)]
        for side in (unsafe, safe)
    ]

    def ours() -> Values:
        sites = [site, *wb.neurons.writing_sites(model, site)]
        activations = wb.cache_activations(model, [*unsafe, *safe], sites)
        difference = wb.neurons.class_difference(activations, unsafe, safe)
        parts = wb.neurons.direct_attribution(model, site, direction, difference)
        return {"heads": parts.heads, "neurons": parts.neurons}

    def raw() -> Values:
        return speed_plain.attribution(subject.raw, *sides, subject.layer, direction)

    total = sum(len(ids) for side in sides for ids, _ in side)
    title = f"heads and neurons of {n} + {n} prompts up to layer {subject.layer}"
    contenders = {PLAIN: Contender(raw), OURS: Contender(ours)}
    return {"works": [subject.measured(title, contenders, compare=same_parts, amount=total)]}


def same_parts(expected: Values, got: Values) -> Check:
    """Compare the parts of a sum: how far all are off, as a share of their absolute sum."""
    missed = sum(float((expected[key] - got[key]).abs().sum()) for key in expected)
    share = missed / sum(float(part.abs().sum()) for part in expected.values())
    return Check(share <= 1e-5, f"parts differ by {share:.1e} of their absolute sum")


def scoring(subject: Subject) -> dict[str, Any]:
    """Measure reading answers: log-probabilities for perplexity, hidden states for a judge."""
    model, sizes = subject.model, subject.sizes
    site = wb.Site(subject.layer, "resid_post")
    conditions: dict[str, Any] = {"unsteered": ()}
    n_conditions, n_prompts = sizes.scored
    for k, vector in enumerate(vectors(subject, n_conditions - 1)):
        conditions[f"c{k}"] = [wb.add_vector(vector, rho=RHO)]
    decoding = wb.Decoding(max_new_tokens=sizes.n_new)
    answers = wb.sweep(model, subject.spread(n_prompts), conditions, decoding)
    answers = [one for one in answers if one.tokens]
    rows = with_answers(model, answers, {})
    given: Rows = [(list(row.ids), list(row.response)) for row in rows]

    def ours() -> Values:
        read = read_rows(model, rows, site=site)
        states = torch.stack([state for state in read.states if state is not None])
        return {"log_probs": torch.cat(read.log_probs), "states": states}

    contenders = {
        PLAIN: Contender(lambda: speed_plain.scoring(subject.raw, given, subject.layer)),
        OURS: Contender(ours),
    }
    title = f"{len(answers)} answers of {len(conditions)} conditions"
    amount = sum(len(row.ids) for row in rows)
    return {"works": [subject.measured(title, contenders, amount=amount, compare=same_readings)]}


def same_readings(expected: Values, found: Values) -> Check:
    """Compare hidden states as shares, log-probabilities in nats.

    A log-probability near 0 is the small difference of logits in the tens, so what rounding does to
    it is no share of it: a hundred-thousandth of a logit of 30 are .0003 nats.
    """
    states = same_values({"states": expected["states"]}, {"states": found["states"]})
    nats = float((expected["log_probs"] - found["log_probs"]).abs().max())
    return Check(
        states.same and nats <= NATS_WITHIN,
        f"states: {states.words}; log-probabilities differ by {nats:.1e} nats at most",
    )


@contextmanager
def on_threads(model: Any, n: int) -> Iterator[None]:
    """Compute with n threads inside the block; whether layers are packed is measured for them."""
    from workbench.models.packing import pack_linears

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n)
        pack_linears(model.original_model, "auto")
        yield
    finally:
        torch.set_num_threads(before)
        pack_linears(model.original_model, "auto")
