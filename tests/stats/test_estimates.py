"""Test rates, means and corrected p-values against statsmodels and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.chance import quick
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from workbench.stats.estimates import (
    Estimate,
    benjamini_hochberg,
    holm,
    mean,
    rate,
    wilson_interval,
)
from workbench.stats.selectivity import auroc

outcomes = st.lists(st.sampled_from([True, False, None]), max_size=60)


def test_a_rate_of_no_prompts_is_unscored() -> None:
    empty = rate([])
    assert math.isnan(empty.value)
    assert (empty.low, empty.high, empty.n, empty.n_unscored) == (0.0, 1.0, 0, 0)
    assert rate([None, None, math.nan]).n_unscored == 3


def test_a_rate_reads_as_in_a_table() -> None:
    assert str(rate([True] * 5 + [False] * 45 + [None] * 2)) == ".10 [.04, .21] n=50 (2 unscored)"
    assert str(rate([True])) == "1.00 [.21, 1.00] n=1"
    assert str(rate([])) == "nan [.00, 1.00] n=0"
    assert str(Estimate(-0.001, -0.5, 10.05, 3, 0)) == ".00 [-.50, 10.05] n=3"


@quick
@given(outcomes)
def test_a_rate_counts_only_what_was_scored(given_outcomes: list[bool | None]) -> None:
    result = rate(given_outcomes)
    scored = [x for x in given_outcomes if x is not None]
    assert (result.n, result.n_unscored) == (len(scored), len(given_outcomes) - len(scored))
    assert 0 <= result.low <= result.high <= 1
    if scored:
        assert result.value == sum(scored) / len(scored)
        assert result.low - 1e-12 <= result.value <= result.high + 1e-12


@quick
@given(
    st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.8, 0.95]),
)
def test_intervals_of_proportions_equal_statsmodels(counts: tuple[int, int], level: float) -> None:
    k, n = counts
    expected = proportion_confint(k, n, alpha=1 - level, method="wilson")
    np.testing.assert_allclose(wilson_interval(k, n, level=level), expected, atol=1e-9)


def test_a_mean_counts_unscored_and_repeats_with_its_seed() -> None:
    result = mean([1.0, None, 3.0, math.nan, 5.0], seed=3)
    assert (result.value, result.n, result.n_unscored) == (3.0, 3, 2)
    assert result.low < 3 < result.high
    assert result == mean(np.array([1.0, 3.0, 5.0, np.nan, np.nan]), seed=3)
    many = np.random.default_rng(0).normal(size=30)
    assert mean(many, seed=3) != mean(many, seed=4)


def test_means_of_one_value_or_none_have_no_bounds() -> None:
    for values, value in (([], math.nan), ([None], math.nan), ([2.0], 2.0)):
        result = mean(values)
        assert (result.low, result.high) == (-math.inf, math.inf)
        assert result.value == value or math.isnan(value)


def test_the_interval_of_a_mean_is_that_of_a_t_test_on_normal_values() -> None:
    values = np.random.default_rng(0).normal(size=25)
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    result = mean(values, n_resamples=20_000)
    np.testing.assert_allclose([result.low, result.high], expected, atol=0.03)


def test_long_columns_are_resampled_in_blocks() -> None:
    result = mean(np.arange(300_000) % 2, n_resamples=20)
    assert result.low <= 0.5 <= result.high
    assert result.high - result.low < 0.01


@pytest.mark.parametrize("wrong", ["yes", 0.5, 2, math.inf, [True]])
def test_an_outcome_is_true_false_or_none(wrong: object) -> None:
    with pytest.raises(ValueError, match="outcomes must be True, False or None, got"):
        rate([True, wrong])  # type: ignore[list-item]


@pytest.mark.parametrize("wrong", ["1.5", math.inf, 1j, [1.0]])
def test_a_value_is_a_finite_number_or_none(wrong: object) -> None:
    with pytest.raises(ValueError, match="values must be finite numbers or None, got"):
        mean([1.0, wrong])  # type: ignore[list-item]


def test_tensors_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="got tensor"):
        mean(torch.ones(3))
    with pytest.raises(ValueError, match=r"pass tensor\.numpy"):
        auroc(torch.ones(3), np.array([True, False, True]))


def test_levels_and_counts_out_of_range_are_errors() -> None:
    for call in (lambda: rate([True], level=95), lambda: mean([1.0, 2.0], level=1.0)):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            call()
    with pytest.raises(ValueError, match="from 0 to n"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="n_resamples must be at least 1"):
        mean([1.0, 2.0], n_resamples=0)


@quick
@given(arrays(float, st.integers(1, 40), elements=st.one_of(st.floats(0, 1), st.just(math.nan))))
def test_adjusted_values_equal_statsmodels_on_those_that_were_tested(p: np.ndarray) -> None:
    tested = ~np.isnan(p)
    for ours, method in ((holm, "holm"), (benjamini_hochberg, "fdr_bh")):
        adjusted = ours(p)
        assert np.isnan(adjusted[~tested]).all()
        if tested.any():
            np.testing.assert_allclose(
                adjusted[tested], multipletests(p[tested], method=method)[1], atol=1e-12
            )


def test_a_family_without_a_test_stays_without_one() -> None:
    p = np.array([[math.nan, math.nan], [0.01, math.nan]])
    for adjust in (holm, benjamini_hochberg):
        np.testing.assert_array_equal(adjust(p, axis=1), p)
        np.testing.assert_array_equal(p[1], [0.01, math.nan])  # and the argument is left alone


def test_families_lie_along_the_axis_named() -> None:
    p = np.random.default_rng(0).random((4, 6))
    p[1, 2] = np.nan
    for adjust in (holm, benjamini_hochberg):
        np.testing.assert_array_equal(adjust(p, axis=1), np.stack([adjust(row) for row in p]))
        np.testing.assert_array_equal(
            adjust(p, axis=0), np.stack([adjust(column) for column in p.T], axis=1)
        )
        np.testing.assert_array_equal(adjust(p), adjust(p.ravel()).reshape(p.shape))


@pytest.mark.parametrize("p", [[], [1.2], [0.5, -0.1]])
def test_p_values_are_in_the_unit_interval(p: list[float]) -> None:
    for adjust in (holm, benjamini_hochberg):
        with pytest.raises(ValueError, match="p must hold values in"):
            adjust(np.array(p))
