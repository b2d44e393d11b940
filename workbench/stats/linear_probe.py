"""Fit linear probes: logistic regression on standardised values.

Weights are given back in the units of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MAX_STEPS = 2000
"""Steps after which the optimiser gives up; the fits of this project take far fewer."""


class LinearProbe(NamedTuple):
    """A fitted probe: scores are ``values @ weights.T + bias``, in log-odds.

    With two classes there is one row, the log-odds of the second class against the first.
    With more classes there is one row per class, and a softmax over them gives probabilities.
    """

    classes: tuple[str, ...]
    weights: Float[Tensor, "row d"]
    bias: Float[Tensor, " row"]


def fit_linear_probe(
    values: Float[Tensor, "n d"],
    labels: Sequence[str],
    *,
    penalty: float = 1.0,
    balanced: bool = False,
    in_row_space: bool = False,
) -> LinearProbe:
    """Fit a logistic regression on standardised values and return it in their own units.

    Args:
        values: One row per example. They are standardised in float64, feature by feature.
        labels: Class of each row; at least two classes.
        penalty: Weight of the squared norm of the standardised weights.
        balanced: Give every class the same total weight, however many rows it has.
        in_row_space: Look for the weights among sums of rows, where they are anyhow: the same probe
            but for rounding, much faster where there are many more features than rows.

    Returns:
        Weights and bias in float64, classes in sorted order.

    Raises:
        ValueError: If the numbers of rows and labels differ, or there is only one class.
    """
    from sklearn.linear_model import LogisticRegression

    if len(values) != len(labels) or len(set(labels)) < 2:
        raise ValueError(
            f"a linear probe needs one label per row and at least two classes, "
            f"got {len(values)} rows, {len(labels)} labels and {len(set(labels))} classes."
        )
    rows = values.double()
    mean, scale = rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-8)
    model = LogisticRegression(
        C=1 / penalty, max_iter=MAX_STEPS, class_weight="balanced" if balanced else None
    )
    standardised = (rows - mean) / scale
    basis = _row_basis(standardised) if in_row_space else None
    features = standardised if basis is None else standardised @ basis
    model.fit(features.numpy(), list(labels))
    weights = torch.from_numpy(model.coef_)
    weights = (weights if basis is None else weights @ basis.T) / scale
    bias = torch.from_numpy(model.intercept_) - weights @ mean
    return LinearProbe(tuple(str(c) for c in model.classes_), weights, bias)


def _row_basis(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d rank"]:
    """Compute an orthonormal basis of the space that rows span, from their Gram matrix."""
    squares, left = torch.linalg.eigh(rows @ rows.T)
    kept = squares > 1e-10 * squares[-1]
    return rows.T @ left[:, kept] / squares[kept].sqrt()
