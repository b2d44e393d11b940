"""Turn prompts into token ids and back: chat template, spans of tokens, special tokens.

The only module that calls the studied model's tokenizer, so that BOS and template are right
everywhere (``templates`` and ``thoughts`` read the template for it). Models that judge have
tokenizers of their own, which ``judges`` calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from workbench.models.hooked_model import check_hooked, hugging_face_model
from workbench.models.templates import (
    Keywords,
    checked_keywords,
    end_of_turn,
    has_template,
    plain_template,
    space_before_answer,
)
from workbench.models.thoughts import ThoughtReader
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Message


Span = Literal["content", "response", "last", "all"]


SPANS = ("content", "response", "last", "all")
"""The user's words, the answer, the token before the answer, and everything."""


_MARK = "\u2063workbench\u2063"
"""Stands for the user's words while a template is rendered; no template trims these separators."""


@dataclass(frozen=True)
class Encoded:
    """One prompt (and its response, if it is encoded with one) as token ids, unpadded.

    Attributes:
        prompt: What was encoded.
        ids: Token ids: BOS and template with earlier turns, the user's words, the template's end,
            and the response.
        content: Half-open range of the user's own last words: no BOS, no template, no earlier turn.
        response: Half-open range of the response; empty when there is none.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    content: tuple[int, int]
    response: tuple[int, int]

    def span(self, span: str) -> tuple[int, int]:
        """Return the half-open range of token positions of a span.

        Raises:
            ValueError: If the span is unknown or empty for this prompt.
        """
        if span not in SPANS:
            raise ValueError(f"unknown span {span!r}; spans: {', '.join(SPANS)}.")
        n = len(self.ids)
        start, stop = {
            "content": self.content,
            "response": self.response,
            "last": (n - 1, n),
            "all": (0, n),
        }[span]
        if stop <= start:
            raise ValueError(
                f"prompt {self.prompt.id!r} has no {span} tokens; choose another span or give it "
                "a response."
            )
        return start, stop


class DoesNotFit(ValueError):  # noqa: N818 - it says what it is where it is caught
    """Say that a prompt, or a prompt with its response, is longer than the model's context."""


class _Around(NamedTuple):
    """Hold what stands around the user's words: texts, and the tokens that end thoughts."""

    before: str
    after: str
    bridge: tuple[int, ...]


def encode(
    model: HookedModel,
    prompts: PromptsLike,
    *,
    with_response: bool = False,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    max_new_tokens: int = 0,
    behind_thoughts: bool = False,
) -> list[Encoded]:
    """Turn prompts into token ids, with the chat template or as plain text without one.

    Where a template opens thoughts, a response stands behind their end: it is an answer.

    Args:
        model: A hooked model with its tokenizer.
        prompts: What to encode, in any form that ``as_prompts`` reads.
        with_response: Append each prompt's response, as the assistant's words (teacher forcing).
        system_prompt: Words for the system turn; None leaves the template's default. In plain text
            they stand before the prompt. A prompt with a system turn of its own allows no other.
        template_keywords: See ``template_text``.
        max_new_tokens: Tokens that must still fit into the context behind the prompt.
        behind_thoughts: End the thoughts that a template opens, for an answer that is given and not
            written by the model; with a response it is always so.

    Returns:
        One ``Encoded`` per prompt, in order.

    Raises:
        ValueError: If a prompt does not fit the context, has no response where one is needed or two
            system turns, or the template has no system turn or does not read a keyword.
    """
    check_hooked(model)
    given = with_response or behind_thoughts
    around: dict[tuple[Message, ...], _Around] = {}
    limit = int(getattr(model.cfg, "n_ctx", 0) or 0)
    encoded = []
    for prompt in as_prompts(prompts):
        if with_response and not prompt.response:
            raise ValueError(
                f"prompt {prompt.id!r} has no response; spans and caches of answers need one."
            )
        if prompt.history not in around:
            _check_one_system_turn(prompt, system_prompt)
            before, after = template_text(model, system_prompt, template_keywords, prompt.history)
            bridge = token_ids(model, ThoughtReader.of(model, after).bridge) if given else ()
            around[prompt.history] = _Around(before, after, bridge)
        before, after, bridge = around[prompt.history]
        words = prompt.text.strip()  # chat templates trim them too
        ends = len(before), len(before) + len(words)
        ids, content = _tokenize(model.tokenizer, before + words + after, *ends)
        ids += bridge
        n = len(ids)
        if with_response and prompt.response:
            # By itself, so that the context is token for token the one of generation.
            ids += answer_ids(model, prompt.response, template_keywords)
        _check_fits(prompt, len(ids), max_new_tokens, limit)
        encoded.append(Encoded(prompt, tuple(ids), content, (n, len(ids))))
    return encoded


def encode_as_it_is(
    model: HookedModel, given: str | Sequence[int], *, max_new_tokens: int = 0
) -> Encoded:
    """Turn a text into token ids with no template around it, behind BOS where there is one.

    All of it counts as the user's words.

    Args:
        model: A hooked model with its tokenizer.
        given: A text, or token ids that are taken as they are.
        max_new_tokens: Tokens that must still fit into the context behind it.

    Raises:
        ValueError: If there is no token, or an id is none of the vocabulary.
        DoesNotFit: If the context cannot hold it.
    """
    if isinstance(given, str):
        before = (model.tokenizer.bos_token_id,) if _adds_bos(model.tokenizer) else ()
        ids = (*before, *token_ids(model, given))
        prompt = Prompt(text=given)
    else:
        before, ids, n = (), tuple(given), vocabulary_size(model)
        if outside := [i for i in ids if not 0 <= i < n]:
            raise ValueError(f"token ids are 0 to {n - 1}, got {outside[0]}.")
        words = decode(model, ids)
        prompt = Prompt(text=words if words.strip() else repr(ids))
    if len(ids) == len(before):
        raise ValueError("there is no token to go on from; give a text that is not empty.")
    limit = int(getattr(model.cfg, "n_ctx", 0) or 0)
    _check_fits(prompt, len(ids), max_new_tokens, limit)
    return Encoded(prompt, ids, (len(before), len(ids)), (len(ids), len(ids)))


def encode_what_fits(
    model: HookedModel, prompts: Sequence[Prompt], **how: Any
) -> list[Encoded | None]:
    """Turn prompts into token ids like ``encode``; None for those that the context cannot hold."""
    try:
        return list(encode(model, prompts, **how))
    except DoesNotFit:  # then one by one
        if len(prompts) == 1:
            return [None]
    return [one for prompt in prompts for one in encode_what_fits(model, [prompt], **how)]


def _check_fits(prompt: Prompt, n_tokens: int, max_new_tokens: int, limit: int) -> None:
    if limit and n_tokens + max_new_tokens > limit:
        raise DoesNotFit(
            f"prompt {prompt.id!r} does not fit: {n_tokens} tokens and {max_new_tokens} new "
            f"ones, context {limit}; shorten it or leave it out."
        )


def token_ids(model: HookedModel, text: str) -> tuple[int, ...]:
    """Encode a text as it is: no template, no BOS."""
    return tuple(int(i) for i in model.tokenizer(text, add_special_tokens=False).input_ids)


def answer_ids(
    model: HookedModel, answer: str, template_keywords: Keywords = None
) -> tuple[int, ...]:
    """Encode an answer that is given, as it stands behind its prompt.

    Where there is no chat template and the plain one ends with a space, the answer begins with it.
    """
    return token_ids(
        model, space_before_answer(model.tokenizer, template_keywords, answer) + answer
    )


def decode(model: HookedModel, ids: Sequence[int]) -> str:
    """Turn token ids into text, without special tokens."""
    return str(
        model.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


def token_strings(model: HookedModel, ids: Sequence[int]) -> list[str]:
    """Turn each token into a text of its own, for views token by token."""
    return [str(model.tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)) for i in ids]


def pad_id(model: HookedModel) -> int:
    """Return the token id to pad with; a mask tells padding apart, so it may be a real token."""
    padding, end = model.tokenizer.pad_token_id, model.tokenizer.eos_token_id
    return int(padding if padding is not None else end or 0)


def vocabulary_size(model: HookedModel) -> int:
    """Count the tokens of the tokenizer; the model's matrices may hold rows for more."""
    return len(model.tokenizer)


def stop_ids(model: HookedModel) -> frozenset[int]:
    """Collect every token id that ends an answer.

    These are the tokenizer's and the generation config's, and the one by which the chat template
    ends an assistant's turn: many checkpoints name the end of a text only.
    """
    stops: set[int] = set()
    if model.tokenizer.eos_token_id is not None:
        stops.add(int(model.tokenizer.eos_token_id))
    config = getattr(hugging_face_model(model), "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    stops.update([eos] if isinstance(eos, int) else eos or [])
    turn = end_of_turn(model.tokenizer)
    return frozenset(stops if turn is None else {*stops, turn})


def template_text(
    model: HookedModel,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    history: Sequence[Message] = (),
) -> tuple[str, str]:
    """Render the text before and after the user's words, BOS included where there is one.

    It is part of cache keys, for some templates write today's date.

    Args:
        model: A hooked model and tokenizer.
        system_prompt: Words for the system turn; None leaves the template's default.
        template_keywords: What else the chat template reads, such as ``{"enable_thinking": True}``
            or ``{"reasoning_effort": "low"}``. Thinking is off where the template has a switch and
            no keyword says otherwise. A model without a chat template takes ``plain_template``, a
            text with ``{prompt}`` in it; a space at its end is written with the answer.
        history: Turns before the user's words; without a chat template they are paragraphs.

    Raises:
        ValueError: If the template has no system turn, no place for the words, or ignores keywords.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; give it its own: model.set_tokenizer(...).")
    if not has_chat_template(model):
        bos = getattr(tokenizer, "bos_token", None) or "" if _adds_bos(tokenizer) else ""
        said = [system_prompt or "", *(message.content.strip() for message in history)]
        before, after = plain_template(template_keywords)
        return bos + "".join(f"{words}\n\n" for words in said if words) + before, after
    keywords = checked_keywords(tokenizer, template_keywords)
    messages = [{"role": message.role, "content": message.content} for message in history]
    messages.append({"role": "user", "content": _MARK})
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **keywords
        )
    except Exception as error:  # templates raise their own jinja errors
        given = {
            "system prompt": system_prompt is not None,
            "template keywords": template_keywords,
            "system turn, or let user and assistant take turns": history,
        }
        what = next((f"leave out the {name}" for name, is_given in given.items() if is_given), None)
        raise ValueError(
            f"the model's chat template refuses these messages ({error}); "
            f"{what or 'give it another template'}."
        ) from error
    _check_turns_are_held(tokenizer, messages[:-1], keywords)
    if text.count(_MARK) != 1 + sum(message.content.count(_MARK) for message in history):
        raise ValueError(
            "the model's chat template does not hold the user's words once, as they are; give it "
            "another template."
        )
    before, _, after = text.rpartition(_MARK)
    return before, after


def _check_turns_are_held(
    tokenizer: Any, turns: Sequence[Mapping[str, str]], keywords: Mapping[str, Any]
) -> None:
    """Raise where the chat template leaves out a turn before the user's words.

    The words themselves may be changed (trimmed, rid of thoughts), so marks stand in for them.
    """
    if not turns:
        return
    marks = [f"\u2063turn {number}\u2063" for number in range(len(turns))]
    marked = [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
    text = tokenizer.apply_chat_template(
        [*marked, {"role": "user", "content": _MARK}],
        tokenize=False,
        add_generation_prompt=True,
        **keywords,
    )
    for turn, mark in zip(turns, marks, strict=True):
        if mark not in text:
            raise ValueError(
                f"the model's chat template leaves out the {turn['role']} turn "
                f"{turn['content']!r:.60}: the model would never read it; leave it out, or say it "
                "in the user's words."
            )


def _check_one_system_turn(prompt: Prompt, system_prompt: str | None) -> None:
    if system_prompt is not None and any(turn.role == "system" for turn in prompt.history):
        raise ValueError(
            f"prompt {prompt.id!r} has a system turn of its own, and a system prompt is given too; "
            "leave out one of them."
        )


def has_chat_template(model: HookedModel) -> bool:
    """Tell whether the tokenizer carries a chat template; without one, prompts are plain text."""
    return has_template(model.tokenizer)


def _adds_bos(tokenizer: Any) -> bool:
    """Tell whether the tokenizer starts a plain text with BOS.

    TransformerLens turns this on wherever a checkpoint names a BOS token (Llama, Gemma, and GPT-2
    and Pythia, which do without it elsewhere; not Qwen), so that the first token's massive
    activation falls on BOS and not on the user's first word.
    """
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == getattr(tokenizer, "bos_token_id", None)


def _tokenize(
    tokenizer: Any, text: str, first: int, last: int
) -> tuple[list[int], tuple[int, int]]:
    """Encode a text that holds its own BOS, and find the tokens of a range of its characters.

    A token belongs to the range when it overlaps it: one that joins a template's line end with the
    first word counts as content.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [
        token
        for token, (start, end) in enumerate(encoding.offset_mapping)
        if start < last and end > first and end > start
    ]
    return list(encoding.input_ids), (inside[0], inside[-1] + 1) if inside else (0, 0)
