"""Test agreement of verdicts against scikit-learn and statsmodels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers.chance import quick, two_ratings
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa

from workbench.stats.agreement import cohen_kappa, measure_agreement
from workbench.stats.estimates import Rate, wilson_interval


@quick
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=60))
def test_kappa_equals_scikit_learn(ratings: list[tuple[str, str]]) -> None:
    a, b = zip(*ratings, strict=True)
    result = cohen_kappa([*a, None], [*b, "a"])
    assert (result.n, result.n_unscored) == (len(ratings), 1)
    if len({*a, *b}) == 1:
        assert math.isnan(result.value)
        assert (result.low, result.high) == (-1.0, 1.0)
    else:
        assert result.value == pytest.approx(metrics.cohen_kappa_score(a, b))
        assert -1 <= result.low <= result.high <= 1


def test_the_interval_of_kappa_is_near_that_of_large_samples() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.4
    predicted = truth ^ (rng.random(400) < 0.15)
    expected = reference_kappa(metrics.confusion_matrix(truth, predicted))
    result = cohen_kappa(truth, predicted)
    np.testing.assert_allclose(
        [result.low, result.high], [expected.kappa_low, expected.kappa_upp], atol=0.015
    )


@quick
@given(two_ratings)
def test_agreement_equals_scikit_learn(ratings: list[tuple[bool, bool]]) -> None:
    predicted, truth = zip(*ratings, strict=True)
    result = measure_agreement(predicted, truth)
    assert result.accuracy.value == metrics.accuracy_score(truth, predicted)
    assert result.precision.n == sum(predicted)
    assert result.recall.n == sum(truth)
    for ours, score in (
        (result.precision, metrics.precision_score),
        (result.recall, metrics.recall_score),
    ):
        assert (
            ours.value == pytest.approx(score(truth, predicted))
            if ours.n
            else math.isnan(ours.value)
        )


def test_agreement_counts_what_a_judge_left_unscored() -> None:
    result = measure_agreement([True, None, True, False, None], [True, True, None, False, False])
    assert (result.n, result.n_unscored) == (2, 3)
    assert (result.accuracy.value, result.accuracy.n_unscored) == (1.0, 3)
    assert result.precision == Rate(1.0, *wilson_interval(1, 1), 1, 1)
    assert result.recall == Rate(1.0, *wilson_interval(1, 1), 1, 1)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["accuracy"]["n"] == 2
    assert plain["kappa"]["value"] == 1.0
