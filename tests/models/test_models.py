"""Models: every family loads from disk as TransformerLens's own object, with raw weights.

Nothing unsafe is ever read.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import D_MLP, D_MODEL, FAMILIES, HEADS, LAYERS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.models import fingerprints
from workbench.models import load as models
from workbench.models.hooked_model import HookedModel, ModelConfig
from workbench.models.load import hooked, load_model, model_info
from workbench.models.packaged import EMBEDDED

IDS = torch.tensor([[9, 40, 41, 60, 7, 88, 120, 33]])


def hugging_face(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def changed_copy(source: Path, folder: Path, **config: object) -> Path:
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def refusal(*args: Any, **keywords: Any) -> str:
    """The message with which load_model refuses; it must be one line."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_model(*args, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_logits_of_every_family_equal_hugging_face(
    family_model, family_path, family: str
) -> None:
    model = family_model(family)
    with torch.no_grad():
        expected = hugging_face(family_path(family))(IDS).logits
        found = model(IDS)
    assert expected.abs().max() > 1  # a checkpoint whose logits are all alike would pass anything
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_model_is_transformer_lens_own_object(tiny) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    assert type(tiny) is TransformerBridge
    assert not tiny.training
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    _, cache = tiny.run_with_cache(IDS)
    assert cache["blocks.0.attn.hook_pattern"].shape == (1, HEADS, IDS.shape[1], IDS.shape[1])


def test_attention_patterns_can_be_hooked_in_a_model_loaded_with_another_attention(
    tiny_path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fused = AutoModelForCausalLM.from_pretrained(tiny_path, attn_implementation="sdpa")
    model = hooked(fused, AutoTokenizer.from_pretrained(tiny_path), "mine")
    _, cache = model.run_with_cache(IDS)
    torch.testing.assert_close(
        cache["blocks.1.attn.hook_pattern"].sum(-1), torch.ones(1, HEADS, IDS.shape[1])
    )
    assert model.cfg.model_name == "mine"


def test_the_description_holds_sizes_and_no_path(tiny) -> None:
    info = model_info(tiny)
    assert (info.name, info.revision, info.dtype, info.weights) == (
        "tiny-llama3",
        None,
        "float32",
        "raw",
    )
    assert info.architecture == (LAYERS, D_MODEL, D_MLP, HEADS)
    assert json.loads(json.dumps(info.to_dict())) == info.to_dict()


def test_processed_weights_are_told_from_raw_ones(tmp_path: Path) -> None:
    model = load_model(tiny_model("llama3", tmp_path / "m"), device="cpu")
    raw = model_info(model)
    model.enable_compatibility_mode()
    processed = model_info(model)
    assert (raw.weights, processed.weights) == ("raw", "compatibility")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16", "torch.float32"])
def test_the_dtype_asked_for_is_the_dtype_of_weights_and_logits(tiny_path, dtype: Any) -> None:
    model = load_model(tiny_path, device="cpu", dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model(IDS).dtype == wanted
    assert model_info(model).dtype == str(dtype).removeprefix("torch.")


def test_the_device_asked_for_is_the_device_of_the_weights(tiny_path) -> None:
    model = load_model(tiny_path, device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert str(model.cfg.device) == "cpu"


def test_a_folder_called_like_an_old_alias_is_loaded_without_a_word(
    family_path, tmp_path: Path, caplog
) -> None:
    # Its name is an alias of a hub model in TransformerLens.
    folder = shutil.copytree(family_path("pythia"), tmp_path / "pythia")
    model = load_model(folder, device="cpu")
    assert model.cfg.model_name == "pythia"
    assert not caplog.records


def test_importing_a_module_that_runs_models_does_not_import_transformer_lens() -> None:
    code = (
        "import sys, workbench.models.activations; "
        "sys.exit('transformer_lens' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Fingerprints


def test_the_fingerprint_is_the_same_in_every_load_and_at_every_thread_count(
    tiny, tiny_path, monkeypatch
) -> None:
    again = load_model(tiny_path, device="cpu")
    assert model_info(again).fingerprint == model_info(tiny).fingerprint
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            monkeypatch.setattr(fingerprints, "_KNOWN", type(fingerprints._KNOWN)())
            assert model_info(again).fingerprint == model_info(tiny).fingerprint
    finally:
        torch.set_num_threads(threads)
    assert len(model_info(tiny).fingerprint) == 16


def test_the_fingerprint_does_not_depend_on_the_folder(tiny, tiny_path, tmp_path: Path) -> None:
    moved = load_model(shutil.copytree(tiny_path, tmp_path / "elsewhere"), device="cpu")
    assert model_info(moved).fingerprint == model_info(tiny).fingerprint
    assert model_info(moved).name == "elsewhere"


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model these tests may write to."""
    return load_model(tiny_model("qwen3", tmp_path_factory.mktemp("own")), device="cpu")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_changing_any_one_weight_by_the_least_step_changes_the_fingerprint(
    own_model, data: st.DataObject
) -> None:
    before = model_info(own_model).fingerprint
    parameter = data.draw(st.sampled_from(list(own_model.original_model.parameters())))
    flat = parameter.detach().view(-1)
    place = data.draw(st.integers(0, flat.numel() - 1))
    old = flat[place].clone()
    flat[place] = torch.nextafter(old, torch.tensor(float("inf")))
    changed = model_info(own_model).fingerprint
    flat[place] = old
    assert changed != before
    assert model_info(own_model).fingerprint == before


def test_another_chat_template_is_another_fingerprint(own_model) -> None:
    before, template = model_info(own_model).fingerprint, own_model.tokenizer.chat_template
    own_model.tokenizer.chat_template = template + " "
    changed = model_info(own_model).fingerprint
    own_model.tokenizer.chat_template = template
    assert changed != before
    assert model_info(own_model).fingerprint == before


def test_another_dtype_or_seed_is_another_fingerprint(tiny, tiny_path, tmp_path: Path) -> None:
    half = load_model(tiny_path, device="cpu", dtype="bfloat16")
    other = load_model(tiny_model("llama3", tmp_path / "other", seed=1), device="cpu")
    assert len({model_info(model).fingerprint for model in (tiny, half, other)}) == 3


# What is refused


def test_an_unknown_name_is_one_line_that_says_what_can_be_given() -> None:
    for name in ("nobody/no-such-model", "no-such-model"):
        message = refusal(name)
        assert f"no model {name!r}: no such folder here, and the hub cannot be reached" in message
        assert message.endswith(
            "give a hub name, a local folder, a .gguf file, or nothing for the embedded model."
        )


@pytest.mark.parametrize("name", ["./no/such/folder", "models/no/such/folder", "a b", "../x"])
def test_a_path_that_is_not_there_is_told_from_a_network_that_is_not(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # whatever stands beside the checkout
    assert f"no model {name!r}: no such folder here and none on the hub" in refusal(name)


def test_a_hub_that_does_not_know_the_name_says_so(monkeypatch) -> None:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def unknown(error: type[Exception]) -> Any:
        def ask(*_: object, **__: object) -> None:
            request = httpx.Request("GET", "https://example.invalid")
            raise error("404\nRepository not found", response=httpx.Response(404, request=request))

        return ask

    monkeypatch.setattr(HfApi, "model_info", unknown(RepositoryNotFoundError))
    assert "no model 'a/b': no such folder here and none on the hub" in refusal("a/b")
    monkeypatch.setattr(HfApi, "model_info", unknown(RevisionNotFoundError))
    assert "no model 'a/b' at revision 'v9': no such folder here and none on the hub" in refusal(
        "a/b", revision="v9"
    )


@pytest.mark.parametrize(("keywords", "message"), [
    ({"dtype": "int8"}, "unknown dtype 'int8'; dtypes: float32, bfloat16, float16, auto."),
    (
        {"dtype": torch.float64},
        "unknown dtype 'torch.float64'; dtypes: float32, bfloat16, float16, auto.",
    ),
    (
        {"device": "toaster"},
        "device 'toaster' cannot be used here; devices: cpu, cuda, cuda:0 ..., mps.",
    ),
    (
        {"device": "cuda:99"},
        "device 'cuda:99' cannot be used here; devices: cpu, cuda, cuda:0 ..., mps.",
    ),
])  # fmt: skip
def test_an_unusable_dtype_or_device_is_refused_before_anything_is_read(
    tiny_path, keywords: dict, message: str
) -> None:
    assert refusal(tiny_path, **keywords) == message


def test_a_checkpoint_with_only_a_pickle_is_refused(tiny_path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "pickled")
    torch.save(hugging_face(tiny_path).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "cannot load 'pickled'" in (message := refusal(folder))
    assert "safetensors" in message


def test_a_pickle_beside_the_safetensors_is_not_opened(tiny_path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert model_info(load_model(folder, device="cpu")).n_layers == LAYERS


@pytest.mark.parametrize("what", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_checkpoint_is_never_run_nor_asked_about(
    tiny_path, tmp_path, monkeypatch, what
) -> None:
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    ran = tmp_path / "ran"
    folder = shutil.copytree(tiny_path, tmp_path / "coded")
    values = json.loads((folder / what).read_text())
    if what == "config.json":
        values |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
        }
    else:
        values |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "code.T"]}}
    (folder / what).write_text(json.dumps(values))
    (folder / "code.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\nT = None\n"
    )
    assert "cannot load 'coded' (" in refusal(folder)
    assert not asked
    assert not ran.exists()


@pytest.mark.parametrize(("file", "content"), [
    ("model.safetensors", None),
    ("model.safetensors", b"rubbish"),
    ("config.json", b"{"),
    ("config.json", b'{"model_type": "no_such_type"}'),
    ("tokenizer.json", b'{"a": 1}'),
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_in_one_line(
    tiny_path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "damaged")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    message = refusal(folder)
    assert message.startswith("cannot load 'damaged' (")
    assert message.endswith("config.json and a tokenizer is needed.")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "cannot load 'empty'" in refusal(tmp_path / "empty")


def test_weights_that_are_missing_are_never_filled_with_random_numbers(
    tiny_path, tmp_path: Path
) -> None:
    folder = changed_copy(tiny_path, tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
    assert "cannot load 'deeper': 9 weights are missing (model.layers.4." in refusal(folder)
    folder = changed_copy(tiny_path, tmp_path / "wider", intermediate_size=2 * D_MLP)
    assert "cannot load 'wider'" in refusal(folder)


def test_a_revision_of_something_that_has_none_is_refused(tiny_path, tmp_path: Path) -> None:
    assert refusal(tiny_path, revision="v2").startswith(
        "revision 'v2' of a model that is not on the hub"
    )
    assert refusal(EMBEDDED, revision="v2").startswith(
        "revision 'v2' of a model that is not on the hub"
    )
    # The default model at a revision that cannot be had is not quietly another model.
    assert "no model 'HuggingFaceTB/SmolLM2-135M-Instruct' at" in refusal(
        revision="v2"
    ) or "reached" in refusal(revision="v2")


# How the package is laid out


def test_only_load_imports_transformer_lens() -> None:
    package = Path(inspect.getfile(models)).parents[1]
    importers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(
            line.strip().startswith(("import transformer_lens", "from transformer_lens"))
            for line in path.read_text().splitlines()
        )
    }
    assert importers == {"models/load.py"}


def test_only_sites_spells_hook_names() -> None:
    package = Path(inspect.getfile(models)).parents[1]
    spelt = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"blocks\.\{", path.read_text())
    }
    assert spelt == {"models/sites.py"}


def test_only_tokens_calls_the_studied_models_tokenizer() -> None:
    package = Path(inspect.getfile(models)).parents[1]
    callers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"(model|hooked|reader)\.tokenizer[(.]", path.read_text())
    }
    assert callers == {"models/tokens.py"}


def test_a_hooked_model_has_all_that_the_protocol_names(tiny) -> None:
    for member in get_protocol_members(HookedModel):
        assert hasattr(tiny, member), member
    for size in get_protocol_members(ModelConfig):
        assert hasattr(tiny.cfg, size), size


def get_protocol_members(protocol: type) -> set[str]:
    return {
        name
        for name in (*vars(protocol), *protocol.__annotations__)
        if not name.startswith("_") or name == "__call__"
    }
