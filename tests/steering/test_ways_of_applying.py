"""Ways to apply a vector: with a strength that falls, with the norm kept, up to a target."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.gates import ALWAYS, NEVER, STEERED, gate, half_open, questions, vector
from helpers.interventions import EXAMPLES, padded, run, steering_vector
from hypothesis import given
from hypothesis import strategies as st

from workbench.files.store import key_of, tensor_digest
from workbench.generation.answers import UNSTEERED, generate, sweep
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import steered_log_probs
from workbench.models.sites import Site
from workbench.models.tokens import encode
from workbench.steering.apply import intervene
from workbench.steering.edits import AddVector, moved
from workbench.steering.interventions import (
    Intervention,
    add_vector,
    decayed,
    description,
    gated,
    raise_to,
    suppress,
)

NEW, UNTIL = 7, 4
SHARES = {
    ("none", UNTIL): [1, 1, 1, 1, 0, 0],
    ("linear", UNTIL): [1, 3 / 4, 2 / 4, 1 / 4, 0, 0],
    ("sqrt", None): [1, 2**-0.5, 3**-0.5, 4**-0.5, 5**-0.5, 6**-0.5],
    ("sqrt", UNTIL): [1, 2**-0.5, 3**-0.5, 4**-0.5, 0, 0],
    ("altsteer", UNTIL): [
        1,
        1 - math.sqrt(1 / 4),
        1 - math.sqrt(2 / 4),
        1 - math.sqrt(3 / 4),
        0,
        0,
    ],
}
"""Decay and end to the share of strength at each generated token, written out by hand."""
WAYS = [
    {"decay": "linear", "until": UNTIL},
    {"decay": "sqrt"},
    {"keep_norm": True},
    {"decay": "altsteer", "until": UNTIL, "keep_norm": True},
]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# A strength that falls.


@pytest.mark.parametrize(("decay", "until"), SHARES)
def test_a_strength_falls_as_its_formula_says(decay, until):
    found = decayed(decay, until, torch.arange(6.0))
    torch.testing.assert_close(found, torch.tensor(SHARES[decay, until], dtype=torch.float32))


@pytest.mark.parametrize("decay", ["linear", "altsteer"])
@pytest.mark.parametrize("until", [None, 0])
def test_a_fall_to_zero_needs_the_tokens_over_which_it_falls(decay, until):
    with pytest.raises(ValueError, match=f"decay '{decay}' needs until=, .* got {until}"):
        add_vector(steering_vector_of(8), 1.0, decay=decay, until=until)
    with pytest.raises(ValueError, match="needs until="):
        decayed(decay, until, torch.arange(3.0))


def test_an_unknown_decay_is_refused():
    edit = AddVector(torch.ones(4))
    with pytest.raises(ValueError, match="unknown decay 'cosine'; allowed: none, linear, sqrt"):
        Intervention(Site(0, "resid_post"), edit, decay="cosine")


def steering_vector_of(width):
    """Make a vector of no model: only what is checked before one is needed."""
    from workbench.models.load import ModelInfo
    from workbench.steering.vectors import SteeringVector

    info = ModelInfo("made-up", None, 4, width, 48, 4, "float32", "raw", "0123456789abcdef")
    site = Site(1, "resid_post")
    return SteeringVector(
        site, "fraud", torch.ones(width), "prompt_contrast", "content", 1.0, 3, 3, 20.0, info
    )


def added_by_column(model, steering, decode):
    """Measure what was added at each column of each pass: readers stand before and behind."""
    before, after = [], []
    name = steering.site.hook_name

    def reader(seen):
        return lambda activation, hook: seen.append(activation.clone())

    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=[(name, reader(before))]),
        intervene(model, [steering]),
        model.hooks(fwd_hooks=[(name, reader(after))]),
    ):
        decode()
    return [b - a for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize(("decay", "until"), SHARES)
def test_every_column_gets_its_own_share_with_a_cache_and_without(
    tiny, decay, until, positions, cached
):
    """Left padding included. Without a cache earlier columns keep the share they had."""
    tokens, mask = padded([6, 3], "left")
    site = Site(1, "attn_out")
    vector_here = steering_vector(tiny, site)
    steering = add_vector(vector_here, 1.5, decay=decay, until=until, positions=positions)
    hugging_face = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    added = added_by_column(
        tiny,
        steering,
        lambda: tiny.original_model.generate(
            tokens, attention_mask=mask, pad_token_id=0, use_cache=cached, **hugging_face
        ),
    )
    assert len(added) == NEW
    whole = torch.cat(added, dim=1) if cached else added[-1]
    shares = torch.zeros(2, 6 + NEW - 1)
    if positions != "generated":
        shares[:, :6] = mask.float()
    if positions != "prompt":
        shares[:, 6:] = torch.tensor(SHARES[decay, until], dtype=torch.float32)
    expected = shares[..., None] * (1.5 * vector_here.vector)
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal((whole != 0).any(dim=-1), shares != 0)


def by_hand(model, prompt, edit, n_new):
    """Decode greedily one row at a time, the whole text at each step, with a hook of its own."""
    ids = torch.tensor([encode(model, [prompt])[0].ids])
    n_prompt, log_probs = ids.shape[1], []

    def hook(activation, hook):
        steps = [max(0, place - n_prompt) for place in range(activation.shape[1])]
        columns = [edit(activation[:, [i]], step) for i, step in enumerate(steps)]
        return torch.cat(columns, dim=1)

    with torch.no_grad(), model.hooks(fwd_hooks=[(STEERED.hook_name, hook)]):
        for _ in range(n_new):
            logits = model(ids)[:, -1]
            token = logits.argmax(dim=-1, keepdim=True)
            log_probs.append(float(logits.log_softmax(dim=-1)[0, token]))
            ids = torch.cat([ids, token], dim=1)
    return ids[0, n_prompt:].tolist(), log_probs


def edit_by_hand(way, addition):
    """Write out what a way of applying a vector does at one column."""

    def edit(activation, step):
        key = way.get("decay", "none"), way.get("until")
        share = SHARES[key][step] if key in SHARES else 1.0
        after = activation + share * addition
        if way.get("keep_norm"):
            lengths = [x.pow(2).sum(dim=-1, keepdim=True).sqrt() for x in (activation, after)]
            after = after * lengths[0] / lengths[1]
        return after

    return edit


@pytest.mark.parametrize("way", WAYS)
def test_answers_and_their_likelihood_are_those_of_a_loop_by_hand(tiny, way):
    """In a batch beside other conditions, by the decode loop and by teacher-forced scoring."""
    prompts, strength = questions(5), 0.7
    here = vector(tiny)
    steered = [add_vector(here, strength, **way)]
    decoding = Decoding(max_new_tokens=6, batch_size=8)
    conditions = {UNSTEERED: (), "plain": [add_vector(here, strength)], "steered": steered}
    answers = [a for a in sweep(tiny, prompts, conditions, decoding) if a.condition == "steered"]
    scored = steered_log_probs(tiny, answers, [steered] * len(answers), batch_size=3)
    plain = [a.tokens for a in generate(tiny, prompts, (), decoding)]
    assert [a.tokens for a in answers] != plain
    for prompt, answer, log_probs in zip(prompts, answers, scored, strict=True):
        edit = edit_by_hand(way, strength * here.vector)
        tokens, expected = by_hand(tiny, prompt, edit, len(answer.tokens))
        assert tokens == list(answer.tokens)
        torch.testing.assert_close(log_probs, torch.tensor(expected), atol=2e-4, rtol=1e-4)


def test_what_is_no_addition_goes_its_share_of_the_way(tiny):
    doubled = Intervention(
        Site(1, "resid_post"), lambda activation: 2 * activation, decay="linear", until=2
    )
    tokens, mask = padded([7], "left")
    _, plain = run(tiny, [], tokens, mask, [doubled.site])
    _, steered = run(tiny, [doubled], tokens, mask, [doubled.site], prompt_length=4)
    factors = torch.tensor([2.0, 2, 2, 2, 2, 1.5, 1])[None, :, None]
    expected = plain[doubled.site] * factors
    torch.testing.assert_close(steered[doubled.site], expected, atol=1e-5, rtol=1e-5)


# The norm kept.


@EXAMPLES
@given(scale=st.floats(1e-3, 1e3), strength=st.floats(-1e3, 1e3), seed=st.integers(0, 99))
def test_the_norm_is_kept_and_the_direction_is_that_of_the_sum(scale, strength, seed):
    activation, addition = scale * noise(2, 5, 32, seed=seed), noise(32, seed=seed + 1)
    edited = AddVector(addition, strength, keep_norm=True)(activation)
    ratio = edited.double().norm(dim=-1) / activation.double().norm(dim=-1)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-6, rtol=0)
    expected = activation.double() + strength * addition.double()
    cosine = torch.cosine_similarity(edited.double(), expected, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-5, rtol=0)


def test_nothing_added_is_nothing_changed_and_what_cancels_is_zero():
    activation = noise(3, 4, 16)
    assert torch.equal(AddVector(noise(16), 0.0, keep_norm=True)(activation), activation)
    cancelled = moved(activation, -activation, keep_norm=True)
    assert torch.equal(cancelled, torch.zeros_like(activation))


@pytest.mark.parametrize("order", [1, -1])
def test_each_of_several_additions_keeps_the_norm_by_itself(tiny, order):
    tokens, mask = padded([5, 4], "left")
    site = Site(1, "resid_post")
    edits = [add_vector(steering_vector(tiny, site, seed), 2.0, keep_norm=True) for seed in (0, 1)][
        ::order
    ]
    _, plain = run(tiny, [], tokens, mask, [site])
    _, steered = run(tiny, edits, tokens, mask, [site])
    expected = plain[site]
    for one in edits:
        after = expected + 2.0 * one.edit.vector
        expected = after * expected.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True)
    real = mask.bool()
    torch.testing.assert_close(steered[site][real], expected[real], atol=1e-5, rtol=1e-4)
    assert torch.equal(steered[site][~real], plain[site][~real])


def test_rows_that_keep_their_norm_are_the_rows_run_alone(tiny):
    """Rows have one or two vectors each, with and without the norm kept, in mixed order."""
    tokens, mask = padded([5, 5, 5, 5], "left")
    site = Site(1, "resid_post")

    def one(seed, **way):
        return add_vector(steering_vector(tiny, site, seed), 1.0 + seed, **way)

    kept = {"keep_norm": True}
    of_rows = [
        [one(0, **kept), one(1, **kept)],
        [one(2, **kept), one(3)],
        [],
        [one(1), one(0, **kept), one(2, decay="sqrt", **kept)],
    ]
    together = [each.for_rows([row]) for row, own in enumerate(of_rows) for each in own]
    _, found = run(tiny, together, tokens, mask, [site], prompt_length=2)
    for row, own in enumerate(of_rows):
        alone = tokens[[row]], mask[[row]]
        _, expected = run(tiny, own, *alone, [site], prompt_length=2)
        torch.testing.assert_close(found[site][[row]], expected[site], atol=2e-5, rtol=1e-4)
    _, plain = run(tiny, [], tokens, mask, [site])
    assert torch.equal(found[site][2], plain[site][2])


# Gates.


def behind(model, a_gate, **way):
    """Steer two categories behind a gate in some way."""
    categories = ("fraud", "malware")
    steering = {c: [suppress(vector(model, i, c), 0.4, **way)] for i, c in enumerate(categories)}
    return gated(steering, a_gate)


def to_a_target(model, a_gate, **extent):
    return gated({"fraud": [raise_to(vector(model), 500.0, **extent)]}, a_gate)


@pytest.mark.parametrize(
    ("make", "way"), [*((behind, way) for way in WAYS), (to_a_target, {"until": UNTIL})]
)
def test_a_closed_gate_leaves_answers_and_logits_bit_for_bit(tiny, make, way):
    tokens, mask = padded([6, 4], "left")
    content = mask.bool()
    plain, _ = run(tiny, [], tokens, mask)
    how = {"content": content, "prompt_length": 6}
    closed, _ = run(tiny, make(tiny, gate(tiny, NEVER), **way), tokens, mask, **how)
    opened, _ = run(tiny, make(tiny, gate(tiny, ALWAYS), **way), tokens, mask, **how)
    assert torch.equal(closed, plain)
    assert not torch.equal(opened, plain)
    prompts = questions(6)
    half, is_open = half_open(tiny, prompts)
    unsteered = generate(tiny, prompts, (), Decoding(max_new_tokens=6))
    steered = generate(tiny, prompts, make(tiny, half, **way), Decoding(max_new_tokens=6))
    for row, (one, other) in enumerate(zip(unsteered, steered, strict=True)):
        assert is_open[row] or one.tokens == other.tokens


@pytest.mark.parametrize("several", ["argmax", "whitened"])
def test_what_a_gate_lets_through_keeps_the_norm_too(tiny, several):
    tokens, mask = padded([6, 4], "left")
    steering = behind(tiny, gate(tiny, ALWAYS, several=several), keep_norm=True)
    how = {"content": mask.bool(), "prompt_length": 6}
    _, plain = run(tiny, [], tokens, mask, [STEERED])
    _, found = run(tiny, steering, tokens, mask, [STEERED], **how)
    real = mask.bool()
    before, after = (x[STEERED][real] for x in (plain, found))
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), atol=0, rtol=1e-6)
    plainly = behind(tiny, gate(tiny, ALWAYS, several=several))
    _, added = run(tiny, plainly, tokens, mask, [STEERED], **how)
    cosine = torch.cosine_similarity(after, added[STEERED][real], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-5, rtol=0)


# Up to a target.


@EXAMPLES
@given(target=st.floats(-30, 30), until=st.sampled_from([None, 0, 1, 3]))
def test_a_target_is_reached_not_overshot_and_ends_where_it_says(tiny, target, until):
    tokens, mask = padded([7], "left")
    here = steering_vector(tiny, Site(1, "resid_post"))
    steering = [raise_to(here, target, until=until)]
    _, plain = run(tiny, [], tokens, mask, [here.site])
    _, found = run(tiny, steering, tokens, mask, [here.site], prompt_length=4)
    n_steered = 7 if until is None else min(7, 4 + until)
    before, after = (x[here.site][0] @ here.direction for x in (plain, found))
    expected = before[:n_steered].clamp(min=target)
    torch.testing.assert_close(after[:n_steered], expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found[here.site][0, n_steered:], plain[here.site][0, n_steered:])


@pytest.mark.parametrize("target", [math.nan, math.inf, "high"])
def test_a_target_that_is_no_finite_number_is_refused(target):
    with pytest.raises(ValueError, match="target must be a finite number"):
        raise_to(steering_vector_of(8), target)


# Keys of kept answers.


def test_keys_of_plain_additions_are_what_they_were_and_ways_have_keys_of_their_own():
    here = steering_vector_of(8)
    digest = {"vector": tensor_digest(here.vector), "multiplier": 0.5}
    label = "+0.5 fraud"
    plain, ended = add_vector(here, 0.5), add_vector(here, 0.5, until=3)
    assert description(plain) == ["L1.resid_post", "AddVector", digest, "all", label]
    assert description(ended) == ["L1.resid_post", "AddVector", digest, ["all", 3], label]
    target = raise_to(here, 2.0)
    what = {"direction": tensor_digest(here.direction), "target": 2.0}
    assert description(target) == ["L1.resid_post", "RaiseTo", what, "all", "to 2 fraud"]
    different = [
        *(plain, ended, target, raise_to(here, 2.0, until=3)),
        *(add_vector(here, 0.5, **way) for way in WAYS),
        *(add_vector(here, 0.5, decay=decay, until=3) for decay in ("linear", "sqrt", "altsteer")),
    ]
    assert len({key_of(description(one)) for one in different}) == len(different)


def test_answers_are_kept_apart_by_the_way_and_found_again(tiny, tmp_path):
    prompts, output = questions(3), tmp_path / "answers.jsonl"
    ways = [{}, *WAYS]
    for n_known in (0, len(ways)):
        for i, way in enumerate(ways):
            steering = [add_vector(vector(tiny), 1.0, **way)]
            generate(tiny, prompts, steering, Decoding(max_new_tokens=3), output=output)
            n_answered = len(output.read_text().splitlines())
            assert n_answered == len(prompts) * max(n_known, i + 1)
