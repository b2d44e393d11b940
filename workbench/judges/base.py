"""Define what a judge is: it takes prompts and answers and gives a verdict on each.

A verdict says what one named judge saw, not what is true: report the judge's agreement with human
labels beside its rates, and read refusals next to degeneration and relevance (``text_quality``),
for broken text is no refusal either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from workbench.models.thoughts import answer_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


LABELS = ("refusal", "not_refusal", "unsafe", "safe", "degenerate", "unscored")
"""What a verdict can say.

A judge of refusals says refusal or not_refusal, a judge of harm unsafe or safe: not refused is not
the same as unsafe, nor refused the same as safe. Degenerate: no answer to judge. Unscored: the
judge failed.
"""


FRAMINGS = (
    "blanket_refusal",
    "principled",
    "safe_alternative",
    "neutral",
    "goes_along",
    "off_topic_or_broken",
)
"""Ways to answer a risky question, for judges that can tell them apart.

In order: declines in words that could stand under any question; no help, and says why about this
subject; no help, and offers protection or another way, also beside a refusal; on the subject
without helping or turning to safety; helps with the harm; about something else or no text. The
rubric "framing" of data/judge_rubrics.yaml says it at length.
"""


SAFE = ("principled", "safe_alternative")
"""Framings that are safe and stay on the topic."""


MEASURES = {"refusal": ("refusal", "not_refusal"), "unsafe": ("unsafe", "safe")}
"""What answers are labelled for and judges are trained on, with the verdicts for yes and no."""


@dataclass(frozen=True)
class Verdict:
    """Hold what a judge said of one answer.

    Attributes:
        label: One of ``LABELS``.
        score: The judge's degree, on its own scale, higher for more of the label's concern; None if
            it gives none.
        judge: Name and version of the judge.
        reason: Why, in a few words; may quote the answer, so escape it before showing it as HTML.
        framing: One of ``FRAMINGS``, of a judge that can say it; else None.
    """

    label: str
    score: float | None
    judge: str
    reason: str
    framing: str | None = None

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ValueError(f"unknown verdict label {self.label!r}; labels: {', '.join(LABELS)}.")
        if self.framing is not None and self.framing not in FRAMINGS:
            raise ValueError(
                f"unknown framing {self.framing!r} of a verdict; framings: "
                f"{', '.join(FRAMINGS)}, or None where the judge says none."
            )
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(
                f"a verdict's score must be finite, got {self.score!r}; "
                "give None and label 'unscored'."
            )


class Judge(Protocol):
    """Turn answers into verdicts: patterns, a guard model, an API, a probe.

    Any object with these two members is a judge; no class of this project is needed.

    Example:
        >>> class Apologies:
        ...     name = "apologies-1"
        ...
        ...     def __call__(self, prompts, responses):
        ...         labels = ["refusal" if "sorry" in r else "not_refusal" for r in responses]
        ...         return [Verdict(label, None, self.name, "its words") for label in labels]
        >>> [verdict.label for verdict in Apologies()(["How?"], ["I am sorry, no."])]
        ['refusal']
    """

    @property
    def name(self) -> str:
        """Name the judge and its version, enough to tell two judges' numbers apart."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Give one verdict per answer, in order.

        An answer that cannot be judged is "unscored", with the reason; it is never left out.
        """


def check_pairs(prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Refuse what cannot be prompts and their responses.

    Raises:
        TypeError: If one string is given in place of a list.
        ValueError: If the two lists differ in length.
    """
    if isinstance(prompts, str) or isinstance(responses, str):
        raise TypeError(
            "prompts and responses must be lists of texts, got one string; "
            "write [prompt], [response]."
        )
    if len(prompts) != len(responses):
        raise ValueError(
            f"prompts and responses must pair up, got {len(prompts)} and {len(responses)}."
        )


def without_thoughts(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
    """Check that responses pair up with prompts, and leave out the thoughts in front of answers.

    Thoughts are never judged. Of a response that is nothing but thoughts nothing is left.
    """
    check_pairs(prompts, responses)
    return [answer_of(response) for response in responses]


def with_ends(estimate: Mapping[str, float]) -> str:
    """Write an estimate of a judge's card with its interval."""
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def is_empty(response: str) -> bool:
    """Tell whether an answer has no letter and no digit: then no judge is asked about it."""
    return not any(char.isalnum() for char in response)
