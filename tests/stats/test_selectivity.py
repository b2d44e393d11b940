"""Test selectivity of columns against scipy and scikit-learn, and against chance alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.chance import false_positives, quick, seeds
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from workbench.stats.selectivity import (
    auroc,
    auroc_interval,
    auroc_with_interval,
    conformal_threshold,
    hedges_g,
    max_statistic_permutation,
    permutation_p,
)


@st.composite
def scored_labels(draw: st.DrawFn, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, [n, 5], and labels with at least ``least`` rows of each class."""
    n = draw(st.integers(2 * least + 1, 40))
    rng = np.random.default_rng(draw(seeds))
    labels = np.zeros(n, dtype=bool)
    labels[rng.permutation(n)[: draw(st.integers(least, n - least))]] = True
    return rng.integers(0, draw(st.integers(2, 50)), size=(n, 5)).astype(np.float32), labels


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
        ((scores, labels[:5]), "one row per prompt"),
        ((scores[:0], labels[:0]), "one row per prompt"),
        ((scores, labels.astype(int)), "labels must be True or False"),
        ((holed, labels), "finite numbers"),
        ((scores, np.ones(6, dtype=bool)), "0 rows of a class"),
    ):
        for measure in (auroc, hedges_g, max_statistic_permutation):
            with pytest.raises(ValueError, match=message):
                measure(*wrong)
    with pytest.raises(ValueError, match="each needs 2"):
        hedges_g(scores, np.arange(6) < 1)


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
    one_by_one = [permutation_p(observed[i], null[:, i]) for i in range(4)]
    np.testing.assert_array_equal(permutation_p(observed, null), one_by_one)
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
    with pytest.raises(ValueError, match=r"rate must be between|scores must be given"):
        conformal_threshold(scores, allowed)


@pytest.mark.parametrize("truth", [0.2, 0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize(("n_true", "n_false"), [(10, 10), (12, 82), (82, 12), (50, 50)])
def test_an_auroc_interval_covers_the_truth_at_least_about_as_often_as_it_says(
    truth: float, n_true: int, n_false: int
) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(n_true + n_false) < n_true
    shift = np.sqrt(2) * stats.norm.ppf(truth)
    scores = rng.normal(size=(len(labels), 1500)) + shift * labels[:, None]
    low, high = auroc_interval(auroc(scores, labels), n_true, n_false)
    assert np.mean((low <= truth) & (truth <= high)) > 0.935
    assert ((low >= 0) & (low < high) & (high <= 1)).all()


def test_an_auroc_interval_turns_around_with_the_classes() -> None:
    areas = np.linspace(0, 1, 21)
    low, high = auroc_interval(areas, 12, 82)
    np.testing.assert_allclose(auroc_interval(1 - areas, 12, 82), (1 - high, 1 - low), atol=1e-12)
    np.testing.assert_allclose(auroc_interval(areas, 82, 12), (low, high), atol=1e-12)
    assert (low[0], high[-1]) == (0, 1)


def test_a_full_separation_of_few_rows_is_no_proof() -> None:
    assert auroc_interval(1.0, 12, 82)[0] == pytest.approx(0.905, abs=0.001)
    assert auroc_interval(1.0, 5, 5)[0] == pytest.approx(0.643, abs=0.001)
    with pytest.raises(ValueError, match="both classes"):
        auroc_interval(0.5, 0, 3)


@quick
@given(scored_labels(), st.integers(2, 5))
def test_copies_of_every_row_under_its_prompt_do_not_narrow_the_interval(
    case: tuple[np.ndarray, np.ndarray], copies: int
) -> None:
    scores, labels = case[0][:, 0], case[1]
    plain = auroc_with_interval(scores, labels)
    assert (plain.low, plain.high) == auroc_interval(
        auroc(scores, labels), int(labels.sum()), int((~labels).sum())
    )
    one_each = auroc_with_interval(scores, labels, clusters=range(len(scores)))
    np.testing.assert_allclose((one_each.low, one_each.high), (plain.low, plain.high), atol=1e-9)
    copied = auroc_with_interval(
        np.tile(scores, copies), np.tile(labels, copies), clusters=[*range(len(scores))] * copies
    )
    assert (copied.value, copied.n) == (pytest.approx(plain.value), copies * len(scores))
    np.testing.assert_allclose((copied.low, copied.high), (plain.low, plain.high), atol=1e-9)


@quick
@given(scored_labels(), seeds)
def test_an_auroc_interval_with_clusters_is_never_the_narrower_one(
    case: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    scores, labels = case[0][:, 0], case[1]
    prompts = np.random.default_rng(seed).integers(0, 6, size=len(scores)).tolist()
    for x in (scores, labels.astype(float)):
        plain, clustered = (auroc_with_interval(x, labels, clusters=c) for c in (None, prompts))
        assert clustered.low <= plain.low + 1e-9
        assert clustered.high >= plain.high - 1e-9


def test_an_auroc_interval_of_rows_that_share_prompts_covers_as_it_says() -> None:
    rng, prompts = np.random.default_rng(0), np.repeat(np.arange(40), 5)
    labels, hits, unclustered = prompts % 2 == 0, 0, 0
    truth = 0.8
    for _ in range(300):
        scores = np.sqrt(0.6) * rng.normal(size=40)[prompts] + np.sqrt(0.4) * rng.normal(size=200)
        scores = scores + labels * np.sqrt(2) * stats.norm.ppf(truth)
        area = auroc_with_interval(scores, labels, clusters=prompts.tolist())
        hits += area.low <= truth <= area.high
        area = auroc_with_interval(scores, labels)
        unclustered += area.low <= truth <= area.high
    assert hits / 300 > 0.91
    assert unclustered / 300 < 0.8


def test_an_auroc_with_interval_is_of_one_column() -> None:
    with pytest.raises(ValueError, match="one column each"):
        auroc_with_interval(np.zeros((4, 2)), np.array([True, False] * 2))
    with pytest.raises(ValueError, match="clusters need an id"):
        auroc_with_interval(np.zeros(4), np.array([True, False] * 2), clusters=["a"])
