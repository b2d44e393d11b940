"""Likelihood: log-probabilities of answers are those of Hugging Face's loss, in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny_models import sentences

from workbench.generation.answers import Completion, generate
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_log_probs
from workbench.judges.text_quality import perplexity_from_log_probs
from workbench.models.sites import Site
from workbench.models.tokens import encode
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene
from workbench.steering.interventions import AddVector, Intervention


def answers(n=9):
    """Make up answers of 0 to n - 1 tokens to prompts of mixed lengths."""
    texts = sentences(3 * n)
    generator = torch.Generator().manual_seed(0)
    completions = []
    for i in range(n):
        prompt = Prompt(
            f"p{i}", " ".join(texts[i : i + 1 + i % 4]), None, "fraud", "unsafe", "test"
        )
        tokens = torch.randint(10, 290, ((4 * i) % n,), generator=generator).tolist()
        completions.append(Completion(prompt, "some text", tuple(tokens), "length", "unsteered"))
    return completions


def hugging_face_loss(model, completion, system_prompt=None):
    """Return the mean cross-entropy of the answer's tokens from the model's own loss."""
    prompt = list(encode(model, [completion.prompt], system_prompt=system_prompt)[0].ids)
    ids = torch.tensor([prompt + list(completion.tokens)])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        return float(
            model.original_model(ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        )


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "gpt2", "pythia"])
def test_log_probs_are_hugging_faces_loss(family, family_model):
    model, completions = family_model(family), answers()
    scored = answer_log_probs(model, completions, batch_size=4)
    for completion, log_probs in zip(completions, scored, strict=True):
        assert log_probs.shape == (len(completion.tokens),)
        assert log_probs.dtype == torch.float32
        if completion.tokens:
            assert -float(log_probs.mean()) == pytest.approx(
                hugging_face_loss(model, completion), abs=2e-5
            )
            perplexity = perplexity_from_log_probs(log_probs)
            assert math.log(perplexity) == pytest.approx(
                hugging_face_loss(model, completion), abs=2e-5
            )
    assert perplexity_from_log_probs(scored[0]) is None  # no tokens


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batches_do_not_change_log_probs(family, family_model, batch_size):
    model, completions = family_model(family), answers()
    alone = [answer_log_probs(model, [completion])[0] for completion in completions]
    for one, other in zip(
        alone, answer_log_probs(model, completions, batch_size=batch_size), strict=True
    ):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)


def test_the_system_prompt_counts(tiny):
    completion = answers()[5]
    plain, kind = (
        answer_log_probs(tiny, [completion], system_prompt=s)[0] for s in (None, "Be kind.")
    )
    assert not torch.allclose(plain, kind)
    assert -float(kind.mean()) == pytest.approx(
        hugging_face_loss(tiny, completion, "Be kind."), abs=2e-5
    )


def test_greedy_answers_are_the_likeliest_tokens(tiny):
    """Each token of a greedy answer is at least as likely as any token put in its place."""
    completions = generate(
        tiny, [c.prompt for c in answers(4)], decoding=Decoding(max_new_tokens=6)
    )
    for completion, log_probs in zip(completions, answer_log_probs(tiny, completions), strict=True):
        assert (log_probs <= 1e-6).all()
        for token in (10, 50, 200):
            changed = (*completion.tokens[:-1], token)
            other = answer_log_probs(
                tiny, [Completion(completion.prompt, "", changed, "length", "unsteered")]
            )[0]
            assert other[-1] <= log_probs[-1] + 1e-5
            torch.testing.assert_close(other[:-1], log_probs[:-1], atol=1e-5, rtol=1e-5)


def test_the_steered_model_scores_its_own_answers(tiny):
    steering = [
        Intervention(
            Site(1, "resid_post"),
            AddVector(3 * torch.randn(32, generator=torch.Generator().manual_seed(1))),
        )
    ]
    completions = answers()
    plain = answer_log_probs(tiny, completions)
    with intervene(tiny, steering):
        steered = answer_log_probs(tiny, completions)
        for completion, log_probs in zip(completions, steered, strict=True):
            if completion.tokens:
                assert -float(log_probs.mean()) == pytest.approx(
                    hugging_face_loss(tiny, completion), abs=5e-5
                )
    assert not torch.allclose(torch.cat(plain), torch.cat(steered))


def test_nothing_to_score_is_nothing(tiny):
    empty = [completion for completion in answers() if not completion.tokens]
    assert [len(log_probs) for log_probs in answer_log_probs(tiny, empty)] == [0] * len(empty)
    assert answer_log_probs(tiny, []) == []


def test_no_gradient_is_kept(tiny):
    assert not any(log_probs.requires_grad for log_probs in answer_log_probs(tiny, answers()))
    assert torch.is_grad_enabled()
