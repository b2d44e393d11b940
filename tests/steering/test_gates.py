"""Steering gates: planted truths for their scores, and steering behind them, row by row.

Where a gate is closed nothing changes, bit for bit; batches do not matter.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.gates import ALWAYS, NEVER, READ, STEERED, gate, half_open, questions, through, vector
from helpers.tiny_models import D_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.generation.answers import UNSTEERED, sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import ActivationSet
from workbench.models.batches import pad, span_mask
from workbench.models.load import model_info
from workbench.models.tokens import encode, pad_id
from workbench.prompts.prompt import Prompt
from workbench.stats.selectivity import Threshold
from workbench.steering.apply import intervene
from workbench.steering.gates import combined, fit_gate, load_gate, save_gate
from workbench.steering.interventions import (
    RaiseTo,
    activate,
    add_vector,
    gated,
    raise_to,
    suppress,
)


def test_a_closed_gate_leaves_logits_and_tokens_bit_for_bit(tiny):
    rows = encode(tiny, questions())
    batch = pad(rows, pad_id=pad_id(tiny), side="left")
    keywords = {"attention_mask": batch.mask.long()}
    plain = tiny(batch.tokens, **keywords)
    closed = through(tiny, gate(tiny, NEVER))
    with intervene(tiny, closed, content=span_mask(rows, batch, "content")):
        assert torch.equal(tiny(batch.tokens, **keywords), plain)
    answers = sweep(
        tiny, questions(), {UNSTEERED: (), "gated": closed}, decoding=Decoding(max_new_tokens=8)
    )
    assert [a.tokens for a in answers[:6]] == [a.tokens for a in answers[6:]]


@pytest.mark.parametrize("form", ["hard", "soft", "stepwise"])
def test_rows_whose_gate_is_closed_stay_and_the_others_are_steered(tiny, form):
    half_open_gate, expected = half_open(tiny, questions())
    half_open_gate = dataclasses.replace(half_open_gate, form=form)
    rows = encode(tiny, questions())
    batch = pad(rows, pad_id=pad_id(tiny), side="left")
    keywords = {"attention_mask": batch.mask.long()}
    plain = tiny(batch.tokens, **keywords)
    with intervene(
        tiny, through(tiny, half_open_gate), content=span_mask(rows, batch, "content")
    ) as steering:
        changed = (tiny(batch.tokens, **keywords) != plain).flatten(1).any(dim=1)
    assert changed.tolist() == expected.tolist()
    assert torch.equal((steering.gates[half_open_gate].opening > 0).any(dim=1), expected)


def test_an_open_gate_steers_like_no_gate_from_the_users_words_on(chatless):
    # This template-free model has nothing before the user's words but BOS, which padding-free rows
    # keep out with "generated".
    model = chatless
    prompts = questions(4)
    open_gate = dataclasses.replace(gate(model, ALWAYS), categories=("fraud",))
    open_gate = dataclasses.replace(
        open_gate, weights=open_gate.weights[:1], bias=open_gate.bias[:1]
    )
    plain = [add_vector(vector(model), rho=0.4, positions="generated")]
    answers = sweep(
        model,
        prompts,
        {"always": plain, "gated": gated({"fraud": plain}, open_gate)},
        decoding=Decoding(max_new_tokens=8),
    )
    assert [a.tokens for a in answers[:4]] == [a.tokens for a in answers[4:]]


def test_answers_behind_a_gate_are_the_same_in_any_batch(tiny):
    half_open_gate, _ = half_open(tiny, questions())
    conditions = {UNSTEERED: (), "gated": through(tiny, half_open_gate)}
    together = sweep(tiny, questions(), conditions, decoding=Decoding(max_new_tokens=8))
    alone = sweep(tiny, questions(), conditions, decoding=Decoding(max_new_tokens=8, batch_size=1))
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    differ = [a.tokens != b.tokens for a, b in zip(together[:6], together[6:], strict=True)]
    assert any(differ)
    assert not all(differ)


def test_a_stepwise_gate_closes_below_its_hysteresis_and_a_hard_one_keeps_its_mind(tiny):
    stepwise = gate(tiny, Threshold(1.0, 0.02, 0.0, 0.1, 50), form="stepwise", hysteresis=0.5)
    opened = stepwise.opening(torch.tensor([[1.2, 0.0]]))
    assert opened.tolist() == [[1.0, 0.0]]
    assert stepwise.opening(torch.tensor([[0.6, 0.0]]), opened).tolist() == [[1.0, 0.0]]
    assert stepwise.opening(torch.tensor([[0.4, 0.0]]), opened).tolist() == [[0.0, 0.0]]
    assert stepwise.opening(torch.tensor([[0.6, 0.0]])).tolist() == [[0.0, 0.0]]
    hard = dataclasses.replace(stepwise, form="hard")
    assert hard.opening(torch.tensor([[0.6, 0.0]]), opened).tolist() == [[0.0, 0.0]]


def test_a_soft_gate_opens_in_proportion(tiny):
    soft = gate(tiny, Threshold(1.0, 0.02, 0.0, 0.1, 50), form="soft", scale=2.0)
    assert soft.opening(torch.tensor([[0.9, 0.0], [2.0, 0.0], [9.0, 0.0]]))[:, 0].tolist() == [
        0.0,
        0.5,
        1.0,
    ]


def test_a_gate_needs_to_have_seen_the_prompt(tiny):
    rows = encode(tiny, questions(1))
    tokens = torch.tensor([rows[0].ids])
    with (
        pytest.raises(ValueError, match=r"say which columns"),
        intervene(tiny, through(tiny, gate(tiny, ALWAYS))),
    ):
        tiny(tokens)
    last = dataclasses.replace(gate(tiny, ALWAYS), span="last")
    with intervene(tiny, through(tiny, last)) as steering:
        tiny(tokens)
    assert steering.gates[last].opening.sum() == 1


def test_a_gate_that_reads_above_what_it_steers_is_refused(tiny):
    with pytest.raises(ValueError, match=r"not below"):
        sweep(
            tiny,
            questions(1),
            {"gated": through(tiny, dataclasses.replace(gate(tiny), site=STEERED))},
        )


def test_a_gate_of_another_model_is_refused(tiny):
    other = dataclasses.replace(model_info(tiny), fingerprint="0" * 16)
    with pytest.raises(ValueError, match=r"fit it again"):
        sweep(
            tiny,
            questions(1),
            {"gated": through(tiny, dataclasses.replace(gate(tiny), model=other))},
        )


def test_categories_that_a_gate_does_not_know_are_refused(tiny):
    with pytest.raises(ValueError, match=r"Did you mean 'fraud'"):
        gated({"frauds": [suppress(vector(tiny), 0.2)]}, gate(tiny))


def acts(values, prompts, model):
    return ActivationSet(READ, values, tuple(prompts), "content", model_info(model))


def planted(model, n, fold, seed):
    """Plant two risk categories, each told from safe prompts by one dimension."""
    generator = torch.Generator().manual_seed(seed)
    prompts, rows = [], []
    for label, category, place in (
        ("unsafe", "fraud", 0),
        ("unsafe", "malware", 1),
        ("safe", "fraud", None),
        ("neutral", "harmless", None),
    ):
        for i in range(n):
            row = torch.randn(D_MODEL, generator=generator)
            if place is not None:
                row[place] += 8.0
            rows.append(row)
            prompts.append(
                Prompt(f"{fold}-{category}-{label}-{i}", "text", None, category, label, "test")
            )
    return acts(torch.stack(rows), prompts, model)


def test_a_planted_category_is_found_and_the_threshold_keeps_its_rate(tiny):
    fitted = fit_gate(planted(tiny, 60, "fit", 0), planted(tiny, 100, "tune", 1), penalty=1.0)
    new = planted(tiny, 100, "test", 2)
    opening = fitted.opening(fitted.scores(new.values))
    label = [(p.label, p.category) for p in new.prompts]
    for place, category in enumerate(fitted.categories):
        mine = torch.tensor([pair == ("unsafe", category) for pair in label])
        assert opening[mine, place].mean() > 0.95
    safe = torch.tensor([pair[0] != "unsafe" for pair in label])
    assert (opening[safe] > 0).any(dim=1).float().mean() < 0.06
    assert set(fitted.thresholds) == {"neutral", "hard_safe"}


def test_one_category_alone_makes_a_gate_too(tiny):
    def one(acts_):
        return acts_.of(
            [p for p in acts_.prompts if (p.label, p.category) != ("unsafe", "malware")]
        )

    fitted = fit_gate(
        one(planted(tiny, 60, "fit", 0)), one(planted(tiny, 100, "tune", 1)), penalty=1.0
    )
    scores = fitted.scores(planted(tiny, 50, "test", 2).values)[:, 0]
    assert scores[:50].min() > scores[100:].max() - 3
    assert (fitted.opening(scores[:50, None]) > 0).float().mean() > 0.95


def test_too_few_prompts_for_the_rate_leave_the_gate_closed(tiny):
    fitted = fit_gate(planted(tiny, 20, "fit", 0), planted(tiny, 5, "tune", 1), neutral_rate=0.01)
    assert fitted.threshold == math.inf
    assert not fitted.opening(fitted.scores(planted(tiny, 5, "test", 2).values)).any()


def test_folds_that_share_prompts_are_refused(tiny):
    fold = planted(tiny, 10, "fit", 0)
    with pytest.raises(ValueError, match=r"is in both folds"):
        fit_gate(fold, fold)


def test_a_saved_gate_comes_back_the_same(tiny, tmp_path):
    fitted = fit_gate(
        planted(tiny, 20, "fit", 0), planted(tiny, 5, "tune", 1), neutral_rate=0.01, form="soft"
    )
    save_gate(tmp_path / "gate.safetensors", fitted)
    back = load_gate(tmp_path / "gate.safetensors")
    assert back.key == fitted.key
    assert (back.categories, back.thresholds, back.model) == (
        fitted.categories,
        fitted.thresholds,
        fitted.model,
    )
    (tmp_path / "gate.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"damaged"):
        load_gate(tmp_path / "gate.safetensors")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_whitened_vectors_move_along_each_by_its_own_length_or_stay_below_the_longest(seed, n_open):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, 4, 16, generator=generator, dtype=torch.float64)
    opening = torch.zeros(1, 4, dtype=torch.float64)
    opening[0, :n_open] = 1.0
    total = combined(opening, vectors, "whitened")[0]
    lengths = vectors[0, :n_open].norm(dim=1)
    assert total.norm() <= lengths.max() * (1 + 1e-6)
    along = vectors[0, :n_open] @ total / lengths**2
    assert torch.allclose(along, along[:1].expand(n_open), atol=5e-3)
    assert along.max() <= 1 + 1e-3


def test_two_equal_vectors_add_up_to_one_of_them():
    one = torch.randn(1, 1, 8, dtype=torch.float64)
    both = torch.cat([one, one], dim=1)
    total = combined(torch.ones(1, 2, dtype=torch.float64), both, "whitened")
    assert torch.allclose(total, one[:, 0], atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(-5, 5))
def test_raising_to_a_target_reaches_it_and_never_overshoots(seed, target):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(8, generator=generator, dtype=torch.float64)
    u = u / u.norm()
    before = 4 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    edit = RaiseTo(u, target)
    after = edit(before)
    assert torch.allclose(after @ u, torch.clamp(before @ u, min=target))
    assert torch.allclose(edit(after), after)


def test_raising_to_a_target_works_behind_a_gate(tiny):
    half_open_gate, expected = half_open(tiny, questions())
    steering = {c: [raise_to(vector(tiny, i, c), 50.0)] for i, c in enumerate(("fraud", "malware"))}
    answers = sweep(
        tiny,
        questions(),
        {UNSTEERED: (), "gated": gated(steering, half_open_gate)},
        decoding=Decoding(max_new_tokens=6),
    )
    same = [a.tokens == b.tokens for a, b in zip(answers[:6], answers[6:], strict=True)]
    assert all(
        is_same for is_same, is_open in zip(same, expected.tolist(), strict=True) if not is_open
    )
    assert not all(same)


def test_suppress_and_activate_are_opposites(tiny):
    down, up = suppress(vector(tiny), 0.2), activate(vector(tiny), 0.2)
    assert down.edit.multiplier == -up.edit.multiplier > 0
    with pytest.raises(ValueError, match=r"above 0"):
        activate(vector(tiny), -0.2)
