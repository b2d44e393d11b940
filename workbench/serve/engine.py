"""Own the model in one thread, which writes all answers in one running batch.

Requests wait in a line, first come first served. A prompt is read as soon as a row is free and the
memory holds it; then it is written on together with all others, whatever their vectors are. Nobody
else runs the model, so a request can never see the hooks of another one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.generation._memory import bytes_per_row, memory_budget
from workbench.generation.running import Asked, RunningBatch, Token

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from workbench.models.hooked_model import HookedModel

    Deliver = Callable[[Sequence["Token | Failed"]], None]
    """Takes what was written in one step, in the model's thread."""

log = logging.getLogger(__name__)

PROMPT_COLUMNS = 4096
"""Tokens of prompts, padding counted, that are read in one pass while other rows wait for it."""


class Failed(NamedTuple):
    """Say that an answer could not be written; the reason is in the log."""

    asked: Asked


class Engine:
    """Write answers in a thread of its own.

    Args:
        model: A hooked model.
        deliver: Takes what was written, step by step; it must return at once.
        max_rows: Answers that are written at the same time, at most.

    Raises:
        ValueError: If the model keeps no cache to go on from.
    """

    def __init__(self, model: HookedModel, deliver: Deliver, *, max_rows: int = 32) -> None:
        self.model, self.deliver, self.max_rows = model, deliver, max_rows
        self._batch = RunningBatch(model)
        self._budget = memory_budget(model)
        self._waiting: deque[Asked] = deque()
        self._gone: list[Asked] = []
        self._calls: deque[tuple[Callable[[HookedModel], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stops = False
        self._n_running = 0
        self._thread = threading.Thread(target=self._run, name="workbench-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Answers that wait for a row."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Answers that are written."""
        return self._n_running

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, asked: Sequence[Asked]) -> None:
        """Put answers into the line."""
        with self._changed:
            self._waiting.extend(asked)
            self._changed.notify()

    def cancel(self, asked: Collection[Asked]) -> None:
        """Stop writing answers, or waiting for them; nothing more of them is delivered."""
        gone = set(map(id, asked))
        with self._changed:
            self._waiting = deque(one for one in self._waiting if id(one) not in gone)
            self._gone.extend(asked)
            self._changed.notify()

    def call(self, function: Callable[[HookedModel], Any]) -> Future[Any]:
        """Run a function of the model between two steps, while no hook is set."""
        future: Future[Any] = Future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread, whatever it was writing."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stops or self._waiting or self._calls or self._batch.alive):
                    self._gone.clear()
                    self._batch.close()
                    self._changed.wait()
                if self._stops:
                    break
                gone, self._gone = self._gone, []
                self._batch.leave(gone)
                joining, calls = self._take(), list(self._calls)
                self._calls.clear()
            for function, future in calls:
                self._batch.unhook()
                _answer_call(future, function, self.model)
            if joining:
                self._join(joining)
            self._step()
            self._n_running = len(self._batch.alive)
        self._batch.close()

    def _take(self) -> list[Asked]:
        """Take as many answers out of the line as may join now."""
        taken: list[Asked] = []
        alive = self._batch.alive
        while self._waiting:
            one = self._waiting[0]
            width = max(len(x.encoded.ids) for x in (*taken, one))
            is_much = taken and width * (len(taken) + 1) > PROMPT_COLUMNS
            if is_much or not self._batch.may_join(taken, one):
                break
            if not self._fits([*alive, *taken, one]):
                break
            taken.append(self._waiting.popleft())
        return taken

    def _fits(self, rows: Sequence[Asked]) -> bool:
        """Tell whether the memory holds rows, all as long as the longest may become."""
        if len(rows) == 1:
            return True
        n_prompt = max(len(one.encoded.ids) for one in rows)
        n_new = max(len(one.encoded.ids) + one.decoding.max_new_tokens - n_prompt for one in rows)
        sampled = any(one.decoding.temperature > 0 for one in rows)
        row = bytes_per_row(self.model, n_prompt, max(n_new, 1), is_sampled=sampled)
        return len(rows) <= self.max_rows and len(rows) * row.kept <= self._budget

    def _join(self, joining: list[Asked]) -> None:
        """Read prompts; where that fails, each by itself, so that none pays for another."""
        try:
            self.deliver(self._batch.join(joining))
        except Exception as error:
            if len(joining) == 1:
                log.exception("a prompt could not be read")
                self.deliver([Failed(joining[0])])
                return
            log.warning("%d prompts are read one by one: %s", len(joining), type(error).__name__)
            for one in joining:
                self._join([one])

    def _step(self) -> None:
        """Write one token of every row; where that fails, all of them end."""
        alive = self._batch.alive
        try:
            tokens: list[Any] = self._batch.step()
        except Exception:
            log.exception("%d answers could not be written on", len(alive))
            tokens = [Failed(one) for one in alive]
            self._batch.close()
        if tokens:
            self.deliver(tokens)


def _answer_call(
    future: Future[Any], function: Callable[[HookedModel], Any], model: HookedModel
) -> None:
    """Run a function and put what comes of it into a future."""
    try:
        future.set_result(function(model))
    except Exception as error:
        future.set_exception(error)
