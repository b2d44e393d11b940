"""Measure one decode step: a token of each row, behind a prompt that is in the cache.

    python benchmarks/decode_step.py                                   # the embedded model
    python benchmarks/decode_step.py qwen2.5-coder-0.5b --dtype bfloat16 --rows 1 16
    python benchmarks/decode_step.py --profile                         # a step's parts

Four ways are timed in turn, and their medians over rounds printed as a table: blocks computed
directly, Hugging Face's own modules (without direct blocks), TransformerLens's components (plain),
and, as the limit of the first two, the products with weights alone. A step includes the choice of
the likeliest token. With ``--profile`` a second table says what a step is made of: the functions of
torch by their own time under its profiler, and as Python what is left of a step timed without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import workbench as wb
from workbench.generation._choice import likeliest
from workbench.models.forward import fast, forward, plain, prefix_cache, rows_of_cache
from workbench.models.packing import is_packed
from workbench.models.trusted_paths import ROUTES, assumed, untrusted_paths

PROMPT, WARM_UP = 64, 2
"""Tokens behind which the steps begin, and steps before the clock runs."""
PARTS = ("products", "logits", "attention", "choice of the token", "other functions", "Python")
CHOICE = {"amax", "max", "argmax", "isfinite", "all"}
PRODUCTS = {"mm", "addmm", "linear", "_linear_pointwise", "bmm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="embedded", help="what load_model takes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 96])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--profile", action="store_true", help="also print the parts of a step")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model: Any = wb.load_model(options.model, device="cpu", dtype=options.dtype)
    untrusted = untrusted_paths(model)
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"{model.cfg.model_name}, {options.dtype}, {torch.get_num_threads()} threads, {capability},"
        f" {'packed' if is_packed(model) else 'not packed'}, untrusted: {dict(untrusted) or 'none'}"
    )
    print("| rows | products | direct | without direct | plain | products / direct |")
    print("|---|---|---|---|---|---|")
    with torch.no_grad():
        for n_rows in options.rows:
            times = step_times(model, n_rows, options.rounds, options.steps)
            cells = " | ".join(spread(seconds) for seconds in times.values())
            share = statistics.median(times["products"]) / statistics.median(times["direct"])
            print(f"| {n_rows} | {cells} | {share:.0%} |", flush=True)
        if options.profile:
            print_parts(model, options.rows, options.steps)


def print_parts(model: Any, rows: list[int], steps: int) -> None:
    """Print how many milliseconds of a step each kind of work takes."""
    print(f"\n| rows | step | {' | '.join(PARTS)} |\n|{'---|' * (len(PARTS) + 2)}")
    prompt = torch.arange(1000, 1000 + PROMPT).tolist()
    cache = prefix_cache(model, prompt)
    for n_rows in rows:
        new = torch.full((n_rows, 1), 2000)
        seconds = statistics.median(seconds_of_a_step(model, cache, new, steps) for _ in range(7))
        spent = dict.fromkeys(PARTS, 0.0)
        profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        seconds_of_a_step(model, cache, new, steps, profiler)
        for event in profiler.key_averages(group_by_input_shape=True):
            part = part_of(event.key, event.input_shapes, model.cfg.d_vocab)
            spent[part] += event.self_cpu_time_total / 1e6 / steps
        spent["Python"] = max(0.0, seconds - sum(spent.values()))
        cells = " | ".join(f"{1000 * part:.1f} ms" for part in spent.values())
        print(f"| {n_rows} | {1000 * seconds:.1f} ms | {cells} |", flush=True)


def part_of(name: str, shapes: list[list[int]], d_vocab: int) -> str:
    """Say which part of a step a function of torch belongs to."""
    short = name.rpartition("::")[2]
    if short in PRODUCTS:
        is_logits = any(d_vocab in shape for shape in shapes if shape)
        return "logits" if is_logits else "products"
    if "attention" in short:
        return "attention"
    return "choice of the token" if short in CHOICE else "other functions"


def step_times(model: Any, n_rows: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Time a step in every way, in turn; seconds of each round."""
    trusted = frozenset(ROUTES) - untrusted_paths(model).keys()
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "direct": lambda: assumed(trusted),
        "without direct": lambda: assumed(trusted - {"direct"}),
        "plain": lambda: plain(model),
    }
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(100, 20_000, (PROMPT,), generator=generator).tolist()
    cache = prefix_cache(model, prompt)
    new = torch.randint(100, 20_000, (n_rows, 1), generator=generator)
    products = all_products(model, n_rows)
    products()
    times: dict[str, list[float]] = {name: [] for name in ("products", *ways)}
    for _ in range(rounds + 1):  # the first one warms up
        times["products"].append(seconds_of(products))
        for name, way in ways.items():
            with way():
                times[name].append(seconds_of_a_step(model, cache, new, steps))
    return {name: seconds[1:] for name, seconds in times.items()}


def seconds_of_a_step(
    model: Any, cache: Any, new: torch.Tensor, steps: int, profiler: profile | None = None
) -> float:
    """Write tokens behind a copy of the cache; seconds per step, the first steps left out."""
    cache = rows_of_cache(cache, torch.zeros(len(new), dtype=torch.long))
    start = 0.0
    with fast(model):
        for step in range(WARM_UP + steps):
            if step == WARM_UP and profiler is not None:
                profiler.start()
            if step == WARM_UP:
                start = time.perf_counter()
            mask = torch.ones(len(new), PROMPT + step + 1, dtype=torch.bool)
            logits, cache = forward(model, new, mask, cache=cache, use_cache=True)
            new = likeliest(logits)[1][:, None]
    seconds = time.perf_counter() - start
    if profiler is not None:
        profiler.stop()
    return seconds / steps


def all_products(model: Any, n_rows: int) -> Callable[[], None]:
    """Give a function that multiplies random rows with every linear layer of the model, in order.

    Layers are called as they are, packed ones packed.
    """
    layers = [layer for layer in model.original_model.modules() if type(layer) is nn.Linear]
    inputs = {
        layer.in_features: torch.randn(n_rows, layer.in_features, dtype=layer.weight.dtype)
        for layer in layers
    }

    def run() -> None:
        for layer in layers:
            layer.forward(inputs[layer.in_features])

    return run


def seconds_of(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> str:
    """Write the median in milliseconds, and the range."""
    low, middle, high = (
        1000 * value for value in (min(seconds), statistics.median(seconds), max(seconds))
    )
    return f"{middle:.1f} ms ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
