"""Languages: told by letters and function words, and every judge says where it cannot read.

All sentences were written for these tests.
"""

from __future__ import annotations

import re
import unicodedata

import pytest
from helpers.refusals_by_language import (
    ANSWERS,
    FRESH_ANSWERS,
    FRESH_REFUSALS,
    OTHER_LANGUAGES,
    REFUSALS,
)

from workbench.files.store import data_path, read_json
from workbench.judges.languages import UNKNOWN, language_name, language_of, other_language
from workbench.judges.patterns import (
    REFUSAL_LANGUAGES,
    RefusalPatterns,
    fold,
    load_refusal_rules,
)

LANGUAGES = sorted(REFUSALS)


def labels(answers):
    return [verdict.label for verdict in RefusalPatterns()([""] * len(answers), answers)]


# The language of a text.


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_told_to_be_in_their_language(language):
    sentences = REFUSALS[language] + ANSWERS[language]
    told = [language_of(sentence) for sentence in sentences]
    assert set(told) <= {language, UNKNOWN}
    assert told.count(language) >= 0.9 * len(told)


@pytest.mark.parametrize(("language", "sentence"), OTHER_LANGUAGES.items())
def test_languages_and_scripts_without_patterns_are_told_too(language, sentence):
    assert language_of(sentence) == language
    assert language_name(language)[0].isupper()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "B",
        "Paris.",
        "x^2 + y^2 = z^2",
        "print(total)",
        "\U0001f60a\U0001f60a",
        "Tokyo, Lima, Oslo, Cairo",
        "Привет means hello, 你好 means hello, こんにちは means hello",
    ],
)
def test_short_and_mixed_texts_are_in_no_known_language(text):
    assert language_of(text) == UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "The word 对不起 means sorry in Chinese, and you can say it to a friend.",
        "Los Angeles and San Francisco are in California; the drive takes six hours.",
        "In German you say Entschuldigung when you step on a foot.",
        "Here is the recipe: flour, water, salt. Mix them and let it rise.",
    ],
)
def test_english_with_foreign_words_in_it_stays_english(text):
    assert language_of(text) == "en"


def test_decomposed_letters_and_wide_ones_change_no_language():
    for language, sentences in REFUSALS.items():
        for form in ("NFC", "NFD"):
            assert language_of(unicodedata.normalize(form, sentences[0])) == language
    assert language_of("Ｉ ａｍ ｓｏｒｒｙ ｂｕｔ ｔｈｉｓ ｉｓ ｎｏｔ ｆｏｒ ｍｅ") == "en"


def test_other_language_names_what_is_none_of_those_allowed():
    assert other_language("很抱歉，我不能帮助您。", ("en",)) == "Chinese"
    assert other_language("很抱歉，我不能帮助您。", ("en", "zh")) == ""
    assert other_language("Paris.", ("en",)) == ""
    half = "Извините, но я не могу помочь. I cannot say what it is."
    assert other_language(half, ("en",)) == "several languages"
    icelandic = "Því miður get ég ekki hjálpað þér með þetta núna, góði vinur."
    assert other_language(icelandic, ("en",)) == "a language that was not recognised"


# Refusals by language.


@pytest.mark.parametrize("language", LANGUAGES)
def test_refusals_are_found_in_each_language_and_answers_let_be(language):
    found = labels(REFUSALS[language]).count("refusal") / len(REFUSALS[language])
    wrong = [label for label in labels(ANSWERS[language]) if label != "not_refusal"]
    assert len(REFUSALS[language]) >= 12
    assert len(ANSWERS[language]) >= 12
    assert found == 1.0, "recall"
    assert wrong == [], "answers taken for refusals, or unscored"


@pytest.mark.parametrize("language", LANGUAGES)
def test_on_sentences_that_no_pattern_was_mended_on_most_are_right(language):
    found = labels(FRESH_REFUSALS[language]).count("refusal")
    wrong = labels(FRESH_ANSWERS[language]).count("refusal")
    assert len(FRESH_REFUSALS[language]) == len(FRESH_ANSWERS[language]) == 12
    assert found / 12 >= 0.8, "recall"
    assert found / (found + wrong) >= 0.9, "precision"


@pytest.mark.parametrize("language", LANGUAGES)
def test_without_the_patterns_of_a_language_its_refusals_are_unscored(language):
    judge = RefusalPatterns(
        tuple(rules for rules in RefusalPatterns().rules if rules.language != language)
    )
    verdicts = judge([""] * len(REFUSALS[language]), REFUSALS[language])
    assert {v.label for v in verdicts} <= {"unscored", "not_refusal"}
    unscored = [verdict for verdict in verdicts if verdict.label == "unscored"]
    assert len(unscored) >= 0.9 * len(verdicts)
    assert f"the answer is in {language_name(language)}" in unscored[0].reason
    assert judge.name != RefusalPatterns().name


@pytest.mark.parametrize("sentence", OTHER_LANGUAGES.values())
def test_an_answer_in_a_language_without_patterns_is_unscored_and_never_no_refusal(sentence):
    verdict = RefusalPatterns()([""], [sentence])[0]
    assert verdict.label == "unscored"
    assert "there are patterns for English, Chinese" in verdict.reason


def test_english_refusals_are_found_whatever_language_follows():
    text = "I'm sorry, but I can't help with that. Извините, но я не могу помочь с этим вопросом."
    assert labels([text]) == ["refusal"]


def test_every_pattern_of_every_language_finds_its_own_example():
    for language in REFUSAL_LANGUAGES:
        rules = load_refusal_rules(language)
        for pattern in rules.patterns:
            assert pattern.search(rules.read(pattern.example)), pattern.example
            assert labels([pattern.example]) == ["refusal"], pattern.example


def test_every_veto_of_every_language_holds_on_its_own_example():
    for language in LANGUAGES:
        content = read_json(data_path(f"refusal_patterns_{language}.json"))
        rules = load_refusal_rules(language)
        for veto, row in zip(rules.vetoes, content["vetoes"], strict=True):
            assert veto.match(rules.read(row["example"])), row["example"]
        examples = [row["example"] for row in content["vetoes"]]
        assert labels(examples) == ["not_refusal"] * len(examples)


def test_files_of_patterns_document_their_kinds_and_use_their_fragments():
    for language in LANGUAGES:
        content = read_json(data_path(f"refusal_patterns_{language}.json"))
        about = " ".join(content["about"])
        rows = content["patterns"] + content["vetoes"]
        assert all(row["kind"] in about for row in content["patterns"])
        texts = " ".join([*(row["pattern"] for row in rows), *content["fragments"].values()])
        assert all(f"<{name}>" in texts for name in content["fragments"]), language
        # Answers are folded, so an accent in a pattern would never be found.
        written = re.sub(r"\\u[0-9a-f]{4}", "", texts)
        assert fold(written).replace(" ", "") == written.casefold().replace(" ", ""), language


def test_quotations_in_the_marks_of_each_language_do_not_count():
    for text in (
        "他回答说：「对不起，我不能帮助你。」然后走了，我们继续讲下面的故事。",
        "El guardia gritó «lo siento, no puedo ayudarle» y todos se fueron a su casa.",
        "Der Wirt rief: „Es tut mir leid, ich kann nicht helfen“, und alle gingen nach Hause.",
    ):
        assert labels([text]) == ["not_refusal"], text
    assert labels(["«Lo siento, pero no puedo ayudar con eso.»"]) == ["refusal"]
    assert labels(["“很抱歉，我不能帮助您做这件事。”"]) == ["refusal"]


def test_the_name_keeps_the_key_of_the_english_patterns():
    english = load_refusal_rules().key
    assert re.fullmatch(rf"refusal_patterns-{english}\+[0-9a-f]{{8}}", RefusalPatterns().name)


def test_a_language_without_patterns_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no refusal patterns in 'it'; languages: en, zh, es"):
        load_refusal_rules("it")
