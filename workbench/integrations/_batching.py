"""Answer requests that come one by one together, in batches, with one thread at the model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from workbench.generation.answers import Completion, generate
from workbench.models.tokens import encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.generation.answers import Condition
    from workbench.generation.decoding import Decoding
    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.prompt import Prompt


WINDOW_S = 0.05
"""Seconds that the first of some requests waits for others: little beside the time of an answer,
enough for tasks that an event loop starts together."""


class Answers(NamedTuple):
    """Hold the answers to one request, sample by sample, and how long what was asked is."""

    completions: tuple[Completion, ...]
    n_prompt_tokens: int


class _Request(NamedTuple):
    prompt: Prompt
    decoding: Decoding
    future: Future[Answers]


class AnswerBatches:
    """Answer requests of many callers together.

    Harnesses send each request from a task of its own and wait for it. Requests that come within
    ``WINDOW_S`` of each other, or while the model is busy, are answered in one call if their
    settings are the same. A request that cannot be answered fails alone.

    Args:
        model: A hooked model.
        interventions: What is done to it, for every request.
    """

    def __init__(self, model: HookedModel, interventions: Condition) -> None:
        self.model, self.interventions = model, interventions
        self._waiting: list[_Request] = []
        self._lock = threading.Lock()
        self._model_thread = ThreadPoolExecutor(1, "workbench-answers")

    def ask(self, prompt: Prompt, decoding: Decoding) -> Future[Answers]:
        """Put a request among those that wait, from any thread.

        Prompts of one id and the same settings are one request: they get the same answers.
        """
        request = _Request(prompt, decoding, Future())
        with self._lock:
            self._waiting.append(request)
        self._model_thread.submit(self._answer_waiting)
        return request.future

    def _answer_waiting(self) -> None:
        """Answer all that waits, after the window; nothing where an earlier call has done it."""
        if not self._waiting:
            return
        time.sleep(WINDOW_S)
        with self._lock:
            waiting, self._waiting = self._waiting, []
        by_decoding: dict[Decoding, list[_Request]] = {}
        for request in waiting:
            if request.future.set_running_or_notify_cancel():
                by_decoding.setdefault(request.decoding, []).append(request)
        for decoding, requests in by_decoding.items():
            self._answer(requests, decoding)

    def _answer(self, requests: Sequence[_Request], decoding: Decoding) -> None:
        """Answer requests with the same settings in one call, or one by one where that fails."""
        try:
            answers = self._generate([request.prompt for request in requests], decoding)
        except Exception as error:
            if len(requests) == 1:
                requests[0].future.set_exception(error)
                return
            for request in requests:
                self._answer([request], decoding)
            return
        for request in requests:
            request.future.set_result(answers[request.prompt.id])

    def _generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> dict[str, Answers]:
        """Answer prompts, each id once."""
        distinct = list({prompt.id: prompt for prompt in prompts}.values())
        completions = generate(self.model, distinct, self.interventions, decoding)
        n = decoding.n_samples
        return {
            row.prompt.id: Answers(tuple(completions[i * n : (i + 1) * n]), len(row.ids))
            for i, row in enumerate(encode(self.model, distinct, **decoding.asked_by))
        }
