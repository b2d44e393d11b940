"""Where an answer ends, and which part of what a model wrote is the answer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from workbench.models.thoughts import ThoughtReader
from workbench.models.tokens import decode, template_text

if TYPE_CHECKING:
    from workbench.generation.decoding import Decoding
    from workbench.models.hooked_model import HookedModel

Finish = Literal["eos", "length", "stop"]
"""How an answer ended: by the model, by max_new_tokens, or by a stop text."""

_SPARE = 24
"""Tokens that are searched beyond the length of a stop text: some have no characters of their own,
and on a GPU only every 16th token is looked at."""


class Written(NamedTuple):
    """Hold what a model wrote, cut where the answer ends."""

    tokens: list[int]
    thinking: str
    text: str
    finish: Finish


@dataclass(frozen=True, eq=False)
class Endings:
    """Find the end of answers by token and by text, and tell thoughts apart.

    Attributes:
        model: A hooked model.
        stop: Texts that end an answer.
        thoughts: Reads thoughts behind the prompts' template.
    """

    model: HookedModel
    stop: tuple[str, ...]
    thoughts: ThoughtReader

    @classmethod
    def of(
        cls, model: HookedModel, decoding: Decoding, *, continue_response: bool = False
    ) -> Endings:
        """Make the endings of some settings; a begun answer is behind its thoughts."""
        _, after = template_text(model, **decoding.asked_by)
        thoughts = ThoughtReader.of(model, after)
        if continue_response:
            thoughts = replace(thoughts, begins_open=False)
        return cls(model, decoding.stop, thoughts)

    def has_stopped(self, ids: Sequence[int]) -> bool:
        """Say whether the answer that some tokens make has a stop text near its end.

        It may miss one among tokens without characters; ``written`` finds every one.
        """
        if self.thoughts.marks is not None:
            return self._place(self.thoughts.split(ids).text) is not None
        longest = max(len(text.encode()) for text in self.stop)  # a token has a byte at least
        return self._place(decode(self.model, ids[-longest - _SPARE :])) is not None

    def written(self, ids: Sequence[int], finish: Finish) -> Written:
        """Split thoughts from the answer, and cut it before its first stop text.

        The tokens that are kept are those that lie wholly before the stop text.
        """
        split = self.thoughts.split(ids)
        place = self._place(split.text)
        if place is None:
            return Written(list(ids), split.thinking, split.text, finish)
        lengths = range(len(ids) + 1)
        n = bisect_right(lengths, place, key=lambda n: len(self.thoughts.split(ids[:n]).text)) - 1
        return Written(list(ids[:n]), split.thinking, split.text[:place], "stop")

    def _place(self, text: str) -> int | None:
        """Find where the first stop text begins."""
        places = [text.find(stop) for stop in self.stop]
        return min((place for place in places if place >= 0), default=None)
