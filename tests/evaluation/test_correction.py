"""Differences that a judge's errors make go away, true ones stay, and intervals cover."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from helpers.judged_answers import Errors, Judged, judged_answers

from workbench.evaluation.blind import LEAST_READ, answer_id
from workbench.evaluation.correction import bounded, corrected, lines
from workbench.stats.agreement import Agreement, measure_agreement

BIASED = {"unsteered": Errors(false_yes=0.02), "steered": Errors(false_yes=0.3)}
"""The truth is the same; the judge is wrong more often on steered answers."""


def ids_of(judged: Judged, condition: str) -> set[str]:
    completions = judged.evaluation.completions
    return {answer_id(c) for c in completions if c.condition == condition}


def width(table: pd.DataFrame, prefix: str = "") -> np.ndarray:
    return (table[f"{prefix}high"] - table[f"{prefix}low"]).to_numpy(dtype=float)


def test_a_difference_that_only_the_judge_sees_goes_away() -> None:
    n, false_alarms, covered, rates_covered = 150, 0, 0, 0
    for seed in range(n):
        judged = judged_answers(BIASED, seed=seed)
        table = corrected(judged.evaluation, judged.read(30, seed=seed), seed=seed)
        row = table.iloc[1]
        false_alarms += row["judged_difference_low"] > 0
        covered += row["difference_low"] <= 0 <= row["difference_high"]
        rates_covered += ((table["low"] <= 0.3) & (table["high"] >= 0.3)).sum()
    assert false_alarms / n > 0.7
    assert 0.91 <= covered / n <= 0.995
    assert 0.91 <= rates_covered / (2 * n) <= 0.995


def test_a_true_difference_is_found_and_its_p_is_small() -> None:
    conditions = {"unsteered": Errors(0.1, 0.02, 0.1), "steered": Errors(0.7, 0.1, 0.1)}
    judged = judged_answers(conditions)
    base, row = corrected(judged.evaluation, judged.read(30)).to_dict("records")
    assert row["difference_low"] < 0.6 < row["difference_high"]
    assert row["difference"] == pytest.approx(row["corrected"] - base["corrected"])
    assert row["difference_low"] > 0.2
    assert row["p"] == row["p_holm"] < 0.01
    assert math.isnan(base["p"])
    assert math.isnan(base["difference"])


def test_a_perfect_judge_is_left_as_it_is_with_about_the_interval_of_all_answers() -> None:
    judged = judged_answers({"unsteered": Errors(0.3), "steered": Errors(0.5)}, prompts=150)
    table = corrected(judged.evaluation, judged.read(100))
    np.testing.assert_allclose(table["corrected"], table["judged"])
    assert (width(table) < 1.15 * width(table, "judged_")).all()
    assert width(table, "difference_")[1] < 1.15 * width(table, "judged_difference_")[1]
    assert list(table["precision"]) == list(table["recall"]) == [1, 1]
    few = corrected(judged.evaluation, judged.read(10))
    # ten answers without an error of the judge do not show that it makes none
    assert (width(few) > 1.3 * width(few, "judged_")).all()


def test_a_useless_judge_costs_nothing() -> None:
    coin = Errors(0.4, 0.5, 0.5)
    judged = judged_answers({"unsteered": coin, "steered": coin}, prompts=200)
    labels = judged.read(60)
    table = corrected(judged.evaluation, labels)
    # what sixty labels give without a judge
    alone = 2 * 1.96 * np.sqrt(0.4 * 0.6 / 60)
    assert (width(table) < 1.15 * alone).all()


def test_all_answers_read_give_the_share_of_the_labels() -> None:
    judged = judged_answers(BIASED, prompts=40)
    table = corrected(judged.evaluation, judged.read(40)).set_index("condition")
    for condition in BIASED:
        true = [
            judged.truth[answer]
            for answer in judged.read(40)
            if answer in ids_of(judged, condition)
        ]
        assert table.loc[condition, "corrected"] == pytest.approx(np.mean(true))
        assert table.loc[condition, "n_read"] == table.loc[condition, "n"] == 40


def test_the_judge_is_measured_under_each_condition() -> None:
    judged = judged_answers(BIASED, prompts=200, seed=3)
    table = corrected(judged.evaluation, judged.read(120)).set_index("condition")
    assert table.loc["unsteered", "precision"] > 0.85
    assert table.loc["steered", "precision"] < 0.7
    assert (table["precision_low"] < table["precision"]).all()
    assert (table["recall"] == 1).all()
    assert (table["recall_n"] < table["precision_n"]).all()


def test_several_answers_to_a_prompt_are_no_more_than_one_if_they_are_the_same() -> None:
    one, many = (
        judged_answers(BIASED, prompts=60, samples=samples, alike=True) for samples in (1, 4)
    )
    tables = [corrected(judged.evaluation, judged.read(20)) for judged in (one, many)]
    assert list(tables[1]["n"]) == [60, 60]
    assert list(tables[1]["n_read"]) == [20, 20]
    assert (width(tables[1]) > 0.75 * width(tables[0])).all()


def test_answers_that_the_judge_cannot_score_count_and_do_not_shift_the_rate() -> None:
    shy = {name: errors._replace(unscored=0.3) for name, errors in BIASED.items()}
    covered = 0
    for seed in range(40):
        judged = judged_answers(shy, seed=seed)
        table = corrected(judged.evaluation, judged.read(30, seed=seed))
        assert list(table["n"]) == [90, 90]
        covered += table.iloc[1]["difference_low"] <= 0 <= table.iloc[1]["difference_high"]
    assert covered >= 36


def test_a_condition_with_too_few_answers_read_is_not_corrected_and_says_why() -> None:
    judged = judged_answers(BIASED)
    labels = judged.read(20)
    steered = [answer for answer in labels if answer in ids_of(judged, "steered")]
    labels |= dict.fromkeys(steered[LEAST_READ - 1 :])
    base, row = corrected(judged.evaluation, labels).to_dict("records")
    assert base["reason"] == ""
    assert math.isfinite(base["corrected"])
    assert row["reason"] == "7 prompts were read; 8 are needed."
    for name in ("corrected", "low", "difference", "difference_high", "p", "p_holm"):
        assert math.isnan(row[name])
    assert math.isfinite(row["judged_difference"])


def test_a_condition_that_was_not_drawn_is_not_corrected_by_answers_it_shares() -> None:
    judged = judged_answers({**BIASED, "gated": Errors()})
    # behind a closed gate, in two of three prompts, answers are those of the unsteered model
    texts = {c.prompt.id: c.text for c in judged.evaluation.completions[:90]}
    completions = tuple(
        dataclasses.replace(c, text=texts[c.prompt.id])
        if c.condition == "gated" and int(c.prompt.id[1:]) % 3
        else c
        for c in judged.evaluation.completions
    )
    judged = judged._replace(
        evaluation=dataclasses.replace(judged.evaluation, completions=completions)
    )
    labels = judged.read(40, conditions=["steered"])
    table = corrected(judged.evaluation, labels).set_index("condition")
    assert table.loc["gated", "n_read"] > LEAST_READ
    assert math.isnan(table.loc["gated", "corrected"])
    assert "draw it for this condition" in table.loc["gated", "reason"]
    assert (table.loc[["unsteered", "steered"], "reason"] == "").all()


def test_p_is_corrected_over_the_conditions() -> None:
    true = {"unsteered": Errors(0.1), "a": Errors(0.5), "b": Errors(0.45), "c": Errors(0.1)}
    judged = judged_answers(true)
    table = corrected(judged.evaluation, judged.read(40))
    assert (table["p_holm"][1:] >= table["p"][1:]).all()
    assert (table["p_holm"] > table["p"]).any()
    assert table.iloc[3]["p"] > 0.05


def test_labels_must_name_answers_and_say_something() -> None:
    judged = judged_answers(BIASED)
    labels = judged.read(10)
    with pytest.raises(ValueError, match=r"id 'zz' names no answer here \(1 of 21 ids do not\)"):
        corrected(judged.evaluation, {**labels, "zz": True})
    with pytest.raises(ValueError, match="none of 20 answers is labelled"):
        corrected(judged.evaluation, dict.fromkeys(labels))
    for metric in ("safe", "relevance"):
        with pytest.raises(ValueError, match=f"no yes/no measure '{metric}'.*: safe_helpful_proxy"):
            corrected(judged.evaluation, labels, metric=metric)


def test_the_seed_decides_the_interval() -> None:
    judged = judged_answers(BIASED)
    labels = judged.read(20)
    first, again, other = (corrected(judged.evaluation, labels, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(width(first), width(other), atol=1e-6)


def test_a_corrected_table_reads_as_lines() -> None:
    judged = judged_answers({**BIASED, "gated": Errors()})
    labels = judged.read(20, conditions=["steered"])
    first, second, third = lines(corrected(judged.evaluation, labels))
    assert first.startswith("unsteered: judged .")
    assert "difference" not in first
    for part in ("; difference ", "(judged +", "; precision ."):
        assert part in second
    assert "not corrected: the sample holds its answers to 0 of 20 prompts" in third


def agreement_of(false_yes: int, false_no: int) -> Agreement:
    """Measure a judge that errs so often on a hundred true and a hundred false answers."""
    verdicts = [i >= false_no for i in range(100)] + [i < false_yes for i in range(100)]
    return measure_agreement(verdicts, [True] * 100 + [False] * 100)


def test_a_bound_holds_the_truth_and_is_wider_for_a_worse_judge() -> None:
    judged = judged_answers(BIASED, prompts=400)
    by_condition = {"unsteered": agreement_of(2, 0), "steered": agreement_of(30, 0)}
    table = bounded(judged.evaluation, by_condition).set_index("condition")
    for condition, errors in BIASED.items():
        row = table.loc[condition]
        false_yes = errors.false_yes
        assert row["corrected"] == pytest.approx((row["judged"] - false_yes) / (1 - false_yes))
        assert row["low"] < 0.3 < row["high"]
    row = table.loc["steered"]
    assert row["difference_low"] < 0 < row["difference_high"]
    assert row["difference"] == pytest.approx(
        row["corrected"] - table.loc["unsteered", "corrected"]
    )
    better, worse = (
        bounded(judged.evaluation, agreement_of(n, n)).set_index("condition") for n in (2, 25)
    )
    for name in ("", "difference_"):
        ends = [table.loc["steered"] for table in (better, worse)]
        widths = [row[f"{name}high"] - row[f"{name}low"] for row in ends]
        assert widths[1] > widths[0] > 0


def test_the_bound_is_the_least_and_most_over_the_whole_box() -> None:
    judged = judged_answers(BIASED)
    agreement = agreement_of(20, 12)
    row = bounded(judged.evaluation, agreement).iloc[1]
    recall, specificity = agreement.recall, agreement.specificity
    se, sp = np.meshgrid(
        np.linspace(recall.low, recall.high, 60), np.linspace(specificity.low, specificity.high, 60)
    )
    rates = np.clip((row["judged"] + sp - 1) / (se + sp - 1), 0, 1)
    assert (row["low"], row["high"]) == pytest.approx((rates.min(), rates.max()))


def test_a_judge_that_may_be_a_coin_bounds_nothing() -> None:
    judged = judged_answers(BIASED)
    table = bounded(judged.evaluation, agreement_of(50, 50))
    assert (table["low"] == 0).all()
    assert (table["high"] == 1).all()
    assert math.isnan(table.iloc[1]["corrected"])
    with pytest.raises(ValueError, match="no agreement of the judge for 'steered'; given: unst"):
        bounded(judged.evaluation, {"unsteered": agreement_of(1, 1)})
