"""Contrasts: which rows of two folds are compared, and how they are halved and resampled. What can be wrong with folds is found here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from workbench.files.hints import did_you_mean
from workbench.models.load import model_info
from workbench.neurons.attribution import (
    Attribution,
    class_difference,
    direct_attribution,
    writing_sites,
)
from workbench.neurons.splits import writing_activations
from workbench.prompts.contrasts import Sides, sides_of
from workbench.prompts.prompt import categories_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.load import HookedModel
    from workbench.models.sites import Site


Reference = Literal["twins", "neutral"]


Weights = tuple["Float[Tensor, 'draw unsafe']", "Float[Tensor, 'draw reference']"]


@dataclass(frozen=True, eq=False)
class AttributedFolds:
    """Two folds, checked, and the attribution of each category: what every table starts from.

    Attributes:
        site: Residual site of the directions.
        categories: Those attributed.
        residual: Fit fold at the site: what directions come from.
        written: Held-out fold at the site and at everything that writes to it, over the scale of output norms where there are any.
        fit: Rows compared, by category, in the fit fold.
        held_out: The same in the held-out fold.
        attributions: Direction of the fit fold, difference of the held-out one, by category.
    """

    site: Site
    categories: list[str]
    residual: ActivationSet
    written: dict[Site, ActivationSet]
    fit: dict[str, Sides]
    held_out: dict[str, Sides]
    attributions: dict[str, Attribution]


def attribute_folds(
    model: HookedModel,
    fit: Mapping[Site, ActivationSet],
    held_out: Mapping[Site, ActivationSet],
    site: Site,
    categories: Iterable[str] | None,
    reference: Reference,
    system_prompt: str | None,
) -> AttributedFolds:
    """Check two folds and attribute each category's direction; arguments and errors are those of ``neurons.attribute_neurons``."""
    if reference not in get_args(Reference):
        raise ValueError(
            f"unknown reference {reference!r}; allowed: {', '.join(get_args(Reference))}."
        )
    writing_sites(model, site)
    info = model_info(model)
    for name, fold in (("fit", fit), ("held-out", held_out)):
        if site not in fold:
            raise ValueError(
                f"no activations at {site} in the {name} fold; cache [site, *writing_sites(model, site)] in both."
            )
        for own in fold.values():
            if own.model.fingerprint != info.fingerprint:
                raise ValueError(
                    f"the {name} activations at {own.site} are of {own.model.name!r}, not of this model {info.name!r}."
                )
            if own.prompts != fold[site].prompts or own.span != fit[site].span:
                raise ValueError(
                    f"the {name} activations at {own.site} are of other prompts or another span than those at {site}."
                )
    residual, held = fit[site], held_out[site]
    seen = {prompt.id for prompt in residual.prompts} | {prompt.text for prompt in residual.prompts}
    twice = [prompt.id for prompt in held.prompts if prompt.id in seen or prompt.text in seen]
    if twice:
        raise ValueError(
            f"the folds overlap: prompt {twice[0]!r} is in both ({len(twice)} in all); split them with split_prompts."
        )
    known = [
        category
        for category in categories_of(residual.prompts)
        if category in categories_of(held.prompts)
    ]
    chosen = known if categories is None else list(categories)
    for category in chosen:
        if category not in known:
            raise ValueError(
                f"no unsafe prompts of category {category!r} in both folds; categories: {', '.join(known)}.{did_you_mean(category, known)}"
            )
    sides: list[dict[str, Sides]] = []
    for name, prompts in (("fit", residual.prompts), ("held-out", held.prompts)):
        sides.append({category: sides_of(prompts, category, reference) for category in chosen})
        for category, rows in sides[-1].items():
            if min(len(rows.unsafe), len(rows.reference)) < 2:
                raise ValueError(
                    f"category {category!r} has {len(rows.unsafe)} unsafe prompts and {len(rows.reference)} {reference} in the {name} fold; "
                    "at least two of each are needed, better twenty."
                )
    if not chosen:
        raise ValueError("no category has unsafe prompts in both folds.")
    written = writing_activations(model, held_out, site, system_prompt=system_prompt)
    attributions = {}
    for category in chosen:
        first, second = sides[0][category], sides[1][category]
        u = residual.values[first.unsafe].double().mean(dim=0) - residual.values[
            first.reference
        ].double().mean(dim=0)
        unsafe, safe = (
            [held.prompts[i] for i in side] for side in (second.unsafe, second.reference)
        )
        attributions[category] = direct_attribution(
            model, site, u, class_difference(written, unsafe, safe)
        )
    return AttributedFolds(site, chosen, residual, written, sides[0], sides[1], attributions)


def halves(sides: Sides, rng: np.random.Generator) -> Weights:
    """Weights of two disjoint halves of both sides; pairs stay together."""

    def split(n: int, order: Int[np.ndarray, " n"]) -> Tensor:
        inside = np.zeros((2, n), dtype=np.float32)
        for half in (0, 1):
            inside[half, order[half::2]] = 1
        return torch.from_numpy(inside / inside.sum(axis=1, keepdims=True))

    unsafe, reference = (rng.permutation(len(rows)) for rows in (sides.unsafe, sides.reference))
    return split(len(unsafe), unsafe), split(len(reference), unsafe if sides.paired else reference)


def resamples(sides: Sides, n_resamples: int, rng: np.random.Generator) -> Weights:
    """Weights of bootstrap samples of both sides; pairs are drawn together."""

    def draw(n: int) -> Tensor:
        return torch.from_numpy(
            (rng.multinomial(n, np.full(n, 1 / n), n_resamples) / n).astype(np.float32)
        )

    unsafe = draw(len(sides.unsafe))
    return unsafe, unsafe if sides.paired else draw(len(sides.reference))
