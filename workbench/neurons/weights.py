"""What a neuron's weights say without any prompt: the vocabulary it writes, and how it lies to a category's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.sites import Site
from workbench.models.tokens import token_strings
from workbench.stats.selectivity import permutation_p

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models.load import HookedModel


N_WORDS = 10
"""Vocabulary entries given on either side."""


N_RANDOM = 100
"""Random neurons of the same layer that a neuron's vocabulary is compared with."""


_ROWS = 64  # neurons whose effects on the whole vocabulary are held at a time


@dataclass(frozen=True)
class Vocabulary:
    """Output tokens that a positive activation promotes and suppresses, through the final norm's weight and the unembedding.

    Effects on the logits are given in standard deviations over the vocabulary. Ten words easily look as if they meant something: the p
    values say how many random neurons of the layer have a vocabulary as pointed, (1 + those) / (1 + all).

    Attributes:
        promoted: Tokens with the largest effects.
        suppressed: Tokens with the smallest.
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
    """Cosine of one of a neuron's weight vectors to a category's direction.

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
    """The residual site that a layer's MLP reads: resid_mid, or resid_pre where attention and MLP work side by side (Pythia)."""
    site = Site(layer, "resid_mid")
    return site if site.hook_name in model.hook_dict else Site(layer, "resid_pre")


def vocabulary_of(
    model: HookedModel, layer: int, neurons: Sequence[int], *, seed: int = 0
) -> list[Vocabulary]:
    """The vocabulary that neurons of one layer promote and suppress directly, each against random neurons of that layer.

    Only the direct path: what later layers make of the neuron's output is not in it, so early layers say little. Where a neuron is
    below zero (gated ones often are) the two lists change places.

    Args:
        model: A hooked model.
        layer: Their layer.
        neurons: Indices at ``mlp_post``.
        seed: Of the random neurons, drawn from the whole layer.
    """
    written = _written(model, layer)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randperm(len(written), generator=generator)[:N_RANDOM]
    of_random = _effects(model, written, random)
    of_chosen = _effects(model, written, torch.tensor(list(neurons)))
    p = [
        permutation_p(chosen.numpy(), null.numpy())
        for chosen, null in zip(of_chosen[:3], of_random[:3], strict=True)
    ]
    kurtosis, _, _, largest, smallest = of_chosen
    return [
        Vocabulary(
            promoted=_words(model, largest, row),
            suppressed=_words(model, smallest, row),
            kurtosis=float(kurtosis[row]),
            p_kurtosis=float(p[0][row]),
            p_promoted=float(p[1][row]),
            p_suppressed=float(p[2][row]),
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
    """Cosines of neurons' weights to directions: what they read at the residual stream before the MLP, what they write at ``site``.

    Args:
        model: A hooked model.
        layer: The neurons' layer.
        neurons: Indices at ``mlp_post``.
        directions: Category to site to direction (unsafe minus reference). What is not given at ``reading_site`` or at ``site`` is left out.
        site: Where the output weights are compared: the residual site that was attributed.

    Returns:
        For each neuron its cosines, category by category.

    Raises:
        ValueError: If a direction is not a vector of the model's width, or is zero.
    """
    block, reads = model.blocks[layer], reading_site(model, layer)
    own_norm = getattr(block, "ln2", None)
    if own_norm is None and reads.kind == "resid_pre":
        own_norm = block.ln1  # attention and MLP side by side behind one norm
    norm = _norm_of(own_norm, model)
    gated = getattr(block.mlp, "W_gate", None) is not None
    sides = (
        [("gate", block.mlp.W_gate.T), ("up", block.mlp.W_in.T)]
        if gated
        else [("in", block.mlp.W_in.T)]
    )
    weights = [(side, reads, norm.read(matrix.detach().float())) for side, matrix in sides]
    if site is not None:
        weights.append(("out", site, _written(model, layer)))
    found: list[list[WeightCosine]] = [[] for _ in neurons]
    for category, at in directions.items():
        for side, where, rows in weights:
            if where not in at:
                continue
            cosines = _cosine(rows, at[where], f"{category!r} at {where}")
            for i, n in enumerate(neurons):
                share = float((cosines.abs() >= cosines[n].abs()).float().mean())
                found[i].append(WeightCosine(category, side, str(where), float(cosines[n]), share))
    return [tuple(own) for own in found]


@dataclass(frozen=True, eq=False)
class _Norm:
    """The linear part of a norm: its weight, and whether it takes the mean away first (LayerNorm does, RMSNorm does not)."""

    weight: Float[Tensor, " d_model"]
    centers: bool

    def written(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What becomes of vectors written before the norm."""
        return (rows - rows.mean(dim=1, keepdim=True) if self.centers else rows) * self.weight

    def read(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What weights behind the norm read before it."""
        rows = rows * self.weight
        return rows - rows.mean(dim=1, keepdim=True) if self.centers else rows


def _norm_of(norm: Any, model: HookedModel) -> _Norm:
    """The linear part of a norm, told by what it makes of probes: families store it differently (Gemma as an offset from 1)."""
    parameter = next(iter(model.parameters()))
    d = model.cfg.d_model
    if norm is None:
        return _Norm(torch.ones(d, device=parameter.device), False)
    probe = torch.ones(d, device=parameter.device)
    probe[1::2] = -1.0
    probe -= probe.mean()  # no entry of it is zero
    large = 1e3  # next to which the norm's epsilon is nothing
    outputs = [
        norm((x * large)[None, None].to(parameter.dtype))[0, 0].float()
        for x in (0 * probe, 0 * probe + 1, probe)
    ]
    bias, constant, varied = outputs
    weight = (varied - bias) * probe.square().mean().sqrt() / probe
    return _Norm(weight, bool((constant - bias).norm() < 0.1 * weight.norm()))


def _written(model: HookedModel, layer: int) -> Float[Tensor, "neuron d_model"]:
    """Output weights as they reach the residual stream: behind a norm of the MLP's output (Gemma-2) with its weight."""
    block = model.blocks[layer]
    rows = block.mlp.W_out.detach().float()
    norm = getattr(block, "ln2_post", None)
    return rows if norm is None else _norm_of(norm, model).written(rows)


def _effects(
    model: HookedModel, written: Float[Tensor, "d_mlp d_model"], neurons: Int[Tensor, " neuron"]
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"], Float[Tensor, " neuron"], Any, Any]:
    """Kurtosis, largest and negated smallest effect, and the top entries (effects, ids) at either end, of effects scaled to sd 1."""
    norm = _norm_of(model.ln_final, model)
    n_tokens = min(
        model.unembed.W_U.shape[1], len(model.tokenizer)
    )  # padding rows of the matrix are no tokens
    unembedding = model.unembed.W_U.detach()[:, :n_tokens].float()
    kurtosis, top, bottom = [], [], []
    for rows in neurons.to(written.device).split(_ROWS):
        effects = norm.written(written[rows]) @ unembedding
        effects = effects - effects.mean(
            dim=1, keepdim=True
        )  # a shift of all logits changes no probability
        effects = effects / effects.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
        kurtosis.append(effects.pow(4).mean(dim=1).cpu() - 3)
        top.append(tuple(part.cpu() for part in effects.topk(min(N_WORDS, n_tokens), dim=1)))
        bottom.append(
            tuple(part.cpu() for part in effects.topk(min(N_WORDS, n_tokens), dim=1, largest=False))
        )
    largest, smallest = (
        [torch.cat(part) for part in zip(*end, strict=True)] for end in (top, bottom)
    )
    return torch.cat(kurtosis), largest[0][:, 0], -smallest[0][:, 0], largest, smallest


def _words(model: HookedModel, end: Sequence[Tensor], row: int) -> tuple[tuple[str, float], ...]:
    effects, ids = end[0][row].tolist(), end[1][row].tolist()
    return tuple(zip(token_strings(model, ids), effects, strict=True))


def _cosine(
    rows: Float[Tensor, "row d_model"], direction: Tensor, name: str
) -> Float[Tensor, " row"]:
    u = direction.detach().to(rows).flatten()
    if u.shape != rows.shape[1:] or not u.norm() > 0:
        raise ValueError(
            f"the direction of {name} must be a vector of {rows.shape[1]} that is not zero, got {tuple(direction.shape)}."
        )
    return (torch.nn.functional.normalize(rows, dim=1) @ (u / u.norm())).cpu()
