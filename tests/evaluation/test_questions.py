"""Multiple-choice questions are read in the forms of public sets, and right gold is not guessed."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from workbench.evaluation.questions import read_questions


def read(tmp_path, rows, name="q.jsonl"):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_questions(tmp_path / name)


def gold(questions):
    return [(q.choices, q.choices[q.answer]) for q in questions]


@pytest.mark.parametrize(
    ("row", "choices", "right"),
    [
        ({"A": 3, "B": 2, "C": 1, "D": 0, "answer": "B"}, ("3", "2", "1", "0"), "2"),
        ({"A": "no", "B": "yes", "C": None, "D": None, "answer": "B"}, ("no", "yes"), "yes"),
        ({"A": "B", "B": "A", "C": "AB", "answer": "A"}, ("B", "A", "AB"), "B"),
        ({"a": "x", "b": "y", "Answer": "b"}, ("x", "y"), "y"),
        ({"choices": ["1", "2", "0"], "answer": 1}, ("1", "2", "0"), "2"),
        ({"choices": ["x", "y"], "answer": 1.0}, ("x", "y"), "y"),
        ({"choices": ["x", "y"], "answer": "B"}, ("x", "y"), "y"),
        ({"choices": ["A", "B"], "answer": "B"}, ("A", "B"), "B"),
        ({"choices": [True, False], "answer": False}, ("True", "False"), "False"),
        ({"choices": "['x', 'y']", "answer": "y"}, ("x", "y"), "y"),
        ({"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, ("x", "y"), "y"),
    ],
    ids=str,
)
def test_choices_and_answers_are_read_as_they_are_meant(tmp_path, row, choices, right):
    assert gold(read(tmp_path, [{"question": "Which?", **row}])) == [(choices, right)]
    assert gold(read_questions([{"question": "Which?", **row}])) == [(choices, right)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"A": "1", "B": "2", "C": "0", "D": "3", "answer": "1"}, "answer '1' may be the place of"),
        ({"A": 1, "B": 2, "C": 0, "answer": 2}, "answer 2 may be the place of '0'"),
        ({"choices": ["B", "A", "AB"], "answer": "A"}, "answer 'A' may be the place of"),
        (
            {"A": "x", "B": "", "C": "z", "answer": "C"},
            "choice B is empty and one behind it is not",
        ),
        ({"A": "x", "B": "y", "answer": None}, "an answer among them"),
        ({"A": "x", "B": "y", "answer": "2"}, "an answer among them"),
        ({"choices": ["x", "y"], "answer": -1}, "an answer among them"),
    ],
    ids=str,
)
def test_an_answer_that_is_not_clear_is_refused_with_its_place(tmp_path, row, message):
    fine = {"question": "Fine?", "A": "x", "B": "y", "answer": "A"}
    with pytest.raises(ValueError, match=r"q\.jsonl, row 2: ") as caught:
        read(tmp_path, [fine, {"question": "Which?", **row}])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_headerless_files_of_mmlu_are_read(tmp_path):
    text = '1 + 1?,1,2,3,4,B\n"2 + 2, or so?",3,4,5,6,b\n'
    first, second = read(tmp_path, text, "arithmetic_test.csv")
    assert (first.id, first.text, first.choices) == (
        "arithmetic_test-1", "1 + 1?", ("1", "2", "3", "4")
    )  # fmt: skip
    assert (second.text, second.choices[second.answer]) == ("2 + 2, or so?", "4")
    same = '"Twice, twice?",2,2,3,4,D\n'
    assert read(tmp_path, same, "same_test.csv")[0].answer == 3
    with pytest.raises(ValueError, match="row 2: a question, choices and a letter are needed"):
        read(tmp_path, "1 + 1?,1,2,3,4,B\nx,1,2,3,4,yes\n", "bad_test.csv")


def test_a_header_is_told_from_a_question(tmp_path):
    text = "question,A,B,C,D,answer\nWhich?,w,x,y,z,D\n"
    assert gold(read(tmp_path, text, "q.csv")) == [(("w", "x", "y", "z"), "z")]


def test_words_for_nothing_are_choices(tmp_path):
    text = "question\tA\tB\tC\tanswer\nHow many?\tNone\tnan\tNA\tB\n"
    assert gold(read(tmp_path, text, "q.tsv")) == [(("None", "nan", "NA"), "nan")]


def test_a_data_frame_of_questions_is_read():
    table = pd.DataFrame({"question": ["Which?"], "A": ["x"], "B": ["y"], "answer": ["B"]})
    [question] = read_questions(table)
    assert (question.id, question.answer) == ("question-1", 1)
