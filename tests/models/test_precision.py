"""dtype="auto": the checkpoint's own, or for a large model on the processor what is faster."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from workbench.models import precision as precision_module
from workbench.models.load import load_model, load_notes, model_info
from workbench.models.precision import choose_precision, count_weights


@pytest.fixture
def measured(monkeypatch) -> list[Any]:
    """Let every model count as large, and say what is measured."""
    asked: list[Any] = []
    monkeypatch.setattr(precision_module, "LARGE", 0)

    def gain(shapes: Any, products: Any) -> float:
        asked.append(shapes)
        for pairs in products().values():
            for exact, rough in pairs:  # the two products are one and the same
                found, wanted = rough().float(), exact()
                assert (found - wanted).norm() < 0.02 * wanted.norm()
        return gains.pop(0)

    gains = [4.0, 0.8]
    monkeypatch.setattr(precision_module, "known_gain", gain)
    return asked


def test_a_large_model_is_read_in_what_is_faster_here(tiny_path, measured, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="workbench"):
        found = [load_model(tiny_path, device="cpu", dtype="auto") for _ in range(2)]
    assert [model_info(model).dtype for model in found] == ["bfloat16", "float32"]
    assert measured == [["bfloat16", 32, 64]] * 2
    reasons = [load_notes(model).to_dict() for model in found]
    assert [notes["bfloat16_gain"] for notes in reasons] == [4.0, 0.8]
    assert "4.00 times as long in float32" in reasons[0]["dtype_reason"]
    assert "is read in bfloat16 (its product takes 4.00 times" in caplog.text
    json.dumps(reasons, allow_nan=False)


def test_others_keep_the_checkpoints_own(tiny_path, monkeypatch) -> None:
    config = AutoConfig.from_pretrained(tiny_path)
    small = choose_precision(config, on_processor=True)
    assert (small.dtype, "weights" in small.reason) == (None, True)
    monkeypatch.setattr(precision_module, "LARGE", 0)
    assert choose_precision(config, on_processor=False).dtype is None
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert choose_precision(config, on_processor=True).dtype is None


def test_what_was_asked_for_is_not_measured(tiny_path, measured) -> None:
    model = load_model(tiny_path, device="cpu", dtype="bfloat16")
    assert measured == []
    notes = load_notes(model)
    assert (notes.precision.dtype, notes.precision.reason) == (torch.bfloat16, "as asked for")
    assert notes.to_dict()["packed"] is False


def test_weights_are_counted_without_being_made(tiny_path) -> None:
    counted = count_weights(AutoConfig.from_pretrained(tiny_path))
    made = AutoModelForCausalLM.from_pretrained(tiny_path)
    assert counted == sum(p.numel() for p in made.parameters())
