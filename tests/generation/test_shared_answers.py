"""Rows that ask for one and the same answer get the very same one, written once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.tiny_models import D_MODEL, sentences, tiny_model

from workbench.generation.answers import UNSTEERED, generate, sweep
from workbench.generation.decoding import Decoding
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import AddVector, Intervention

DECODING = Decoding(max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return load_model(tiny_model("qwen2", tmp_path_factory.mktemp("m")), dtype="bfloat16")


def questions():
    return [
        Prompt(f"p{i}", text, None, "fraud", "unsafe", "test")
        for i, text in enumerate(sentences(7, seed=3))
    ]


def shove(scale=4.0):
    vector = scale * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    return Intervention(Site(1, "resid_post"), AddVector(vector, 1.0))


def behind_a_gate(prompts):
    """Steer every other prompt, as a gate does that is closed for the rest."""
    return {p.id: [shove()] if i % 2 else [] for i, p in enumerate(prompts)}


def rows_read(model, run):
    """Count the prompts that are read while something runs; return its result, too."""
    seen = []
    hooks = [("blocks.3.hook_resid_post", lambda a, hook: seen.append(a.shape))]
    with model.hooks(fwd_hooks=hooks):
        result = run()
    return sum(shape[0] for shape in seen if shape[1] > 1), result


def test_answers_behind_a_closed_gate_are_those_of_the_unsteered_model_in_16_bit(half, tmp_path):
    prompts, output = questions(), tmp_path / "answers.jsonl"
    conditions = {UNSTEERED: (), "gated": behind_a_gate(prompts), "always": [shove()]}
    read, answers = rows_read(
        half, lambda: sweep(half, prompts, conditions, DECODING, output=output)
    )
    by_name = {(a.condition, a.prompt.id): a for a in answers}
    for i, prompt in enumerate(prompts):
        same_as = "always" if i % 2 else UNSTEERED
        one, other = by_name["gated", prompt.id], by_name[same_as, prompt.id]
        assert (one.tokens, one.text, one.log_probs) == (other.tokens, other.text, other.log_probs)
    assert len(answers) == 21
    # Fourteen different answers, and the prefix that all prompts share for two groups.
    assert read <= 14 + 2
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 21
    assert {(line["condition"], line["prompt_id"]) for line in lines} == set(by_name)


def test_a_later_call_takes_answers_from_the_file_for_rows_that_ask_for_the_same(half, tmp_path):
    prompts, output = questions(), tmp_path / "answers.jsonl"
    before = generate(half, prompts, decoding=DECODING, output=output)
    conditions = {UNSTEERED: (), "closed": {"fraud": []}}
    read, answers = rows_read(
        half, lambda: sweep(half, prompts, conditions, DECODING, output=output)
    )
    assert read == 0
    assert [a.tokens for a in answers[7:]] == [a.tokens for a in before]
    assert [json.loads(line)["condition"] for line in output.read_text().splitlines()[7:]] == [
        "closed"
    ] * 7


def test_samples_of_one_prompt_are_not_one_answer(half):
    decoding = Decoding(max_new_tokens=6, temperature=5.0, n_samples=3)
    answers = generate(half, questions()[:1], decoding=decoding)
    assert len({a.tokens for a in answers}) == 3


def test_edits_of_two_classes_with_one_name_are_two(tiny) -> None:
    def shift(factor: float) -> Any:
        @dataclass(frozen=True)
        class Shift:
            by: float

            def __call__(self, activation: torch.Tensor) -> torch.Tensor:
                return activation + factor * self.by * torch.linspace(-1, 1, activation.shape[-1])

        return Shift(3.0)

    def edit(factor: float) -> list[Intervention]:
        return [Intervention(Site(1, "resid_post"), shift(factor))]

    how = Decoding(max_new_tokens=6)
    up, down = sweep(tiny, ["the dog"], {"up": edit(1.0), "down": edit(-1.0)}, how)
    assert up.tokens != down.tokens
    assert down.tokens == generate(tiny, ["the dog"], edit(-1.0), how)[0].tokens


def test_an_edit_that_holds_tensors_in_a_list_is_told_from_others_by_itself(tiny, tmp_path) -> None:
    @dataclass(frozen=True)
    class Shifts:
        by: tuple[torch.Tensor, ...]

        def __call__(self, activation: torch.Tensor) -> torch.Tensor:
            return activation + sum(self.by)

    edit = [Intervention(Site(1, "resid_post"), Shifts((torch.ones(tiny.cfg.d_model),)))]
    how = Decoding(max_new_tokens=2)
    assert len(generate(tiny, ["the dog"], edit, how)) == 1
    with pytest.raises(ValueError, match="cannot be kept in a file"):
        generate(tiny, ["the dog"], edit, how, output=tmp_path / "answers.jsonl")
