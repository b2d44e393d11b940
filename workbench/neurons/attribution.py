"""Attribute a residual-stream difference exactly to embedding, heads and neurons.

The residual stream is a sum, so its projection on a direction is one too: what a neuron adds to
<u, mean unsafe - mean reference> is <W_out[n], u> times the difference of its own mean activation,
and likewise for heads. This needs no gradient and no activations token by token: pooled means are
enough, and the parts add up to the whole, which is checked each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import einops
import torch

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
"""Error allowed in the sum of the parts, as a share of the sum of their absolute values."""


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

    Raises:
        ValueError: If the layer has no such single matrix.
    """
    block = model.blocks[site.layer]
    try:
        matrix = block.mlp.W_out if site.kind == "mlp_post" else block.attn.W_O.flatten(0, 1)
    except AttributeError as error:
        what = "neurons" if site.kind == "mlp_post" else "heads"
        raise ValueError(
            f"layer {site.layer} has no single output matrix of its {what} (mixture of experts or "
            "a hybrid block)."
        ) from error
    if matrix.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"the output matrix at {site} has shape {tuple(matrix.shape)}, "
            f"not (..., {model.cfg.d_model})."
        )
    if output_norm(model, site) is not None:
        norm = norm_of_block(model, site.layer, _OUTPUT_NORMS[site.kind])
        matrix = matrix * _norm_weight(norm, matrix)
    # Granite multiplies what a sublayer adds by a constant
    return matrix.detach() * float(getattr(block, "residual_contribution_scale", 1.0))


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
        site: cached.of(unsafe).values.double().mean(dim=0)
        - cached.of(reference).values.double().mean(dim=0)
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
    tolerance: float = TOLERANCE,
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
            values.

    Raises:
        ValueError: If a site is missing or the parts do not add up, with the likely reason.

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
    _check_complete(model, attribution, tolerance)
    return attribution


def _check_complete(model: HookedModel, attribution: Attribution, tolerance: float) -> None:
    """Raise, with the likely reason, unless the parts add up to the total."""
    if attribution.error <= tolerance:
        return
    dtype = model_info(model).dtype
    reason = (
        f"the model runs in {dtype}, which rounds: load it in float32 or give a larger tolerance"
        if dtype != "float32"
        else "the activations are not all of the same prompts and tokens, or this architecture "
        "writes something to the residual stream that is neither head nor neuron (experts, "
        "per-layer embeddings, a bias before an output norm)"
    )
    raise ValueError(
        f"attribution at {attribution.site} is not complete: the parts miss "
        f"{attribution.error:.1e} of their absolute sum, allowed {tolerance:.0e}; {reason}."
    )


def _norm_weight(norm: Any, like: Tensor) -> Float[Tensor, " d_model"]:
    """Read the weight of an RMS norm off what it makes of a constant vector.

    Families store it differently (Gemma as an offset from 1), so the norm itself is asked.

    Raises:
        ValueError: If it is no RMS norm.
    """
    with torch.no_grad():
        constant = torch.full((1, 1, like.shape[1]), 1e3, device=like.device, dtype=like.dtype)
        weight = norm(constant)[0, 0]
        # An RMS norm is linear up to its scale: the weight must explain another vector too.
        x = (
            torch.linspace(-1, 2, like.shape[1], device=like.device, dtype=like.dtype)[None, None]
            * 1e3
        )
        expected = weight * x[0, 0] / x.square().mean().sqrt()
        if not torch.allclose(
            norm(x)[0, 0], expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())
        ):
            raise ValueError(
                "a norm behind a sublayer's output is not an RMS norm; attribution through it is "
                "not linear."
            )
    return weight
