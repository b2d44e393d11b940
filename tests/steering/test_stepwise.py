"""A stepwise gate's threshold is set on whole answers: on every look it takes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.gates import READ, STEERED, gate, vector
from helpers.tiny_models import sentences

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.errors import CannotBeDone
from workbench.models.tokens import encode
from workbench.prompts.prompt import Prompt
from workbench.stats.selectivity import Threshold, conformal_threshold
from workbench.steering.apply import intervene
from workbench.steering.interventions import gated, suppress
from workbench.steering.stepwise import calibrate_over_answers, highest_scores

N, LENGTH = 24, 12


@pytest.fixture(scope="module")
def answered(tiny):
    """Harmless prompts with the model's own answers to them."""
    prompts = [
        Prompt(f"n{i}", text, None, "harmless", "neutral", "test")
        for i, text in enumerate(sentences(N, seed=9))
    ]
    answers = generate(tiny, prompts, decoding=Decoding(max_new_tokens=LENGTH))
    return [dataclasses.replace(a.prompt, response=a.text) for a in answers if a.text.strip()]


def stepwise(model, threshold=None):
    return gate(model, threshold, form="stepwise", memory=0.6)


def opened_at_all(model, a_gate, prompt):
    """Decode an answer's tokens one by one behind a gate, and see whether it was ever open."""
    steering = gated(
        {c: [suppress(vector(model, i, c), 1e-9)] for i, c in enumerate(a_gate.categories)}, a_gate
    )
    [row] = encode(model, [prompt], with_response=True)
    begin = row.response[0]
    content = torch.zeros(1, begin, dtype=torch.bool)
    content[:, slice(*row.content)] = True
    ids, cache, is_open = torch.tensor([row.ids]), None, False
    with (
        torch.no_grad(),
        intervene(model, steering, prompt_length=begin, content=content) as state,
    ):
        for first, last in [(0, begin), *((i, i + 1) for i in range(begin, len(row.ids)))]:
            _, cache = model(
                ids[:, first:last],
                attention_mask=torch.ones(1, last, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
                return_type="logits_and_cache",
            )
            is_open |= bool((state.gates[a_gate].opening > 0).any())
    return is_open


def test_the_highest_score_is_the_one_at_which_decoding_would_open_the_gate(tiny, answered):
    a_gate = stepwise(tiny)
    highest = highest_scores(tiny, a_gate, answered)
    one_look = a_gate.scores(cache_activations(tiny, answered, READ)[READ].values).amax(dim=1)
    assert (highest >= one_look.numpy() - 1e-5).all()
    assert (highest > one_look.numpy() + 0.1).any(), "later looks score higher somewhere"
    for slack, expected in ((-1e-3, True), (1e-3, False)):
        for prompt, score in zip(answered[:6], highest[:6], strict=True):
            threshold = Threshold(float(score) + slack, 0.1, 0.0, 1.0, 3)
            assert opened_at_all(tiny, stepwise(tiny, threshold), prompt) == expected


def test_whole_answers_keep_the_rate_that_one_look_breaks(tiny, answered):
    a_gate, rate = stepwise(tiny), 0.25
    highest = highest_scores(tiny, a_gate, answered)
    calibrated = calibrate_over_answers(tiny, a_gate, answered, neutral_rate=rate)
    assert calibrated.thresholds == {"neutral": conformal_threshold(highest, rate)}
    assert (highest > calibrated.threshold).mean() <= rate
    one_look = a_gate.scores(cache_activations(tiny, answered, READ)[READ].values).amax(dim=1)
    promised = conformal_threshold(one_look.tolist(), rate).value
    assert (highest > promised).mean() > rate
    assert np.isfinite(calibrated.threshold)
    assert (calibrated.form, calibrated.site) == ("stepwise", READ)
    assert READ.layer < STEERED.layer


def test_what_cannot_be_calibrated_is_refused(tiny, answered):
    with pytest.raises(ValueError, match="form 'hard' looks at the prompt alone"):
        calibrate_over_answers(tiny, gate(tiny), answered)
    with pytest.raises(ValueError, match="has no response"):
        calibrate_over_answers(
            tiny, stepwise(tiny), [dataclasses.replace(answered[0], response=None)]
        )
    risky = [dataclasses.replace(answered[0], label="unsafe")]
    with pytest.raises(CannotBeDone, match="no safe or neutral prompts"):
        calibrate_over_answers(tiny, stepwise(tiny), risky)
