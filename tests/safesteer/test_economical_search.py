"""The economical search: half the answers, as good a choice, and a reason for what is left out."""

from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from workbench.evaluation.metrics import HEADLINE
from workbench.models.sites import Site
from workbench.safesteer.economical import (
    BEATEN,
    KL_TOO_HIGH,
    NOT_NEEDED,
    TOO_STRONG,
    half_of,
    is_beaten,
    rows_of,
    search_economically,
)
from workbench.safesteer.search import (
    BEHIND,
    Judged,
    cost,
    plan_rounds,
    search_exhaustively,
)
from workbench.safesteer.settings import Setting, grid

PLACES = [(Site(layer, "resid_post"),) for layer in range(3)]
NO_METRICS = pd.DataFrame()


class World:
    """Settings with known rates, and answers drawn from them.

    A vector gains with strength until it breaks text, at a strength of its own. Some questions are
    answered safely more easily than others, whatever steers.
    """

    def __init__(self, settings: list[Setting], n_prompts: int, seed: int) -> None:
        self.settings, self.n_answers = settings, n_prompts
        self.rng = np.random.default_rng(seed)
        names = list(dict.fromkeys(s.construction for s in settings))
        quality = dict(zip(names, self.rng.beta(1.5, 3, len(names)), strict=True))
        self.safe, self.broken, self.truth, self.seen = {}, {}, {}, Counter()
        ease, care = self.rng.normal(size=n_prompts), self.rng.normal(size=n_prompts)
        for row in rows_of(settings):
            top = min(0.95, max(0.0, quality[row[0].construction] + self.rng.normal(0, 0.1)))
            scale, breaks_at = self.rng.uniform(0.05, 0.2), self.rng.uniform(0.08, 0.4)
            for one in row:
                broken = 0.6 / (1 + math.exp((breaks_at - one.rho) / 0.03))
                gain = max(0.0, top - 0.1) * (1 - math.exp(-one.rho / scale))
                rate = min(0.98, (0.1 + gain) * (1 - broken))
                self.broken[one] = self._drawn(broken, care)
                self.safe[one] = self._drawn(rate, ease) & ~self.broken[one]
                self.truth[one] = rate - max(0.0, broken - 0.02)

    def _drawn(self, rate: float, of_prompt: np.ndarray) -> np.ndarray:
        threshold = NormalDist().inv_cdf(max(rate, 1e-4)) * math.sqrt(2)
        return of_prompt + self.rng.normal(size=len(of_prompt)) < threshold

    def __call__(self, settings: list[Setting], n: int) -> Judged:
        values, excess = {}, {}
        for one in settings:
            self.n_answers += max(0, n - self.seen[one])
            self.seen[one] = max(n, self.seen[one])
            broken = float(self.broken[one][:n].mean())
            values[one] = {HEADLINE: float(self.safe[one][:n].mean()), "refusal": 0.0}
            values[one] |= {"relevance": 0.5, "degenerate": broken}
            excess[one] = max(0.0, broken - 0.02)
        headlines = {s: tuple(self.safe[s][:n].astype(float)) for s in settings}
        metrics = dict.fromkeys((None, *settings), NO_METRICS)
        return Judged(metrics, values, excess, headlines)

    def is_good(self, setting: Setting, among: list[Setting]) -> bool:
        """Tell whether a setting's true rate is within .05 of the best one's."""
        return self.truth[setting] >= max(self.truth[one] for one in among) - 0.05


GRIDS = {
    "as a run has it": (grid(list("abcdef"), PLACES, [0.09, 0.17]), 54),
    "three strengths": (grid(list("abcdef"), PLACES, [0.09, 0.17, 0.3]), 54),
    "as the demonstration has it": (grid(list("abcdef"), PLACES, [0.09, 0.17]), 15),
    "many strengths at one place": (
        grid(list("abcdefg"), PLACES[:1], [0.05, 0.08, 0.11, 0.14, 0.17, 0.2]),
        40,
    ),
}


def both_ways(settings: list[Setting], n_prompts: int, seed: int) -> dict[str, tuple]:
    """Search the same world in both ways; say what was chosen and with how many answers."""
    economical, exhaustive = (World(settings, n_prompts, seed) for _ in range(2))
    rounds = plan_rounds(len(settings), n_prompts)
    return {
        "economical": (economical, search_economically(settings, n_prompts, economical)),
        "exhaustive": (exhaustive, search_exhaustively(settings, rounds, exhaustive)),
    }


@pytest.mark.parametrize("name", GRIDS)
def test_as_good_a_setting_is_found_with_half_of_the_answers(name):
    settings, n_prompts = GRIDS[name]
    good, n_answers = Counter(), Counter()
    for seed in range(120):
        for way, (world, found) in both_ways(settings, n_prompts, seed).items():
            good[way] += world.is_good(found.best, settings)
            n_answers[way] += world.n_answers
    assert n_answers["economical"] <= n_answers["exhaustive"] / 2
    assert good["economical"] >= good["exhaustive"] - 3, "three of 120 is chance"
    assert good["exhaustive"] > 40


@examples(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.sampled_from([0.05, 0.1, 0.2, 0.3]), min_size=1, unique=True),
    st.integers(1, 60),
    st.integers(0, 5),
)
def test_every_construction_has_a_choice_and_every_setting_a_fate(
    n_names, n_places, rhos, n_prompts, seed
):
    settings = grid([f"c{i}" for i in range(n_names)], PLACES[:n_places], rhos)
    world = World(settings, n_prompts, seed)
    found = search_economically(settings, n_prompts, world)
    assert {name: one.construction for name, one in found.chosen.items()} == {
        f"c{i}": f"c{i}" for i in range(n_names)
    }
    assert found.best == found.chosen[found.best.construction]
    assert found.left.keys() | found.untried.keys() == set(settings)
    assert not found.left.keys() & found.untried.keys()
    assert set(world.seen) == set(found.left), "what was answered is what the table says"
    assert world.seen[found.best] == n_prompts
    assert not found.left[found.best].reason
    assert set(found.untried.values()) <= {TOO_STRONG, NOT_NEEDED}
    assert {left.reason for left in found.left.values()} <= {"", BEHIND, BEATEN}
    rounds = plan_rounds(len(settings), n_prompts)
    assert world.n_answers <= cost(rounds, n_kept=n_names)
    assert max(one.n_prompts for one in found.rounds) == n_prompts
    assert world.n_answers <= cost(found.rounds)


@examples(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(30, 300), st.integers(0, 3))
def test_a_budget_is_kept_or_refused(budget, seed):
    settings = grid(list("abc"), PLACES, [0.1, 0.2])
    world = World(settings, 20, seed)
    try:
        search_economically(settings, 20, world, budget=budget)
    except ValueError as error:
        assert "give at least" in str(error)  # noqa: PT017 - most budgets are kept
        assert budget < 100
    else:
        assert world.n_answers <= budget


def test_rows_differ_in_strength_alone_and_begin_with_the_weakest():
    weak, strong = (Setting("a", PLACES[0], 1, rho) for rho in (0.1, 0.2))
    turned, shorter = strong._replace(sign=-1), strong._replace(until=4)
    raw = [weak._replace(multiplier=m, rho=m / 10) for m in (2.0, 0.5)]
    rows = rows_of([strong, turned, weak, shorter, *raw])
    assert rows == [(weak, strong), (turned,), (shorter,), tuple(raw[::-1])]
    two_strengths = grid(["a"], PLACES, [0.1, 0.2])
    one_strength = grid(["a"], PLACES, [0.1], signs={"a": (1, -1)})
    assert half_of(two_strengths, 20) < half_of(one_strength, 20)


class Scripted:
    """Answers that are given: setting to what each prompt scores, and what is over the limits."""

    def __init__(self, safe: dict[Setting, str], excess: dict[Setting, float]) -> None:
        self.safe, self.excess, self.asked = safe, excess, []

    def __call__(self, settings: list[Setting], n: int) -> Judged:
        self.asked.append((list(settings), n))
        headlines = {s: tuple(map(float, self.safe[s][:n])) for s in settings}
        values = {
            s: {HEADLINE: sum(scores) / n, "refusal": 0.0, "relevance": 0.5, "degenerate": 0.0}
            for s, scores in headlines.items()
        }
        excess = {s: self.excess.get(s, 0.0) for s in settings}
        return Judged(dict.fromkeys((None, *settings), NO_METRICS), values, excess, headlines)


def test_the_middle_comes_first_and_what_breaks_is_left_for_what_is_weaker():
    weak, middle, strong = (Setting("a", PLACES[0], 1, rho) for rho in (0.1, 0.2, 0.3))
    scores = dict.fromkeys((weak, middle, strong), "1" * 9)
    breaking = Scripted(scores, {middle: 0.5})
    found = search_economically([strong, weak, middle], 9, breaking, budget=60)
    assert [asked for asked, _ in breaking.asked[:2]] == [[middle], [weak]]
    assert found.untried == {strong: TOO_STRONG}
    assert found.best == weak
    going_on = Scripted({**scores, middle: "0" * 9, weak: "0" * 9}, {})
    found = search_economically([strong, weak, middle], 9, going_on, budget=60)
    assert [asked for asked, _ in going_on.asked[:2]] == [[middle], [strong]]
    assert found.untried == {weak: NOT_NEEDED}
    assert found.best == strong


def test_what_is_known_to_be_over_a_limit_is_not_answered():
    ladder = [Setting("a", PLACES[0], 1, rho) for rho in (0.1, 0.2, 0.3)]
    other_place = Setting("a", PLACES[1], 1, 0.2)
    alone = Setting("b", PLACES[0], 1, 0.2)
    settings = [*ladder, other_place, alone]
    scripted = Scripted(dict.fromkeys(settings, "1" * 9), {alone: 1.0})
    over = {*ladder[1:], other_place, alone}
    found = search_economically(settings, 9, scripted, over_a_limit=lambda asked: over & set(asked))
    assert set(found.left) == {ladder[0], alone}, "a construction keeps one, whatever it costs"
    assert found.untried == {
        **dict.fromkeys((ladder[1], other_place), KL_TOO_HIGH),
        ladder[2]: TOO_STRONG,
    }


def test_a_setting_is_beaten_where_the_leader_wins_on_the_same_questions():
    leader, other = (Setting("a", place, 1, 0.1) for place in PLACES[:2])

    def beaten(won: str, lost: str, costs: dict[Setting, float] | None = None) -> bool:
        scripted = Scripted({leader: won, other: lost}, costs or {})
        return is_beaten(other, leader, scripted([leader, other], len(won)))

    assert beaten("11111", "00000"), "1 of 32"
    assert not beaten("1111", "0000"), "1 of 16"
    assert beaten("11111111", "11100000"), "questions on which both do alike say nothing"
    assert not beaten("111110", "000001"), "7 of 64"
    assert not beaten("11111", "00000", {leader: 0.1}), "the leader costs more"
    assert not beaten("11111", "00000", {leader: 0.1, other: 0.05})
    assert not is_beaten(leader, leader, Scripted({leader: "1"}, {})([leader], 1))


def test_a_beaten_setting_is_not_answered_any_further():
    # Nine constructions of one strength each: the budget is that of the exhaustive search.
    settings = [Setting(name, PLACES[0], 1, 0.1) for name in "abcdefghi"]
    scores = dict.fromkeys(settings, "0" * 40) | {settings[3]: "1" * 40}
    scripted = Scripted(scores, {})
    found = search_economically(settings, 40, scripted)
    reasons = Counter(left.reason for left in found.left.values())
    assert reasons[""] == 1
    assert reasons[BEATEN] >= 2
    assert found.best == settings[3]


def test_a_run_from_before_there_was_a_choice_is_searched_as_it_was() -> None:
    from workbench.safesteer.recalibration import _changed

    assert _changed({"model": "embedded"}).search == "exhaustive"
    assert _changed({"model": "embedded", "search": "economical"}).search == "economical"
