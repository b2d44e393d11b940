"""The real vLLM beside the local engine; ``make test-vllm`` installs it and runs this file.

One engine is alive at a time: each takes a few gigabytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model

from workbench.engines.base import EngineCannot, LocalEngine
from workbench.engines.vllm import open_vllm
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.load import load_model
from workbench.models.packaged import is_installed
from workbench.models.shell import load_shell
from workbench.models.sites import Site
from workbench.prompts.prompt import load_prompts, select_prompts
from workbench.steering.edits import AddVector, ClampNeurons, RaiseTo, ScaleNeurons
from workbench.steering.interventions import Intervention

pytest.importorskip("vllm", reason="'make test-vllm' installs vLLM and runs these tests")

MODELS = ("embedded", "qwen2.5-coder-0.5b")
DECODING = Decoding(max_new_tokens=24)
LIMITS: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 64}


@pytest.fixture(scope="module", params=MODELS)
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[Any, LocalEngine]]:
    """vLLM and the local engine, on one model in float32."""
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = load_model(request.param, device="cpu", packing="off")
    engine = open_vllm(request.param, model, **LIMITS)
    yield engine, LocalEngine(model)
    engine.close()


def questions(n: int) -> Any:
    short = [p for p in load_prompts() if len(p.text) < 90]
    return select_prompts(short, label="neutral")[:n]


def direction(model: Any, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(model.cfg.d_model, generator=generator)
    return unit / unit.norm()


_NORMS: dict[str, float] = {}


def pushed(model: Any, seed: int, **extent: Any) -> list[Intervention]:
    """Push in a random direction at half depth, by 0.4 of the norm there."""
    site, name = Site(model.cfg.n_layers // 2, "resid_post"), model.cfg.model_name
    if name not in _NORMS:
        _NORMS[name] = cache_activations(model, questions(3), site)[site].mean_norm()
    edit = AddVector(direction(model, seed), 0.4 * _NORMS[name])
    return [Intervention(site, edit, **extent)]


def texts(answers: Any) -> list[tuple[Any, ...]]:
    return [(a.condition, a.prompt.id, a.tokens, a.text, a.finish) for a in answers]


def test_extraction_equals_the_local_engine(engines) -> None:
    vllm, local = engines
    last = local.model.cfg.n_layers - 1
    sites = [Site(0, "resid_pre"), Site(3, "resid_pre"), Site(last, "resid_post")]
    sites += [Site(5, kind) for kind in ("resid_post", "attn_out", "mlp_out")]
    for span in ("content", "last", "all"):
        here = local.cache_activations(questions(9), sites, span=span)
        there = vllm.cache_activations(questions(9), sites, span=span)
        for site in sites:
            off = (there[site].values - here[site].values).norm(dim=1)
            assert float((off / here[site].values.norm(dim=1)).max()) < 1e-4, (span, site)
    moments = [one.class_moments(questions(9), sites[-1])[sites[-1]] for one in engines]
    torch.testing.assert_close(moments[0].mean, moments[1].mean, rtol=1e-3, atol=1e-3)


def conditions_of(model: Any) -> dict[str, Any]:
    site, d = Site(4, "mlp_out"), model.cfg.d_model
    everything = tuple(range(d))
    return {
        "unsteered": (),
        "add": pushed(model, 1),
        "norm kept": [Intervention(site, AddVector(direction(model, 2), 2.0, keep_norm=True))],
        "raise": [Intervention(site, RaiseTo(direction(model, 3), 1.0))],
        "scale": [Intervention(site, ScaleNeurons(everything, 0.5))],
        "suppress": [Intervention(site, ScaleNeurons(everything, 0.0))],
        "set": [Intervention(site, ClampNeurons(everything, direction(model, 4)))],
        "generated": pushed(model, 5, positions="generated"),
        "prompt": pushed(model, 6, positions="prompt"),
        "linear": pushed(model, 7, decay="linear", until=8),
        "two": [
            *pushed(model, 8),
            Intervention(Site(2, "attn_out"), AddVector(direction(model, 9))),
        ],
    }


def test_steered_greedy_text_equals_the_local_engines(engines) -> None:
    vllm, local = engines
    conditions = conditions_of(local.model)
    there = vllm.sweep(questions(3), conditions, DECODING)
    here = local.sweep(questions(3), conditions, DECODING)
    assert texts(there) == texts(here)
    changed = {a.condition for a, b in zip(there, there[:3] * len(conditions), strict=True)
               if a.tokens != b.tokens}  # fmt: skip
    assert changed >= {"add", "generated", "prompt", "linear", "two"}
    for one, other in zip(there[:3], here[:3], strict=True):
        assert one.log_probs.values == pytest.approx(other.log_probs.values, abs=1e-3)


def test_sixteen_requests_with_sixteen_vectors_equal_their_single_request_answers(engines) -> None:
    vllm, local = engines
    prompts = questions(16)
    own: dict[str, Any] = {p.id: pushed(local.model, i) for i, p in enumerate(prompts)}
    together = vllm.sweep(prompts, {"own": own}, DECODING)
    alone = [vllm.sweep([p], {"own": own[p.id]}, DECODING)[0] for p in prompts]
    assert texts(together) == texts(alone)
    plain = vllm.sweep(prompts, {"unsteered": ()}, DECODING)
    assert sum(a.tokens != b.tokens for a, b in zip(together, plain, strict=True)) >= 12
    after = vllm.sweep(prompts, {"unsteered": ()}, DECODING)
    assert texts(after) == texts(plain), "nothing is left behind"


def test_what_cannot_be_done_is_refused_before_a_request_is_made(engines) -> None:
    vllm, _ = engines
    neuron = [Intervention(Site(2, "mlp_post"), ScaleNeurons((1,), 0.0))]
    with pytest.raises(EngineCannot, match=r"cannot read or steer L2.mlp_post; engine 'local' can"):
        vllm.sweep(questions(1), {"neuron": neuron}, DECODING)
    with pytest.raises(EngineCannot, match=r"read or steer L2\.z"):
        vllm.cache_activations(questions(1), Site(2, "z"))
    with pytest.raises(EngineCannot, match="sample"):
        vllm.sweep(questions(1), {"unsteered": ()}, Decoding(temperature=1.0))


def test_two_processes_that_share_each_layer_steer_and_read_as_one(tmp_path, monkeypatch) -> None:
    # Else it wants a NUMA node for each. What vLLM has read it keeps: make test-vllm sets it, too.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    wide = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4}
    folder = tiny_model("llama3", tmp_path / "four-heads", **wide)
    local = LocalEngine(load_model(folder, device="cpu", packing="off"))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    shell = load_shell(folder, dtype="float32")
    engine = open_vllm(folder, shell, tensor_parallel_size=2, max_model_len=256)
    try:
        prompts, sites = questions(4), [Site(1, "resid_post"), Site(2, "attn_out")]
        here, there = (one.cache_activations(prompts, sites) for one in (local, engine))
        for site in sites:
            torch.testing.assert_close(there[site].values, here[site].values, rtol=1e-3, atol=1e-3)
        own: dict[str, Any] = {p.id: pushed(local.model, i) for i, p in enumerate(prompts)}
        short = Decoding(max_new_tokens=8)
        answers = [one.sweep(prompts, {"own": own}, short) for one in (local, engine)]
        assert texts(answers[0]) == texts(answers[1])
    finally:
        engine.close()
