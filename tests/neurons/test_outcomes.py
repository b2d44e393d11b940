"""Effects on scored answers beside those of matched random sets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.neurons.outcomes import compare_with_controls
from workbench.stats.estimates import mean, paired_difference, rate

N = 20
RANDOM = [f"random {i}" for i in range(9)]


def made_up(answers: dict[str, list[float]], metric: str = "refusal") -> pd.DataFrame:
    """One score per prompt and condition; prompts are in another order under each condition."""
    rows = []
    for place, (condition, values) in enumerate(answers.items()):
        for i in np.random.default_rng(place).permutation(len(values)):
            rows.append((condition, f"p{i:02}", metric, values[i]))
    return pd.DataFrame(rows, columns=["condition", "prompt_id", "metric", "value"])


def yes(n: int, of: int = N) -> list[float]:
    return [1.0] * n + [0.0] * (of - n)


def test_an_effect_beyond_all_controls_has_the_smallest_p() -> None:
    controls = {name: yes(12 + i % 2) for i, name in enumerate(RANDOM)}
    scores = made_up({"unsteered": yes(12), "top": yes(2), **controls})
    table = compare_with_controls(scores, {"top": RANDOM}).set_index("condition")
    assert list(table.index) == ["unsteered", "top"]
    top = table.loc["top"]
    assert top["p"] == 1 / 10
    assert top["n_controls"] == 9
    assert (top["control_low"], top["control_high"]) == pytest.approx((0, 0.05))
    assert top["control_mean"] == pytest.approx(4 * 0.05 / 9)
    difference = paired_difference(yes(12), yes(2))
    assert top["difference"] == pytest.approx(difference.value) == pytest.approx(-0.5)
    assert top["difference_low"] == pytest.approx(difference.low)
    level = rate(yes(2))
    assert (top["value"], top["low"], top["high"]) == (level.value, level.low, level.high)


def test_controls_that_move_the_other_way_as_far_count_against_the_effect() -> None:
    controls = {name: yes(16) for name in RANDOM[:3]} | {name: yes(10) for name in RANDOM[3:]}
    scores = made_up({"unsteered": yes(10), "top": yes(4), **controls})
    table = compare_with_controls(scores, {"top": RANDOM}).set_index("condition")
    assert table.loc["top", "p"] == (1 + 3) / 10


def test_measures_that_are_not_yes_or_no_are_means_and_unscored_answers_are_left_out() -> None:
    values = [float(i) for i in range(N)]
    changed = [value + 1 for value in values[:-1]] + [float("nan")]
    scores = made_up({"unsteered": values, "top": changed}, "log_perplexity")
    table = compare_with_controls(scores, {"top": []}, seed=3).set_index("condition")
    level = mean([value + 1 for value in values[:-1]], seed=3)
    assert table.loc["top", "n"] == N - 1
    assert table.loc["top", "value"] == level.value
    assert table.loc["top", "low"] <= level.value <= table.loc["top", "high"]
    assert table.loc["top", "difference"] == 1
    assert table.loc["top", "n_controls"] == 0
    assert np.isnan(table.loc["top", "p"])


def test_metrics_come_in_the_order_asked_for_condition_by_condition() -> None:
    answers = {"unsteered": yes(3), "a": yes(4), "b": yes(5)}
    scores = pd.concat([made_up(answers, "x"), made_up(answers, "y"), made_up(answers, "z")])
    table = compare_with_controls(scores, {"b": ["a"], "a": []}, metrics=["z", "x"])
    assert list(zip(table["condition"], table["metric"], strict=True)) == [
        (condition, metric) for condition in ("unsteered", "b", "a") for metric in ("z", "x")
    ]


def test_tables_that_do_not_fit_are_refused() -> None:
    scores = made_up({"unsteered": yes(3), "top": yes(4)})
    with pytest.raises(ValueError, match="no condition 'bottom' in the scores; they have"):
        compare_with_controls(scores, {"top": ["bottom"]})
    with pytest.raises(ValueError, match="no metric 'kindness' in the scores; they have refusal"):
        compare_with_controls(scores, {"top": []}, metrics=["kindness"])
    with pytest.raises(ValueError, match="'p00' has several answers under one condition"):
        compare_with_controls(
            pd.concat([scores, scores.head(1)]).assign(prompt_id="p00"), {"top": []}
        )
