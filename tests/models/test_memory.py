"""Weights that are mapped from a file leave memory, and come back as they were."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import workbench.models.packing as packing_module
from workbench.models.fingerprints import _summary
from workbench.models.memory import drop_pages, free_memory
from workbench.models.packing import pack_linears, unpacked

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells of pages")
SHAPE = (600, 1000)


@pytest.fixture
def mapped(tmp_path) -> torch.Tensor:
    torch.manual_seed(0)
    save_file({"weight": torch.randn(SHAPE)}, tmp_path / "weights.safetensors")
    with safe_open(str(tmp_path / "weights.safetensors"), framework="pt") as file:
        return file.get_tensor("weight")


def pages_in_memory(tensor: torch.Tensor) -> int:
    first = -(-tensor.data_ptr() // 4096)
    n = (tensor.data_ptr() + 4 * tensor.numel()) // 4096 - first
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        entries = pagemap.read(8 * n)
    return sum(entries[8 * i + 7] >> 7 for i in range(n))


@linux
def test_pages_of_a_file_are_dropped_and_the_values_stay(mapped) -> None:
    before = mapped.clone()
    assert pages_in_memory(mapped) > 500
    assert drop_pages(mapped)
    assert pages_in_memory(mapped) == 0
    assert torch.equal(mapped, before)


def test_what_was_written_or_never_of_a_file_stays_in_memory(mapped) -> None:
    mapped[300] = 7.0
    changed = mapped.clone()
    for values in (mapped, changed, mapped[:, ::2], torch.ones(3), torch.ones(3, device="meta")):
        assert not drop_pages(values)
    assert torch.equal(mapped, changed)


@linux
def test_a_packed_model_holds_its_weights_once(mapped) -> None:
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    layer.weight = nn.Parameter(mapped, requires_grad=False)
    x = torch.randn(4, SHAPE[1])
    plain = layer(x)
    assert pages_in_memory(layer.weight) > 500
    if not pack_linears(layer, "on").packed:
        pytest.skip("this torch or processor has no packed product")
    assert pages_in_memory(layer.weight) == 0
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-4)
    assert pages_in_memory(layer.weight) == 0
    with unpacked(layer):
        assert torch.equal(layer(x), plain)
        assert pages_in_memory(layer.weight) > 500
    assert pages_in_memory(layer.weight) == 0
    with torch.no_grad():
        layer.weight[0] = 0.0  # the plain weight can be written to as ever
    assert not layer(x)[:, 0].any()


def test_where_memory_is_short_nothing_is_packed(monkeypatch) -> None:
    monkeypatch.setattr(packing_module, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(packing_module, "free_memory", lambda: 5 * 48 * 96 - 1)
    found = pack_linears(nn.Linear(48, 96), "auto")
    assert not found.packed
    assert "memory is short" in found.reason


@linux
def test_free_memory_is_some_of_the_machines() -> None:
    free = free_memory()
    assert free is not None
    assert 2**20 < free < 2**50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_bits_of_a_weight_are_summed_in_parts_to_the_same(monkeypatch, dtype) -> None:
    values = (torch.randn(70, 33) * 50).to(dtype)
    whole = _summary("weight", values)
    monkeypatch.setattr("workbench.models.fingerprints.PART", 100)
    assert _summary("weight", values) == whole
    bits = values.flatten().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.itemsize])
    assert f"|{int(bits.sum(dtype=torch.int64))}|".encode() in whole
