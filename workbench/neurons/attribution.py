"""Direct attribution: the exact split of a residual-stream difference into the embedding, every head and every neuron.

The residual stream is a sum, so its projection on a direction is one too: what a neuron adds to <u, mean unsafe - mean reference> is
<W_out[n], u> times the difference of its own mean activation, and likewise for heads. No gradient, no activation token by token: pooled
means are enough, and the parts add up to the whole, which is checked each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.load import model_info
from workbench.models.sites import Site, check_sites

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.load import HookedModel
    from workbench.prompts.prompt import Prompt


RESIDUAL_STREAM = ("resid_pre", "resid_mid", "resid_post")
"""Kinds of site whose value is the sum of all that was written before: those a direction can be attributed at."""


TOLERANCE = 1e-5
"""Error allowed in the sum of the parts, as a share of the sum of their absolute values."""


_OUTPUT_NORMS = {"z": "ln1_post", "mlp_post": "ln2_post"}


_EMBEDDING = Site(0, "resid_pre")


@dataclass(frozen=True, eq=False)
class Attribution:
    """The parts of <direction, mean unsafe - mean reference> at a residual site, in residual-stream units along the direction.

    Attributes:
        site: Where the difference was measured.
        direction: Unit direction.
        total: The projected difference itself.
        embedding: What the embedding adds (with learned positions, where the model has them).
        heads: What each head of the layers below adds.
        neurons: What each neuron of the layers below adds.
    """

    site: Site
    direction: Float[Tensor, " d_model"]
    total: float
    embedding: float
    heads: Float[Tensor, "layer head"]
    neurons: Float[Tensor, "layer neuron"]

    def __repr__(self) -> str:
        heads, neurons = float(self.heads.sum()), float(self.neurons.sum())
        return (
            f"Attribution({self.site}, total={self.total:.4g}: embedding {self.embedding:.3g}, {self.heads.numel()} heads {heads:.3g}, "
            f"{self.neurons.numel()} neurons {neurons:.3g}, error={self.error:.1g})"
        )

    @property
    def absolute(self) -> float:
        """Sum of the absolute values of all parts: what shares and errors are shares of."""
        return abs(self.embedding) + float(self.heads.abs().sum()) + float(self.neurons.abs().sum())

    @property
    def error(self) -> float:
        """What the parts miss of the total, as a share of ``absolute``."""
        missing = abs(
            self.total - self.embedding - float(self.heads.sum()) - float(self.neurons.sum())
        )
        return missing / self.absolute if self.absolute else missing


def writing_sites(model: HookedModel, site: Site) -> list[Site]:
    """Where everything that the residual stream at a site is the sum of can be read: embedding, heads (z), neurons (mlp_post).

    What ``cache_activations`` must be given, beside the site itself, for an attribution there.

    Raises:
        ValueError: If the site is not in the residual stream, or the model does not compute what is needed.
    """
    if site.kind not in RESIDUAL_STREAM:
        raise ValueError(
            f"cannot attribute a direction at {site}: no neuron writes there directly; "
            f"measure it in the residual stream instead, for instance at {Site(site.layer, 'resid_post')}."
        )
    n_attention = site.layer + (site.kind != "resid_pre")
    n_mlp = site.layer + (site.kind == "resid_post")
    sites = [
        _EMBEDDING,
        *(Site(layer, "z") for layer in range(n_attention)),
        *(Site(layer, "mlp_post") for layer in range(n_mlp)),
    ]
    check_sites(model, [site, *sites])
    return sites


def output_norm(model: HookedModel, site: Site) -> str | None:
    """Hook name of the scale of the norm behind a sublayer's output (Gemma-2, Gemma-3, OLMo-2), or None where there is none.

    Told by the block's structure. With such a norm a neuron writes its activation divided by the token's scale.
    """
    norm = _OUTPUT_NORMS.get(site.kind)
    if norm is None or getattr(model.blocks[site.layer], norm, None) is None:
        return None
    return f"blocks.{site.layer}.{norm}.hook_scale"


def write_matrix(model: HookedModel, site: Site) -> Float[Tensor, "d d_model"]:
    """What one unit of each activation at a site adds to the residual stream: W_out for mlp_post, W_O for z, a row each.

    Behind an output norm the rows hold the norm's weight, and activations are meant divided by its scale (see attribution_passes.py).

    Raises:
        ValueError: If the layer has no such single matrix.
    """
    block = model.blocks[site.layer]
    try:
        matrix = block.mlp.W_out if site.kind == "mlp_post" else block.attn.W_O.flatten(0, 1)
    except AttributeError as error:
        what = "neurons" if site.kind == "mlp_post" else "heads"
        raise ValueError(
            f"layer {site.layer} has no single output matrix of its {what} (mixture of experts or a hybrid block)."
        ) from error
    if matrix.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"the output matrix at {site} has shape {tuple(matrix.shape)}, not (..., {model.cfg.d_model})."
        )
    if output_norm(model, site) is not None:
        matrix = matrix * _norm_weight(getattr(block, _OUTPUT_NORMS[site.kind]), matrix)
    # Granite multiplies what a sublayer adds by a constant
    return matrix.detach() * float(getattr(block, "residual_contribution_scale", 1.0))


def write_weights(
    model: HookedModel, site: Site, directions: Float[Tensor, "... d_model"]
) -> Float[Tensor, "... d"]:
    """How far one unit of each activation at a site moves the residual stream along directions: <W_out[n], u>."""
    if site == _EMBEDDING:
        return directions
    return (
        directions
        @ write_matrix(model, site).to(device=directions.device, dtype=directions.dtype).T
    )


def class_difference(
    activations: Mapping[Site, ActivationSet], unsafe: Sequence[Prompt], reference: Sequence[Prompt]
) -> dict[Site, Float[Tensor, " d"]]:
    """Mean over unsafe prompts minus mean over reference prompts at each site, float64."""
    return {
        site: own.of(unsafe).values.double().mean(dim=0)
        - own.of(reference).values.double().mean(dim=0)
        for site, own in activations.items()
    }


def direct_attribution(
    model: HookedModel,
    site: Site,
    direction: Float[Tensor, " d_model"],
    difference: Mapping[Site, Float[Tensor, " d"]],
    *,
    tolerance: float = TOLERANCE,
) -> Attribution:
    """Split a projected difference into the embedding, every head and every neuron.

    Args:
        model: What the difference was measured on.
        site: Residual site of the difference.
        direction: Any vector; it is brought to unit norm. From other prompts than the difference, or the total is positive by construction.
        difference: Mean unsafe minus mean reference activation at the site and at all ``writing_sites`` (``class_difference``). Sites behind
            an output norm need activations divided by its scale: ``attribution_passes.writing_activations`` gives those.
        tolerance: Error allowed in the sum of the parts, as a share of the sum of their absolute values.

    Raises:
        ValueError: If a site is missing or the parts do not add up, with the likely reason.

    Source: direct attribution is linear algebra on the residual stream (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits).
    """
    sites = writing_sites(model, site)
    for needed in (site, *sites):
        if needed not in difference:
            raise ValueError(
                f"no activations at {needed}; cache [site, *writing_sites(model, site)] for the same prompts."
            )
    u = direction.double().cpu()
    if not u.norm() > 0:
        raise ValueError(
            "the direction is zero or not finite; give a mean difference or a steering vector's direction."
        )
    u = u / u.norm()
    parts = {own: write_weights(model, own, u) * difference[own].double() for own in sites}
    per_head = torch.zeros(0, model.cfg.n_heads, dtype=torch.float64)
    per_neuron = torch.zeros(0, model.cfg.d_mlp, dtype=torch.float64)
    heads = [parts[own].view(model.cfg.n_heads, -1).sum(dim=1) for own in sites if own.kind == "z"]
    neurons = [parts[own] for own in sites if own.kind == "mlp_post"]
    attribution = Attribution(
        site,
        u.float(),
        float(u @ difference[site].double()),
        float(parts[_EMBEDDING].sum()),
        torch.stack(heads) if heads else per_head,
        torch.stack(neurons) if neurons else per_neuron,
    )
    if not attribution.error <= tolerance:
        dtype = model_info(model).dtype
        reason = (
            f"the model runs in {dtype}, which rounds: load it in float32 or give a larger tolerance"
            if dtype != "float32"
            else "the activations are not all of the same prompts and tokens, or this architecture writes something to the residual stream that "
            "is neither head nor neuron (experts, per-layer embeddings, a bias before an output norm)"
        )
        raise ValueError(
            f"attribution at {site} is not complete: the parts miss {attribution.error:.1e} of their absolute sum, allowed {tolerance:.0e}; {reason}."
        )
    return attribution


def _norm_weight(norm: Any, like: Tensor) -> Float[Tensor, " d_model"]:
    """Weight of an RMS norm, however its family stores it: what it makes of a constant vector.

    Raises:
        ValueError: If it is no such norm.
    """
    with torch.no_grad():
        constant = torch.full((1, 1, like.shape[1]), 1e3, device=like.device, dtype=like.dtype)
        weight = norm(constant)[0, 0]
        x = (
            torch.linspace(-1, 2, like.shape[1], device=like.device, dtype=like.dtype)[None, None]
            * 1e3
        )
        expected = weight * x[0, 0] / x.square().mean().sqrt()
        if not torch.allclose(
            norm(x)[0, 0], expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())
        ):
            raise ValueError(
                "a norm behind a sublayer's output is not an RMS norm; attribution through it is not linear."
            )
    return weight
