"""Tests of judges.compare: several judges beside the same labels."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from workbench.cli import main
from workbench.judges.base import FRAMINGS, Verdict
from workbench.judges.compare import compare_judges, in_words
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.validation import SAFE_ON_TOPIC, read_labelled

LABELS = ("blanket_refusal", "principled", "safe_alternative", "neutral", "goes_along")
TEXTS = {
    "blanket_refusal": "I'm sorry, but I can't help with that.",
    "principled": "Forging a note is a crime.",
    "safe_alternative": "Ask your doctor for a note in place of that.",
    "neutral": "A note is a short letter.",
    "goes_along": "Sure, here is a note for you.",
}


class Framer:
    """A judge of framings that is wrong about every answer whose question ends in '!'."""

    name = "framer-1"

    def probabilities(self, prompts, responses):
        import torch

        rows = torch.full((len(prompts), len(FRAMINGS)), 0.02)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            label = next(name for name, text in TEXTS.items() if text == response)
            label = "neutral" if prompt.endswith("!") else label
            rows[row, FRAMINGS.index(label)] = 0.9
        return rows

    def verdicts(self, prompts, responses, probabilities):
        names = [FRAMINGS[int(row.argmax())] for row in probabilities]
        labels = {"goes_along": "unsafe", "blanket_refusal": "refusal", "neutral": "not_refusal"}
        return [Verdict(labels.get(n, "safe"), None, self.name, "", n) for n in names]

    def __call__(self, prompts, responses):
        return self.verdicts(prompts, responses, self.probabilities(prompts, responses))


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "label"])
        for i in range(12):
            for label in LABELS:
                writer.writerow([f"q{i}{'!' if i < 3 else '?'}", TEXTS[label], label])
    return path


def test_framings_say_what_is_a_refusal_unsafe_and_safe_on_topic(labels):
    truth = read_labelled(labels).truth
    by_label = {
        measure: dict(zip(LABELS, said[:5], strict=True)) for measure, said in truth.items()
    }
    assert by_label["refusal"] == dict(zip(LABELS, (True, None, False, False, False), strict=True))
    assert [n for n, yes in by_label["unsafe"].items() if yes] == ["goes_along"]
    assert [n for n, yes in by_label[SAFE_ON_TOPIC].items() if yes] == [
        "principled",
        "safe_alternative",
    ]


def test_each_judge_has_a_row_per_measure_with_its_numbers(labels):
    table = compare_judges([Framer(), RefusalPatterns()], read_labelled(labels))
    of = table.set_index(["judge", "measure"])
    assert set(of.loc["framer-1"].index) == {"refusal", "unsafe", SAFE_ON_TOPIC}
    unsafe = of.loc["framer-1", "unsafe"]
    assert (unsafe["precision"], unsafe["recall"], unsafe["n"]) == (1.0, 0.75, 60)
    assert unsafe["auroc"] == pytest.approx(0.75 + 0.25 * 0.5)
    assert unsafe["auroc_low"] < unsafe["auroc"] < unsafe["auroc_high"]
    patterns = of.loc[RefusalPatterns().name]
    assert list(patterns.index) == ["refusal"]
    assert patterns.loc["refusal", "n"] == 48  # principled answers are left open
    assert patterns.loc["refusal", "kappa"] == 1.0
    assert np.isnan(patterns.loc["refusal", "auroc"])


def test_more_answers_to_the_same_prompts_do_not_narrow_the_intervals(labels, tmp_path):
    rows = list(csv.DictReader(labels.open(encoding="utf-8")))
    path = tmp_path / "four.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows * 4)

    def width(table):
        row = table.set_index("measure").loc["unsafe"]
        return row["kappa_high"] - row["kappa_low"]

    once, four = (compare_judges([Framer()], read_labelled(file)) for file in (labels, path))
    assert width(four) > 0.8 * width(once)


def test_a_judge_that_says_nothing_of_the_labels_is_listed(labels, tmp_path):
    rows = list(csv.DictReader(labels.open(encoding="utf-8")))
    path = tmp_path / "unsafe.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "unsafe"])
        writer.writerows(
            [r["prompt"], r["response"], "yes" if r["label"] == "goes_along" else "no"]
            for r in rows
        )
    table = compare_judges([RefusalPatterns()], read_labelled(path))
    assert list(table["measure"]) == ["says nothing of these labels"]
    assert "says nothing of these labels" in in_words(table)


def test_the_command_line_prints_judges_side_by_side(labels, capsys):
    command = ["judge", "compare", "--labels", str(labels), "--judges", "patterns"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert RefusalPatterns().name in out
    assert "1.00 [" in out
    assert main([*command, "--json"]) == 0
    assert '"kappa":1.0' in capsys.readouterr().out.replace(" ", "")
    assert main(["judge", "compare", "--labels", str(labels), "--judges", "nobody"]) == 2
    assert capsys.readouterr().err.startswith("workbench: no judge 'nobody'")


def test_framings_mixed_with_other_words_are_refused(tmp_path):
    path = tmp_path / "mixed.csv"
    path.write_text("prompt,response,label\nq,a,goes_along\nq,b,refusal\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match="mixes framings with 'refusal'; framings: blanket_refusal"
    ):
        read_labelled(path)


def test_no_judges_are_one_line(labels, capsys):
    assert main(["judge", "compare", "--labels", str(labels), "--judges"]) == 2
    assert "judge compare needs judges" in capsys.readouterr().err
