"""Comparisons: planted differences are found, null ones are not, at the rate that is said."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny_models import D_MODEL

from workbench.evaluation.comparisons import (
    compare,
    judge_agreement,
    leakage_conditions,
    leakage_matrix,
)
from workbench.evaluation.metrics import ALL, HEADLINE
from workbench.evaluation.result import Evaluation
from workbench.evaluation.scoring import evaluate
from workbench.generation.answers import UNSTEERED
from workbench.generation.decoding import Decoding
from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt, text_key
from workbench.stats.estimates import mcnemar, paired_difference, tost_paired
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import SteeringVector


def table(values):
    """Make an evaluation: condition to category to metric to numbers, one per prompt."""
    rows = [
        (condition, category, "unsafe", f"{category}-{i}", metric, value)
        for condition, by_category in values.items()
        for category, by_metric in by_category.items()
        for metric, numbers in by_metric.items()
        for i, value in enumerate(numbers)
    ]
    columns = ["condition", "category", "label", "prompt_id", "metric", "value"]
    return Evaluation(pd.DataFrame(rows, columns=columns), UNSTEERED, (), "judge")


def one(**conditions):
    return table(
        {name.replace("_", " "): {"fraud": metrics} for name, metrics in conditions.items()}
    )


def test_two_conditions_are_compared_prompt_by_prompt():
    after, before = [1, 1, 1, 1, 1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    comparison = compare(
        one(unsteered={"refusal": after}, a={"refusal": after}, b={"refusal": before}), "a", "b"
    )
    row = comparison.iloc[0]
    assert (row["metric"], row["value"], row["reference"], row["n"]) == ("refusal", 0.8, 0.2, 10)
    assert row["difference"] == pytest.approx(0.6)
    assert (
        row["p"] == row["p_holm"] == mcnemar([bool(x) for x in before], [bool(x) for x in after]).p
    )
    with pytest.raises(ValueError, match="no condition 'c'"):
        compare(one(unsteered={"refusal": after}), "c", UNSTEERED)
    with pytest.raises(ValueError, match=r"no metric 'refusals'.*Did you mean 'refusal'"):
        compare(one(unsteered={"refusal": after}), UNSTEERED, UNSTEERED, metrics=["refusals"])
    with pytest.raises(ValueError, match="no neutral prompts"):
        compare(one(unsteered={"refusal": after}), UNSTEERED, UNSTEERED, label="neutral")


def test_p_is_corrected_over_the_metrics_of_a_comparison():
    before = {"refusal": [0.0] * 12, "safe": [0.0] * 12, "degenerate": [0.0] * 12}
    after = {
        "refusal": [1.0] * 8 + [0.0] * 4,
        "safe": [1.0] * 7 + [0.0] * 5,
        "degenerate": [1.0] * 2 + [0.0] * 10,
    }
    comparison = compare(one(unsteered=before, a=before, b=after), "b", "a").set_index("metric")
    p = comparison["p"]
    assert p["refusal"] < p["safe"] < p["degenerate"]
    expected = {"refusal": 3 * p["refusal"], "safe": 2 * p["safe"], "degenerate": p["degenerate"]}
    assert comparison["p_holm"].to_dict() == pytest.approx(expected)


def test_conditions_that_share_no_metric_are_not_compared():
    scores = one(a={"safe": [1.0, 0.0]}, b={"refusal": [1.0, 0.0]})
    with pytest.raises(ValueError, match="'a' and 'b' share no metric on unsafe prompts"):
        compare(scores, "a", "b")


def test_a_planted_own_category_is_on_the_diagonal_of_the_leakage_matrix():
    rng = np.random.default_rng(0)
    categories = ("fraud", "malware", "hate")
    base = {b: {HEADLINE: [0.0] * 30} for b in categories}
    steered = {
        a: {
            b: {HEADLINE: (rng.random(30) < (0.8 if a == b else 0.1)).astype(float).tolist()}
            for b in categories
        }
        for a in categories
    }
    matrix = leakage_matrix(table({UNSTEERED: base, **steered}))
    assert len(matrix) == 3 * 4
    diagonal = matrix[matrix["own"]]
    other = matrix[matrix["measured"] == "other"]
    assert (diagonal["difference_low"].to_numpy() > other["difference_high"].to_numpy()).all()
    assert (other["n"] == 60).all()
    with pytest.raises(ValueError, match="'strong' is no category"):
        leakage_matrix(table({UNSTEERED: base, "strong": base}))
    with pytest.raises(ValueError, match=r"no metric 'refusal'; metrics: safe_helpful_proxy\."):
        leakage_matrix(table({UNSTEERED: base, **steered}), "refusal")


def test_leakage_conditions_steer_every_prompt_with_one_category():
    conditions = leakage_conditions({"fraud": [], "malware": []})
    assert list(conditions) == [UNSTEERED, "fraud", "malware"]
    assert not any(isinstance(condition, dict) for condition in conditions.values())


def test_judges_that_agree_by_chance_have_kappa_near_zero():
    rng = np.random.default_rng(0)
    truth = (rng.random(400) < 0.4).astype(float)
    noise = (rng.random(400) < 0.4).astype(float)
    agreement = judge_agreement(
        one(
            unsteered={"safe": truth.tolist(), "safety_wording": truth.tolist()},
            a={"safe": truth.tolist(), "safety_wording": noise.tolist()},
        )
    ).set_index("condition")
    assert agreement.loc[UNSTEERED, "kappa"] == 1.0
    assert agreement.loc["a", "low"] < 0 < agreement.loc["a", "high"]
    assert agreement.loc[ALL, "n"] == 800
    with pytest.raises(ValueError, match="no yes/no measure 'relevance'"):
        judge_agreement(one(unsteered={"safe": [1.0]}), second="relevance")


def test_judges_agree_no_surer_for_conditions_that_answer_alike():
    rng = np.random.default_rng(0)
    first, second = ((rng.random(60) < 0.5).astype(float).tolist() for _ in range(2))
    metrics = {"safe": first, "safety_wording": second}
    agreement = judge_agreement(one(unsteered=metrics, a=metrics, b=metrics))
    rows = agreement.set_index("condition")
    width = rows["high"] - rows["low"]
    assert rows.loc[ALL, "n"] == 180
    assert width[ALL] == pytest.approx(width["a"], abs=0.02)


def test_a_prompt_that_a_vector_was_fitted_on_is_no_test_prompt(tiny):
    prompts = [
        Prompt(f"p{i}", f"What is in the garden {i}?", None, "fraud", "unsafe", "test")
        for i in range(3)
    ]
    vector = SteeringVector(
        Site(1, "resid_post"), "fraud", torch.ones(D_MODEL), "prompt_contrast", "content",
        1.0, 3, 3, 20.0,
        model_info(tiny), frozenset({text_key(prompts[1].text)}),
    )  # fmt: skip
    conditions = {"steered": [add_vector(vector, rho=0.1)]}
    with pytest.raises(
        ValueError, match=r"1 of 3 prompts were used to fit the vector of 'steered' .*'p1'"
    ):
        evaluate(tiny, prompts, conditions, decoding=Decoding(max_new_tokens=2))
    with pytest.raises(ValueError, match="were used to fit"):
        evaluate(
            tiny,
            prompts,
            {"steered": {"fraud": conditions["steered"]}},
            decoding=Decoding(max_new_tokens=2),
        )
    assert evaluate(
        tiny, prompts, conditions, decoding=Decoding(max_new_tokens=2), allow_fitted=True
    )
    assert evaluate(tiny, [prompts[0], prompts[2]], conditions, decoding=Decoding(max_new_tokens=2))


@pytest.mark.parametrize("test", ["bootstrap", "mcnemar", "no loss"])
def test_a_thousand_null_experiments_give_the_false_positives_they_promise(test):
    """McNemar's exact test may give fewer than 5 %, never more; the others give 5 %.

    The sampling error of a thousand is 1.5 points.
    """
    rng = np.random.default_rng(11)
    n_significant = 0
    for _ in range(1000):
        if test == "mcnemar":
            before, after = (rng.random(80) < 0.4 for _ in range(2))
            n_significant += mcnemar(before.tolist(), after.tolist()).p <= 0.05
        else:
            before = rng.normal(0.7, 0.15, 60)
            if test == "bootstrap":
                after = before + rng.normal(0, 0.1, 60)
                n_significant += (
                    paired_difference(before.tolist(), after.tolist(), n_resamples=800).p <= 0.05
                )
            else:  # a true loss of exactly the margin must pass as "no loss" in 5 % only
                after = before - 0.05 + rng.normal(0, 0.1, 60)
                n_significant += (
                    tost_paired(before.tolist(), after.tolist(), (-0.05, math.inf)).p <= 0.05
                )
    assert n_significant / 1000 <= 0.065
    assert n_significant / 1000 >= (0.0 if test == "mcnemar" else 0.035)
