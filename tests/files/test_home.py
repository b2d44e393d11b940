"""A "~" is the user's own folder in every path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from workbench.evaluation.questions import read_questions
from workbench.files.store import (
    append_jsonl,
    file_checksum,
    read_json,
    read_jsonl,
    read_tensors,
    write_json,
    write_tensors,
)
from workbench.files.tables import read_rows
from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.judges.validation import read_labelled
from workbench.models.activations import cache_activations
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.prompts.benchmarks import prompts_from, read_dataset
from workbench.prompts.prompt import load_prompts, save_prompts
from workbench.safesteer.config import RunConfig
from workbench.safesteer.run_folder import RunFolder, read_run


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder for the test, and no folder of that name where it runs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path
    assert not Path("~").exists()


def test_files_are_written_and_read_there(home):
    write_json("~/a.json", {"x": 1})
    assert read_json("~/a.json") == json.loads((home / "a.json").read_text()) == {"x": 1}
    append_jsonl("~/a.jsonl", [{"x": 1}])
    assert read_jsonl("~/a.jsonl") == read_rows("~/a.jsonl") == [{"x": 1}]
    checksum = write_tensors("~/a.safetensors", {"x": torch.ones(1)}, {})
    assert file_checksum("~/a.safetensors") == checksum
    assert read_tensors("~/a.safetensors")[0]["x"] == 1


def test_prompts_questions_and_labels_are_read_from_there(home):
    save_prompts("~/p.jsonl", load_prompts()[:2])
    for read in (load_prompts, prompts_from, lambda path: read_dataset(f"file:{path}")):
        assert read("~/p.jsonl") == load_prompts()[:2]
    assert prompts_from("~/p.jsonl:limit=1,workbench:limit=1")[0] == load_prompts()[0]
    row = {"question": "Which?", "A": "x", "B": "y", "answer": "A"}
    write_json("~/q.json", [row])
    assert read_questions("~/q.json")[0].id == "q-1"
    write_json("~/l.json", [{"prompt": "a", "response": "b", "refusal": "yes"}])
    assert read_labelled("~/l.json").prompts == ("a",)


def test_runs_stores_and_answers_are_kept_there(home, tiny):
    store = cache_activations(tiny, "A poem?", Site(0, "resid_post"), store="~/acts")
    assert list(store)
    assert any((home / "acts").iterdir())
    for _ in range(2):
        generate(tiny, "A poem?", decoding=Decoding(max_new_tokens=2), output="~/answers.jsonl")
    assert len(read_jsonl(home / "answers.jsonl")) == 1
    with RunFolder.open("~/runs/one", RunConfig()) as run:
        run.finish()
    assert read_run("~/runs/one").path == home / "runs" / "one"


def test_a_model_is_loaded_from_there(home, tiny_path):
    (home / "model").symlink_to(tiny_path, target_is_directory=True)
    assert load_model("~/model", device="cpu").cfg.n_layers == 4
