"""A prompt of several categories counts in each of them, and is in one fold."""

from __future__ import annotations

import pytest
from helpers.dataset_files import beaver, write_csv, write_json, write_jsonl, write_parquet

from workbench.prompts.benchmarks import read_dataset
from workbench.prompts.contrasts import kind_of, other_unsafe_rows, paired_rows, unsafe_rows
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Prompt, categories_of, select_prompts, split_prompts


def ask(name, category="fraud", *more, label="unsafe", pair_id=None):
    return Prompt(name, f"{name}?", None, category, label, "t", pair_id, (), more)


BOTH, FRAUD, MALWARE = ask("both", "fraud", "malware"), ask("f"), ask("m", "malware")


def test_the_main_category_comes_first_and_none_comes_twice():
    assert BOTH.categories == ("fraud", "malware")
    assert ask("x", "fraud", "malware", "fraud").categories == ("fraud", "malware")
    assert FRAUD.categories == ("fraud",)


def test_a_selection_by_either_category_has_the_prompt_once():
    prompts = [BOTH, FRAUD, MALWARE]
    assert categories_of(prompts) == ["fraud", "malware"]
    assert select_prompts(prompts, category="fraud") == [BOTH, FRAUD]
    assert select_prompts(prompts, category="malware") == [BOTH, MALWARE]
    assert select_prompts(prompts, category=["fraud", "malware"]) == prompts
    assert select_prompts(prompts, category="malware", limit=1) == [BOTH]
    assert select_prompts(prompts, limit=1) == [BOTH]


def test_contrasts_have_it_in_the_rows_of_each_category_and_not_among_the_others():
    twin = ask("t", "fraud", "malware", label="safe", pair_id="p")
    prompts = [ask("both", "fraud", "malware", pair_id="p"), FRAUD, MALWARE, twin]
    assert unsafe_rows(prompts, "fraud") == [0, 1]
    assert unsafe_rows(prompts, "malware") == [0, 2]
    assert other_unsafe_rows(prompts, "malware") == [1]
    assert paired_rows(prompts, "fraud") == paired_rows(prompts, "malware") == ([0], [3])
    assert kind_of(twin, ["malware"]) == "twins"


def test_it_is_in_one_fold_and_every_fold_has_every_category():
    prompts = [ask(f"f{i}") for i in range(20)]
    prompts += [ask(f"both{i}", "fraud", "privacy") for i in range(6)]  # nobody's main category
    for seed in range(5):
        folds = split_prompts(prompts, seed=seed)
        assert sorted(p.id for fold in folds for p in fold) == sorted(p.id for p in prompts)
        assert all(categories_of(fold) == ["fraud", "privacy"] for fold in folds)
        sizes = [len(select_prompts(fold, category="privacy")) for fold in folds]
        assert sizes == [2, 2, 2]


def test_a_further_category_too_small_for_the_folds_is_named():
    prompts = [*(ask(f"f{i}") for i in range(9)), ask("b", "fraud", "privacy")]
    with pytest.raises(ValueError, match="category 'privacy' has 1 prompts or pairs, too few"):
        split_prompts(prompts)


CELLS = [
    ["Hate Speech", "fraud"],
    "Hate Speech;fraud",
    "Hate Speech | fraud",
    "['Hate Speech', 'fraud']",
    '["Hate Speech", "fraud"]',
    {"Hate Speech": True, "malware": False, "fraud": True},
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_of_several_categories_loses_none(tmp_path, cell):
    rows = [{"prompt": "A?", "label": "unsafe", "category": cell}]
    [prompt] = read_dataset(f"file:{write_json(tmp_path / 'a.json', rows)}")
    assert prompt.categories == ("hate_speech", "fraud")
    [prompt] = as_prompts(rows)
    assert prompt.categories == ("Hate Speech", "fraud")


def test_lists_of_parquet_and_a_row_per_category_lose_none(tmp_path):
    row = {"prompt": "A?", "label": "unsafe"}
    path = write_parquet(tmp_path / "a.parquet", [{**row, "categories": ["fraud", "malware"]}])
    assert read_dataset(f"file:{path}")[0].categories == ("fraud", "malware")
    rows = [{**row, "category": name} for name in ("fraud", "malware", "fraud", "")]
    [prompt] = read_dataset(f"file:{write_csv(tmp_path / 'a.csv', rows)}")
    assert prompt.categories == ("fraud", "malware")


def test_beavertails_keeps_all_harms_of_an_answer(tmp_path):
    rows = [beaver("A?", "x", "privacy_violation", "self_harm"), beaver("A?", "fine")]
    harmful, safe = read_dataset(f"beavertails:{write_jsonl(tmp_path / 'b.jsonl', rows)}")
    assert harmful.categories == ("self_harm", "privacy_violation")
    assert safe.categories == ("self_harm",)


def test_categories_given_for_all_are_read_as_those_of_a_cell():
    [prompt] = as_prompts("q", category="fraud; malware")
    assert prompt.categories == ("fraud", "malware")
    assert select_prompts([prompt], category="malware") == [prompt]
    with pytest.raises(ValueError, match="one name, got 'fraud;malware'; give the others as more_"):
        Prompt("q", category="fraud;malware")
