"""Say where a model's numbers leave what its dtype can hold.

An infinite or undefined number anywhere makes every later one undefined. Nothing fails by itself:
the likeliest token becomes the first of the vocabulary, and an answer is empty. So whoever reads
logits or activations looks whether they are finite, and raises what this module finds out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workbench.models.forward import KeyValueCache, reading
from workbench.models.hooked_model import hook_points
from workbench.models.sites import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel


def not_finite(
    model: HookedModel,
    prompt_id: str,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"],
    row: int,
    *,
    cache: KeyValueCache | None = None,
    is_steered: bool = False,
) -> ValueError:
    """Run a batch again, with the hooks that are set, and make the error that says where it began.

    Args:
        model: A hooked model.
        prompt_id: The prompt it happened with.
        tokens: The batch's tokens behind what the cache holds.
        mask: True at real tokens, for cached and new columns.
        row: The prompt's row in the batch.
        cache: What the rows begin with; it is extended.
        is_steered: Whether interventions act on the model.
    """
    layer = first_layer_not_finite(model, tokens, mask, row, cache=cache)
    place = "the logits" if layer is None else f"layer {layer}"
    dtype = next(iter(model.parameters())).dtype
    name = str(dtype).removeprefix("torch.")
    advice = "its weights may be damaged"
    if dtype.is_floating_point:
        name += f", which ends at {torch.finfo(dtype).max:.3g}"
    if dtype == torch.float16:
        advice = "load the model in float32 or bfloat16"
    if is_steered:
        advice = f"steer less strongly, or {advice}" if dtype == torch.float16 else "steer less"
    return ValueError(
        f"prompt {prompt_id!r}: numbers are infinite or undefined from {place} on (in {name}); "
        f"{advice}."
    )


def first_layer_not_finite(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"],
    row: int,
    *,
    cache: KeyValueCache | None = None,
) -> int | None:
    """Find the first layer whose output is not finite at a real token of a row; None without one.

    Arguments are those of ``not_finite``.
    """
    sites = [Site(layer, "resid_post") for layer in range(model.cfg.n_layers)]
    present = hook_points(model)
    sites = [site for site in sites if site.hook_name in present]
    is_real = mask[row, -tokens.shape[1] :]
    found: list[int] = []

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            if not bool(activation[row, is_real].isfinite().all()):
                found.append(site.layer)

        return read

    if not sites:
        return None
    with torch.no_grad(), reading(model, [(s.hook_name, reader(s)) for s in sites]) as run:
        run(tokens, mask, cache)
    return min(found, default=None)


def check_finite(
    model: HookedModel,
    values: Float[Tensor, "row ..."],
    prompt_ids: Sequence[str],
    tokens: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row past_and_pos"],
    *,
    cache: Callable[[], KeyValueCache | None] = lambda: None,
    is_steered: bool = False,
) -> None:
    """Raise where a row's values are not finite, naming its prompt and the first layer.

    Args:
        model: A hooked model, with the hooks that were set.
        values: What was computed of each row.
        prompt_ids: The rows' prompts.
        tokens: See ``not_finite``.
        mask: See ``not_finite``.
        cache: Makes the cache that the rows began with.
        is_steered: See ``not_finite``.

    Raises:
        ValueError: If a value is infinite or undefined.
    """
    finite = values.flatten(1).isfinite().all(dim=1)
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0])
    raise not_finite(
        model, prompt_ids[row], tokens, mask, row, cache=cache(), is_steered=is_steered
    )
