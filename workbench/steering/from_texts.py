"""Fit one steering vector from two lists of texts, without folds, labels or categories."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.models.activations import cache_activations
from workbench.models.sites import Site
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import OTHER, Prompt
from workbench.steering.vectors import SteeringVector, fit_steering_vectors

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords
    from workbench.prompts.forms import PromptsLike


MID_DEPTH = 0.5
"""Where a vector is fitted and added by default, as a share of depth."""


def steering_vector(
    model: HookedModel,
    unsafe: PromptsLike,
    safe: PromptsLike,
    *,
    layer: int | None = None,
    category: str = OTHER,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 32,
) -> SteeringVector:
    """Fit a steering vector from unsafe and safe texts: the difference of their mean activations.

    It points from the unsafe texts to the safe ones and is fitted on all of them: measure what it
    does on others. For folds, categories, pairs and other estimators there are
    ``cache_activations`` and ``fit_steering_vectors``.

    Args:
        model: A hooked model.
        unsafe: What to steer away from: texts, or any other form that ``as_prompts`` reads.
        safe: What to steer to. The more alike the two lists are in all else, the less else the
            vector holds.
        layer: Layer whose output is read and steered; by default the one at half depth.
        category: Name of the vector in results.
        span: Which tokens are read, see ``cache_activations``; "response" where both sides have
            answers.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        batch_size: Largest number of rows per batch.

    Returns:
        The vector, for ``add_vector``.

    Raises:
        ValueError: If a side is empty, a text is on both sides, or the model has no such layer.
    """
    sides = {"unsafe": as_prompts(unsafe), "safe": as_prompts(safe)}
    for name, prompts in sides.items():
        if not prompts:
            raise ValueError(f"no {name} texts: a steering vector is a difference of two sides.")
    said = {_words(prompt) for prompt in sides["unsafe"]}
    both = next((p for p in sides["safe"] if _words(p) in said), None)
    if both is not None:
        raise ValueError(f"{both.text!r:.60} is among the unsafe and the safe texts; take it out.")
    rows = [
        replace(
            prompt, id=f"{label}/{prompt.id}", label=label, category=category, more_categories=()
        )
        for label, prompts in sides.items()
        for prompt in prompts
    ]
    site = Site(int(MID_DEPTH * model.cfg.n_layers) if layer is None else layer, "resid_post")
    asked: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    activations = cache_activations(model, rows, site, span=span, batch_size=batch_size, **asked)
    [vector] = fit_steering_vectors(activations[site], categories=[category]).values()
    return vector


def _words(prompt: Prompt) -> tuple[object, ...]:
    return prompt.text, prompt.response, prompt.history
