"""The numbers of statistics.py and selectivity.py, against scipy, scikit-learn and statsmodels, and against chance."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, special, stats
from sklearn import metrics
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired

from workbench.stats.agreement import agreement, cohen_kappa
from workbench.stats.estimates import (
    Estimate,
    Rate,
    benjamini_hochberg,
    clopper_pearson_interval,
    holm,
    mcnemar,
    mean,
    paired_difference,
    rate,
    ratio_of_means,
    tost_paired,
    wilson_interval,
)
from workbench.stats.selectivity import (
    auroc,
    auroc_interval,
    auroc_p_values,
    conformal_threshold,
    hedges_g,
    max_statistic_permutation,
    permutation_p,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)
outcomes = st.lists(st.sampled_from([True, False, None]), max_size=60)
two_ratings = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
seeds = st.integers(0, 10_000)


@st.composite
def scored_labels(draw: st.DrawFn, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, [n, 5], and labels with at least ``least`` rows of each class."""
    n = draw(st.integers(2 * least + 1, 40))
    rng = np.random.default_rng(draw(seeds))
    labels = np.zeros(n, dtype=bool)
    labels[rng.permutation(n)[: draw(st.integers(least, n - least))]] = True
    return rng.integers(0, draw(st.integers(2, 50)), size=(n, 5)).astype(np.float32), labels


# --- rates and means --------------------------------------------------------------------------------------------------


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
    for ours, method in ((wilson_interval, "wilson"), (clopper_pearson_interval, "beta")):
        np.testing.assert_allclose(
            ours(k, n, level=level),
            proportion_confint(k, n, alpha=1 - level, method=method),
            atol=1e-9,
        )


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


# --- paired comparisons -----------------------------------------------------------------------------------------------


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
    kept = ([1.0, 4.0, 1.0], [2.0, 5.0, 0.0])
    whole, part = paired_difference(a, b), paired_difference(*kept)
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
    "compare", [paired_difference, ratio_of_means, mcnemar, cohen_kappa, agreement]
)
def test_sides_of_different_length_and_empty_ones_are_errors(compare: object) -> None:
    for sides in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="got"):
            compare(*sides)  # type: ignore[operator]


def test_clusters_name_every_row() -> None:
    for clusters in (["x"], ["x", None, "y"]):
        with pytest.raises(ValueError, match="clusters need an id"):
            paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], clusters=clusters)


# --- multiplicity -----------------------------------------------------------------------------------------------------


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


def test_a_permutation_p_counts_the_observed_draw() -> None:
    assert permutation_p(9.0, np.arange(9.0)) == 0.1
    assert permutation_p(8.0, np.arange(9.0)) == 0.2
    assert permutation_p(-1.0, np.arange(9.0)) == 1.0


@quick
@given(seeds)
def test_permutation_p_of_many_equals_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    observed, null = (
        rng.integers(0, 5, size=4).astype(float),
        rng.integers(0, 5, size=(20, 4)).astype(float),
    )
    own = [permutation_p(observed[i], null[:, i]) for i in range(4)]
    np.testing.assert_array_equal(permutation_p(observed, null), own)
    np.testing.assert_array_equal(
        permutation_p(observed, null[:, 0]), [permutation_p(x, null[:, 0]) for x in observed]
    )


def test_permutation_p_refuses_nan_and_shapes_that_do_not_fit() -> None:
    for observed, null in (
        (1.0, []),
        (math.nan, [1.0]),
        (1.0, [math.nan]),
        ([1.0, 2.0], np.zeros((5, 3))),
    ):
        with pytest.raises(ValueError, match="null"):
            permutation_p(np.array(observed), np.array(null))


# --- columns ----------------------------------------------------------------------------------------------------------


@quick
@given(scored_labels())
def test_auroc_equals_scikit_learn_with_ties(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = case
    np.testing.assert_allclose(
        auroc(scores, labels), [metrics.roc_auc_score(labels, column) for column in scores.T]
    )
    assert auroc(scores[:, 0], labels) == pytest.approx(auroc(scores, labels)[0])


@quick
@given(scored_labels())
def test_auroc_turns_around_with_the_labels_and_ignores_monotone_changes(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    scores, labels = case
    np.testing.assert_allclose(auroc(scores, ~labels), 1 - auroc(scores, labels))
    np.testing.assert_allclose(auroc(np.exp(scores / 10), labels), auroc(scores, labels))


@quick
@given(scored_labels(2))
def test_auroc_p_values_equal_scipy_with_ties(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = case[0].astype(float), case[1]  # scipy answers in the precision of the scores
    expected = stats.mannwhitneyu(
        scores[labels], scores[~labels], axis=0, method="asymptotic"
    ).pvalue
    np.testing.assert_allclose(auroc_p_values(scores, labels), expected, atol=1e-12)


@quick
@given(scored_labels(2), st.floats(-1e4, 1e4), st.floats(0.01, 100))
def test_hedges_g_is_the_t_statistic_rescaled(
    case: tuple[np.ndarray, np.ndarray], shift: float, scale: float
) -> None:
    scores, labels = case
    scores = scores + np.random.default_rng(0).normal(size=scores.shape)
    n_true, n_false = labels.sum(), (~labels).sum()
    df = n_true + n_false - 2
    d = stats.ttest_ind(scores[labels], scores[~labels]).statistic * np.sqrt(
        1 / n_true + 1 / n_false
    )
    exact = math.gamma(df / 2) / (math.sqrt(df / 2) * math.gamma((df - 1) / 2))
    np.testing.assert_allclose(hedges_g(scores, labels), d * exact, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        hedges_g(scores * scale + shift, labels), d * exact, rtol=1e-4, atol=1e-6
    )


def test_constant_columns_carry_nothing() -> None:
    labels = np.arange(12) < 5
    dead = np.full((12, 2), [0.1, 0.0])
    np.testing.assert_array_equal(auroc(dead, labels), [0.5, 0.5])
    np.testing.assert_array_equal(auroc_p_values(dead, labels), [1, 1])
    np.testing.assert_array_equal(hedges_g(dead, labels), [0, 0])
    for statistic in ("mean_difference", "rank_sum"):
        np.testing.assert_array_equal(
            max_statistic_permutation(dead, labels, statistic=statistic), [1, 1]
        )
    assert hedges_g(np.where(labels, 0.3, 0.1), labels) == math.inf


def test_several_labelings_equal_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    scores, labels = (
        rng.normal(size=(30, 9000)),
        np.stack([rng.permutation(30) < k for k in (5, 10, 15)], axis=1),
    )
    for measure in (
        auroc,
        auroc_p_values,
        hedges_g,
        lambda *sides: max_statistic_permutation(*sides, n_permutations=9),
    ):
        together = measure(scores, labels)
        assert together.shape == (3, 9000)
        np.testing.assert_allclose(
            together, np.stack([measure(scores, column) for column in labels.T])
        )
        np.testing.assert_allclose(measure(scores[:, 0], labels).shape, (3,))


def test_scores_and_labels_must_fit() -> None:
    scores, labels = np.random.default_rng(0).normal(size=(6, 2)), np.array([True, False] * 3)
    holed = scores.copy()
    holed[1, 1] = np.nan
    for wrong, message in (
        ((scores, labels[:5]), "a row for each prompt"),
        ((scores[:0], labels[:0]), "a row for each prompt"),
        ((scores, labels.astype(int)), "labels must be True or False"),
        ((holed, labels), "finite numbers"),
        ((scores, np.ones(6, dtype=bool)), "0 rows of a class"),
    ):
        for measure in (auroc, auroc_p_values, hedges_g, max_statistic_permutation):
            with pytest.raises(ValueError, match=message):
                measure(*wrong)
    with pytest.raises(ValueError, match="each needs 2"):
        hedges_g(scores, np.arange(6) < 1)


# --- permutation of the largest statistic -----------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["mean_difference", "rank_sum"])
def test_a_planted_column_is_found_and_only_that(statistic: str) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(60, 500)), rng.permutation(60) < 20
    scores[labels, 7] += 3
    scores[:, 7] /= 1000  # columns are compared in their own units
    p = max_statistic_permutation(scores, labels, statistic=statistic, n_permutations=199)  # type: ignore[arg-type]
    assert p[7] == 1 / 200
    assert (np.delete(p, 7) > 0.05).all()


@pytest.mark.parametrize("statistic", ["mean_difference", "rank_sum"])
def test_the_p_of_a_single_column_is_that_of_scipys_permutation_test(statistic: str) -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=9), rng.permutation(9) < 4
    scores[labels] += 0.8
    values = scores if statistic == "mean_difference" else stats.rankdata(scores)
    exact = stats.permutation_test(
        (values[labels], values[~labels]),
        lambda x, y: abs(np.mean(x) - np.mean(y)),
        alternative="greater",
    ).pvalue
    ours = max_statistic_permutation(scores, labels, statistic=statistic, n_permutations=20_000)  # type: ignore[arg-type]
    assert ours == pytest.approx(exact, abs=0.015)


def test_pairs_are_tested_by_sign_flips() -> None:
    rng = np.random.default_rng(3)
    pair, labels = np.repeat(np.arange(8), 2), np.tile([True, False], 8)
    scores = rng.normal(size=16) + 0.6 * labels + 10 * rng.normal(size=8)[pair]
    order = rng.permutation(16)
    differences = scores[labels] - scores[~labels]
    exact = stats.permutation_test(
        (differences,), lambda d: abs(np.mean(d)), permutation_type="samples", alternative="greater"
    ).pvalue
    ours = max_statistic_permutation(
        scores[order], labels[order], groups=pair[order], n_permutations=20_000
    )
    assert ours == pytest.approx(exact, abs=0.015)
    unpaired = max_statistic_permutation(scores, labels, n_permutations=2000)
    assert (
        unpaired > ours
    )  # the spread between pairs hides the effect from the test that ignores them


def test_flips_that_give_the_same_statistic_count_as_reached() -> None:
    scores, labels, pairs = (
        np.tile([1.0, 0.9], 3),
        np.tile([True, False], 3),
        np.repeat(np.arange(3), 2),
    )
    p = max_statistic_permutation(scores, labels, groups=pairs, n_permutations=4000)
    assert p == pytest.approx(2 / 8, abs=0.03)  # all three one way, or all the other


def test_groups_must_fit_and_hold_both_classes() -> None:
    scores, labels = np.random.default_rng(0).normal(size=(6, 2)), np.array([True, False] * 3)
    with pytest.raises(ValueError, match="groups need an id"):
        max_statistic_permutation(scores, labels, groups=["a"] * 5)
    with pytest.raises(ValueError, match="nothing can be shuffled"):
        max_statistic_permutation(scores, labels, groups=range(6))
    with pytest.raises(ValueError, match="statistic must be"):
        max_statistic_permutation(scores, labels, statistic="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_permutations must be"):
        max_statistic_permutation(scores, labels, n_permutations=0)


# --- thresholds -------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 300), st.sampled_from([0.01, 0.05, 0.1, 0.29, 0.3, 0.5, 0.7]))
def test_the_threshold_is_the_smallest_that_keeps_the_rate(n: int, allowed: float) -> None:
    threshold = conformal_threshold(np.random.default_rng(n).permutation(n).astype(float), allowed)
    above = (
        n + 1 if math.isinf(threshold.value) else n - threshold.value
    )  # expected share: above / (n + 1)
    if math.isinf(threshold.value):
        assert 1 / (n + 1) > allowed
        assert (threshold.low, threshold.high) == (0.0, 0.0)
    else:
        assert (
            above / (n + 1) <= allowed + 1e-9 < (above + 1) / (n + 1) + 1e-9 or threshold.value == 0
        )
        assert threshold.low <= allowed
        assert threshold.low < threshold.high


def test_the_interval_of_a_threshold_holds_the_true_rate_nineteen_times_in_twenty() -> None:
    rng, hits, rates = np.random.default_rng(0), 0, []
    for _ in range(2000):
        threshold = conformal_threshold(rng.random(199), 0.05)
        true_rate = 1 - threshold.value
        rates.append(true_rate)
        hits += threshold.low <= true_rate <= threshold.high
    assert np.mean(rates) == pytest.approx(0.05, abs=0.002)
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_rounding_does_not_cost_a_score() -> None:
    assert 100 * 0.29 < 29
    assert conformal_threshold(range(99), 0.29).value == 70.0  # 29 of 100 places are above it


def test_seventy_five_prompts_cannot_promise_one_percent() -> None:
    assert conformal_threshold(range(75), 0.01).value == math.inf
    assert conformal_threshold(range(75), 0.02).high > 0.04
    assert conformal_threshold(range(1000), 0.01).high < 0.02


@pytest.mark.parametrize(
    ("scores", "allowed"),
    [([], 0.05), ([1.0, None], 0.05), ([1.0, math.nan], 0.05), ([1.0], 0), ([1.0], 1)],
)
def test_a_threshold_needs_scores_and_a_rate(scores: list[float], allowed: float) -> None:
    with pytest.raises(ValueError, match=r"rate must be between|scores must be there"):
        conformal_threshold(scores, allowed)


def test_an_auroc_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = stats.norm.cdf(1 / np.sqrt(2))
    labels = np.arange(60) < 25
    scores = rng.normal(size=(60, 4000)) + labels[:, None]
    low, high = auroc_interval(auroc(scores, labels), 25, 35)
    assert 0.92 < np.mean((low <= truth) & (truth <= high)) < 0.975
    assert auroc_interval(1.0, 5, 5)[0] < 1.0
    with pytest.raises(ValueError, match="both classes"):
        auroc_interval(0.5, 0, 3)


# --- agreement --------------------------------------------------------------------------------------------------------


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
    result = agreement(predicted, truth)
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
    result = agreement([True, None, True, False, None], [True, True, None, False, False])
    assert (result.n, result.n_unscored) == (2, 3)
    assert (result.accuracy.value, result.accuracy.n_unscored) == (1.0, 3)
    assert result.precision == Rate(1.0, *wilson_interval(1, 1), 1, 1)
    assert result.recall == Rate(1.0, *wilson_interval(1, 1), 1, 1)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["accuracy"]["n"] == 2
    assert plain["kappa"]["value"] == 1.0


# --- calibration: what happens under chance alone ---------------------------------------------------------------------


def false_positives(experiment: object, n: int = 4000) -> float:
    """Share of null experiments that claim an effect at 5 %; its standard error at 4000 is .35 points."""
    rng = np.random.default_rng(2024)
    return float(np.mean([experiment(rng) for _ in range(n)]))  # type: ignore[operator]


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


@pytest.mark.parametrize("statistic", ["mean_difference", "rank_sum"])
@pytest.mark.parametrize("paired", [False, True])
def test_any_column_is_claimed_one_time_in_twenty(statistic: str, paired: bool) -> None:
    labels, pairs = np.tile([True, False], 12), np.repeat(np.arange(12), 2)

    def claims(rng: np.random.Generator) -> bool:
        scores = rng.exponential(size=(24, 20)) * rng.uniform(0.1, 10, size=20)
        p = max_statistic_permutation(
            scores,
            labels,
            statistic=statistic,  # type: ignore[arg-type]
            groups=pairs if paired else None,
            n_permutations=199,
            seed=int(rng.integers(2**31)),
        )
        return bool((p <= 0.05).any())

    assert false_positives(claims) == pytest.approx(0.05, abs=0.015)
