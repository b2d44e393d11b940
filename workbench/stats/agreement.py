"""Measure how well verdicts agree with each other or with the truth.

The measures are accuracy, precision, recall and Cohen's kappa.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.stats.estimates import (
    Estimate,
    Outcomes,
    Rate,
    bootstrap_interval,
    check_level,
    rate,
    to_floats,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from jaxtyping import Float


@dataclass(frozen=True)
class Agreement:
    """Hold how well yes/no verdicts match the truth.

    Attributes:
        accuracy: Share of scored prompts where verdict and truth are equal.
        precision: Share of True among the prompts predicted True; those of unknown truth are its
            unscored ones.
        recall: Share of prompts predicted True among those that are True; those without a verdict
            are its unscored ones.
        kappa: Cohen's kappa: 1 for full agreement, 0 for what chance gives.
        n: Prompts with both a verdict and a truth.
        n_unscored: Prompts that lack one of them.
    """

    accuracy: Rate
    precision: Rate
    recall: Rate
    kappa: Estimate
    n: int
    n_unscored: int

    def to_dict(self) -> dict[str, Any]:
        """Turn it into nested dictionaries of plain numbers."""
        return asdict(self)


def cohen_kappa(
    a: Iterable[Hashable], b: Iterable[Hashable], *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Compute Cohen's kappa (1960) of two raters, with a bootstrap interval of 2000 draws.

    Kappa is the agreement beyond what the frequencies of the labels give. It is nan, with the
    interval (-1, 1), where both raters give one and the same label throughout. At full agreement
    its interval has width 0; read that of the accuracy there. ``cohen_kappa_score`` of scikit-learn
    gives the same value, but no interval.

    Args:
        a: Labels of one rater, of any kind, None where unscored.
        b: Labels of the other rater, in the same order.
        level: Confidence level.
        seed: Seed of the resampling.

    Raises:
        ValueError: If nothing was given or lengths differ.
    """
    check_level(level)
    first, second = list(a), list(b)
    if len(first) != len(second) or not first:
        raise ValueError(
            "raters need one label each for the same prompts, at least one, "
            f"got {len(first)} and {len(second)}."
        )
    # cross-tabulate the pairs that both raters labelled
    pairs = [
        pair
        for pair in zip(first, second, strict=True)
        if not any(label is None or label != label for label in pair)
    ]
    labels = dict.fromkeys(label for pair in pairs for label in pair)
    codes = {label: code for code, label in enumerate(labels)}
    n, k = len(pairs), len(codes)
    cells = np.bincount([codes[x] * k + codes[y] for x, y in pairs], minlength=k * k)
    value, low, high = math.nan, -1.0, 1.0
    if k > 1:
        value = float(_kappa(cells.reshape(k, k)))
        # to resample prompts is to draw the cells of the table from a multinomial
        tables = np.random.default_rng(seed).multinomial(n, cells / n, 2000).reshape(-1, k, k)
        samples = _kappa(tables)
        low, high = bootstrap_interval(samples[~np.isnan(samples)], n, level=level)
    return Estimate(value, max(low, -1.0), min(high, 1.0), n, len(first) - n)


def measure_agreement(
    predicted: Outcomes, truth: Outcomes, *, level: float = 0.95, seed: int = 0
) -> Agreement:
    """Measure how well yes/no verdicts match the truth.

    The intervals of accuracy, precision and recall are Wilson's, that of kappa is a bootstrap one.

    Args:
        predicted: Verdicts, one per prompt, None where the judge gave none.
        truth: Reference labels in the same order, None where unknown.
        level: Confidence level.
        seed: Seed of the resampling for kappa.

    Raises:
        ValueError: If nothing was given, lengths differ, or an outcome is not True, False or None.
    """
    verdicts = to_floats(predicted, "predicted", yes_no=True)
    facts = to_floats(truth, "truth", yes_no=True)
    kappa = cohen_kappa(verdicts, facts, level=level, seed=seed)
    is_equal = np.where(np.isnan(verdicts + facts), np.nan, verdicts == facts)
    return Agreement(
        accuracy=rate(is_equal, level=level),
        precision=rate(facts[verdicts == 1], level=level),
        recall=rate(verdicts[facts == 1], level=level),
        kappa=kappa,
        n=kappa.n,
        n_unscored=kappa.n_unscored,
    )


def _kappa(tables: Float[np.ndarray, "... k k"]) -> Float[np.ndarray, ...]:
    shares = tables / tables.sum(axis=(-2, -1), keepdims=True)
    chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return (np.trace(shares, axis1=-2, axis2=-1) - chance) / (1 - chance)
