"""One line says how far a run is, and learns from the run what is left of it."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from workbench.models.progress import folded_into, progress_bar, say
from workbench.safesteer.run_progress import SECONDS, RunProgress


class Clock:
    """A clock that goes on when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def started(finished: dict[str, float] | None = None, **keywords: Any) -> tuple[RunProgress, Clock]:
    clock = Clock()
    shown = RunProgress(finished, clock=clock, stream=keywords.pop("stream", io.StringIO()))
    shown.plan({"load": {"seconds": 6.0}, "tune": {"answer": 100}, "test": {"answer": 300}})
    return shown, clock


def do(shown: RunProgress, clock: Clock, stage: str, *, answers: int, each: float) -> None:
    """Do a stage of so many answers that take so long, ten at a time."""
    shown.begin(stage)
    with folded_into(shown), progress_bar(answers, "answers", "answer", show=True) as bar:
        for _ in range(0, answers, 10):
            clock.now += 10 * each
            bar.update(10)
    shown.end()


def test_what_answers_took_in_one_stage_is_expected_of_them_in_the_next() -> None:
    shown, clock = started()
    assert shown.seconds_left() == pytest.approx(6 + 400 * SECONDS["answer"])
    shown.begin("load")
    clock.now += 2
    assert shown.seconds_left() == pytest.approx(4 + 400 * SECONDS["answer"])
    shown.end()
    do(shown, clock, "tune", answers=100, each=2.0)
    assert shown.seconds_left() == pytest.approx(300 * 2.0)
    do(shown, clock, "test", answers=300, each=2.0)
    assert shown.seconds_left() == 0


def test_work_of_another_kind_is_expected_at_the_pace_that_was_measured() -> None:
    shown, clock = started()
    shown.plan({"load": {}, "test": {"reading": 10}})
    do(shown, clock, "tune", answers=100, each=3 * SECONDS["answer"])
    assert shown.seconds_left() == pytest.approx(10 * 3 * SECONDS["reading"])


def test_a_call_with_more_to_do_than_planned_corrects_the_plan() -> None:
    shown, _ = started()
    shown.begin("test")
    with folded_into(shown):
        progress_bar(500, "answers", "answer", show=False)
    assert shown.seconds_left() == pytest.approx(6 + (100 + 500) * SECONDS["answer"])


def test_finished_stages_of_a_run_that_goes_on_count_at_once() -> None:
    shown, clock = started({"load": 5.0, "tune": 100 * 2 * SECONDS["answer"]})
    assert shown.seconds_left() == pytest.approx(300 * 2 * SECONDS["answer"])  # at its pace
    shown.begin("tune")
    with folded_into(shown):
        bar = progress_bar(100, "answers", "answer", show=True, done=90)
        bar.update(10)  # read from disk in no time
    shown.end()
    assert shown.seconds_left() == pytest.approx(300 * 2 * SECONDS["answer"])
    shown.begin("test")
    with folded_into(shown):
        progress_bar(300, "answers", "answer", show=True, done=200)
    assert shown.seconds_left() == pytest.approx(100 * 2 * SECONDS["answer"])
    assert clock.now == 0


def test_without_a_terminal_there_is_a_line_per_stage() -> None:
    stream = io.StringIO()
    shown, clock = started(stream=stream)
    do(shown, clock, "tune", answers=100, each=0.2)
    do(shown, clock, "test", answers=300, each=0.2)
    assert stream.getvalue() == (
        "workbench run: stage 7 of 11, place and strength; 0:42 left\n"
        "workbench run: stage 9 of 11, test answers; 1:13 left\n"
    )


def test_on_a_terminal_one_bar_is_drawn_over_and_over() -> None:
    stream = Terminal()
    shown, clock = started(stream=stream)
    do(shown, clock, "tune", answers=100, each=1.0)
    do(shown, clock, "test", answers=300, each=1.0)
    shown.begin("load")
    shown.end()
    shown.close()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "stage 9 of 11, test answers" in text
    percents = [int(number) for number in re.findall(r"(\d+) %", text)]
    assert percents[-1] == 100
    assert 0 < percents[len(percents) // 2] < 100


def test_bars_and_lines_of_calls_are_silent_inside_a_run_and_shown_outside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown, _ = started()
    shown.begin("tune")
    with folded_into(shown):
        progress_bar(10, "answers", "answer", show=True).update(10)
        say("a line", show=True)
    assert capsys.readouterr().err == ""
    with progress_bar(10, "answers", "answer", show=True) as bar:
        bar.update(10)
    say("a line", show=True)
    say("no line", show=False)
    err = capsys.readouterr().err
    assert "answers: 100%" in err
    assert "a line\n" in err
    assert "no line" not in err
