"""Stand between the event loop, where clients wait, and the model's thread, where answers come."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from workbench.serve.answers import Answer
from workbench.serve.engine import Engine, Failed
from workbench.serve.errors import RequestError
from workbench.serve.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from workbench.generation.running import Asked, Token
    from workbench.models.hooked_model import HookedModel

    Gone = Callable[[], Awaitable[None]]
    """Returns once the client has gone away."""


class Pending:
    """Hold the answers that one client waits for.

    Attributes:
        answers: What came so far.
        changed: Set when there is something for the client.
        is_stream: Whether the client takes every token, or all of them at the end.
    """

    def __init__(self, asked: Sequence[Asked], *, is_stream: bool) -> None:
        self.answers = [Answer(one) for one in asked]
        self.changed = asyncio.Event()
        self.is_stream = is_stream
        self.began, self.has_first = time.monotonic(), False

    @property
    def have_ended(self) -> bool:
        """Whether nothing more comes."""
        return all(answer.has_ended for answer in self.answers)

    @property
    def failed(self) -> bool:
        """Whether one of the answers could not be written."""
        return any(answer.failed for answer in self.answers)


class Desk:
    """Hand answers to the engine, and what it writes to those who wait.

    Everything but ``deliver`` runs in the event loop.

    Args:
        model: A hooked model.
        max_rows: Answers that are written at the same time, at most.
        max_in_flight: Answers that are written or wait, at most.
    """

    def __init__(self, model: HookedModel, *, max_rows: int, max_in_flight: int) -> None:
        self.engine = Engine(model, self.deliver, max_rows=max_rows)
        self.metrics = Metrics(self.engine)
        self.max_in_flight = max_in_flight
        self._waiting: dict[int, tuple[Answer, Pending]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Begin, in the event loop that clients wait in."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def close(self) -> None:
        """End the model's thread."""
        self.engine.stop()

    def deliver(self, tokens: Sequence[Token | Failed]) -> None:
        """Take what was written in one step; called in the model's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, list(tokens))

    def ask(self, asked: Sequence[Asked], *, is_stream: bool) -> Pending:
        """Put answers into the line.

        Raises:
            RequestError: If too many are in flight already, or the model's thread has ended.
        """
        if not self.engine.is_alive:
            raise RequestError(503, "the model's thread has ended; start the server again.")
        if len(self._waiting) + len(asked) > self.max_in_flight:
            raise RequestError(
                429,
                f"{len(self._waiting)} answers are in flight and {self.max_in_flight} may be; "
                "ask again in a moment.",
                code="too_many_requests",
            )
        pending = Pending(asked, is_stream=is_stream)
        for answer in pending.answers:
            self._waiting[id(answer.asked)] = answer, pending
        self.engine.submit(asked)
        self.metrics.prompt_tokens.inc(
            sum(len(one.encoded.ids) for one in asked if one.sample == 0)
        )
        return pending

    async def whole(self, pending: Pending, gone: Gone) -> bool:
        """Wait for all answers; return whether the client is still there."""
        async for _ in self.changes(pending, gone):
            if pending.have_ended:
                return True
        return False

    async def changes(self, pending: Pending, gone: Gone) -> AsyncIterator[None]:
        """Yield whenever something has come, until all has, or until the client has gone."""
        leaving = asyncio.ensure_future(gone())
        try:
            while not leaving.done():
                coming = asyncio.ensure_future(pending.changed.wait())
                await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    return
                pending.changed.clear()
                yield
                if pending.have_ended:
                    return
        finally:
            leaving.cancel()
            self._leave(pending)

    def _leave(self, pending: Pending) -> None:
        """Let go of what a client waited for; rows that are still written are freed."""
        going = [one.asked for one in pending.answers if not one.has_ended]
        for answer in pending.answers:
            self._waiting.pop(id(answer.asked), None)
        if going:
            self.engine.cancel(going)
            self.metrics.cancelled.inc(len(going))

    def _hand_out(self, tokens: Sequence[Any]) -> None:
        self.metrics.tokens.inc(len(tokens))
        self.metrics.passes.inc()
        for token in tokens:
            answer, pending = self._waiting.get(id(token.asked), (None, None))
            if answer is None or pending is None or answer.has_ended:
                continue
            answer.take(None if isinstance(token, Failed) else token)
            self._measure(answer, pending)
            if answer.has_ended:
                self._waiting.pop(id(answer.asked), None)
            if pending.is_stream or pending.failed or pending.have_ended:
                pending.changed.set()

    def _measure(self, answer: Answer, pending: Pending) -> None:
        passed = time.monotonic() - pending.began
        if not pending.has_first:
            pending.has_first = True
            self.metrics.first_token.observe(passed)
        if answer.has_ended:
            finish = "failed" if answer.failed else answer.tokens[-1].finish
            steered = "yes" if answer.asked.interventions else "no"
            self.metrics.answers.labels(finish, steered).inc()
        if pending.have_ended:
            self.metrics.duration.observe(passed)
