"""Tokens: chat template, padding and spans. The only caller of a tokenizer, so that BOS, template and padding are right everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Int
    from torch import Tensor

    from workbench.models.load import HookedModel
    from workbench.prompts.prompt import Prompt


Span = Literal["content", "response", "last", "all"]


SPANS = ("content", "response", "last", "all")


PaddingSide = Literal["left", "right"]


_MARK = "\u2063workbench\u2063"  # stands for the user's words while a template is rendered; invisible separators no template trims


@dataclass(frozen=True)
class Encoded:
    """One prompt (and its response, if it is encoded with one) as token ids, unpadded.

    Attributes:
        prompt: What was encoded.
        ids: Token ids: BOS and template, the user's words, the template's end, and the response.
        content: Half-open range of the user's own words: no BOS, no template.
        response: Half-open range of the response; empty when there is none.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    content: tuple[int, int]
    response: tuple[int, int]

    def span(self, span: str) -> tuple[int, int]:
        """Half-open range of token positions of a span.

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
                f"prompt {self.prompt.id!r} has no {span} tokens; choose another span or give it a response."
            )
        return start, stop


@dataclass(frozen=True, eq=False)
class Batch:
    """Encoded prompts padded to one length.

    Attributes:
        tokens: Token ids.
        mask: True where there is a token, False where there is padding.
        starts: Column of each row's first real token.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    starts: Int[Tensor, " batch"]


def encode(
    model: HookedModel,
    prompts: Sequence[Prompt],
    *,
    with_response: bool = False,
    system_prompt: str | None = None,
    max_new_tokens: int = 0,
) -> list[Encoded]:
    """Turn prompts into token ids with the model's own chat template, or as plain text where it has none.

    Args:
        model: A hooked model with its tokenizer.
        prompts: What to encode.
        with_response: Append each prompt's response, as the assistant's words (teacher forcing).
        system_prompt: Words for the system turn; None leaves the template's default. In plain text they stand before the prompt.
        max_new_tokens: Room that must be left in the context.

    Returns:
        One ``Encoded`` a prompt, in order.

    Raises:
        ValueError: If a prompt does not fit the context, has no response where one is needed, or the template has no system turn.
    """
    tokenizer = model.tokenizer
    before, after = _template(tokenizer, system_prompt)
    limit = int(getattr(model.cfg, "n_ctx", 0) or 0)
    encoded = []
    for prompt in prompts:
        if with_response and not prompt.response:
            raise ValueError(
                f"prompt {prompt.id!r} has no response; spans and caches of answers need one."
            )
        words = prompt.text.strip()  # chat templates trim them too
        ids, content = _tokenize(
            tokenizer, before + words + after, len(before), len(before) + len(words)
        )
        n = len(ids)
        if (
            with_response
        ):  # on its own, so that the context is token for token the one of generation
            ids += tokenizer(prompt.response, add_special_tokens=False).input_ids
        if limit and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id!r} does not fit: {len(ids)} tokens and {max_new_tokens} new ones, context {limit}; "
                "shorten it or leave it out."
            )
        encoded.append(Encoded(prompt, tuple(ids), content, (n, len(ids))))
    return encoded


def pad(
    encoded: Sequence[Encoded],
    *,
    pad_id: int,
    side: PaddingSide,
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad rows to one length.

    Args:
        encoded: The rows.
        pad_id: Any token id: padding is told by the mask, never by its id.
        side: "left" for generation, "right" or "left" for reading activations.
        device: Where the tensors go.
    """
    width = max(len(row.ids) for row in encoded)
    tokens = torch.full((len(encoded), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(encoded), width), dtype=torch.bool)
    starts = torch.zeros(len(encoded), dtype=torch.long)
    for i, row in enumerate(encoded):
        start = width - len(row.ids) if side == "left" else 0
        tokens[i, start : start + len(row.ids)] = torch.tensor(row.ids)
        mask[i, start : start + len(row.ids)] = True
        starts[i] = start
    return Batch(tokens.to(device), mask.to(device), starts.to(device))


def span_mask(encoded: Sequence[Encoded], batch: Batch, span: str) -> Bool[Tensor, "batch pos"]:
    """True at the tokens of a span, in the columns of a padded batch."""
    ranges = (
        torch.tensor([row.span(span) for row in encoded], device=batch.tokens.device)
        + batch.starts[:, None]
    )
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return (columns >= ranges[:, :1]) & (columns < ranges[:, 1:])


def decode(model: HookedModel, ids: Sequence[int]) -> str:
    """Text of token ids, without special tokens."""
    return str(
        model.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


def token_strings(model: HookedModel, ids: Sequence[int]) -> list[str]:
    """Text of each token by itself, for views token by token."""
    return [str(model.tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)) for i in ids]


def pad_id(model: HookedModel) -> int:
    """Token id used for padding (told apart by the mask, so it may be a real token)."""
    tokenizer = model.tokenizer
    return int(
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )


def stop_ids(model: HookedModel) -> frozenset[int]:
    """Every token id that ends an answer: the tokenizer's, the generation config's and the chat template's end of turn."""
    found: set[int] = set()
    if model.tokenizer.eos_token_id is not None:
        found.add(int(model.tokenizer.eos_token_id))
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    found.update([eos] if isinstance(eos, int) else eos or [])
    _, after = _template(model.tokenizer, None)
    vocabulary = model.tokenizer.get_vocab()
    for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
        if after.lstrip().startswith(name) and name in vocabulary:
            found.add(int(vocabulary[name]))
    return frozenset(found)


def template_text(model: HookedModel, system_prompt: str | None = None) -> tuple[str, str]:
    """What stands before and after the user's words, as rendered now (some templates write today's date): part of cache keys."""
    return _template(model.tokenizer, system_prompt)


def has_chat_template(model: HookedModel) -> bool:
    """Whether the tokenizer carries a chat template; without one, prompts are plain text."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def _template(tokenizer: object, system_prompt: str | None) -> tuple[str, str]:
    """Text before and after the user's words, BOS included where the template writes one."""
    if not getattr(tokenizer, "chat_template", None):
        bos = getattr(tokenizer, "bos_token", None) or "" if _adds_bos(tokenizer) else ""
        return bos + (f"{system_prompt}\n\n" if system_prompt else ""), ""
    messages = [{"role": "user", "content": _MARK}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
    except Exception as error:  # templates raise their own jinja errors
        raise ValueError(
            f"the model's chat template refuses these messages ({error}); leave out the system prompt."
        ) from error
    if text.count(_MARK) != 1:
        raise ValueError(
            "the model's chat template does not hold the user's words once, as they are; give it another template."
        )
    before, after = text.split(_MARK)
    return before, after


def _adds_bos(tokenizer: object) -> bool:
    """Whether the tokenizer starts a plain text with BOS.

    TransformerLens turns this on wherever a checkpoint names a BOS token (Llama, Gemma, and GPT-2 and Pythia, which do without it elsewhere;
    not Qwen), so that the first token's massive activation falls on BOS and not on the user's first word.
    """
    ids = tokenizer("a").input_ids  # type: ignore[operator]
    return bool(ids) and ids[0] == getattr(tokenizer, "bos_token_id", None)


def _tokenize(
    tokenizer: object, text: str, first: int, last: int
) -> tuple[list[int], tuple[int, int]]:
    """Token ids of a text that holds its own BOS, and the token range of the characters from ``first`` to ``last``.

    A token belongs to the range when it overlaps it: one that joins a template's line end with the first word counts as content.
    """
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)  # type: ignore[operator]
    inside = [i for i, (a, b) in enumerate(out.offset_mapping) if a < last and b > first and b > a]
    return list(out.input_ids), (inside[0], inside[-1] + 1) if inside else (0, 0)
