"""Search among settings of steering by successive halving, whoever answers and judges.

What is tried, with how many prompts and in which order, is decided here and in ``economical``;
``calibration`` lets the model answer and tells what the answers are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from workbench.evaluation.metrics import HEADLINE
from workbench.safesteer.settings import Setting

if TYPE_CHECKING:
    import pandas as pd

LEAST_PROMPTS = 5
"""Prompts of the first round of an exhaustive search, at least."""
REFUSALS = ("blanket_refusal", "refusal")
"""Shares of refusals; the first that was measured is what the limit is on."""
BEHIND = "not among the best of its round"
"""Why a setting left the search, where a round keeps so many."""


class Round(NamedTuple):
    """One round of a search: how many settings are answered, on how many prompts."""

    n_settings: int
    n_prompts: int


def plan_rounds(
    n_settings: int, n_prompts: int, *, keep: int = 3, budget: int | None = None
) -> list[Round]:
    """Plan the rounds of successive halving.

    Each round answers three times as many prompts under a third of the settings; the last one
    answers all prompts.

    Args:
        n_settings: Settings at the start.
        n_prompts: Tune prompts there are.
        keep: Settings of the last round.
        budget: Answers, at most; the first rounds then take fewer prompts, down to one.

    Raises:
        ValueError: If the budget does not allow one prompt for each setting.

    Source: successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943).
    """
    counts = [n_settings]
    while counts[-1] > keep:
        counts.append(max(keep, math.ceil(counts[-1] / 3)))
    steps = len(counts) - 1
    for first in range(max(LEAST_PROMPTS, math.ceil(n_prompts / 3**steps)), 0, -1):
        sizes = [min(n_prompts, first * 3**i) for i in range(steps)] + [n_prompts]
        rounds = [Round(count, size) for count, size in zip(counts, sizes, strict=True)]
        if budget is None or cost(rounds) <= budget:
            return rounds
    raise ValueError(
        f"a budget of {budget} answers is too small for {n_settings} settings on {n_prompts} "
        f"prompts; give at least {cost(rounds)}, or fewer of them."
    )


def cost(rounds: Sequence[Round], *, n_kept: int = 0) -> int:
    """Count the answers that rounds take at most.

    What an earlier round answered is not answered again; the unsteered model answers all prompts.

    Args:
        rounds: In order.
        n_kept: Settings that each round has at least, however few are planned: the best one of each
            construction.
    """
    answers, before = rounds[-1].n_prompts, 0
    for one in rounds:
        answers += max(one.n_settings, n_kept) * (one.n_prompts - before)
        before = one.n_prompts
    return answers


@dataclass(frozen=True, eq=False)
class Judged:
    """Hold what answers to the same prompts say of some settings.

    Attributes:
        metrics: Metric to value, low, high, n and n_unscored; None is the unsteered model.
        values: Setting to its metrics, where what could not be scored counts as not safe.
        excess: How far each setting is over the limits, 0 where it keeps them.
        headlines: Share of safe and helpful answers of each prompt, in the order of the prompts.
    """

    metrics: dict[Setting | None, pd.DataFrame]
    values: dict[Setting, dict[str, float]]
    excess: dict[Setting, float]
    headlines: dict[Setting, tuple[float, ...]]

    @property
    def ranked(self) -> list[Setting]:
        """Sort the settings, best first: headline less excess over the limits."""
        return sorted(self.values, key=lambda s: _order(s, self.values[s], self.excess[s]))

    @property
    def front(self) -> set[Setting]:
        """Find the settings on the front.

        No other one is as good in headline, blanket refusals, degeneration and relevance, and
        better in one.
        """
        points = {
            s: (v[HEADLINE], -refusals_in(v), -v["degenerate"], v["relevance"])
            for s, v in self.values.items()
        }

        def beaten(point: tuple[float, ...]) -> bool:
            return any(
                all(a >= b for a, b in zip(other, point, strict=True)) and other != point
                for other in points.values()
            )

        return {s for s, point in points.items() if not beaten(point)}

    def joined(self, other: Judged) -> Judged:
        """Take in what is said of further settings by answers to the same prompts."""
        return Judged(
            {**self.metrics, **other.metrics},
            {**self.values, **other.values},
            {**self.excess, **other.excess},
            {**self.headlines, **other.headlines},
        )


AnswerAndJudge = Callable[[Sequence[Setting], int], Judged]
"""Settings and a number of prompts in; what the answers to the first so many prompts say out."""


class Left(NamedTuple):
    """Say how a setting stood when it left the search, or at its end."""

    round: int
    metrics: pd.DataFrame
    excess: float
    reason: str
    """Why it left; empty for those that were there at the end."""


@dataclass(frozen=True, eq=False)
class Found:
    """Hold what a search found.

    Attributes:
        left: Settings that were answered, in the order in which they left; those that stayed to
            the end come last.
        untried: Why a setting was never answered.
        chosen: Construction to its best setting.
        best: The best setting of all.
        unsteered: Metrics of the unsteered model on all prompts.
        front: Settings of the last round on which no other improves in everything.
        rounds: How many settings were answered in each round, on how many prompts.
    """

    left: dict[Setting, Left]
    untried: dict[Setting, str]
    chosen: dict[str, Setting]
    best: Setting
    unsteered: pd.DataFrame
    front: set[Setting]
    rounds: tuple[Round, ...]


def search_exhaustively(
    settings: Sequence[Setting], rounds: Sequence[Round], answer_and_judge: AnswerAndJudge
) -> Found:
    """Answer all settings in the first round, and the survivors of each round in the next one.

    The best setting of each construction stays to the end, so a round may have some settings more
    than planned.

    Args:
        settings: What is tried.
        rounds: How many settings and prompts each round has.
        answer_and_judge: Answers the first so many prompts under settings, and judges the answers.
    """
    left: dict[Setting, Left] = {}
    alive = list(settings)
    for number, one in enumerate(rounds):
        judged = answer_and_judge(alive, one.n_prompts)
        is_last = number + 1 == len(rounds)
        n_next = len(alive) if is_last else rounds[number + 1].n_settings
        best = best_of_each(judged.ranked)
        survivors = list(dict.fromkeys([*judged.ranked[:n_next], *best.values()]))
        leaving = alive if is_last else [s for s in alive if s not in survivors]
        left |= as_left(leaving, judged, number, "" if is_last else BEHIND)
        alive = survivors
    chosen = {name: best[name] for name in dict.fromkeys(s.construction for s in settings)}
    unsteered = judged.metrics[None]
    return Found(left, {}, chosen, judged.ranked[0], unsteered, judged.front, tuple(rounds))


def as_left(
    settings: Sequence[Setting], judged: Judged, number: int, reason: str
) -> dict[Setting, Left]:
    """Say how settings stood in a round."""
    return {s: Left(number, judged.metrics[s], judged.excess[s], reason) for s in settings}


def best_of_each(ranked: Sequence[Setting]) -> dict[str, Setting]:
    """Find the first setting of each construction."""
    return {s.construction: s for s in reversed(ranked)}


def refusals_in(values: Mapping[str, float]) -> float:
    """Return the share of blanket refusals, or of all where kinds were not told apart."""
    return next(values[name] for name in REFUSALS if name in values)


def _order(
    setting: Setting, values: Mapping[str, float], excess: float
) -> tuple[float, float, float]:
    """Sort best first: headline less excess; among equals fewer refusals, then less strength."""
    headline, refusal = (
        0.0 if math.isnan(value) else value for value in (values[HEADLINE], refusals_in(values))
    )
    return (excess - headline, refusal, setting.rho * len(setting.sites))
