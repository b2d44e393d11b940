"""Test paired comparisons against statsmodels and scipy, and against chance alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.chance import false_positives, quick, seeds, two_ratings
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, special, stats
from sklearn import metrics
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.weightstats import ttost_paired

from workbench.stats.agreement import cohen_kappa, measure_agreement
from workbench.stats.estimates import (
    mcnemar,
    paired_difference,
    pairs_for_no_loss,
    ratio_of_means,
    tost_paired,
)


def test_a_difference_points_from_a_to_b() -> None:
    result = paired_difference([False] * 30 + [True] * 10, [True] * 20 + [False] * 10 + [True] * 10)
    assert result.value == 0.5
    assert 0 < result.low < 0.5 < result.high
    assert str(result).startswith("+.50 [")
    assert str(result).endswith(f"n=40 p=.{round(result.p * 1000):03}")
    assert result.p < 0.01
    assert str(paired_difference([0.0] * 40, [1.0] * 40, n_resamples=20_000)).endswith(
        "n=40 p<.001"
    )


@quick
@given(
    arrays(
        float, st.tuples(st.integers(2, 30), st.just(2)), elements=st.floats(-100, 100).map(float)
    ),
    seeds,
)
def test_swapping_the_sides_turns_the_sign(pairs: np.ndarray, seed: int) -> None:
    forth, back = (
        paired_difference(*sides, n_resamples=200, seed=seed) for sides in (pairs.T, pairs.T[::-1])
    )
    np.testing.assert_allclose(
        [back.value, back.low, back.high], [-forth.value, -forth.high, -forth.low], atol=1e-9
    )
    assert back.p == pytest.approx(forth.p)


def test_unscored_pairs_are_dropped_and_counted() -> None:
    a, b = [1.0, None, 2.0, 4.0, 1.0], [2.0, 3.0, math.nan, 5.0, 0.0]
    scored_pairs = ([1.0, 4.0, 1.0], [2.0, 5.0, 0.0])
    whole, part = paired_difference(a, b), paired_difference(*scored_pairs)
    assert (whole.n, whole.n_unscored, part.n_unscored) == (3, 2, 0)
    assert (whole.value, whole.low, whole.high) == (part.value, part.low, part.high)
    nothing = paired_difference([None], [1.0])
    assert (nothing.n, nothing.n_unscored) == (0, 1)
    assert math.isnan(nothing.value)
    assert math.isnan(nothing.p)


def test_each_prompt_weighs_the_same_however_many_rows_it_has() -> None:
    result = paired_difference([0, 0, 0, 0], [1, 1, 1, -1], clusters=["x", "x", "x", "y"])
    assert (result.value, result.n) == (0.0, 2)


def test_copies_of_a_prompt_add_no_evidence() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    once = paired_difference(a, b)
    copied = paired_difference(np.tile(a, 5), np.tile(b, 5), clusters=list(range(20)) * 5)
    np.testing.assert_allclose(
        [copied.low, copied.high, copied.p, copied.n],
        [once.low, once.high, once.p, once.n],
        atol=1e-9,
    )


def test_p_and_interval_tell_the_same() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        result = paired_difference(np.zeros(30), rng.normal(0.3, 1, size=30))
        if not 0.045 < result.p < 0.055:
            assert (result.p < 0.05) == (result.low > 0 or result.high < 0)


def test_p_is_never_below_what_a_sign_flip_test_can_reach() -> None:
    assert paired_difference([0.0] * 4, [1.0, 1.1, 1.2, 1.3]).p >= 2**-3
    assert paired_difference([True, False], [True, False]).p == 1.0


@quick
@given(two_ratings)
def test_mcnemar_equals_statsmodels(ratings: list[tuple[bool, bool]]) -> None:
    a, b = zip(*ratings, strict=True)
    result = mcnemar(a, b)
    table = metrics.confusion_matrix(a, b, labels=[False, True])
    assert (result.gained, result.lost, result.n) == (table[0, 1], table[1, 0], len(ratings))
    assert result.p == pytest.approx(min(1.0, reference_mcnemar(table, exact=True).pvalue))


def test_mcnemar_drops_unscored_pairs() -> None:
    result = mcnemar([True, None, False, False], [False, True, None, True])
    assert (result.gained, result.lost, result.n, result.n_unscored, result.p) == (1, 1, 2, 2, 1.0)
    assert math.isnan(mcnemar([None], [True]).p)


@quick
@given(st.integers(5, 40), st.floats(0.1, 2.0), seeds)
def test_equivalence_of_values_equals_statsmodels(n: int, margin: float, seed: int) -> None:
    a, b = np.random.default_rng(seed).normal([0, 0.1], 1, size=(n, 2)).T
    result = tost_paired(a, b, margin)
    assert result.p == pytest.approx(max(0.5**n, ttost_paired(b, a, -margin, margin)[0]), abs=1e-9)
    assert (
        result.equivalent == (-margin <= result.low and result.high <= margin)
        or abs(result.p - 0.05) < 1e-6
    )
    np.testing.assert_allclose(
        [result.low, result.high], stats.ttest_rel(b, a).confidence_interval(0.9), atol=1e-9
    )


def test_a_one_sided_margin_tests_that_b_is_not_worse() -> None:
    a = np.random.default_rng(0).normal(size=30)
    better = a + np.random.default_rng(1).normal(5, 0.1, size=30)
    assert tost_paired(a, better, (-0.5, math.inf)).equivalent
    assert not tost_paired(better, a, (-0.5, math.inf)).equivalent
    assert not tost_paired(a, better, 0.5).equivalent


def test_a_handful_of_unchanged_prompts_proves_no_equivalence() -> None:
    same = [True, False] * 5
    assert not tost_paired(same, same, 0.05).equivalent
    assert tost_paired(same * 10, same * 10, 0.05).equivalent
    assert not tost_paired([1.5, 2.5], [1.5, 2.5], 0.05).equivalent
    assert not tost_paired([1.5], [1.5], 0.05).equivalent


def outcomes_of(gained: int, lost: int, n: int) -> tuple[list[bool], list[bool]]:
    """Paired outcomes of n prompts of which so many were gained and lost."""
    same = [i % 2 == 0 for i in range(n - gained - lost)]
    return [False] * gained + [True] * lost + same, [True] * gained + [False] * lost + same


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(0, 1, 44), (3, 9, 50), (5, 1, 24), (12, 4, 100)]
)
def test_equivalence_of_outcomes_inverts_the_score_of_the_constrained_likelihood(
    gained: int, lost: int, n: int
) -> None:
    def z(share: float) -> float:
        def surprise(lost_share: float) -> float:
            shares = [lost_share + share, lost_share, 1 - 2 * lost_share - share]
            return -sum(
                special.xlogy([gained, lost, n - gained - lost], np.maximum(shares, 1e-300))
            )

        bounds = (max(0.0, -share), (1 - share) / 2)
        lost_share = optimize.minimize_scalar(
            surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}
        ).x
        return (gained - lost - n * share) / math.sqrt(n * (2 * lost_share + share - share**2))

    result = tost_paired(*outcomes_of(gained, lost, n), (-0.1, 0.2), level=0.975)
    np.testing.assert_allclose([z(result.low), z(result.high)], [1.959964, -1.959964], atol=1e-4)
    assert result.p == pytest.approx(stats.norm.sf(min(z(-0.1), -z(0.2))), abs=1e-5)


@quick
@given(st.integers(2, 40), st.integers(0, 40), st.integers(0, 40), st.floats(0.01, 0.4))
def test_p_and_interval_of_outcome_equivalence_tell_the_same(
    n: int, gained: int, lost: int, margin: float
) -> None:
    gained = min(gained, n)
    result = tost_paired(*outcomes_of(gained, min(lost, n - gained), n), margin)
    assert -1 <= result.low <= result.value <= result.high <= 1
    if abs(result.p - 0.05) > 1e-6:
        assert result.equivalent == (-margin < result.low and result.high < margin)
    back = tost_paired(*outcomes_of(min(lost, n - gained), gained, n), margin)
    np.testing.assert_allclose(
        [back.p, back.low, back.high], [result.p, -result.high, -result.low], atol=1e-6
    )


def test_an_open_margin_asks_nothing_of_its_side() -> None:
    assert tost_paired(*outcomes_of(16, 0, 16), (-0.1, math.inf)).equivalent
    assert tost_paired(*outcomes_of(0, 16, 16), (-math.inf, 0.1)).equivalent
    assert not tost_paired(*outcomes_of(0, 16, 16), (-0.1, math.inf)).equivalent


@pytest.mark.parametrize("margin", [0.0, -0.1, (0.1, 0.2), math.nan])
def test_a_margin_holds_no_difference_inside(margin: float) -> None:
    with pytest.raises(ValueError, match="margin must be above 0"):
        tost_paired([1.0, 2.0], [1.0, 2.0], margin)


def test_a_ratio_whose_denominator_is_nothing_in_some_resamples_keeps_its_interval() -> None:
    whole = np.array([1.0] * 5 + [0.0] * 15)  # some resamples draw none of the five
    result = ratio_of_means(0.5 * whole, whole)
    assert (result.value, result.low, result.high) == (0.5, 0.5, 0.5)


def test_a_ratio_of_means_is_scale_free_and_paired() -> None:
    rng = np.random.default_rng(0)
    whole = rng.normal(5, 1, size=40)
    result = ratio_of_means(0.3 * whole, whole)
    assert result.value == pytest.approx(0.3)
    np.testing.assert_allclose(
        [result.low, result.high], 0.3
    )  # unpaired resampling would give it a width
    noisy = ratio_of_means(0.3 * whole + rng.normal(0, 1, size=40), whole)
    assert noisy.low < 0.3 < noisy.high
    assert noisy.high - noisy.low < 0.3


def test_a_ratio_to_what_may_be_nothing_has_no_bounds() -> None:
    below = np.random.default_rng(0).normal(0, 1, size=40)
    result = ratio_of_means(np.ones(40), below)
    assert (result.low, result.high) == (-math.inf, math.inf)
    assert math.isnan(ratio_of_means([1.0, 2.0], [0.0, 0.0]).value)


@pytest.mark.parametrize(
    "compare", [paired_difference, ratio_of_means, mcnemar, cohen_kappa, measure_agreement]
)
def test_sides_of_different_length_and_empty_ones_are_errors(compare: object) -> None:
    for sides in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="got"):
            compare(*sides)  # type: ignore[operator]


def test_clusters_name_every_row() -> None:
    for clusters in (["x"], ["x", None, "y"]):
        with pytest.raises(ValueError, match="clusters need an id"):
            paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], clusters=clusters)


def excludes_zero(result: object) -> bool:
    return result.low > 0 or result.high < 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [16, 50])
def test_intervals_of_differences_miss_one_time_in_twenty(n: int) -> None:
    share = false_positives(
        lambda rng: excludes_zero(paired_difference(rng.normal(size=n), rng.normal(size=n)))
    )
    assert share == pytest.approx(0.05, abs=0.015)


def test_intervals_of_outcome_differences_miss_one_time_in_twenty() -> None:
    share = false_positives(
        lambda rng: excludes_zero(paired_difference(*(rng.random((2, 60)) < 0.3)))
    )
    assert share == pytest.approx(0.05, abs=0.015)


def test_intervals_over_prompts_hold_when_the_rows_of_a_prompt_are_alike() -> None:
    prompt = np.repeat(np.arange(25), 4)

    def rows(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=25)[prompt] + 0.5 * rng.normal(size=100)

    share = false_positives(
        lambda rng: excludes_zero(paired_difference(rows(rng), rows(rng), clusters=prompt))
    )
    assert share == pytest.approx(0.05, abs=0.015)
    naive = false_positives(
        lambda rng: excludes_zero(paired_difference(rows(rng), rows(rng))), n=200
    )
    assert naive > 0.2  # the reason why clusters exist


def test_mcnemar_claims_at_most_one_in_twenty() -> None:
    assert false_positives(lambda rng: mcnemar(*(rng.random((2, 80)) < 0.4)).p <= 0.05) <= 0.065


@pytest.mark.parametrize(("n", "margin"), [(16, 0.1), (16, 0.15), (16, 0.2), (24, 0.15), (40, 0.1)])
def test_no_loss_is_claimed_one_time_in_twenty_where_the_loss_is_the_margin(
    n: int, margin: float
) -> None:
    tables = [(gained, lost) for gained in range(n + 1) for lost in range(n + 1 - gained)]
    claims = [
        table
        for table in tables
        if tost_paired(*outcomes_of(*table, n), (-margin, math.inf)).equivalent
    ]
    for gain in (0.0, 0.02, 0.1, 0.3):  # exact: every table there is, not a sample of them
        chance = stats.multinomial(n, [gain, gain + margin, 1 - 2 * gain - margin])
        assert (
            sum(chance.pmf([gained, lost, n - gained - lost]) for gained, lost in claims) <= 0.065
        )


@pytest.mark.parametrize(("margin", "n"), [(0.02, 149), (0.05, 59), (0.1, 29)])
def test_no_loss_of_a_share_takes_so_many_prompts_even_if_nothing_changed(margin, n) -> None:
    assert pairs_for_no_loss(margin) == n
    same = [True, False]
    for size, shown in ((n - 1, False), (n, True)):
        answers = (same * size)[:size]
        assert tost_paired(answers, answers, (-math.inf, margin)).equivalent == shown
    with pytest.raises(ValueError, match="margin of a share must be between 0 and 1"):
        pairs_for_no_loss(0.0)
