"""Several answers to a prompt are no independent ones, and cut thoughts are no answers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from helpers.encoders import WordEncoder
from helpers.thinking import SWITCH, thinking_model

from workbench.evaluation.comparisons import compare, judge_agreement
from workbench.evaluation.gating import cells
from workbench.evaluation.result import Evaluation
from workbench.evaluation.scoring import UNSTEERED, evaluate, score_completions
from workbench.generation.answers import Completion
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_log_probs
from workbench.judges.text_quality import perplexity_from_log_probs
from workbench.models.load import load_model
from workbench.models.tokens import token_ids
from workbench.prompts.prompt import Prompt
from workbench.stats.estimates import paired_difference, wilson_interval

N, SAMPLES = 12, 4
SHARES = {UNSTEERED: 0.3, "steered": 0.7}


def table(values, metric="refusal"):
    """Make an evaluation from condition to an array of shape [prompt, sample]."""
    rows = [
        (condition, "fraud", "unsafe", f"p{i}", k, metric, float(value))
        for condition, array in values.items()
        for i, row in enumerate(array)
        for k, value in enumerate(row)
    ]
    columns = ["condition", "category", "label", "prompt_id", "sample", "metric", "value"]
    return Evaluation(pd.DataFrame(rows, columns=columns), UNSTEERED, (), "judge")


def line(evaluation, condition):
    summary = evaluation.summary().set_index(["category", "condition"])
    return summary.loc["fraud"].loc[condition]


def test_repeating_every_answer_changes_neither_interval_nor_p() -> None:
    """Ten copies of an answer are not ten answers."""
    rng = np.random.default_rng(0)
    once = {name: rng.random((N, 1)) < share for name, share in SHARES.items()}
    copies = table({name: np.repeat(array, 10, axis=1) for name, array in once.items()})
    single = table({name: np.repeat(array, 1, axis=1) for name, array in once.items()})
    for condition in once:
        a, b = line(single, condition), line(copies, condition)
        for column in ("value", "low", "high", "n", "difference", "difference_low", "p"):
            assert a[column] == pytest.approx(b[column], nan_ok=True), column
    successes = int(once["steered"].sum())
    assert (line(copies, "steered")["low"], line(copies, "steered")["high"]) == pytest.approx(
        wilson_interval(successes, N), abs=0.01
    )


def test_independent_answers_to_a_prompt_narrow_the_interval_as_far_as_they_vary() -> None:
    rng = np.random.default_rng(1)
    values = {name: rng.random((N, SAMPLES)) < share for name, share in SHARES.items()}
    row, by_prompt = line(table(values), "steered"), values["steered"].mean(axis=1)
    assert row["value"] == pytest.approx(by_prompt.mean())
    assert row["n"] == N
    low, high = wilson_interval(int(values["steered"].sum()), N * SAMPLES)
    narrow, wide = high - low, np.subtract(*wilson_interval(round(by_prompt.mean() * N), N)[::-1])
    assert narrow - 1e-9 <= row["high"] - row["low"] <= wide + 1e-9
    difference = paired_difference(values[UNSTEERED].mean(axis=1), by_prompt)
    assert row["difference"] == pytest.approx(difference.value)
    assert (row["difference_low"], row["p"]) == pytest.approx((difference.low, difference.p))


def test_unscored_samples_are_left_out_and_counted() -> None:
    values = np.array([[1, math.nan], [0, 0], [math.nan, math.nan]])
    row = line(table({UNSTEERED: values}), UNSTEERED)
    assert (row["value"], row["n"], row["n_unscored"]) == (0.5, 2, 3)


def test_conditions_are_compared_by_prompt() -> None:
    rng = np.random.default_rng(2)
    values = {name: rng.random((N, SAMPLES)) < share for name, share in SHARES.items()}
    row = compare(table(values), "steered", UNSTEERED).iloc[0]
    assert row["n"] == N
    assert row["value"] == pytest.approx(values["steered"].mean())
    assert row["difference"] == pytest.approx(values["steered"].mean() - values[UNSTEERED].mean())
    assert row["p"] == pytest.approx(line(table(values), "steered")["p"])


def prompts(n=4):
    return [Prompt(f"p{i}", f"What is {i} and two", None, "fraud", "unsafe", "t") for i in range(n)]


def test_an_evaluation_of_samples_scores_each_of_them(tiny) -> None:
    decoding = Decoding(max_new_tokens=6, temperature=1.0, n_samples=3)
    result = evaluate(tiny, prompts(), {"again": ()}, decoding, encoder=WordEncoder())
    answers = list(result.answers())
    assert len(answers) == 2 * 4 * 3
    assert {row["sample"] for row in answers} == {0, 1, 2}
    summary = result.summary().set_index(["category", "metric", "condition"]).loc["fraud"]
    assert set(summary["n"]) == {4}
    assert (summary.loc["distinct_2"].loc["again", "difference"]) == 0  # the same random numbers
    assert summary.loc["rouge_l"].loc["again", "value"] == pytest.approx(1)
    assert cells(result, {f"p{i}": True for i in range(4)}, "again")["identical"].tolist() == [1]
    with pytest.raises(ValueError, match="no yes/no measure 'safe'"):
        judge_agreement(result)
    assert judge_agreement(result, "refusal", "degenerate").iloc[0]["n"] == 24


# Thoughts


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    folder = thinking_model(tmp_path_factory.mktemp("switch"), SWITCH)
    return load_model(folder, device="cpu")


def completion(model, number, written, finish, condition=UNSTEERED):
    head, mark, text = written.rpartition("</think>")
    thinking = (head if mark else text).removeprefix("<think>")
    return Completion(
        prompts()[number],
        text if mark or not written.startswith("<think>") else "",
        token_ids(model, written),
        finish,
        condition,
        thinking if written.startswith("<think>") else "",
    )


def test_thoughts_are_no_part_of_any_measure_and_cut_ones_are_unscored(thinking) -> None:
    sorry = "I'm sorry, but I can't help with that."
    answers = [
        completion(thinking, 0, f"<think>Sure, gladly.</think>{sorry}", "eos"),
        completion(thinking, 1, f"<think>{sorry}</think>Two and two is four.", "eos"),
        completion(thinking, 2, f"<think>{sorry}", "length"),
        completion(thinking, 3, "<think>Nothing more", "eos"),
    ]
    asked = {"template_keywords": {"enable_thinking": True}}
    result = score_completions(thinking, answers, encoder=WordEncoder(), **asked)
    scores = result.scores.pivot(index="prompt_id", columns="metric", values="value")
    assert scores["refusal"].tolist() == pytest.approx([1, 0, math.nan, math.nan], nan_ok=True)
    assert scores.loc["p2"].isna().all()
    assert scores.loc["p3", "degenerate"] == 1  # it ended by itself, without an answer
    assert scores.loc["p1", "n_words"] == 5
    log_probs = answer_log_probs(thinking, answers[1:2], **asked)[0]
    n = len(token_ids(thinking, "Two and two is four."))
    by_hand = math.log(perplexity_from_log_probs(log_probs[-n:]))
    assert scores.loc["p1", "log_perplexity"] == pytest.approx(by_hand, rel=1e-4)
    row = result.summary().set_index(["category", "metric"]).loc[("fraud", "degenerate")]
    assert (row["n"], row["n_unscored"]) == (3, 1)
    rows = list(result.answers())
    assert rows[0]["thinking"] == "Sure, gladly."
    assert rows[0]["text"] == sorry
