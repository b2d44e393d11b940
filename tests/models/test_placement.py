"""Where weights go and in which precision: dtype, device maps, offloaded and quantised weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import sentences
from torch._subclasses.fake_tensor import FakeTensorMode

from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.fingerprints import fingerprint
from workbench.models.hooked_model import input_device, quantization
from workbench.models.load import ModelInfo, hooked, load_model, model_info
from workbench.models.packing import is_packed, pack_linears, unpacked
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.safesteer.config import RunConfig, config_from
from workbench.safesteer.inputs import load_run_model
from workbench.steering._site_edits import compiled
from workbench.steering.apply import GateState, Steering
from workbench.steering.interventions import (
    AblateDirection,
    AddVector,
    ClampNeurons,
    Intervention,
    RaiseTo,
    ScaleNeurons,
)

IDS = torch.tensor([[9, 40, 41, 60, 7, 88, 120, 33]])
WITHOUT_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is None
offloads = pytest.mark.skipif(
    version("transformer-lens").startswith("3."),
    reason="TransformerLens 3 refuses weights on disk",
)
needs_bitsandbytes = pytest.mark.skipif(
    WITHOUT_BITSANDBYTES, reason="bitsandbytes is an extra: pip install 'workbench[quantized]'"
)


def prompts(n: int = 5) -> list[Prompt]:
    return [
        Prompt(f"q{i}", text, None, "fraud", "unsafe", "test")
        for i, text in enumerate(sentences(n, seed=4))
    ]


def refusal(*args: Any, **keywords: Any) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_model(*args, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_is_the_dtype_of_the_checkpoint(tiny_path, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = getattr(torch, dtype)
    AutoModelForCausalLM.from_pretrained(tiny_path, dtype=wanted).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model_info(model).dtype == dtype
    assert model(IDS).dtype == wanted
    assert model_info(load_model(tmp_path, device="cpu")).dtype == "float32"


def test_auto_reads_the_weights_where_the_config_does_not_say(tiny_path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_path, tmp_path / "silent")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    assert model_info(load_model(folder, device="cpu", dtype="auto")).dtype == "float16"


# Device maps


SPREAD = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.rotary_emb": "cpu",
}


@pytest.fixture(scope="module")
def offloaded(family_path) -> Any:
    """The tiny Llama with some layers on disk: their weights are brought here for each pass."""
    places = {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    return load_model(family_path("llama3"), device_map={**SPREAD, **places})


@offloads
def test_a_device_map_says_where_layers_go(tiny, offloaded) -> None:
    places = {
        name.split(".layers.")[1][0]: parameter.device.type
        for name, parameter in offloaded.original_model.named_parameters()
        if ".layers." in name
    }
    assert places == {"0": "cpu", "1": "meta", "2": "meta", "3": "cpu"}
    with torch.no_grad():
        torch.testing.assert_close(offloaded(IDS), tiny(IDS), rtol=0, atol=1e-5)


@offloads
def test_weights_on_disk_have_the_fingerprint_of_those_here(tiny, offloaded) -> None:
    assert model_info(offloaded).fingerprint == model_info(tiny).fingerprint


def test_a_model_without_values_has_a_fingerprint_of_names_and_shapes(tiny_path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    empty.tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    assert len(fingerprint(empty)) == 16


@offloads
def test_activations_and_steered_answers_do_not_depend_on_where_layers_lie(tiny, offloaded) -> None:
    from workbench.steering.interventions import add_vector
    from workbench.steering.vectors import random_vector

    sites = [Site(layer, kind) for layer in (0, 1, 3) for kind in ("resid_post", "mlp_post", "z")]
    here, there = (cache_activations(model, prompts(), sites) for model in (tiny, offloaded))
    for site in sites:
        torch.testing.assert_close(there[site].values, here[site].values, rtol=0, atol=1e-5)
    from helpers.gates import vector

    steering = {"a": [add_vector(random_vector(vector(tiny), seed=0), rho=0.2)], "b": []}
    answers = [
        [c.tokens for c in sweep(model, prompts(), steering, decoding=Decoding(max_new_tokens=8))]
        for model in (tiny, offloaded)
    ]
    assert answers[0] == answers[1]


def test_weights_on_disk_are_hooked_or_refused_in_one_line(tiny_path) -> None:
    places = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    if version("transformer-lens").startswith("3."):
        message = refusal(tiny_path, device_map={**SPREAD, **places})
        assert "unsupported offload targets: ['disk']" in message
    else:
        assert load_model(tiny_path, device_map={**SPREAD, **places})(IDS).isfinite().all()


def test_a_string_lets_accelerate_choose(tiny, tiny_path) -> None:
    model = load_model(tiny_path, device_map="auto", max_memory={"cpu": "1GiB"})
    assert {p.device.type for p in model.parameters()} <= {"cpu", "cuda", "mps"}
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).cpu(), tiny(IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("keywords", "message"), [
    ({"device": "cpu", "device_map": "auto"}, "give either device or device_map, not both."),
    ({"max_memory": {0: "1GiB"}}, "max_memory needs device_map, such as device_map='auto'."),
    ({"device_map": "atuo"}, "unknown device_map 'atuo'; allowed: auto, balanced, "),
    ({"device_map": {"": "toaster"}}, "cannot load 'tiny-llama3' ("),
    ({"device_map": {"": "meta"}}, "device_map holds 'meta', where weights have no values"),
    ({"quantize": "3bit"}, "unknown way to quantize '3bit'; allowed: 8bit, 4bit, int8, or nothin"),
    ({"quantize": "int8", "device_map": "auto"}, "quantize='int8' is for device='cpu'; elsewhere"),
])  # fmt: skip
def test_a_placement_that_cannot_be_is_one_line(tiny_path, keywords: dict, message: str) -> None:
    assert message in refusal(tiny_path, **keywords)


@offloads
def test_inputs_go_to_the_embedding(tiny, offloaded, tiny_path) -> None:
    assert input_device(tiny) == torch.device("cpu")
    assert input_device(offloaded) == torch.device("cpu")
    places = dict.fromkeys((*SPREAD, *(f"model.layers.{i}" for i in range(4))), "cpu")
    on_disk = load_model(tiny_path, device_map={**places, "model.embed_tokens": "disk"})
    assert next(on_disk.embed.parameters()).device.type == "meta"
    assert input_device(on_disk) == torch.device("cpu")
    with torch.no_grad():
        torch.testing.assert_close(on_disk(IDS), tiny(IDS), rtol=0, atol=1e-5)


@offloads
def test_a_model_that_was_placed_is_not_moved_and_not_packed(tiny_path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    places = {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}
    placed = AutoModelForCausalLM.from_pretrained(tiny_path, device_map={**SPREAD, **places})

    def moved(*_: object, **__: object) -> None:
        raise AssertionError("it was moved")

    monkeypatch.setattr(type(placed), "to", moved)
    model = hooked(placed, AutoTokenizer.from_pretrained(tiny_path), "placed", packing="on")
    assert not is_packed(model)


@offloads
def test_packing_leaves_alone_what_accelerate_has_put_in_a_layers_place(offloaded) -> None:
    hf_model = offloaded.original_model
    with torch.no_grad():
        before = hf_model(IDS).logits
    assert not is_packed(hf_model)
    pack_linears(hf_model, "off")
    with unpacked(hf_model), torch.no_grad():
        torch.testing.assert_close(hf_model(IDS).logits, before, rtol=0, atol=0)


# Several devices: fake tensors know theirs, and refuse to be mixed


EDITS = {
    "add": lambda d: AddVector(torch.ones(d), 2.0),
    "ablate": lambda d: AblateDirection(torch.eye(d)[0]),
    "raise": lambda d: RaiseTo(torch.eye(d)[0], 1.0),
    "scale": lambda d: ScaleNeurons((1, 2), 0.0),
    "clamp": lambda d: ClampNeurons((1, 2), torch.ones(2)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("gated", [False, True])
def test_edits_masks_and_gates_follow_the_activation_to_its_device(
    tiny, edit: str, positions: Any, gated: bool
) -> None:
    from dataclasses import replace

    from helpers.gates import ALWAYS, gate

    n_rows, n, d = 3, 6, 32
    site, through = Site(3, "resid_post"), gate(tiny, ALWAYS)
    one = Intervention(site, EDITS[edit](d), positions, rows=(0, 2))
    two = Intervention(site, EDITS[edit](d), positions)
    if gated:
        category = through.categories[0]
        one, two = (replace(i, gate=through, gate_category=category) for i in (one, two))
    apply = compiled([one, two])
    mask = torch.ones(n_rows, n, dtype=torch.bool)
    mask[0, 0] = False
    steering = Steering(prompt_length=4, new=n, mask=mask, content=mask)
    scores = torch.ones(n_rows, len(through.categories))
    steering.gates[through] = GateState(scores, scores)
    there = torch.ones(n_rows, n, d, device="meta", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="device"):
        there + torch.ones(n_rows, n, d)  # the device that is imitated refuses to be mixed
    edited = apply(there, steering)
    read, last = steering.read(there, "content"), steering.read(there, "last")
    assert {t.device.type for t in (edited, read, last)} == {"meta"}
    assert (edited.shape, edited.dtype) == (there.shape, torch.bfloat16)


def test_rows_of_a_cache_are_taken_on_the_device_of_each_layer() -> None:
    from transformers import DynamicCache

    from workbench.models.forward import rows_of_cache

    cache = DynamicCache()
    with FakeTensorMode():  # tensors of devices that are not here
        for layer in range(2):
            held = torch.zeros(3, 2, 4, 8, device=f"cuda:{layer}")
            cache.update(held, held, layer)
        rows = rows_of_cache(cache, torch.zeros(5, dtype=torch.long, device="cuda:0"))
    assert [len(layer.keys) for layer in rows.layers] == [5, 5]
    assert [str(layer.values.device) for layer in rows.layers] == ["cuda:0", "cuda:1"]


# Quantised weights


def test_quantizing_without_bitsandbytes_says_what_to_install(tiny_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert (
        refusal(tiny_path, quantize="4bit")
        == "quantize='4bit' needs the package bitsandbytes; run 'pip install "
        '"workbench[quantized]"\', or leave it out.'
    )


@pytest.fixture
def wide_path(tiny_path, tmp_path: Path) -> Path:
    """A Llama whose rows are as long as a block of 4-bit weights (64)."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@needs_bitsandbytes
@pytest.mark.parametrize(("quantize", "says"), [("8bit", "8-bit"), ("4bit", "4-bit")])
def test_a_quantised_model_is_read_cached_steered_and_told_from_the_whole_one(
    wide_path: Path, quantize: Any, says: str
) -> None:
    whole = load_model(wide_path, device="cpu")
    model = load_model(wide_path, device="cpu", quantize=quantize, packing="on")
    assert {p.element_size() for p in model.parameters()} == {1, 4}
    info = model_info(model)
    assert info.quantization == f"bitsandbytes {says}"
    assert info.dtype == "float32"
    assert info.fingerprint != model_info(whole).fingerprint
    again = load_model(wide_path, device="cpu", quantize=quantize)
    assert model_info(again) == info
    assert not is_packed(model)
    site = Site(1, "resid_post")
    cache_activations(model, prompts(), site)  # bitsandbytes lays its weights out at the first pass
    assert model_info(model) == info
    rough, exact = (cache_activations(m, prompts(), site)[site].values for m in (model, whole))
    relative = (rough - exact).norm(dim=1) / exact.norm(dim=1)
    assert 1e-4 < relative.max() < 0.5  # quantised, and still the same model
    alone = torch.cat([cache_activations(model, [p], site)[site].values for p in prompts()])
    torch.testing.assert_close(rough, alone, rtol=0, atol=0.02 * float(alone.abs().max()))
    answers = sweep(model, prompts(), {"a": []}, decoding=Decoding(max_new_tokens=6))
    assert all(answer.tokens for answer in answers)


@needs_bitsandbytes
def test_the_scales_of_quantised_weights_count_in_the_fingerprint(tiny_path) -> None:
    model = load_model(tiny_path, device="cpu", quantize="4bit")
    before = model_info(model).fingerprint
    packed = next(
        m for m in model.original_model.modules() if type(m).__name__ == "Linear4bit"
    ).weight
    packed.quant_state.absmax = packed.quant_state.absmax * 2
    next(model.parameters()).add_(0.0)  # the hash is kept until a parameter is written to
    assert model_info(model).fingerprint != before


@needs_bitsandbytes
def test_what_is_quantised_already_is_not_quantised_again(tiny_path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    AutoModelForCausalLM.from_pretrained(
        tiny_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path)
    assert "is quantised already (bitsandbytes 4-bit); leave out quantize." in refusal(
        tmp_path, quantize="8bit"
    )
    again = load_model(tmp_path, device="cpu")
    assert model_info(again).quantization == "bitsandbytes 4-bit"


@pytest.mark.parametrize(("config", "says"), [
    ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
    ({"quant_method": "fp8"}, "fp8"),
    ({}, "unknown method"),
])  # fmt: skip
def test_how_weights_are_packed_is_said_in_words(config: dict, says: str) -> None:
    class Config:
        quantization_config = config

    assert quantization(Config()) == says
    assert quantization(None) is None


def test_a_description_says_how_weights_are_packed_only_where_they_are() -> None:
    plain = ModelInfo("a", None, 1, 2, 3, 4, "float32", "raw", "0" * 16)
    assert "quantization" not in plain.to_dict()
    assert ModelInfo(**plain.to_dict()) == plain
    packed = ModelInfo("a", None, 1, 2, 3, 4, "float32", "raw", "0" * 16, "gptq 4-bit")
    assert ModelInfo(**packed.to_dict()) == packed


# Settings of a run


def test_a_run_places_its_model_as_its_settings_say(tiny_path, monkeypatch) -> None:
    from workbench.safesteer import inputs

    asked: dict[str, Any] = {}
    monkeypatch.setattr(inputs, "load_model", lambda name, **keywords: asked.update(keywords))
    config = config_from(
        {
            "dtype": "auto",
            "quantize": "4bit",
            "device_map": "auto",
            "max_memory": {0: "20GiB", "cpu": "60GiB"},
        }
    )
    load_run_model(config)
    assert (asked["dtype"], asked["quantize"], asked["device_map"]) == ("auto", "4bit", "auto")
    assert asked["max_memory"] == {0: "20GiB", "cpu": "60GiB"}
    assert config == config_from(json.loads(json.dumps(vars(config))))
    load_run_model(RunConfig())
    assert asked["max_memory"] is None


@pytest.mark.parametrize(("settings", "message"), [
    ({"quantize": "2bit"}, "quantize must be 8bit, 4bit or int8, or nothing, got '2bit'."),
    ({"device": "cpu", "device_map": "auto"}, "give either device or device_map, not both."),
    ({"max_memory": ["0=1GiB"]}, "max_memory needs device_map, such as auto."),
    ({"device_map": "auto", "max_memory": ["20GiB"]}, "max_memory must be shares such as 0=20GiB"),
    ({"device_map": "auto", "max_memory": "0=20GiB"}, "max_memory must be a list"),
])  # fmt: skip
def test_settings_that_cannot_be_are_said_before_the_run(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from(settings)
