"""Measure a decode step beside Hugging Face's with a growing and a static cache, and compiled.

    python benchmarks/compiled_step.py

The compiled step is torch.compile's, with a static cache and fixed shapes, as Hugging Face
documents it; it needs a C++ compiler, and some forty seconds for each number of rows. Contenders
take turns; medians are printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from decode_step import PROMPT, WARM_UP, seconds_of_a_step
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import workbench as wb
from workbench.models.forward import prefix_cache
from workbench.models.trusted_paths import untrusted_paths

ROWS, ROUNDS, STEPS = (1, 16, 96), 4, 4


def main() -> None:
    """Print a row of milliseconds for each number of rows."""
    model: Any = wb.load_model("embedded", device="cpu")
    untrusted_paths(model)  # the routes are checked before the clock runs
    raw = AutoModelForCausalLM.from_config(model.original_model.config).eval()
    started = time.perf_counter()
    compiled = torch.compile(raw.forward, dynamic=False)
    with torch.no_grad():
        step_of(compiled, raw, StaticCache, 1)
        print(f"compiled for one row in {time.perf_counter() - started:.0f} s\n")
        ways: dict[str, Callable[[int], float]] = {
            "workbench": lambda n: ours(model, n),
            "growing cache": lambda n: step_of(raw, raw, DynamicCache, n),
            "static cache": lambda n: step_of(raw, raw, StaticCache, n),
            "static cache, compiled": lambda n: step_of(compiled, raw, StaticCache, n),
        }
        print(f"| rows | {' | '.join(ways)} |\n|{'---|' * (len(ways) + 1)}")
        for n in ROWS:
            rounds = [[way(n) for way in ways.values()] for _ in range(ROUNDS)]
            # the first round warms up, and compiles
            medians = [statistics.median(column[1:]) for column in zip(*rounds, strict=True)]
            cells = " | ".join(f"{1000 * seconds:.1f} ms" for seconds in medians)
            print(f"| {n} | {cells} |", flush=True)


def ours(model: Any, n: int) -> float:
    """Time workbench's step for n rows."""
    cache = prefix_cache(model, list(range(1000, 1000 + PROMPT)))
    return seconds_of_a_step(model, cache, torch.full((n, 1), 2000), STEPS)


def step_of(step: Callable[..., Any], raw: Any, kind: Any, n: int) -> float:
    """Time Hugging Face's step for n rows with a kind of cache; weights do not matter."""
    room = {"max_cache_len": PROMPT + WARM_UP + STEPS} if kind is StaticCache else {}
    cache = kind(config=raw.config, **room)
    prompt = torch.arange(1000, 1000 + PROMPT)[None].repeat(n, 1)
    raw(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    new, start = torch.full((n, 1), 2000), 0.0
    for k in range(WARM_UP + STEPS):
        if k == WARM_UP:
            start = time.perf_counter()
        place = torch.tensor([PROMPT + k])
        given = {"cache_position": place, "position_ids": place[None].expand(n, 1)}
        logits = step(new, past_key_values=cache, use_cache=True, **given).logits
        new = logits[:, -1].argmax(dim=-1)[:, None]
    return (time.perf_counter() - start) / STEPS


if __name__ == "__main__":
    main()
