"""The libraries that vectors travel to read the files themselves (``make test-travel``).

Each test is left out where its library is not installed: they are in an environment of their own.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.exported import IDS, import_file, plain, steered
from helpers.gguf_files import write_gguf
from helpers.hugging_face import plain_model
from helpers.interventions import steering_vector
from helpers.llama_cpp import LlamaCpp, has_llama_cpp

from workbench.export.control_vectors import export_gguf
from workbench.export.python_libraries import export_lm_eval, export_steering_vectors
from workbench.export.request_json import vllm_lens_request
from workbench.models.sites import Site
from workbench.steering.foreign_vectors import import_vectors
from workbench.steering.interventions import add_vector

SITES = (Site(1, "resid_post"), Site(2, "resid_post"))
INSIDE = (Site(2, "attn_out"), Site(3, "mlp_out"))


def change_of(model, sites=SITES):
    return [
        add_vector(steering_vector(model, site, seed), 1.5 - seed)
        for seed, site in enumerate(sites)
    ]


def repeng():
    if not hasattr(np, "float_"):  # repeng 0.4 names what NumPy 2 has dropped
        setattr(np, "float_", np.float64)  # noqa: B010 - the linter would rename it
    return pytest.importorskip("repeng", reason="make test-travel installs repeng")


def test_repeng_reads_our_file_and_steers_as_workbench(family_model, family_path, tmp_path):
    library = repeng()
    model, hf_model = family_model("llama3"), plain_model(family_path("llama3"))
    change = change_of(model, (Site(0, "resid_post"), *SITES))
    export_gguf(tmp_path / "v.gguf", change, model_type="llama", reader="repeng")
    vector = library.ControlVector.import_gguf(tmp_path / "v.gguf")
    wrapped = library.ControlModel(hf_model, sorted(vector.directions))
    wrapped.set_control(vector, 1.0)
    torch.testing.assert_close(plain(wrapped), steered(model, change), rtol=1e-4, atol=1e-4)


def test_workbench_reads_repengs_file_and_steers_as_repeng(family_model, family_path, tmp_path):
    library = repeng()
    model, hf_model = family_model("llama3"), plain_model(family_path("llama3"))
    directions = {n: np.random.default_rng(n).normal(size=32).astype("f4") for n in (1, 3)}
    vector = library.ControlVector(model_type="llama", directions=directions)
    vector.export_gguf(tmp_path / "v.gguf")
    back = import_vectors(tmp_path / "v.gguf", model, sign="unsafe_to_safe")
    wrapped = library.ControlModel(hf_model, [1, 3])
    wrapped.set_control(vector, 0.8)
    expected = plain(wrapped)
    change = [add_vector(one, 0.8) for one in back.values()]
    torch.testing.assert_close(steered(model, change), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "gpt2", "gemma2"])
def test_steering_vectors_builds_its_objects(family, family_model, family_path, tmp_path):
    pytest.importorskip("steering_vectors", reason="make test-travel installs steering-vectors")
    model, hf_model = family_model(family), plain_model(family_path(family))
    change = change_of(model, (*SITES, *INSIDE))
    export_steering_vectors(tmp_path / "v.safetensors", change, model)
    with import_file(tmp_path / "v.py").applied(hf_model):
        torch.testing.assert_close(plain(hf_model), steered(model, change), rtol=1e-4, atol=1e-4)


def test_lm_evals_steered_model_reads_the_file(family_model, family_path, tmp_path):
    hf_steered = pytest.importorskip(
        "lm_eval.models.hf_steered", reason="make test-travel installs lm-eval"
    )
    model = family_model("llama3")
    change = change_of(model, (*SITES, *INSIDE))
    export_lm_eval(tmp_path / "v.pt", change, model)
    theirs = hf_steered.SteeredModel(
        pretrained=str(family_path("llama3")),
        steer_path=str(tmp_path / "v.pt"),
        device="cpu",
        dtype="float32",
    )
    logits = theirs._model_call(torch.tensor([list(IDS)]))[0]
    torch.testing.assert_close(logits, steered(model, change), rtol=1e-4, atol=1e-4)


def test_vllm_lens_reads_our_request(family_model):
    types = pytest.importorskip(
        "vllm_lens._helpers.types", reason="vllm-lens needs Python 3.12 and vLLM"
    )
    model = family_model("llama3")
    request = vllm_lens_request(change_of(model))
    (row,) = json.loads(request["vllm_xargs"]["apply_steering_vectors"])
    vector = types.SteeringVector.model_validate(row)
    assert vector.layer_indices == [1, 2]
    for site, one in zip(SITES, change_of(model), strict=True):
        added = vector.scale * vector.activations[vector.layer_index_map[site.layer]]
        torch.testing.assert_close(added, one.edit.multiplier * one.edit.vector)


@pytest.mark.skipif(not has_llama_cpp(), reason="make test-travel installs llama.cpp")
def test_llama_cpp_steers_as_workbench_at_each_block(family_model, family_path, tmp_path):
    model = family_model("llama2")
    llama = LlamaCpp(write_gguf(family_path("llama2"), tmp_path / "model.gguf"))
    plainly = llama.logits(IDS)
    # llama.cpp computes attention in 16 bit, so that its logits differ a little without steering
    torch.testing.assert_close(plainly, steered(model, []), rtol=0, atol=0.02)
    for layer in (1, 2, 3):
        for multiplier in (1.5, -1.5):
            vector = steering_vector(model, Site(layer, "resid_post"), layer)
            change = [add_vector(vector, multiplier)]
            export_gguf(tmp_path / "v.gguf", change)
            llama.set_control_vector(tmp_path / "v.gguf")
            expected = steered(model, change)
            assert (expected - plainly).abs().max() > 0.5
            torch.testing.assert_close(llama.logits(IDS), expected, rtol=0, atol=0.02)
    llama.set_control_vector(None)
    torch.testing.assert_close(llama.logits(IDS), plainly, rtol=0, atol=1e-5)
