"""Changing neurons: silencing them, or moving them towards what they do on safe prompts; the same for all rows of a batch or row by row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from workbench.models.sites import Site
from workbench.steering.interventions import Intervention

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.load import ModelInfo
    from workbench.prompts.prompt import Prompt

Neuron = tuple[int, int]
"""Layer and index of a neuron (at mlp_post)."""
Method = Literal["clamp", "mean", "zero", "resample", "steer"]
METHODS = ("clamp", "mean", "zero", "resample", "steer")


@dataclass(frozen=True, eq=False)
class AffineEdit:
    """Replace activations ``a`` by ``keep * a + shift``: the form that every way of silencing or moving neurons has.

    Attributes:
        keep: 1 at neurons left alone; for all rows of a batch, or with two axes before it (row, 1) for each row its own.
        shift: What is added, 0 at neurons left alone; shaped like ``keep``.
        where: Positions it applies to; None means all of them.
    """

    keep: Float[Tensor, "*row d_mlp"]
    shift: Float[Tensor, "*row d_mlp"]
    where: Bool[Tensor, "row pos 1"] | None = None

    def __call__(self, activation: Float[Tensor, "row pos d_mlp"]) -> Float[Tensor, "row pos d_mlp"]:
        """The activations with these neurons changed; the others keep every bit."""
        edited = torch.addcmul(self.shift.to(activation), activation, self.keep.to(activation))
        return edited if self.where is None else torch.where(self.where, edited, activation)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return self.keep.shape[-1]


@dataclass(frozen=True, eq=False)
class NeuronReference:
    """What every neuron does on the fit fold: the values that interventions put in, and what controls are matched by.

    Attributes:
        unsafe: Pooled activations on unsafe prompts, all layers.
        safe: Those on the safe ones.
        prompt_ids: Prompts it was measured on; effects are measured on others.
        model: What ran.
    """

    unsafe: Float[Tensor, "unsafe layer d_mlp"]
    safe: Float[Tensor, "safe layer d_mlp"]
    prompt_ids: frozenset[str]
    model: ModelInfo

    @cached_property
    def means(self) -> tuple[Float[Tensor, "layer d_mlp"], Float[Tensor, "layer d_mlp"]]:
        """Mean on unsafe and on safe prompts, float64."""
        return self.unsafe.double().mean(dim=0), self.safe.double().mean(dim=0)

    def __repr__(self) -> str:
        return f"NeuronReference({len(self.unsafe)} unsafe + {len(self.safe)} safe prompts, model={self.model.name!r})"


def neuron_reference(
    activations: Mapping[Site, ActivationSet], unsafe: Sequence[Prompt], safe: Sequence[Prompt]
) -> NeuronReference:
    """Gather what neurons do on unsafe and safe prompts of the fit fold.

    Args:
        activations: From ``cache_activations``, mlp_post of every layer among its sites.
        unsafe: Prompts of the risk category.
        safe: Its twins, or neutral prompts: what "the safe mean" is the mean over.

    Raises:
        ValueError: If a layer or prompt was not cached, or a side is empty.
    """
    layers = sorted(site.layer for site in activations if site.kind == "mlp_post")
    n_layers = next(iter(activations.values())).model.n_layers if activations else 0
    if layers != list(range(n_layers)) or not layers:
        missing = sorted(set(range(n_layers)) - set(layers))[:1]
        raise ValueError(
            f"no neurons of layer {missing[0] if missing else 0}: cache sites_of_kind(model, 'mlp_post'), all layers."
        )
    if not unsafe or not safe:
        raise ValueError(f"a reference needs unsafe and safe prompts, got {len(unsafe)} and {len(safe)}.")
    sites = [Site(layer, "mlp_post") for layer in layers]
    first, second = (
        torch.stack([activations[site].of(side).values for site in sites], dim=1) for side in (unsafe, safe)
    )
    ids = frozenset(prompt.id for prompt in [*unsafe, *safe])
    return NeuronReference(first, second, ids, activations[sites[0]].model)


def neuron_interventions(
    reference: NeuronReference,
    neurons: Iterable[Neuron],
    method: Method = "clamp",
    *,
    factor: float = 1.0,
    donor: int | None = None,
) -> list[Intervention]:
    """Change some neurons at all positions, ready for ``generate`` and ``sweep``.

    Args:
        reference: Where values come from.
        neurons: Pairs (layer, neuron).
        method: "clamp": the mean on safe prompts. "mean": the middle between unsafe and safe mean. "zero". "resample": the pooled values
            of one safe prompt. "steer": add the difference from unsafe to safe mean, which moves the residual stream by the part of
            that difference these neurons write.
        factor: How much of the way to the new value, or of the added difference: 1 all of it, 0 none.
        donor: Row of the safe prompts whose values "resample" takes.

    Raises:
        ValueError: If a neuron does not exist or the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; methods: {', '.join(METHODS)}.")
    if (method == "resample") != (donor is not None):
        raise ValueError(f"method 'resample' needs a donor and no other method takes one, got {method!r} with {donor}.")
    n_layers, d_mlp = reference.safe.shape[1:]
    by_layer: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        if not (0 <= layer < n_layers and 0 <= neuron < d_mlp):
            raise ValueError(
                f"no neuron ({layer}, {neuron}): the model has {n_layers} layers of {d_mlp}, counted from 0."
            )
        by_layer.setdefault(int(layer), []).append(int(neuron))
    interventions = []
    for layer, own in sorted(by_layer.items()):
        keep, shift, value = torch.ones(d_mlp), torch.zeros(d_mlp), _replacement(reference, layer, method, donor)
        if method != "steer":
            keep[own] = 1 - factor
        shift[own] = factor * value[own]
        edit = AffineEdit(keep, shift)
        interventions.append(
            Intervention(Site(layer, "mlp_post"), edit, label=f"{method} neurons", model=reference.model)
        )
    return interventions


def by_row(lists: Sequence[Sequence[Intervention]], where: Tensor | None) -> list[Intervention]:
    """Merge the edits of each row of a batch into one intervention a layer.

    Args:
        lists: For each row what ``neuron_interventions`` made; an empty list leaves the row alone.
        where: Positions to change; None means all of them.
    """
    layers: dict[Site, dict[int, AffineEdit]] = {}
    for row, interventions in enumerate(lists):
        for intervention in interventions:
            layers.setdefault(intervention.site, {})[row] = intervention.edit  # type: ignore[assignment]
    model = next((intervention.model for own in lists for intervention in own), None)
    merged = []
    for site, edits in sorted(layers.items()):
        width = next(iter(edits.values())).width
        keep, shift = torch.ones(len(lists), 1, width), torch.zeros(len(lists), 1, width)
        for row, edit in edits.items():
            keep[row, 0], shift[row, 0] = edit.keep, edit.shift
        merged.append(Intervention(site, AffineEdit(keep, shift, where), model=model))
    return merged


def _replacement(reference: NeuronReference, layer: int, method: str, donor: int | None) -> Float[Tensor, " d_mlp"]:
    """What the method puts in, or adds, at full strength."""
    if method == "resample":
        return reference.safe[donor, layer]
    unsafe, safe = (side[layer] for side in reference.means)
    values = {"clamp": safe, "mean": (safe + unsafe) / 2, "zero": torch.zeros_like(safe), "steer": safe - unsafe}
    return values[method].float()
