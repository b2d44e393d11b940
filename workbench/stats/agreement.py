"""How well yes/no verdicts agree with each other or with the truth: accuracy, precision, recall and Cohen's kappa."""

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
    """How well yes/no verdicts match the truth, over ``n`` prompts with both and without ``n_unscored`` that lack one.

    Attributes:
        accuracy: Share of scored prompts where they are equal.
        precision: Share of the predicted True that are True; its unscored are of unknown truth.
        recall: Share of the True that were predicted; its unscored got no verdict.
        kappa: Cohen's kappa: 1 for full agreement, 0 for what chance gives.
    """

    accuracy: Rate
    precision: Rate
    recall: Rate
    kappa: Estimate
    n: int
    n_unscored: int

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries of plain numbers."""
        return asdict(self)


def cohen_kappa(
    a: Iterable[Hashable], b: Iterable[Hashable], *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Cohen's kappa (1960) of two raters, with a bootstrap interval (2000 draws): agreement beyond label frequencies.

    nan where both give one and the same label throughout, with the interval (-1, 1). At full agreement the interval has
    width 0: read the accuracy's there.

    Args:
        a: Labels of one rater, of any kind, None where unscored.
        b: Labels of the other, in the same order.
        level: Confidence level.
        seed: Seed of the resampling.

    Raises:
        ValueError: If nothing was given or lengths differ.
    """
    check_level(level)
    first, second = list(a), list(b)
    if len(first) != len(second) or not first:
        raise ValueError(
            f"raters need a label each for the same prompts, got {len(first)} and {len(second)}."
        )
    rows = [
        row for row in zip(first, second, strict=True) if not any(x is None or x != x for x in row)
    ]
    n, codes = (
        len(rows),
        {label: code for code, label in enumerate(dict.fromkeys(x for row in rows for x in row))},
    )
    k = len(codes)
    cells = np.bincount([codes[x] * k + codes[y] for x, y in rows], minlength=k * k)
    value, low, high = math.nan, -1.0, 1.0
    if k > 1:
        value = float(_kappa(cells.reshape(k, k)))
        # to resample prompts is to draw the cells of the table from a multinomial
        samples = _kappa(
            np.random.default_rng(seed).multinomial(n, cells / n, 2000).reshape(-1, k, k)
        )
        low, high = bootstrap_interval(samples[~np.isnan(samples)], n, level=level)
    return Estimate(value, max(low, -1.0), min(high, 1.0), n, len(first) - n)


def agreement(
    predicted: Outcomes, truth: Outcomes, *, level: float = 0.95, seed: int = 0
) -> Agreement:
    """Agreement of yes/no verdicts with the truth: accuracy, precision, recall (Wilson) and kappa (bootstrap).

    Args:
        predicted: Verdicts, None where the judge gave none, one a prompt.
        truth: Reference labels in the same order, None where unknown.
        level: Confidence level.
        seed: Seed of the resampling for kappa.

    Raises:
        ValueError: If nothing was given, lengths differ, or an outcome is not True, False or None.
    """
    verdicts, facts = (
        to_floats(predicted, "predicted", yes_no=True),
        to_floats(truth, "truth", yes_no=True),
    )
    kappa = cohen_kappa(verdicts, facts, level=level, seed=seed)
    equal = np.where(np.isnan(verdicts + facts), np.nan, verdicts == facts)
    right, found = rate(facts[verdicts == 1], level=level), rate(verdicts[facts == 1], level=level)
    return Agreement(rate(equal, level=level), right, found, kappa, kappa.n, kappa.n_unscored)


def _kappa(tables: Float[np.ndarray, "... k k"]) -> Float[np.ndarray, ...]:
    shares = tables / tables.sum(axis=(-2, -1), keepdims=True)
    chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return (np.trace(shares, axis1=-2, axis2=-1) - chance) / (1 - chance)
