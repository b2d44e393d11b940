"""Weights of eight bits: close to the whole model, and said to be what they are."""

from __future__ import annotations

import pytest
import torch
from helpers.activation_sets import PROMPTS
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.errors import CannotBeDone
from workbench.models.int8 import METHOD, ROWS, Int8Linear, quantize_linears
from workbench.models.load import load_model, load_notes, model_info
from workbench.models.packing import is_packed
from workbench.models.sites import Site
from workbench.models.trusted_paths import untrusted_paths
from workbench.neurons.attribution import output_matrix
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import fit_steering_vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (2, 5), (ROWS + 9,), (0,)])
@pytest.mark.parametrize("width", [63, 96])
def test_a_layer_gives_the_product_with_its_rounded_weight(dtype, bias, shape, width) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(width, 97, bias=bias).to(dtype)
    layer, x = Int8Linear(linear), torch.randn(*shape, width).to(dtype)
    rounded = layer.weight.double() * layer.scale.double()[:, None]
    step = linear.weight.double().abs().amax(dim=1, keepdim=True) / 127
    error = (rounded - linear.weight.double()).abs()
    assert bool((error <= step * (0.51 if dtype == torch.float32 else 1.01)).all())
    wanted = nn.functional.linear(x.double(), rounded, linear.bias.double() if bias else None)
    with torch.no_grad():
        found = layer(x)
    assert (found.dtype, found.shape) == (dtype, wanted.shape)
    close = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=close)


def test_a_row_of_zeros_stays_zero_and_gradients_go_through() -> None:
    linear = nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        linear.weight[1] = 0
    layer, x = Int8Linear(linear), torch.randn(2, 8, requires_grad=True)
    y = layer(x)
    assert not y[:, 1].any()
    y.sum().backward()
    torch.testing.assert_close(
        x.grad[0], (layer.weight * layer.scale[:, None]).sum(dim=0), rtol=1e-5, atol=1e-6
    )


def test_a_model_of_eight_bits_is_cached_steered_and_told_from_the_whole_one(tiny_path) -> None:
    whole = load_model(tiny_path, device="cpu")
    model = load_model(tiny_path, device="cpu", quantize="int8", packing="on")
    info, site = model_info(model), Site(2, "resid_post")
    assert (info.quantization, info.dtype) == (METHOD, "float32")
    assert info.fingerprint != model_info(whole).fingerprint
    assert model_info(load_model(tiny_path, device="cpu", quantize="int8")) == info
    assert not is_packed(model)
    assert untrusted_paths(model) == {}
    assert load_notes(model).packing.packed is False
    kinds = {type(part) for part in model.original_model.lm_head.modules()}
    assert nn.Linear in kinds
    assert Int8Linear not in kinds
    rough, exact = (cache_activations(m, PROMPTS, site)[site] for m in (model, whole))
    relative = (rough.values - exact.values).norm(dim=1) / exact.values.norm(dim=1)
    assert 1e-4 < relative.max() < 0.05
    steering = {"fraud": [add_vector(fit_steering_vectors(rough)["fraud"], rho=0.1)]}
    answers = sweep(
        model, PROMPTS[:4], {"a": [], "b": steering}, decoding=Decoding(max_new_tokens=4)
    )
    assert all(answer.tokens for answer in answers)
    with pytest.raises((CannotBeDone, NotImplementedError), match="packed"):
        output_matrix(model, Site(0, "mlp_post"))


def test_a_model_without_linear_layers_is_refused() -> None:
    hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="has no linear layers to quantise; leave out quantize"):
        quantize_linears(hf_model)
