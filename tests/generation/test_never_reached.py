"""Steering that reaches no position is an error, and a gate that stays closed is none."""

from __future__ import annotations

import pytest
import torch
from helpers.gates import NEVER, gate, questions, through, vector

from workbench.generation.answers import UNSTEERED, Completion, generate, sweep
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_kl, steered_log_probs
from workbench.models.tokens import stop_ids
from workbench.safesteer.saved_run import side_by_side
from workbench.steering.interventions import add_vector

ONE, FEW = Decoding(max_new_tokens=1), Decoding(max_new_tokens=4)


def steering(model, **extent):
    return [add_vector(vector(model), 3.0, **extent)]


@pytest.mark.parametrize(
    ("extent", "decoding"),
    [({"positions": "generated"}, ONE), ({"positions": "generated", "until": 0}, FEW)],
)
def test_positions_that_no_answer_has_are_refused_before_anything_runs(tiny, extent, decoding):
    unreached = steering(tiny, **extent)
    mixed = [*steering(tiny), *unreached]
    for interventions in (unreached, mixed):
        with pytest.raises(ValueError, match=r"would steer nothing at L1\.resid_post"):
            generate(tiny, questions(2), interventions, decoding)
        conditions = {UNSTEERED: (), "late": {"fraud": interventions}}
        with pytest.raises(ValueError, match="condition 'late' would steer nothing"):
            sweep(tiny, questions(2), conditions, decoding)
    with pytest.raises(ValueError, match="would steer nothing"):
        side_by_side(tiny, "How?", unreached, decoding)


def test_steering_of_generated_tokens_acts_from_the_second_token_on(tiny):
    prompts = questions(6)
    two = Decoding(max_new_tokens=6)
    plain = generate(tiny, prompts, (), two)
    steered = generate(tiny, prompts, steering(tiny, positions="generated"), two)
    assert [c.tokens[:1] for c in plain] == [c.tokens[:1] for c in steered]
    assert [c.tokens for c in plain] != [c.tokens for c in steered]


def test_answers_that_end_at_once_leave_nothing_to_steer(tiny, tmp_path, monkeypatch):
    """Every token ends an answer here, so none is read again."""
    import workbench.generation._decode_loop as loop

    monkeypatch.setattr(loop, "stop_ids", lambda model: frozenset(range(len(model.tokenizer))))
    late = steering(tiny, positions="generated")
    for _ in range(2):  # the second time the answers come from the file
        with pytest.raises(RuntimeError, match="'steered' steered nothing"):
            generate(tiny, questions(3), late, FEW, output=tmp_path / "a.jsonl")
    assert generate(tiny, questions(3), steering(tiny), FEW)
    assert stop_ids(tiny)


def test_a_gate_that_stays_closed_is_no_failure(tiny):
    closed = through(tiny, gate(tiny, NEVER))
    answers = sweep(tiny, questions(4), {UNSTEERED: (), "gated": closed}, FEW)
    assert [a.tokens for a in answers[:4]] == [a.tokens for a in answers[4:]]


def test_scores_of_answers_that_are_not_reached_are_refused(tiny):
    asked = questions(2)
    short = [Completion(p, "x", (20 + i,), "length", UNSTEERED) for i, p in enumerate(asked)]
    long = [Completion(p, "x", (20, 30, 40), "length", UNSTEERED) for p in asked]
    late = steering(tiny, positions="generated")
    with pytest.raises(ValueError, match=r"at L1\.resid_post reaches nothing in these answers"):
        steered_log_probs(tiny, short, [late] * 2)
    with pytest.raises(ValueError, match="reaches nothing"):
        answer_kl(tiny, short, {"late": [late] * 2})
    # One answer that is long enough will do, and what it scores is not the unsteered model's.
    both = steered_log_probs(tiny, [short[0], long[1]], [late] * 2)
    plain = steered_log_probs(tiny, [short[0], long[1]], [[], []])
    torch.testing.assert_close(both[0], plain[0])
    assert not torch.allclose(both[1][1:], plain[1][1:])
    assert steered_log_probs(tiny, short, [steering(tiny)] * 2)
