"""Attribute a residual-stream difference exactly to embedding, heads and neurons.

The residual stream is a sum, so its projection on a direction is one too: what a neuron adds to
<u, mean unsafe - mean reference> is <W_out[n], u> times the difference of its own mean activation,
and likewise for heads. This needs no gradient and no activations token by token: pooled means are
enough, and the parts add up to the whole, which is checked each time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import einops
import torch

from workbench.models.errors import CannotBeDone
from workbench.models.hooked_transformer import norm_name, norm_of_block
from workbench.models.load import model_info
from workbench.models.sites import INNER_HOOK_NAMES, Site, check_sites

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.prompt import Prompt


RESIDUAL_STREAM = ("resid_pre", "resid_mid", "resid_post")
"""Kinds of site whose value is the sum of all that was written before them: only at these a
direction can be attributed."""


TOLERANCE = 1e-5
"""Error allowed in the sum of the parts, as a share of the sum of their absolute values, where the
model runs in float32; ``completeness_tolerance`` says what 16 bit allow."""


_OUTPUT_NORMS = {"z": "ln1_post", "mlp_post": "ln2_post"}  # kind of site to attribute of the block


_EMBEDDING = Site(0, "resid_pre")


@dataclass(frozen=True, eq=False)
class Attribution:
    """Hold the parts of <direction, mean unsafe - mean reference> at a residual site.

    All numbers are in residual-stream units along the direction.

    Attributes:
        site: Where the difference was measured.
        direction: Unit direction.
        total: The projected difference itself.
        embedding: What the embedding adds (with learned positions, where the model has them).
        heads: What each head of the layers below the site adds.
        neurons: What each neuron of the layers below the site adds.
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
            f"Attribution({self.site}, total={self.total:.4g}: embedding {self.embedding:.3g}, "
            f"{self.heads.numel()} heads {heads:.3g}, "
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
    """List the sites where all that adds up to the residual stream at a site can be read.

    These are the embedding, the heads (z) and the neurons (mlp_post) below it: what
    ``cache_activations`` must be given, beside the site itself, for an attribution there.

    Raises:
        ValueError: If the site is not in the residual stream, or the model does not compute what
            is needed.
    """
    if site.kind not in RESIDUAL_STREAM:
        raise ValueError(
            f"cannot attribute a direction at {site}: no neuron writes there directly; measure it "
            f"in the residual stream instead, for instance at {Site(site.layer, 'resid_post')}."
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
    """Name the hook of the scale of the norm behind a sublayer's output, or None without one.

    Gemma-2, Gemma-3 and OLMo-2 have such norms; the block's structure tells. With one, a neuron
    writes its activation divided by the token's scale.
    """
    norm = _OUTPUT_NORMS.get(site.kind)
    if norm is None or norm_of_block(model, site.layer, norm) is None:
        return None
    name = norm_name(model, site.layer, norm)
    return INNER_HOOK_NAMES["norm_scale"].format(layer=site.layer, norm=name)


def write_matrix(model: HookedModel, site: Site) -> Float[Tensor, "d d_model"]:
    """Return what one unit of each activation at a site adds to the residual stream.

    One row per activation: W_out for mlp_post, W_O for z. Behind an output norm the rows hold the
    norm's weight, and activations are meant divided by its scale (``splits.scaled_activations``).

    Returns:
        In float32, whatever the model runs in.

    Raises:
        CannotBeDone: If the layer has no such single matrix of numbers, or a norm behind it is not
            linear.
    """
    block = model.blocks[site.layer]
    matrix = output_matrix(model, site)
    if output_norm(model, site) is not None:
        norm = norm_of_block(model, site.layer, _OUTPUT_NORMS[site.kind])
        matrix = matrix * _norm_weight(norm, model)
    # Granite multiplies what a sublayer adds by a constant
    return matrix * float(getattr(block, "residual_contribution_scale", 1.0))


def output_matrix(model: HookedModel, site: Site) -> Float[Tensor, "d d_model"]:
    """Return W_out of a layer's neurons (mlp_post) or W_O of its heads (z), in float32.

    Raises:
        CannotBeDone: If the layer has no such single matrix of numbers.
    """
    block = model.blocks[site.layer]
    what = "neurons" if site.kind == "mlp_post" else "heads"
    try:
        matrix = block.mlp.W_out if site.kind == "mlp_post" else block.attn.W_O.flatten(0, 1)
    except AttributeError as error:
        raise CannotBeDone(
            f"layer {site.layer} has no single output matrix of its {what} (mixture of experts or "
            "a hybrid block)."
        ) from error
    if matrix.ndim != 2 or matrix.shape[1] != model.cfg.d_model or not matrix.is_floating_point():
        raise CannotBeDone(
            f"the output matrix of the {what} of layer {site.layer} has shape "
            f"{tuple(matrix.shape)} in {str(matrix.dtype).removeprefix('torch.')}, not "
            f"(..., {model.cfg.d_model}) in floating point (packed weights of a quantised model, "
            "or a hybrid block)."
        )
    return matrix.detach().float()


def write_weights(
    model: HookedModel, site: Site, directions: Float[Tensor, "... d_model"]
) -> Float[Tensor, "... d"]:
    """Return how far one unit of each activation moves along directions: <W_out[n], u>."""
    if site == _EMBEDDING:
        return directions
    return (
        directions
        @ write_matrix(model, site).to(device=directions.device, dtype=directions.dtype).T
    )


def class_difference(
    activations: Mapping[Site, ActivationSet], unsafe: Sequence[Prompt], reference: Sequence[Prompt]
) -> dict[Site, Float[Tensor, " d"]]:
    """Subtract reference prompts' mean from unsafe ones' at each site, in float64."""
    return {
        site: cached.of(unsafe).mean() - cached.of(reference).mean()
        for site, cached in activations.items()
    }


def unit_vector(direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """Bring a direction to unit norm, in float64 on the CPU.

    Raises:
        ValueError: If it is zero or not finite.
    """
    u = direction.double().cpu()
    if not u.norm() > 0:
        raise ValueError(
            "the direction is zero or not finite; give a mean difference or a steering vector's "
            "direction."
        )
    return u / u.norm()


def direct_attribution(
    model: HookedModel,
    site: Site,
    direction: Float[Tensor, " d_model"],
    difference: Mapping[Site, Float[Tensor, " d"]],
    *,
    tolerance: float | None = None,
) -> Attribution:
    """Split a projected difference into the embedding, every head and every neuron.

    Args:
        model: What the difference was measured on.
        site: Residual site of the difference.
        direction: Any vector; it is brought to unit norm. Take it from other prompts than the
            difference, or the total is positive by construction.
        difference: Mean unsafe minus mean reference activation at the site and at all
            ``writing_sites`` (``class_difference``). Sites behind an output norm need activations
            divided by its scale: ``splits.writing_activations`` gives those.
        tolerance: Error allowed in the sum of the parts, as a share of the sum of their absolute
            values; ``completeness_tolerance`` by default.

    Raises:
        ValueError: If a site is missing.
        CannotBeDone: If the parts do not add up, with the likely reason.

    Source: direct attribution is linear algebra on the residual stream (Elhage et al. 2021, A
    Mathematical Framework for Transformer Circuits).
    """
    sites = writing_sites(model, site)
    for needed in (site, *sites):
        if needed not in difference:
            raise ValueError(
                f"no activations at {needed}; cache [site, *writing_sites(model, site)] for the "
                "same prompts."
            )
    u, n_heads = unit_vector(direction), model.cfg.n_heads
    parts = {part: write_weights(model, part, u) * difference[part].double() for part in sites}
    heads = [
        einops.reduce(parts[part], "(head d) -> head", "sum", head=n_heads)
        for part in sites
        if part.kind == "z"
    ]
    neurons = [parts[part] for part in sites if part.kind == "mlp_post"]
    attribution = Attribution(
        site,
        u.float(),
        float(u @ difference[site].double()),
        float(parts[_EMBEDDING].sum()),
        torch.stack(heads) if heads else torch.zeros(0, n_heads, dtype=torch.float64),
        torch.stack(neurons) if neurons else torch.zeros(0, model.cfg.d_mlp, dtype=torch.float64),
    )
    allowed = completeness_tolerance(model) if tolerance is None else tolerance
    _check_complete(model, attribution, allowed)
    return attribution


def completeness_tolerance(model: HookedModel) -> float:
    """Say what error of the sum of all parts rounding explains, as a share of their absolute sum.

    The parts are summed in float64, but the model itself rounds four times per block to what its
    dtype holds: what attention and MLP put out, and the stream after each was added. One rounding
    is off by up to half an epsilon; they are independent, and n of them add up to sqrt(n) times
    that. In float32 this is far below ``TOLERANCE``, which holds there. Measured on tiny models of
    five families, where .016 and .002 are allowed: up to .0021 in bfloat16, .00015 in float16.

    Returns:
        ``TOLERANCE``, or half an epsilon times the root of four times the number of blocks where
        that is more: for 30 blocks .043 in bfloat16 and .005 in float16.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return max(TOLERANCE, torch.finfo(dtype).eps / 2 * math.sqrt(4 * model.cfg.n_layers))


def _check_complete(model: HookedModel, attribution: Attribution, tolerance: float) -> None:
    """Raise, with the likely reason, unless the parts add up to the total."""
    if attribution.error <= tolerance:
        return
    dtype = model_info(model).dtype
    rounding = (
        ""
        if dtype == "float32"
        else f"the model runs in {dtype}, which rounds: load it in float32; or "
    )
    raise CannotBeDone(
        f"attribution at {attribution.site} is not complete: the parts miss "
        f"{attribution.error:.1e} of their absolute sum, allowed {tolerance:.1e}; {rounding}the "
        "activations are not all of the same prompts and tokens, or this architecture writes "
        "something to the residual stream that is neither head nor neuron (experts, recurrent "
        "layers, per-layer embeddings, a bias before an output norm)."
    )


def _norm_weight(norm: Any, model: HookedModel) -> Float[Tensor, " d_model"]:
    """Read the weight of an RMS norm off what it makes of a constant vector, in float32.

    Families store it differently (Gemma as an offset from 1), so the norm itself is asked.

    Raises:
        CannotBeDone: If it is no RMS norm.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())

    def normed(vector: Tensor) -> Tensor:
        return norm(vector[None, None].to(like))[0, 0].float()

    with torch.no_grad():
        constant = torch.full((model.cfg.d_model,), 1e3, device=like.device)
        weight = normed(constant)
        # An RMS norm is linear up to its scale: the weight must explain another vector too.
        x = torch.linspace(-1, 2, model.cfg.d_model, device=like.device) * 1e3
        expected = weight * x / x.square().mean().sqrt()
        rounding = max(1e-2, 4 * torch.finfo(like.dtype).eps)
        if not torch.allclose(
            normed(x), expected, rtol=rounding, atol=1e-3 * float(expected.abs().max())
        ):
            raise CannotBeDone(
                "a norm behind a sublayer's output is not an RMS norm; attribution through it is "
                "not linear."
            )
    return weight
