"""Show how far a long call is: with a bar of its own, or as a part of the bar of its caller.

A run has one bar for everything. Inside ``folded_into`` the calls below it show no bars and write
no lines: they report their steps to the run instead.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Listener(Protocol):
    """Take the steps that calls below report."""

    def expect(self, unit: str, total: int, done: int) -> None:
        """Hear that a call begins: how many steps it has, and how many of them it found done."""

    def advance(self, unit: str, steps: float) -> None:
        """Hear that steps were done."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def folded_into(listener: Listener) -> Iterator[None]:
    """Let the calls inside the block report to a listener instead of showing bars of their own."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def progress_bar(total: int, what: str, unit: str, *, show: bool, done: int = 0) -> Any:
    """Make what a loop reports its steps to: the caller's bar, a bar of its own, or nothing.

    Args:
        total: Steps, all together.
        what: Label of a bar of its own.
        unit: What a step is; a listener tells kinds of steps apart by it.
        show: Whether there is a bar where nobody listens.
        done: Steps that need not be done any more.

    Returns:
        Something with ``n``, ``update(steps)`` and ``close()``, which can be a context manager.
    """
    listener = _listener.get()
    if listener is not None:
        listener.expect(unit, total, done)
        return _Part(listener, unit, done)
    from tqdm.auto import tqdm

    hidden = not (show and total)
    return tqdm(total=total, desc=what, unit=unit, initial=done, disable=hidden)


def say(text: str, *, show: bool) -> None:
    """Write a line to standard error above any bar, where it is wanted and nobody listens."""
    if show and _listener.get() is None:
        from tqdm.auto import tqdm

        tqdm.write(text, file=sys.stderr)


@dataclass
class _Part:
    """Look like a bar, and report to a listener."""

    listener: Listener
    unit: str
    n: float

    def update(self, steps: float = 1) -> None:
        """Report steps that were done."""
        self.n += steps
        self.listener.advance(self.unit, steps)

    def close(self) -> None:
        """Do nothing: the listener has its own end."""

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        return None
