"""Silence neurons or move them towards their safe values, and draw matched controls.

Every way of changing neurons takes its values from a ``NeuronReference``, measured on the fit fold.
``neuron_interventions`` makes edits for ``generate`` and ``sweep``; ``by_row`` gives each row of a
batch its own. What a set of neurons does is read beside random sets that match it in layer, size of
activation and how much they write along the direction (``matched_controls``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from workbench.models.sites import Site
from workbench.neurons.attribution import output_matrix
from workbench.steering.edits import at_least_float32
from workbench.steering.interventions import Intervention

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel
    from workbench.models.load import ModelInfo
    from workbench.prompts.prompt import Prompt
    from workbench.steering.vectors import SteeringVector


Neuron = tuple[int, int]
"""Layer and index of a neuron (at mlp_post)."""


Method = Literal["clamp", "mean", "zero", "resample", "steer"]
"""Ways of changing neurons; see ``neuron_interventions``."""


METHODS = ("clamp", "mean", "zero", "resample", "steer")


MATCHED = ("mean_abs", "sd", "write")
"""Columns of ``matching_statistics`` that controls are matched by."""


@dataclass(frozen=True, eq=False)
class NeuronReference:
    """Hold what every neuron does on the fit fold.

    These are the values that interventions put in, and what controls are matched by.

    Attributes:
        unsafe: Pooled activations on unsafe prompts, all layers.
        safe: Those on the safe ones.
        prompt_ids: Prompts it was measured on; effects are measured on others.
        model: What ran.
        asked_as: System prompt and template keywords that it was measured under, see
            ``ActivationSet``.
    """

    unsafe: Float[Tensor, "unsafe layer d_mlp"]
    safe: Float[Tensor, "safe layer d_mlp"]
    prompt_ids: frozenset[str]
    model: ModelInfo
    asked_as: str = ""

    @cached_property
    def means(self) -> tuple[Float[Tensor, "layer d_mlp"], Float[Tensor, "layer d_mlp"]]:
        """Mean on unsafe and on safe prompts, float64."""
        return self.unsafe.double().mean(dim=0), self.safe.double().mean(dim=0)

    def __repr__(self) -> str:
        return (
            f"NeuronReference({len(self.unsafe)} unsafe + {len(self.safe)} safe prompts, "
            f"model={self.model.name!r})"
        )


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
    of_unsafe, of_safe = sides_of_all_layers(activations, "mlp_post", unsafe, safe)
    ids = frozenset(prompt.id for prompt in [*unsafe, *safe])
    measured = activations[Site(0, "mlp_post")]
    return NeuronReference(of_unsafe, of_safe, ids, measured.model, measured.asked_as)


def sides_of_all_layers(
    activations: Mapping[Site, ActivationSet],
    kind: str,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
) -> tuple[Float[Tensor, "unsafe layer d"], Float[Tensor, "safe layer d"]]:
    """Stack what all layers' sites of a kind hold of unsafe and of safe prompts.

    Raises:
        ValueError: If a layer or prompt was not cached, or a side is empty.
    """
    layers = sorted(site.layer for site in activations if site.kind == kind)
    n_layers = next(iter(activations.values())).model.n_layers if activations else 0
    if layers != list(range(n_layers)) or not layers:
        missing = sorted(set(range(n_layers)) - set(layers))[:1]
        units = "neurons" if kind == "mlp_post" else "heads"
        raise ValueError(
            f"no {units} of layer {missing[0] if missing else 0}: "
            f"cache sites_of_kind(model, {kind!r}), all layers."
        )
    if not unsafe or not safe:
        raise ValueError(
            f"a reference needs unsafe and safe prompts, got {len(unsafe)} and {len(safe)}."
        )
    sites = [Site(layer, kind) for layer in layers]
    of_unsafe, of_safe = (
        torch.stack([activations[site].of(side).values for site in sites], dim=1)
        for side in (unsafe, safe)
    )
    return of_unsafe, of_safe


@dataclass(frozen=True, eq=False)
class AffineEdit:
    """Replace activations ``a`` by ``keep * a + shift``.

    Every way of silencing or moving neurons has this form.

    Attributes:
        keep: 1 at neurons left alone; one vector for all rows of a batch, or with two axes before
            it (row, 1) one for each row.
        shift: What is added, 0 at neurons left alone; shaped like ``keep``.
        where: Positions it applies to; None means all of them.
    """

    keep: Float[Tensor, "*row d_mlp"]
    shift: Float[Tensor, "*row d_mlp"]
    where: Bool[Tensor, "row pos 1"] | None = None

    def __call__(
        self, activation: Float[Tensor, "row pos d_mlp"]
    ) -> Float[Tensor, "row pos d_mlp"]:
        """Return the activations with these neurons changed; the others keep every bit."""
        wide = at_least_float32(activation)  # 16 bit would round factors and sums on the way
        edited = torch.addcmul(self.shift.to(wide), wide, self.keep.to(wide)).to(activation)
        return edited if self.where is None else torch.where(self.where, edited, activation)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return self.keep.shape[-1]


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
        method: "clamp": the mean on safe prompts. "mean": the middle between unsafe and safe mean.
            "zero". "resample": the pooled values of one safe prompt. "steer": add the difference
            from unsafe to safe mean, which moves the residual stream by the part of that
            difference these neurons write.
        factor: How much of the way to the new value, or of the added difference: 1 all, 0 none.
        donor: Row of the safe prompts whose values "resample" takes.

    Raises:
        ValueError: If a neuron does not exist or the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; methods: {', '.join(METHODS)}.")
    if (method == "resample") != (donor is not None):
        raise ValueError(
            "method 'resample' needs a donor and no other method takes one, "
            f"got {method!r} with {donor}."
        )
    n_layers, d_mlp = reference.safe.shape[1:]
    by_layer: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        if not (0 <= layer < n_layers and 0 <= neuron < d_mlp):
            raise ValueError(
                f"no neuron ({layer}, {neuron}): the model has {n_layers} layers of {d_mlp}, "
                "counted from 0."
            )
        by_layer.setdefault(int(layer), []).append(int(neuron))
    interventions = []
    for layer, layer_neurons in sorted(by_layer.items()):
        keep, shift = torch.ones(d_mlp), torch.zeros(d_mlp)
        value = _replacement(reference, layer, method, donor)
        if method != "steer":
            keep[layer_neurons] = 1 - factor
        shift[layer_neurons] = factor * value[layer_neurons]
        site, edit = Site(layer, "mlp_post"), AffineEdit(keep, shift)
        interventions.append(
            Intervention(site, edit, label=f"{method} neurons", model=reference.model)
        )
    return interventions


def by_row(lists: Sequence[Sequence[Intervention]], where: Tensor | None) -> list[Intervention]:
    """Merge the edits of each row of a batch into one intervention per layer.

    Args:
        lists: For each row what ``neuron_interventions`` made; an empty list leaves the row alone.
        where: Positions to change; None means all of them.
    """
    by_site: dict[Site, dict[int, AffineEdit]] = {}
    for row, interventions in enumerate(lists):
        for intervention in interventions:
            by_site.setdefault(intervention.site, {})[row] = intervention.edit  # type: ignore[assignment]
    model = next((intervention.model for row_list in lists for intervention in row_list), None)
    merged = []
    for site, edits in sorted(by_site.items()):
        width = next(iter(edits.values())).width
        keep, shift = torch.ones(len(lists), 1, width), torch.zeros(len(lists), 1, width)
        for row, edit in edits.items():
            keep[row, 0], shift[row, 0] = edit.keep, edit.shift
        merged.append(Intervention(site, AffineEdit(keep, shift, where), model=model))
    return merged


class Controls(NamedTuple):
    """Hold random sets matched to a target, and how good the match is.

    Attributes:
        sets: Neurons of each set, as many as the target has.
        same_cell: Share of members that come from the very cell (layer and deciles) of the neuron
            they stand for; the others come from the nearest cell that was not exhausted.
        ratios: For each statistic, its mean over the controls by its mean over the target: deciles
            are open at the top, so a target of outliers has controls with smaller values.
    """

    sets: tuple[tuple[Neuron, ...], ...]
    same_cell: float
    ratios: dict[str, float]


def matching_statistics(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> pd.DataFrame:
    """Compute what control neurons are matched by, for every neuron of the model.

    Args:
        model: What the reference was measured on.
        reference: Activations of the fit fold.
        vector: Steering vector whose direction ``write`` is about.

    Returns:
        One row per neuron: layer, neuron, mean_abs and sd (of pooled activations over all prompts)
        and write, |<W_out[neuron], unit vector>|: how much of the direction one unit of the neuron
        writes.

    Raises:
        CannotBeDone: If a layer's neurons have no single output matrix (a mixture of experts).
    """
    import pandas as pd

    values = torch.cat([reference.unsafe, reference.safe]).double()
    u = vector.direction.double()
    neurons = [Site(layer, "mlp_post") for layer in range(model.cfg.n_layers)]
    write = torch.stack([(output_matrix(model, site).double().cpu() @ u).abs() for site in neurons])
    n_layers, d_mlp = write.shape
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), d_mlp),
            "neuron": np.tile(np.arange(d_mlp), n_layers),
            "mean_abs": values.abs().mean(dim=0).flatten().numpy(),
            "sd": values.std(dim=0, correction=0).flatten().numpy(),
            "write": write.flatten().numpy(),
        }
    )


def matched_controls(
    statistics: pd.DataFrame,
    target: Iterable[Neuron],
    *,
    n_sets: int = 20,
    seed: int = 0,
    by: Sequence[str] = MATCHED,
    exclude: Iterable[Neuron] = (),
) -> Controls:
    """Draw random sets of neurons or heads like the target: same layers and deciles, one for one.

    Deciles are those of the layer. Where no neuron of a cell is left, one is drawn from the nearest
    cell of the layer (sum of the distances in deciles). A set holds no neuron twice; two sets may
    share some.

    Args:
        statistics: One row per neuron, with columns layer, neuron and those of ``by``; see
            ``matching_statistics``. For heads a column head stands in place of neuron; see
            ``heads.head_statistics``.
        target: Neurons (or heads) to stand in for.
        n_sets: How many sets.
        seed: Same seed, same sets.
        by: Columns to match.
        exclude: Neurons that no control may hold, besides the target's own.

    Raises:
        ValueError: If a neuron or column is not in the table, or a layer has too few other neurons.
    """
    target = list(dict.fromkeys((int(layer), int(neuron)) for layer, neuron in target))
    row_of = _rows_of_neurons(statistics, target, by, n_sets)
    unit = _unit_of(statistics)
    layer, neuron = statistics["layer"].to_numpy(), statistics[unit].to_numpy()
    values = statistics[list(by)].to_numpy(dtype=float)
    free = np.ones(len(layer), dtype=bool)
    free[[row_of[pair] for pair in {*target, *exclude} if pair in row_of]] = False
    rng = np.random.default_rng(seed)
    picked, n_exact = [], 0
    for target_layer in sorted({pair[0] for pair in target}):
        members = np.flatnonzero(layer == target_layer)
        target_rows = [row_of[pair] for pair in target if pair[0] == target_layer]
        wanted, pool = np.searchsorted(members, target_rows), np.flatnonzero(free[members])
        if len(pool) < len(wanted):
            raise ValueError(
                f"layer {target_layer} has {len(pool)} {unit}s besides the {len(wanted)} of the "
                "target: take fewer, or exclude fewer."
            )
        picks, n_same = _draw_alike(_deciles(values[members]), wanted, pool, n_sets, rng)
        picked.append(members[picks])
        n_exact += n_same
    rows = np.concatenate(picked, axis=1)
    sets = tuple(tuple((int(layer[i]), int(neuron[i])) for i in row) for row in rows)
    ratios = values[rows.ravel()].mean(axis=0) / values[[row_of[pair] for pair in target]].mean(
        axis=0
    )
    return Controls(sets, n_exact / rows.size, dict(zip(by, ratios.tolist(), strict=True)))


def _replacement(
    reference: NeuronReference, layer: int, method: str, donor: int | None
) -> Float[Tensor, " d_mlp"]:
    """Return what the method puts in, or adds, at full strength."""
    if method == "resample":
        return reference.safe[donor, layer]
    unsafe, safe = (side[layer] for side in reference.means)
    values = {
        "clamp": safe,
        "mean": (safe + unsafe) / 2,
        "zero": torch.zeros_like(safe),
        "steer": safe - unsafe,
    }
    return values[method].float()


def _rows_of_neurons(
    statistics: pd.DataFrame, target: Sequence[Neuron], by: Sequence[str], n_sets: int
) -> dict[Neuron, int]:
    """Find each neuron's row in the table of statistics; raise where the table does not fit."""
    unit = _unit_of(statistics)
    missing = [name for name in ("layer", unit, *by) if name not in statistics.columns]
    if missing:
        raise ValueError(
            f"matching needs a column {missing[0]!r}; see matching_statistics and head_statistics."
        )
    if not target or n_sets < 1:
        raise ValueError("give a target and n_sets >= 1.")
    row_of = {
        pair: i for i, pair in enumerate(zip(statistics["layer"], statistics[unit], strict=True))
    }
    unknown = [pair for pair in target if pair not in row_of]
    if unknown:
        raise ValueError(f"no {unit} {unknown[0]} in the table of statistics.")
    return row_of


def _unit_of(statistics: pd.DataFrame) -> str:
    """Tell whether a table of statistics is of heads or of neurons."""
    return "head" if "head" in statistics.columns else "neuron"


def _deciles(values: Float[np.ndarray, "neuron by"]) -> Int[np.ndarray, "neuron by"]:
    """Number the decile of each value within its column, from 0 to 9."""
    ranks = np.argsort(np.argsort(values, axis=0, kind="stable"), axis=0)
    return ranks * 10 // len(values)


def _draw_alike(
    deciles: Int[np.ndarray, "neuron by"],
    wanted: Int[np.ndarray, " target"],
    pool: Int[np.ndarray, " free"],
    n_sets: int,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, "set target"], int]:
    """Draw the nearest neuron of the pool for each wanted one, none twice in a set.

    Returns:
        The neurons drawn, and how many of them are of the very cell.
    """
    distance = np.abs(deciles[wanted][:, None] - deciles[pool][None]).sum(axis=-1)
    picks, n_same = np.empty((n_sets, len(wanted)), dtype=int), 0
    for number in range(n_sets):
        left = distance.astype(float) + rng.random(len(pool)) / 2  # ties are broken at random
        for row in rng.permutation(len(wanted)):
            pick = int(left[row].argmin())
            n_same += int(distance[row, pick] == 0)
            picks[number, row] = pool[pick]
            left[:, pick] = math.inf
    return picks, n_same
