"""Put tokens together to answers, and answers into the objects that OpenAI's clients read."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.models.tokens import token_strings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.generation._endings import Written
    from workbench.generation.running import Asked, Token

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
"""How OpenAI calls the ways in which an answer ends."""

_HALF = "\ufffd"
"""Stands in a decoded text for a character of which not all tokens are there."""


@dataclass(eq=False)
class Answer:
    """Collect what is written of one answer.

    Attributes:
        asked: What was asked.
        tokens: What came so far, with the token that ended it.
        failed: Whether it could not be written.
    """

    asked: Asked
    tokens: list[Token] = field(default_factory=list)
    failed: bool = False
    _sent: tuple[str, str] = ("", "")

    def take(self, token: Token | None) -> None:
        """Take the next token; None where the answer could not be written on."""
        if token is None or token.finish == "failed":
            self.failed = True
        else:
            self.tokens.append(token)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes."""
        return self.failed or bool(self.tokens and self.tokens[-1].finish)

    @property
    def ids(self) -> list[int]:
        """Tokens of the answer, without the one that ended it."""
        ids = [token.id for token in self.tokens]
        return ids[:-1] if self.tokens and self.tokens[-1].finish == "eos" else ids

    def written(self) -> Written:
        """Cut the answer where it ends, thoughts apart."""
        finish: Any = (self.tokens[-1].finish if self.tokens else None) or "length"
        return self.asked.endings.written(self.ids, finish)

    @property
    def reason(self) -> str:
        """Why it ended, as OpenAI says it."""
        return _REASONS[self.written().finish]

    def news(self) -> tuple[str, str]:
        """Give the thoughts and the words that were not given yet, and cannot change any more."""
        whole = self.written()
        words = (whole.thinking, whole.text)
        if not self.has_ended:
            text = "" if whole.finish == "stop" else whole.text
            words = (whole.thinking, self._certain(text))
        before = self._sent
        self._sent = tuple(map(_longer, before, words))  # type: ignore[assignment]
        new = [one[len(old) :] for one, old in zip(self._sent, before, strict=True)]
        return new[0], new[1]

    def _certain(self, text: str) -> str:
        """Hold back half a character, and what may become a stop text."""
        text = text.rstrip(_HALF)
        for stop in self.asked.decoding.stop:
            for n in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:n]):
                    text = text[:-n]
                    break
        return text


def _longer(before: str, now: str) -> str:
    """Give what goes on from a text, or the text where something does not go on from it."""
    return now if now.startswith(before) else before


@dataclass(frozen=True)
class Heading:
    """Hold what every object of one response says.

    Attributes:
        id: Name of the response.
        model: Name under which the model was asked.
        is_chat: Whether the client chats, or has a text completed.
        steering: What the model was steered with, in words.
        created: When, in seconds.
    """

    id: str
    model: str
    is_chat: bool
    steering: dict[str, Any]
    created: int

    @classmethod
    def of(cls, model: str, *, is_chat: bool, steering: dict[str, Any]) -> Heading:
        """Make the heading of a new response."""
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        return cls(name, model, is_chat, steering, int(time.time()))

    def object(self, choices: list[Any], *, is_chunk: bool = False, **more: Any) -> dict[str, Any]:
        """Put choices under the heading."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def response(heading: Heading, answers: Sequence[Answer], n_prompt: int) -> dict[str, Any]:
    """Make the object of a whole response.

    Args:
        heading: Its heading.
        answers: All its answers, ended.
        n_prompt: Tokens of its prompts.
    """
    choices = [_choice(heading, i, answer) for i, answer in enumerate(answers)]
    steering = heading.steering | _opened(answers)
    return heading.object(choices, usage=usage(answers, n_prompt), steering=steering)


def _choice(heading: Heading, index: int, answer: Answer) -> dict[str, Any]:
    written = answer.written()
    common = {"index": index, "finish_reason": _REASONS[written.finish], "logprobs": None}
    if heading.is_chat:
        message: dict[str, Any] = {"role": "assistant", "content": written.text, "refusal": None}
        if written.thinking:
            message["reasoning_content"] = written.thinking
        if answer.asked.n_likely is not None:
            common["logprobs"] = {"content": _chat_log_probs(answer, written), "refusal": None}
        return {**common, "message": message}
    if answer.asked.n_likely is not None:
        common["logprobs"] = _text_log_probs(answer, written)
    return {**common, "text": written.text}


def _opened(answers: Sequence[Answer]) -> dict[str, Any]:
    """Say whether the gate opened for the first answer's prompt; nothing where there is none."""
    is_open = answers[0].tokens[0].is_open if answers[0].tokens else None
    return {} if is_open is None else {"gate": "open" if is_open else "closed"}


def usage(answers: Sequence[Answer], n_prompt: int) -> dict[str, int]:
    """Count tokens; those that ended answers are not counted."""
    n_written = sum(len(answer.ids) for answer in answers)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_written,
        "total_tokens": n_prompt + n_written,
    }


def chunk(heading: Heading, index: int, answer: Answer, *, is_first: bool) -> dict[str, Any] | None:
    """Make the chunk of what is new of an answer; None where nothing is."""
    thoughts, words = answer.news()
    reason = answer.reason if answer.has_ended else None
    if not (thoughts or words or reason or is_first):
        return None
    choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
    if not heading.is_chat:
        return heading.object([{**choice, "text": words}], is_chunk=True)
    delta: dict[str, Any] = {"role": "assistant", "content": ""} if is_first else {}
    if words:
        delta["content"] = words
    if thoughts:
        delta["reasoning_content"] = thoughts
    return heading.object([{**choice, "delta": delta}], is_chunk=True)


def event(data: dict[str, Any] | str) -> bytes:
    """Write one event of a stream."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def _chat_log_probs(answer: Answer, written: Written) -> list[dict[str, Any]]:
    model = answer.asked.endings.model
    rows = []
    for token in answer.tokens[: len(written.tokens)]:
        ids = [token.id, *(i for i, _ in token.likely)]
        names = token_strings(model, ids)
        values = [token.log_prob, *(value for _, value in token.likely)]
        named = [
            {"token": name, "logprob": value, "bytes": list(name.encode())}
            for name, value in zip(names, values, strict=True)
        ]
        rows.append({**named[0], "top_logprobs": named[1:]})
    return rows


def _text_log_probs(answer: Answer, written: Written) -> dict[str, Any]:
    model = answer.asked.endings.model
    tokens = answer.tokens[: len(written.tokens)]
    names = token_strings(model, [token.id for token in tokens])
    offsets, place = [], 0
    for name in names:
        offsets.append(place)
        place += len(name)
    likely = [
        dict(
            zip(
                token_strings(model, [i for i, _ in token.likely]),
                [value for _, value in token.likely],
                strict=True,
            )
        )
        for token in tokens
    ]
    return {
        "tokens": names,
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": likely,
        "text_offset": offsets,
    }
