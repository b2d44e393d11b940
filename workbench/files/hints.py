"""Sites: which vector inside a transformer is meant. The only place that spells a TransformerLens hook name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A hint for an error message: the closest allowed word, or nothing."""
    matches = get_close_matches(given, list(allowed), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
