"""Tests of a run's judges: named in its settings, cached, told apart by what they do."""

from __future__ import annotations

import shutil

import pytest
from helpers.runs import settings
from helpers.tiny_models import tiny_model

from workbench.files.store import read_json, read_jsonl
from workbench.judges.base import Verdict
from workbench.judges.local import LocalJudge
from workbench.prompts.prompt import load_prompts, select_prompts, split_prompts, text_key
from workbench.report.page import write_report
from workbench.safesteer.config import RunConfig, config_from
from workbench.safesteer.inputs import without_questions_of
from workbench.safesteer.recipe import run
from workbench.safesteer.run_folder import read_run


@pytest.fixture(scope="module")
def judge_name(tmp_path_factory):
    """Name of a tiny local judge."""
    folder = tmp_path_factory.mktemp("judge") / "tiny-judge"
    return f"local:{tiny_model('llama3', folder, max_position_embeddings=4096)}"


@pytest.fixture(scope="module")
def judged(tiny, few_prompts, judge_name, tmp_path_factory):
    """A run that another judge reports than tunes."""
    config = settings(few_prompts, judge=(judge_name, "framing"), judge_dtype="float32")
    return run(config, tmp_path_factory.mktemp("run") / "judged", model=tiny)


def test_a_run_of_any_model_says_unsafe_and_safe_by_the_judge_it_was_given(judged):
    notes = read_json(judged / "run.json")
    first, second = (row for row in notes["judges"] if row["measures"] != "refusal")
    assert first["name"].startswith("local:tiny-judge:framing-")
    assert second["name"].startswith("framing:SmolLM2-135M-Instruct-")
    scores = read_run(judged).tables["scores"]
    for metric in ("unsafe", "safe", "safe_2", "safe_helpful_proxy", "safe_alternative"):
        assert scores[scores["metric"] == metric]["value"].notna().any(), metric
    assert set(read_run(judged).tables["judge_agreement"]["second"]) == {"safe_2"}
    assert "judge of safety" not in notes["left_out"]


def test_the_judge_that_tunes_is_another_one_and_the_report_says_which(judged, tmp_path):
    notes = read_json(judged / "run.json")
    assert notes["tuned_by"]["name"].startswith("framing:SmolLM2-135M-Instruct-")
    assert notes["tuned_by"]["reports"] is False
    page = write_report(shutil.copytree(judged, tmp_path / "run")).read_text(encoding="utf-8")
    assert "One judge in several roles" not in page
    assert "by another judge than the one that reports" in page
    # What the judges say besides is theirs as well, and no "built-in method".
    assert "safe and helpful (proxy), unsafe responses (%UR)</td>" in page
    assert "refusals, blanket refusals</td>" in page


def test_one_judge_that_tunes_and_reports_is_said_in_red(finished, tmp_path):
    assert read_json(finished / "run.json")["tuned_by"]["reports"] is True
    page = write_report(shutil.copytree(finished, tmp_path / "run")).read_text(encoding="utf-8")
    assert '<p class="red"><strong>One judge in several roles.</strong>' in page


def test_verdicts_are_kept_and_not_asked_for_again(judged, tiny, few_prompts, judge_name, tmp_path):
    copy = shutil.copytree(judged, tmp_path / "again")
    verdicts = (copy / "verdicts.jsonl").read_bytes()
    assert {row["judge"].partition(":")[0] for row in read_jsonl(copy / "verdicts.jsonl")} == {
        "framing",
        "local",
    }
    (copy / "evaluation.csv").unlink()
    config = settings(few_prompts, judge=(judge_name, "framing"), judge_dtype="float32")
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalJudge, "probabilities", lambda *_: asked.append(1))
        run(config, copy, resume=True, model=tiny)
    assert not asked
    assert (copy / "verdicts.jsonl").read_bytes() == verdicts
    assert (copy / "evaluation.csv").read_bytes() == (judged / "evaluation.csv").read_bytes()


def test_phrases_may_tune_in_place_of_a_judge(tiny, few_prompts, tmp_path):
    config = settings(few_prompts, tuning_judge="phrases", constructions=("answer_contrast",))
    notes = read_json(run(config, tmp_path / "run", model=tiny) / "run.json")
    phrases = {"name": "a list of safety phrases", "agreement": None, "reports": False}
    assert notes["tuned_by"] == phrases


def test_a_judge_that_cannot_be_had_is_said_before_anything_is_answered(
    tiny, few_prompts, tmp_path
):
    with pytest.raises(ValueError, match="no guard family 'wildgard'"):
        run(settings(few_prompts, judge=("guard:wildgard",)), tmp_path / "run", model=tiny)
    # Nor is the model loaded: this one is not there.
    with pytest.raises(ValueError, match="judge 'local:' names no model"):
        run(settings(few_prompts, model="nowhere", judge=("local:",)), tmp_path / "other")
    assert not (tmp_path / "run" / "fit.jsonl").exists()


class Fitted:
    """A judge that was fitted on answers to some questions."""

    name = "fitted-1"

    def __init__(self, questions):
        self.fitted_on = frozenset(text_key(p.text, p.history) for p in questions)

    def __call__(self, prompts, responses):
        return [Verdict("safe", None, self.name, "") for _ in responses]


def test_questions_a_judge_was_fitted_on_are_no_test_questions(few_prompts):
    folds = split_prompts(load_prompts(few_prompts), seed=0)
    risky = select_prompts(folds.test, label="unsafe")
    left = without_questions_of([Fitted(risky[:1])], folds)
    assert [p for p in folds.test if p not in left.test] == risky[:1]
    assert (left.fit, left.tune) == (folds.fit, folds.tune)
    with pytest.raises(ValueError, match="fitted on answers to every risky test question"):
        without_questions_of([Fitted(risky)], folds)


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        (("framing", "framing"), "one judge or two different ones"),
        (("framing", "local:a", "local:b"), "compared by 'workbench judge compare'"),
        (("patterns",), "'patterns' judges refusals, as every run does"),
        ((), "judge must be a list of one name or more"),
    ],
)
def test_judges_that_cannot_be_are_refused(judges, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(judge=judges)


def test_a_file_may_name_one_judge_as_a_text():
    assert config_from({"judge": "local:mine"}).judge == ("local:mine",)
    assert config_from({"judge": ["local:mine", "framing"]}).judge == ("local:mine", "framing")


def test_a_judge_in_a_yaml_file_is_the_runs_judge(tiny, few_prompts, tmp_path, monkeypatch):
    from workbench import cli

    asked = []
    monkeypatch.setattr(
        "workbench.safesteer.recipe.run", lambda config, *_, **__: asked.append(config)
    )
    monkeypatch.setattr("workbench.report.page.write_report", lambda folder: folder)
    for text, expected in (
        ("judge: local:mine", ("local:mine",)),
        ("judge: [local:mine, framing]", ("local:mine", "framing")),
    ):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        assert cli.main(["run", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 0
        assert asked.pop().judge == expected
    command = ["run", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--judge", "guard:wildguard"]) == 0
    assert asked.pop().judge == ("guard:wildguard",)  # a flag wins
