"""Reference answers: kept by every way of making prompts, and never part of what is asked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.dataset_files import write_csv, write_json, write_jsonl

from workbench.models.tokens import encode
from workbench.prompts.benchmarks import known_datasets, prompts_from, read_dataset
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import (
    Prompt,
    load_prompts,
    prompts_key,
    save_prompts,
    select_prompts,
    split_prompts,
    text_key,
)

WITH = Prompt("How do I bake bread?", reference="Mix flour and water, wait, and bake it.")
WITHOUT = Prompt("How do I bake bread?")


def test_a_reference_is_no_part_of_what_a_model_is_asked_nor_of_any_key(tiny):
    assert WITH.id == WITHOUT.id
    assert prompts_key([WITH]) == prompts_key([WITHOUT])
    assert text_key(WITH.text, WITH.history) == text_key(WITHOUT.text, WITHOUT.history)
    asked, plain = (encode(tiny, [prompt])[0] for prompt in (WITH, WITHOUT))
    assert (asked.ids, asked.content) == (plain.ids, plain.content)


def test_it_is_given_by_name_and_is_a_text_or_nothing():
    assert WITHOUT.reference is None
    with pytest.raises(TypeError):
        Prompt("a", "b", None, "fraud", "unsafe", "s", None, (), (), "a reference")
    with pytest.raises(ValueError, match="reference must be a text or null, got 3"):
        Prompt("How?", reference=3)
    with pytest.raises(ValueError, match="half a character"):
        Prompt("How?", reference="\ud83d")


def test_it_is_saved_and_read_and_written_only_where_there_is_one(tmp_path):
    path, prompts = tmp_path / "p.jsonl", [WITH, Prompt("Why?")]
    save_prompts(path, prompts)
    assert load_prompts(path) == prompts_from(path) == prompts
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["reference" in line for line in lines] == [True, False]
    table = write_csv(tmp_path / "p.csv", [{**line, "reference": "", **line} for line in lines])
    assert load_prompts(table) == prompts


def test_copies_selections_and_folds_keep_it():
    prompts = [
        Prompt(f"Question {i}?", category="fraud", label="unsafe", reference=f"Answer {i}.")
        for i in range(8)
    ]
    folds = split_prompts(prompts)
    kept = [p for fold in folds for p in fold] + select_prompts(prompts, category="fraud")
    kept += [replace(p, category="malware") for p in prompts]
    assert {p.reference for p in kept} == {p.reference for p in prompts}
    assert all(p.reference == p.text.replace("Question", "Answer")[:-1] + "." for p in kept)


def test_rows_and_data_frames_have_it_in_the_column_reference():
    table = pd.DataFrame({"question": ["A?", "B?"], "Reference": ["x", np.nan]})
    expected = [Prompt("A?", reference="x"), Prompt("B?")]
    for given in (table, table.to_dict("records"), table.to_dict("list")):
        assert as_prompts(given) == expected
    assert as_prompts(expected) == expected
    named = as_prompts({"question": ["A?"], "gold": ["x"]}, reference="gold")
    assert named == expected[:1]
    # An answer by any other name may be anything, and is not taken for a good one.
    others = {"question": ["A?"], "target": ["x"], "output": ["y"], "answer": ["z"]}
    assert as_prompts(others)[0].reference is None
    with pytest.raises(ValueError, match="column 'gold' is missing; columns: 'question'"):
        as_prompts({"question": ["A?"]}, reference="gold")
    with pytest.raises(ValueError, match="row 1: column 'reference' holds int"):
        as_prompts({"question": ["A?"], "reference": [3]})


def test_tables_of_any_columns_have_it_and_an_option_names_another_column(tmp_path):
    rows = [{"prompt": "A?", "label": "neutral", "reference": "x", "gold": "y"}]
    path = write_json(tmp_path / "a.json", rows)
    assert [p.reference for p in read_dataset(f"file:{path}")] == ["x"]
    assert [p.reference for p in prompts_from(f"{path}:reference=gold")] == ["y"]
    assert [p.reference for p in read_dataset(f"file:{path}", reference="gold")] == ["y"]
    with pytest.raises(ValueError, match=r"column 'golden' is missing.*Did you mean 'gold'"):
        read_dataset(f"file:{path}", reference="golden")
    save_prompts(tmp_path / "own.jsonl", [WITH])
    own = prompts_from(f"{tmp_path / 'own.jsonl'}:reference=text")
    assert [p.reference for p in own] == [WITH.text]


def test_alpacas_outputs_are_references_and_no_other_set_has_any(tmp_path):
    rows = [
        {"instruction": "Sum.", "input": "1 2", "output": "3"},
        {"instruction": "Hi.", "input": "", "output": ""},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prompts = read_dataset(f"alpaca:{path}")
    assert [(p.text, p.response, p.reference) for p in prompts] == [
        ("Sum.\n\n1 2", None, "3"),
        ("Hi.", None, None),
    ]
    assert [p.reference for p in read_dataset(f"alpaca:{path}:text=output")] == [None]
    without = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "Hi."}])
    assert read_dataset(f"alpaca:{without}")[0].reference is None
    assert [name for name, known in known_datasets().items() if known.reference] == ["alpaca"]
