"""Sparse autoencoders are read from the files of sae-lens and Gemma Scope, and compute the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.sparse_autoencoders import (
    ARCHITECTURES,
    random_tensors,
    write_gemma_scope,
    write_sae_lens,
)

from workbench.features.sae import load_sae
from workbench.models.sites import Site

D, N, K = 12, 30, 4


def written(folder, architecture, **config):
    """Write a tiny SAE; return its folder and its weights as arrays."""
    tensors = random_tensors(architecture, D, N)
    more = {"k": K} if architecture == "topk" else {}
    write_sae_lens(folder, tensors, architecture=architecture, **more, **config)
    return folder, {name: value.double().numpy() for name, value in tensors.items()}


def by_hand(architecture, w, x, *, subtracts_bias=True):
    """Compute features of one activation, by the definition of each kind of encoder."""
    x = x - w["b_dec"] if subtracts_bias else x
    read = x @ w["W_enc"]
    if architecture == "gated":
        is_open = read + w["b_gate"] > 0
        return np.where(is_open, np.maximum(read * np.exp(w["r_mag"]) + w["b_mag"], 0), 0)
    values = read + w["b_enc"]
    if architecture == "jumprelu":
        return np.where(values > w["threshold"], np.maximum(values, 0), 0)
    if architecture == "topk":
        largest = np.argsort(-values)[:K]
        out = np.zeros_like(values)
        out[largest] = np.maximum(values[largest], 0)
        return out
    return np.maximum(values, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("subtracts_bias", [True, False])
def test_each_kind_of_encoder_computes_its_definition(tmp_path, architecture, subtracts_bias):
    folder, w = written(tmp_path / "sae", architecture, apply_b_dec_to_input=subtracts_bias)
    sae = load_sae(folder)
    assert (sae.site, sae.name, sae.n_features) == (Site(1, "resid_post"), "sae", N)
    x = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))
    features = sae.encode(x)
    for row in range(3):
        for place in range(5):
            expected = by_hand(
                architecture, w, x[row, place].double().numpy(), subtracts_bias=subtracts_bias
            )
            np.testing.assert_allclose(features[row, place].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert 0 < (features != 0).float().mean() < 1
    decoded = features.double().numpy() @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(sae.decode(features).numpy(), decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_some_features_are_computed_as_among_all(tmp_path, architecture):
    sae = load_sae(written(tmp_path / "sae", architecture)[0])
    x = torch.randn(2, 7, D)
    torch.testing.assert_close(sae.encode(x, [5, 2, 29]), sae.encode(x)[..., [5, 2, 29]])


def test_features_by_norm_write_rows_of_norm_one(tmp_path):
    folder, w = written(tmp_path / "sae", "topk", rescale_acts_by_decoder_norm=True)
    sae = load_sae(folder)
    torch.testing.assert_close(sae.written.norm(dim=1), torch.ones(N))
    x = torch.randn(D, generator=torch.Generator().manual_seed(2))
    values = (x.double().numpy() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    values = values * np.linalg.norm(w["W_dec"], axis=1)
    largest = np.argsort(-values)[:K]
    np.testing.assert_allclose(
        sae.encode(x).numpy()[largest], np.maximum(values[largest], 0), rtol=1e-4, atol=1e-5
    )


def test_gemma_scope_is_jumprelu_and_needs_a_site(tmp_path):
    tensors = random_tensors("jumprelu", D, N)
    folder = write_gemma_scope(tmp_path / "width_16k", tensors)
    with pytest.raises(ValueError, match="does not say where the SAE reads; pass site="):
        load_sae(folder)
    sae = load_sae(folder, site=Site(0, "resid_post"))
    assert sae.architecture == "jumprelu"
    assert not sae.subtracts_bias
    x = torch.randn(4, D)
    expected = by_hand(
        "jumprelu",
        {name: value.double().numpy() for name, value in tensors.items()},
        x[0].double().numpy(),
        subtracts_bias=False,
    )
    np.testing.assert_allclose(sae.encode(x)[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    same = load_sae(folder / "params.npz", site=Site(0, "resid_post"))
    assert torch.equal(same.encode(x), sae.encode(x))


def test_a_folder_of_an_earlier_sae_lens_is_read(tmp_path):
    tensors = random_tensors("topk", D, N)
    folder = write_sae_lens(tmp_path / "old", tensors)
    config = {
        "hook_point": "blocks.0.hook_resid_pre",
        "d_in": D,
        "d_sae": N,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    sae = load_sae(folder)
    assert (sae.site, sae.architecture, sae.k) == (Site(0, "resid_pre"), "topk", K)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not read here"),
        ({"architecture": ["standard"]}, "is not read here"),
        ({"activation_fn": "tanh-relu"}, "'standard with tanh-relu' is not read here"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' is not"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor=True is not"),
        ({"hook_name": "blocks.0.attn.hook_q"}, "no site is read at 'blocks.0.attn.hook_q'"),
        ({"architecture": "topk"}, "does not say k"),
        ({"architecture": "topk", "k": 99}, "k must be from 1 to the 30 features, got 99"),
        ({"architecture": "jumprelu"}, "has no threshold, which a jumprelu SAE needs"),
    ],
)
def test_what_is_not_computed_here_is_refused_in_one_line(tmp_path, config, said):
    folder = write_sae_lens(tmp_path / "sae", random_tensors("standard", D, N), **config)
    with pytest.raises(ValueError, match=said) as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_together_are_refused(tmp_path):
    tensors = random_tensors("standard", D, N)
    folder = write_sae_lens(tmp_path / "sae", {**tensors, "b_enc": torch.zeros(N + 1)})
    with pytest.raises(ValueError, match="b_enc must be"):
        load_sae(folder)
    write_sae_lens(folder, {**tensors, "b_dec": torch.full((D,), torch.nan)})
    with pytest.raises(ValueError, match="b_dec must be"):
        load_sae(folder)
    write_sae_lens(folder, {**tensors, "scaling_factor": torch.full((N,), 2.0)})
    with pytest.raises(ValueError, match="scaling_factor is not computed here"):
        load_sae(folder)
    write_sae_lens(folder, tensors)
    with pytest.raises(ValueError, match=r"reads L1\.resid_post, got site=L0"):
        load_sae(folder, site=Site(0, "resid_post"))


def test_a_pickle_in_place_of_weights_is_not_read(tmp_path):
    folder = write_sae_lens(tmp_path / "sae", random_tensors("standard", D, N))
    torch.save({"W_enc": torch.zeros(2)}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="a pickle"):
        load_sae(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("subtracts_bias", [True, False])
def test_sae_lens_computes_the_same(tmp_path, architecture, subtracts_bias):
    sae_lens = pytest.importorskip("sae_lens")
    folder, _ = written(tmp_path / "sae", architecture, apply_b_dec_to_input=subtracts_bias)
    theirs, ours = sae_lens.SAE.load_from_disk(folder), load_sae(folder)
    x = torch.randn(4, 6, D, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), features)
        torch.testing.assert_close(ours.decode(features), theirs.decode(features))
