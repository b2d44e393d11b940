"""Measure products of two activations of one token, which pooled means cannot tell.

Three questions need such products: what a neuron writes behind an output norm (activation over the
norm's scale), whether a gated MLP's gate or its value changed, and from which tokens a head reads.
They are formed token by token inside a forward pass and pooled there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import einops
import torch

from workbench.models.activations import ActivationSet
from workbench.models.batches import (
    batches_by_length,
    in_given_order,
    pad,
    span_mask,
    widths_to_keep_apart,
)
from workbench.models.errors import CannotBeDone
from workbench.models.finite import not_finite
from workbench.models.forward import reading
from workbench.models.hooked_model import hook_points, input_device
from workbench.models.load import model_info
from workbench.models.sites import INNER_HOOK_NAMES, Site, check_sites
from workbench.models.templates import Keywords, asked_as, asked_by
from workbench.models.tokens import Encoded, encode, pad_id
from workbench.neurons.attribution import output_norm, unit_vector, write_weights, writing_sites
from workbench.prompts.forms import as_prompts
from workbench.steering.edits import at_least_float32

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt


ROLES = ("first", "before", "content", "after", "response")
"""Roles of the tokens a head reads from: the very first one (BOS, where attention rests), the
template before the user's words, those words, the template after them, and the response."""


@dataclass(frozen=True, eq=False)
class MlpGateSplit:
    """Hold contributions of a gated MLP's neurons by what changed: gate, value or both.

    A neuron of a gated MLP is gate x value, the gate being the activation function's output. A
    difference of mean products is exactly the gate's difference at average value, plus the value's
    difference at average gate, plus the difference of their covariances. (A steering gate, which
    switches an intervention on and off, is another thing.)

    Attributes:
        layers: Layer of each row.
        gate: From the difference of the mean gate.
        value: From the difference of the mean value.
        covariance: From the difference of their covariance over tokens and prompts.
    """

    layers: tuple[int, ...]
    gate: Float[Tensor, "layer neuron"]
    value: Float[Tensor, "layer neuron"]
    covariance: Float[Tensor, "layer neuron"]


def writing_activations(
    model: HookedModel,
    activations: Mapping[Site, ActivationSet],
    site: Site,
    *,
    system_prompt: str | None = None,
    batch_size: int = 16,
) -> dict[Site, ActivationSet]:
    """Collect the activations that an attribution at a site needs.

    They are the cached ones; where an output norm follows, a new pass divides them by its scale. It
    asks with the system prompt and template keywords of the cached ones, unless one is given.

    Raises:
        ValueError: If a site was not cached.
    """
    sites = [site, *writing_sites(model, site)]
    missing = [str(needed) for needed in sites if needed not in activations]
    if missing:
        raise ValueError(
            f"no activations at {missing[0]}; cache [site, *writing_sites(model, site)] for the "
            "same prompts."
        )
    collected = {needed: activations[needed] for needed in sites}
    normed = [needed for needed in sites if output_norm(model, needed) is not None]
    if normed:
        cached = activations[site]
        asked = asked_by(cached.asked_as)
        if system_prompt is not None:
            asked["system_prompt"] = system_prompt
        collected |= scaled_activations(
            model, cached.prompts, normed, span=cached.span, batch_size=batch_size, **asked
        )
    return collected


def scaled_activations(
    model: HookedModel,
    prompts: PromptsLike,
    sites: Sequence[Site],
    *,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 16,
) -> dict[Site, ActivationSet]:
    """Pool activations, each token's divided by the scale of the norm behind its sublayer.

    That is what a neuron really writes there. The scale differs from token to token, so it cannot
    be applied to a pooled mean. Sites without such a norm are pooled as they are.
    """
    prompts, readers = as_prompts(prompts), list[_Reader]()
    for site in sites:

        def finish(
            step: _Step, held: list[Tensor], scale: Tensor | None, name: str = str(site)
        ) -> None:
            step.pool(name, held[0], scale)

        readers += _together(model, site, (), finish)
    parts: dict[str, list[Tensor]] = {str(site): [] for site in sites}
    order: list[int] = []
    asked: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    for rows, pooled in _pooled(model, prompts, readers, span, asked, batch_size):
        order += rows
        for name, part in parts.items():
            part.append(pooled[name].float().cpu())
    info, results = model_info(model), {}
    for site in sites:
        values = in_given_order(torch.cat(parts.pop(str(site))), order)
        results[site] = ActivationSet(
            site, values, tuple(prompts), span, info, asked_as(system_prompt, template_keywords)
        )
    return results


def split_mlp_gate(
    model: HookedModel,
    unsafe: PromptsLike,
    reference: PromptsLike,
    direction: Float[Tensor, " d_model"],
    *,
    layers: Sequence[int] | None = None,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 16,
) -> MlpGateSplit:
    """Split the contributions of a gated MLP's neurons into gate, value and covariance.

    This runs the prompts once.

    Args:
        model: A model with gated MLPs (Llama, Qwen, Gemma, Mistral).
        unsafe: Prompts of a category.
        reference: What they are compared with.
        direction: As in ``direct_attribution``; the three parts add up to its neurons.
        layers: Which layers; all of them by default.
        span: Which tokens are pooled.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        batch_size: Rows per batch.

    Raises:
        CannotBeDone: If the MLPs are not gated.
    """
    layers = tuple(range(model.cfg.n_layers) if layers is None else layers)
    readers: list[_Reader] = []
    for layer in layers:
        readers += _mlp_gate_readers(model, layer)
    asked = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    means = _class_means(model, unsafe, reference, readers, span, asked, batch_size)
    u = unit_vector(direction)
    parts: list[list[Tensor]] = [[], [], []]
    for layer in layers:
        gate, value, product = (
            means[f"{Site(layer, 'mlp_post')} {name}"] for name in ("gate", "value", "product")
        )
        weights = write_weights(model, Site(layer, "mlp_post"), u)
        covariance = product - gate * value
        parts[0].append(weights * (gate[0] - gate[1]) * value.mean(dim=0))
        parts[1].append(weights * (value[0] - value[1]) * gate.mean(dim=0))
        parts[2].append(weights * (covariance[0] - covariance[1]))
    return MlpGateSplit(layers, *(torch.stack(part) for part in parts))


def head_sources(
    model: HookedModel,
    unsafe: PromptsLike,
    reference: PromptsLike,
    direction: Float[Tensor, " d_model"],
    *,
    layers: Sequence[int] | None = None,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 16,
) -> dict[str, Float[Tensor, "layer head"]]:
    """Split heads' contributions by the role of the token they read from (``ROLES``).

    This runs the prompts once. A head's output is its attention pattern times the values of the
    source tokens, so the split is exact: the roles add up to the head.

    Args:
        model: A hooked model.
        unsafe: Prompts of a category.
        reference: What they are compared with.
        direction: As in ``direct_attribution``.
        layers: Which layers; all of them by default.
        span: Which tokens are pooled (those that read).
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        batch_size: Rows per batch.

    Raises:
        CannotBeDone: If pattern times values is not what the heads write (gated attention).
    """
    layers = tuple(range(model.cfg.n_layers) if layers is None else layers)
    readers: list[_Reader] = []
    for layer in layers:
        readers += _source_readers(model, layer)
    asked = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    means = _class_means(model, unsafe, reference, readers, span, asked, batch_size)
    u = unit_vector(direction)
    per_layer = []
    for layer in layers:
        mean_unsafe, mean_reference = means[str(Site(layer, "z"))]
        difference = (mean_unsafe - mean_reference).view(len(ROLES), -1)
        written = write_weights(model, Site(layer, "z"), u) * difference
        per_layer.append(
            einops.reduce(written, "role (head d) -> role head", "sum", head=model.cfg.n_heads)
        )
    return dict(zip(ROLES, torch.stack(per_layer, dim=1), strict=True))


@dataclass(eq=False)
class _Step:
    """One batch of a pass: what readers share.

    Activations wait in ``held`` until the last one they are needed with has come.
    """

    weights: Float[Tensor, "batch pos"]  # share of each token in its row's mean
    roles: Float[Tensor, "batch pos role"]
    held: dict[str, Tensor] = field(default_factory=dict)
    pooled: dict[str, Tensor] = field(default_factory=dict)

    def pool(self, name: str, activation: Tensor, scale: Tensor | None = None) -> None:
        """Keep the mean over the span's tokens, each divided by its scale, under a name."""
        weights = self.weights.to(activation.device)
        weights = weights if scale is None else weights / scale
        self.pooled[name] = torch.bmm(weights[:, None], activation.flatten(2).double())[:, 0]


_Reader = tuple[str, Callable[["Tensor", _Step], None]]
"""Name of a hook point, and what is done with the activation there."""


_Finish = Callable[[_Step, "list[Tensor]", "Tensor | None"], None]
"""What is done once all activations of a group are there; the last is the output norm's scale."""


def _mlp_gate_readers(model: HookedModel, layer: int) -> list[_Reader]:
    """Make readers that pool gate, value and product of a gated MLP's neurons."""
    site, mlp = Site(layer, "mlp_post"), model.blocks[layer].mlp
    names = [INNER_HOOK_NAMES[name].format(layer=layer) for name in ("mlp_gate", "mlp_value")]
    activation_function = getattr(mlp, "act_fn", None) or getattr(
        getattr(mlp, "original_component", None), "act_fn", None
    )
    if names[1] not in hook_points(model) or activation_function is None:
        raise CannotBeDone(
            f"the MLP of layer {layer} shows no gate and value to split its neurons into: it is "
            "not gated, or fused."
        )

    def finish(step: _Step, held: list[Tensor], scale: Tensor | None) -> None:
        gate, value, product = activation_function(held[0]), held[1], held[2]
        if not _alike(gate * value, product, product.dtype):
            raise CannotBeDone(
                f"the neurons at {site} are not their gate times their value; this MLP cannot be "
                "split."
            )
        step.pool(f"{site} gate", gate)
        step.pool(f"{site} value", value, scale)
        step.pool(f"{site} product", product, scale)

    return _together(model, site, names, finish)


def _source_readers(model: HookedModel, layer: int) -> list[_Reader]:
    """Make readers that pool what heads read, split by the role of the source token."""
    site = Site(layer, "z")
    names = [INNER_HOOK_NAMES[name].format(layer=layer) for name in ("v", "pattern")]

    def finish(step: _Step, held: list[Tensor], scale: Tensor | None) -> None:
        values, pattern, z = held
        weights = step.weights.to(pattern.device)
        weights = weights if scale is None else weights / scale
        wide = at_least_float32(pattern)  # a mean over tokens in 16 bit would lose some of them
        attended = einops.einsum(
            weights.to(wide.dtype), wide, "row to, row head to source -> row head source"
        ).double()
        # heads that read one key-value head's values
        shared = pattern.shape[1] // values.shape[2]
        values = einops.repeat(values, "row pos kv d -> row pos (kv shared) d", shared=shared)
        by_role = einops.einsum(
            attended,
            step.roles.to(pattern.device),
            values.double(),
            "row head source, row source role, row source head d -> row role head d",
        ).flatten(2)
        step.pool(str(site), z, scale)
        whole = step.pooled[str(site)]
        if not _alike(by_role.sum(dim=1), whole, z.dtype):
            raise CannotBeDone(
                f"the heads at {site} do not write their pattern times values (gated attention); "
                "no split by source."
            )
        step.pooled[str(site)] = by_role.flatten(1)

    return _together(model, site, names, finish)


def _alike(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether two ways to compute the same agree, as far as a dtype lets them.

    In float32 that is to 1e-4 of the largest value; 16 bit round each token's product and sum, by
    half an epsilon each.
    """
    rounding = max(1e-4, 2 * torch.finfo(dtype).eps)
    return torch.allclose(
        first.double(), second.double(), rtol=1e-2, atol=rounding * float(second.abs().max())
    )


def _together(
    model: HookedModel, site: Site, others: Sequence[str], finish: _Finish
) -> list[_Reader]:
    """Make readers that call ``finish`` once all activations of a group have come.

    It gets the other activations in their order, the site's own, and the scale of the site's output
    norm (None without one).
    """
    check_sites(model, [site])
    norm = output_norm(model, site)
    names = [*others, site.hook_name, *([norm] if norm else [])]
    present = hook_points(model)
    for name in names:
        if name not in present:
            raise CannotBeDone(
                f"layer {site.layer} does not compute {name}, which this split needs."
            )

    def reader(name: str) -> Callable[[Tensor, _Step], None]:
        def read(activation: Tensor, step: _Step) -> None:
            step.held[name] = activation
            if all(needed in step.held for needed in names):
                held = [step.held.pop(needed) for needed in names]
                scale = held.pop()[..., 0].double() if norm else None
                finish(step, held, scale)

        return read

    return [(name, reader(name)) for name in names]


def _pooled(
    model: HookedModel,
    prompts: Sequence[Prompt],
    readers: Sequence[_Reader],
    span: str,
    asked: Mapping[str, Any],
    batch_size: int,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Run the prompts in batches; yield each one's row numbers and what was pooled (float64)."""
    encoded = encode(model, prompts, with_response=span == "response", **asked)
    device, step = input_device(model), _Step(torch.empty(0), torch.empty(0))

    def reader(read: Callable[[Tensor, _Step], None]) -> Callable[[Tensor], None]:
        return lambda activation: read(activation, step)

    with torch.no_grad(), reading(model, [(name, reader(read)) for name, read in readers]) as run:
        lengths = [len(row.ids) for row in encoded]
        alike = widths_to_keep_apart(model, lengths, "right")
        for places in batches_by_length(lengths, batch_size, alike=alike):
            rows = [encoded[i] for i in places]
            batch = pad(rows, pad_id=pad_id(model), side="right", device=device)
            inside = span_mask(rows, batch, span).double()
            step.weights, step.pooled = inside / inside.sum(dim=1, keepdim=True), {}
            step.roles = torch.stack([_roles(row, batch.tokens.shape[1]) for row in rows]).to(
                device
            )
            run(batch.tokens, batch.mask)
            if not all(bool(values.isfinite().all()) for values in step.pooled.values()):
                break
            yield places, step.pooled
        else:
            return
    # Outside ``reading``, which ends every pass at its last site.
    finite = [values.flatten(1).isfinite().all(dim=1) for values in step.pooled.values()]
    row = int((~torch.stack(finite).all(dim=0)).nonzero()[0])
    raise not_finite(model, rows[row].prompt.id, batch.tokens, batch.mask, row)


def _class_means(
    model: HookedModel,
    unsafe: PromptsLike,
    reference: PromptsLike,
    readers: Sequence[_Reader],
    span: str,
    asked: Mapping[str, Any],
    batch_size: int,
) -> dict[str, Float[Tensor, "class d"]]:
    """Average what the readers pool over unsafe (row 0) and over reference prompts (row 1)."""
    unsafe, reference = as_prompts(unsafe), as_prompts(reference)
    if not unsafe or not reference:
        raise ValueError(
            f"both classes need prompts, got {len(unsafe)} unsafe and {len(reference)} reference "
            "ones."
        )
    shares = torch.zeros(2, len(unsafe) + len(reference), dtype=torch.float64)
    shares[0, : len(unsafe)], shares[1, len(unsafe) :] = 1 / len(unsafe), 1 / len(reference)
    means: dict[str, Tensor] = {}
    for rows, pooled in _pooled(model, [*unsafe, *reference], readers, span, asked, batch_size):
        for name, values in pooled.items():
            means[name] = means.get(name, 0) + shares[:, rows] @ values.cpu()
    return means


def _roles(row: Encoded, width: int) -> Float[Tensor, "pos role"]:
    """Mark each token's role, one-hot; padding counts as response, as nobody attends to it."""
    role = torch.full((width,), ROLES.index("response"))
    (start, stop), end = row.content, row.response[0]
    role[:end], role[:stop], role[:start], role[0] = (
        ROLES.index(name) for name in ("after", "content", "before", "first")
    )
    return torch.nn.functional.one_hot(role, len(ROLES)).double()
