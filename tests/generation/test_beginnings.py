"""Prompts of two beginnings, such as two system prompts: each is computed once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.gates import gate, half_open, through
from helpers.tiny_models import sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.generation import _beginnings
from workbench.generation._beginnings import parts_by_beginning
from workbench.generation.answers import generate, sweep
from workbench.generation.decoding import Decoding
from workbench.models.forward import plain, shared_prefix_length
from workbench.models.sites import Site
from workbench.models.tokens import Encoded, encode
from workbench.prompts.prompt import Message, Prompt
from workbench.steering.interventions import AddVector, Intervention

LONG = " ".join(sentences(6, seed=9))
OTHER = "Be brief. " + " ".join(sentences(5, seed=8))
DECODING = Decoding(max_new_tokens=5)


def questions(n: int, systems=(LONG, OTHER)) -> list[Prompt]:
    """Make prompts that stand behind several system prompts in turn."""
    return [
        Prompt(
            f"q{i}",
            text,
            None,
            "fraud",
            "safe",
            "t",
            history=(Message("system", systems[i % len(systems)]),),
        )
        for i, text in enumerate(sentences(n, seed=2))
    ]


@pytest.fixture
def long_ones_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make these system prompts long enough for a part each, and what a few questions share not."""
    monkeypatch.setattr(_beginnings, "TOKENS_PER_STEP", 4)


def passes(model, prompts, conditions, decoding=DECODING, **keywords):
    """Answer; return the answers and the rows and columns of every pass over several columns."""
    shapes: list[tuple[int, int]] = []

    def note(activation, hook):
        if activation.shape[1] > 1:
            shapes.append(tuple(activation.shape[:2]))

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", note)]):
        answers = sweep(model, prompts, conditions, decoding, **keywords)
    return answers, shapes


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2"])
def test_answers_behind_two_system_prompts_are_those_of_each_prompt_alone(
    family, family_model, long_ones_are_worth_it
):
    model = family_model(family)
    if family == "gemma2":  # its template has no system turn: examples in turns before
        turns = [(Message("user", text), Message("assistant", "No.")) for text in (LONG, OTHER)]
        prompts = [replace(prompt, history=turns[i % 2]) for i, prompt in enumerate(questions(8))]
    else:
        prompts = questions(8)
    vector = 3 * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    steered = [Intervention(Site(1, "resid_post"), AddVector(vector))]
    conditions = {"plain": [], "steered": steered}
    together = sweep(model, prompts, conditions, DECODING)
    alone = [
        generate(model, [prompt], what, DECODING)[0]
        for what in conditions.values()
        for prompt in prompts
    ]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_each_of_two_system_prompts_is_read_once_per_condition(tiny, long_ones_are_worth_it):
    prompts = questions(8)
    ids = [row.ids for row in encode(tiny, prompts)]
    _, shapes = passes(tiny, prompts, {"a": []})
    beginnings = [
        shared_prefix_length(encode(tiny, prompts[first::2]), lambda row: len(row.ids) - 1)
        for first in (0, 1)
    ]
    assert sorted(width for rows, width in shapes if rows == 1) == sorted(beginnings)
    longest_rests = [max(len(row) for row in ids[first::2]) - beginnings[first] for first in (0, 1)]
    assert sorted(width for rows, width in shapes if rows == 4) == sorted(longest_rests)


def test_short_or_rare_beginnings_are_not_worth_a_part(tiny):
    short = questions(8, systems=("Be brief.", "Say it in verse."))
    for prompts in (short, questions(2)):
        _, shapes = passes(tiny, prompts, {"a": []})
        assert [rows for rows, _ in shapes] == [1, len(prompts)]  # one prefix, one batch
    _, shapes = passes(tiny, questions(8), {"a": []})
    assert [rows for rows, _ in shapes] == [1, 4, 1, 4]  # long ones of four prompts each are
    with plain(tiny):
        _, shapes = passes(tiny, questions(8), {"a": []})
    assert [rows for rows, _ in shapes] == [8]


def test_gates_see_the_users_words_behind_each_beginning(tiny, long_ones_are_worth_it):
    prompts = questions(8)
    behind, opened = half_open(tiny, prompts)
    assert 0 < int(opened.sum()) < 8
    steered = through(tiny, behind)
    together = generate(tiny, prompts, steered, DECODING)
    alone = [generate(tiny, [prompt], steered, DECODING)[0] for prompt in prompts]
    unsteered = generate(tiny, prompts, (), DECODING)
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    changed = [a.tokens != b.tokens for a, b in zip(together, unsteered, strict=True)]
    assert any(changed)
    assert not any(c for c, is_open in zip(changed, opened.tolist(), strict=True) if not is_open)
    assert gate(tiny).site.layer < 1


def test_an_interrupted_call_goes_on_among_the_parts(tiny, tmp_path, long_ones_are_worth_it):
    prompts, output = questions(12), tmp_path / "out.jsonl"
    decoding = Decoding(max_new_tokens=5, batch_size=4)
    whole, shapes = passes(tiny, prompts, {"a": []}, decoding)
    n_batches = sum(rows == 4 for rows, _ in shapes)
    left = 9

    def stop(activation, hook):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with (
        tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", stop)]),
        pytest.raises(KeyboardInterrupt),
    ):
        sweep(tiny, prompts, {"a": []}, decoding, output=output)
    answered = output.read_text().splitlines()
    assert len(answered) == 4
    resumed, shapes = passes(tiny, prompts, {"a": []}, decoding, output=output)
    assert resumed == whole
    assert sum(rows == 4 for rows, _ in shapes) == n_batches - 1
    keys = [json.loads(line)["key"] for line in output.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 12


def row_of(ids: tuple[int, ...]) -> Encoded:
    prompt = Prompt("p", "x", None, "c", "safe", "s")
    n = len(ids)
    return Encoded(prompt, ids, (0, n), (n, n))


@settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=50
)
@given(
    beginnings=st.lists(
        st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(1, 4)), max_size=6
    ),
    n_copies=st.integers(1, 3),
)
def test_parts_hold_every_row_once_and_never_read_more_tokens(beginnings, n_copies):
    rows = [row_of((*ids, 9, i)) for ids, n in beginnings for i in range(n)]
    if not rows:
        return

    def keep(row):
        return len(row.ids) - 1

    def read(places):
        part = [rows[place] for place in places]
        shared = shared_prefix_length(part, keep)
        copies = min(n_copies, len(part))
        return shared * copies + sum(len(row.ids) - shared for row in part)

    for n_steps in (0, 1):
        parts = parts_by_beginning(rows, keep, n_copies, n_steps)
        assert sorted(place for part in parts for place in part) == list(range(len(rows)))
        worth = _beginnings.TOKENS_PER_STEP * n_steps * (len(parts) - 1)
        assert sum(map(read, parts)) <= read(range(len(rows))) - worth
