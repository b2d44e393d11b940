"""Measure contenders in turn: what they compute is compared first, then their time.

Every work has contenders that shall compute the same thing. Each runs once to warm up, and what it
gives is compared; then all of them run once a round, and CPU time (of all threads) and wall time
are kept round by round.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

START = time.monotonic()


ACTIVATIONS_WITHIN = 1e-5
"""Largest relative difference of activations that is taken for rounding."""


class PeerFailed(RuntimeError):  # noqa: N818 - it says what it is where it is caught
    """Say that a contender in an environment of its own cannot go on, and why."""


class Spent(NamedTuple):
    """Seconds of one run."""

    cpu: float
    wall: float


class Check(NamedTuple):
    """Whether a contender computed the same, and in which numbers that shows."""

    same: bool
    words: str


class Contender(NamedTuple):
    """One way to do a work.

    Attributes:
        run: Does the work; what it returns counts as its time if it is ``Spent``.
        result: Does the work and gives what is compared; ``run`` where it is None.
        like: The contender that it must agree with; the first one where it is None.
        compare: How it is compared; as the work says where it is None.
    """

    run: Callable[[], Any]
    result: Callable[[], Any] | None = None
    like: str | None = None
    compare: Callable[[Any, Any], Check] | None = None


def say(words: str) -> None:
    """Print progress, with the minutes since the start."""
    minutes, seconds = divmod(int(time.monotonic() - START), 60)
    print(f"[{minutes:2d}:{seconds:02d}] {words}", file=sys.stderr, flush=True)


def timed(run: Callable[[], Any]) -> Spent:
    """Run once and give its seconds; a GPU is waited for before and after."""
    gc.collect()
    _wait_for_device()
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    _wait_for_device()
    spent = Spent(time.process_time() - cpu, time.perf_counter() - wall)
    return result if isinstance(result, Spent) else spent


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def work(
    title: str,
    contenders: Mapping[str, Contender],
    compare: Callable[[Any, Any], Check],
    rounds: int,
    *,
    amount: float | Callable[[Any], float],
    clock: str = "cpu",
) -> dict[str, Any]:
    """Compare what contenders compute, then measure them in turn.

    Args:
        title: What is computed.
        contenders: The first one is what the others are compared with.
        compare: Says of an expected and a given result whether they are the same.
        rounds: How often each is measured.
        amount: Tokens of the work, or what counts them in a contender's result.
        clock: Whether ratios are those of "cpu" or of "wall" seconds.

    Returns:
        Times by contender and round, checks, and the reasons of those that failed.
    """
    baseline = next(iter(contenders))
    results: dict[str, Any] = {}
    checks: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, contender in contenders.items():
        say(f"{title}: check of {name}")
        try:
            results[name] = (contender.result or contender.run)()
        except PeerFailed as reason:
            failed[name] = str(reason)
            say(f"{name} FAILED: {reason}")
            continue
        check = contender.compare or compare
        checks[name] = check(results[contender.like or baseline], results[name])._asdict()
        say(f"{title}: {name}: {checks[name]['words']}")
    amounts = {n: amount(one) if callable(amount) else amount for n, one in results.items()}
    del results
    running = {name: one.run for name, one in contenders.items() if name not in failed}
    times, late = measured(title, running, rounds)
    return {
        "title": title,
        "baseline": baseline,
        "amounts": {name: amounts[name] for name in times},
        "clock": clock,
        "times": times,
        "checks": {name: checks[name] for name in times},
        "failed": failed | late,
    }


def measured(
    title: str, running: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Measure each once a round; each round begins with another one.

    Returns:
        Seconds by contender, clock and round; and why some did not finish.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in running}
    gc.collect()
    gc.freeze()  # what is there already need not be looked through before every run
    failed: dict[str, str] = {}
    names = list(running)
    for turn in range(rounds):
        say(f"{title}: round {turn + 1} of {rounds}")
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            try:
                spent[name].append(timed(running[name]))
            except PeerFailed as reason:
                failed[name] = str(reason)
                say(f"{name} FAILED: {reason}")
    gc.unfreeze()
    times = {
        name: {"cpu": [one.cpu for one in rows], "wall": [one.wall for one in rows]}
        for name, rows in spent.items()
        if name not in failed
    }
    return times, failed


def median(values: Sequence[float]) -> float:
    """Give the median of rounds."""
    return statistics.median(values)


def seconds_of(one: Mapping[str, Any], name: str, clock: str | None = None) -> list[float]:
    """Give a contender's seconds, round by round."""
    return one["times"][name][clock or one["clock"]]


def ratios(one: Mapping[str, Any], slow: str, quick: str) -> list[float]:
    """Say how many times as fast ``quick`` was as ``slow``.

    Returns:
        The ratio of medians, then those of each round.
    """
    slow_seconds, quick_seconds = seconds_of(one, slow), seconds_of(one, quick)
    by_round = [a / b for a, b in zip(slow_seconds, quick_seconds, strict=True)]
    return [median(slow_seconds) / median(quick_seconds), *by_round]


def same_values(expected: Mapping[Any, torch.Tensor], got: Mapping[Any, torch.Tensor]) -> Check:
    """Compare activations: for each key a row per prompt; keys that are missing are no match."""
    missing = [key for key in expected if key not in got]
    if missing:
        return Check(False, f"{len(missing)} of {len(expected)} sites missing, {missing[0]} first")
    worst = 0.0
    for key, rows in expected.items():
        rows, others = rows.double().cpu(), got[key].double().cpu()
        if rows.shape != others.shape:
            return Check(False, f"{key}: {tuple(others.shape)}, not {tuple(rows.shape)}")
        worst = max(worst, float(((rows - others).norm(dim=-1) / rows.norm(dim=-1)).max()))
    return Check(worst <= ACTIVATIONS_WITHIN, f"largest relative difference {worst:.1e}")


def same_tokens(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> Check:
    """Compare answers by their tokens."""
    pairs = list(zip(expected, got, strict=True))
    n_equal = sum(list(a) == list(b) for a, b in pairs)
    return Check(n_equal == len(pairs), f"tokens equal in {n_equal} of {len(pairs)} answers")
