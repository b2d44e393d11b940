"""Edits in 16 bit: computed in float32 and rounded once, whatever was rounded before."""

from __future__ import annotations

import pytest
import torch
from helpers.interventions import padded, run, steering_vector

from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.neurons.silencing import AffineEdit
from workbench.steering.apply import Steering, intervene
from workbench.steering.interventions import (
    AblateDirection,
    AddVector,
    ClampNeurons,
    RaiseTo,
    ScaleNeurons,
    add_vector,
)

HALF = (torch.bfloat16, torch.float16)
D = 256


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


UNIT = torch.nn.functional.normalize(noise(1, D), dim=0)
KEEP = (noise(2, D) > 0).float() * 0.3
EDITS = {
    "add": AddVector(0.013 * noise(3, D), 1.7),
    "add, norm kept": AddVector(0.9 * noise(3, D), 1.7, keep_norm=True),
    "ablate": AblateDirection(UNIT, 0.2),
    "raise": RaiseTo(UNIT, 300.0),
    "scale": ScaleNeurons((0, 5, 200), 0.1),
    "clamp": ClampNeurons((0, 5), torch.tensor([0.1, 0.2])),
    "affine": AffineEdit(KEEP, 0.01 * noise(4, D)),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_the_float32_edit_rounded_once(name, dtype):
    activation = (7 * noise(0, 3, 4, D)).to(dtype)
    edited = EDITS[name](activation)
    assert edited.dtype == dtype
    assert torch.equal(edited, EDITS[name](activation.float()).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_what_a_gate_reads_is_the_mean_over_all_words(dtype):
    """A thousand ones sum to 256 in bfloat16: their mean must be one."""
    content = torch.ones(1, 1000, dtype=torch.bool)
    steering = Steering(prompt_length=1000, content=content, new=1000)
    read = steering.read(torch.ones(1, 1000, 2, dtype=dtype), "content")
    assert read.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("dtype", HALF)
def test_vectors_are_added_to_a_model_in_16_bit_as_to_its_own_activations(tiny_path, dtype):
    model = load_model(tiny_path, dtype=dtype)
    site = Site(1, "resid_post")
    vectors = [steering_vector(model, site, seed, scale=0.02) for seed in range(2)]
    tokens, mask = padded([6, 4], "left")
    _, plain = run(model, [], tokens, mask, [site])
    _, steered = run(model, [add_vector(v, 1.0) for v in vectors], tokens, mask, [site])
    total = vectors[0].vector + vectors[1].vector
    expected = (plain[site].float() + total).to(dtype)
    is_token = mask.bool()
    assert torch.equal(steered[site][is_token], expected[is_token])
    assert steered[site].dtype == dtype
    with torch.no_grad(), intervene(model, [add_vector(vectors[0], 1.0).for_rows([1])]):
        assert model(tokens, attention_mask=mask).dtype == dtype
