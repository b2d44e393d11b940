"""Judges: a prompt and its answer in, a verdict out. All judges are called alike, whatever is behind them.

A verdict says what one named judge saw, not what is true: report the judge's agreement with human labels beside its
rates, and read refusals next to degeneration and relevance (``text_quality``), for broken text is no refusal either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


LABELS = ("refusal", "not_refusal", "unsafe", "safe", "degenerate", "unscored")
"""What a verdict can say. A judge of refusals says refusal or not_refusal, a judge of harm unsafe or safe: not refused is
not the same as unsafe, nor refused the same as safe. Degenerate: no answer to judge. Unscored: the judge failed."""


@dataclass(frozen=True)
class Verdict:
    """What a judge said of one answer.

    Attributes:
        label: One of ``LABELS``.
        score: The judge's degree, on its own scale, higher for more of the label's concern; None if it gives none.
        judge: Name and version of the judge.
        reason: Why, in a few words; may quote the answer, so escape it before showing it as HTML.
    """

    label: str
    score: float | None
    judge: str
    reason: str

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ValueError(f"unknown verdict label {self.label!r}; labels: {', '.join(LABELS)}.")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(
                f"a verdict's score must be finite, got {self.score!r}; give None and label 'unscored'."
            )


class Judge(Protocol):
    """Anything that turns answers into verdicts: patterns, a guard model, an API, a probe."""

    @property
    def name(self) -> str:
        """Name and version, enough to tell two judges' numbers apart."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """One verdict an answer, in order."""
