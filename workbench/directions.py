"""Directions from two sets of activations: the field's other ways beside a difference of means, and what to take out of a vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from workbench.vectors import SteeringVector, scaled_to

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def principal_direction(
    unsafe: Float[Tensor, "pair d"], safe: Float[Tensor, "pair d"], *, seed: int = 0
) -> Float[Tensor, " d"]:
    """First principal component of paired differences whose signs were mixed, turned from unsafe to safe, at unit norm.

    Args:
        unsafe: Activations, residual-stream units; row i belongs to row i of ``safe``.
        safe: Activations at the same site and span.
        seed: Of the signs.

    Raises:
        ValueError: If the sets do not pair up or hold fewer than two pairs.

    Source: representation reading of RepE (Zou et al. 2023, arXiv:2310.01405).
    """
    if unsafe.shape != safe.shape or len(unsafe) < 2:
        raise ValueError(
            f"principal_direction needs two pairs or more, row by row, got {len(unsafe)} and {len(safe)} rows."
        )
    differences = safe.double() - unsafe.double()
    signs = torch.randint(0, 2, (len(differences), 1), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    mixed = signs * differences
    _, _, rows = torch.linalg.svd(mixed - mixed.mean(dim=0), full_matrices=False)
    direction = rows[0]
    toward_safe = (differences @ direction).mean() >= 0
    return (direction if toward_safe else -direction).float()


def probe_direction(
    unsafe: Float[Tensor, "unsafe d"], safe: Float[Tensor, "safe d"], *, penalty: float = 1.0
) -> Float[Tensor, " d"]:
    """Normal of a logistic regression that tells safe from unsafe rows, at unit norm, from unsafe to safe.

    Args:
        unsafe: Activations, residual-stream units.
        safe: Activations at the same site and span.
        penalty: Weight of the squared norm, on standardised activations.

    Raises:
        ValueError: If a side is empty.
    """
    from sklearn.linear_model import LogisticRegression

    if len(unsafe) == 0 or len(safe) == 0:
        raise ValueError(f"both sides need rows, got {len(unsafe)} unsafe and {len(safe)} safe.")
    values = torch.cat([unsafe, safe]).double()
    scale = values.std(dim=0).clamp(min=1e-8)
    probe = LogisticRegression(C=1 / penalty, max_iter=2000)
    probe.fit(((values - values.mean(dim=0)) / scale).numpy(), [0] * len(unsafe) + [1] * len(safe))
    direction = torch.from_numpy(probe.coef_[0]) / scale
    return (direction / direction.norm()).float()


def summed(vectors: Sequence[SteeringVector]) -> SteeringVector:
    """Sum of unit directions measured at one site for one category, at the mean of their norms: two constructions in one vector.

    Raises:
        ValueError: If there are none, or sites, categories or models differ.
    """
    if not vectors:
        raise ValueError("nothing to sum: give at least one steering vector.")
    first = vectors[0]
    for other in vectors[1:]:
        if (other.site, other.category, other.model.fingerprint) != (
            first.site,
            first.category,
            first.model.fingerprint,
        ):
            raise ValueError(
                f"only vectors of one site, category and model can be summed, got {first!r} and {other!r}."
            )
    total = torch.stack([v.direction.double() for v in vectors]).sum(dim=0).float()
    norm = sum(v.norm for v in vectors) / len(vectors)
    methods = "+".join(dict.fromkeys(v.method for v in vectors))
    return replace(scaled_to(replace(first, vector=total), norm), method=methods)


def pooled(vectors: Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Each category's vector replaced by the mean of all categories' unit directions, at the category's norm: less noise, nothing of its own.

    Raises:
        ValueError: If there are none.
    """
    if not vectors:
        raise ValueError("nothing to pool: give at least one steering vector.")
    mean = torch.stack([v.direction.double() for v in vectors.values()]).mean(dim=0).float()
    return {
        category: replace(scaled_to(replace(own, vector=mean), own.norm), method=f"{own.method}_pooled")
        for category, own in vectors.items()
    }


def own_part(vectors: Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Each category's vector minus the mean of the others' at the same site: what is the category's own.

    Raises:
        ValueError: If there is only one category.
    """
    if len(vectors) < 2:
        raise ValueError("a category's own part needs another category to compare with, got one vector.")
    return {
        category: replace(
            own,
            vector=own.vector - torch.stack([v.vector for c, v in vectors.items() if c != category]).mean(dim=0),
            method=f"{own.method}, own part",
        )
        for category, own in vectors.items()
    }


def without(vector: SteeringVector, removed: Sequence[SteeringVector]) -> SteeringVector:
    """The vector orthogonal to others' directions, for instance the refusal direction, at the norm that is left.

    Args:
        vector: What is kept.
        removed: Directions taken out, all of them together (Gram-Schmidt by QR).

    Raises:
        ValueError: If sites differ, or nothing is left.
    """
    for other in removed:
        if other.site != vector.site:
            raise ValueError(f"a direction at {other.site} cannot be taken out of a vector at {vector.site}.")
    basis, _ = torch.linalg.qr(torch.stack([v.direction.double() for v in removed], dim=1))
    left = vector.vector.double() - basis @ (basis.T @ vector.vector.double())
    if left.norm() <= 1e-6 * vector.vector.double().norm():
        raise ValueError(f"nothing is left of the vector of {vector.category!r}: it lies in the directions taken out.")
    names = ", ".join(dict.fromkeys(v.method for v in removed))
    return replace(vector, vector=left.float(), method=f"{vector.method} without {names}")
