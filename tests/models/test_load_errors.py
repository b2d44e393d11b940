"""What cannot be loaded is one line of ValueError that says what was found and what to do."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.files.hints import one_line
from workbench.generation.answers import generate
from workbench.judges._checkpoints import read_checkpoint as read_judge
from workbench.models import checkpoints
from workbench.models.activations import cache_activations
from workbench.models.load import load_model, model_info
from workbench.models.sites import Site


def refusal(*args: Any, **keywords: Any) -> str:
    """The message with which load_model refuses; it must be one line."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_model(*args, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def copy_of(source: Path, folder: Path, **config: object) -> Path:
    """A copy of a checkpoint, with other values in its config.json."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# Folders that are no checkpoint


def test_a_folder_without_config_says_so(tiny_path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "bare")
    (folder / "config.json").unlink()
    assert "cannot load 'bare' (it has no config.json)" in refusal(folder)


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    for name in ("b-Q4.gguf", "a-Q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "give one of its files: a-Q8.gguf, b-Q4.gguf." in refusal(tmp_path)


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_says_what_it_belongs_to(tiny_path, tmp_path: Path, beside_a_model) -> None:
    folder = tmp_path / "lora"
    if beside_a_model:
        shutil.copytree(tiny_path, folder)
    folder.mkdir(exist_ok=True)
    card = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (folder / "adapter_config.json").write_text(json.dumps(card))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    message = refusal(folder)
    assert "it is an adapter of 'Llama-3.2-1B', not a whole model" in message
    assert "merge_and_unload" in message


def test_a_checkpoint_of_pickles_says_how_to_make_another(tiny_path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "old")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "its weights are pickles (pytorch_model.bin)" in message
    assert "save_pretrained" in message


def test_a_shard_that_is_missing_is_named(tiny_path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "shards")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of its weight files are missing (model-00002.safetensors)" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json holds no JSON object" in refusal(folder)


def test_a_folder_without_weights_or_words_says_so(tiny_path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "light")
    (folder / "model.safetensors").unlink()
    assert "there are no weights in it" in refusal(folder)
    folder = shutil.copytree(tiny_path, tmp_path / "mute")
    for file in folder.glob("token*"):
        file.unlink()
    assert refusal(folder).startswith("cannot load 'mute' (")


def test_a_file_or_nothing_is_no_model(tiny_path, monkeypatch) -> None:
    monkeypatch.chdir(tiny_path)  # "" as a path would be this folder
    assert refusal("").startswith("no model ''; give a hub name, a local folder, a .gguf file")
    assert "is a file that is no .gguf; give the folder it lies in" in refusal(
        tiny_path / "model.safetensors"
    )


def test_the_home_folder_is_found(tiny_path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(tiny_path, tmp_path / "models" / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert model_info(load_model("~/models/mine", device="cpu")).name == "mine"
    assert refusal("~/models/mine/a.gguf").startswith("no model file '~/models/mine/a.gguf'")
    assert "home directory" in refusal("~no-such-user-at-all/mine")


# Configurations that cannot be


@pytest.mark.parametrize("content", [
    "", "[]", "3", "null", "{}", '{"model_type": 3}', '{"model_type": null}',
    '{"model_type": "llama", "num_hidden_layers": "four"}',
    '{"model_type": "llama", "num_hidden_layers": -1}',
    '{"model_type": "llama", "hidden_size": null}',
    '{"model_type": "llama", "num_attention_heads": 0}',
    '{"model_type": "llama", "rope_parameters": "fast"}',
    '{"model_type": "llama", "rope_parameters": {"rope_type": "sideways"}}',
    '{"model_type": "llama", "hidden_act": "no_such_function"}',
    '{"model_type": "llama", "dtype": "float99"}',
    '{"model_type": "no_such_type"}',
    '{"model_type": "bert"}',
    '{"model_type": "clip"}',
    "[" * 100_000,
    "\xff\xfe",
])  # fmt: skip
def test_a_config_that_cannot_be_is_refused(tiny_path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "odd")
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert refusal(folder, device="cpu").startswith("cannot load 'odd'")


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"model": 3}', '{"eos_token": 3}'])
def test_damage_beside_the_weights_is_one_line_or_none(
    tiny_path, tmp_path: Path, file: str, content: str
) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "odd")
    (folder / file).write_text(content)
    problem = ""
    try:
        load_model(folder, device="cpu")
    except ValueError as error:
        problem = str(error)
    assert problem == "" or problem.startswith("cannot load 'odd'")
    assert "\n" not in problem


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1000, -1])
def test_weights_that_are_cut_off_are_refused(tiny_path, tmp_path: Path, cut: int) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:cut])
    assert refusal(folder, device="cpu").startswith("cannot load 'cut' (")


def test_an_architecture_without_an_adapter_is_refused_before_weights_are_read(
    tiny_path, tmp_path: Path, monkeypatch
) -> None:
    folder = copy_of(
        tiny_path, tmp_path / "rare", model_type="biogpt", architectures=["BioGptForCausalLM"]
    )
    (folder / "model.safetensors").write_bytes(b"never read")
    message = refusal(folder)
    assert "TransformerLens does not support its architecture (BioGptForCausalLM)" in message


@pytest.mark.parametrize("quantization", [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "group_size": 128},
    {"quant_method": "no_such_method"},
    {"quant_method": 3},
    {"bits": 4},
    "4bit",
])  # fmt: skip
def test_weights_that_are_not_packed_as_the_config_says_are_refused(
    tiny_path, tmp_path: Path, quantization: Any
) -> None:
    folder = copy_of(tiny_path, tmp_path / "packed", quantization_config=quantization)
    assert refusal(folder, device="cpu").startswith("cannot load 'packed' (")


@pytest.mark.parametrize("error", [
    IndexError("list index out of range"), AttributeError("no attribute"), KeyError("model_type"),
    ImportError("needs gptqmodel"), struct.error("unpack requires 8 bytes"), TypeError("a list"),
    json.JSONDecodeError("Expecting value", "x", 0), MemoryError(), RecursionError("too deep"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), AssertionError(),
    NotImplementedError("not on this device\nand more"), ZeroDivisionError("division by zero"),
])  # fmt: skip
def test_whatever_a_library_raises_is_one_line(tiny_path, monkeypatch, error: Exception) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    message = refusal(tiny_path, device="cpu")
    assert message.startswith(f"cannot load 'tiny-llama3' ({one_line(error)}); ")
    with pytest.raises(ValueError, match="cannot load 'tiny-llama3' ") as caught:
        read_judge("AutoModelForCausalLM", tiny_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_ctrl_c_while_loading_is_no_error_of_the_model(tiny_path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_model(tiny_path, device="cpu")


def test_one_line_names_the_kind_of_error_where_the_words_say_little() -> None:
    assert one_line(KeyError("model_type")) == "KeyError: 'model_type'"
    assert one_line(ValueError("bad  header.\nsecond line")) == "bad header"
    assert one_line(ZeroDivisionError()) == "ZeroDivisionError"
    assert len(one_line(ValueError("x" * 5000))) < 400


def test_what_helps_depends_on_the_error() -> None:
    assert "unquantised checkpoint" in checkpoints._what_to_do(ImportError(), "a")
    assert "device_map='auto'" in checkpoints._what_to_do(MemoryError(), "a")
    assert "GGUF" in checkpoints._what_to_do(OSError(), "org/model-GGUF")


def test_the_command_line_ends_in_one_line(tiny_path, tmp_path: Path, capsys) -> None:
    from workbench.cli import main

    folder = copy_of(tiny_path, tmp_path / "packed", quantization_config={"quant_method": "gptq"})
    assert main(["run", "--model", str(folder), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("workbench: cannot load 'packed' (")
    assert said.count("\n") == 1


def test_weights_that_the_model_does_not_use_are_named(tiny_path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_path, tmp_path / "biased")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    weights[name] = torch.ones(32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=rf"1 weights of the checkpoint are not used \({name}"):
        load_model(folder, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tiny_path, device="cpu")


def test_weights_of_another_shape_are_named_with_both(tiny_path, tmp_path: Path) -> None:
    folder = copy_of(tiny_path, tmp_path / "wide", intermediate_size=80)
    said = refusal(folder)
    assert "mlp.down_proj.weight has shape (32, 64), its config.json wants (32, 80)" in said


@pytest.mark.parametrize(("keywords", "said"), [
    ({"device_map": {}}, "device_map must be one of auto"),
    ({"device_map": 3}, "device_map must be one of auto"),
    ({"device_map": "auto", "max_memory": "1GiB"}, "max_memory must be a mapping"),
    ({"device": "meta"}, "device 'meta' cannot be used here"),
])  # fmt: skip
def test_a_place_that_is_none_is_said(tiny_path, keywords: dict[str, Any], said: str) -> None:
    assert said in refusal(tiny_path, **keywords)


def test_what_is_no_model_is_told_from_one(tiny_path) -> None:
    with pytest.raises(TypeError, match="given by its name or path, got 5"):
        load_model(5)
    for call in (generate, cache_activations):
        with pytest.raises(TypeError, match=r"a hooked model is needed, got str; wb.load_model"):
            call(str(tiny_path), ["hi"], Site(1, "resid_post") if call is not generate else ())
