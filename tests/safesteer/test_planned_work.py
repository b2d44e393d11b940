"""What a run plans is what it does: settings, own answers and the stages of its bar."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from helpers.runs import settings
from helpers.tiny_models import tiny_model

from workbench.files.store import read_json, read_jsonl
from workbench.generation.decoding import Decoding
from workbench.judges.patterns import RefusalPatterns
from workbench.models.load import load_model
from workbench.prompts.prompt import load_prompts, split_prompts
from workbench.safesteer.config import RunConfig
from workbench.safesteer.constructions import GUIDED_BOTH, fit_all, measure
from workbench.safesteer.economical import half_of
from workbench.safesteer.fit_answers import answers_to_fit_on
from workbench.safesteer.inputs import Job, load_job
from workbench.safesteer.paper import places_of, settings_of
from workbench.safesteer.planned_work import n_own_answers, planned_work, settings_if_all_fit
from workbench.safesteer.recipe import run
from workbench.safesteer.run_progress import FITTED, STAGES, TITLES, RunProgress

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.prompts.prompt import Folds

SHORT = Decoding(max_new_tokens=4)


@pytest.fixture(scope="module")
def folds(few_prompts: Path) -> Folds:
    return split_prompts(load_prompts(few_prompts), seed=0)


@pytest.mark.parametrize(
    "given",
    [
        {"rhos": (0.1, 0.2), "constructions": ("prompt_contrast", "answer_contrast", "sea")},
        {"multipliers": (0.5, 1.0, 2.0), "constructions": ("prompt_contrast", "sea")},
        {"preset": "paper"},
        {"site": "mlp_out", "layers": (1, 2), "constructions": ("prompt_contrast", "sea")},
        {"applied": ("add", "first", "target"), "constructions": ("prompt_contrast", "sea")},
        {"applied": ("linear", "norm_kept"), "constructions": ("prompt_contrast", "sea")},
        {
            "applied": ("add", "first", "sqrt"),
            "multipliers": (0.5, 1.0),
            "constructions": ("prompt_contrast", "sea"),
        },
    ],
)
def test_as_many_settings_are_planned_as_are_tried(
    given: dict[str, Any], tiny: Any, folds: Folds, tmp_path: Path
) -> None:
    config = RunConfig(**given)
    places = places_of(config, tiny)
    vectors = fit_all(
        measure(tiny, folds, tmp_path, places=places), folds.fit, config.constructions
    )
    names = list(dict.fromkeys(name for name, _ in vectors))
    planned = settings_if_all_fit(config, tiny)
    tried = settings_of(config, vectors, names, places)
    assert len(planned) == len(tried) > 0
    assert half_of(planned, 40) == half_of(tried, 40)


@pytest.mark.parametrize(
    "names",
    [
        ("answer_contrast",),
        ("self_contrast_pooled",),
        ("alternative_contrast",),
        ("prompt_guided",),
        ("self_contrast_plain", "safe_against_both", GUIDED_BOTH),
    ],
)
def test_as_many_own_answers_are_planned_as_are_written(
    names: tuple[str, ...], tiny: Any, folds: Folds, tmp_path: Path
) -> None:
    written = tmp_path / "fit.jsonl"
    answers_to_fit_on(
        tiny, folds.fit, names, judge=None, refusals=RefusalPatterns(), output=written,
        decoding=SHORT,
    )  # fmt: skip
    config = RunConfig(constructions=names)
    job = Job(config, tiny, folds, (), None, RefusalPatterns(), SHORT, progress=False)
    assert n_own_answers(job) == (len(read_jsonl(written)) if written.exists() else 0)


def test_fitted_questions_are_planned_where_a_run_evaluates_them(
    few_prompts: Path, tiny: Any, tmp_path: Path
) -> None:
    def plan(**changes: Any) -> dict[str, Any]:
        config = settings(few_prompts, **changes)
        return planned_work(load_job(config, verdicts=tmp_path / "v.jsonl", model=tiny))

    usual, with_fitted = plan(), plan(fitted_is_evaluated=True)
    assert set(usual) == set(STAGES) - {"load"}
    assert set(with_fitted) == set(TITLES) - {"load"}
    risky = [p for p in split_prompts(load_prompts(few_prompts), seed=0).fit if p.label == "unsafe"]
    assert with_fitted[FITTED]["answer"] == 3 * len(risky)  # unsteered, the paper's, random


def test_vectors_of_another_model_are_measured_twice(
    few_prompts: Path, tiny: Any, tmp_path: Path
) -> None:
    def prompts_read(**changes: Any) -> float:
        config = settings(few_prompts, constructions=("answer_contrast",), device="cpu", **changes)
        job = load_job(config, verdicts=tmp_path / "v.jsonl", model=tiny)
        return planned_work(job)["activations"]["prompt"]

    chat = tiny_model("llama3", tmp_path / "chat", seed=1)
    assert prompts_read(vectors_from=str(chat)) == 2 * prompts_read()


def test_the_stage_of_fitted_questions_counts_from_the_first_line_on() -> None:
    stream = io.StringIO()
    shown = RunProgress(more=[FITTED], stream=stream)
    for stage in TITLES:
        shown.begin(stage)
        shown.end()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("workbench run: stage 1 of 12, model and prompts;")
    assert lines[-1].startswith("workbench run: stage 12 of 12, questions that vectors were fitted")


def test_a_paper_run_shows_its_stages_and_has_a_positive_control(
    few_prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(tiny_model("llama3", tmp_path / "model"), device="cpu")
    config = RunConfig(
        prompts=str(few_prompts), tune_prompts=2, max_new_tokens=4, preset="paper", layers=(2,)
    )
    capsys.readouterr()  # what loading says
    out = run(config, tmp_path / "run", model=model, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        f"workbench run: stage {number} of {len(TITLES)}, {title}"
        for number, title in enumerate(TITLES.values(), start=1)
    ]
    assert read_json(out / "run.json")["positive_control"]["n"] > 0
