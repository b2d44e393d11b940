"""Conversations reach the model through its chat template, and spans hold the last user turn."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import FAMILIES, PLAIN

from workbench.generation.answers import generate, sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations, token_activations
from workbench.models.sites import Site
from workbench.models.tokens import encode
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Prompt, prompts_key, text_key

CHAT = [
    {"role": "user", "content": "Describe a garden."},
    {"role": "assistant", "content": "It has a card."},
    {"role": "user", "content": "And a bicycle?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
SHORT = Decoding(max_new_tokens=4)
[PROMPT] = as_prompts(CHAT)
SITE = Site(1, "resid_post")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PLAIN])
def test_a_conversation_is_token_for_token_what_the_template_makes_of_it(family_model, family):
    model = family_model(family)
    expected = model.tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=True
    )
    [row] = encode(model, CHAT)
    assert list(row.ids) == list(expected["input_ids"])
    assert model.tokenizer.decode(row.ids[slice(*row.content)]).strip() == "And a bicycle?"


def test_a_model_without_a_template_gets_the_turns_as_paragraphs(chatless):
    [row] = encode(chatless, [[SYSTEM, *CHAT]])
    text = chatless.tokenizer.decode(row.ids, skip_special_tokens=True)
    assert text.startswith("Be brief.\n\nDescribe a garden.\n\nIt has a card.\n\nAnd a bicycle?")
    assert chatless.tokenizer.decode(row.ids[slice(*row.content)]) == "And a bicycle?"


def test_a_system_turn_is_the_same_as_a_system_prompt_and_there_is_only_one(tiny):
    [own] = encode(tiny, [[SYSTEM, CHAT[0]]])
    [given] = encode(tiny, CHAT[0]["content"], system_prompt="Be brief.")
    assert own.ids == given.ids
    with pytest.raises(ValueError, match="has a system turn of its own, and a system prompt is"):
        encode(tiny, [[SYSTEM, CHAT[0]]], system_prompt="Be kind.")


def test_a_template_that_refuses_the_turns_says_so(family_model):
    with pytest.raises(ValueError, match=r"refuses these messages .* leave out the system turn"):
        encode(family_model("gemma2"), [[SYSTEM, CHAT[0]]])


def test_earlier_turns_change_activations_answers_and_keys(tiny, tmp_path):
    alone = Prompt(PROMPT.id, PROMPT.text)
    values = {
        name: cache_activations(tiny, prompts, SITE)[SITE].values
        for name, prompts in (("alone", [alone]), ("chat", CHAT))
    }
    assert not torch.allclose(values["alone"], values["chat"])
    _, rows = token_activations(tiny, PROMPT, SITE)
    [encoded] = encode(tiny, CHAT)
    assert torch.allclose(rows[slice(*encoded.content)].mean(dim=0), values["chat"][0], atol=1e-4)
    assert prompts_key([alone]) != prompts_key([PROMPT])
    assert text_key(alone.text) != text_key(PROMPT.text, PROMPT.history)
    path = tmp_path / "answers.jsonl"
    for prompts in ([alone], [PROMPT], [alone], [PROMPT]):
        generate(tiny, prompts, decoding=SHORT, output=path)
    assert len(path.read_text().splitlines()) == 2


def test_keys_of_prompts_without_earlier_turns_are_those_of_before():
    prompt = Prompt("a", "How?", None, "fraud", "unsafe", "s")
    assert prompts_key([prompt]) == "96b01c9b22ad0b5d"
    assert text_key("How?") == "0ea5977074d1"


def test_activations_of_another_conversation_are_not_taken(tiny):
    acts = cache_activations(tiny, [PROMPT], SITE)[SITE]
    with pytest.raises(ValueError, match=r"was run .* with another text"):
        acts.of([Prompt(PROMPT.id, PROMPT.text)])
    assert acts.of(CHAT).prompts == (PROMPT,)


def test_a_batch_of_conversations_and_texts_is_answered_as_each_alone(tiny):
    mixture = [CHAT, "Describe a party.", [SYSTEM, CHAT[0]], Prompt("p", "List a poem.")]
    together = sweep(tiny, mixture, {"plain": ()}, SHORT)
    alone = [generate(tiny, [one], decoding=SHORT)[0] for one in mixture]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


ONLY_USERS = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
ONLY_THE_LAST = "[{{ messages[-1].content }}]{% if add_generation_prompt %}>{% endif %}"


@pytest.mark.parametrize(("template", "asked", "left_out"), [
    (ONLY_USERS, {"system_prompt": "Be brief."}, "system turn 'Be brief.'"),
    (ONLY_USERS, {"prompts": [SYSTEM, {"role": "user", "content": "hi"}]}, "system turn"),
    (ONLY_THE_LAST, {"prompts": CHAT}, r"leaves out the \w+ turn"),
])  # fmt: skip
def test_a_turn_that_the_template_leaves_out_is_an_error(
    tiny, monkeypatch, template, asked, left_out
):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    asked = {"prompts": "hi", **asked}
    with pytest.raises(ValueError, match=left_out):
        encode(tiny, **asked)
    assert encode(tiny, "hi")  # without such turns the template will do


def test_a_template_may_change_the_words_of_a_turn(tiny, monkeypatch):
    trimmed = (
        "{% for m in messages %}[{{ m.content.split('</think>')[-1] | trim }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    monkeypatch.setattr(tiny.tokenizer, "chat_template", trimmed)
    thought = {"role": "assistant", "content": "<think>hm</think> yes "}
    user = {"role": "user", "content": "hi"}
    [row] = encode(tiny, [user, thought, user])
    assert "[yes][hi]" in tiny.tokenizer.decode(row.ids)
