"""Steering as biases of a checkpoint: transformers loads it with workbench's logits."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.exported import plain, steered
from helpers.hugging_face import plain_model
from helpers.interventions import steering_vector
from helpers.tiny_models import tiny_model
from safetensors import safe_open

from workbench.export.baked_weights import bake_weights
from workbench.models.load import load_model, model_info
from workbench.models.sites import Site
from workbench.steering.interventions import add_vector, raise_to

CAN = {
    "llama3": ("attn_out", "mlp_out", "resid_post", "resid_pre"),  # biases made by two flags
    "gpt2": ("attn_out", "resid_post"),  # biases that are there
    "pythia": ("attn_out", "resid_post"),  # attention and MLP side by side
}


@pytest.mark.parametrize("family", CAN)
def test_a_baked_checkpoint_has_workbenchs_logits(family, family_model, family_path, tmp_path):
    model = family_model(family)
    change = [
        add_vector(steering_vector(model, Site(2, kind), seed), 1.5)
        for seed, kind in enumerate(CAN[family])
    ]
    exported = bake_weights(tmp_path / "baked", change, family_path(family))
    expected = steered(model, change)
    logits = plain(plain_model(tmp_path / "baked"))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - plain(plain_model(family_path(family)))).abs().max() > 0.1
    assert exported.files == (tmp_path / "baked",)
    record = json.loads((tmp_path / "baked" / "steering.json").read_text())
    assert record["fingerprint"] == model_info(model).fingerprint
    assert list(tmp_path.iterdir()) == [tmp_path / "baked"]  # no half-written folder is left


def test_tied_embeddings_stay_tied_and_other_weights_as_they_are(tmp_path):
    source = tiny_model("llama3", tmp_path / "tied", tie_word_embeddings=True)
    model = load_model(source, device="cpu")
    change = [add_vector(steering_vector(model, Site(1, "resid_post")), 2.0)]
    bake_weights(tmp_path / "baked", change, source)
    baked, before = plain_model(tmp_path / "baked"), plain_model(source)
    assert baked.config.tie_word_embeddings
    assert baked.lm_head.weight.data_ptr() == baked.model.embed_tokens.weight.data_ptr()
    with safe_open(tmp_path / "baked" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    old = dict(before.named_parameters())
    for name, value in baked.named_parameters():
        if name in old:
            assert torch.equal(value, old[name]), name
        elif name != "model.layers.1.mlp.down_proj.bias":
            assert not value.any(), name
    torch.testing.assert_close(plain(baked), steered(model, change), rtol=1e-4, atol=1e-4)


def test_a_baked_checkpoint_is_loaded_and_steered_on(tmp_path, family_model, family_path):
    model = family_model("llama3")
    change = [add_vector(steering_vector(model, Site(2, "resid_post")), 1.0)]
    bake_weights(tmp_path / "baked", change, family_path("llama3"))
    again = load_model(tmp_path / "baked", device="cpu")
    torch.testing.assert_close(steered(again, []), steered(model, change), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"fitted on"):  # it is another model now
        steered(again, change)


def test_16_bit_weights_stay_16_bit(tmp_path, family_path):
    model = load_model(family_path("llama3"), dtype="bfloat16", device="cpu", packing="off")
    change = [add_vector(steering_vector(model, Site(2, "attn_out")), 1.0)]
    bake_weights(tmp_path / "baked", change, family_path("llama3"))
    with safe_open(tmp_path / "baked" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_an_architecture_without_the_bias_is_refused_with_what_can(
    tmp_path, family_model, family_path
):
    qwen = family_model("qwen2")  # whose projections have no bias, whatever its configuration says
    change = [add_vector(steering_vector(qwen, Site(1, "resid_post")), 1.0)]
    with pytest.raises(
        ValueError, match=r"'qwen2' without a bias at .*down_proj.*as pytorch, gguf"
    ):
        bake_weights(tmp_path / "baked", change, family_path("qwen2"))
    gemma = family_model("gemma2")  # whose MLP has a norm behind it
    change = [add_vector(steering_vector(gemma, Site(1, "resid_post")), 1.0)]
    with pytest.raises(ValueError, match=r"a norm or something else stands behind"):
        bake_weights(tmp_path / "baked", change, family_path("gemma2"))
    assert not list(tmp_path.iterdir())


def test_what_is_no_constant_is_refused_before_a_model_is_read(tmp_path, family_model):
    v = steering_vector(family_model("llama3"), Site(1, "resid_post"))
    for change in (add_vector(v, 1.0, keep_norm=True), raise_to(v, 2.0)):
        with pytest.raises(ValueError, match=r"a checkpoint holds constant vectors.*pytorch"):
            bake_weights(tmp_path / "baked", [change], "no/such-model")
    with pytest.raises(ValueError, match=r"steers every token.*easysteer"):
        bake_weights(tmp_path / "baked", [add_vector(v, 1.0, positions="prompt")], "no/such-model")
    (tmp_path / "baked").mkdir()
    with pytest.raises(ValueError, match=r"there already"):
        bake_weights(tmp_path / "baked", [add_vector(v, 1.0)], "no/such-model")


def test_the_embedding_is_refused_because_it_may_be_tied(tmp_path, family_model, family_path):
    v = steering_vector(family_model("llama3"), Site(0, "resid_pre"))
    with pytest.raises(ValueError, match=r"L0\.resid_pre is the embedding, which may be tied"):
        bake_weights(tmp_path / "baked", [add_vector(v, 1.0)], family_path("llama3"))


def test_a_vector_of_another_model_is_refused(tmp_path, family_model, family_path):
    v = steering_vector(family_model("mistral"), Site(1, "resid_post"))
    with pytest.raises(ValueError, match=r"fitted on"):
        bake_weights(tmp_path / "baked", [add_vector(v, 1.0)], family_path("llama3"))
