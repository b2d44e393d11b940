"""Matched controls: same layers, same deciles while there are any, nothing of the target."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.neurons.silencing import matched_controls


def table_of(n_layers: int, d_mlp: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    layer, neuron = np.divmod(np.arange(n_layers * d_mlp), d_mlp)
    values = rng.lognormal(size=(n_layers * d_mlp, 3))
    return pd.DataFrame(
        {
            "layer": layer,
            "neuron": neuron,
            "mean_abs": values[:, 0],
            "sd": values[:, 1],
            "write": values[:, 2],
        }
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 5))
def test_controls_have_the_targets_layers_and_nothing_of_the_target(
    seed: int, size: int, n_sets: int
) -> None:
    table = table_of(3, 100, seed)
    rng = np.random.default_rng(seed)
    target = [divmod(int(i), 100) for i in rng.permutation(300)[:size]]
    banned = [divmod(int(i), 100) for i in rng.permutation(300)[:20]]
    controls = matched_controls(table, target, n_sets=n_sets, seed=seed, exclude=banned)
    assert len(controls.sets) == n_sets
    for members in controls.sets:
        assert len(set(members)) == size
        assert not set(members) & {*target, *banned}
        assert Counter(layer for layer, _ in members) == Counter(layer for layer, _ in target)
    assert controls == matched_controls(table, target, n_sets=n_sets, seed=seed, exclude=banned)
    assert 0 <= controls.same_cell <= 1


def test_controls_come_from_the_same_deciles_while_there_are_any() -> None:
    table = table_of(2, 1000, 0)
    decile = table.groupby("layer")["sd"].rank().sub(1).mod(1000).floordiv(100)
    target = [(0, 5), (1, 700), (1, 3)]
    controls = matched_controls(table, target, n_sets=30, by=["sd"])
    assert controls.same_cell == 1
    of = {
        (int(a), int(b)): d for a, b, d in zip(table["layer"], table["neuron"], decile, strict=True)
    }
    for members in controls.sets:
        assert sorted((layer, of[layer, n]) for layer, n in members) == sorted(
            (layer, of[layer, n]) for layer, n in target
        )
    assert len(set(controls.sets)) > 20


def test_an_exhausted_cell_is_filled_from_the_nearest_decile() -> None:
    table = pd.DataFrame({"layer": 0, "neuron": range(100), "sd": np.arange(100.0)})
    target = [(0, n) for n in range(90, 98)]  # decile 9 has two others, so six come from decile 8
    controls = matched_controls(table, target, n_sets=4, by=["sd"])
    for members in controls.sets:
        assert {98, 99} <= {n for _, n in members}
        assert sum(80 <= n < 90 for _, n in members) == 6
    assert controls.same_cell == pytest.approx(2 / 8)
    assert controls.ratios["sd"] < 1


def test_a_layer_without_enough_other_neurons_is_an_error() -> None:
    table = table_of(2, 10, 0)
    with pytest.raises(ValueError, match="layer 1 has 4 neurons besides the 6 of the target"):
        matched_controls(table, [(1, n) for n in range(6)])
    with pytest.raises(ValueError, match=r"no neuron \(5, 0\) in the table"):
        matched_controls(table, [(5, 0)])
    with pytest.raises(ValueError, match="needs a column 'write'"):
        matched_controls(table.drop(columns="write"), [(0, 0)])
    with pytest.raises(ValueError, match="give a target"):
        matched_controls(table, [])
