"""Show how far a run is: one bar with the time left, or a line per stage without a terminal.

Every kind of work has a usual time, measured on two processor cores with the embedded model. What a
run measures of itself takes its place: the time of an answer in an early stage is what answers of
a later stage are expected to take.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.models.progress import Listener

if TYPE_CHECKING:
    from typing import TextIO

Work = Mapping[str, float]
"""Kind of work to how much of it there is: answers, prompts, readings, verdicts, or "seconds"."""
SECONDS = {"seconds": 1.0, "answer": 0.09, "prompt": 0.045, "reading": 0.06, "verdict": 0.001}
"""What one piece of work usually takes."""
STAGES = {
    "load": "model and prompts",
    "own answers": "the model's own answers",
    "activations": "activations",
    "vectors": "vectors",
    "separability": "separability",
    "neurons": "neurons",
    "tune": "place and strength",
    "gate": "gate",
    "test": "test answers",
    "positive control": "positive control",
    "evaluate": "scores of the answers",
}
"""Stages of a run in order, and what they are called while they are shown."""
FITTED = "fitted questions"
"""A stage after all others, of runs that are told to evaluate such questions."""
TITLES = {**STAGES, FITTED: "questions that vectors were fitted on"}
USUAL: dict[str, Work] = {"load": {"seconds": 6.0}}
"""Work that is known before model and prompts are there."""


class RunProgress(Listener):
    """Keep account of a run's work, and show what is left of it.

    Args:
        finished: Seconds of the stages that an earlier, interrupted run finished: they count at
            once.
        more: Stages of ``TITLES`` that this run has beside ``STAGES``.
        stream: Where it is shown; standard error by default.
        clock: Seconds that go by.
    """

    def __init__(
        self,
        finished: Mapping[str, float] | None = None,
        *,
        more: Sequence[str] = (),
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._finished = dict(finished or {})
        self._resumed = bool(self._finished)
        self._stream, self._clock = stream or sys.stderr, clock
        self._work: dict[str, dict[str, float]] = {name: {} for name in (*STAGES, *more)}
        self._left: dict[str, dict[str, float]] = {}
        self.plan(USUAL)
        self._is_planned = False
        self._steps: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._began = self._mark = clock()
        self._stage, self._stage_began = "", self._began
        self._bar: Any = None

    def plan(self, work: Mapping[str, Work]) -> None:
        """Say how much work stages have; what earlier runs finished is not counted again."""
        self._is_planned = True
        for stage, amounts in work.items():
            self._work[stage] = dict(amounts)
            if stage not in self._finished:
                self._left[stage] = dict(amounts)

    def begin(self, stage: str) -> None:
        """Name the stage that begins, on the bar or as a line."""
        self._work.setdefault(stage, {})
        self._stage, self._stage_began = stage, self._clock()
        if self._stream.isatty():
            self._show()
        else:
            self._stream.write(f"{self._label()}; {self._time_left()}\n")
            self._stream.flush()

    def end(self) -> None:
        """Count the stage as done."""
        self._left.pop(self._stage, None)
        self._show()

    def close(self) -> None:
        """End the bar, which stays where it is."""
        if self._bar is not None:
            self._bar.close()

    def expect(self, unit: str, total: int, done: int) -> None:
        """Hear that a call begins; in a run that goes on, what it found done is not left."""
        self._mark = self._clock()
        left = self._left.setdefault(self._stage, {})
        planned = left.get(unit, 0.0) - (done if self._resumed else 0)
        left[unit] = max(planned, float(total - done))

    def advance(self, unit: str, steps: float) -> None:
        """Hear that steps were done, and learn what they take."""
        now = self._clock()
        if self._stage in self._finished:  # read from disk: it says nothing of what work takes
            return
        self._steps[unit] = self._steps.get(unit, 0.0) + steps
        self._seconds[unit] = self._seconds.get(unit, 0.0) + now - self._mark
        self._mark = now
        left = self._left.setdefault(self._stage, {})
        left[unit] = max(0.0, left.get(unit, 0.0) - steps)
        self._show()

    def seconds_left(self) -> float:
        """Estimate the seconds until the run is done."""
        pace = self._pace()
        seconds = 0.0
        for stage, amounts in self._left.items():
            for unit, amount in amounts.items():
                if unit == "seconds" and stage == self._stage:
                    passed = self._clock() - self._stage_began
                    seconds += max(0.0, amount * pace - passed)
                else:
                    seconds += amount * self._seconds_per(unit, pace)
        return seconds

    def _seconds_per(self, unit: str, pace: float) -> float:
        """Give what a piece of work takes: as measured in this run, or as usual at its pace."""
        steps = self._steps.get(unit, 0.0)
        return self._seconds[unit] / steps if steps else SECONDS.get(unit, 0.0) * pace

    def _pace(self) -> float:
        """Divide the time that work took so far by what it usually takes."""
        usual = sum(SECONDS.get(unit, 0.0) * n for unit, n in self._steps.items())
        took = sum(self._seconds[unit] for unit in self._steps if unit in SECONDS)
        for stage, seconds in self._finished.items():
            amounts = self._work.get(stage, {})
            if amounts and stage != "load":
                usual += sum(SECONDS.get(unit, 0.0) * n for unit, n in amounts.items())
                took += seconds
        return took / usual if usual and took else 1.0

    def _label(self) -> str:
        names = list(self._work)
        number = names.index(self._stage) + 1
        title = TITLES.get(self._stage, self._stage)
        return f"workbench run: stage {number} of {len(names)}, {title}"

    def _time_left(self) -> str:
        if not self._is_planned:
            return "an unknown time is left"
        minutes, seconds = divmod(round(self.seconds_left()), 60)
        return f"{minutes}:{seconds:02d} left"

    def _show(self) -> None:
        """Draw the bar, where there is a terminal."""
        if not self._stream.isatty():
            return
        from tqdm import tqdm

        if self._bar is None:
            form = "{desc} {bar} {percentage:3.0f} %, {postfix}"
            self._bar = tqdm(total=1.0, bar_format=form, file=self._stream, dynamic_ncols=True)
        spent = sum(self._finished.values()) + self._clock() - self._began
        left = self.seconds_left()
        self._bar.n = spent / max(spent + left, 1e-9) if self._is_planned else 0.0
        self._bar.set_description_str(self._label(), refresh=False)
        self._bar.postfix = self._time_left()
        self._bar.refresh()
