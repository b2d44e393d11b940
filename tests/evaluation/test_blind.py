"""A blind sample hides what was done and pairs prompts; its labels come back, or a clear line."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
from helpers.judged_answers import Errors, judged_answers

from workbench.evaluation.blind import answer_id, blind_sample, read_blind
from workbench.prompts.prompt import Message

if TYPE_CHECKING:
    from pathlib import Path

CONDITIONS = {"unsteered": Errors(), "steered": Errors(), "random": Errors()}


def test_a_sample_shows_no_condition_and_no_score() -> None:
    judged = judged_answers(CONDITIONS, prompts=30)
    sample = blind_sample(judged.evaluation, 10)
    assert list(sample.columns) == ["id", "prompt", "response", "label"]
    assert (sample["label"] == "").all()
    assert not sample["id"].str.contains("p[0-9]|steer|random").any()
    # the conditions are mixed, not one after the other
    conditions = [text.rpartition(", ")[2] for text in sample["response"]]
    assert len(set(conditions[:10])) == 3


def test_the_same_prompts_are_read_under_every_condition() -> None:
    judged = judged_answers(CONDITIONS, prompts=30, samples=3)
    sample = blind_sample(judged.evaluation, 12, seed=4)
    by_prompt = {(c.prompt.id, c.condition) for c in judged.evaluation.completions
                 if answer_id(c) in set(sample["id"])}  # fmt: skip
    assert len(sample) == len(by_prompt) == 36
    assert len({prompt for prompt, _ in by_prompt}) == 12
    some = blind_sample(judged.evaluation, 12, conditions=["steered"])
    assert len(some) == 24
    assert not some["response"].str.contains("random").any()


def test_a_larger_sample_of_the_same_seed_holds_the_smaller_one() -> None:
    judged = judged_answers(CONDITIONS, prompts=30, samples=2)
    small, large, other = (
        set(blind_sample(judged.evaluation, n, seed=seed)["id"])
        for n, seed in ((10, 1), (20, 1), (10, 2))
    )
    assert small < large
    assert small != other


def test_only_the_prompts_asked_for_are_read_and_only_with_an_answer_under_all() -> None:
    unsafe = judged_answers(CONDITIONS, prompts=20).evaluation
    neutral = judged_answers(CONDITIONS, prompts=9, label="neutral").evaluation
    cut = dataclasses.replace(unsafe.completions[0], text="", thinking="Well", finish="length")
    both = dataclasses.replace(
        unsafe, completions=(cut, *unsafe.completions[1:], *neutral.completions)
    )
    with pytest.raises(ValueError, match=r"from 8 to 19 prompts per condition .*, got 20"):
        blind_sample(both, 20)
    assert "Question 0?" not in set(blind_sample(both, 19)["prompt"])
    assert len(blind_sample(both, 9, label="neutral")) == 27
    with pytest.raises(ValueError, match="no answers to safe prompts"):
        blind_sample(both, 9, label="safe")
    with pytest.raises(ValueError, match="got 7"):
        blind_sample(both, 7)
    with pytest.raises(ValueError, match=r"no condition 'steerd'.* Did you mean 'steered'"):
        blind_sample(both, 9, conditions=["steerd"])


def test_an_answer_that_two_conditions_share_is_read_once() -> None:
    evaluation = judged_answers(CONDITIONS, prompts=20).evaluation
    shared = tuple(
        dataclasses.replace(c, text=f"the same {c.prompt.id}") if c.condition != "steered" else c
        for c in evaluation.completions
    )
    assert len(blind_sample(dataclasses.replace(evaluation, completions=shared), 10)) == 20


def test_turns_before_the_question_are_shown() -> None:
    evaluation = judged_answers(CONDITIONS, prompts=8).evaluation
    talk = tuple(
        dataclasses.replace(
            c, prompt=dataclasses.replace(c.prompt, history=(Message("user", "Hello."),))
        )
        for c in evaluation.completions
    )
    sample = blind_sample(dataclasses.replace(evaluation, completions=talk), 8)
    assert sample["prompt"].str.startswith("user: Hello.\n\nuser: Question ").all()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_labels_come_back_from_any_table(suffix: str, tmp_path: Path) -> None:
    sample = blind_sample(judged_answers(CONDITIONS, prompts=9).evaluation, 9)
    sample["response"] += '\n"quoted", and more'
    sample.loc[:3, "label"] = ["yes", "No", " TRUE ", "0"]
    path = tmp_path / f"labels{suffix}"
    if suffix in (".csv", ".tsv"):
        sample.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    elif suffix == ".parquet":
        sample.to_parquet(path)
    else:
        sample.to_json(path, orient="records", lines=suffix == ".jsonl")
    labels = read_blind(path)
    assert list(labels) == list(sample["id"])
    assert list(labels.values()) == [True, False, True, False, *[None] * 23]


def test_labels_may_be_true_and_false_of_json(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    rows = [{"id": "a", "label": True}, {"id": "b", "label": 0}, {"id": "c", "label": None}]
    path.write_text(json.dumps(rows))
    assert read_blind(path) == {"a": True, "b": False, "c": None}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": "a", "lable": "yes"}], "row 1: no column 'label'.* Did you mean 'lable'"),
        ([{"label": "yes"}], "row 1: no column 'id'; columns: label"),
        ([{"id": "a", "label": "yes"}, {"id": "b", "label": "maybe"}], "row 2: .* got 'maybe'"),
        ([{"id": "a", "label": "yes"}, {"id": "a", "label": "no"}], "row 2: id 'a' comes twice"),
        ([{"id": " ", "label": "yes"}], "row 1: the id is empty"),
        ([{"id": "a", "label": ""}, {"id": "b", "label": None}], "none of 2 answers is labelled"),
    ],
)
def test_a_mistake_in_the_labels_is_one_line(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=said) as error:
        read_blind(path)
    assert "\n" not in str(error.value)
