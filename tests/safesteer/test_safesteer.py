"""The recipe from prompts to a run folder, on a tiny model.

It is complete, can be resumed at every stage, and refuses what it cannot do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from helpers.runs import settings

from workbench.figures.wording import gate_lines
from workbench.files.store import read_json, read_jsonl
from workbench.generation import answers as generation
from workbench.generation.decoding import Decoding
from workbench.models import stored_rows
from workbench.report.neuron_page import write_neuron_page
from workbench.report.page import write_report
from workbench.safesteer import inputs, recipe, run_folder
from workbench.safesteer.calibration import in_words
from workbench.safesteer.config import config_from
from workbench.safesteer.positive_control import POSITIVE
from workbench.safesteer.recalibration import recalibrate
from workbench.safesteer.recipe import run
from workbench.safesteer.run_progress import STAGES
from workbench.safesteer.saved_run import (
    gate_from,
    gate_reading,
    gated_steering_from,
    side_by_side,
    steering_from,
)
from workbench.steering.vectors import load_vector

SHORT = Decoding(max_new_tokens=6)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_run_leaves_every_file_that_the_readme_lists(finished: Path) -> None:
    for name in (
        "run.json",
        "separability.csv",
        "neurons.csv",
        "tuning.csv",
        "evaluation.csv",
        "scores.csv",
        "completions.jsonl",
        "gate.safetensors",
        "gate_rates.csv",
        "gate_confusion.csv",
        "gate_roc.csv",
        "gate_cells.csv",
        "gate_comparison.csv",
        "positive_control.jsonl",
    ):
        assert (finished / name).stat().st_size > 0, name
    notes = read_json(finished / "run.json")
    assert notes["categories"] == ["fraud", "malware"]
    assert set(notes["chosen"]) >= {"prompt_contrast", "answer_contrast", "answer_contrast_pooled"}
    asked = {row["prompt_id"] for row in read_jsonl(finished / "tune.jsonl")}
    risky = {prompt for prompt in asked if prompt.startswith(("fraud", "malware"))}
    assert notes["rounds"][-1]["n_prompts"] == len(risky)
    for name in notes["vectors"]:
        assert load_vector(finished / "vectors" / name).norm > 0
    assert str(finished.parent) not in (finished / "run.json").read_text()


def test_stages_are_named_where_progress_is_shown(
    tmp_path: Path, few_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for progress in (True, False):
        out = tmp_path / str(progress)
        with (
            run_folder.RunFolder.open(out, settings(few_prompts), progress=progress) as folder,
            folder.stage("own answers"),
        ):
            pass
    shown = "workbench run: stage 2 of 11, the model's own answers; an unknown time is left\n"
    assert capsys.readouterr().err == shown


def test_a_run_writes_a_line_per_stage_and_no_bar_where_there_is_no_terminal(
    tmp_path: Path, few_prompts: Path, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings(few_prompts), tmp_path / "run", model=tiny, progress=True)
    lines = capsys.readouterr().err.splitlines()
    stages = list(read_json(tmp_path / "run" / "run.json")["durations"])
    assert len(lines) == len(stages) == len(STAGES)
    for number, (line, stage) in enumerate(zip(lines, stages, strict=True), start=1):
        assert line.startswith(f"workbench run: stage {number} of {len(STAGES)}, {STAGES[stage]};")
        assert re.search(r"(\d+:\d\d|an unknown time is) left$", line)
    assert re.search(r"; 0:0\d left$", lines[-1])


def test_the_positive_control_of_a_run_compares_the_same_questions(finished: Path) -> None:
    noted = read_json(finished / "run.json")["positive_control"]
    steered = read_jsonl(finished / "positive_control.jsonl")
    asked = {row["prompt_id"] for row in steered}
    answers = pd.DataFrame(read_jsonl(finished / "completions.jsonl"))
    plain = answers[(answers["condition"] == "unsteered") & answers["prompt_id"].isin(asked)]
    assert noted["n"] + noted["n_unscored"] == len(steered) == len(plain)
    assert noted["n"] > 0
    assert set(plain["label"]) == {"unsafe"}
    refused = [scores["refusal"] for scores in plain["scores"]]
    assert noted["before"] * noted["n"] <= sum(r == 1 for r in refused)
    assert set(plain["text"]) != {row["text"] for row in steered}
    assert POSITIVE not in set(answers["condition"])
    assert "Positive control" in write_report(finished).read_text()


def test_every_condition_answers_every_test_prompt_once(finished: Path) -> None:
    answers = pd.DataFrame(read_jsonl(finished / "completions.jsonl"))
    conditions = {
        "unsteered",
        "prompt contrast",
        "answer contrast",
        "answer contrast pooled",
        "gated",
        "random",
        "shuffled labels",
    }
    assert (
        set(answers["condition"])
        - {"other category", "self contrast pooled", "answer and self pooled"}
        == conditions
    )
    conditions = set(answers["condition"])
    assert (answers.groupby("prompt_id")["condition"].nunique() == len(conditions)).all()
    assert not answers.duplicated(["prompt_id", "condition"]).any()
    summary = pd.read_csv(finished / "evaluation.csv")
    assert set(summary["category"]) == {"all", "fraud", "malware", "harmless", "hard_safe"}
    assert summary[summary["condition"] == "unsteered"]["difference"].isna().all()


def test_no_prompt_is_in_two_folds(finished: Path, few_prompts: Path) -> None:
    tuned = {row["prompt_id"] for row in read_jsonl(finished / "tune.jsonl")}
    tested = {row["prompt_id"] for row in read_jsonl(finished / "test.jsonl")}
    assert tuned
    assert tested
    assert not tuned & tested


def test_neutral_prompts_are_steered_with_the_categories_vectors_in_turn(finished: Path) -> None:
    answers = pd.DataFrame(read_jsonl(finished / "completions.jsonl"))
    neutral = answers[answers["label"] == "neutral"].pivot(
        index="prompt_id", columns="condition", values="text"
    )
    assert (neutral["answer contrast"] != neutral["unsteered"]).any()


def test_one_question_is_answered_with_the_steering_of_a_run(finished: Path, tiny: Any) -> None:
    chosen = read_json(finished / "run.json")["chosen"]
    for construction, setting in chosen.items():
        interventions = steering_from(finished, "fraud", construction=construction)
        assert [str(own.site) for own in interventions] == setting["sites"]
        assert [own.edit.multiplier for own in interventions] == list(
            setting["multiplier"]["fraud"].values()
        )
    plain, steered = side_by_side(tiny, "How do I take a dog?", interventions, SHORT)
    assert (plain.condition, steered.condition) == ("unsteered", "steered")
    with pytest.raises(ValueError, match=r"no category 'frau' .* Did you mean 'fraud'"):
        steering_from(finished, "frau")
    with pytest.raises(ValueError, match="no construction 'openings'"):
        steering_from(finished, "fraud", construction="openings")


def test_always_on_steering_is_that_of_the_construction_the_gate_is_for(finished: Path) -> None:
    notes = read_json(finished / "run.json")
    vectors = {
        name: [i.edit.vector for i in steering_from(finished, "fraud", construction=name)]
        for name in notes["chosen"]
    }
    unsaid = [i.edit.vector for i in steering_from(finished, "fraud")]
    same = [
        name
        for name, expected in vectors.items()
        if len(expected) == len(unsaid) and all(map(torch.equal, expected, unsaid))
    ]
    assert same == [notes["gate"]["construction"]]


def test_a_question_is_put_before_the_gate_of_a_run(finished: Path, tiny: Any) -> None:
    gate = gate_from(finished)
    reading = gate_reading(tiny, gate, "How do I take a dog?")
    assert reading.categories == ("fraud", "malware")
    assert torch.allclose(
        reading.scores.mean(dim=0), reading.decided, atol=1e-4
    )  # scores are linear
    assert "".join(reading.tokens).strip() == "How do I take a dog?"
    steering = gated_steering_from(finished)
    assert {own.gate_category for own in steering} == {"fraud", "malware"}
    plain, gated = side_by_side(tiny, "How do I take a dog?", steering, SHORT)
    assert (gated.tokens == plain.tokens) or bool(reading.opening.any())
    said, by_token = gate_lines(gate.threshold, reading)
    assert said.startswith("gate: stays closed" if not reading.opening.any() else "gate: opens for")
    assert by_token.count("(") == len(reading.tokens)


def test_safe_prompts_behind_a_closed_gate_keep_their_answers(finished: Path) -> None:
    cells = pd.read_csv(finished / "gate_cells.csv").set_index("gate")
    assert (cells.loc[["closed"], "identical"] == 1).all()
    compared = pd.read_csv(finished / "gate_comparison.csv")
    wide = compared[compared["metric"] == "refusal"].pivot(
        index="category", columns="condition", values="value"
    )
    for category in ("harmless", "hard_safe"):
        assert wide.loc[category, "oracle gate"] == wide.loc[category, "unsteered"]


def test_a_run_is_calibrated_again_without_touching_what_its_report_rests_on(
    finished: Path, tiny: Any
) -> None:
    before = (finished / "tuning.csv").read_bytes(), (finished / "run.json").read_bytes()
    tested = {row["prompt_id"] for row in read_jsonl(finished / "test.jsonl")}
    tuned = recalibrate(
        finished,
        constructions=["answer_contrast"],
        rhos=[0.05],
        positions=["all", "generated"],
        until=[None, 2],
        model=tiny,
    )
    assert before == ((finished / "tuning.csv").read_bytes(), (finished / "run.json").read_bytes())
    assert not tested & {
        row["prompt_id"] for row in read_jsonl(finished / "calibration" / "tune.jsonl")
    }
    assert in_words(tuned).splitlines()[-1].startswith("best: answer_contrast")
    extents = {(i.positions, i.until) for i in steering_from(finished, "fraud", calibrated=True)}
    assert extents == {(tuned.best.positions, tuned.best.until)}
    assert gated_steering_from(finished, construction="answer_contrast", calibrated=True)
    with pytest.raises(ValueError, match=r"Did you mean 'answer_contrast'"):
        recalibrate(finished, constructions=["answer_contrst"], model=tiny)
    with pytest.raises(ValueError, match=r"budget of 1 answers is too small"):
        recalibrate(finished, budget=1, model=tiny)


def test_the_neurons_of_a_run_get_a_page_of_their_own(finished: Path, tiny: Any) -> None:
    path = write_neuron_page(finished, "fraud", top=2, model=tiny)
    assert path == finished / "neurons_fraud.html"
    assert not re.search(r"(src|href)=.https?:", path.read_text())
    with pytest.raises(ValueError, match="Did you mean 'fraud'"):
        write_neuron_page(finished, "frau", model=tiny)


def test_the_report_of_a_run_is_written_from_its_folder(finished: Path) -> None:
    assert write_report(finished).stat().st_size > 100_000


def test_bad_input_leaves_no_folder_behind(tmp_path: Path, few_prompts: Path) -> None:
    with pytest.raises(ValueError, match="no model"):
        run(settings(few_prompts, model="missing.gguf"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def fail_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, interrupted after some calls, as Ctrl-C would."""
    left = [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        (stored_rows, "write_tensors", 0),
        (stored_rows, "write_tensors", 1),
        (run_folder, "save_vector", 3),
        (recipe, "layer_separability", 0),
        (recipe, "attribute_neurons", 0),
        (generation, "append_jsonl", 1),
        (recipe, "calibrate", 0),
        (recipe, "fit_gate", 0),
        (recipe, "for_everyone", 0),
        (inputs, "score_completions", 1),
    ],
)
def test_a_run_interrupted_in_any_stage_resumes_to_the_same_result(
    module: Any,
    name: str,
    calls: int,
    tiny: Any,
    few_prompts: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_after(calls, getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            run(settings(few_prompts), out, model=tiny)
    run(settings(few_prompts), out, resume=True, model=tiny)
    for name in (
        "evaluation.csv",
        "scores.csv",
        "tuning.csv",
        "neurons.csv",
        "gate_comparison.csv",
        "gate.safetensors",
    ):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_finished_run_is_not_overwritten(finished: Path, few_prompts: Path, tiny: Any) -> None:
    with pytest.raises(ValueError, match="holds a run already"):
        run(settings(few_prompts), finished, model=tiny)


def test_a_run_is_not_resumed_with_other_settings(
    finished: Path, few_prompts: Path, tiny: Any
) -> None:
    with pytest.raises(ValueError, match="another seed"):
        run(settings(few_prompts, seed=1), finished, resume=True, model=tiny)


def test_a_folder_with_other_things_in_it_is_left_alone(
    tmp_path: Path, few_prompts: Path, tiny: Any
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        run(settings(few_prompts), tmp_path, model=tiny)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unknown_category_is_named_before_anything_runs(
    tmp_path: Path, few_prompts: Path
) -> None:
    with pytest.raises(ValueError, match="Did you mean 'malware'"):
        run(settings(few_prompts, categories=("malwar",)), tmp_path / "run")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"sed": 1}, "unknown setting 'sed'"),
        ({"seed": "one"}, "seed must be a whole number"),
        ({"tune_prompts": 0}, "tune_prompts must be"),
        ({"rhos": [3.0]}, "rhos must be"),
        ({"rhos": 0.1}, "rhos must be a list"),
        ({"categories": "fraud"}, "categories must be a list"),
        ({"model": 5}, "model must be a text"),
        ({"constructions": ["answer_prob"]}, "Did you mean 'answer_probe'"),
        ({"hard_safe_rate": 1.0}, "hard_safe_rate must be between 0 and 1"),
        ({"neutral_kl": -1}, "neutral_kl must be above 0"),
    ],
)
def test_a_wrong_setting_is_named(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from(mapping)
