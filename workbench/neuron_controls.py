"""Control neurons: random sets that are like a target in everything but what is claimed of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd

    from workbench.models.load import HookedModel
    from workbench.neuron_edits import Neuron, NeuronReference
    from workbench.steering.vectors import SteeringVector

MATCHED = ("mean_abs", "sd", "write")


class Controls(NamedTuple):
    """Random sets matched to a target, and how good the match is.

    Attributes:
        sets: Neurons of each set, as many as the target has.
        same_cell: Share of members that come from the very cell (layer and deciles) of the neuron they stand for; the others come
            from the nearest cell that was not exhausted.
        ratios: For each statistic, its mean over the controls by its mean over the target: deciles are open at the top, so a
            target of outliers has controls with smaller values.
    """

    sets: tuple[tuple[Neuron, ...], ...]
    same_cell: float
    ratios: dict[str, float]


def matching_statistics(model: HookedModel, reference: NeuronReference, vector: SteeringVector) -> pd.DataFrame:
    """What control neurons are matched by: columns layer, neuron, mean_abs, sd (of pooled activations over all prompts) and write.

    Args:
        model: What the reference was measured on.
        reference: Activations of the fit fold.
        vector: ``write`` is |<W_out[neuron], unit vector>|: how much of the direction one unit of the neuron writes.
    """
    import pandas as pd

    values = torch.cat([reference.unsafe, reference.safe]).double()
    u = vector.direction.double()
    write = torch.stack([(block.mlp.W_out.detach().double().cpu() @ u).abs() for block in model.blocks])
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
    """Random sets of neurons like the target: for each of its neurons one of the same layer and the same deciles.

    Deciles are those of the layer. Where no neuron of a cell is left, one is drawn from the nearest cell of the layer (sum of the
    distances in deciles). A set holds no neuron twice; two sets may share some.

    Args:
        statistics: A row a neuron, with columns layer, neuron and those of ``by``; see ``matching_statistics``.
        target: Neurons to stand in for.
        n_sets: How many sets.
        seed: Same seed, same sets.
        by: Columns to match.
        exclude: Neurons that no control may hold, besides the target's own.

    Raises:
        ValueError: If a neuron or column is not in the table, or a layer has too few other neurons.
    """
    target = list(dict.fromkeys((int(layer), int(neuron)) for layer, neuron in target))
    missing = [name for name in ("layer", "neuron", *by) if name not in statistics.columns]
    if missing or not target or n_sets < 1:
        raise ValueError(
            f"matching needs a column {missing[0]!r}; see matching_statistics."
            if missing
            else "give a target and n_sets >= 1."
        )
    place = {pair: i for i, pair in enumerate(zip(statistics["layer"], statistics["neuron"], strict=True))}
    unknown = [pair for pair in target if pair not in place]
    if unknown:
        raise ValueError(f"no neuron {unknown[0]} in the table of statistics.")
    layer, neuron = statistics["layer"].to_numpy(), statistics["neuron"].to_numpy()
    values = statistics[list(by)].to_numpy(dtype=float)
    free = np.ones(len(layer), dtype=bool)
    free[[place[pair] for pair in {*target, *exclude} if pair in place]] = False
    rng = np.random.default_rng(seed)
    chosen = np.empty((n_sets, len(target)), dtype=int)
    exact, start = 0, 0
    for own_layer in sorted({pair[0] for pair in target}):
        members = np.flatnonzero(layer == own_layer)
        decile = np.argsort(np.argsort(values[members], axis=0, kind="stable"), axis=0) * 10 // len(members)
        pool = np.flatnonzero(free[members])
        wanted = decile[np.searchsorted(members, [place[pair] for pair in target if pair[0] == own_layer])]
        if len(pool) < len(wanted):
            raise ValueError(
                f"layer {own_layer} has {len(pool)} neurons besides the {len(wanted)} of the target: take fewer, or exclude fewer."
            )
        distance = np.abs(wanted[:, None] - decile[pool][None]).sum(axis=-1)
        for number in range(n_sets):
            left = distance.astype(float) + rng.random(len(pool)) / 2  # ties are broken at random
            for row in rng.permutation(len(wanted)):
                pick = int(left[row].argmin())
                exact += int(distance[row, pick] == 0)
                chosen[number, start + row] = members[pool[pick]]
                left[:, pick] = math.inf
        start += len(wanted)
    sets = tuple(tuple((int(layer[i]), int(neuron[i])) for i in own) for own in chosen)
    ratios = values[chosen.ravel()].mean(axis=0) / values[[place[pair] for pair in target]].mean(axis=0)
    return Controls(sets, exact / chosen.size, dict(zip(by, ratios.tolist(), strict=True)))
