"""Vectors made of others: summed, pooled over categories, one category's own part, without what lies in other directions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from workbench.steering.vectors import SteeringVector, scaled_to

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    pass


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
    made = replace(first, vector=total, fitted_on=_all_prompts(vectors))
    return replace(scaled_to(made, norm), method=methods)


def pooled(vectors: Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Each category's vector replaced by the mean of all categories' unit directions, at the category's norm: less noise, nothing of its own.

    Raises:
        ValueError: If there are none.
    """
    if not vectors:
        raise ValueError("nothing to pool: give at least one steering vector.")
    mean = torch.stack([v.direction.double() for v in vectors.values()]).mean(dim=0).float()
    seen = _all_prompts(list(vectors.values()))
    return {
        category: replace(
            scaled_to(replace(own, vector=mean), own.norm),
            method=f"{own.method}_pooled",
            fitted_on=seen,
        )
        for category, own in vectors.items()
    }


def own_part(vectors: Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Each category's vector minus the mean of the others' at the same site: what is the category's own.

    Raises:
        ValueError: If there is only one category.
    """
    seen = _all_prompts(list(vectors.values()))
    if len(vectors) < 2:
        raise ValueError(
            "a category's own part needs another category to compare with, got one vector."
        )
    return {
        category: replace(
            own,
            vector=own.vector
            - torch.stack([v.vector for c, v in vectors.items() if c != category]).mean(dim=0),
            method=f"{own.method}, own part",
            fitted_on=seen,
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
            raise ValueError(
                f"a direction at {other.site} cannot be taken out of a vector at {vector.site}."
            )
    basis, _ = torch.linalg.qr(torch.stack([v.direction.double() for v in removed], dim=1))
    left = vector.vector.double() - basis @ (basis.T @ vector.vector.double())
    if left.norm() <= 1e-6 * vector.vector.double().norm():
        raise ValueError(
            f"nothing is left of the vector of {vector.category!r}: it lies in the directions taken out."
        )
    names = ", ".join(dict.fromkeys(v.method for v in removed))
    return replace(vector, vector=left.float(), method=f"{vector.method} without {names}")


def _all_prompts(vectors: Sequence[SteeringVector]) -> frozenset[str]:
    return frozenset().union(*(vector.fitted_on for vector in vectors))
