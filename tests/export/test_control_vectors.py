"""GGUF control vectors and .svec files: their numbers, their layers, and the way back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from helpers.exported import steered
from helpers.gates import gate
from helpers.interventions import steering_vector

from workbench.export.additions import constant_additions
from workbench.export.control_vectors import export_gguf, export_svec
from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.steering.foreign_vectors import import_vectors
from workbench.steering.interventions import add_vector, gated, raise_to

WRITERS = {"v.gguf": export_gguf, "v.svec": export_svec}


def change_of(model):
    """Steer at two blocks; a block's input is the output of the one before."""
    return [
        add_vector(steering_vector(model, Site(1, "resid_post"), 0), 1.5),
        add_vector(steering_vector(model, Site(3, "resid_pre"), 1), -0.5),
        add_vector(steering_vector(model, Site(2, "resid_post"), 2), rho=0.3),
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_comes_back_as_the_same_steering(name, family_model, tmp_path):
    model = family_model("llama3")
    change = change_of(model)
    exported = WRITERS[name](tmp_path / name, change, model_type="llama")
    back = import_vectors(exported.files[0], model, sign="unsafe_to_safe")
    assert list(back) == [Site(1, "resid_post"), Site(2, "resid_post")]
    again = [add_vector(vector, 1.0) for vector in back.values()]
    torch.testing.assert_close(steered(model, again), steered(model, change), rtol=1e-4, atol=1e-4)


def test_gguf_has_llama_cpps_names_types_and_keys(family_model, tmp_path):
    model = family_model("llama3")
    v = steering_vector(model, Site(2, "resid_post"))
    export_gguf(tmp_path / "v.gguf", [add_vector(v, 2.0)], model_type="llama")
    reader = GGUFReader(tmp_path / "v.gguf")
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name, tuple(tensor.shape)) == (
        "direction.2",
        "F32",
        (32,),
    )
    np.testing.assert_array_equal(tensor.data, (v.vector * 2).numpy())  # the strength is in it
    fields = {name: reader.get_field(name).contents() for name in reader.fields if "." in name}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 1
    assert fields["workbench.sign"] == "from unsafe to safe"
    assert fields["workbench.fingerprint"] == model_info(model).fingerprint


def test_svec_has_the_fields_that_its_readers_ask_for(family_model, tmp_path):
    model = family_model("llama3")
    v = steering_vector(model, Site(0, "resid_post"))
    export_svec(tmp_path / "v.svec", [add_vector(v, 1.0)], model_type="llama")
    data = json.loads((tmp_path / "v.svec").read_text())
    assert data["model_type"] == "llama"
    assert data["meta"]["location"] == "layer_output"
    assert data["explained_variances"] == {}
    np.testing.assert_allclose(data["directions"]["0"], v.vector, rtol=1e-6)
    with pytest.raises(ValueError, match=r"read as \.svec, got 'v\.json'"):
        export_svec(tmp_path / "v.json", [add_vector(v, 1.0)])


def test_an_svec_of_block_inputs_comes_in_at_inputs(family_model, tmp_path):
    model = family_model("llama3")
    row = np.ones(32).tolist()
    content = {
        "model_type": "llama",
        "directions": {"2": [row]},
        "meta": {"location": "layer_input"},
    }
    (tmp_path / "v.svec").write_text(json.dumps(content))
    assert list(import_vectors(tmp_path / "v.svec", model, sign="unsafe_to_safe")) == [
        Site(2, "resid_pre")
    ]
    content["meta"]["location"] = "elsewhere"
    (tmp_path / "v.svec").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"location 'elsewhere'.*layer_output, layer_input"):
        import_vectors(tmp_path / "v.svec", model, sign="unsafe_to_safe")


def test_an_svec_with_a_vector_per_position_is_refused(family_model, tmp_path):
    rows = np.ones((3, 32)).tolist()
    (tmp_path / "v.svec").write_text(json.dumps({"model_type": "x", "directions": {"2": rows}}))
    with pytest.raises(ValueError, match=r"L2\.resid_post has shape \(3, 32\)"):
        import_vectors(tmp_path / "v.svec", family_model("llama3"), sign="unsafe_to_safe")


def test_block_0_is_for_repeng_and_not_for_llama_cpp(family_model, tmp_path):
    change = [add_vector(steering_vector(family_model("llama3"), Site(0, "resid_post")), 1.0)]
    with pytest.raises(ValueError, match=r"llama\.cpp refuses a control vector of block 0"):
        export_gguf(tmp_path / "v.gguf", change)
    export_gguf(tmp_path / "v.gguf", change, reader="repeng")
    assert GGUFReader(tmp_path / "v.gguf").tensors[0].name == "direction.0"
    with pytest.raises(ValueError, match=r"unknown reader 'other'"):
        export_gguf(tmp_path / "v.gguf", change, reader="other")


@pytest.mark.parametrize("name", WRITERS)
def test_what_they_cannot_hold_is_refused_with_what_can(name, family_model, tmp_path):
    model, write, path = family_model("llama3"), WRITERS[name], tmp_path / name
    v = steering_vector(model, Site(1, "resid_post"))
    inside = steering_vector(model, Site(1, "attn_out"))
    embedding = steering_vector(model, Site(0, "resid_pre"))
    refused = {
        r"L1\.attn_out is inside one: export it as pytorch, lm-eval": [add_vector(inside, 1.0)],
        r"L0\.resid_pre is the embedding: export it as pytorch": [add_vector(embedding, 1.0)],
        r"\(keeps norms\) depends on the activation: export it as pytorch": [
            add_vector(v, 1.0, keep_norm=True)
        ],
        r"\(RaiseTo\) depends on the activation": [raise_to(v, 1.0)],
        r"steers every token, .*until=4: export it as easysteer": [add_vector(v, 1.0, until=4)],
        r"cannot hold the gate": gated({"fraud": [add_vector(v, 1.0)]}, gate(model)),
        r"what is added at L1\.resid_post is zero": [add_vector(v, 1.0), add_vector(v, -1.0)],
    }
    for message, change in refused.items():
        with pytest.raises(ValueError, match=message):
            write(path, change)
    assert not path.exists()


def test_vectors_of_two_models_are_not_put_into_one_file(family_model):
    change = [
        add_vector(steering_vector(family_model(family), Site(1, "resid_post")), 1.0)
        for family in ("llama3", "mistral")
    ]
    with pytest.raises(ValueError, match=r"belong to 2 \('tiny-llama3', 'tiny-mistral'\)"):
        constant_additions(change, "a file")


def test_notes_say_the_strength_and_the_model(family_model, tmp_path):
    exported = export_gguf(tmp_path / "v.gguf", change_of(family_model("llama3")))
    text = " ".join(exported.notes)
    for words in ("scale 1", "from unsafe to safe", "does not follow the norm", "'tiny-llama3'"):
        assert words in text
