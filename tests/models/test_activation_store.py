"""The store of activations: it never lies, and an interrupted call goes on where it was."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.activation_sets import PROMPTS, SITES, close, equal
from helpers.hugging_face import calls_of
from helpers.tiny_models import tiny_model

from workbench.models import activations as activations_module
from workbench.models import stored_rows as stored_rows_module
from workbench.models.activations import ActivationSet, cache_activations
from workbench.models.load import load_model, model_info
from workbench.models.sites import Site
from workbench.models.stored_rows import ShardFolder

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.prompts.prompt import Prompt


@pytest.fixture(scope="module")
def plainly(tiny) -> dict[Site, ActivationSet]:
    return cache_activations(tiny, PROMPTS, SITES)


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(activations_module, "SHARD", 5)


def shards_in(store: Path) -> list[Path]:
    return sorted(store.rglob("*.safetensors"))


def forward_calls(model: Any) -> Any:
    return calls_of(model.original_model.model.layers[0])


def test_a_second_call_reads_back_without_running_the_model(
    tiny, tmp_path, small_shards, plainly
) -> None:
    first = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    close(first, plainly)
    assert len(shards_in(tmp_path)) == 3
    with forward_calls(tiny) as calls:
        second = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    assert calls == []
    assert equal(first, second)
    assert [acts.prompts for acts in second.values()] == [tuple(PROMPTS)] * len(SITES)


def test_another_batch_size_reads_the_same_store(tiny, tmp_path) -> None:
    first = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    with forward_calls(tiny) as calls:
        assert equal(cache_activations(tiny, PROMPTS, SITES, store=tmp_path, batch_size=2), first)
    assert calls == []


def test_an_interrupted_call_goes_on_at_its_last_shard(
    tiny, tmp_path, small_shards, monkeypatch
) -> None:
    write, written = ShardFolder.write, []

    def write_two(shards: ShardFolder, number: int, values: dict) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(shards, number, values)

    monkeypatch.setattr(ShardFolder, "write", write_two)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    assert len(shards_in(tmp_path)) == 2
    monkeypatch.setattr(ShardFolder, "write", write)
    with forward_calls(tiny) as calls, warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    # Behind the template, only the last shard.
    assert sum(rows for rows, _ in calls[1:]) == len(PROMPTS) - 10
    close(resumed, cache_activations(tiny, PROMPTS, SITES))


@pytest.mark.parametrize("when", ["model", "tensors", "manifest"])
def test_an_exception_anywhere_leaves_a_store_that_can_go_on(
    tiny, tmp_path, small_shards, monkeypatch, when
) -> None:
    count = 0

    def fail_third(function: Any) -> Any:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            return function(*args, **keywords)

        return wrapped

    name = {"model": "span_mask", "tensors": "write_tensors", "manifest": "write_json"}[when]
    module = activations_module if when == "model" else stored_rows_module
    monkeypatch.setattr(module, name, fail_third(getattr(module, name)))
    with pytest.raises(KeyboardInterrupt):
        cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    monkeypatch.undo()
    monkeypatch.setattr(activations_module, "SHARD", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    close(found, cache_activations(tiny, PROMPTS, SITES))


def test_a_damaged_shard_is_found_and_only_it_is_computed_again(
    tiny, tmp_path, small_shards
) -> None:
    first = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    path = shards_in(tmp_path)[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # one bit of one value: still a readable file
    path.write_bytes(content)
    with (
        forward_calls(tiny) as calls,
        pytest.warns(
            UserWarning,
            match=r"activation shard shard-00001\.safetensors is missing or damaged; computing it",
        ),
    ):
        again = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    assert sum(rows for rows, _ in calls[1:]) == 5
    assert equal(first, again)
    with forward_calls(tiny) as calls:
        assert equal(cache_activations(tiny, PROMPTS, SITES, store=tmp_path), first)
    assert calls == []


def test_a_missing_shard_is_computed_again(tiny, tmp_path, small_shards) -> None:
    first = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    shards_in(tmp_path)[0].unlink()
    with pytest.warns(UserWarning, match="shard-00000"):
        assert equal(cache_activations(tiny, PROMPTS, SITES, store=tmp_path), first)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"what": {}, "shards": {}}', b'{"shards": []}', b"null"]
)
def test_a_damaged_manifest_is_said_and_begun_again(tiny, tmp_path, content: bytes) -> None:
    first = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    [manifest] = tmp_path.rglob("manifest.json")
    manifest.write_bytes(content)
    with pytest.warns(
        UserWarning,
        match=r"manifest\.json of the activations in .* is damaged; computing them again",
    ):
        assert equal(cache_activations(tiny, PROMPTS, SITES, store=tmp_path), first)
    assert json.loads(manifest.read_text())["shards"]


def test_measurements_of_another_kind_are_never_mixed(
    tiny, tiny_path, tmp_path, family_model
) -> None:
    store = tmp_path / "store"
    other_weights = load_model(tiny_model("llama3", tmp_path / "other", seed=1), device="cpu")
    half = load_model(tiny_path, device="cpu", dtype="bfloat16")
    templated = load_model(shutil.copytree(tiny_path, tmp_path / "templated"), device="cpu")
    templated.tokenizer.chat_template = templated.tokenizer.chat_template.replace(
        "assistant", "helper"
    )
    # The same but for its tokenizer.
    spelt = load_model(shutil.copytree(tiny_path, tmp_path / tiny_path.name), device="cpu")
    spelt.tokenizer = respelt(tiny_path, tmp_path / "respelt")
    calls: list[tuple[Any, list[Prompt], list[Site], dict]] = [
        (tiny, PROMPTS, SITES, {}),
        (tiny, PROMPTS[::-1], SITES, {}),
        (tiny, PROMPTS[:-1], SITES, {}),
        (tiny, [*PROMPTS[:-1], replace(PROMPTS[-1], text="Other.")], SITES, {}),
        (tiny, PROMPTS, SITES[:2], {}),
        (tiny, PROMPTS, SITES, {"span": "last"}),
        (tiny, PROMPTS, SITES, {"span": "all"}),
        (tiny, PROMPTS, SITES, {"span": "response"}),
        (tiny, [replace(p, response="No.") for p in PROMPTS], SITES, {"span": "response"}),
        (tiny, PROMPTS, SITES, {"system_prompt": "Be very kind."}),
        (tiny, PROMPTS, SITES, {"system_prompt": "Be kind."}),
        (other_weights, PROMPTS, SITES, {}),
        (half, PROMPTS, SITES, {}),
        (templated, PROMPTS, SITES, {}),
        (spelt, PROMPTS, SITES, {}),
        (family_model("qwen3"), PROMPTS, SITES, {}),
    ]  # fmt: skip
    for _ in range(2):
        for model, prompts, sites, keywords in calls:
            stored = cache_activations(model, prompts, sites, store=store, **keywords)
            assert equal(stored, cache_activations(model, prompts, sites, **keywords))
    assert len(list(store.iterdir())) == len(calls)


def respelt(source: Path, folder: Path) -> Any:
    """The same tokenizer with two letters changed for each other."""
    from transformers import AutoTokenizer

    shutil.copytree(source, folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    words = saved["model"]["vocab"]
    words["n"], words["p"] = words["p"], words["n"]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return AutoTokenizer.from_pretrained(folder)


def test_what_a_model_never_sees_does_not_need_a_new_measurement(tiny, tmp_path) -> None:
    first = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    relabelled = [
        replace(p, label="neutral", category="other", source="elsewhere") for p in PROMPTS
    ]
    with forward_calls(tiny) as calls:
        second = cache_activations(tiny, relabelled, SITES, store=tmp_path)
    assert calls == []
    assert equal(first, second)
    assert second[SITES[0]].prompts == tuple(relabelled)  # the labels are those of this call


def test_shards_and_manifest_say_what_they_are(tiny, tmp_path) -> None:
    from workbench.files.store import file_checksum, read_tensors

    cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    [manifest] = tmp_path.rglob("manifest.json")
    said, [shard] = json.loads(manifest.read_text()), shards_in(tmp_path)
    assert said["ids"] == [p.id for p in PROMPTS]
    assert said["what"]["sites"] == [str(site) for site in SITES]
    assert said["what"]["model"] == model_info(tiny).to_dict()
    assert said["shards"] == {"0": file_checksum(shard)}
    tensors, card = read_tensors(shard)
    assert set(tensors) == set(said["what"]["sites"])
    assert card == {"shard": 0, **said["what"]}
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
    }
