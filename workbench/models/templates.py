"""Read a chat template: which keywords it takes, and which token ends an assistant's turn.

A template is a program that came with the tokenizer. What it can do is asked of the template, never
guessed from the name of a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from workbench.files.hints import did_you_mean

Keywords = Mapping[str, Any] | None
"""What a template is rendered with beside the messages, such as ``{"enable_thinking": False}``."""

PLAIN = "plain_template"
"""The one keyword of a model without a chat template: text with ``{prompt}`` in it."""

PLAIN_TEMPLATE = "{prompt} "
"""What stands around a prompt where there is no chat template. Without the space an answer would be
glued to the question; docs/answers.md has what other texts measured. A space at the end is written
with the answer, since tokens have their space in front."""

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Keywords by which templates switch thoughts off; a template that reads one gets False unless a
caller says otherwise."""

_MARK = "\u2063assistant\u2063"
"""Stands for an assistant's words while a template is rendered."""

_NOT_OURS = ("messages", "add_generation_prompt")
"""What every rendering sets itself."""

_GLOBALS = ("raise_exception", "strftime_now", "namespace", "range", "tools", "documents")
"""Names that templates read but that are no settings."""


def has_template(tokenizer: Any) -> bool:
    """Tell whether a tokenizer carries a chat template; without one, prompts are plain text."""
    return bool(getattr(tokenizer, "chat_template", None))


def checked_keywords(tokenizer: Any, keywords: Keywords) -> dict[str, Any]:
    """Check the keywords for a chat template, and switch thinking off where it has a switch.

    Raises:
        ValueError: If the template never reads a keyword, so that it could change nothing.
    """
    keywords = dict(keywords or {})
    reads = _variables(template_source(tokenizer))
    settings = sorted(
        name
        for name in reads
        if name not in (*_NOT_OURS, *_GLOBALS) and not name.endswith("_token")
    )
    for name in keywords:
        if name in _NOT_OURS or name not in reads:
            known = f"it reads: {', '.join(settings)}" if settings else "it reads none"
            raise ValueError(
                f"the model's chat template never reads {name!r}; {known}; leave it out."
                f"{did_you_mean(name, settings)}"
            )
        if name in THINKING_SWITCHES and not isinstance(keywords[name], bool):
            raise ValueError(f"{name} is a switch: give true or false, got {keywords[name]!r:.40}.")
    if not any(switch in keywords for switch in THINKING_SWITCHES):
        keywords |= {switch: False for switch in THINKING_SWITCHES if switch in reads}
    return keywords


def plain_template(keywords: Keywords) -> tuple[str, str]:
    """Return what stands before and after a prompt where there is no chat template.

    Raises:
        ValueError: If a keyword is another one, or its text does not hold ``{prompt}`` once.
    """
    for name in keywords or {}:
        if name != PLAIN:
            raise ValueError(
                f"the model has no chat template to read {name!r}; the one keyword without a "
                f"template is {PLAIN}."
            )
    text = (keywords or {}).get(PLAIN, PLAIN_TEMPLATE)
    if not isinstance(text, str) or text.count("{prompt}") != 1:
        raise ValueError(
            f"{PLAIN} must be a text with {{prompt}} in it once, got {text!r:.60}; "
            f"the default is {PLAIN_TEMPLATE!r}."
        )
    before, after = text.split("{prompt}")
    return before, after.removesuffix(" ")


def space_before_answer(tokenizer: Any, keywords: Keywords, answer: str) -> str:
    """Return the space that a given answer begins with, if the plain template ends with one."""
    if has_template(tokenizer) or answer[:1].isspace():
        return ""
    text = str((keywords or {}).get(PLAIN, PLAIN_TEMPLATE))
    return " " if text.endswith(" ") else ""


def asked_as(system_prompt: str | None, keywords: Keywords) -> str:
    """Write what prompts are asked with as one text, for cards; empty where all is as it comes."""
    given = {"system_prompt": system_prompt, "template_keywords": dict(keywords or {})}
    if system_prompt is None and not keywords:
        return ""
    return json.dumps(given, sort_keys=True, ensure_ascii=False)


def asked_by(asked_as: str) -> dict[str, Any]:
    """Read a text of ``asked_as`` back, as the arguments that ``encode`` and others take."""
    return dict(json.loads(asked_as)) if asked_as else {}


def template_source(tokenizer: Any) -> str:
    """Return the text of the chat template that conversations without tools use."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default") or next(iter(template.values()))
    return str(template)


def end_of_turn(tokenizer: Any) -> int | None:
    """Find the added token that the chat template writes right behind an assistant's words.

    None where it writes none, or ends every message of a turn with the same token: where a turn has
    channels (harmony), the token after a message does not end the turn.
    """
    if not has_template(tokenizer) or "<|channel|>" in tokenizer.get_vocab():
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return None
    _, mark, behind = str(text).rpartition(_MARK)
    ids = tokenizer(behind.lstrip(), add_special_tokens=False).input_ids if mark else []
    return int(ids[0]) if ids and ids[0] in getattr(tokenizer, "added_tokens_decoder", {}) else None


@lru_cache(maxsize=32)
def _variables(source: str) -> frozenset[str]:
    """Name the variables that a template reads from outside."""
    from jinja2 import Environment, TemplateError, meta

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateError:  # a tag of a library's own: every word may be a name
        return frozenset(re.findall(r"\b[A-Za-z_]\w*\b", source))
    return frozenset(meta.find_undeclared_variables(tree))
