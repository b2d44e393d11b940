"""Exchange activations with TransformerLens: an ``ActivationCache`` comes in or goes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from workbench.models.activations import ActivationSet
from workbench.models.errors import CannotBeDone
from workbench.models.load import activation_cache, model_info
from workbench.models.site_names import as_sites
from workbench.models.templates import Keywords, asked_as, asked_by
from workbench.models.tokens import SPANS, encode
from workbench.prompts.forms import as_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.models.site_names import SitesLike
    from workbench.models.sites import Site
    from workbench.models.tokens import Encoded
    from workbench.prompts.forms import PromptsLike


def activations_from_cache(
    cache: Mapping[str, Tensor],
    model: HookedModel,
    prompts: PromptsLike,
    *,
    span: str | Bool[Tensor, "prompt pos"],
    tokens: Int[Tensor, "prompt pos"] | None = None,
    sites: SitesLike | None = None,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
) -> dict[Site, ActivationSet]:
    """Pool an ``ActivationCache`` of TransformerLens, for whatever takes activations here.

    Args:
        cache: What ``run_with_cache`` gave, one row per prompt; a single prompt may have lost its
            batch dimension.
        model: What was run.
        prompts: What was run, row by row, with categories and labels.
        span: Which tokens are pooled: "content" (the user's words), "response", "last", "all", or
            a mask that is true at them, for texts that were not asked as ``encode`` asks.
        tokens: What the model was given, padded on either side; a named span needs it, to find
            each prompt in its row.
        sites: Which, by any name; by default all that the cache holds.
        system_prompt: Words of the system turn in ``tokens``.
        template_keywords: What else the chat template read.

    Raises:
        ValueError: If rows, tokens or mask do not fit the prompts, or a site is not in the cache.
    """
    prompts = as_prompts(prompts)
    keys = set(cache.keys())
    wanted = as_sites(model, keys.__contains__ if sites is None else sites)
    missing = [site for site in wanted if site.hook_name not in keys]
    if missing:
        raise ValueError(
            f"the cache has no {missing[0].hook_name}; run the model with "
            f"names_filter={missing[0].hook_name!r} among its names."
        )
    values = {site: _rows(cache[site.hook_name], site, cache, len(prompts)) for site in wanted}
    shape = next(iter(values.values())).shape[:2]
    asked = asked_as(system_prompt, template_keywords)
    if isinstance(span, str):
        encoded = encode(model, prompts, with_response=span == "response", **asked_by(asked))
        inside, name = _columns(encoded, span, tokens, shape), span
    else:
        inside, name = _checked_mask(span, shape), "mask"
    weights = inside.float() / inside.sum(dim=1, keepdim=True)
    info = model_info(model)
    return {
        site: ActivationSet(
            site,
            torch.bmm(weights[:, None], rows.flatten(2).float().cpu())[:, 0],
            tuple(prompts),
            name,
            info,
            asked,
        )
        for site, rows in values.items()
    }


def as_activation_cache(activations: Mapping[Site, ActivationSet], model: HookedModel) -> Any:
    """Make an ``ActivationCache`` of TransformerLens from pooled activations.

    It has one position per prompt, the pooled one: with span "last" that is the last token of the
    prompt, with another span a mean that no token has.

    Args:
        activations: Site to activations of the same prompts, from ``cache_activations``.
        model: What ran; the cache's own tools (logit lens, attributions) use its weights.

    Raises:
        ValueError: If the sets are of different prompts or of another model, or there are none.
    """
    sets = list(activations.values())
    if not sets:
        raise ValueError("give activations of one site at least.")
    fingerprint = model_info(model).fingerprint
    for one in sets:
        if (one.prompts, one.span) != (sets[0].prompts, sets[0].span):
            raise ValueError(
                f"a cache has the same prompts and span at all sites, got {one!r} and {sets[0]!r}."
            )
        if one.model.fingerprint != fingerprint:
            raise ValueError(f"{one!r} is not of this model; give the one that ran.")
    weight = next(p for p in model.parameters() if p.is_floating_point())
    values = {}
    for site, one in activations.items():
        rows = one.values[:, None].to(dtype=weight.dtype, device=weight.device)
        if site.kind == "z":
            rows = rows.unflatten(-1, (model.cfg.n_heads, -1))
        values[site.hook_name] = rows
    return activation_cache(values, model)


def _rows(held: Any, site: Site, cache: Any, n_prompts: int) -> Float[Tensor, "prompt pos ..."]:
    """Check what a cache holds of a site, and give it its batch dimension back."""
    if not isinstance(held, torch.Tensor):
        raise CannotBeDone(f"the cache holds no tensor at {site.hook_name}.")
    rows = held if getattr(cache, "has_batch_dim", True) else held[None]
    if rows.ndim != (4 if site.kind == "z" else 3) or len(rows) != n_prompts:
        raise ValueError(
            f"{site.hook_name} has shape {tuple(held.shape)} in the cache; it must have a row and "
            f"positions for each of the {n_prompts} prompts."
        )
    return rows


def _columns(
    encoded: Sequence[Encoded],
    span: str,
    tokens: Int[Tensor, "prompt pos"] | None,
    shape: Sequence[int],
) -> Bool[Tensor, "prompt pos"]:
    """Mark a span's columns, after a look for each prompt in the tokens that were run."""
    if span not in SPANS:
        raise ValueError(f"unknown span {span!r}; spans: {', '.join(SPANS)}, or a mask.")
    if tokens is None or tuple(tokens.shape) != tuple(shape):
        got = "none" if tokens is None else f"shape {tuple(tokens.shape)}"
        raise ValueError(
            f"span {span!r} needs tokens=, what the model was given, of shape {tuple(shape)}; got "
            f"{got}. Or give a mask as span."
        )
    inside = torch.zeros(tuple(shape), dtype=torch.bool)
    for place, (row, given) in enumerate(zip(encoded, tokens.tolist(), strict=True)):
        n, ids = len(row.ids), list(row.ids)
        starts = [start for start in (0, len(given) - n) if start >= 0]
        start = next((start for start in starts if given[start : start + n] == ids), None)
        if start is None:
            raise ValueError(
                f"row {place} of tokens is not prompt {row.prompt.id!r} as it is asked here (chat "
                "template, BOS, padding on one side); run the tokens of wb.models.encode, or give "
                "a mask as span."
            )
        first, end = row.span(span)
        inside[place, start + first : start + end] = True
    return inside


def _checked_mask(
    mask: Bool[Tensor, "prompt pos"], shape: Sequence[int]
) -> Bool[Tensor, "prompt pos"]:
    """Raise unless a mask marks a token in every row."""
    mask = torch.as_tensor(mask).cpu()
    if tuple(mask.shape) != tuple(shape) or mask.dtype != torch.bool or not mask.any(dim=1).all():
        raise ValueError(
            f"a mask as span must be bools of shape {tuple(shape)} with a token in every row, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
    return mask
