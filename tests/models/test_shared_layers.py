"""Layers below all steering run once per prompt: answers are those of conditions alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.gates import ALWAYS, gate, through
from helpers.tiny_models import sentences

from workbench.generation import _decode_loop as decoding
from workbench.generation.answers import generate, sweep
from workbench.generation.decoding import Decoding
from workbench.models.forward import forward, plain, prefix_cache, rows_of_cache
from workbench.models.shared_layers import run_below
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import AddVector, Intervention

FAMILIES = ["llama2", "llama3", "qwen3", "olmo2"]


def questions(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", text, None, "c", "safe", "s") for i, text in enumerate(sentences(n))]


def turned(layer: int, by: int) -> list[Intervention]:
    return [
        Intervention(Site(layer, "resid_post"), lambda activation: activation.roll(by, dims=-1))
    ]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every batch had computed below, or None."""
    seen: list[Any] = []

    def spy(*args: Any) -> Any:
        seen.append(run_below(*args))
        return seen[-1]

    monkeypatch.setattr(decoding, "run_below", spy)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_that_shares_layers_answers_like_every_condition_alone(
    family_model, family: str, shared
) -> None:
    model, prompts = family_model(family), questions(5)
    conditions = {"unsteered": [], **{f"by {n}": turned(1 + n % 2, n) for n in range(1, 5)}}
    together = sweep(model, prompts, conditions, decoding=Decoding(max_new_tokens=8))
    assert [one.layer for one in shared] == [1]
    assert (
        len(shared[0].output[0] if isinstance(shared[0].output, tuple) else shared[0].output) == 5
    )
    shared.clear()
    alone = [
        c
        for name, own in conditions.items()
        for c in generate(model, prompts, own, condition=name, decoding=Decoding(max_new_tokens=8))
    ]
    assert shared == [None] * 5
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert len({c.tokens for c in together}) > 5


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gpt2"])
def test_the_cache_is_that_of_a_whole_pass(family_model, family: str) -> None:
    model = family_model(family)
    prefix = prefix_cache(model, [9, 40, 41])
    tokens = torch.tensor([[60, 7, 88], [12, 33, 34]]).repeat(2, 1)
    mask = torch.ones(4, 6, dtype=torch.bool)
    expected_logits, expected = forward(
        model,
        tokens,
        mask,
        cache=rows_of_cache(prefix, torch.zeros(4, dtype=torch.long)),
        use_cache=True,
    )
    cache = rows_of_cache(prefix, torch.zeros(4, dtype=torch.long))
    below = run_below(model, 2, tokens, mask, cache, ["a", "b"] * 2)
    assert below is not None
    with below.known(model, cache):
        logits, cache = forward(model, tokens, mask, cache=cache, use_cache=True)
    torch.testing.assert_close(logits, expected_logits)
    for one, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)


def test_a_gate_that_reads_below_bounds_what_is_shared(tiny, shared) -> None:
    for read, expected in ((Site(0, "resid_post"), [None]), (Site(1, "resid_pre"), [1])):
        gated = through(tiny, gate(tiny, ALWAYS, site=read))
        assert gated[0].site == Site(1, "resid_post")
        sweep(
            tiny,
            questions(4),
            {"unsteered": [], "gated": gated},
            decoding=Decoding(max_new_tokens=3),
        )
        assert [one and one.layer for one in shared] == expected
        shared.clear()


def test_nothing_is_shared_where_it_would_not_be_the_same(tiny, shared) -> None:
    conditions = {f"by {n}": turned(2, n) for n in range(3)}
    with plain(tiny):
        sweep(tiny, questions(4), conditions, decoding=Decoding(max_new_tokens=3))
    calls = []
    with tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda a, hook: calls.append(len(a)))]):
        sweep(tiny, questions(4), conditions, decoding=Decoding(max_new_tokens=3))
    sweep(
        tiny,
        questions(4),
        {"lowest": turned(0, 1), "other": turned(2, 1)},
        decoding=Decoding(max_new_tokens=3),
    )
    assert shared == [None] * 3
    assert 12 in calls


# Prefixes of groups


def test_conditions_that_do_the_same_share_one_group(tiny, monkeypatch) -> None:
    from workbench.generation import answers

    loops: list[Any] = []
    right = decoding.DecodeLoop.__init__

    def spy(self: Any, model: Any, groups: Any, *args: Any) -> None:
        loops.append(groups)
        right(self, model, groups, *args)

    monkeypatch.setattr(answers.DecodeLoop, "__init__", spy)
    prompts = questions(4)
    edit, other = AddVector(torch.ones(32)), AddVector(torch.ones(32))
    again = [Intervention(Site(1, "resid_post"), edit), Intervention(Site(1, "resid_post"), other)]
    conditions = {
        "unsteered": [],
        "nothing": {"p1": []},
        "one": {prompt.id: [again[0]] for prompt in prompts},
        "same": {prompt.id: [again[1]] for prompt in prompts},
        "later": [dataclasses.replace(again[0], positions="generated")],
        "untold": turned(1, 3),
        "untold again": turned(1, 3),
    }
    found = sweep(tiny, prompts, conditions, decoding=Decoding(max_new_tokens=4))
    assert len(loops[0]) == 5  # nothing, the vector, the vector later, and two that cannot be told
    monkeypatch.undo()
    for name, condition in conditions.items():
        alone = generate(
            tiny, prompts, condition, condition=name, decoding=Decoding(max_new_tokens=4)
        )
        assert [c.tokens for c in found if c.condition == name] == [c.tokens for c in alone]


def test_prefixes_that_take_more_than_half_of_the_memory_are_not_kept(tiny, monkeypatch) -> None:
    prompts, loops = questions(3), []
    right = decoding.DecodeLoop.share_prefix

    def spy(self: Any, *args: Any) -> None:
        right(self, *args)
        loops.append(self)

    monkeypatch.setattr(decoding.DecodeLoop, "share_prefix", spy)
    per_token = decoding.bytes_per_token(tiny)
    conditions = {f"by {n}": turned(1, n) for n in range(4)}
    sweep(tiny, prompts, conditions, decoding=Decoding(max_new_tokens=2))
    tokens = loops[0].n_prefix * len(loops[0].groups)
    assert len(loops[0].groups) == 5
    layers = loops[0].prefix.layers
    assert sum(x.keys.nbytes + x.values.nbytes for x in layers) == tokens * per_token > 0
    too_little = 2 * tokens * per_token - 1  # more than half of it
    monkeypatch.setattr(decoding, "memory_budget", lambda model: too_little)
    answers = sweep(tiny, prompts, conditions, decoding=Decoding(max_new_tokens=2, batch_size=8))
    assert (loops[1].n_prefix, loops[1].prefix) == (0, None)
    monkeypatch.undo()
    again = sweep(tiny, prompts, conditions, decoding=Decoding(max_new_tokens=2))
    assert [c.tokens for c in answers] == [c.tokens for c in again]
