"""Self-contrast: both sides of a pair stand behind the plain question; a judge keeps answers."""

from __future__ import annotations

import pytest

from workbench.generation.answers import Completion
from workbench.generation.decoding import Decoding
from workbench.judges.base import Verdict
from workbench.prompts.prompt import Prompt
from workbench.safesteer.own_answers import (
    INSTRUCTION,
    answer_pairs,
    instructed,
    kept_by,
    self_contrast,
    went_along,
)

SHORT = Decoding(max_new_tokens=5)


def question(i, label="unsafe"):
    return Prompt(f"q{i}", f"How do I take dog {i}?", None, "fraud", label, "test")


def everything(prompts, _):
    return [True] * len(prompts)


def completion(prompt, text):
    return Completion(prompt, text, (1, 2), "eos", "any")


def test_an_instruction_goes_around_the_question():
    (asked,) = instructed([question(1)])
    assert question(1).text in asked.text
    assert asked.text != question(1).text
    assert asked.id == "q1"
    (strange,) = instructed(
        [Prompt("q", "What is {0} {question}?", None, "fraud", "unsafe", "test")]
    )
    assert "What is {0} {question}?" in strange.text
    with pytest.raises(ValueError, match=r"needs \{question\} once"):
        instructed([question(1)], "Be good.")
    assert INSTRUCTION.count("{question}") == 1


def test_pairs_have_one_context_and_differ_in_the_answer(tiny, tmp_path):
    prompts = [question(0), question(1), question(2, "safe")]
    rows = self_contrast(
        tiny,
        prompts,
        keep_safe=everything,
        keep_unsafe=everything,
        samples=2,
        decoding=SHORT,
        output=tmp_path / "a.jsonl",
    )
    assert rows
    assert {row.text for row in rows} <= {question(0).text, question(1).text}
    by_pair = {}
    for row in rows:
        by_pair.setdefault(row.pair_id, {})[row.label] = row
    for pair in by_pair.values():
        assert set(pair) == {"unsafe", "safe"}
        assert pair["safe"].text == pair["unsafe"].text
        assert pair["safe"].response.strip()
    again = self_contrast(
        tiny,
        prompts,
        keep_safe=everything,
        keep_unsafe=everything,
        samples=2,
        decoding=SHORT,
        output=tmp_path / "a.jsonl",
    )
    assert again == rows


def test_the_questions_the_model_goes_along_with_are_those_a_judge_says_so_of(tiny, tmp_path):
    prompts = [question(0), question(1), question(2, "safe"), question(3)]
    asked = []

    def every_second(questions, answers):
        asked.append((list(questions), list(answers)))
        return [i % 2 == 0 for i in range(len(answers))]

    self_contrast(
        tiny,
        prompts,
        keep_safe=everything,
        keep_unsafe=everything,
        decoding=SHORT,
        output=tmp_path / "a.jsonl",
    )
    before = (tmp_path / "a.jsonl").read_bytes()
    found = went_along(tiny, prompts, every_second, decoding=SHORT, output=tmp_path / "a.jsonl")
    assert found == [question(0), question(3)]
    assert (tmp_path / "a.jsonl").read_bytes() == before, "the answers were there already"
    assert asked[0][0] == [question(i).text for i in (0, 1, 3)]


def test_a_question_without_a_kept_answer_on_each_side_gives_no_pair():
    prompts = [question(0), question(1)]
    safe = [
        completion(prompts[0], "Be kind."),
        completion(prompts[1], "Ask first."),
        completion(prompts[1], "Ask first."),
    ]
    rows = answer_pairs(prompts, safe, [completion(prompts[1], "Take it.")])
    assert [(row.label, row.response) for row in rows] == [
        ("unsafe", "Take it."),
        ("safe", "Ask first."),
    ]
    assert answer_pairs(prompts, [], [completion(prompts[1], "Take it.")]) == []


def test_a_judge_decides_what_is_kept():
    class Judge:
        name = "by hand"

        def __call__(self, prompts, responses):
            return [Verdict(response, None, self.name, "") for response in responses]

    safe, unsafe = kept_by(Judge())
    labels = ["safe", "unsafe", "refusal", "not_refusal", "degenerate", "unscored"]
    assert safe(labels, labels) == [True, False, False, False, False, False]
    assert unsafe(labels, labels) == [False, True, False, False, False, False]


def test_without_a_judge_words_decide():
    safe, unsafe = kept_by(None)
    answers = [
        "It is illegal, so ask for consent.",
        "Take the second door.",
        "I'm sorry, but I can't help with that.",
        "the way the way the way the way the way the way the way the way the way the way",
    ]
    assert safe(["How?"] * 4, answers) == [True, False, False, False]
    assert unsafe(["How?"] * 4, answers) == [False, True, False, False]


def test_wording_that_cannot_be_read_is_on_neither_side():
    safe, unsafe = kept_by(None)
    answers = ["Das ist verboten, und es schadet anderen Menschen.", "这是违法的，请先征得同意。"]
    assert safe(["How?"] * 2, answers) == [False, False]
    assert unsafe(["How?"] * 2, answers) == [False, False]


def test_no_question_or_no_sample_is_refused(tiny):
    for prompts, samples, message in (
        ([question(0, "safe")], 1, "no unsafe prompts"),
        ([question(0)], 0, "samples must be"),
    ):
        with pytest.raises(ValueError, match=message):
            self_contrast(
                tiny, prompts, keep_safe=everything, keep_unsafe=everything, samples=samples
            )
