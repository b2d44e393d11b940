"""Count what it would bring to refill ended rows of a batch, and to make batches larger.

    python benchmarks/refill.py runs/demo/test.jsonl             # with the steps measured here
    python benchmarks/refill.py FILE --steps 1:57 16:110 96:260  # with given milliseconds

Answers of a file are taken as they are, in the order in which batches are made: by prompt, with all
conditions of a prompt together. Today's loop drops ended rows when an eighth of a batch has ended;
the other one lets waiting rows join as soon as so many have. Time is counted by a cost per pass,
between whose measured points lie straight lines; reading a prompt costs what a step with as many
rows does.
"""

from __future__ import annotations

import argparse
import bisect
import json
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

import workbench as wb
from workbench.models.forward import fast, forward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Cost = Callable[[int], float]

ROWS = (1, 16, 48, 96, 192, 384)
SIZES = (96, 128, 192, 256)
SHARES = (8, 4, 2)
"""A refill waits until one of so many rows has ended."""


class Work(NamedTuple):
    """Hold the work of all batches.

    Attributes:
        seconds: Time.
        steps: Steps of decoding.
        rows: Rows of all steps together.
        refills: Passes that read prompts, the first of each batch too.
    """

    seconds: float
    steps: int
    rows: int
    refills: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="answers that a run has written")
    parser.add_argument("--steps", nargs="+", help="ROWS:MILLISECONDS, at least two")
    parser.add_argument("--model", default="embedded", help="whose steps are measured")
    parser.add_argument("--prompt", type=int, default=20, help="tokens behind the shared prefix")
    options = parser.parse_args()
    points = given(options.steps) if options.steps else measured(options.model)
    print("milliseconds a step:", ", ".join(f"{rows}: {ms:.0f}" for rows, ms in points))
    cost = between(points)
    for name, lengths in [*((str(file), read(file)) for file in options.files), made_up()]:
        print(f"\n{name}: {len(lengths)} answers of {statistics.mean(lengths):.1f} tokens")
        print("| rows | loop | refills | steps | rows a step | seconds | gain |")
        print("|---|---|---|---|---|---|---|")
        base = dropping(lengths, SIZES[0], options.prompt, cost)
        for size in SIZES:
            row("drops", size, dropping(lengths, size, options.prompt, cost), base)
            for share in SHARES:
                work = refilling(lengths, size, options.prompt, cost, size // share)
                row(f"refills at 1/{share}", size, work, base)


def row(loop: str, size: int, work: Work, base: Work) -> None:
    """Print a line of the table."""
    gain = base.seconds / work.seconds - 1
    print(
        f"| {size} | {loop} | {work.refills} | {work.steps} | {work.rows / work.steps:.0f} | "
        f"{work.seconds:.0f} | {gain:+.1%} |"
    )


def read(file: Path) -> list[int]:
    """Read the lengths of a file's answers, the token that ends an answer included."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows.sort(key=lambda one: (one["prompt_id"], one["condition"]))
    return [max(1, len(one["tokens"]) + (one["finish"] == "eos")) for one in rows]


def made_up(n: int = 960, mean: float = 150.0, longest: int = 512) -> tuple[str, list[int]]:
    """Draw lengths that no run here has: long answers that may end at any token alike."""
    draw = random.Random(0)
    lengths = [min(longest, 1 + int(draw.expovariate(1 / mean))) for _ in range(n)]
    return f"made up, exponential, at most {longest}", lengths


def dropping(lengths: Sequence[int], size: int, n_prompt: int, cost: Cost) -> Work:
    """Count the work of the loop that only drops rows."""
    seconds, steps, rows, passes = 0.0, 0, 0, 0
    for start in range(0, len(lengths), size):
        left = [length - 1 for length in lengths[start : start + size]]
        seconds += cost(len(left) * n_prompt)
        passes += 1
        while any(one > 0 for one in left):
            left = dropped(left)
            seconds, steps, rows = seconds + cost(len(left)), steps + 1, rows + len(left)
            left = [one - 1 for one in left]
    return Work(seconds, steps, rows, passes)


def refilling(lengths: Sequence[int], size: int, n_prompt: int, cost: Cost, least: int) -> Work:
    """Count the work of a loop that lets waiting rows join where ``least`` rows have ended."""
    seconds, steps, rows, passes = 0.0, 0, 0, 0
    left: list[int] = []
    waiting = list(lengths)
    while waiting or any(one > 0 for one in left):
        if waiting and size - sum(one > 0 for one in left) >= least:
            left = [one for one in left if one > 0]
            new, waiting = waiting[: size - len(left)], waiting[size - len(left) :]
            seconds += cost(len(new) * n_prompt)
            passes += 1
            left += [length - 1 for length in new]
            continue
        left = left if waiting else dropped(left)
        seconds, steps, rows = seconds + cost(len(left)), steps + 1, rows + len(left)
        left = [one - 1 for one in left]
    return Work(seconds, steps, rows, passes)


def dropped(left: list[int]) -> list[int]:
    """Drop ended rows where an eighth of them has ended, as the decode loop does."""
    alive = [one for one in left if one > 0]
    return alive if len(left) - len(alive) >= max(1, len(left) // 8) else left


def given(steps: Sequence[str]) -> list[tuple[int, float]]:
    """Read the costs that were given."""
    pairs = (step.split(":") for step in steps)
    return sorted((int(rows), float(milliseconds)) for rows, milliseconds in pairs)


def measured(name: str, n_steps: int = 8, columns: int = 64) -> list[tuple[int, float]]:
    """Measure the median of some steps of decoding, behind as many columns as answers have."""
    model = wb.load_model(name)
    device = next(iter(model.parameters())).device
    points = []
    for rows in ROWS:
        tokens = torch.randint(100, 1000, (rows, columns), device=device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        seconds = []
        with torch.no_grad(), fast(model):
            logits, cache = forward(model, tokens, mask, use_cache=True)
            for _ in range(n_steps):
                start = time.perf_counter()
                mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
                chosen = logits.argmax(dim=-1)[:, None]
                logits, cache = forward(model, chosen, mask, cache=cache, use_cache=True)
                float(logits[0, 0])  # wait for the device
                seconds.append(time.perf_counter() - start)
        points.append((rows, 1000 * statistics.median(seconds)))
    return points


def between(points: Sequence[tuple[int, float]]) -> Cost:
    """Make a function that gives the seconds of a pass over so many rows or tokens."""
    at = [rows for rows, _ in points]

    def cost(rows: int) -> float:
        if rows == 0:
            return 0.0
        place = min(max(bisect.bisect_left(at, rows), 1), len(at) - 1)
        (x, y), (x_next, y_next) = points[place - 1], points[place]
        return (y + (y_next - y) * (rows - x) / (x_next - x)) / 1000

    return cost


if __name__ == "__main__":
    main()
