"""A table of this project's prompts keeps ids and pairs, whichever reader and option reads it."""

from __future__ import annotations

import gzip
import lzma
from dataclasses import asdict

import pandas as pd
import pytest
from helpers.dataset_files import write_csv, write_json, write_jsonl

from workbench.prompts.benchmarks import prompts_from, read_dataset
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Message, Prompt, load_prompts, save_prompts, split_prompts

CONVERSATION = Prompt(
    "c", "And?", None, "fraud", "unsafe", "s", None, (Message("user", "Hi."),), ("malware",)
)
PROMPTS = [*load_prompts()[:8], CONVERSATION]


@pytest.fixture
def files(tmp_path):
    """The same prompts in every format."""
    own = tmp_path / "own.jsonl"
    save_prompts(own, PROMPTS)
    rows = [asdict(prompt) for prompt in PROMPTS]
    names = ["own.jsonl", "own.csv", "own.json", "own.parquet", "own.jsonl.gz", "own.csv.xz"]
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "own.parquet")
    write_json(tmp_path / "own.json", rows)
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(own.read_bytes()))
    (tmp_path / "own.csv.xz").write_bytes(lzma.compress((tmp_path / "own.csv").read_bytes()))
    return [tmp_path / name for name in names]


def test_every_format_and_every_reader_gives_the_same_prompts(files):
    for path in files:
        assert load_prompts(path) == PROMPTS, path.name
        assert prompts_from(path) == prompts_from(f"file:{path}") == PROMPTS, path.name
        assert read_dataset(f"file:{path}", limit=100) == PROMPTS, path.name


def test_a_limit_and_other_options_keep_ids_and_pairs(files):
    for path in files:
        few = prompts_from(f"{path}:limit=1")
        assert few
        assert all(prompt in PROMPTS for prompt in few)
        for options in ("label=unsafe", "category=fraud", "text=text", "response=text"):
            read = prompts_from(f"{path}:{options}")
            assert [(p.id, p.pair_id) for p in read] == [(p.id, p.pair_id) for p in PROMPTS]
    assert {p.category for p in prompts_from(f"{files[0]}:category=fraud")} == {"fraud"}
    assert {p.label for p in prompts_from(f"{files[0]}:label=safe")} == {"safe"}
    assert prompts_from(f"{files[0]}:response=text")[0].response == PROMPTS[0].text
    with pytest.raises(ValueError, match=r"column 'lable' is missing; columns: .*'label'"):
        prompts_from(f"{files[0]}:label=lable")


def test_no_twin_is_torn_from_its_question_by_a_limit(tmp_path):
    own = load_prompts()
    save_prompts(tmp_path / "own.jsonl", own)
    folds = split_prompts(prompts_from(f"{tmp_path / 'own.jsonl'}:limit=12"), seed=0)
    fold_of = {}
    for number, fold in enumerate(folds):
        for prompt in fold:
            fold_of.setdefault(prompt.pair_id or prompt.id, set()).add(number)
    assert all(len(numbers) == 1 for numbers in fold_of.values())
    twins = [p for fold in folds for p in fold if p.label == "safe" and p.pair_id]
    assert len(twins) > 50


def test_a_column_beside_the_fields_is_left_out_unless_it_may_be_a_misspelt_one(tmp_path):
    rows = [asdict(prompt) for prompt in PROMPTS[:3]]
    path = write_json(tmp_path / "a.json", [{**row, "language": "en"} for row in rows])
    assert prompts_from(path) == PROMPTS[:3]
    for row in rows:
        row["pair"] = row.pop("pair_id")
    with pytest.raises(ValueError, match=r"row 1: unknown column 'pair'.*Did you mean 'pair_id'"):
        prompts_from(write_json(tmp_path / "b.json", rows))


def test_a_bad_row_is_named_whichever_reader_reads_it(tmp_path):
    row = asdict(PROMPTS[0])
    path = write_jsonl(tmp_path / "a.jsonl", [row, {**row, "id": "b", "label": "bad"}])
    for spec in (str(path), f"file:{path}", f"{path}:limit=3"):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: label must be one of"):
            prompts_from(spec)


def test_other_tables_keep_the_pairs_that_they_name(tmp_path):
    rows = [
        {"prompt": "A?", "label": "unsafe", "pair_id": "1"},
        {"prompt": "B?", "label": "safe", "pair_id": "1"},
        {"prompt": "C?", "label": "safe", "pair_id": ""},
        {"prompt": "D?", "label": "safe", "pair_id": ""},
    ]
    unsafe, safe, *alone = read_dataset(f"file:{write_csv(tmp_path / 'a.csv', rows)}")
    assert unsafe.pair_id == safe.pair_id is not None
    assert [prompt.pair_id for prompt in alone] == [None, None]


def test_a_file_of_conversations_is_read(tmp_path):
    chat = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    longer = [*chat, {"role": "user", "content": "C?"}]
    rows = [{"messages": chat, "label": "safe"}, {"messages": longer, "label": "unsafe"}]
    first, second = read_dataset(f"file:{write_jsonl(tmp_path / 'a.jsonl', rows)}")
    assert (first.text, first.response, first.history) == ("A?", "B.", ())
    assert (second.text, second.response, len(second.history)) == ("C?", None, 2)
    bare = write_jsonl(tmp_path / "bare.jsonl", [chat, longer])
    assert [p.text for p in read_dataset(f"file:{bare}:label=safe")] == ["A?", "C?"]
    whole = write_json(tmp_path / "whole.json", longer)
    assert [p.text for p in read_dataset(f"file:{whole}:label=safe")] == ["C?"]


def test_an_object_of_columns_of_other_names_is_read(tmp_path):
    columns = {"frage": ["A?", "B?"], "art": ["safe", "unsafe"]}
    path = write_json(tmp_path / "a.json", columns)
    prompts = read_dataset(f"file:{path}:text=frage:label=art")
    assert [(p.text, p.label) for p in prompts] == [("A?", "safe"), ("B?", "unsafe")]
    assert [p.text for p in as_prompts(columns, text="frage", label="art")] == ["A?", "B?"]


# What is missing


@pytest.mark.parametrize("missing", [float("nan"), None, ""])
def test_a_missing_cell_is_nothing_given(tmp_path, missing):
    rows = [
        {"text": "A?", "label": "unsafe", "category": missing, "answer": missing},
        {"text": missing, "label": "unsafe", "category": "fraud", "answer": "x"},
        {"text": "B?", "label": missing, "category": "fraud", "answer": "x"},
        {"text": "C?", "label": "safe", "category": "fraud", "answer": "x"},
    ]
    prompts = read_dataset(f"file:{write_json(tmp_path / 'a.json', rows)}", response="answer")
    assert [(p.text, p.category, p.response) for p in prompts] == [
        ("A?", "other", None), ("C?", "fraud", "x")
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["nan", "None", "null"])
def test_what_became_of_a_missing_name_in_a_text_is_no_category(tmp_path, word):
    path = write_csv(tmp_path / "a.csv", [{"text": "A?", "label": "unsafe", "category": word}])
    assert read_dataset(f"file:{path}")[0].category == "other"
