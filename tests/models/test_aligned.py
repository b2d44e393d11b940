"""Weights that lie off the processor's lines are copied, and stay what and whose they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workbench.models import _aligned
from workbench.models._aligned import LINE, align_weights
from workbench.models.load import load_model


def off_by(n_bytes: int, values: torch.Tensor) -> nn.Parameter:
    """Put values so many bytes behind the beginning of a line."""
    size = values.element_size()
    room = torch.zeros(values.numel() + LINE // size, dtype=values.dtype)
    begin = (-room.data_ptr() % LINE + n_bytes) // size
    place = room[begin : begin + values.numel()].view(values.shape)
    place.copy_(values)
    assert place.data_ptr() % LINE == n_bytes
    return nn.Parameter(place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_off_a_line_are_copied_onto_one_and_keep_their_values(dtype: torch.dtype) -> None:
    layer, values = nn.Linear(3, 5), torch.randn(5, 3).to(dtype)
    layer.weight, layer.bias = off_by(48, values), off_by(0, values[:, 0])
    bias = layer.bias.data_ptr()
    assert align_weights(layer) == 1
    assert layer.weight.data_ptr() % LINE == 0
    assert torch.equal(layer.weight, values)
    assert layer.bias.data_ptr() == bias
    assert align_weights(layer) == 0


def test_tied_weights_stay_tied() -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    embedding.weight = off_by(16, torch.randn(5, 3))
    head.weight = nn.Parameter(embedding.weight.data)  # another parameter in the same memory
    assert align_weights(nn.ModuleList([embedding, head])) == 2
    assert embedding.weight.data_ptr() == head.weight.data_ptr()
    embedding.weight = head.weight = off_by(16, torch.randn(5, 3))
    assert align_weights(nn.ModuleList([embedding, head])) == 1
    assert embedding.weight is head.weight


@pytest.mark.parametrize("limit", ["free", "most"])
def test_weights_that_would_take_too_much_memory_twice_stay_in_their_file(
    limit: str, monkeypatch
) -> None:
    layer = nn.Linear(3, 5, bias=False)
    layer.weight = off_by(48, torch.randn(5, 3))
    n_bytes = layer.weight.numel() * 4
    with monkeypatch.context() as patch:
        if limit == "free":
            patch.setattr(_aligned, "_free_bytes", lambda: 2 * n_bytes - 1)
        else:
            patch.setattr(_aligned, "MOST_BYTES", n_bytes - 1)
        assert align_weights(layer) == 0
    assert layer.weight.data_ptr() % LINE == 48
    assert align_weights(layer) == 1


def test_a_loaded_model_has_its_weights_on_lines(family_path) -> None:
    model = load_model(family_path("qwen2"), device="cpu")
    weights = [weight for weight in model.original_model.parameters() if weight.numel()]
    assert {weight.data_ptr() % LINE for weight in weights} == {0}
    hf_model = model.original_model
    assert hf_model.get_input_embeddings().weight is hf_model.get_output_embeddings().weight
