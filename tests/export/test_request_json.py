"""Requests of EasySteer and vllm-lens: fields, numbers, and the hash of the content."""

from __future__ import annotations

import base64
import hashlib
import json

import numpy as np
import pytest
import torch
from helpers.interventions import steering_vector

from workbench.export.request_json import easysteer_request, vllm_lens_request
from workbench.models.sites import Site
from workbench.steering.interventions import add_vector, raise_to

SITE = Site(2, "resid_post")


def numbers(data: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data), dtype="<f4")


def test_easysteer_gets_each_blocks_direction_with_the_strength_in_it(family_model):
    model = family_model("llama3")
    v, w = steering_vector(model, SITE, 0), steering_vector(model, Site(1, "resid_post"), 1)
    request = json.loads(json.dumps(easysteer_request([add_vector(v, 2.0), add_vector(w, 1.0)])))
    assert set(request) == {"steering"}
    (vector,) = request["steering"]["vectors"]
    assert (vector["algorithm"], vector["scale"], vector["normalize"]) == ("direct", 1.0, False)
    assert vector["layers"] == [1, 2]
    assert vector["apply"] == {"prompt": "all", "generation": "all"}
    data = vector["data"]
    assert (data["version"], data["kind"], data["extra"]) == (1, "direction", {})
    np.testing.assert_array_equal(numbers(data["tensors"]["layer.2"]["data"]), v.vector.numpy() * 2)
    np.testing.assert_array_equal(numbers(data["tensors"]["layer.1"]["data"]), w.vector.numpy())
    assert data["tensors"]["layer.1"]["shape"] == [32]


def test_easysteers_hash_is_of_kind_names_shapes_and_bytes(family_model):
    """By its definition in EasySteer: version 1, names in order, shapes as Python writes them."""
    v = steering_vector(family_model("llama3"), SITE)
    data = easysteer_request([add_vector(v, 1.0)])["steering"]["vectors"][0]["data"]
    expected = hashlib.sha256(b"direction:1" + b"layer.2" + b"(32,)" + v.vector.numpy().tobytes())
    assert data["sha256"] == expected.hexdigest()


def test_easysteer_holds_which_tokens_are_steered(family_model):
    v = steering_vector(family_model("llama3"), SITE)
    clauses = {
        ("all", None): {"prompt": "all", "generation": "all"},
        ("prompt", None): {"prompt": "all"},
        ("generated", None): {"generation": "all"},
        ("all", 6): {"prompt": "all", "generation_window": [0, 6]},
        ("generated", 6): {"generation_window": [0, 6]},
        ("all", 0): {"prompt": "all"},
    }
    for (positions, until), clause in clauses.items():
        change = [add_vector(v, 1.0, positions=positions, until=until)]
        (vector,) = easysteer_request(change)["steering"]["vectors"]
        assert vector["apply"] == clause
    both = [add_vector(v, 1.0, positions="prompt"), add_vector(v, 2.0, until=4)]
    steering = easysteer_request(both)["steering"]
    assert [vector["apply"] for vector in steering["vectors"]] == [
        clauses["all", 6] | {"generation_window": [0, 4]},
        clauses["prompt", None],
    ]
    assert steering["conflict"] == "sequential"  # both are added, and not the first alone
    with pytest.raises(ValueError, match=r"steers no token"):
        easysteer_request([add_vector(v, 1.0, positions="generated", until=0)])


def test_vllm_lens_gets_a_text_with_one_vector_of_all_blocks(family_model):
    model = family_model("llama3")
    v, w = steering_vector(model, SITE, 0), steering_vector(model, Site(1, "resid_post"), 1)
    request = vllm_lens_request([add_vector(v, 2.0), add_vector(w, -1.0)])
    assert set(request) == {"vllm_xargs"}
    (vector,) = json.loads(request["vllm_xargs"]["apply_steering_vectors"])
    assert vector["layer_indices"] == [1, 2]
    assert (vector["scale"], vector["norm_match"], vector["position_indices"]) == (1.0, False, None)
    assert vector["activations"]["shape"] == [2, 32]
    rows = numbers(vector["activations"]["data"]).reshape(2, 32)
    np.testing.assert_array_equal(rows, torch.stack([-w.vector, v.vector * 2]).numpy())


def test_what_they_cannot_hold_is_refused(family_model):
    model = family_model("llama3")
    v, inside = steering_vector(model, SITE), steering_vector(model, Site(1, "attn_out"))
    for request in (easysteer_request, vllm_lens_request):
        with pytest.raises(ValueError, match=r"L1\.attn_out is inside one"):
            request([add_vector(inside, 1.0)])
        with pytest.raises(ValueError, match=r"\(RaiseTo\) depends on the activation"):
            request([raise_to(v, 1.0)])
        with pytest.raises(ValueError, match=r"falls \(decay='sqrt'\)"):
            request([add_vector(v, 1.0, decay="sqrt")])
        with pytest.raises(ValueError, match=r"nothing to export"):
            request([])
    with pytest.raises(ValueError, match=r"export it as easysteer"):
        vllm_lens_request([add_vector(v, 1.0, until=3)])
