"""Make steering vectors out of others: sums, pools, own parts and what others leave.

Where the safe side lies along a new direction is not known from the old ones, so that the result
has no ``safe_projection``; ``vectors.with_safe_projection`` measures it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from workbench.steering.vectors import SteeringVector, scaled_to

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def summed(
    vectors: Sequence[SteeringVector], weights: Sequence[float] | None = None
) -> SteeringVector:
    """Add up the unit directions of several constructions, at the mean of their norms.

    Args:
        vectors: Measured at one site for one category on one model.
        weights: Weight of each direction; equal ones by default.

    Raises:
        ValueError: If there are none, sites, categories or models differ, or there is not one
            weight for each.
    """
    if not vectors:
        raise ValueError("nothing to sum: give at least one steering vector.")
    if weights is not None and len(weights) != len(vectors):
        raise ValueError(f"a sum of {len(vectors)} vectors needs as many weights, got {weights!r}.")
    first = vectors[0]
    for other in vectors[1:]:
        if (other.site, other.category, other.model.fingerprint) != (
            first.site,
            first.category,
            first.model.fingerprint,
        ):
            raise ValueError(
                f"only vectors of one site, category and model can be summed, got {first!r} and "
                f"{other!r}."
            )
    shares = torch.tensor(weights or [1.0] * len(vectors), dtype=torch.float64)
    total = (shares[:, None] * torch.stack([v.direction.double() for v in vectors])).sum(0).float()
    norm = sum(v.norm for v in vectors) / len(vectors)
    methods = "+".join(dict.fromkeys(v.method for v in vectors))
    summed_vector = replace(
        first, vector=total, fitted_on=_all_prompts(vectors), safe_projection=math.nan
    )
    return replace(scaled_to(summed_vector, norm), method=methods)


def pooled(vectors: Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Replace each category's direction by the mean of all unit directions, at its norm.

    Such a vector has less noise, and nothing of the category's own.

    Raises:
        ValueError: If there are none.
    """
    if not vectors:
        raise ValueError("nothing to pool: give at least one steering vector.")
    mean = torch.stack([v.direction.double() for v in vectors.values()]).mean(dim=0).float()
    fitted_on = _all_prompts(list(vectors.values()))
    return {
        category: replace(
            scaled_to(replace(vector, vector=mean), vector.norm),
            method=f"{vector.method}_pooled",
            fitted_on=fitted_on,
            safe_projection=math.nan,
        )
        for category, vector in vectors.items()
    }


def own_part(vectors: Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Subtract from each category's vector the mean of the other categories' vectors.

    Raises:
        ValueError: If there is only one category.
    """
    if len(vectors) < 2:
        raise ValueError(
            "a category's own part needs another category to compare with, "
            f"got {len(vectors)} vector(s)."
        )
    fitted_on = _all_prompts(list(vectors.values()))
    own_parts = {}
    for category, vector in vectors.items():
        others = torch.stack([v.vector for c, v in vectors.items() if c != category])
        own_parts[category] = replace(
            vector,
            vector=vector.vector - others.mean(dim=0),
            method=f"{vector.method}, own part",
            fitted_on=fitted_on,
            safe_projection=math.nan,
        )
    return own_parts


def without(vector: SteeringVector, removed: Sequence[SteeringVector]) -> SteeringVector:
    """Take other directions out of a vector, for instance the refusal direction.

    The result is orthogonal to them, at the norm that is left.

    Args:
        vector: What they are taken out of.
        removed: Directions taken out, all of them together (Gram-Schmidt by QR).

    Raises:
        ValueError: If sites differ, or nothing is left.
    """
    for other in removed:
        if other.site != vector.site:
            raise ValueError(
                f"a direction at {other.site} cannot be taken out of a vector at {vector.site}; "
                "give vectors of one site."
            )
    basis, _ = torch.linalg.qr(torch.stack([v.direction.double() for v in removed], dim=1))
    left = vector.vector.double() - basis @ (basis.T @ vector.vector.double())
    if left.norm() <= 1e-6 * vector.vector.double().norm():
        raise ValueError(
            f"nothing is left of the vector of {vector.category!r}: it lies in the directions "
            "taken out."
        )
    names = ", ".join(dict.fromkeys(v.method for v in removed))
    return replace(
        vector,
        vector=left.float(),
        method=f"{vector.method} without {names}",
        safe_projection=math.nan,
    )


def _all_prompts(vectors: Sequence[SteeringVector]) -> frozenset[str]:
    return frozenset().union(*(vector.fitted_on for vector in vectors))
