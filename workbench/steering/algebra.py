"""Calculate with steering vectors: multiples, sums, differences and a table of their cosines.

``v * 2``, ``v + w``, ``v - w`` and ``-v`` are these functions. Only vectors that were measured at
one site of one model share units, so that only those are added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from workbench.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd


def multiplied(vector: SteeringVector, factor: float) -> SteeringVector:
    """Multiply a steering vector by a number.

    What was measured around it stays: rows, span, and the norm of the residual stream. A factor
    below 0 turns it, so that it points from safe to unsafe; its ``method`` says so, and where the
    safe side lies is then not known.

    Args:
        vector: Any steering vector.
        factor: A finite number.

    Raises:
        ValueError: If the factor is no finite number.
    """
    if not math.isfinite(factor):
        raise ValueError(f"a vector is multiplied by a finite number, got {factor!r}.")
    return replace(
        vector,
        vector=(vector.vector.double() * factor).float(),
        method=vector.method if factor == 1 else f"{factor:g} * ({vector.method})",
        safe_projection=vector.safe_projection if factor > 0 else math.nan,
    )


def added(first: SteeringVector, second: SteeringVector, factor: float = 1.0) -> SteeringVector:
    """Add ``factor * second`` to a steering vector of the same site and model.

    The result counts the rows of both (twice those that they share), was fitted on the prompts of
    both, and is of both categories.

    Args:
        first: A steering vector, in units of the residual stream.
        second: What is added to it.
        factor: How much of it; -1 subtracts.

    Raises:
        ValueError: If sites or models differ: the units of the two would not be the same.
    """
    _check_one_model((first, second))
    if first.site != second.site:
        raise ValueError(
            f"vectors at {first.site} and {second.site} cannot be added: each belongs to its own "
            "site; give both to generate, as two interventions."
        )
    sign = "-" if factor < 0 else "+"
    share = "" if abs(factor) == 1 else f"{abs(factor):g} * "
    norms = [norm for norm in (first.site_norm, second.site_norm) if not math.isnan(norm)]
    return replace(
        first,
        vector=(first.vector.double() + factor * second.vector.double()).float(),
        category=_both(first.category, second.category, f" {sign} "),
        method=f"({first.method}) {sign} {share}({second.method})",
        span=_both(first.span, second.span, ", "),
        kept=min(first.kept, second.kept),
        n_unsafe=first.n_unsafe + second.n_unsafe,
        n_safe=first.n_safe + second.n_safe,
        site_norm=sum(norms) / len(norms) if norms else math.nan,
        fitted_on=first.fitted_on | second.fitted_on,
        asked_as=first.asked_as if first.asked_as == second.asked_as else "",
        safe_projection=math.nan,
    )


def cosine_table(
    vectors: Mapping[str, SteeringVector] | Sequence[SteeringVector], *, across_sites: bool = False
) -> pd.DataFrame:
    """Compare steering vectors of one model by their cosines, each with each.

    Random vectors of width d have cosines of about ``1 / sqrt(d)``: .04 where d is 576.

    Args:
        vectors: Vectors by name, or in a list; one of a list is named after its category and its
            method, and its site where these differ.
        across_sites: Whether vectors of several sites may be compared. All layers share one
            residual stream, but a cosine between two of them also shows how it turns.

    Returns:
        A square table of cosines from -1 to 1; nan beside a vector that is zero.

    Raises:
        ValueError: If there are none, two have one name, models differ, or sites do.
    """
    named = _named(vectors)
    rows = list(named.values())
    _check_one_model(rows)
    sites = sorted({vector.site for vector in rows})
    if len(sites) > 1 and not across_sites:
        raise ValueError(
            f"the vectors are of {len(sites)} sites ({', '.join(map(str, sites[:4]))}); give those "
            "of one, or pass across_sites=True."
        )
    import pandas as pd

    stacked = torch.stack([vector.vector.double() for vector in rows])
    units = stacked / stacked.norm(dim=1, keepdim=True)
    cosines = (units @ units.T).clamp(-1, 1)
    return pd.DataFrame(cosines.numpy(), index=list(named), columns=list(named))


def is_number(value: Any) -> bool:
    """Tell whether something is a number that a vector can be multiplied by."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _named(
    vectors: Mapping[str, SteeringVector] | Sequence[SteeringVector],
) -> dict[str, SteeringVector]:
    """Give vectors their names in a table, each one its own."""
    if not vectors:
        raise ValueError("nothing to compare: give at least one steering vector.")
    if isinstance(vectors, Mapping):
        return {str(name): vector for name, vector in vectors.items()}
    has_sites = len({vector.site for vector in vectors}) > 1
    names = [
        f"{vector.category}, {vector.method}" + (f", {vector.site}" if has_sites else "")
        for vector in vectors
    ]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"two vectors are called {repeated[0]!r}; give a dictionary of names to vectors."
        )
    return dict(zip(names, vectors, strict=True))


def _check_one_model(vectors: Sequence[SteeringVector]) -> None:
    """Raise where vectors were measured on several models."""
    models = {vector.model.fingerprint: vector.model for vector in vectors}
    if len(models) > 1:
        names = ", ".join(f"{m.name!r} ({m.dtype}, {m.fingerprint})" for m in models.values())
        raise ValueError(
            f"the vectors were measured on different models: {names}; only those of one model "
            "share a residual stream."
        )


def _both(first: str, second: str, joined_by: str) -> str:
    return first if first == second else f"{first}{joined_by}{second}"
