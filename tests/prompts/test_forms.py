"""Prompts are made of what people have: texts, messages, rows, data frames, and mixtures."""

from __future__ import annotations

import json
import re
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest

from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Message, Prompt, load_prompts, save_prompts

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a firewall?"},
    {"role": "assistant", "content": "A filter."},
    {"role": "user", "content": "Do I need one?"},
]
LANGUAGES = [
    "如何保存密码？",
    "كيف أحمي بياناتي؟",
    "Làm sao để nấu phở?",
    "cafe\u0301 naïve",
    "👩‍👩‍👧 ok?",
]


def one(given, **options):
    [prompt] = as_prompts(given, **options)
    return prompt


# A prompt from its text alone


def test_a_text_alone_is_the_question_and_everything_else_has_a_default():
    prompt = Prompt("How do I bake bread?")
    assert prompt.text == "How do I bake bread?"
    assert re.fullmatch("given-[0-9a-f]{12}", prompt.id)
    assert (prompt.response, prompt.category, prompt.label) == (None, "other", "neutral")
    assert (prompt.source, prompt.pair_id, prompt.history) == ("given", None, ())
    assert Prompt(text="How do I bake bread?") == prompt
    assert Prompt("a", "How do I bake bread?").id == "a"


def test_an_id_depends_on_the_words_alone_and_is_the_same_in_every_session():
    assert Prompt("What is phishing?").id == "given-dc9c52d81dd6"
    others = [
        Prompt("What is phishing"),
        Prompt(text="What is phishing?", response="A fraud."),
        Prompt(text="What is phishing?", history=(Message("user", "Hello."),)),
        Prompt(text="What is phishing?", source="mine"),
    ]
    assert len({prompt.id for prompt in [Prompt("What is phishing?"), *others]}) == 5
    assert Prompt(text="What is phishing?", label="unsafe").id == "given-dc9c52d81dd6"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": ""}, "text must be a text that is not empty, got ''"),
        ({"id": "a", "text": ""}, "text must be a text that is not empty, got ''"),
        ({"id": "a", "text": None}, "text must be a text that is not empty, got None"),
        ({"id": "a", "history": ["Hi"]}, "history holds messages of role and content"),
        ({"id": "a", "history": [{"role": "tool", "content": "x"}]}, "role is one of system, user"),
        ({"id": "a", "history": [{"role": "user", "content": " "}]}, "content must be a text"),
        ({"id": "a", "more_categories": ["fraud", ""]}, "more_categories holds names"),
    ],
)
def test_what_is_no_prompt_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        Prompt(**fields)


# Texts


def test_one_text_a_list_and_an_array_are_prompts_in_order():
    assert one("A?") == Prompt("A?")
    for given in (["A?", "B?"], ("A?", "B?"), (t for t in ("A?", "B?")), np.array(["A?", "B?"])):
        assert [prompt.text for prompt in as_prompts(given)] == ["A?", "B?"]
    assert [prompt.text for prompt in as_prompts(pd.Series(["A?", "B?"]))] == ["A?", "B?"]
    assert as_prompts([]) == []


def test_equal_texts_get_ids_of_their_own():
    first, other, second, third = as_prompts(["A?", "B?", "A?", "A?"])
    assert (second.id, third.id) == (f"{first.id}-2", f"{first.id}-3")
    assert other.id == Prompt("B?").id
    again, prompt = as_prompts(["A?", Prompt("A?")])
    assert (again.id, prompt.id) == (f"{first.id}-2", first.id)


def test_words_of_every_language_are_kept_and_so_are_their_ids(tmp_path):
    prompts = as_prompts(LANGUAGES)
    assert [prompt.text for prompt in prompts] == LANGUAGES
    assert len({prompt.id for prompt in prompts}) == len(LANGUAGES)
    assert one(normalize("NFC", LANGUAGES[3])).id != prompts[3].id
    save_prompts(tmp_path / "p.jsonl", prompts)
    assert load_prompts(tmp_path / "p.jsonl") == prompts
    assert prompts[0].id == "given-334529b3965d"


def test_a_label_and_a_category_can_be_said_for_all():
    prompt = one(["A?"], label="harmful", category="fraud")
    assert (prompt.label, prompt.category) == ("unsafe", "fraud")
    own = Prompt("a", "A?", None, "malware", "safe", "s")
    assert one(own) is own
    assert one([own], category="fraud") == Prompt("a", "A?", None, "fraud", "safe", "s")
    with pytest.raises(ValueError, match="label must be one of unsafe, safe, neutral, got 'bad'"):
        as_prompts("A?", label="bad")


def test_the_name_of_a_file_is_no_question(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt\nA?\n")
    for given in (path, str(path)):
        with pytest.raises(TypeError, match=r"mine\.csv' is a file; read it with wb\.prompts_from"):
            as_prompts(given)
    assert one("What is in mine.csv").text == "What is in mine.csv"


# Conversations


def test_a_conversation_is_one_prompt_with_its_earlier_turns():
    prompt = one(CHAT)
    assert prompt.text == "Do I need one?"
    assert [message.role for message in prompt.history] == ["system", "user", "assistant"]
    assert prompt.response is None
    assert [p.text for p in as_prompts([CHAT, CHAT[:2], "A?"])] == [
        "Do I need one?", "What is a firewall?", "A?"
    ]  # fmt: skip
    assert one({"role": "user", "content": "A?"}).text == "A?"


def test_a_conversation_that_ends_with_an_answer_has_it_as_response():
    prompt = one(CHAT[:3])
    assert (prompt.text, prompt.response) == ("What is a firewall?", "A filter.")
    assert prompt.history == (Message("system", "Be brief."),)
    prompt = one([{"messages": CHAT[:3], "label": "safe", "id": 7}])
    assert (prompt.id, prompt.response, prompt.label) == ("7", "A filter.", "safe")


def test_names_of_other_formats_and_parts_of_text_are_read():
    shared = [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]
    assert (one(shared).text, one(shared).response) == ("A?", "B.")
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B?"}]
    developer = {"role": "developer", "content": "Be kind."}
    prompt = one([developer, {"role": "user", "content": parts}])
    assert (prompt.text, prompt.history[0].role) == ("A\nB?", "system")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:1], "row 1: a conversation ends with a user turn.*this one has system there"),
        ([CHAT[2]], "this one has nothing there"),
        ([{"role": "tool", "content": "x"}], "row 1, message 1: role 'tool' is none of system"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: a message's content must"),
        ([{"role": "user", "content": None}], "message 1: a message's content must be a text"),
    ],
)
def test_what_is_no_conversation_is_said(messages, message):
    with pytest.raises(ValueError, match=message) as caught:
        as_prompts(messages)
    assert "\n" not in str(caught.value)


def test_earlier_turns_are_saved_and_read_back(tmp_path):
    prompts = [one(CHAT), Prompt("A?"), one({"text": ["B?"], "category": ["fraud; malware"]})]
    save_prompts(tmp_path / "p.jsonl", prompts)
    assert load_prompts(tmp_path / "p.jsonl") == prompts
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows[0]["history"][0] == {"role": "system", "content": "Be brief."}
    assert not {"history", "more_categories"} & rows[1].keys()


# Rows


def frame(**columns):
    return pd.DataFrame({"question": ["A?", "B?"], **columns})


def test_a_data_frame_dicts_and_columns_are_the_same_prompts():
    table = frame(label=["harmful", "benign"], category=["fraud", None], response=["x", np.nan])
    expected = [
        Prompt(text="A?", response="x", category="fraud", label="unsafe"),
        Prompt(text="B?", label="safe"),
    ]
    assert as_prompts(table) == expected
    assert as_prompts(table.to_dict("records")) == expected
    assert as_prompts(table.to_dict("list")) == expected


def test_ids_pairs_and_sources_of_rows_are_kept():
    table = frame(id=[1, 2], pair_id=[3, np.nan], source=["s", None], Label=["safe", "unsafe"])
    first, second = as_prompts(table)
    assert (first.id, first.pair_id, first.source, first.label) == ("1", "3", "s", "safe")
    assert (second.id, second.pair_id, second.source, second.label) == (
        "2",
        None,
        "given",
        "unsafe",
    )


def test_columns_of_other_names_are_said():
    table = pd.DataFrame({"frage": ["A?"], "thema": ["fraud"], "is_safe": ["no"], "antwort": ["x"]})
    prompt = one(table, text="frage", category="thema", label="is_safe", response="antwort")
    assert prompt == Prompt(text="A?", response="x", category="fraud", label="unsafe")
    assert one(table, text="frage", label="neutral", category="cooking").category == "cooking"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "column 'text' or 'prompt' or 'question' or 'instruction' is missing"),
        ({"text": "fragen"}, "column 'fragen' is missing; columns: 'frage'.* Did you mean 'frage'"),
        ({"text": "frage", "label": "lable"}, "column 'lable' is missing"),
        ({"text": "frage", "category": "thena"}, "column 'thena' is missing.*Did you mean 'thema'"),
        ({"text": "frage", "response": "x"}, "column 'x' is missing"),
        ({"text": "thema"}, "row 2: column 'thema' is empty"),
        ({"text": "n"}, "row 1: column 'n' holds int"),
        ({"text": "frage", "label": "thema"}, "row 1: cannot read label 'fraud'"),
        ({"text": "frage", "label": "art"}, "row 2: column 'art' is empty; say the label"),
    ],
)
def test_rows_that_do_not_fit_are_named(options, message):
    table = pd.DataFrame(
        {"frage": ["A?", "B?"], "thema": ["fraud", None], "n": [1, 2], "art": ["safe", None]}
    )
    with pytest.raises(ValueError, match=message) as caught:
        as_prompts(table, **options)
    assert "\n" not in str(caught.value)


def test_a_column_is_named_for_rows_alone():
    with pytest.raises(ValueError, match="'frage' names a column, but what is given has no"):
        as_prompts(["A?"], text="frage")


def test_a_column_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="column 'question' comes twice"):
        as_prompts(pd.DataFrame([["A?", "B?"]], columns=["question", "question"]))


@pytest.mark.parametrize("given", [7, [7], [None], ["A?", 1.5]])
def test_what_is_in_no_form_is_refused(given):
    with pytest.raises(TypeError, match="prompts are given as a text, a list of texts"):
        as_prompts(given)


def test_a_series_that_is_a_row_is_one_prompt_and_one_of_texts_is_many():
    frame = pd.DataFrame({"question": ["first", "second"], "label": ["unsafe", "safe"]})
    [prompt] = as_prompts(frame.iloc[0])
    assert (prompt.text, prompt.label) == ("first", "unsafe")
    assert [p.text for p in as_prompts(frame["question"])] == ["first", "second"]


def test_an_instruction_with_an_input_beside_it_is_not_cut_in_half():
    rows = [{"instruction": "Sum it up.", "input": "A long text."}]
    with pytest.raises(ValueError, match=r"'instruction' and 'input' make one question together"):
        as_prompts(rows)
    assert as_prompts(rows, text="instruction")[0].text == "Sum it up."
    assert as_prompts([{"instruction": "Sum it up.", "input": ""}])[0].text == "Sum it up."
