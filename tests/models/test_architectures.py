"""Architectures off the beaten track compute what Hugging Face's models compute, or are refused."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from helpers.architectures import (
    activation_error,
    answers_are_equal,
    listed_architectures,
    questions,
    steered_answers_are_equal,
    tiny_architecture,
)

from workbench.models.load import _nothing_installed, hooked

ATTENTION = ["FalconForCausalLM", "BloomForCausalLM", "OPTForCausalLM", "GPTNeoForCausalLM"]
EXPERTS = ["MixtralForCausalLM", "GptOssForCausalLM", "GlmMoeDsaForCausalLM"]
STATES = [
    "RwkvForCausalLM",
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "FalconH1ForCausalLM",
    "Lfm2ForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3NextForCausalLM",
    "JambaForCausalLM",
]


@cache
def built(name: str) -> tuple[Any, Any]:
    """The hooked model, and the same one in Hugging Face's hands."""
    hf_model, tokenizer = tiny_architecture(name)
    alone = copy.deepcopy(hf_model)
    return hooked(hf_model, tokenizer, name), alone


@pytest.mark.parametrize("name", [*ATTENTION, *EXPERTS, *STATES])
def test_activations_are_those_of_hugging_face(name: str) -> None:
    assert activation_error(*built(name), questions()) < 1e-4


@pytest.mark.parametrize("name", [*ATTENTION, *EXPERTS, *STATES])
def test_a_batch_answers_like_each_prompt_alone_in_hugging_face(name: str) -> None:
    assert answers_are_equal(*built(name), questions())


@pytest.mark.parametrize("name", [*ATTENTION, *EXPERTS, *STATES])
def test_steering_acts_as_a_hook_on_hugging_faces_block(name: str) -> None:
    assert steered_answers_are_equal(*built(name), questions())


def test_every_architecture_tried_here_is_listed_by_transformerlens() -> None:
    assert {*ATTENTION, *EXPERTS, *STATES} <= set(listed_architectures())


def test_loading_a_model_that_also_sees_installs_nothing(monkeypatch) -> None:
    def install(*_: Any, **__: Any) -> None:
        raise AssertionError("pip was run")

    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    monkeypatch.setattr(subprocess, "check_call", install)
    helpers = pytest.importorskip("transformer_lens.model_bridge.sources.transformers.helpers")
    before = helpers._ensure_torchvision
    with _nothing_installed():
        assert helpers._ensure_torchvision() is False
    assert helpers._ensure_torchvision is before
