"""Measure how well verdicts agree with each other or with the truth.

The measures are accuracy, precision, recall, specificity and Cohen's kappa. Several answers to one
prompt resemble each other: say with ``clusters`` which answers share a prompt, and intervals become
as wide as that makes them. Values and counts stay those of answers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.stats.estimates import (
    Clusters,
    Estimate,
    Outcomes,
    Rate,
    bootstrap_interval,
    check_level,
    cluster_index,
    rate,
    to_floats,
    wilson_of_share,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Agreement:
    """Hold how well yes/no verdicts match the truth.

    Attributes:
        accuracy: Share of scored answers where verdict and truth are equal.
        precision: Share of True among the answers predicted True; those of unknown truth are its
            unscored ones.
        recall: Share of answers predicted True among those that are True; those without a verdict
            are its unscored ones.
        kappa: Cohen's kappa: 1 for full agreement, 0 for what chance gives.
        n: Answers with both a verdict and a truth.
        n_unscored: Answers that lack one of them.
        specificity: Share of answers predicted False among those that are False; those without a
            verdict are its unscored ones.
    """

    accuracy: Rate
    precision: Rate
    recall: Rate
    kappa: Estimate
    n: int
    n_unscored: int
    specificity: Rate

    def to_dict(self) -> dict[str, Any]:
        """Turn it into nested dictionaries of plain numbers."""
        return asdict(self)


def cohen_kappa(
    a: Iterable[Hashable],
    b: Iterable[Hashable],
    *,
    clusters: Clusters = None,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Compute Cohen's kappa (1960) of two raters, with a bootstrap interval of 2000 draws.

    Kappa is the agreement beyond what the frequencies of the labels give. It is nan, with the
    interval (-1, 1), where both raters give one and the same label throughout. At full agreement
    its interval has width 0; read that of the accuracy there. ``cohen_kappa_score`` of scikit-learn
    gives the same value, but no interval.

    Args:
        a: Labels of one rater, of any kind, None where unscored.
        b: Labels of the other rater, in the same order.
        clusters: Prompt id of each answer where prompts have several; prompts are then drawn with
            all their answers.
        level: Confidence level.
        seed: Seed of the resampling.

    Raises:
        ValueError: If nothing was given, or lengths differ.
    """
    check_level(level)
    first, second = list(a), list(b)
    if len(first) != len(second) or not first:
        raise ValueError(
            "raters need one label each for the same answers, at least one, "
            f"got {len(first)} and {len(second)}."
        )
    # cross-tabulate the pairs that both raters labelled
    is_labelled = [
        not any(label is None or label != label for label in pair)
        for pair in zip(first, second, strict=True)
    ]
    pairs = [
        pair
        for pair, keep in zip(zip(first, second, strict=True), is_labelled, strict=True)
        if keep
    ]
    codes = {label: i for i, label in enumerate(dict.fromkeys(x for pair in pairs for x in pair))}
    n, k = len(pairs), len(codes)
    cells = np.array([codes[x] * k + codes[y] for x, y in pairs], dtype=int)
    prompts = None
    if clusters is not None:
        prompts = cluster_index(clusters, len(first))[np.array(is_labelled)]
    if k < 2:
        return Estimate(math.nan, -1.0, 1.0, n, len(first) - n)
    tables, n_prompts = _resampled_tables(cells, k, prompts, seed)
    samples = _kappa(tables)
    low, high = bootstrap_interval(samples[~np.isnan(samples)], n_prompts, level=level)
    value = float(_kappa(np.bincount(cells, minlength=k * k).reshape(k, k)))
    return Estimate(value, max(low, -1.0), min(high, 1.0), n, len(first) - n)


def measure_agreement(
    predicted: Outcomes,
    truth: Outcomes,
    *,
    clusters: Clusters = None,
    level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Measure how well yes/no verdicts match the truth.

    The intervals of accuracy, precision, recall and specificity are Wilson's, that of kappa is a
    bootstrap one.

    Args:
        predicted: Verdicts, one per answer, None where the judge gave none.
        truth: Reference labels in the same order, None where unknown.
        clusters: Prompt id of each answer where prompts have several: answers to one prompt
            resemble each other, and intervals are as wide as that makes them.
        level: Confidence level.
        seed: Seed of the resampling for kappa.

    Raises:
        ValueError: If nothing was given, lengths differ, or an outcome is not True, False or None.
    """
    verdicts = to_floats(predicted, "predicted", yes_no=True)
    facts = to_floats(truth, "truth", yes_no=True)
    prompts = None if clusters is None else cluster_index(clusters, len(verdicts))
    kappa = cohen_kappa(verdicts, facts, clusters=prompts, level=level, seed=seed)

    def share(outcomes: Float[np.ndarray, n], among: Any = slice(None)) -> Rate:
        return _share(outcomes[among], None if prompts is None else prompts[among], level)

    return Agreement(
        accuracy=share(np.where(np.isnan(verdicts + facts), np.nan, verdicts == facts)),
        precision=share(facts, verdicts == 1),
        recall=share(verdicts, facts == 1),
        kappa=kappa,
        n=kappa.n,
        n_unscored=kappa.n_unscored,
        specificity=share(1 - verdicts, facts == 0),
    )


def _share(
    outcomes: Float[np.ndarray, n], prompts: Int[np.ndarray, n] | None, level: float
) -> Rate:
    """Estimate the share of True among scored answers, each of which weighs the same."""
    if prompts is None:
        return rate(outcomes, level=level)
    is_scored = ~np.isnan(outcomes)
    known = outcomes[is_scored]
    low, high = _share_interval(known, prompts[is_scored], level)
    value = float(known.mean()) if len(known) else math.nan
    return Rate(value, low, high, len(known), len(outcomes) - len(known))


def _share_interval(
    outcomes: Float[np.ndarray, n], prompts: Int[np.ndarray, n], level: float
) -> tuple[float, float]:
    """Compute Wilson's interval of a share over answers, some of which are to one prompt.

    It is that of as many independent answers as would vary so much: at most all of them, and at
    least what they are worth if the answers to a prompt always say the same (the count of prompts,
    where those have equally many answers). A share of 0 or 1 does not show how alike answers are
    and takes the least. With one answer per prompt it is ``wilson_interval``. In ``rate`` prompts
    weigh the same, here answers do.

    Source: Korn and Graubard 1998 (Survey Methodology 24:193); variance of a ratio by
    linearisation (Cochran 1977, Sampling Techniques, 6.3).
    """
    if not len(outcomes):
        return 0.0, 1.0
    _, index, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    n, k, share = len(outcomes), len(sizes), float(outcomes.mean())
    least = n**2 / float((sizes**2).sum())
    residuals = np.bincount(index, weights=outcomes) - share * sizes
    variance = float((residuals**2).sum()) / n**2 * k / max(k - 1, 1)
    size = share * (1 - share) / variance if variance and 0 < share < 1 else least
    return wilson_of_share(share, min(max(size, least), n), level)


def _resampled_tables(
    cells: Int[np.ndarray, n], k: int, prompts: Int[np.ndarray, n] | None, seed: int
) -> tuple[Float[np.ndarray, "draws k k"], int]:
    """Draw prompts with all their answers, 2000 times; also return how many prompts there are.

    To resample prompts is to draw from a multinomial how often each distinct table of a prompt's
    answers comes. A prompt with one answer has a table of one cell.
    """
    if prompts is None:
        kinds = np.eye(k * k)
        counts = np.bincount(cells, minlength=k * k)
    else:
        _, place = np.unique(prompts, return_inverse=True)
        by_prompt = np.zeros((place.max() + 1, k * k))
        np.add.at(by_prompt, (place, cells), 1)
        kinds, counts = np.unique(by_prompt, axis=0, return_counts=True)
        # the order of the cells, so that prompts of one answer give the same draws as above
        kinds, counts = kinds[::-1], counts[::-1]
    n_prompts = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(n_prompts, counts / n_prompts, 2000)
    return (drawn @ kinds).reshape(-1, k, k), n_prompts


def _kappa(tables: Float[np.ndarray, "... k k"]) -> Float[np.ndarray, ...]:
    shares = tables / tables.sum(axis=(-2, -1), keepdims=True)
    chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return (np.trace(shares, axis1=-2, axis2=-1) - chance) / (1 - chance)
