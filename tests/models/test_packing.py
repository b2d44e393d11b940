"""Packed linear layers: the same numbers, and given up where they cannot be used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import workbench.models.packing as packing_module
from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.forward import plain
from workbench.models.load import load_model
from workbench.models.packing import is_packed, pack_linears, unpacked
from workbench.models.sites import Site
from workbench.prompts.prompt import load_prompts, select_prompts
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import fit_steering_vectors


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 32, bias=False))


def supported():
    return pack_linears(network(), "on").packed


@pytest.fixture
def packed():
    if not supported():
        pytest.skip("this torch or processor has no packed product")
    model = network()
    assert pack_linears(model, "on").n_layers == 2
    return model


@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (3, 5, 48), (2, 1, 48)])
def test_packed_layers_give_the_same_numbers(packed, shape):
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.allclose(packed(x), network()(x), rtol=1e-5, atol=1e-5)


def test_gradients_go_through_the_plain_product(packed):
    x, y = torch.randn(4, 48), torch.randn(4, 48, requires_grad=True)
    packed(x).sum().backward()
    packed(y).sum().backward()
    assert packed[0].weight.grad is not None
    assert y.grad is not None


def test_a_weight_that_was_written_to_counts(packed):
    x, plain_model = torch.randn(4, 48), network()
    with torch.no_grad():
        for model in (packed, plain_model):
            model[0].weight[3] = 7.0
            model[2].weight = nn.Parameter(torch.ones(32, 96))
        assert torch.allclose(packed(x), plain_model(x), rtol=1e-5, atol=1e-4)


def test_other_inputs_fall_back(packed):
    with torch.no_grad():
        assert packed(torch.randn(0, 48)).shape == (0, 32)
    twice = copy.deepcopy(network()).double()
    assert not pack_linears(twice, "on").packed
    with pytest.raises(ValueError, match="choices: auto, on, off"):
        pack_linears(network(), "yes")


def test_it_is_switched_off_and_on_again(packed):
    assert is_packed(packed)
    with unpacked(packed):
        assert not is_packed(packed)
    assert is_packed(packed)
    assert not pack_linears(packed, "off").packed
    assert not is_packed(packed)


def test_small_models_are_not_measured():
    found = pack_linears(network(), "auto")
    assert not found.packed
    assert "too small" in found.reason


def test_where_it_is_no_faster_or_wrong_or_missing_nothing_is_packed(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path))
    monkeypatch.setattr(packing_module, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(packing_module, "_gain", lambda _: 0.9)
    if supported():
        found = pack_linears(network(), "auto")
        assert (found.packed, found.gain) == (False, 0.9)
        monkeypatch.setattr(packing_module, "_gain", lambda _: 3.0)
        assert (
            pack_linears(network(), "auto").gain == 0.9
        )  # measured once on this machine, then remembered
        monkeypatch.setattr(packing_module, "_close", lambda *_: False)
        assert "other numbers" in pack_linears(network(), "on").reason

    def missing(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(packing_module, "_packed", missing)
    assert "no packed product" in pack_linears(network(), "on").reason


@pytest.mark.slow
def test_the_fast_routes_and_the_plain_ones_agree_on_the_real_model(real_model):
    model = load_model("embedded", device="cpu", packing="on")
    prompts = select_prompts(
        load_prompts(), label=["unsafe", "neutral"], category=["fraud", "harmless"], limit=6
    )
    site = Site(15, "resid_post")
    fast = cache_activations(model, prompts, site)[site]
    with plain(model):
        assert not is_packed(model)
        slow = cache_activations(model, prompts, site)[site]
    relative = (fast.values - slow.values).norm(dim=1) / slow.values.norm(dim=1)
    assert relative.max() < 1e-5
    steering = {"fraud": [add_vector(fit_steering_vectors(slow)["fraud"], rho=0.1)]}
    conditions = {"unsteered": (), "steered": steering}
    quick = sweep(model, prompts, conditions, decoding=Decoding(max_new_tokens=12))
    with plain(model):
        slowly = sweep(model, prompts, conditions, decoding=Decoding(max_new_tokens=12))
    assert [c.tokens for c in quick] == [c.tokens for c in slowly]
