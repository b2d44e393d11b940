"""Search among settings with about half of the answers that trying all of them takes.

Settings that differ in strength alone stand in a row, weakest first: what a vector breaks grows
with its strength. So each row is tried in the middle, then a step weaker where that is over the
limits or else a step stronger, and only the rows that lead go on. Settings that the leader beats on
the same questions leave before their round is over.

Source: successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943), with the races of Maron
and Moore (1994), by a sign test instead of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scipy.special import bdtrc

from workbench.safesteer.search import (
    BEHIND,
    AnswerAndJudge,
    Found,
    Judged,
    Left,
    Round,
    as_left,
    best_of_each,
    cost,
    plan_rounds,
)
from workbench.safesteer.settings import Setting

KEEP, GROWTH = 3, 3
"""Settings of the last round, and how many times as many prompts each round has."""
FEWEST_PROMPTS = 3
"""Prompts of the first round, at least, where the budget is one that nobody asked for."""
CONFIDENCE = 0.95
"""How sure a sign test must be that the leader is better, for a setting to leave."""
TOO_STRONG = "a weaker setting of the same vector is over the limits"
NOT_NEEDED = "its vector did not lead at another strength"
BEATEN = "the leader is better on the same questions, by a sign test"
KL_TOO_HIGH = "over the limit on KL, which was measured before any answer"
"""Why settings are not answered, or not any further, beside ``BEHIND``."""
Screen = Callable[[Sequence[Setting]], set[Setting]]
"""Settings in; those out of which it is known without an answer that they are over a limit."""
Row = tuple[Setting, ...]
"""Settings that differ in strength alone, weakest first."""


def rows_of(settings: Sequence[Setting]) -> list[Row]:
    """Put settings that differ in strength alone into rows, weakest first."""
    rows: dict[Setting, list[Setting]] = {}
    for one in settings:
        is_raw = one.multiplier is not None
        rows.setdefault(one._replace(rho=0.0, multiplier=0.0 if is_raw else None), []).append(one)
    return [tuple(sorted(row, key=lambda s: (s.multiplier or 0.0, s.rho))) for row in rows.values()]


def half_of(settings: Sequence[Setting], n_prompts: int) -> int:
    """Count the answers that an economical search takes at most.

    They are half of those of the exhaustive search; more where few settings differ in strength
    alone or there are few prompts, up to those of successive halving without the settings that are
    kept for their construction's sake.
    """
    n_constructions, n_rows = len({s.construction for s in settings}), len(rows_of(settings))
    rounds = plan_rounds(len(settings), n_prompts)
    share = max(0.5, n_rows / len(settings))
    half = int(min(share * cost(rounds, n_kept=n_constructions), cost(rounds)))
    return max(half, _least(n_rows, min(n_prompts, FEWEST_PROMPTS), n_prompts))


def _least(n_rows: int, first: int, n_prompts: int) -> int:
    """Count the answers of a search that tries each row once and keeps the fewest settings."""
    return cost([Round(n_rows, first), *_later_rounds(KEEP, first, n_prompts)])


def n_tried(settings: Sequence[Setting]) -> int:
    """Count the settings that a search is planned to try: every row, and those that may lead twice.

    Rows that lead are a third of all, and the best one of each construction.
    """
    n_rows, n_constructions = len(rows_of(settings)), len({s.construction for s in settings})
    return min(len(settings), n_rows + math.ceil(n_rows / 3) + n_constructions)


def first_prompts(settings: Sequence[Setting], n_prompts: int, budget: int) -> int:
    """Find how many prompts the first round can have, so that the budget lasts to the end.

    Args:
        settings: What may be tried.
        n_prompts: Tune prompts there are.
        budget: Answers, at most, those of the unsteered model too.
    """
    planned, third = n_tried(settings), math.ceil(len(rows_of(settings)) / 3)
    for first in range(n_prompts, 1, -1):
        if cost([Round(planned, first), *_later_rounds(third, first, n_prompts)]) <= budget:
            return first
    return 1


def _later_rounds(n_settings: int, first: int, n_prompts: int) -> list[Round]:
    """Plan rounds behind the first one, of which the next has so many settings."""
    rounds, size, count = [], first, n_settings
    while size < n_prompts:
        size = min(n_prompts, size * GROWTH)
        rounds.append(Round(max(KEEP, count), size))
        count = math.ceil(count / GROWTH)
    return rounds


def search_economically(
    settings: Sequence[Setting],
    n_prompts: int,
    answer_and_judge: AnswerAndJudge,
    *,
    budget: int | None = None,
    over_a_limit: Screen = lambda _settings: set(),
) -> Found:
    """Find the best setting of all, and of each construction, with few answers.

    A construction whose settings have all left keeps the one that was its best then, so it may be
    chosen on fewer prompts than the best of all.

    Args:
        settings: What may be tried.
        n_prompts: Tune prompts there are.
        answer_and_judge: Answers the first so many prompts under settings, and judges the answers.
        budget: Answers, at most; ``half_of`` the exhaustive search's by default.
        over_a_limit: Says which settings need not be answered to know that they cost too much.

    Raises:
        ValueError: If the budget does not allow one prompt for each row of settings.
    """
    rows = rows_of(settings)
    asked, budget = budget, half_of(settings, n_prompts) if budget is None else budget
    first = first_prompts(settings, n_prompts, budget)
    if asked is None:
        first = max(first, min(n_prompts, FEWEST_PROMPTS))
    least = _least(len(rows), first, n_prompts)
    if asked is not None and least > asked:
        raise ValueError(
            f"a budget of {asked} answers is too small for {len(settings)} settings of "
            f"{len(rows)} vectors and places on {n_prompts} prompts; give at least {least}, or "
            "fewer of them."
        )
    search = _Search(rows, first, answer_and_judge, over_a_limit)
    search.try_rows(room=len(rows) + max(0, budget - least) // first)
    left = budget - n_prompts - first * len(search.judged.values)
    for one in _affordable(len(search.judged.values), first, n_prompts, left):
        search.go_on(one)
    return search.found(settings)


def _affordable(n_settings: int, first: int, n_prompts: int, budget: int) -> list[Round]:
    """Plan rounds behind the first one that have as many settings as the budget allows."""
    count = KEEP
    while count < n_settings and _price(count + 1, first, n_prompts) <= budget:
        count += 1
    return _later_rounds(count, first, n_prompts)


def _price(count: int, first: int, n_prompts: int) -> int:
    """Count the answers of rounds behind the first one, without the unsteered model's."""
    return cost([Round(0, first), *_later_rounds(count, first, n_prompts)]) - n_prompts


@dataclass(eq=False)
class _Search:
    """Hold the state of an economical search."""

    rows: list[Row]
    n_prompts: int
    answer_and_judge: AnswerAndJudge
    over_a_limit: Screen
    judged: Judged = field(init=False)
    left: dict[Setting, Left] = field(default_factory=dict)
    untried: dict[Setting, str] = field(default_factory=dict)
    chosen: dict[str, Setting] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def try_rows(self, *, room: int) -> None:
        """Try each row at one strength, and those that lead at others, on the first prompts.

        Args:
            room: Settings that can be tried, at most.
        """
        self.judged = self.answer_and_judge(self._first_of_rows(), self.n_prompts)
        while steps := self._steps()[: max(0, room - len(self.judged.values))]:
            self.judged = self.judged.joined(self.answer_and_judge(steps, self.n_prompts))
        for row in self.rows:
            for place, one in enumerate(row):
                if one not in self.judged.values:
                    broken = any(self._is_over(weaker) for weaker in row[:place])
                    self.untried.setdefault(one, TOO_STRONG if broken else NOT_NEEDED)
        self._note_round()

    def _is_over(self, setting: Setting) -> bool:
        """Tell whether a setting is known to be over the limits, with answers or without."""
        is_screened = self.untried.get(setting) == KL_TOO_HIGH
        return is_screened or self.judged.excess.get(setting, 0) > 0

    def _first_of_rows(self) -> list[Setting]:
        """Take each row's middle, or what is weaker where that is known to be over a limit.

        A row that is over a limit as a whole is left out, unless its construction has no other.
        """
        places = {row: len(row) // 2 for row in self.rows}
        over = self.over_a_limit([row[place] for row, place in places.items()])
        while weaker := [row for row, at in places.items() if at and row[at] in over]:
            places |= {row: places[row] - 1 for row in weaker}
            over |= self.over_a_limit([row[places[row]] for row in weaker])
        firsts = [row[place] for row, place in places.items()]
        within = {s.construction for s in firsts if s not in over}
        self.untried |= dict.fromkeys(over, KL_TOO_HIGH)
        kept = [s for s in firsts if s not in over or s.construction not in within]
        for one in kept:
            self.untried.pop(one, None)
        return kept

    def _steps(self) -> list[Setting]:
        """Name the next strengths of the rows that lead, the best first.

        A row leads where its best setting is among the first third, or the best of its
        construction.
        """
        ranked = self.judged.ranked
        leading = {*ranked[: math.ceil(len(self.rows) / 3)], *best_of_each(ranked).values()}
        row_of = {one: row for row in self.rows for one in row}
        steps: dict[Row, Setting | None] = {}
        for one in ranked:
            row = row_of[one]
            if row in steps:
                continue
            steps[row] = None
            place = row.index(one) + (-1 if self.judged.excess[one] > 0 else 1)
            if one in leading and 0 <= place < len(row):
                steps[row] = row[place]
        known = {*self.judged.values, *self.untried}
        new = [one for one in steps.values() if one is not None and one not in known]
        self.untried |= dict.fromkeys(over := self.over_a_limit(new), KL_TOO_HIGH)
        return [one for one in new if one not in over]

    def go_on(self, one: Round) -> None:
        """Answer more prompts under the best settings, but for those that the leader beats."""
        survivors = self.judged.ranked[: one.n_settings]
        beaten = [s for s in survivors if is_beaten(s, survivors[0], self.judged)]
        behind = [s for s in self.judged.values if s not in survivors]
        number = len(self.rounds) - 1
        self.left |= as_left(behind, self.judged, number, BEHIND)
        self.left |= as_left(beaten, self.judged, number, BEATEN)
        alive = [s for s in survivors if s not in beaten]
        self.n_prompts = one.n_prompts
        self.judged = self.answer_and_judge(alive, one.n_prompts)
        self._note_round()

    def _note_round(self) -> None:
        """Note how many settings a round had, and which is each construction's best so far."""
        self.rounds.append(Round(len(self.judged.values), self.n_prompts))
        self.chosen |= best_of_each(self.judged.ranked)

    def found(self, settings: Sequence[Setting]) -> Found:
        """Say what was found, constructions in the order of the settings."""
        self.left |= as_left(list(self.judged.values), self.judged, len(self.rounds) - 1, "")
        chosen = {n: self.chosen[n] for n in dict.fromkeys(s.construction for s in settings)}
        return Found(
            self.left,
            self.untried,
            chosen,
            self.judged.ranked[0],
            self.judged.metrics[None],
            self.judged.front,
            tuple(self.rounds),
        )


def is_beaten(setting: Setting, leader: Setting, judged: Judged) -> bool:
    """Tell whether another setting does better on the same questions, and costs no more.

    A one-sided sign test: of the questions on which the two differ, so many go to the leader that
    chance alone would give it as many in fewer than one of twenty cases.
    """
    if setting == leader or judged.excess[setting] < judged.excess[leader]:
        return False
    pairs = list(zip(judged.headlines[leader], judged.headlines[setting], strict=True))
    won, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    # P(X >= won) = P(X > won - 1)
    return bool(won) and float(bdtrc(won - 1, won + lost, 0.5)) <= 1 - CONFIDENCE
