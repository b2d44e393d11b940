"""What makes a GPU wait: reads of single values in the decode loop.

They are counted on the CPU, where each of them is the same operator.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.gates import ALWAYS, gate, through, vector
from helpers.tiny_models import sentences
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.generation import _decode_loop as decoding
from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import add_vector

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero")


class Waits(TorchDispatchMode):
    """Counts operators that need a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        if any(wait in name for wait in WAITS):
            self.count[name] += 1
        return operator(*args, **(kwargs or {}))


def prompts(n: int = 4) -> list[Prompt]:
    return [
        Prompt(f"q{i}", text, None, "fraud", "unsafe", "test")
        for i, text in enumerate(sentences(n, seed=4))
    ]


@pytest.mark.parametrize("steering", ["none", "vector", "gated", "sampled"])
def test_a_decoding_step_reads_no_value_back_to_the_host(tiny, steering, monkeypatch):
    begin = decoding.DecodeLoop.__init__

    def as_on_a_gpu(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.look_every = 1000

    monkeypatch.setattr(decoding.DecodeLoop, "__init__", as_on_a_gpu)
    interventions = {
        "vector": [add_vector(vector(tiny), rho=0.1)],
        "gated": through(tiny, gate(tiny, ALWAYS)),
    }.get(steering, [])
    counts = []
    for n in (3, 3, 11):  # the first time what is checked once a model is counted too
        with Waits() as waits:
            sweep(
                tiny,
                prompts(),
                {"a": interventions},
                decoding=Decoding(max_new_tokens=n, temperature=0.7 * (steering == "sampled")),
            )
        counts.append(waits.count)
    assert counts[1] == counts[2]


def test_a_batch_of_extraction_reads_no_more_values_for_more_layers(tiny):
    counts = []
    for sites in (
        [Site(0, "resid_post")],
        [Site(0, "resid_post")],
        [Site(i, k) for i in (0, 1) for k in ("resid_post", "attn_out", "mlp_post")],
    ):
        with Waits() as waits:
            cache_activations(tiny, prompts(), sites)
        counts.append(waits.count)
    assert counts[1] == counts[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_device_and_dtype_are_arguments_that_count(tiny_path, dtype):
    from workbench.models.load import load_model

    model = load_model(tiny_path, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert (
        cache_activations(model, prompts(), Site(0, "resid_post"))[
            Site(0, "resid_post")
        ].values.dtype
        == torch.float32
    )
