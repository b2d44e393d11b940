"""Validation and the probe judge: many forms of labels, agreement by hand, an honest card."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from workbench.cli import main
from workbench.judges.base import Verdict
from workbench.judges.opening import open_judge
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.probe import load_probe, save_probe, train_probe
from workbench.judges.validation import (
    LabelledAnswers,
    known_answers,
    lines,
    read_labelled,
    validate,
)
from workbench.stats.estimates import wilson_interval
from workbench.stats.selectivity import auroc_interval

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
NO, YES = "Here is how: turn the wheel.", "I'm sorry, but I can't help with that."


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


class WordEncoder:
    """Axes are known words, so that what a probe learns can be said."""

    axes = ("sorry", "wheel", "dog", "card")

    def encode(self, texts, **_):
        counts = np.array(
            [[1 + text.lower().count(word) * 5 for word in self.axes] for text in texts],
            dtype=float,
        )
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def answers(n=40):
    prompts = [f"question {i // 2} about a dog" for i in range(n)]
    responses = [(YES if i % 2 else NO) + f" card {'card ' * (i % 3)}" for i in range(n)]
    return prompts, responses, [bool(i % 2) for i in range(n)]


def test_agreement_is_what_it_is_by_hand(tmp_path):
    rows = [(YES, "yes"), (NO, "no"), (NO, "true"), (YES, "0"), (NO, "")]
    path = write(
        tmp_path / "labels.csv",
        [{"prompt": "q", "response": r, "refusal": label} for r, label in rows],
    )
    found = validate(RefusalPatterns(), read_labelled(path))["refusal"]
    assert (found.accuracy.value, found.n, found.n_unscored) == (0.5, 4, 1)
    assert (found.precision.value, found.recall.value) == (0.5, 0.5)
    assert found.kappa.value == pytest.approx(0.0)
    assert lines({"refusal": found})[0].startswith("refusal: accuracy .50 [")


def test_answers_to_one_prompt_are_no_independent_ones():
    once = [("q1", YES, True), ("q2", NO, False), ("q3", NO, True), ("q4", YES, True)]

    def measured(rows):
        prompts, responses, labels = zip(*rows, strict=True)
        labelled = LabelledAnswers(prompts, responses, {"refusal": labels})
        return validate(RefusalPatterns(), labelled)["refusal"]

    plain, copied = measured(once), measured(once * 5)
    assert copied.n == 20
    assert copied.recall.low == pytest.approx(plain.recall.low)
    # without a prompt nobody knows what belongs together
    unknown = measured([("", *rest) for _, *rest in once * 5])
    assert unknown.recall.low > plain.recall.low + 0.1


def test_a_label_column_is_read_as_refusal_and_unsafe(tmp_path):
    rows = [
        {"prompt": "q", "response": "r", "label": label}
        for label in ("Refusal", "unsafe", "safe", "")
    ]
    truth = read_labelled(write(tmp_path / "labels.csv", rows)).truth
    assert truth["refusal"] == (True, False, False, None)
    assert truth["unsafe"] == (False, True, False, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "respons": "r", "refusal": "yes"},
            "no column 'response'.* Did you mean 'respons'",
        ),
        ({"prompt": "q", "response": "r"}, "it needs a column refusal, unsafe or label"),
        (
            {"prompt": "q", "response": "r", "refusal": "maybe"},
            "row 1: a label is yes or no .* got 'maybe'",
        ),
    ],
)
def test_files_that_are_no_labels_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_labelled(write(tmp_path / "labels.csv", [row]))


def test_a_first_row_without_a_label_is_an_answer_without_one(tmp_path):
    rows = [
        {"prompt": "a", "response": "x"},
        {"prompt": "b", "response": "y", "label": "unsafe"},
        {"prompt": "c", "response": "z", "label": "safe"},
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_labelled(path).truth == {"unsafe": (None, True, False)}
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert read_labelled(path).truth == {"unsafe": (False, True, None)}
    path.write_text("".join(json.dumps({"x": 1} | row) + "\n" for row in rows[:1]))
    with pytest.raises(ValueError, match="needs a column refusal, unsafe or label; columns: x, pr"):
        read_labelled(path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["safe", "safe"], "all 2 labels say 'safe'; agreement needs answers of both kinds"),
        (["refusal", ""], "all 1 labels say 'refusal'"),
        (["unsafe"], "all 1 labels say 'unsafe'"),
        (["fine", "bad"], "no label says refusal or unsafe; column label has bad, fine"),
        (["", "nan"], "no label says refusal or unsafe; column label is empty"),
    ],
)
def test_labels_of_one_kind_or_none_are_told_as_what_they_are(tmp_path, labels, message):
    rows = [{"prompt": "q", "response": "r", "label": label} for label in labels]
    with pytest.raises(ValueError, match=message) as caught:
        read_labelled(write(tmp_path / "labels.csv", rows))
    assert "\n" not in str(caught.value)


def test_a_column_without_any_label_is_said(tmp_path):
    path = write(tmp_path / "labels.csv", [{"prompt": "q", "response": "r", "unsafe": ""}])
    with pytest.raises(ValueError, match="no answer is labelled, the cells are empty"):
        read_labelled(path)


def test_nan_is_no_label_no_prompt_and_no_answer(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(
        '[{"prompt": "a", "response": NaN, "unsafe": true},'
        ' {"prompt": "b", "response": "x", "unsafe": NaN}]'
    )
    labelled = read_labelled(path)
    assert labelled.responses == ("", "x")
    assert labelled.truth == {"unsafe": (True, None)}


def test_columns_of_labels_may_have_other_names(tmp_path):
    answers = [
        {"prompt": "a", "response": "x", "guard": 1},
        {"prompt": "b", "response": "y", "guard": 0},
    ]
    path = tmp_path / "evaluations.json"
    path.write_text(json.dumps({"rate": 0.5, "completions": answers}, indent=2))
    assert read_labelled(path, unsafe="guard").truth == {"unsafe": (True, False)}
    with pytest.raises(ValueError, match=r"no column 'gard'.* Did you mean 'guard'"):
        read_labelled(path, unsafe="gard")


def test_public_answers_with_labels_of_their_own_names_are_read():
    path = SHARED / "judge/gemma-2b-it/jailbreakbench_baseline_evaluations.json"
    if not path.is_file():
        pytest.skip("the public answers are not here")
    labelled = read_labelled(path, unsafe="is_jailbreak_llamaguard2")
    assert len(labelled.prompts) == len(set(labelled.prompts)) == 100
    assert sum(map(bool, labelled.truth["unsafe"])) == 7  # its own llamaguard2_success_rate


def test_a_judge_of_refusals_is_not_asked_about_harm(tmp_path):
    path = write(tmp_path / "labels.csv", [{"prompt": "q", "response": YES, "unsafe": "no"}])
    with pytest.raises(ValueError, match="says nothing of unsafe"):
        validate(RefusalPatterns(), read_labelled(path))


def test_unscored_answers_are_counted_and_not_guessed():
    class Half:
        name = "half"

        def __call__(self, prompts, responses):
            return [
                Verdict("unscored" if i % 2 else "unsafe", None, self.name, "")
                for i in range(len(prompts))
            ]

    labelled = type(
        "Labels",
        (),
        {"prompts": ("q",) * 4, "responses": ("r",) * 4, "truth": {"unsafe": (True,) * 4}},
    )
    found = validate(Half(), labelled)["unsafe"]
    assert (found.accuracy.value, found.n, found.n_unscored) == (1.0, 2, 2)


def test_a_probe_finds_the_word_and_is_measured_on_unseen_prompts(tmp_path):
    probe = train_probe(*answers(), measures="refusal", source="made up", encoder=WordEncoder())
    assert probe.card["auroc"]["value"] == 1.0
    assert probe.card["prompts"] == 20
    # two answers to a prompt are worth less than two prompts
    assert probe.card["agreement"]["accuracy"]["low"] == pytest.approx(wilson_interval(20, 20)[0])
    assert probe.card["auroc"]["low"] == pytest.approx(auroc_interval(1.0, 20, 20)[0])
    verdicts = probe(["question about a dog"] * 3, [YES, NO, "  "])
    assert [v.label for v in verdicts] == ["refusal", "not_refusal", "degenerate"]
    save_probe(tmp_path / "probe.safetensors", probe)
    again = load_probe(tmp_path / "probe.safetensors", encoder=WordEncoder())
    assert again.name == probe.name
    assert [v.score for v in again(["q"], [YES])] == [v.score for v in probe(["q"], [YES])]


def test_a_probe_leaves_languages_it_was_not_trained_on_unscored():
    prompts, responses, truth = answers()
    probe = train_probe(
        prompts, responses, truth, measures="refusal", source="made up", encoder=WordEncoder()
    )
    assert probe.card["languages"] == ["en"]
    german = "Es tut mir leid, aber dabei kann ich Ihnen nicht helfen."
    verdict = probe(["question about a dog"], [german])[0]
    assert verdict.label == "unscored"
    assert "in German; the probe was trained on en" in verdict.reason
    older = dataclasses.replace(probe, card={})
    assert older(["question about a dog"], [german])[0].label != "unscored"


def test_a_probe_that_memorises_prompts_is_found_out():
    """Labels hang on the prompt alone.

    With a prompt's answers on both sides this would look perfect.
    """
    generator = np.random.default_rng(0)
    prompts = [f"question {i // 4}" for i in range(120)]
    coin = generator.random(30) < 0.5
    probe = train_probe(
        prompts,
        [f"answer {'dog ' * (i % 5)}" for i in range(120)],
        [bool(coin[i // 4]) for i in range(120)],
        measures="unsafe",
        source="coin",
        encoder=WordEncoder(),
    )
    assert probe.card["auroc"]["low"] < 0.6


def test_too_few_prompts_or_another_measure_are_refused():
    with pytest.raises(ValueError, match="only 1 prompts have an answer labelled True"):
        train_probe(
            ["a", "b"],
            ["x", "y"],
            [True, False],
            measures="unsafe",
            source="",
            encoder=WordEncoder(),
        )
    with pytest.raises(ValueError, match="does not measure 'kindness'"):
        train_probe(["a"], ["x"], [True], measures="kindness", source="", encoder=WordEncoder())


def test_only_labelled_answers_are_trained_on(tmp_path):
    rows = [
        {"prompt": f"q{i}", "response": "r", "unsafe": label}
        for i, label in enumerate(("yes", "", "no"))
    ]
    labelled = read_labelled(write(tmp_path / "labels.csv", rows))
    assert known_answers(labelled, "unsafe") == (["q0", "q2"], ["r", "r"], [True, False])
    with pytest.raises(ValueError, match="no labels of 'refusal'; labelled: unsafe"):
        known_answers(labelled, "refusal")


def test_an_unknown_judge_is_named_with_those_there_are(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no judge 'pattern'; judges: framing, local:MODEL, .* Did you mean 'patterns'",
    ):
        open_judge("pattern")
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        open_judge(str(tmp_path / "other.safetensors"))


def test_the_command_line_validates_and_trains(tmp_path, capsys):
    prompts, responses, truth = answers()
    rows = [
        {"prompt": p, "response": r, "refusal": t}
        for p, r, t in zip(prompts, responses, truth, strict=True)
    ]
    path = str(write(tmp_path / "labels.csv", rows))
    assert main(["judge", "validate", "--judge", "patterns", "--labels", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refusal"]["kappa"]["value"] == 1.0
    probe = str(tmp_path / "probe.safetensors")
    assert main(["judge", "train", "--labels", path, "--measures", "refusal", "--out", probe]) == 0
    assert "on prompts it has not seen: AUROC" in capsys.readouterr().out
    assert main(["judge", "validate", "--judge", probe, "--labels", path]) == 0
    assert "refusal: accuracy" in capsys.readouterr().out
    renamed = [{"prompt": r["prompt"], "response": r["response"], "no": r["refusal"]} for r in rows]
    other = str(write(tmp_path / "other.csv", renamed))
    command = ["judge", "validate", "--judge", "patterns", "--labels", other]
    assert main([*command, "--refusal", "no"]) == 0
    assert "refusal: accuracy" in capsys.readouterr().out
    assert main(command) == 2
    assert "it needs a column refusal, unsafe or label" in capsys.readouterr().err
    assert main(["judge", "validate", "--judge", "nobody", "--labels", path]) == 2
    assert capsys.readouterr().err.startswith("workbench: no judge 'nobody'")
