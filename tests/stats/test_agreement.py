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

from workbench.stats.agreement import Agreement, cohen_kappa, measure_agreement
from workbench.stats.estimates import Estimate, Rate, wilson_interval


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


def parts_of(agreement: Agreement) -> list[Estimate]:
    return [
        agreement.accuracy,
        agreement.precision,
        agreement.recall,
        agreement.specificity,
        agreement.kappa,
    ]


def ends_of(agreement: Agreement) -> list[tuple[float, float]]:
    return [(part.low, part.high) for part in parts_of(agreement)]


@quick
@given(two_ratings)
def test_specificity_is_the_recall_of_the_other_side(ratings: list[tuple[bool, bool]]) -> None:
    predicted, truth = zip(*ratings, strict=True)
    turned = measure_agreement([not x for x in predicted], [not x for x in truth])
    assert repr(measure_agreement(predicted, truth).specificity) == repr(turned.recall)


@quick
@given(two_ratings)
def test_one_answer_per_prompt_gives_the_interval_without_clusters(
    ratings: list[tuple[bool, bool]],
) -> None:
    predicted, truth = zip(*ratings, strict=True)
    plain = measure_agreement([*predicted, None], [*truth, True])
    clustered = measure_agreement(
        [*predicted, None], [*truth, True], clusters=range(len(ratings) + 1)
    )
    np.testing.assert_allclose(ends_of(clustered)[:4], ends_of(plain)[:4], atol=1e-12)
    np.testing.assert_allclose(ends_of(clustered)[4], ends_of(plain)[4], atol=0.05)
    for one, other in zip(parts_of(clustered), parts_of(plain), strict=True):
        assert (one.n, one.n_unscored) == (other.n, other.n_unscored)


@quick
@given(two_ratings, st.integers(2, 6))
def test_copies_of_every_answer_under_its_prompt_narrow_no_interval(
    ratings: list[tuple[bool, bool]], copies: int
) -> None:
    predicted, truth = zip(*ratings, strict=True)
    prompts = [f"prompt {i}" for i in range(len(ratings))]
    plain = measure_agreement(predicted, truth)
    copied = measure_agreement(predicted * copies, truth * copies, clusters=prompts * copies)
    # up to the draws of the bootstrap
    np.testing.assert_allclose(ends_of(copied)[:4], ends_of(plain)[:4], atol=1e-12)
    np.testing.assert_allclose(ends_of(copied)[4], ends_of(plain)[4], atol=0.05)
    for one, other in zip(parts_of(copied), parts_of(plain), strict=True):
        assert one.value == pytest.approx(other.value, nan_ok=True)
        assert one.n == copies * other.n


def test_intervals_of_answers_that_share_prompts_cover_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 6)
    hits, unclustered = np.zeros(2), np.zeros(2)
    for _ in range(300):
        # a judge is right on 85 % of the answers, and on some prompts nearly always
        right = rng.random(240) < rng.beta(1.7, 0.3, 40)[prompts]
        truth = (rng.random(40) < 0.5)[prompts]
        verdicts = np.where(right, truth, ~truth)
        for counted, clusters in ((hits, prompts.tolist()), (unclustered, None)):
            result = measure_agreement(verdicts, truth, clusters=clusters)
            counted += [
                result.accuracy.low <= 0.85 <= result.accuracy.high,
                result.kappa.low <= 0.7 <= result.kappa.high,
            ]
    assert (hits / 300 > 0.91).all()
    assert (unclustered / 300 < 0.8).all()


def test_clusters_need_an_id_for_each_answer() -> None:
    for function in (measure_agreement, cohen_kappa):
        for clusters in (["a"], ["a", None]):
            with pytest.raises(ValueError, match="clusters need an id, not None, for each of 2"):
                function([True, False], [True, True], clusters=clusters)
