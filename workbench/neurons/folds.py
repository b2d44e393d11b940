"""Check two folds, attribute each category's direction, and resample the contrasts.

Directions come from the fit fold and differences from the held-out one. What can be wrong with a
pair of folds is found here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from workbench.files.hints import did_you_mean
from workbench.models.errors import CannotBeDone
from workbench.models.load import model_info
from workbench.neurons.attribution import (
    Attribution,
    class_difference,
    direct_attribution,
    writing_sites,
)
from workbench.neurons.splits import writing_activations
from workbench.prompts.contrasts import Sides, sides_of
from workbench.prompts.prompt import Prompt, categories_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel
    from workbench.models.sites import Site


Reference = Literal["twins", "neutral"]


Weights = tuple["Float[Tensor, 'draw unsafe']", "Float[Tensor, 'draw reference']"]


@dataclass(frozen=True, eq=False)
class AttributedFolds:
    """Hold two checked folds and each category's attribution: what every table starts from.

    Attributes:
        site: Residual site of the directions.
        categories: Those attributed.
        residual: Fit fold at the site: what directions come from.
        written: Held-out fold at the site and at everything that writes to it, divided by the
            scale of output norms where there are any.
        fit: Rows compared in the fit fold, per category.
        held_out: The same in the held-out fold.
        attributions: Direction of the fit fold, difference of the held-out one, per category.
    """

    site: Site
    categories: list[str]
    residual: ActivationSet
    written: dict[Site, ActivationSet]
    fit: dict[str, Sides]
    held_out: dict[str, Sides]
    attributions: dict[str, Attribution]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Prompts of the held-out fold."""
        return self.written[self.site].prompts


def attribute_folds(
    model: HookedModel,
    fit: Mapping[Site, ActivationSet],
    held_out: Mapping[Site, ActivationSet],
    site: Site,
    categories: Iterable[str] | None,
    reference: Reference,
    system_prompt: str | None,
) -> AttributedFolds:
    """Check two folds and attribute each category's direction.

    Arguments and errors are those of ``ranking.attribute_neurons``.
    """
    if reference not in get_args(Reference):
        raise ValueError(
            f"unknown reference {reference!r}; allowed: {', '.join(get_args(Reference))}."
        )
    writing_sites(model, site)
    _check_folds(model, fit, held_out, site)
    residual, held = fit[site], held_out[site]
    names = _shared_categories(residual.prompts, held.prompts, categories)
    fit_sides = _sides_by_category(residual.prompts, names, reference, "fit")
    held_sides = _sides_by_category(held.prompts, names, reference, "held-out")
    if not names:
        raise ValueError("no category has unsafe prompts in both folds.")
    written = writing_activations(model, held_out, site, system_prompt=system_prompt)
    attributions = {}
    for category in names:
        fit_rows, held_rows = fit_sides[category], held_sides[category]
        u = residual.mean(fit_rows.unsafe.tolist()) - residual.mean(fit_rows.reference.tolist())
        unsafe, safe = (
            [held.prompts[i] for i in side] for side in (held_rows.unsafe, held_rows.reference)
        )
        attributions[category] = direct_attribution(
            model, site, u, class_difference(written, unsafe, safe)
        )
    return AttributedFolds(site, names, residual, written, fit_sides, held_sides, attributions)


def _check_folds(
    model: HookedModel,
    fit: Mapping[Site, ActivationSet],
    held_out: Mapping[Site, ActivationSet],
    site: Site,
) -> None:
    """Raise unless both folds are of this model, whole at the site, and disjoint."""
    info = model_info(model)
    for name, fold in (("fit", fit), ("held-out", held_out)):
        if site not in fold:
            raise ValueError(
                f"no activations at {site} in the {name} fold; "
                "cache [site, *writing_sites(model, site)] in both."
            )
        for cached in fold.values():
            if cached.model.fingerprint != info.fingerprint:
                raise ValueError(
                    f"the {name} activations at {cached.site} are of {cached.model.name!r}, "
                    f"not of this model {info.name!r}."
                )
            if cached.prompts != fold[site].prompts or cached.span != fit[site].span:
                raise ValueError(
                    f"the {name} activations at {cached.site} are of other prompts or another "
                    f"span than those at {site}."
                )
    fit_prompts, held_prompts = fit[site].prompts, held_out[site].prompts
    seen: set[object] = {prompt.id for prompt in fit_prompts}
    seen |= {(prompt.text, prompt.history) for prompt in fit_prompts}
    twice = [p.id for p in held_prompts if p.id in seen or (p.text, p.history) in seen]
    if twice:
        raise ValueError(
            f"the folds overlap: prompt {twice[0]!r} is in both ({len(twice)} in all); "
            "split them with split_prompts."
        )


def _shared_categories(
    fit: Sequence[Prompt], held_out: Sequence[Prompt], categories: Iterable[str] | None
) -> list[str]:
    """List the categories asked for, or all; raise if one is not in both folds."""
    known = [category for category in categories_of(fit) if category in categories_of(held_out)]
    names = known if categories is None else list(categories)
    for category in names:
        if category not in known:
            raise ValueError(
                f"no unsafe prompts of category {category!r} in both folds; "
                f"categories: {', '.join(known)}.{did_you_mean(category, known)}"
            )
    return names


def _sides_by_category(
    prompts: Sequence[Prompt], categories: Iterable[str], reference: Reference, fold: str
) -> dict[str, Sides]:
    """Collect both sides of each category's contrast; raise if one has fewer than two prompts."""
    sides = {category: sides_of(prompts, category, reference) for category in categories}
    for category, rows in sides.items():
        if min(len(rows.unsafe), len(rows.reference)) < 2:
            raise CannotBeDone(
                f"category {category!r} has {len(rows.unsafe)} unsafe prompts and "
                f"{len(rows.reference)} {reference} in the {fold} fold; "
                "at least two of each are needed, better twenty."
            )
    return sides


def halves(sides: Sides, rng: np.random.Generator) -> Weights:
    """Weight the rows of both sides for two disjoint random halves; pairs stay together."""

    def split(n: int, order: Int[np.ndarray, " n"]) -> Tensor:
        inside = np.zeros((2, n), dtype=np.float32)
        for half in (0, 1):
            inside[half, order[half::2]] = 1
        return torch.from_numpy(inside / inside.sum(axis=1, keepdims=True))

    unsafe, reference = (rng.permutation(len(rows)) for rows in (sides.unsafe, sides.reference))
    return split(len(unsafe), unsafe), split(len(reference), unsafe if sides.paired else reference)


def resamples(sides: Sides, n_resamples: int, rng: np.random.Generator) -> Weights:
    """Weight the rows of both sides for bootstrap samples; pairs are drawn together."""

    def draw(n: int) -> Tensor:
        return torch.from_numpy(
            (rng.multinomial(n, np.full(n, 1 / n), n_resamples) / n).astype(np.float32)
        )

    unsafe = draw(len(sides.unsafe))
    return unsafe, unsafe if sides.paired else draw(len(sides.reference))
