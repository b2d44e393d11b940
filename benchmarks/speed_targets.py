"""Say of each target of speed what one run measured, and whether that meets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import speed_machine
from speed_measure import median, ratios, seconds_of
from speed_tasks import GENERATE, LOOPS, OURS, RAW, STEERED, SWEEP, UNSTEERED
from speed_workers import KNOWN

NOT_PEERS = (RAW, OURS, "workbench, no shared prefix", "workbench, plain routes")


class Target(NamedTuple):
    """One line of the table of targets.

    Attributes:
        what: What is measured.
        asked: The target, in words.
        met: Whether a number meets it.
        values: The number and those of single rounds; empty where this run did not measure it.
        said: How the number is written.
    """

    what: str
    asked: str
    met: Callable[[float], bool]
    values: list[float]
    said: Callable[[float], str]


def _times(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def at_least(what: str, limit: float, values: list[float], said: Any = _times) -> Target:
    """Make a target that a number must reach."""
    return Target(what, f">= {said(limit)}", lambda value: value >= limit, values, said)


def at_most(what: str, limit: float, values: list[float], said: Any = _times) -> Target:
    """Make a target that a number must not pass."""
    return Target(what, f"<= {said(limit)}", lambda value: value <= limit, values, said)


def targets(results: dict[str, Any]) -> list[Target]:
    """List all targets beside what was measured.

    The first model of the run is the one that they are set for, the second the larger one.
    """
    measured = list(results["models"].items())
    name, first = measured[0]
    second_name, second = measured[1] if len(measured) > 1 else ("a larger model", {})
    lines = [
        at_least(f"extraction / {RAW}, short prompts, {name}", 3.7, raw_ratio(first, "extraction")),
        at_least(f"extraction / {RAW}, long texts, {name}", 1.5, raw_ratio(first, "long")),
    ]
    by_peer = peer_ratios(first)
    missing = [peer for peer in KNOWN if not any(one.startswith(f"{peer} ") for one in by_peer)]
    by_peer |= {peer: [] for peer in missing}
    for peer, values in by_peer.items():
        lines.append(at_least(f"extraction / {peer}, short prompts, {name}", 4.8, values))
    lines += [
        at_least(f"steered answers / {GENERATE}, {name}", 2.0, generation_ratio(first)),
        at_most(f"cost of steering a token, {name}", 0.02, steering_cost(first), _percent),
        at_least(f"sweep / a loop of generations, {name}", 4.0, sweep_ratio(first)),
        at_least(f"extraction / {RAW}, {second_name}", 3.0, raw_ratio(second, "extraction")),
        at_least(f"steered answers / {GENERATE}, {second_name}", 1.3, generation_ratio(second)),
        at_least(f"sweep / a loop of generations, {second_name}", 3.0, sweep_ratio(second)),
        at_least(
            f"share of the best exact product, extraction, {name}",
            0.75, extraction_share(first), _percent,
        ),
        at_least(
            f"share of the best exact product, decoding many rows, {name}",
            0.5, decoding_share(first), _percent,
        ),
        *_of_demo(results.get("demo") or {}),
    ]  # fmt: skip
    return lines


def _of_demo(demo: dict[str, Any]) -> list[Target]:
    stages = demo.get("stages", {})
    share = [stages["evaluate"] / stages["test"]] if stages.get("test") else []
    wall = [demo["wall"] / 60] if "wall" in demo else []
    return [
        at_most("evaluate stage / answering stage of a run (make demo)", 0.33, share),
        at_most("make demo after installation, minutes on the wall", 4.0, wall),
    ]


def raw_ratio(model: dict[str, Any], part: str) -> list[float]:
    """Say how many times as fast reading is as raw hooks."""
    works = model.get(part, {}).get("works", [])
    return ratios(works[0], RAW, OURS) if works else []


def peer_ratios(model: dict[str, Any]) -> dict[str, list[float]]:
    """Say how many times as fast reading short prompts is as each peer, at the peer's own work."""
    return {
        name: ratios(one, name, OURS)
        for one in model.get("extraction", {}).get("works", [])
        for name in one["times"]
        if name not in NOT_PEERS
    }


def generation_ratio(model: dict[str, Any]) -> list[float]:
    """Say how many times as fast steered answers are as unsteered ones of Hugging Face."""
    works = model.get("generation", {}).get("works", [])
    return ratios(works[0], GENERATE, STEERED) if works else []


def steering_cost(model: dict[str, Any]) -> list[float]:
    """Say what share of a token's time steering adds."""
    works = model.get("generation", {}).get("works", [])
    return cost(works[0], STEERED, UNSTEERED) if works else []


def cost(one: dict[str, Any], dear: str, cheap: str) -> list[float]:
    """Say what share of a token's time one way of answering costs over another."""
    tokens = one["amounts"][cheap] / one["amounts"][dear]
    return [tokens * ratio - 1 for ratio in ratios(one, dear, cheap)]


def sweep_ratio(model: dict[str, Any]) -> list[float]:
    """Say how many times as fast a sweep is as its conditions one after the other."""
    works = model.get("sweep", {}).get("works", [])
    return ratios(works[0], LOOPS, SWEEP) if works else []


def extraction_share(model: dict[str, Any], part: str = "extraction") -> list[float]:
    """Say what share of the best exact product at 512 rows reading reaches, in CPU time."""
    found, works = model.get("machine"), model.get(part, {}).get("works", [])
    if not found or not works:
        return []
    flop = found["products"]["flop"]["512"] * model[part]["computed"]
    best = speed_machine.best_exact(found["products"], 512, "cpu")
    seconds = seconds_of(works[0], OURS, "cpu")
    return [flop / one / best for one in (median(seconds), *seconds)]


def decoding_share(model: dict[str, Any], clock: str = "cpu") -> list[float]:
    """Say what share of the best exact product at 96 rows decoding alone reaches."""
    found = model.get("machine")
    if not found or not found["decoding"]:
        return []
    decoding = found["decoding"]
    flop = found["products"]["flop"]["96"] * decoding["row-steps"]
    best = speed_machine.best_exact(found["products"], 96, clock)
    short, long = (decoding["times"][name][clock] for name in ("short", "long"))
    alone = [median(long) - median(short), *(b - a for a, b in zip(short, long, strict=True))]
    if min(alone) <= 0:
        return []  # the machine was too busy to tell longer answers from shorter ones
    return [flop / seconds / best for seconds in alone]
