"""What a run needs is checked before its first pass, and one run at a time writes a folder."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.runs import settings

from workbench import cli
from workbench.files.locks import locked_folder
from workbench.prompts.prompt import load_prompts, save_prompts, split_prompts
from workbench.safesteer import inputs, recalibration, recipe
from workbench.safesteer.constructions import CONSTRUCTIONS, GUIDED
from workbench.safesteer.recalibration import recalibrate
from workbench.safesteer.recipe import run
from workbench.safesteer.run_folder import saved_vectors
from workbench.safesteer.saved_run import gated_steering_from, steering_from

if TYPE_CHECKING:
    from pathlib import Path


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("the run went on")


@pytest.mark.parametrize("fold", ["fit", "tune", "test"])
def test_prompts_that_do_not_fit_are_all_named_before_the_first_pass(
    fold: str, few_prompts: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = load_prompts(few_prompts)
    long = {p.id for p in getattr(split_prompts(prompts, seed=0), fold)[:2]}
    texts = [replace(p, text=p.text + " word" * 700) if p.id in long else p for p in prompts]
    save_prompts(tmp_path / "p.jsonl", texts)
    monkeypatch.setattr(recipe, "answer_fit_questions", never)
    with pytest.raises(ValueError, match=r"does not fit: .* for \d more: ") as said:
        run(settings(tmp_path / "p.jsonl"), tmp_path / "run", model=tiny)
    assert all(prompt_id in str(said.value) for prompt_id in long)
    assert not (tmp_path / "run").exists()


def test_room_for_the_answer_counts(
    few_prompts: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "answer_fit_questions", never)
    config = replace(settings(few_prompts), max_new_tokens=500)
    with pytest.raises(ValueError, match="tokens and 500 new ones, context 512"):
        run(config, tmp_path / "run", model=tiny)


def test_an_encoder_that_cannot_be_had_is_said_before_the_first_pass(
    few_prompts: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise OSError("no sentence encoder")

    monkeypatch.setattr(inputs, "load_encoder", missing)
    monkeypatch.setattr(recipe, "answer_fit_questions", never)
    with pytest.raises(OSError, match="no sentence encoder"):
        run(settings(few_prompts), tmp_path / "run", model=tiny)


def test_a_category_of_any_name_has_files_of_its_own(
    few_prompts: Path, tmp_path: Path, tiny: Any
) -> None:
    long, slashed = "risk of " + "x" * 300, "a/../b"
    new = {"fraud": long, "malware": slashed}
    prompts = [
        replace(p, category=new.get(p.category, p.category)) for p in load_prompts(few_prompts)
    ]
    save_prompts(tmp_path / "p.jsonl", prompts)
    out = run(settings(tmp_path / "p.jsonl"), tmp_path / "run", model=tiny)
    for by_category in saved_vectors(out).values():
        assert set(by_category) == {long, slashed}
    for category in (long, slashed):
        assert steering_from(out, category)
    assert {one.gate_category for one in gated_steering_from(out)} == {long, slashed}
    outside = {p.name for p in tmp_path.iterdir()} - {"p.jsonl", "run"}
    assert not outside


def test_a_second_run_of_a_folder_is_refused_while_the_first_goes_on(
    few_prompts: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> None:
        begun.set()
        may_end.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "answer_fit_questions", slow)
    results: list[BaseException] = []

    def first() -> None:
        try:
            run(settings(few_prompts), tmp_path / "run", model=tiny)
        except KeyboardInterrupt as error:
            results.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert begun.wait(60)
        for resume in (False, True):
            with pytest.raises(ValueError, match="is in use: another run is writing into it"):
                run(settings(few_prompts), tmp_path / "run", model=tiny, resume=resume)
    finally:
        may_end.set()
        thread.join()
    assert results
    with pytest.raises(ValueError, match="holds a run already"):
        run(settings(few_prompts), tmp_path / "run", model=tiny)


def test_runs_without_a_name_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        @staticmethod
        def now() -> Any:
            import datetime

            return datetime.datetime(2026, 3, 14, 9, 26, 53)

    class Clock:
        datetime = Stopped

    monkeypatch.setattr(cli, "datetime", Clock)
    folders = [cli._new_folder(tmp_path / "runs") for _ in range(3)]
    assert [f.name for f in folders] == [
        "20260314-092653", "20260314-092653-2", "20260314-092653-3",
    ]  # fmt: skip
    assert all(folder.is_dir() for folder in folders)


def test_a_run_of_another_model_is_not_searched_again(
    finished: Path, family_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalibration, "calibrate", never)
    with pytest.raises(ValueError, match=r"was made with other weights \('tiny-llama3'\) than"):
        recalibrate(finished, model=family_model("qwen2"))


def test_two_searches_of_one_run_do_not_mix(finished: Path, tmp_path: Path, tiny: Any) -> None:
    copy = shutil.copytree(finished, tmp_path / "run")
    with (
        locked_folder(copy / "calibration"),
        pytest.raises(ValueError, match="is in use"),
    ):
        recalibrate(copy, model=tiny)


def test_the_papers_vector_is_searched_again_with_both_signs(
    finished: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def looked_at(*arguments: Any, **_: Any) -> None:
        asked.extend(arguments[3])
        raise KeyboardInterrupt

    monkeypatch.setattr(recalibration, "calibrate", looked_at)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(finished, constructions=["prompt_contrast"], model=tiny)
    assert {setting.sign for setting in asked} == {1, -1}
    assert CONSTRUCTIONS[GUIDED].signs == (1, -1)
