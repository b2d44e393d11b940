"""Silence attention heads or move them to their safe values, beside matched controls.

This is for heads what ``silencing`` is for neurons. A head is a block of values at a layer's z,
before the output matrix; ``matched_controls`` draws random sets of heads, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import einops
import numpy as np
import torch

from workbench.models.sites import Site
from workbench.neurons.attribution import write_matrix
from workbench.neurons.silencing import AffineEdit, sides_of_all_layers
from workbench.steering.interventions import Intervention

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel
    from workbench.models.load import ModelInfo
    from workbench.prompts.prompt import Prompt


Head = tuple[int, int]
"""Layer and index of an attention head."""


HeadMethod = Literal["clamp", "zero"]
"""Ways of changing heads; see ``head_interventions``."""


MATCHED_HEADS = ("norm",)
"""Columns of ``head_statistics`` that control heads are matched by."""


@dataclass(frozen=True, eq=False)
class HeadReference:
    """Hold what every head does on the fit fold: the counterpart of ``NeuronReference``.

    Attributes:
        unsafe: Pooled values at z on unsafe prompts, head by head.
        safe: Those on the safe ones.
        prompt_ids: Prompts it was measured on; effects are measured on others.
        model: What ran.
    """

    unsafe: Float[Tensor, "unsafe layer head d_head"]
    safe: Float[Tensor, "safe layer head d_head"]
    prompt_ids: frozenset[str]
    model: ModelInfo

    def __repr__(self) -> str:
        return (
            f"HeadReference({len(self.unsafe)} unsafe + {len(self.safe)} safe prompts, "
            f"model={self.model.name!r})"
        )


def head_reference(
    model: HookedModel,
    activations: Mapping[Site, ActivationSet],
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
) -> HeadReference:
    """Gather what heads do on unsafe and safe prompts of the fit fold.

    Args:
        model: What the activations are of; it says how many heads a layer has.
        activations: From ``cache_activations``, z of every layer among its sites.
        unsafe: Prompts of the risk category.
        safe: Its twins, or neutral prompts: what "the safe mean" is the mean over.

    Raises:
        ValueError: If a layer or prompt was not cached, or a side is empty.
    """
    of_unsafe, of_safe = (
        einops.rearrange(
            side, "prompt layer (head d) -> prompt layer head d", head=model.cfg.n_heads
        )
        for side in sides_of_all_layers(activations, "z", unsafe, safe)
    )
    ids = frozenset(prompt.id for prompt in [*unsafe, *safe])
    return HeadReference(of_unsafe, of_safe, ids, activations[Site(0, "z")].model)


def head_interventions(
    reference: HeadReference, heads: Iterable[Head], method: HeadMethod = "zero"
) -> list[Intervention]:
    """Change some heads at all positions, ready for ``generate`` and ``sweep``.

    Args:
        reference: Where values come from.
        heads: Pairs (layer, head).
        method: "zero": the head writes nothing (but its layer's bias, where there is one). "clamp":
            its mean on safe prompts.

    Raises:
        ValueError: If a head does not exist or the method is unknown.
    """
    if method not in get_args(HeadMethod):
        raise ValueError(
            f"unknown method {method!r} for heads; methods: {', '.join(get_args(HeadMethod))}."
        )
    n_layers, n_heads, d_head = reference.safe.shape[1:]
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"no head ({layer}, {head}): the model has {n_layers} layers of {n_heads}, "
                "counted from 0."
            )
        by_layer.setdefault(int(layer), []).append(int(head))
    interventions = []
    for layer, layer_heads in sorted(by_layer.items()):
        keep, shift = torch.ones(n_heads, d_head), torch.zeros(n_heads, d_head)
        keep[layer_heads] = 0
        if method == "clamp":
            safe_mean = reference.safe[:, layer].double().mean(dim=0).float()
            shift[layer_heads] = safe_mean[layer_heads]
        edit = AffineEdit(keep.flatten(), shift.flatten())
        interventions.append(
            Intervention(Site(layer, "z"), edit, label=f"{method} heads", model=reference.model)
        )
    return interventions


def head_statistics(model: HookedModel, reference: HeadReference) -> pd.DataFrame:
    """Compute what control heads are matched by, for every head of the model.

    Args:
        model: What the reference was measured on.
        reference: Activations of the fit fold.

    Returns:
        One row per head: layer, head and norm, the mean over all prompts of the norm of what the
        head writes to the residual stream, in its units (behind an output norm, before its scale).

    Raises:
        CannotBeDone: If a layer's heads have no single output matrix.
    """
    import pandas as pd

    values = torch.cat([reference.unsafe, reference.safe]).double()
    n_layers, n_heads = values.shape[1:3]
    norms = []
    for layer in range(n_layers):
        matrix = write_matrix(model, Site(layer, "z")).double().cpu()
        by_head = einops.rearrange(matrix, "(head d) d_model -> head d d_model", head=n_heads)
        written = einops.einsum(
            values[:, layer], by_head, "prompt head d, head d d_model -> prompt head d_model"
        )
        norms.append(written.norm(dim=-1).mean(dim=0))
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), n_heads),
            "head": np.tile(np.arange(n_heads), n_layers),
            "norm": torch.stack(norms).flatten().numpy(),
        }
    )
