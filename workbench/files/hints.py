"""Suggest the allowed word that a user probably meant, for error messages."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return the closest allowed word as " Did you mean 'word'?", or "" where none is close."""
    matches = get_close_matches(given, list(allowed), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


LONGEST = 300
"""Characters of another library's message that are passed on."""


def one_line(error: BaseException) -> str:
    """Give the first line of an error's message, with its type where the message says little."""
    text = " ".join((str(error).strip().splitlines() or [""])[0].split()).rstrip(".")
    if not text:
        return type(error).__name__
    if len(text) > LONGEST:
        text = text[:LONGEST] + " ..."
    says_enough = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return text if says_enough else f"{type(error).__name__}: {text}"
