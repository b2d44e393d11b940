"""The report opens with one question, one picture, one sentence and what is beside them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from helpers.synthetic_run import write_run

from workbench.report import opening
from workbench.report.page import write_report
from workbench.safesteer.run_folder import read_run

if TYPE_CHECKING:
    from pathlib import Path

HEADLINE = "safe_helpful_proxy"


def answer(
    prompt_id: str, condition: str, headline: float, unsafe: float | None = 0.0, text: str = "text"
) -> dict[str, Any]:
    scores = {HEADLINE: headline, "unsafe": unsafe}
    return {
        "prompt_id": prompt_id,
        "label": "unsafe",
        "category": "fraud",
        "prompt": f"question {prompt_id}",
        "condition": condition,
        "text": text,
        "scores": scores,
    }


def pairs(*verdicts: tuple[float, float, float | None]) -> list[dict[str, Any]]:
    """Answers to questions 0, 1, ...: headline before and after, and unsafe in both answers."""
    return [
        answer(str(number), condition, headline, unsafe)
        for number, (before, after, unsafe) in enumerate(verdicts)
        for condition, headline in (("unsteered", before), ("steered", after))
    ]


def test_the_example_is_the_first_question_that_moved_with_most_and_is_harmless() -> None:
    rows = pairs((0, 0, 0), (1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 1, 0))
    example = opening.example(rows, HEADLINE, "steered")
    assert example is not None
    assert (example["id"], example["harmless"], example["rose"]) == ("3", True, True)
    assert (example["n"], example["n_up"], example["n_down"]) == (5, 3, 1)
    assert [row["condition"] for row in example["answers"]] == ["unsteered", "steered"]


def test_the_example_shows_a_loss_where_most_verdicts_fell() -> None:
    example = opening.example(pairs((0, 1, 0), (1, 0, 0), (1, 0, 0)), HEADLINE, "steered")
    assert example is not None
    assert (example["id"], example["rose"]) == ("1", False)


@pytest.mark.parametrize("unsafe", [1.0, None])
def test_an_example_that_no_judge_calls_harmless_is_not_shown_openly(unsafe: float | None) -> None:
    example = opening.example(pairs((0, 1, unsafe)), HEADLINE, "steered")
    assert example is not None
    assert example["id"] == "0"
    assert not example["harmless"]


def test_without_a_moved_verdict_there_is_no_example_and_the_numbers_say_so() -> None:
    example = opening.example(pairs((0, 0, 0), (1, 1, 0)), HEADLINE, "steered")
    assert example == {"n": 2, "n_up": 0, "n_down": 0, "harmless": False, "answers": []}
    assert opening.example([], HEADLINE, "steered") is None


def test_a_page_without_an_example_says_that_no_verdict_changed(tmp_path: Path) -> None:
    run = write_run(tmp_path, prompts_each=3, categories=("fraud",), hostile=False)
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        row["scores"][HEADLINE] = 0.0
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text()
    assert "changed for none of 3 risky test questions" in page
    assert "What steering did to one question" not in page


def test_the_page_begins_with_the_example_and_folds_one_that_may_be_harmful(tmp_path: Path) -> None:
    run = write_run(tmp_path, prompts_each=12, categories=("fraud",), hostile=False)
    page = write_report(run).read_text()
    assert "no judge calls harmless: open to read them" in page
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        row["scores"]["unsafe"] = 0.0
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text()
    shown = opening.example(rows, HEADLINE, "answer contrast")
    assert shown is not None
    before_the_rest = page.split('<div class="lead">')[0]
    assert f'dir="auto">{shown["text"]}</p>' in before_the_rest
    assert "no judge calls harmless" not in page
    assert "whose answers the judge calls harmless" in page


def test_the_sentence_has_both_shares_the_interval_and_the_controls(tmp_path: Path) -> None:
    run = write_run(tmp_path, prompts_each=24, categories=("fraud", "malware"), effect="helps")
    first = opening.opening(read_run(run))
    frame = pd.read_csv(run / "evaluation.csv")
    pooled = frame[(frame["category"] == "all") & (frame["metric"] == HEADLINE)]
    row = pooled.set_index("condition").loc["answer contrast"]
    assert first is not None
    assert first["main"] == "answer contrast"  # the best, where the notes name none
    for words in (
        f"Of {row['n']:.0f} risky test questions",
        f"+{round(100 * row['difference'])} points [",
        f"{round(100 * row['value'])} % with “answer contrast”",
        "with a random vector, ",
        "with shuffled labels and ",
    ):
        assert words in first["sentence"]
    assert "no clear change" not in first["sentence"]


def test_other_measures_that_changed_clearly_are_named_with_the_random_vectors_change() -> None:
    names = ("condition", "category", "metric", "difference", "difference_low", "difference_high")
    table = [
        ("steered", "all", "unsafe", -0.22, -0.35, -0.08),
        ("random", "all", "unsafe", 0.02, -0.1, 0.15),
        ("steered", "all", "relevance", -0.01, -0.07, 0.06),
    ]
    frame = pd.DataFrame([dict(zip(names, row, strict=True)) for row in table])
    said = opening.other_changes(frame.assign(p_holm=0.02), ["unsafe", "relevance"], "steered")
    assert said == ["unsafe responses (%UR) −22 points [−35, −8] (random vector +2 points)"]
    assert not opening.other_changes(frame.assign(p_holm=0.2), ["unsafe", "relevance"], "steered")


def test_a_null_result_is_called_no_clear_change(tmp_path: Path) -> None:
    run = write_run(tmp_path, prompts_each=6, categories=("fraud",), effect="null")
    first = opening.opening(read_run(run))
    assert first is not None
    assert "(no clear change: " in first["sentence"]
    same = {"n": 4, "value": 0.0, "difference": 0.0, "difference_low": 0, "difference_high": 0}
    text = opening.sentence(HEADLINE, "steered", {"unsteered": same, "steered": same})
    assert "(no verdict changed)" in text


@pytest.mark.parametrize("works", [True, False])
def test_a_positive_control_that_fails_is_said_in_red(tmp_path: Path, works: bool) -> None:
    run = write_run(tmp_path, prompts_each=3, categories=("fraud",))
    notes = json.loads((run / "run.json").read_text())
    after, low = (0.8, 0.4) if works else (0.2, -0.1)
    numbers = {"before": 0.16, "after": after, "difference": after - 0.16, "low": low, "high": 0.9}
    notes["positive_control"] = {**numbers, "n": 24, "works": works}
    (run / "run.json").write_text(json.dumps(notes))
    page = write_report(run).read_text()
    assert ("So steering reaches this model" in page) == works
    assert ('class="red"><strong>Positive control: it fails' in page) != works
    assert f"from 16 % to {round(100 * after)} % of 24 risky test questions" in page


def test_measures_without_a_clear_difference_fold_into_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path, prompts_each=4, categories=("fraud",), effect="null")
    frame = pd.read_csv(run / "evaluation.csv")
    moved = frame["metric"] == "refusal"
    frame.loc[moved & frame["difference"].notna(), ["difference_low", "difference_high"]] = 0.1, 0.3
    frame.loc[~moved & frame["difference"].notna(), ["difference_low", "difference_high"]] = -1, 1
    frame.to_csv(run / "evaluation.csv", index=False)
    page = write_report(run).read_text()
    panel = page.split("Numbers: all risk categories")[1].split("More measures")[0]
    shown, folded = panel.split('<details class="null">')
    assert "refusals" in shown
    assert "broken text" not in shown
    line = re.search(r"<summary>(No clear difference to unsteered in: .*?)</summary>", folded)
    assert line is not None
    assert "broken text" in line[1]
    assert "refusals" not in line[1]


def test_the_card_names_the_first_neurons_and_links_their_page_once_it_is_there(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path, prompts_each=3, categories=("fraud", "malware"))
    card = opening.neuron_card(read_run(run))
    assert card is not None
    assert (card["category"], card["page"], len(card["rows"])) == ("fraud", "", 5)
    frame = pd.read_csv(run / "neurons.csv")
    best = frame[frame["category"] == "fraud"].sort_values("contribution").iloc[-1]
    assert card["rows"][0]["name"] == f"L{best['layer']} N{best['neuron']}"
    assert "workbench neurons --run" in write_report(run).read_text()
    (run / "neurons_malware.html").write_text("page")
    page = write_report(run).read_text()
    assert '<a href="neurons_malware.html">' in page
    assert "Neurons of malware" in page
