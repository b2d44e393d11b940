"""Read conversations: lists of messages with a role and a content, as chat services have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from workbench.prompts.prompt import Message

ROLES_OF_OTHERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
"""What others call those who speak, and the roles that are meant."""


_ROLE, _CONTENT = ("role", "from"), ("content", "value")
"""Names of the two parts of a message."""


MESSAGE_COLUMNS = ("messages", "conversation", "conversations")
"""Columns that may hold a list of messages."""


class Turns(NamedTuple):
    """Hold a conversation as a prompt has it: the last question, what came before, the answer."""

    history: tuple[Message, ...]
    text: str
    response: str | None


def is_message(value: object) -> bool:
    """Tell whether a value is a message: an object with a role and a content."""
    return isinstance(value, Mapping) and any(
        role in value and content in value for role, content in zip(_ROLE, _CONTENT, strict=True)
    )


def is_conversation(value: object) -> bool:
    """Tell whether a value is a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and all(map(is_message, value))


def read_turns(messages: Sequence[Mapping[str, Any]], place: str) -> Turns:
    """Read a conversation that ends with the user's question, or with the answer to it.

    Args:
        messages: Messages in the form of OpenAI (role, content) or ShareGPT (from, value). A
            content may be a list of text parts.
        place: Where they are, for error messages.

    Raises:
        ValueError: If a role is unknown, a content is no text, or no user turn comes last.
    """
    turns = [_message(message, f"{place}, message {i}") for i, message in enumerate(messages, 1)]
    response = turns.pop().content if turns and turns[-1].role == "assistant" else None
    if not turns or turns[-1].role != "user":
        last = turns[-1].role if turns else "nothing"
        raise ValueError(
            f"{place}: a conversation ends with a user turn, or with one and its answer; this one "
            f"has {last} there."
        )
    *history, question = turns
    return Turns(tuple(history), question.content, response)


def _message(message: Mapping[str, Any], place: str) -> Message:
    role = next((message[name] for name in _ROLE if name in message), None)
    content = next((message[name] for name in _CONTENT if name in message), None)
    if role not in ROLES_OF_OTHERS:
        raise ValueError(f"{place}: role {role!r} is none of {', '.join(ROLES_OF_OTHERS)}.")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        are_texts = all(isinstance(part, str) for part in parts)
        content = "\n".join(map(str, parts)) if are_texts else None
    try:
        return Message(ROLES_OF_OTHERS[role], content)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{place}: {error}.") from error
