"""Read neurons' weights, without any prompt.

They tell the vocabulary that a neuron writes, and how it lies to a category's direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from workbench.models.hooked_model import hook_points
from workbench.models.hooked_transformer import norm_of_block
from workbench.models.sites import Site
from workbench.models.tokens import token_strings, vocabulary_size
from workbench.neurons.attribution import output_matrix
from workbench.stats.selectivity import permutation_p

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel


N_WORDS = 10
"""Vocabulary entries given on either side."""


N_RANDOM = 100
"""Random neurons of the same layer that a neuron's vocabulary is compared with."""


_ROWS = 64  # neurons whose effects on the whole vocabulary are held at a time


@dataclass(frozen=True)
class Vocabulary:
    """Hold the output tokens that a positive activation promotes and suppresses directly.

    The path is through the final norm's weight and the unembedding. Effects on the logits are given
    in standard deviations over the vocabulary. Ten words easily look as if they meant something:
    the p values say how many random neurons of the layer have a vocabulary as pointed,
    (1 + those) / (1 + all).

    Attributes:
        promoted: Tokens with the largest effects.
        suppressed: Tokens with the smallest effects.
        kurtosis: Excess kurtosis of the effects; 0 is Gaussian, large when few tokens stand out.
        p_kurtosis: Share of random neurons with a kurtosis at least as large.
        p_promoted: Share of them whose largest effect is at least as large.
        p_suppressed: Share of them whose smallest effect is at least as small.
    """

    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    kurtosis: float
    p_kurtosis: float
    p_promoted: float
    p_suppressed: float


@dataclass(frozen=True)
class WeightCosine:
    """Hold the cosine of one of a neuron's weight vectors to a category's direction.

    Attributes:
        category: Whose direction.
        side: "gate" and "up" (input weights of a gated MLP), "in" (those of a plain one), or "out".
        site: Where the direction was measured, as text.
        value: The cosine, the norm's weight between residual stream and neuron included.
        share: Share of the layer's neurons whose cosine is at least as far from zero.
    """

    category: str
    side: str
    site: str
    value: float
    share: float


def reading_site(model: HookedModel, layer: int) -> Site:
    """Return the residual site that a layer's MLP reads.

    It is resid_mid, or resid_pre where attention and MLP work side by side (Pythia).
    """
    site = Site(layer, "resid_mid")
    return site if site.hook_name in hook_points(model) else Site(layer, "resid_pre")


def vocabulary_of(
    model: HookedModel, layer: int, neurons: Sequence[int], *, seed: int = 0
) -> list[Vocabulary]:
    """Find the words that neurons promote and suppress, against random neurons of the layer.

    Only the direct path counts: what later layers make of the neuron's output is not in it, so
    early layers say little. Where a neuron is below zero (gated ones often are) the two lists
    change places.

    Args:
        model: A hooked model.
        layer: The neurons' layer.
        neurons: Indices at ``mlp_post``.
        seed: Seed of the random neurons, drawn from the whole layer.
    """
    written = _written(model, layer)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randperm(len(written), generator=generator)[:N_RANDOM]
    random_effects = _effects(model, written, random)
    effects = _effects(model, written, torch.tensor(list(neurons)))
    p_kurtosis, p_promoted, p_suppressed = (
        permutation_p(observed.numpy(), null.numpy())
        for observed, null in zip(effects.statistics, random_effects.statistics, strict=True)
    )
    return [
        Vocabulary(
            promoted=_words(model, effects.promoted, row),
            suppressed=_words(model, effects.suppressed, row),
            kurtosis=float(effects.statistics[0][row]),
            p_kurtosis=float(p_kurtosis[row]),
            p_promoted=float(p_promoted[row]),
            p_suppressed=float(p_suppressed[row]),
        )
        for row in range(len(neurons))
    ]


def weight_cosines(
    model: HookedModel,
    layer: int,
    neurons: Sequence[int],
    directions: Mapping[str, Mapping[Site, Float[Tensor, " d_model"]]],
    site: Site | None = None,
) -> list[tuple[WeightCosine, ...]]:
    """Compute the cosines of neurons' input and output weights to categories' directions.

    Input weights are compared with what the MLP reads from the residual stream, output weights with
    the direction at ``site``.

    Args:
        model: A hooked model.
        layer: The neurons' layer.
        neurons: Indices at ``mlp_post``.
        directions: Category to site to direction (unsafe minus reference). What is not given at
            ``reading_site`` or at ``site`` is left out.
        site: Where the output weights are compared: the residual site that was attributed.

    Returns:
        For each neuron its cosines, category by category.

    Raises:
        ValueError: If a direction is not a vector of the model's width, or is zero.
    """
    weights = _read_weights(model, layer)
    if site is not None:
        weights.append(("out", site, _written(model, layer)))
    cosines: list[list[WeightCosine]] = [[] for _ in neurons]
    for category, at in directions.items():
        for side, where, rows in weights:
            if where not in at:
                continue
            of_layer = _cosine(rows, at[where], f"{category!r} at {where}")
            for i, n in enumerate(neurons):
                value = of_layer[n]
                share = float((of_layer.abs() >= value.abs()).float().mean())
                cosines[i].append(WeightCosine(category, side, str(where), float(value), share))
    return [tuple(of_neuron) for of_neuron in cosines]


@dataclass(frozen=True, eq=False)
class _Norm:
    """Hold the linear part of a norm: its weight, and whether it takes the mean away first.

    LayerNorm does, RMSNorm does not.
    """

    weight: Float[Tensor, " d_model"]
    centers: bool

    def written(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return what becomes of vectors written before the norm."""
        return (rows - rows.mean(dim=1, keepdim=True) if self.centers else rows) * self.weight

    def read(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return what weights behind the norm read before it."""
        rows = rows * self.weight.to(rows.device)
        return rows - rows.mean(dim=1, keepdim=True) if self.centers else rows


def _norm_of(norm: Any, model: HookedModel) -> _Norm:
    """Read the linear part of a norm off what it makes of probes.

    Families store it differently (Gemma as an offset from 1), so the norm itself is asked.
    """
    parameter = next(iter((norm or model).parameters()), next(iter(model.parameters())))
    d = model.cfg.d_model
    if norm is None:
        return _Norm(torch.ones(d, device=parameter.device), False)
    probe = torch.ones(d, device=parameter.device)
    probe[1::2] = -1.0
    probe -= probe.mean()  # no entry of it is zero
    large = 1e3  # next to which the norm's epsilon is nothing
    with torch.no_grad():
        bias, constant, varied = (
            norm((x * large)[None, None].to(parameter.dtype))[0, 0].float()
            for x in (0 * probe, 0 * probe + 1, probe)
        )
    weight = (varied - bias) * probe.square().mean().sqrt() / probe
    return _Norm(weight, bool((constant - bias).norm() < 0.1 * weight.norm()))


def _read_weights(
    model: HookedModel, layer: int
) -> list[tuple[str, Site, Float[Tensor, "neuron d_model"]]]:
    """List a layer's input weights as they read the residual stream: side, site, rows."""
    block, reads = model.blocks[layer], reading_site(model, layer)
    norm = norm_of_block(model, layer, "ln2")
    if norm is None and reads.kind == "resid_pre":
        norm = norm_of_block(model, layer, "ln1")  # attention and MLP side by side behind one norm
    linear = _norm_of(norm, model)
    gated = getattr(block.mlp, "W_gate", None) is not None
    sides = (
        [("gate", block.mlp.W_gate.T), ("up", block.mlp.W_in.T)]
        if gated
        else [("in", block.mlp.W_in.T)]
    )
    return [(side, reads, linear.read(matrix.detach().float())) for side, matrix in sides]


def _written(model: HookedModel, layer: int) -> Float[Tensor, "neuron d_model"]:
    """Return output weights as they reach the residual stream.

    Behind a norm of the MLP's output (Gemma-2) that is with the norm's weight.
    """
    rows = output_matrix(model, Site(layer, "mlp_post"))
    norm = norm_of_block(model, layer, "ln2_post")
    return rows if norm is None else _norm_of(norm, model).written(rows)


class _Effects(NamedTuple):
    """Hold neurons' effects on the vocabulary, scaled to standard deviation 1.

    ``statistics`` are kurtosis, largest effect and negated smallest effect of each neuron;
    ``promoted`` and ``suppressed`` the top entries at either end: effects and token ids.
    """

    statistics: tuple[Tensor, Tensor, Tensor]
    promoted: list[Tensor]
    suppressed: list[Tensor]


def _effects(
    model: HookedModel, written: Float[Tensor, "d_mlp d_model"], neurons: Int[Tensor, " neuron"]
) -> _Effects:
    """Compute what neurons of a layer add to the logits directly."""
    norm = _norm_of(getattr(model, "ln_final", None), model)
    # padding rows of the matrix are no tokens
    n_tokens = min(model.unembed.W_U.shape[1], vocabulary_size(model))
    unembedding = model.unembed.W_U.detach()[:, :n_tokens].float()
    kurtosis, top, bottom = [], [], []
    for rows in neurons.to(written.device).split(_ROWS):
        effects = norm.written(written[rows]) @ unembedding
        # a shift of all logits changes no probability
        effects = effects - effects.mean(dim=1, keepdim=True)
        effects = effects / effects.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
        kurtosis.append(effects.pow(4).mean(dim=1).cpu() - 3)
        top.append(tuple(part.cpu() for part in effects.topk(min(N_WORDS, n_tokens), dim=1)))
        bottom.append(
            tuple(part.cpu() for part in effects.topk(min(N_WORDS, n_tokens), dim=1, largest=False))
        )
    promoted, suppressed = (
        [torch.cat(part) for part in zip(*end, strict=True)] for end in (top, bottom)
    )
    statistics = (torch.cat(kurtosis), promoted[0][:, 0], -suppressed[0][:, 0])
    return _Effects(statistics, promoted, suppressed)


def _words(model: HookedModel, end: Sequence[Tensor], row: int) -> tuple[tuple[str, float], ...]:
    """Pair the tokens at one end of a neuron's vocabulary with their effects."""
    effects, ids = end[0][row].tolist(), end[1][row].tolist()
    return tuple(zip(token_strings(model, ids), effects, strict=True))


def _cosine(
    rows: Float[Tensor, "row d_model"], direction: Tensor, name: str
) -> Float[Tensor, " row"]:
    """Compute the cosine of each row to a direction."""
    u = direction.detach().to(rows).flatten()
    if u.shape != rows.shape[1:] or not u.norm() > 0:
        raise ValueError(
            f"the direction of {name} must be a vector of {rows.shape[1]} that is not zero, "
            f"got {tuple(direction.shape)}."
        )
    return (torch.nn.functional.normalize(rows, dim=1) @ (u / u.norm())).cpu()
