"""Measure this machine and two jobs on it, and print what the cost model predicted beside it.

    python benchmarks/scale_check.py             # two models, all threads, up to five minutes
    python benchmarks/scale_check.py --json FILE # keeps the numbers, too

Product rate and bandwidth are measured for each model on matrices of its own shapes (the plain
product, or the packed one where the model was packed), the overhead of a block on a pass over one
token. Caching and steered answers are then predicted from config.json and these three numbers
alone, and done. Times are CPU seconds of all threads divided by their number, so that what else
runs disturbs little; on an idle machine they are the seconds on the wall, which stand beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import workbench as wb  # noqa: E402
from workbench.engines.architecture import Architecture, architecture_of  # noqa: E402
from workbench.engines.cost import HARDWARE, Machine, Work, answering, caching  # noqa: E402
from workbench.engines.plan import make_plan  # noqa: E402
from workbench.models.batches import batches_under_budget, order_by_length  # noqa: E402
from workbench.models.forward import reading as forward_reading  # noqa: E402
from workbench.models.forward import shared_prefix_length  # noqa: E402
from workbench.models.load import load_notes  # noqa: E402
from workbench.models.tokens import encode  # noqa: E402

MODELS = ("embedded", "qwen2.5-coder-0.5b")
PROMPTS = {"embedded": 192, "qwen2.5-coder-0.5b": 96}
NEW_TOKENS = 24
ROWS = 48
"""Prompts whose two answers are written together."""
ALLOWED = 0.25
"""Largest share by which a prediction may miss."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--prompts", type=int, help="prompts for each model (default: 192 and 96)")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        rows += check(name, options.prompts or PROMPTS.get(name, 64))
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    missed = [row for row in rows if abs(row["ratio"] - 1) > ALLOWED]
    print(f"{len(rows) - len(missed)} of {len(rows)} predictions within {ALLOWED:.0%}")
    return 1 if missed else 0


def check(name: str, n_prompts: int) -> list[dict[str, Any]]:
    """Measure the machine for a model, predict its two jobs, and do them."""
    model = wb.load_model(name, device="cpu")
    config = model.original_model.config
    counted = architecture_of(config.to_dict(), name)
    assert counted.parameters == sum(p.numel() for p in model.original_model.parameters())
    notes = load_notes(model)
    is_packed = bool(notes and notes.packing.packed)
    machine = measured_machine(model, counted, packed=is_packed)
    kept = wb.load_prompts()[:n_prompts]
    work, of_answers = works_of(model, kept)
    print(
        f"{name}: {counted.parameters / 1e6:.0f} million parameters, {machine.product / 1e9:.0f} "
        f"GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s, {machine.overhead * 1e6:.0f} us a block, "
        f"{work.prompt_tokens:.1f} tokens a prompt behind {work.prefix_tokens:.0f}",
        flush=True,
    )
    warm = wb.cache_activations(model, kept[:8], work.sites)  # checks the faster ways, once
    vector = random_vector(model, warm[work.sites[-1]])
    conditions = {"unsteered": (), "steered": [wb.add_vector(vector, rho=0.1)]}
    wb.sweep(model, kept[:4], conditions, wb.Decoding(2))
    _, spent = timed(lambda: wb.cache_activations(model, kept, work.sites))
    row = _row(name, "caching", caching(counted, machine, work).seconds, spent, machine)
    answers, spent = timed(
        lambda: wb.sweep(model, kept, conditions, wb.Decoding(NEW_TOKENS, batch_size=2 * ROWS))
    )
    written = sum(len(answer.tokens) + (answer.finish == "eos") for answer in answers)
    of_answers = dataclasses.replace(of_answers, new_tokens=written / len(answers))
    predicted = answering(counted, machine, of_answers).seconds
    return [row, _row(name, "answers", predicted, spent, machine)]


def random_vector(model: Any, acts: Any) -> Any:
    """Make a vector that steers in no particular direction."""
    unsafe, safe = list(acts.prompts[:4]), list(acts.prompts[4:8])
    fitted = wb.steering_vector(model, [p.text for p in unsafe], [p.text for p in safe])
    return wb.random_vector(fitted, seed=0)


def works_of(model: Any, prompts: list[Any]) -> tuple[Work, Work]:
    """Count the tokens that run for each prompt, padding included, and those all share.

    Activations of the user's words are read up to their end; before an answer the rest of the
    template is read, too.
    """
    rows = encode(model, prompts)
    prefix = shared_prefix_length(rows, lambda row: row.span("content")[0])
    ordered = [rows[i] for i in order_by_length([len(row.ids) for row in rows])]
    words = answers = 0
    for batch in batches_under_budget(ordered, 32, 4096):
        words += len(batch) * (max(row.span("content")[1] for row in batch) - prefix)
    for start in range(0, len(ordered), ROWS):  # two conditions: half as many prompts to a batch
        batch = ordered[start : start + ROWS]
        answers += len(batch) * (len(batch[0].ids) - prefix)
    n_layers = model.cfg.n_layers
    sites = tuple(wb.Site(layer, "resid_post") for layer in (n_layers // 2, n_layers - 1))
    of_words = Work(
        prompts=len(prompts),
        prompt_tokens=words / len(prompts),
        prefix_tokens=prefix,
        new_tokens=NEW_TOKENS,
        conditions=2,
        sites=sites,
        weight_bytes=4,
    )
    return of_words, dataclasses.replace(of_words, prompt_tokens=answers / len(prompts))


def measured_machine(model: Any, counted: Architecture, *, packed: bool) -> Machine:
    """Measure product rate, bandwidth and the overhead of a block, on the model's own shapes."""
    layers = [m.weight for m in model.original_model.modules() if isinstance(m, torch.nn.Linear)]
    layers = layers[: max(8, len(layers) // 4)]  # a quarter of the model does not fit a cache
    weights = [weight.detach().float().clone() for weight in layers]
    n_weights = sum(weight.numel() for weight in weights)
    rows = 96
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
    one = {width: x[:1].contiguous() for width, x in inputs.items()}
    product = multiply(weights, inputs, packed=packed)
    seconds = best(product)
    reading = best(multiply(weights, one, packed=False))
    last = wb.Site(counted.n_layers - 1, "resid_post").hook_name
    token = torch.tensor([[5]])
    with torch.no_grad(), forward_reading(model, [(last, lambda _: None)]) as run:
        one_token = best(lambda: run(token, torch.ones_like(token, dtype=torch.bool)))
    bandwidth = 4 * n_weights / reading
    read = 4 * counted.weights_read(1, with_head=False) / bandwidth
    overhead = max(0.0, (one_token - read) / counted.n_layers)
    return dataclasses.replace(
        HARDWARE["two-cores"],
        name="this machine",
        product=2 * n_weights * rows / seconds,
        bandwidth=bandwidth,
        overhead=overhead,
    )


def multiply(
    weights: list[torch.Tensor], inputs: dict[int, torch.Tensor], *, packed: bool
) -> Callable[[], None]:
    """Make the product of fixed inputs with all weights."""
    if not packed:

        def plain() -> None:
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        return plain
    rows = next(iter(inputs.values())).shape[0]
    copies = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]

    def through_packed() -> None:
        for weight, copy in zip(weights, copies, strict=True):
            x = inputs[weight.shape[1]]
            torch.ops.mkldnn._linear_pointwise(x, copy, None, "none", [], "")

    return through_packed


def best(run: Callable[[], None], rounds: int = 5) -> float:
    """Give the median of some rounds, after one that warms up."""
    run()
    times = sorted(timed(run)[1][0] for _ in range(rounds))
    return times[rounds // 2]


def timed(run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """Run something; give its CPU seconds by thread, and its seconds on the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    with torch.no_grad():
        result = run()
    spent = (time.process_time() - cpu) / torch.get_num_threads()
    return result, (spent, time.perf_counter() - wall)


def _row(
    model: str, job: str, predicted: float, spent: tuple[float, float], machine: Machine
) -> dict[str, Any]:
    return {
        "model": model,
        "job": job,
        "predicted": predicted,
        "measured": spent[0],
        "wall": spent[1],
        "ratio": predicted / spent[0],
        "product": machine.product,
        "bandwidth": machine.bandwidth,
        "overhead": machine.overhead,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Write the comparison as a table of Markdown, and when one such machine is not enough."""
    lines = [
        "| model | job | predicted s | measured s | on the wall | predicted / measured |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['job']} | {row['predicted']:.1f} | {row['measured']:.1f} | "
        f"{row['wall']:.1f} | {row['ratio']:.2f} |"
        for row in rows
    ]
    names = {"embedded": "smollm2-135m", "qwen2.5-coder-0.5b": "qwen2.5-0.5b"}
    for row in rows:
        if row["job"] == "caching" and row["model"] in names:
            rates = {name: row[name] for name in ("product", "bandwidth")}
            plan = make_plan(
                names[row["model"]], "two-cores", measured=rates, weight_bytes=4, hours=24
            )
            lines += [
                "",
                f"A million prompts with {row['model']} on this machine: {plan.seconds / 3600:.0f} "
                f"hours; {plan.machines} such machines do it in a day.",
            ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
