"""The paper's settings, each usable alone: places, strengths, and how prompts are contrasted.

``RunConfig`` says what each setting means, docs/paper.md what the paper does. A run that gives none
of them is this project's own.

Source: SafeSteer (Ghosh et al. 2025, arXiv:2506.04250).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from workbench.models.activations import cache_activations
from workbench.models.sites import Site, check_sites
from workbench.prompts.contrasts import SafeSide, sides_to_fit
from workbench.prompts.prompt import Prompt, categories_of
from workbench.safesteer.constructions import CONSTRUCTIONS, Measured, settings_to_try
from workbench.safesteer.settings import (
    SPREAD,
    Setting,
    Vectors,
    placements,
    raw_grid,
    variants_of,
)
from workbench.steering.from_texts import MID_DEPTH
from workbench.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from workbench.judges.base import Judge
    from workbench.models.hooked_model import HookedModel
    from workbench.safesteer.config import RunConfig
    from workbench.steering.interventions import Positions


def places_of(
    config: RunConfig, model: HookedModel, among: Container[Site] | None = None
) -> list[tuple[Site, ...]]:
    """List the places where a run adds vectors: each asked layer alone, and all of them together.

    Where only a kind of site is asked for, the layers are those at which residual vectors are added
    by default; where only layers are, it is the residual stream there.

    Args:
        config: Settings of the run.
        model: A hooked model.
        among: Sites that can be used, for instance those measured; None for all the model has.

    Raises:
        ValueError: If the model has no such layer, or no such site there.
    """
    if config.site is None and config.layers is None:
        return placements(model, among)
    n = model.cfg.n_layers
    if config.layers is None:
        layers = sorted({int(share * n) for share in SPREAD})
        alone = [int(MID_DEPTH * n)]
    else:
        layers = alone = sorted({_layer(x, n) for x in config.layers})
    kind = config.site or "resid_post"
    together = tuple(Site(layer, kind) for layer in layers)
    places = [*((Site(layer, kind),) for layer in alone), together]
    check_sites(model, [site for place in places for site in place])
    if among is not None:
        places = [tuple(site for site in place if site in among) for place in places]
    return list(dict.fromkeys(place for place in places if place))


def _layer(number_or_share: float, n_layers: int) -> int:
    """Find a layer by its number, or by its share of the depth (14/32 is layer 14 of 32)."""
    if isinstance(number_or_share, int):
        return number_or_share
    return min(n_layers - 1, round(number_or_share * n_layers))


def settings_of(
    config: RunConfig,
    vectors: Vectors,
    names: Sequence[str],
    places: Sequence[tuple[Site, ...]],
    *,
    own_rhos: bool = True,
    extents: Sequence[tuple[Positions, int | None]] = (("all", None),),
) -> list[Setting]:
    """Combine constructions and places with the strengths of a run, relative or raw.

    Relative strengths are tried with the signs of each construction, raw multiples with their own.
    A spectral edit has no multiples: it is tried at its own shares of the way beside those. Each is
    tried in the ways of applying vectors that the run compares.

    Args:
        config: Settings of the run.
        vectors: Vectors of every construction and site.
        names: Names of constructions that have vectors.
        places: Each a site or several.
        own_rhos: Whether a construction that names strengths of its own is tried at these instead
            of the run's relative strengths.
        extents: Pairs of positions and ``until`` (see ``steering.Intervention``).
    """
    how: dict[str, Any] = {"extents": extents, "variants": ways_of(config)}
    if config.multipliers is None:
        return settings_to_try(names, places, config.rhos or (), own_rhos=own_rhos, **how)
    raw = raw_grid(vectors, names, places, config.multipliers, **how)
    edits = [name for name in names if name in CONSTRUCTIONS and CONSTRUCTIONS[name].is_edit]
    return [*raw, *settings_to_try(edits, places, (), **how)]


def ways_of(config: RunConfig) -> list[dict[str, Any]]:
    """Look up the fields of the ways of applying vectors that a run compares, for ``grid``."""
    return variants_of(config.applied, config.applied_tokens, longest=config.max_new_tokens)


def side_of_prompts(config: RunConfig) -> SafeSide:
    """Say what a run's contrast of prompts has on its safe side."""
    return cast("SafeSide", config.safe_side or "generic")


def check_contrast_of(config: RunConfig, fit: Sequence[Prompt]) -> None:
    """Check before a model is loaded that the fit fold has what the contrast of prompts needs.

    Raises:
        ValueError: If a category has no pairs, responses are missing, or pairs that are to be told
            apart by the question have the same one.
    """
    side, span = side_of_prompts(config), config.span or "content"
    is_filtered = config.refusal_filter not in (None, "none")
    for category in categories_of(fit):
        unsafe, safe = ([fit[i] for i in rows] for rows in sides_to_fit(fit, category, side))
        if not safe:
            raise ValueError(
                f"safe_side {side} needs safe prompts, and category {category!r} has none"
                f"{' that share a pair_id with its unsafe ones' if side == 'paired' else ''}; "
                "take the other side, or other categories."
            )
        for setting, rows in (
            ("span response", [*unsafe, *safe] if span == "response" else []),
            (f"refusal_filter {config.refusal_filter}", safe if is_filtered else []),
        ):
            without = sum(not prompt.response for prompt in rows)
            if without:
                raise ValueError(
                    f"{setting} needs prompts with responses: {without} of {len(rows)} that "
                    f"{category!r} is fitted on have none; take prompts that have them "
                    "(beavertails, a column response), or another setting."
                )
        is_same = side == "paired" and all(
            (a.text, a.history) == (b.text, b.history) for a, b in zip(unsafe, safe, strict=True)
        )
        if is_same and span != "response":
            raise ValueError(
                f"the pairs of {category!r} differ in their responses alone, and span {span} reads "
                "none of them; take span response."
            )


def contrasted(
    config: RunConfig,
    model: HookedModel,
    fit: Sequence[Prompt],
    measured: Measured,
    refusal_judge: Judge,
    **keywords: Any,
) -> Measured:
    """Measure prompts of the fit fold over the span, and on the safe side, that a run asks for.

    Separability, neurons and gate stay with the user's words of all prompts.

    Args:
        config: Settings of the run.
        model: What ``measured`` was measured on.
        fit: Prompts of the fit fold.
        measured: From ``measure``.
        refusal_judge: Says which responses are refusals, where those are kept or dropped.
        keywords: Of ``cache_activations``: store, progress, system_prompt, template_keywords.

    Raises:
        ValueError: If the refusal filter leaves a category without a safe side.
    """
    rows = _kept_rows(config, fit, refusal_judge)
    sites = list(measured.answers["openings"])
    if config.span in (None, "content"):
        sets = {site: measured.prompts[site].of(rows) for site in sites}
    else:
        if config.span == "response":
            rows = [prompt for prompt in rows if prompt.response]
        sets = cache_activations(model, rows, sites, span=config.span, **keywords)
    how: dict[str, Any] = {
        "safe_side": side_of_prompts(config),
        "pruning": config.pruning or "none",
        "seed": config.seed,
    }
    if config.keep is not None:
        how["keep"] = config.keep
    return measured._replace(contrasted=sets, how=how)


def _kept_rows(config: RunConfig, fit: Sequence[Prompt], judge: Judge) -> list[Prompt]:
    """Leave out the safe prompts that the refusal filter is against, by their response."""
    if config.refusal_filter in (None, "none"):
        return list(fit)
    answered = [prompt for prompt in fit if prompt.label != "unsafe" and prompt.response]
    verdicts = judge([p.text for p in answered], [str(p.response) for p in answered])
    refusals = {p.id for p, said in zip(answered, verdicts, strict=True) if said.label == "refusal"}
    wanted = refusals if config.refusal_filter == "keep" else {p.id for p in answered} - refusals
    kept = [prompt for prompt in fit if prompt.label == "unsafe" or prompt.id in wanted]
    side = side_of_prompts(config)
    for category in categories_of(fit):
        before, after = ({rows[i].id for i in sides_to_fit(rows, category, side)[1]}
                         for rows in (fit, kept))  # fmt: skip
        if not after or not after <= before:
            raise ValueError(
                f"refusal_filter {config.refusal_filter} leaves no safe prompts for {category!r}: "
                f"{len(before & refusals)} of {len(before)} responses are refusals; take another "
                "filter or other prompts."
            )
    return kept


def at_norms_of(measured: Measured, vectors: Vectors, fit: Sequence[Prompt]) -> Vectors:
    """Make relative strengths of transferred vectors relative to the model they steer.

    A spectral edit's strength is the share of its way, and stays.

    Args:
        measured: Of that model.
        vectors: Vectors of another model.
        fit: Prompts of the fit fold.
    """
    norm_at = {
        layer: measured.prompts[Site(layer, "resid_post")].of(fit).mean_norm()
        for layer in {site.layer for _, site in vectors}
    }
    return {
        (name, site): {
            category: replace(fitted, site_norm=norm_at[site.layer])
            if isinstance(fitted, SteeringVector)
            else fitted
            for category, fitted in by_category.items()
        }
        for (name, site), by_category in vectors.items()
    }
