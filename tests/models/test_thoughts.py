"""Thoughts are told apart from the answer, by marks in the vocabulary or the template."""

from __future__ import annotations

import pytest
from helpers.thinking import EFFORT, OPENED, SWITCH, thinking_model

from workbench.judges.base import without_thoughts
from workbench.judges.patterns import RefusalPatterns
from workbench.models.load import load_model
from workbench.models.thoughts import ThoughtReader, answer_of
from workbench.models.tokens import template_text, token_ids

REFUSAL = "I'm sorry, but I can't help with that."
LONG = "Let me see what they want and why they want it. " * 12


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    made = {}
    for name, template in (("switch", SWITCH), ("opened", OPENED), ("effort", EFFORT)):
        model = load_model(thinking_model(tmp_path_factory.mktemp(name), template), device="cpu")
        made[name] = (model, ThoughtReader.of(model, template_text(model)[1]))
    return made


ANALYSIS = "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.f<|message|>{}<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("name", "written", "thinking", "text", "is_open"),
    [
        ("switch", "An answer.", "", "An answer.", False),
        ("switch", "<think>\nThey ask.\n</think>\n\nAn answer.", "They ask.", "An answer.", False),
        ("switch", "<think>\nThey ask", "They ask", "", True),
        ("switch", "They ask.\n</think>\n\nAn answer.", "They ask.", "An answer.", False),
        ("switch", "One <think>a</think> two.", "a", "One  two.", False),
        ("switch", "<think>a</think> <think>b</think> c", "a\nb", "c", False),
        ("opened", "They ask.\n</think>\n\nAn answer.", "They ask.", "An answer.", False),
        ("opened", "<think>They ask.</think>An answer.", "They ask.", "An answer.", False),
        ("opened", "They ask", "They ask", "", True),
        ("opened", "", "", "", True),
        ("effort", ANALYSIS + "<|channel|>final<|message|>Yes.", "They ask.", "Yes.", False),
        ("effort", "<|channel|>final<|message|>Yes.", "", "Yes.", False),
        ("effort", ANALYSIS, "They ask.", "", True),
        ("effort", ANALYSIS + CALL + "<|channel|>final<|message|>Yes.", "They ask.\n{}", "Yes.", 0),
        ("effort", "Yes.", "", "Yes.", False),
    ],
)
def test_thoughts_and_answer_are_split(readers, name, written, thinking, text, is_open) -> None:
    model, reader = readers[name]
    ids = token_ids(model, written)
    split = reader.split(ids)
    assert (split.thinking, split.text, split.is_open) == (thinking, text, is_open)
    assert len(split.is_answer) == len(ids)
    of_answer = [i for i, is_answer in zip(ids, split.is_answer, strict=True) if is_answer]
    assert model.tokenizer.decode(of_answer, skip_special_tokens=True).strip() == text.strip()


def test_a_model_without_marks_has_no_thoughts(tiny) -> None:
    reader = ThoughtReader.of(tiny, template_text(tiny)[1])
    ids = token_ids(tiny, "<think>a</think> b")
    assert reader.marks is None
    assert reader.split(ids).text == "<think>a</think> b"


def test_marks_that_only_the_template_spells_are_known(tiny, monkeypatch) -> None:
    template = tiny.tokenizer.chat_template + "{% if false %}[THINK][/THINK]{% endif %}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    reader = ThoughtReader.of(tiny, template_text(tiny)[1])
    split = reader.split(token_ids(tiny, "[THINK]They ask.[/THINK]An answer."))
    assert (split.thinking, split.text) == ("They ask.", "An answer.")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("An answer.", "An answer."),
        ("  An answer.", "  An answer."),
        (f"<think>\n{LONG}\n</think>\n\n{REFUSAL}", REFUSAL),
        (f"{LONG}\n</think>\n\n{REFUSAL}", REFUSAL),
        (f"[THINK]{LONG}[/THINK]{REFUSAL}", REFUSAL),
        (ANALYSIS + "<|channel|>final<|message|>Yes.", "Yes."),
        ("<think>They ask", ""),
        ("Write <think> first and </think> last.", "Write <think> first and </think> last."),
    ],
)
def test_texts_from_elsewhere_lose_the_thoughts_in_front(text, answer) -> None:
    assert answer_of(text) == answer
    assert without_thoughts(["q"], [text]) == [answer]


def test_refusals_are_read_behind_the_thoughts() -> None:
    texts = [f"<think>\n{LONG}\n</think>\n\n{REFUSAL}", f"<think>{REFUSAL}</think>Gladly.", LONG]
    texts += ["<think>" + REFUSAL, ""]
    labels = [verdict.label for verdict in RefusalPatterns()(["q"] * len(texts), texts)]
    assert labels == ["refusal", "not_refusal", "not_refusal", "unscored", "degenerate"]
