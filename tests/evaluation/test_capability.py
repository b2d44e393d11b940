"""Capability: what steering costs is found, and gates leave harmless text alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.tiny_models import D_MODEL

from workbench.evaluation.capability import multiple_choice, text_perplexity
from workbench.evaluation.questions import Question, read_questions
from workbench.generation.answers import UNSTEERED, Completion, generate
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_kl, answer_log_probs, steered_log_probs
from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.models.tokens import encode
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import add_vector, gated
from workbench.steering.vectors import SteeringVector

QUESTIONS = [
    Question(f"q{i}", f"What is {i}?", ("one thing", "two things", "a third thing"), i % 3)
    for i in range(9)
]
TEXTS = [
    "The garden is full of dogs and cats.",
    "A card and a bicycle stand by the door of the old house.",
]


def steer(model, rho=0.5, **extent):
    values = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    vector = SteeringVector(
        Site(1, "resid_post"),
        "fraud",
        values,
        "prompt_contrast",
        "content",
        1.0,
        3,
        3,
        20.0,
        model_info(model),
    )
    return [add_vector(vector, rho=rho, **extent)]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "Why?", "choices": ["a", "b", "c"], "answer": 2}, 2),
        ({"question": "Why?", "A": "x", "B": "y", "C": "z", "answer": "B"}, 1),
        ({"question": "Why?", "A": "x", "B": "y", "answer": "y"}, 1),
        ({"question": "Why?", "A": "x", "B": "y", "answer": "0"}, 0),
    ],
)
def test_questions_are_read_in_the_forms_of_public_sets(tmp_path, row, answer):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (question,) = read_questions(path)
    assert (question.answer, question.text) == (answer, "Why?")


@pytest.mark.parametrize(
    "row", [
        {"question": "Why?", "A": "x", "answer": "A"},
        {"question": "Why?", "A": "x", "B": "y", "answer": "C"},
        {"A": "x"},
    ]
)  # fmt: skip
def test_a_row_that_is_no_question_is_named(tmp_path, row):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        json.dumps({"question": "Fine?", "A": "x", "B": "y", "answer": "A"})
        + "\n"
        + json.dumps(row)
        + "\n"
    )
    with pytest.raises(ValueError, match="row 2"):
        read_questions(path)


def test_the_projects_own_questions_have_one_answer_each_and_no_favourite_place():
    questions = read_questions()
    assert len(questions) == len({q.text for q in questions}) == 40
    assert all(len(set(q.choices)) == 4 for q in questions)
    assert [sum(q.answer == place for q in questions) for place in range(4)] == [10, 10, 10, 10]


def test_steering_moves_the_choice_and_the_unsteered_model_is_the_reference(tiny):
    table = multiple_choice(tiny, QUESTIONS, {"steered": steer(tiny)}).set_index("condition")
    assert list(table.index) == [UNSTEERED, "steered"]
    assert math.isnan(table.loc[UNSTEERED, "difference"])
    assert table["chance"].tolist() == pytest.approx([1 / 3, 1 / 3])
    difference = table.loc["steered", "accuracy"] - table.loc[UNSTEERED, "accuracy"]
    assert table.loc["steered", "difference"] == pytest.approx(difference)
    rows = [{"question": q.text, "choices": list(q.choices), "answer": q.answer} for q in QUESTIONS]
    assert multiple_choice(tiny, rows, {"steered": steer(tiny)})["accuracy"].tolist() == (
        table["accuracy"].tolist()
    )
    with pytest.raises(ValueError, match="give one list"):
        multiple_choice(tiny, QUESTIONS, {"steered": {"fraud": steer(tiny)}})
    with pytest.raises(ValueError, match="no questions"):
        multiple_choice(tiny, [], {})


def test_the_perplexity_of_a_text_rises_under_strong_noise(tiny):
    table = text_perplexity(
        tiny, TEXTS, {"little": steer(tiny, 0.001), "much": steer(tiny, 3.0)}
    ).set_index("condition")
    assert abs(table.loc["little", "difference"]) < 0.05
    assert abs(table.loc["much", "difference"]) > abs(table.loc["little", "difference"])
    with pytest.raises(ValueError, match="no text"):
        text_perplexity(tiny, [" "], {})


def prompts(n=4):
    return [
        Prompt(f"p{i}", f"What is in the garden {i}?", None, "harmless", "neutral", "test")
        for i in range(n)
    ]


@pytest.mark.parametrize("name", ["tiny", "chatless"])
def test_log_probabilities_with_nothing_done_are_those_of_the_unsteered_model(name, request):
    model = request.getfixturevalue(name)
    answers = generate(model, prompts(), decoding=Decoding(max_new_tokens=5))
    plain = answer_log_probs(model, answers)
    again = steered_log_probs(model, answers, [()] * len(answers), batch_size=3)
    for a, b in zip(plain, again, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_likeliest_tokens_of_a_steered_answer_are_its_own(tiny):
    for extent in ({}, {"positions": "generated"}, {"positions": "prompt"}, {"until": 2}):
        change = steer(tiny, **extent)
        answers = generate(tiny, prompts(), change, decoding=Decoding(max_new_tokens=5))
        scored = steered_log_probs(tiny, answers, [change] * len(answers))
        other = steered_log_probs(tiny, answers, [()] * len(answers))
        assert sum(float(s.sum()) for s in scored) >= sum(float(s.sum()) for s in other)


def test_kl_is_zero_for_nothing_and_grows_with_strength(tiny):
    answers = generate(tiny, prompts(), decoding=Decoding(max_new_tokens=5))
    each = {
        name: [steer(tiny, rho)] * len(answers) for name, rho in (("weak", 0.05), ("strong", 0.8))
    }
    divergence = answer_kl(tiny, answers, {"none": [()] * len(answers), **each})
    assert divergence["none"] == 0.0
    assert 0 < divergence["weak"] < divergence["strong"]
    with pytest.raises(ValueError, match="one entry for each of 4"):
        answer_kl(tiny, answers, {"few": [()]})


def test_kl_behind_a_gate_that_stays_closed_is_zero(tiny):
    from helpers.gates import NEVER, gate

    answers = generate(tiny, prompts(), decoding=Decoding(max_new_tokens=5))
    closed = gated({"fraud": steer(tiny)}, gate(tiny, NEVER))
    assert answer_kl(tiny, answers, {"gated": [closed] * len(answers)})["gated"] == 0.0


def test_the_unsteered_model_reads_a_question_once_for_all_its_choices(tiny):
    prompt = Prompt("q", "Where do the dogs and the cats sleep?", None, "x", "neutral", "test")
    texts = ["In the garden.", "In the old house.", "By the door of the house."]
    ids = [tuple(tiny.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    answers = [
        Completion(prompt, text, tokens, "eos", UNSTEERED)
        for text, tokens in zip(texts, ids, strict=True)
    ]
    n_read = 0

    def count(_module, args, keywords):
        nonlocal n_read
        n_read += (args[0] if args else keywords["input_ids"]).numel()

    alone = [steered_log_probs(tiny, [answer], [()])[0] for answer in answers]
    embedding = tiny.original_model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(count, with_kwargs=True)
    try:
        together = steered_log_probs(tiny, answers, [()] * 3)
    finally:
        handle.remove()
    [encoded] = encode(tiny, [prompt])
    assert n_read < 2 * len(encoded.ids) + 3 * max(map(len, ids))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
