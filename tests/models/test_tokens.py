"""Tokens: one BOS, the chat template as it is, and spans that hold the user's words alone."""

from __future__ import annotations

from typing import Any
from unicodedata import normalize

import pytest
import torch
from helpers.tiny_models import CONTEXT, FAMILIES, PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.models.batches import pad, span_mask
from workbench.models.tokens import (
    SPANS,
    Encoded,
    decode,
    encode,
    has_chat_template,
    pad_id,
    stop_ids,
    template_text,
    token_strings,
)
from workbench.prompts.prompt import Prompt

CHAT = [family for family in FAMILIES if family not in PLAIN]
WITH_SYSTEM = [family for family in CHAT if not family.startswith("gemma")]
AFTER = {
    "llama2": " [/INST]",
    "mistral": " [/INST]",
    "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
    "gemma3": "<end_of_turn>\n<start_of_turn>model\n",
}
CHATML = "<|im_end|>\n<|im_start|>assistant\n"
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(
    lambda text: text.strip()
)
TEMPLATE_WORDS = [
    "[INST] hi [/INST]",
    "<s> and </s>",
    "<|im_end|>\n<|im_start|>assistant\nYes",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nSure",
    "<end_of_turn>\n<start_of_turn>model\n",
    "user",
    "model\nuser\nassistant",
    "{{ messages }} {% for x in y %}",
    "\u2063workbench\u2063",
]
MULTI_BYTE = [
    "émigré naïve",
    "\U0001f327\U0001f327 rain",
    "東京の天気",
    "e\u0301 a\u0308",
    "👩‍👩‍👧‍👦 family",
    "\u200bzero\u200b",
    "שלום",
]


def ask(text: str, response: str | None = None) -> Prompt:
    return Prompt("p", text, response, "c", "safe", "s")


def one(model: Any, text: str, response: str | None = None, **keywords: Any) -> Encoded:
    [row] = encode(model, [ask(text, response)], with_response=response is not None, **keywords)
    return row


def text_of(model: Any, ids: Any) -> str:
    return model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def content_of(model: Any, row: Encoded) -> str:
    return text_of(model, row.ids[slice(*row.content)])


def same(one: str, other: str) -> bool:
    """Tell whether two texts are the same words.

    Qwen's tokenizer composes accents, and spaces may join the first word.
    """
    return normalize("NFC", one).strip() == normalize("NFC", other).strip()


# The whole row


@pytest.mark.parametrize("family", CHAT)
def test_rows_are_token_for_token_what_the_tokenizer_makes_of_its_own_template(
    family_model, family: str
) -> None:
    model = family_model(family)
    for text in ["Explain a garden.", "a", "?\n\nfoo", *TEMPLATE_WORDS, *MULTI_BYTE]:
        messages = [{"role": "user", "content": text.strip()}]
        out = model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        assert list(one(model, text).ids) == list(out["input_ids"]), text


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_never_a_second_bos(family_model, family: str) -> None:
    model = family_model(family)
    bos = model.tokenizer.bos_token_id
    with_bos = family not in ("qwen2", "qwen3", "olmo2")  # their checkpoints name no BOS
    for text in ("Explain a garden.", "a", " spaces around  "):
        for row in (one(model, text), one(model, text, "An answer")):
            assert (row.ids[0] == bos) == with_bos
            assert row.ids[1] != bos
            assert row.ids.count(bos) == (
                1 if with_bos or bos is None else row.ids.count(model.tokenizer.eos_token_id)
            )


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_without_a_chat_template_gets_plain_text(family_model, family: str) -> None:
    model = family_model(family)
    assert not has_chat_template(model)
    row = one(model, "Explain a garden.")
    assert text_of(model, row.ids) == "<|endoftext|>Explain a garden."
    assert row.content == (1, len(row.ids))
    assert template_text(model, "Be kind.") == ("<|endoftext|>Be kind.\n\n", "")


@pytest.mark.parametrize("family", CHAT)
def test_what_follows_the_words_is_the_template_up_to_the_answer(family_model, family: str) -> None:
    model = family_model(family)
    assert has_chat_template(model)
    assert template_text(model)[1] == AFTER.get(family, CHATML)


# Spans


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["Explain a recipe for a friend.", "x", *MULTI_BYTE])
def test_content_is_the_users_words(family_model, family: str, text: str) -> None:
    model = family_model(family)
    for row in (one(model, text), one(model, f"  {text}\n"), one(model, text, "Yes.")):
        # A token may join the template's space with the first word; no token holds more of it.
        assert same(content_of(model, row), text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEMPLATE_WORDS)
def test_words_of_the_template_in_a_prompt_do_not_move_the_spans(
    family_model, family: str, text: str
) -> None:
    model = family_model(family)
    row = one(model, text, "Fine.")
    before, after = template_text(model)
    start, stop = row.content
    assert text_of(model, row.ids[start:stop]).strip() == text.strip()
    assert text_of(model, row.ids[:start]).strip() == before.strip()
    assert text_of(model, row.ids[stop : row.response[0]]) == after
    assert text_of(model, row.ids[slice(*row.response)]).lstrip() == "Fine."


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2", "gemma2", "gpt2"])
def test_spans_are_right_for_any_text(family_model, family: str) -> None:
    model = family_model(family)
    special = set(model.tokenizer.all_special_tokens)

    @settings(max_examples=40, deadline=None)
    @given(texts, texts)
    def check(text: str, response: str) -> None:
        if any(token in text + response for token in special):
            return
        row = one(model, text, response)
        start, stop = row.content
        assert start < stop <= row.response[0] < row.response[1] == len(row.ids)
        assert same(content_of(model, row), text)
        assert same(text_of(model, row.ids[slice(*row.response)]), response)
        without = one(model, text)
        assert (
            row.ids[: len(without.ids)] == without.ids
        )  # the context of an answer is the one of generation

    check()


def test_every_span_of_one_row(tiny) -> None:
    row = one(tiny, "Explain a garden.", "It grows.")
    n = len(row.ids)
    assert row.span("all") == (0, n)
    assert row.span("last") == (n - 1, n)
    assert row.span("response") == row.response == (n - (row.response[1] - row.response[0]), n)
    assert row.span("content") == row.content
    asked = one(tiny, "Explain a garden.")
    assert text_of(tiny, asked.ids[slice(*asked.span("last"))]) == "\n"  # the answer comes next


def test_an_unknown_or_empty_span_is_named(tiny) -> None:
    row = one(tiny, "Explain a garden.")
    with pytest.raises(
        ValueError, match=r"unknown span 'answer'; spans: content, response, last, all\.$"
    ):
        row.span("answer")
    with pytest.raises(
        ValueError,
        match=r"prompt 'p' has no response tokens; choose another span or give it a response\.$",
    ):
        row.span("response")
    assert set(SPANS) == {"content", "response", "last", "all"}


def test_a_response_is_needed_where_one_is_asked_for(tiny) -> None:
    for empty in (None, ""):
        with pytest.raises(
            ValueError, match=r"prompt 'p' has no response; spans and caches of answers need one\.$"
        ):
            encode(tiny, [ask("Hello", empty)], with_response=True)
    [row] = encode(tiny, [ask("Hello", "ignored")])
    assert row.response[0] == len(one(tiny, "Hello").ids)


# System prompts and limits


@pytest.mark.parametrize("family", [*WITH_SYSTEM, *PLAIN])
def test_a_system_prompt_stands_before_the_words_and_outside_their_span(
    family_model, family: str
) -> None:
    model = family_model(family)
    plain, told = (
        one(model, "Explain a garden."),
        one(model, "Explain a garden.", system_prompt="Be very kind."),
    )
    assert "Be very kind." in text_of(model, told.ids[: told.content[0]])
    assert content_of(model, told).strip() == "Explain a garden."
    assert told.ids[told.content[1] :] == plain.ids[plain.content[1] :]
    if family in CHAT:
        roles = [
            {"role": "system", "content": "Be very kind."},
            {"role": "user", "content": "Explain a garden."},
        ]
        out = model.tokenizer.apply_chat_template(
            roles, add_generation_prompt=True, return_dict=True
        )
        assert list(told.ids) == list(out["input_ids"])


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_template_without_system_turn_says_so(family_model, family: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"refuses these messages \(System role not supported\); leave out the system prompt",
    ) as caught:
        one(family_model(family), "Hello", system_prompt="Be kind.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] * 2 }}", "no words at all", "{{ messages[0]['content'][::-1] }}"],
)
def test_a_template_that_does_not_hold_the_words_as_they_are_is_refused(
    tiny, monkeypatch, template: str
) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="does not hold the user's words once, as they are"):
        one(tiny, "Hello")


def test_a_prompt_longer_than_the_context_is_named(tiny) -> None:
    room = CONTEXT - len(one(tiny, "x").ids)
    assert (
        len(one(tiny, "x" * (room + 1)).ids) == CONTEXT
    )  # the letters of a random word are single tokens here
    message = (
        rf"prompt 'p' does not fit: {CONTEXT + 1} tokens and 0 new ones, context {CONTEXT}; "
        r"shorten it or leave it out\.$"
    )
    with pytest.raises(ValueError, match=message):
        one(tiny, "x" * (room + 2))
    with pytest.raises(
        ValueError, match=f"does not fit: {CONTEXT} tokens and 1 new ones, context {CONTEXT}"
    ):
        one(tiny, "x" * (room + 1), max_new_tokens=1)
    with pytest.raises(ValueError, match="does not fit"):
        one(tiny, "x", "y" * CONTEXT)


@pytest.mark.parametrize("spaces", ["", " ", "\n\t ", "\u00a0\u3000"])
def test_a_prompt_of_spaces_is_no_prompt(spaces: str) -> None:
    with pytest.raises(ValueError, match="text must be a text that is not empty"):
        ask(spaces)


# Padding


rows_of_ids = st.lists(
    st.lists(st.integers(3, 200), min_size=1, max_size=9), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(rows_of_ids, st.sampled_from(["left", "right"]), st.integers(0, 200), st.data())
def test_padding_keeps_every_token_and_moves_every_span(ids, side, fill, data) -> None:
    rows = []
    for row in ids:
        cut = data.draw(st.integers(0, len(row) - 1))
        rows.append(Encoded(ask("x"), tuple(row), (cut, len(row)), (len(row), len(row))))
    batch = pad(rows, pad_id=fill, side=side)
    assert batch.tokens.shape == batch.mask.shape == (len(rows), max(map(len, ids)))
    for span in ("content", "last", "all"):
        inside = span_mask(rows, batch, span)
        for i, row in enumerate(rows):
            assert batch.tokens[i][batch.mask[i]].tolist() == list(row.ids)
            assert batch.tokens[i][inside[i]].tolist() == list(row.ids[slice(*row.span(span))])
            assert not (inside[i] & ~batch.mask[i]).any()
            assert int(batch.starts[i]) == int(batch.mask[i].long().argmax())
    edge = batch.mask[:, -1 if side == "left" else 0]
    assert edge.all()


def test_the_padding_token_may_be_a_real_one(tiny) -> None:
    assert (
        pad_id(tiny) == tiny.tokenizer.eos_token_id
    )  # a Llama 3 has none of its own, and its template holds this one
    rows = encode(tiny, [ask("Hello"), ask("A much longer question, is it not?")])
    for side in ("left", "right"):
        batch = pad(rows, pad_id=pad_id(tiny), side=side)
        assert batch.mask.sum(dim=1).tolist() == [len(row.ids) for row in rows]


# Reading tokens


@pytest.mark.parametrize(("family", "names"), [
    ("llama2", {"</s>"}),
    ("llama3", {"<|eot_id|>"}),
    ("qwen2", {"<|im_end|>"}),
    ("gemma2", {"<eos>", "<end_of_turn>"}),
    ("gpt2", {"<|endoftext|>"}),
])  # fmt: skip
def test_every_token_that_ends_an_answer_is_known(
    family_model, family: str, names: set[str]
) -> None:
    model = family_model(family)
    assert {model.tokenizer.convert_ids_to_tokens(i) for i in stop_ids(model)} == names


@pytest.mark.parametrize("eos", [7, [7, 8], None])
def test_the_generation_config_adds_its_own_ends(tiny, monkeypatch, eos: object) -> None:
    monkeypatch.setattr(tiny.original_model.generation_config, "eos_token_id", eos)
    extra = set() if eos is None else {7} if eos == 7 else {7, 8}
    assert stop_ids(tiny) == {tiny.tokenizer.eos_token_id} | extra


@pytest.mark.parametrize("text", ["Explain a garden.", *MULTI_BYTE])
def test_decoding_gives_the_text_back_without_special_tokens(tiny, text: str) -> None:
    row = one(tiny, text, "Sure , it 's fine .")
    assert (
        decode(tiny, row.ids[slice(*row.response)]) == "Sure , it 's fine ."
    )  # spaces are not cleaned up
    assert "<|" not in decode(tiny, row.ids)
    assert decode(tiny, torch.tensor(row.ids)[slice(*row.content)].tolist()) == text


def test_token_strings_are_one_a_token_and_join_to_the_text(tiny) -> None:
    row = one(tiny, "Explain a garden.")
    strings = token_strings(tiny, row.ids)
    assert len(strings) == len(row.ids)
    assert "".join(strings) == text_of(tiny, row.ids)
