"""Measure how well scores tell prompts apart, column by column, and calibrate thresholds.

Scores are arrays with one row per prompt and one column per neuron, or a single vector. Labels are
True for the class looked for: a single vector, or one column per labeling (category). Results have
one row per labeling and one column per column of scores; an axis that was not given is not
returned. Columns are worked on in blocks, so that memory stays small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from workbench.stats.estimates import (
    Clusters,
    Estimate,
    check_level,
    cluster_index,
    to_floats,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator


Scores = Float[np.ndarray, "prompts columns"] | Float[np.ndarray, "prompts"]

Labels = Bool[np.ndarray, "prompts labelings"] | Bool[np.ndarray, "prompts"]

BLOCK = 4096
"""Columns worked on at once: a block of 250 rows takes 8 MB in float64."""


@dataclass(frozen=True)
class Threshold:
    """Hold a threshold that was calibrated on scores that must not pass it.

    A gate fires where a score is **above** ``value``.

    Attributes:
        value: Threshold in score units; inf (never fires) where n is too small for the rate.
        rate: False-activation rate asked for.
        low, high: Interval of the true false-activation rate that ``n`` scores can promise;
            (0, 0) for an infinite threshold.
        n: Scores it was calibrated on.
    """

    value: float
    rate: float
    low: float
    high: float
    n: int


def auroc(scores: Scores, labels: Labels) -> Any:
    """Compute the chance that a True row scores above a False one, with ties counted half.

    .5 separates nothing (Mann and Whitney 1947). ``roc_auc_score`` of scikit-learn and
    ``mannwhitneyu`` of scipy give the same number for one labeling; here all labelings share one
    ranking of each column and one matrix product, as tens of thousands of neurons need.

    Args:
        scores: Numbers in any unit, [prompts] or [prompts, columns].
        labels: Bools, [prompts] or [prompts, labelings].

    Returns:
        AUROC, [labelings, columns] without the axes not given; a float for one vector and one
        labeling.

    Raises:
        ValueError: If lengths differ, a score is nan or infinite, labels are not bools, or a
            labeling lacks a class.
    """
    x, is_true = _checked(scores, labels, 1)
    u = np.concatenate([_mann_whitney_u(block, is_true) for block in _blocks(x)], axis=1)
    return _shaped(u / (is_true.sum(axis=0) * (~is_true).sum(axis=0))[:, None], scores, labels)


def auroc_interval(
    value: Any, n_true: float, n_false: float, *, level: float = 0.95
) -> tuple[Any, Any]:
    """Compute the score interval of an AUROC: all values that do not differ clearly from it.

    It has a width at 0 and 1, stays inside [0, 1], and turns around with the classes: that of
    1 - A is that of A mirrored.

    Args:
        value: One AUROC or an array of them.
        n_true: Rows of the class looked for; a fraction where rows resemble each other.
        n_false: Other rows.
        level: Confidence level.

    Raises:
        ValueError: If a class has no rows.

    Source: method 5 of Newcombe 2006 (Statistics in Medicine 25:559), which takes the variance of
    Hanley and McNeil 1982 at the value that is tested, with the mean of the two sizes in its terms.
    """
    from scipy.special import ndtri

    check_level(level)
    if min(n_true, n_false) < 1:
        raise ValueError(f"both classes need rows, got {n_true} and {n_false}.")
    a = np.asarray(value, dtype=float)
    reach = float(ndtri((1 + level) / 2))
    more = (n_true + n_false) / 2 - 1

    def differs(tested: Float[np.ndarray, ...]) -> Any:
        terms = 1 + more * ((1 - tested) / (2 - tested) + tested / (1 + tested))
        variance = tested * (1 - tested) * terms / (n_true * n_false)
        return np.abs(a - tested) > reach * np.sqrt(variance)

    ends = []
    for outside in (np.zeros_like(a), np.ones_like(a)):
        inside = a
        for _ in range(50):  # halve the piece between a value that differs and one that does not
            middle = (outside + inside) / 2
            is_out = differs(middle)
            outside, inside = np.where(is_out, middle, outside), np.where(is_out, inside, middle)
        ends.append(inside)
    low, high = ends
    return (low, high) if a.ndim else (float(low), float(high))


def auroc_with_interval(
    scores: Float[np.ndarray, " rows"],
    labels: Bool[np.ndarray, " rows"],
    *,
    clusters: Clusters = None,
    level: float = 0.95,
) -> Estimate:
    """Estimate an AUROC with its interval, also where several rows share a prompt.

    With clusters the interval is that of as many independent rows as would vary so much: at most
    all of them, and at least what they are worth if the rows of a class and prompt are all alike. A
    full separation does not show how alike rows are and takes the least. So it is never narrower
    than that of independent rows.

    Args:
        scores: One number per row, in any unit.
        labels: Whether each row is of the class looked for.
        clusters: Prompt id of each row where prompts have several.
        level: Confidence level.

    Raises:
        ValueError: As for ``auroc``, or if ids do not fit.

    Source: variance of clustered data: Obuchowski 1997 (Biometrics 53:567), against that of
    DeLong et al. 1988 (Biometrics 44:837) for independent rows.
    """
    x, is_true = np.asarray(scores), np.asarray(labels)
    if x.ndim != 1 or is_true.ndim != 1:
        raise ValueError(
            f"scores and labels must be one column each, got {x.shape} and {is_true.shape}; "
            "give one column at a time."
        )
    value, n = float(auroc(x, is_true)), len(x)
    sizes = np.array([is_true.sum(), (~is_true).sum()], dtype=float)
    if clusters is not None:
        prompts = cluster_index(clusters, n)
        least = [
            m**2 / (np.bincount(prompts[side]) ** 2).sum()
            for m, side in zip(sizes, (is_true, ~is_true), strict=True)
        ]
        inflation = _auroc_inflation(x, is_true, prompts)
        sizes = np.clip(sizes / inflation, least, sizes)
    low, high = auroc_interval(value, *sizes, level=level)
    return Estimate(value, low, high, n, 0)


def _auroc_inflation(
    x: Float[np.ndarray, rows], is_true: Bool[np.ndarray, rows], prompts: Int[np.ndarray, rows]
) -> float:
    """Divide the variance of an AUROC over prompts by that over rows; inf where both are 0."""
    from scipy.stats import rankdata

    n_true, n_false = int(is_true.sum()), int((~is_true).sum())
    # share of the other class that a row is on the right side of, ties counted half
    ranks, right = rankdata(x), np.empty(len(x))
    right[is_true] = (ranks[is_true] - rankdata(x[is_true])) / n_false
    right[~is_true] = 1 - (ranks[~is_true] - rankdata(x[~is_true])) / n_true
    area = right[is_true].mean()
    parts = (right - area) / np.where(is_true, n_true, n_false)
    over_rows = (parts**2).sum()
    n_prompts = prompts.max() + 1
    over_prompts = (np.bincount(prompts, weights=parts) ** 2).sum() * n_prompts
    if over_rows < 1e-12 or n_prompts < 2:
        return math.inf
    return float(over_prompts / (n_prompts - 1) / over_rows * (1 - 1 / len(x)))


def hedges_g(scores: Scores, labels: Labels) -> Any:
    """Compute the standardised mean difference of True and False rows (Hedges' g).

    It is the mean of the True rows minus that of the False ones, in pooled standard deviations,
    corrected for small samples.

    Args:
        scores: As for ``auroc``.
        labels: As for ``auroc``.

    Returns:
        g, [labelings, columns] without the axes not given; 0 for a constant column, +-inf where
        the classes differ without any spread inside them.

    Raises:
        ValueError: As for ``auroc``, or if a class has fewer than two rows.

    Source: Hedges 1981 (Journal of Educational Statistics 6:107), the exact correction.
    """
    from scipy.special import gammaln

    x, is_true = _checked(scores, labels, 2)
    n, n_true = len(x), is_true.sum(axis=0)[:, None]
    n_false, df = n - n_true, n - 2
    correction = math.exp(gammaln(df / 2) - gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    g = []
    for block in _blocks(x):
        centered = _centered(block, np.zeros(n, dtype=int))
        total = (centered**2).sum(axis=0)
        true_mean = is_true.T @ centered / n_true
        inside = total - n_true * n / n_false * true_mean**2
        inside[inside < 1e-12 * total] = 0  # what is left there is rounding
        difference = true_mean * n / n_false
        with np.errstate(divide="ignore", invalid="ignore"):
            block_g = np.where(difference == 0, 0, difference / np.sqrt(inside / df))
        g.append(correction * block_g)
    return _shaped(np.concatenate(g, axis=1), scores, labels)


def max_statistic_permutation(
    scores: Scores,
    labels: Labels,
    *,
    statistic: Literal["mean_difference", "rank_sum"] = "mean_difference",
    groups: Iterable[Hashable] | None = None,
    n_permutations: int = 500,
    seed: int = 0,
) -> Any:
    """Compute the family-wise p-value of each column by shuffling labels.

    It is how often the best of all columns does as well as this one when labels are shuffled.
    The statistic is the absolute sum over True rows in units of its standard deviation under
    shuffling. For values it orders shuffles as the mean difference in pooled standard deviations
    does, for their mid-ranks as the tie-corrected Mann-Whitney test does. A family is all columns
    of one labeling: with several labelings, correct over those too. The smallest p is
    1 / (1 + n_permutations).

    Args:
        scores: Numbers in any unit, [prompts] or [prompts, columns].
        labels: Bools, [prompts] or [prompts, labelings].
        statistic: Compare means or ranks.
        groups: Group of each row. Labels are then shuffled inside groups only, and values are
            taken relative to their group's mean. With pairs of one True and one False row this is
            the sign-flip test of the paired differences.
        n_permutations: Shuffles; all labelings share them.
        seed: Seed of the shuffles.

    Returns:
        p-values, [labelings, columns] without the axes not given; 1 for a constant column.

    Raises:
        ValueError: As for ``auroc``, or if groups do not fit or leave nothing to shuffle.

    Source: Westfall and Young 1993, single step; aligned ranks in groups: Hodges and Lehmann 1962.
    """
    if statistic not in ("mean_difference", "rank_sum"):
        raise ValueError(f"statistic must be 'mean_difference' or 'rank_sum', got {statistic!r}.")
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be at least 1, got {n_permutations}; 500 is usual.")
    x, is_true = _checked(scores, labels, 1)
    group = _group_index(groups, len(x))
    blocks = _aligned_blocks(x, is_true, group, statistic)
    # the observed statistic of each column, and the largest over columns of each shuffle
    observed = np.concatenate([_z(is_true.T[None], *block)[0] for block in blocks], axis=1)
    shuffles = _shuffled_labels(is_true, group, n_permutations, seed)
    null = np.concatenate(
        [
            np.max([_z(shuffled, *block).max(axis=2) for block in blocks], axis=0)
            for shuffled in shuffles
        ]
    )
    # a shuffle that gives the labels back must count as reached, whatever float32 makes of it
    p = np.stack(
        [
            permutation_p(labeling * (1 - 1e-5), draws)
            for labeling, draws in zip(observed, null.T, strict=True)
        ]
    )
    return _shaped(p, scores, labels)


def permutation_p(
    observed: Float[np.ndarray, ...] | float, null: Float[np.ndarray, "draws ..."]
) -> Any:
    """Compute the p-value of a statistic against R draws under the null hypothesis.

    It is (1 + #{null >= observed}) / (1 + R) (Phipson and Smyth 2010).

    Args:
        observed: One value, or an array of them.
        null: R draws along the first axis; further axes as in ``observed``, or none where all
            values share the same draws.

    Returns:
        A float for one value, else an array; never 0, as the observed draw is one of the null.

    Raises:
        ValueError: If there are no draws, shapes do not fit, or a value is nan.
    """
    observed, null = np.asarray(observed, dtype=float), np.asarray(null, dtype=float)
    if null.size == 0 or null.ndim == 0 or null.shape[1:] not in ((), observed.shape):
        raise ValueError(
            f"null must be draws x {observed.shape}, or draws alone, got {null.shape}."
        )
    if np.isnan(observed).any() or np.isnan(null).any():
        raise ValueError("observed or null holds nan; drop what has no statistic first.")
    if null.ndim == 1:  # shared draws: sorting spares comparing every value with every draw
        reached = len(null) - np.searchsorted(np.sort(null), observed)
    else:
        reached = (null >= observed).sum(axis=0)
    p = (1 + reached) / (1 + len(null))
    return p if observed.ndim else float(p)


def conformal_threshold(scores: Iterable[float], rate: float, *, level: float = 0.95) -> Threshold:
    """Find the smallest threshold that at most ``rate`` of new scores pass, on average.

    New scores must be exchangeable with the given ones. The threshold is the k-th smallest score,
    k = ceil((n + 1)(1 - rate)). Over calibration sets the share above it follows
    Beta(n + 1 - k, k), or is less with ties (Vovk 2012, PMLR 25:475): the interval is that
    distribution's.

    Args:
        scores: Scores of calibration prompts that must not activate, one per prompt.
        rate: False-activation rate allowed, in (0, 1).
        level: Level of the interval.

    Raises:
        ValueError: If there are no scores, one is None, nan or infinite, or the rate is outside
            (0, 1).
    """
    from scipy.special import betaincinv

    check_level(level)
    known = np.sort(to_floats(scores, "scores"))
    n = len(known)
    if not 0 < rate < 1:
        raise ValueError(f"rate must be between 0 and 1, got {rate!r}.")
    if n == 0 or np.isnan(known).any():
        raise ValueError(
            f"scores must be given, none of them None or nan, got {n} scores of which "
            f"{np.isnan(known).sum()} are; drop those first."
        )
    # n + 1 - k; with some slack, because .29 * 100 is 28.999999999999996
    above = math.floor((n + 1) * rate + 1e-9)
    if above == 0:
        return Threshold(math.inf, rate, 0.0, 0.0, n)
    low, high = betaincinv(above, n + 1 - above, [(1 - level) / 2, (1 + level) / 2])
    return Threshold(float(known[n - above]), rate, float(low), float(high), n)


def _checked(
    scores: Scores, labels: Labels, least: int
) -> tuple[Float[np.ndarray, "prompts columns"], Bool[np.ndarray, "prompts labelings"]]:
    """Check scores and labels and give both two axes; each class needs ``least`` rows."""
    if hasattr(scores, "detach") or hasattr(labels, "detach"):
        raise ValueError(
            "scores and labels must be numpy arrays, got a tensor; pass tensor.numpy()."
        )
    x, is_true = np.asarray(scores), np.asarray(labels)
    if (
        x.ndim not in (1, 2)
        or is_true.ndim not in (1, 2)
        or len(x) != len(is_true)
        or x.size == 0
        or is_true.size == 0
    ):
        raise ValueError(
            f"scores and labels need one row per prompt, got {x.shape} and {is_true.shape}."
        )
    if is_true.dtype != bool:
        raise ValueError(
            f"labels must be True or False, got {is_true.dtype}; "
            "compare them first, as in labels == 1."
        )
    if x.dtype.kind not in "fiub" or not np.isfinite(x).all():
        raise ValueError(
            f"scores must be finite numbers, got {x.dtype} with nan, inf or text; "
            "drop those rows first."
        )
    x, is_true = x.reshape(len(x), -1), is_true.reshape(len(x), -1)
    fewest = np.minimum(is_true.sum(axis=0), (~is_true).sum(axis=0))
    if fewest.min() < least:
        raise ValueError(
            f"labeling {fewest.argmin()} has {fewest.min()} rows of a class; "
            f"each needs {least} or more."
        )
    return x, is_true


def _shaped(values: Float[np.ndarray, "labelings columns"], scores: Scores, labels: Labels) -> Any:
    values = values[:, 0] if np.ndim(scores) == 1 else values
    return values[0] if np.ndim(labels) == 1 else values


def _blocks(
    x: Float[np.ndarray, "prompts columns"],
) -> Iterator[Float[np.ndarray, "prompts block"]]:
    return (x[:, start : start + BLOCK].astype(float) for start in range(0, x.shape[1], BLOCK))


def _mann_whitney_u(
    block: Float[np.ndarray, "prompts block"], is_true: Bool[np.ndarray, "prompts labelings"]
) -> Float[np.ndarray, "labelings block"]:
    """Count the pairs of a True and a False row in which the True one scores higher (U)."""
    from scipy.stats import rankdata

    ranks = rankdata(block, axis=0) - (len(block) + 1) / 2
    n_true = is_true.sum(axis=0)[:, None]
    return is_true.T @ ranks + n_true * (len(block) - n_true) / 2


def _aligned_blocks(
    x: Float[np.ndarray, "prompts columns"],
    is_true: Bool[np.ndarray, "prompts labelings"],
    group: Int[np.ndarray, prompts],
    statistic: str,
) -> list[tuple[Float[np.ndarray, "prompts block"], Float[np.ndarray, "labelings block"]]]:
    """Center values, or their ranks, in groups; beside them 1 / deviation of a sum over True."""
    from scipy.stats import rankdata

    sizes = np.bincount(group)[:, None]
    shares = np.stack([np.bincount(group, weights=column) for column in is_true.T], axis=1) / sizes
    # variance of a sum over a group's True rows: n_true n_false / (n (n - 1)) times its sum of
    # squares
    weights = ((shares * (1 - shares) * sizes) / np.maximum(sizes - 1, 1))[group]
    if not weights.any(axis=0).all():
        raise ValueError(
            "a labeling has no group with both classes, so nothing can be shuffled; "
            "give larger groups."
        )
    blocks = []
    for block in _blocks(x):
        aligned = _centered(block, group)
        if statistic == "rank_sum":
            aligned = _centered(rankdata(aligned, axis=0), group)
        variance = weights.T @ aligned**2
        scale = np.divide(1, np.sqrt(variance), out=np.zeros_like(variance), where=variance > 0)
        blocks.append((aligned.astype(np.float32), scale))
    return blocks


def _shuffled_labels(
    is_true: Bool[np.ndarray, "prompts labelings"],
    group: Int[np.ndarray, prompts],
    n_permutations: int,
    seed: int,
) -> Iterator[Float[np.ndarray, "shuffles labelings prompts"]]:
    """Shuffle labels inside groups, about a thousand columns of labels at a time."""
    n_prompts, n_labelings = is_true.shape
    rng, by_group = np.random.default_rng(seed), np.argsort(group, kind="stable")
    most_at_once = max(1, 1024 // n_labelings)
    for start in range(0, n_permutations, most_at_once):
        n_shuffles = min(most_at_once, n_permutations - start)
        # sorted by group and then at random, the rows of a group change places with each other
        keys = group + rng.random((n_shuffles, n_prompts))
        shuffled = np.empty((n_shuffles, n_labelings, n_prompts), dtype=np.float32)
        shuffled[:, :, by_group] = is_true[np.argsort(keys, axis=1)].transpose(0, 2, 1)
        yield shuffled


def _centered(
    block: Float[np.ndarray, "prompts block"], group: Int[np.ndarray, prompts]
) -> Float[np.ndarray, "prompts block"]:
    """Subtract each group's mean; what rounding leaves of constant values is set to 0."""
    order, sizes = np.argsort(group, kind="stable"), np.bincount(group)
    sums = np.add.reduceat(block[order], np.cumsum(sizes) - sizes, axis=0)
    centered = block - (sums / sizes[:, None])[group]
    centered[np.abs(centered) < 1e-12 * np.abs(block).max(axis=0)] = 0
    return centered


def _group_index(groups: Iterable[Hashable] | None, n: int) -> Int[np.ndarray, prompts]:
    if groups is None:
        return np.zeros(n, dtype=int)
    codes: dict[Hashable, int] = {}
    index = np.array([codes.setdefault(group, len(codes)) for group in groups])
    if len(index) != n or None in codes:
        raise ValueError(f"groups need an id, not None, for each of {n} rows, got {len(index)}.")
    return index


def _z(
    labels: Shaped[np.ndarray, "shuffles labelings prompts"],
    values: Float[np.ndarray, "prompts block"],
    scale: Float[np.ndarray, "labelings block"],
) -> Float[np.ndarray, "shuffles labelings block"]:
    """Compute absolute sums over True rows for all shuffles and labelings in one product."""
    z = (labels.reshape(-1, len(values)) @ values).reshape(*labels.shape[:2], -1)
    z *= scale
    return np.abs(z, out=z)
