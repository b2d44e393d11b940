"""Chat templates: keywords, the switch of thinking, ends of a turn, and plain text without one."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.thinking import EFFORT, OPENED, SWITCH, thinking_model
from helpers.tiny_models import tiny_model

from workbench.models.activations import cache_activations, token_activations
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.models.templates import asked_as, asked_by
from workbench.models.tokens import answer_ids, encode, stop_ids, template_text, token_ids
from workbench.prompts.prompt import Prompt

PROMPT = Prompt("a", "How do I stay safe online?", "Use long words.", "fraud", "safe", "t")
SITE = Site(1, "resid_post")
CLOSED = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        name: load_model(thinking_model(tmp_path_factory.mktemp(name), template), device="cpu")
        for name, template in (("switch", SWITCH), ("opened", OPENED), ("effort", EFFORT))
    }


def test_thinking_is_off_where_the_template_has_a_switch_unless_it_is_asked_for(models) -> None:
    model = models["switch"]
    assert template_text(model)[1].endswith("assistant\n" + CLOSED)
    assert template_text(model, None, {"enable_thinking": False}) == template_text(model)
    assert template_text(model, None, {"enable_thinking": True})[1].endswith("assistant\n")
    assert template_text(models["opened"])[1].endswith("assistant\n<think>\n")


def test_keywords_reach_the_template(models) -> None:
    before, _ = template_text(models["effort"], None, {"reasoning_effort": "low"})
    assert "Reasoning: low" in before
    assert "Reasoning: medium" in template_text(models["effort"])[0]


@pytest.mark.parametrize(
    ("name", "keywords", "said"),
    [
        ("switch", {"enable_thinkin": True}, "never reads 'enable_thinkin'; it reads: enable_thin"),
        ("opened", {"enable_thinking": False}, "never reads 'enable_thinking'; it reads none"),
        ("effort", {"messages": []}, "never reads 'messages'; it reads: reasoning_effort"),
    ],
)
def test_a_keyword_that_could_change_nothing_is_refused(models, name, keywords, said) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        encode(models[name], [PROMPT], template_keywords=keywords)
    assert "\n" not in str(caught.value)


def test_activations_are_cached_by_what_their_prompts_were_asked_with(models, tmp_path) -> None:
    model = models["switch"]

    def at(**asked):
        return cache_activations(model, [PROMPT], SITE, span="last", store=tmp_path, **asked)[SITE]

    plain, thinking = at(), at(template_keywords={"enable_thinking": True})
    told = at(system_prompt="Be kind.")
    assert len(list(tmp_path.iterdir())) == 3
    assert not plain.values.allclose(thinking.values)
    assert (plain.asked_as, asked_by(plain.asked_as)) == ("", {})
    for one, asked in ((thinking, {"enable_thinking": True}), (told, {})):
        assert asked_by(one.asked_as)["template_keywords"] == asked
        _, alone = token_activations(
            model, dataclasses.replace(PROMPT, response=None), SITE,
            **asked_by(one.asked_as),
        )  # fmt: skip
        assert alone[-1].allclose(one.values[0], atol=1e-5)
    assert asked_by(told.asked_as)["system_prompt"] == "Be kind."
    assert asked_as(None, None) == asked_as(None, {}) == ""


def test_an_answer_that_is_given_stands_behind_the_thoughts(models) -> None:
    def text(name, **how):
        (row,) = encode(models[name], [PROMPT], **how)
        return models[name].tokenizer.decode(list(row.ids))

    assert text("opened", with_response=True).endswith("<think>\n\n</think>\n\nUse long words.")
    assert text("opened", behind_thoughts=True).endswith("<think>\n\n</think>\n\n")
    assert text("opened").endswith("<think>\n")
    assert text("switch", with_response=True).endswith(CLOSED + "Use long words.")
    final = "<|start|>assistant<|channel|>final<|message|>Use long words."
    assert text("effort", with_response=True).endswith(final)
    (row,) = encode(models["opened"], [PROMPT], with_response=True)
    assert models["opened"].tokenizer.decode(row.ids[slice(*row.response)]) == "Use long words."


# Which tokens end an answer


def names_of_stops(model) -> set[str]:
    return {model.tokenizer.convert_ids_to_tokens(i) for i in stop_ids(model)}


def test_a_token_between_channels_is_no_end_of_an_answer(models) -> None:
    assert names_of_stops(models["effort"]) == {"<|return|>", "<|endoftext|>"}


def test_a_checkpoint_that_lists_it_ends_at_the_token_between_channels(models, monkeypatch) -> None:
    model = models["effort"]
    end = model.tokenizer.convert_tokens_to_ids("<|end|>")
    config = model.original_model.generation_config
    monkeypatch.setattr(config, "eos_token_id", [*config.eos_token_id, end])
    assert "<|end|>" in names_of_stops(model)


@pytest.mark.parametrize("name", ["<|im_end|>", "<|turn_end|>"])
def test_the_end_of_a_turn_counts_where_the_checkpoint_lists_the_end_of_a_text(
    tmp_path, name
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model("llama3", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [name], "eos_token": "<|end_of_text|>"}
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '" + name + "\n' }}{% endfor %}"
    )
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load_model(folder, device="cpu")
    assert names_of_stops(model) == {"<|end_of_text|>", name}


# Without a chat template


def test_something_stands_between_a_question_and_its_answer_without_a_template(chatless) -> None:
    def text(prompt=PROMPT, **how):
        (row,) = encode(chatless, [prompt], with_response=True, **how)
        response = chatless.tokenizer.decode(row.ids[slice(*row.response)])
        assert response.strip() == "Use long words."
        return chatless.tokenizer.decode(list(row.ids)), response

    start = "<|endoftext|>"
    whole, response = text()
    assert whole == start + "How do I stay safe online? Use long words."
    assert response == " Use long words."  # tokens have their space in front
    spaced = dataclasses.replace(PROMPT, response=" Use long words.")
    assert text(spaced) == (whole, response)
    asked = {"plain_template": "Question: {prompt}\nAnswer:\n"}
    shown = "Question: How do I stay safe online?\nAnswer:\nUse long words."
    assert text(template_keywords=asked) == (start + shown, "Use long words.")
    told, _ = text(system_prompt="Be kind.", template_keywords=asked)
    assert told == start + "Be kind.\n\n" + shown
    (row,) = encode(chatless, [PROMPT], template_keywords=asked)
    words = chatless.tokenizer.decode(row.ids[slice(*row.content)])
    assert words.strip() == PROMPT.text
    assert answer_ids(chatless, "Yes") == token_ids(chatless, " Yes")
    assert answer_ids(chatless, "Yes", {"plain_template": "{prompt}"}) == token_ids(chatless, "Yes")


def test_a_chat_template_stands_between_by_itself(tiny) -> None:
    assert answer_ids(tiny, "Yes") == token_ids(tiny, "Yes")


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"enable_thinking": True}, "no chat template to read 'enable_thinking'; the one keyword"),
        ({"plain_template": "no place"}, "must be a text with {prompt} in it once"),
        ({"plain_template": 3}, "must be a text with {prompt} in it once, got 3"),
    ],
)
def test_a_plain_template_needs_a_place_for_the_prompt(chatless, keywords, said) -> None:
    with pytest.raises(ValueError, match=said):
        encode(chatless, [PROMPT], template_keywords=keywords)


@pytest.mark.parametrize("value", ["off", "no", "false", None, 0])
def test_a_switch_of_thoughts_is_true_or_false_and_nothing_that_a_template_misreads(
    models, value
) -> None:
    with pytest.raises(ValueError, match="enable_thinking is a switch: give true or false, got"):
        template_text(models["switch"], template_keywords={"enable_thinking": value})
