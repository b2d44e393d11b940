"""Tell a model's thoughts apart from its answer.

Thinking models write their thoughts first, between marks, and then the answer. Which marks a model
uses is read from its vocabulary and its chat template. A harmony answer has channels: all but the
channel "final" are thoughts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.models.templates import has_template, template_source

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel


_PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""Marks before and behind thoughts."""
_CHANNEL = "<|channel|>"
_HARMONY_HEADER = r"<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"


class _Marks(NamedTuple):
    """Regular expressions of the marks around thoughts, as one model or any model uses them."""

    opens: re.Pattern[str]
    closes: re.Pattern[str]
    marks: re.Pattern[str]
    """What belongs neither to the thoughts nor to the answer."""


@cache
def _marks(pairs: tuple[tuple[str, str], ...], has_channels: bool) -> _Marks:
    opens = [re.escape(before) for before, _ in pairs]
    closes = [re.escape(behind) for _, behind in pairs]
    marks = opens + closes
    if has_channels:
        opens.append(r"<\|channel\|>(?!\s*final\b)")
        closes.append(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
        marks += [_HARMONY_HEADER, r"<\|start\|>[^<]*", r"<\|end\|>"]
    return _Marks(*(re.compile("|".join(names)) for names in (opens, closes, marks)))


class _Regions(NamedTuple):
    """Where thoughts are in a text, their marks included."""

    spans: list[tuple[int, int]]
    is_open: bool
    """Whether the text ends inside thoughts."""


def _regions(text: str, marks: _Marks, *, is_open: bool = False) -> _Regions:
    """Find the thoughts of a text, which may begin inside thoughts.

    A closing mark that nothing opened ends thoughts that began with the text: the opening mark
    stood in the prompt, or was cut off.
    """
    spans: list[tuple[int, int]] = []
    start = position = 0
    while True:
        close = marks.closes.search(text, position)
        if not is_open:
            opening = marks.opens.search(text, position)
            if opening and not (close and close.start() < opening.start()):
                start, position, is_open = opening.start(), opening.end(), True
                continue
            if close is None:
                return _Regions(spans, False)
            start = close.start() if spans else 0
        if close is None:
            return _Regions([*spans, (start, len(text))], True)
        spans.append((start, close.end()))
        position, is_open = close.end(), False


def answer_of(text: str) -> str:
    """Return a text without the thoughts in front of the answer, whatever model wrote it.

    For answers that come as texts, from files or from other programs. The text is empty where all
    of it is thoughts. A mark in the middle of an answer is left alone.
    """
    marks, rest = _marks(_PAIRS, True), text.lstrip()
    begins_with_thoughts = marks.opens.match(rest)
    while marks.opens.match(rest):  # thoughts may come in parts
        close = marks.closes.search(rest)
        rest = rest[close.end() :].lstrip() if close else ""
    if begins_with_thoughts:
        return rest
    close = marks.closes.search(text)
    is_first = close and not marks.opens.search(text, 0, close.start())
    return text[close.end() :].lstrip() if close and is_first else text


class Split(NamedTuple):
    """Hold the parts of what a model wrote."""

    thinking: str
    text: str
    """The answer, without the thoughts."""
    is_answer: tuple[bool, ...]
    """For each token, whether it belongs to the answer."""
    is_open: bool
    """Whether the text ends inside thoughts."""


@dataclass(frozen=True, eq=False)
class ThoughtReader:
    """Split what one model wrote behind one template into thoughts and answer.

    Attributes:
        tokenizer: The model's.
        marks: The marks that its vocabulary or its template has; None where it has none.
        begins_open: Whether the prompt ends inside thoughts, since its template opens them.
        bridge: Text between the prompt and an answer that is given: it ends thoughts which the
            template has opened, or names the channel of the answer. Empty for most models.
    """

    tokenizer: Any
    marks: _Marks | None
    begins_open: bool = False
    bridge: str = ""

    @classmethod
    def of(cls, model: HookedModel, after: str) -> ThoughtReader:
        """Read the marks of a model.

        Args:
            model: A hooked model with its tokenizer.
            after: What the template writes behind the user's words (``template_text``).
        """
        tokenizer = model.tokenizer
        vocabulary = tokenizer.get_vocab()
        template = template_source(tokenizer) if has_template(tokenizer) else ""
        pairs = tuple(pair for pair in _PAIRS if pair[1] in vocabulary or pair[1] in template)
        has_channels = _CHANNEL in vocabulary
        if not pairs and not has_channels:
            return cls(tokenizer, None)
        marks = _marks(pairs, has_channels)
        begins_open = _regions(after, marks).is_open
        bridge = ""
        if has_channels and _CHANNEL not in after and after.endswith("<|start|>assistant"):
            bridge = f"{_CHANNEL}final<|message|>"
        elif begins_open and _CHANNEL in after:
            bridge = f"<|end|><|start|>assistant{_CHANNEL}final<|message|>"
        elif begins_open:
            _, closing = max(pairs, key=lambda pair: after.rfind(pair[0]))
            bridge = f"\n{closing}\n\n"
        return cls(tokenizer, marks, begins_open, bridge)

    def split(self, ids: Sequence[int]) -> Split:
        """Split the token ids of an answer, the thoughts in front of it included."""
        ids = list(ids)
        everything = Split("", self._text(ids), (True,) * len(ids), False)
        if self.marks is None:
            return everything
        strings = [self._text([i], special=True) for i in ids]
        written = "".join(strings)
        spans, is_open = _regions(written, self.marks, is_open=self.begins_open)
        if not spans:
            return everything._replace(is_open=is_open)
        ends = list(itertools.accumulate(map(len, strings)))
        tokens = list(zip([0, *ends], ends, strict=False))
        is_answer = tuple(not _touches(token, spans) for token in tokens)
        marks = [match.span() for match in self.marks.marks.finditer(written)]
        is_thought = [
            not answer and not _touches(token, marks)
            for answer, token in zip(is_answer, tokens, strict=True)
        ]
        runs = itertools.groupby(zip(ids, is_thought, strict=True), key=lambda pair: pair[1])
        parts = [
            self._text([i for i, _ in run]).strip() for of_thoughts, run in runs if of_thoughts
        ]
        text = self._text([i for i, is_kept in zip(ids, is_answer, strict=True) if is_kept])
        return Split("\n".join(filter(None, parts)), text.lstrip(), is_answer, is_open)

    def _text(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )


def _touches(token: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Say whether a token, as a range of characters, reaches into one of some ranges.

    A token without characters of its own belongs where it stands.
    """
    start, end = token
    return any(start < last and max(end, start + 1) > first for first, last in spans)
