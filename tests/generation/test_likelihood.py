"""Likelihood: log-probabilities of answers are those of Hugging Face's loss, in any batch."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from helpers.tiny_models import sentences

from workbench.generation import _logits
from workbench.generation.answers import Completion, generate, sweep
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_kl, answer_log_probs, steered_log_probs
from workbench.judges.text_quality import perplexity_from_log_probs
from workbench.models import forward
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


# Stepwise gates: by hand, token by token


def by_hand(model, prompt, tokens, steering, a_gate):
    """Score an answer whose steering follows a stepwise gate, with the whole text run each time.

    Every column is steered by what the gate's running score was when that column was read.
    """
    row = encode(model, [prompt])[0]
    start, weights = len(row.ids), steering.edit.multiplier * steering.edit.vector
    scores, openings, log_probs = None, [], []

    def read_and_steer(ids):
        nonlocal scores
        seen = {}

        def read(activation, hook):
            seen["gate"] = activation[0].clone()

        def steer(activation, hook):
            new = len(ids) - start
            if new == 0:
                pooled = seen["gate"][slice(*row.content)].mean(dim=0, keepdim=True)
                state = a_gate.scores(pooled)
                openings.append(a_gate.opening(state))
            else:
                state = a_gate.memory * scores + (1 - a_gate.memory) * a_gate.scores(
                    seen["gate"][-1:]
                )
                openings.append(a_gate.opening(state, openings[-1]))
            activation = activation.clone()
            for place, opening in enumerate(openings):
                columns = slice(row.content[0], start) if place == 0 else start + place - 1
                is_open = float(opening[0, a_gate.index(steering.gate_category)])
                activation[0, columns] += is_open * weights
            nonlocal_state.append(state)
            return activation

        nonlocal_state = []
        hooks = [(a_gate.site.hook_name, read), (steering.site.hook_name, steer)]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            logits = model(torch.tensor([ids]))[0, -1]
        scores = nonlocal_state[0]
        return logits.log_softmax(dim=-1)

    ids = list(row.ids)
    for token in tokens:
        log_probs.append(float(read_and_steer(ids)[token]))
        ids.append(token)
    return log_probs, [float(one.sum()) for one in openings]


def stepwise(model):
    """A gate that opens for some of these prompts, and changes while their answers are read."""
    from helpers.gates import half_open, through

    prompts = [completion.prompt for completion in answers() if completion.tokens]
    a_gate, _ = half_open(model, prompts)
    a_gate = dataclasses.replace(a_gate, form="stepwise", memory=0.3, hysteresis=0.1)
    return a_gate, through(model, a_gate, rho=0.4)[:1]


def test_a_stepwise_gate_reads_the_answer_token_by_token(tiny, monkeypatch):
    a_gate, steering = stepwise(tiny)
    completions = [c for c in answers() if c.tokens]
    scored = steered_log_probs(tiny, completions, [steering] * len(completions), batch_size=4)
    changed = 0
    for completion, log_probs in zip(completions, scored, strict=True):
        expected, openings = by_hand(
            tiny, completion.prompt, completion.tokens, steering[0], a_gate
        )
        assert log_probs.tolist() == pytest.approx(expected, abs=1e-4)
        changed += len(set(openings)) > 1
    assert changed  # for some answers the gate does not stay as the prompt left it
    hard = [dataclasses.replace(steering[0], gate=dataclasses.replace(a_gate, form="hard"))]
    other = steered_log_probs(tiny, completions, [hard] * len(completions), batch_size=4)
    assert not torch.allclose(torch.cat(scored), torch.cat(other), atol=1e-3)


def test_greedy_answers_behind_a_stepwise_gate_are_the_likeliest_tokens(tiny):
    _, steering = stepwise(tiny)
    prompts = [completion.prompt for completion in answers()]
    completions = generate(tiny, prompts, steering, decoding=Decoding(max_new_tokens=6))
    for completion, log_probs in zip(
        completions, steered_log_probs(tiny, completions, [steering] * 9), strict=True
    ):
        for place in range(len(completion.tokens)):
            other = list(completion.tokens[: place + 1])
            other[place] = 50 if other[place] != 50 else 60
            changed = Completion(completion.prompt, "", tuple(other), "length", "steered")
            [less] = steered_log_probs(tiny, [changed], [steering])
            assert less[place] <= log_probs[place] + 1e-5


def test_kl_behind_a_stepwise_gate_is_that_of_its_distributions(tiny, monkeypatch):
    _, steering = stepwise(tiny)
    completions = [c for c in answers() if c.tokens][:3]
    whole = answer_kl(tiny, completions, {"a": [steering] * 3})["a"]
    monkeypatch.setattr(_logits, "MEMORY", 1)  # a column at a time
    assert answer_kl(tiny, completions, {"a": [steering] * 3})["a"] == pytest.approx(
        whole, rel=1e-4
    )
    assert whole > 0


def test_a_stepwise_gate_is_refused_where_no_cache_can_be_kept(tiny, monkeypatch):
    from workbench.generation import _decode_loop

    _, steering = stepwise(tiny)
    monkeypatch.setattr(_decode_loop, "has_key_value_cache", lambda model: False)
    completion = answers()[3]
    for run in (
        lambda: generate(tiny, [completion.prompt], steering),
        lambda: steered_log_probs(tiny, [completion], [steering]),
        lambda: answer_kl(tiny, [completion], {"a": [steering]}),
    ):
        with pytest.raises(ValueError, match=r"keeps no cache .* 'hard' or 'soft'"):
            run()


# A few columns at a time


def sizes_of_logits(monkeypatch):
    """Record how many numbers each piece of logits has."""
    sizes, right = [], forward.head_logits

    def head_logits(*args):
        sizes.append(right(*args).numel())
        return right(*args)

    monkeypatch.setattr(forward, "head_logits", head_logits)
    return sizes


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2"])
def test_logits_are_computed_a_few_columns_at_a_time_where_memory_is_short(
    family, family_model, monkeypatch
):
    model, completions = family_model(family), [c for c in answers() if c.tokens]
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    steering = [[Intervention(Site(1, "resid_post"), AddVector(vector))]] * len(completions)

    def measured():
        return (
            torch.cat(answer_log_probs(model, completions)),
            torch.cat(steered_log_probs(model, completions, steering)),
            answer_kl(model, completions, {"a": steering})["a"],
        )

    expected = measured()
    width = model.original_model.config.vocab_size
    sizes = sizes_of_logits(monkeypatch)
    monkeypatch.setattr(_logits, "MEMORY", 2 * len(completions) * width * 4 * 3)
    found = measured()
    for one, other in zip(found, expected, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert max(sizes) == 2 * len(completions) * width  # two columns of all rows
    assert len(sizes) > 8


def test_a_model_whose_head_cannot_run_alone_gives_all_logits_at_once(tiny, monkeypatch):
    completions = [c for c in answers() if c.tokens]
    expected = torch.cat(answer_log_probs(tiny, completions))
    monkeypatch.setattr(forward, "_has_late_head", lambda model: False)
    monkeypatch.setattr(forward, "head_logits", None)
    monkeypatch.setattr(_logits, "MEMORY", 1)
    torch.testing.assert_close(torch.cat(answer_log_probs(tiny, completions)), expected)


def test_kl_is_that_of_torch_over_the_answers_tokens_alone(tiny):
    completions = [c for c in answers() if c.tokens]
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    steering = [Intervention(Site(1, "resid_post"), AddVector(vector), "generated")]
    total, n = 0.0, 0
    for completion in completions:
        prompt = encode(tiny, [completion.prompt])[0].ids
        ids, width = torch.tensor([[*prompt, *completion.tokens]]), len(completion.tokens)
        with torch.no_grad():
            plain = tiny(ids)[0, -width - 1 : -1].log_softmax(dim=-1)
            with intervene(tiny, steering, prompt_length=len(prompt)):
                steered = tiny(ids)[0, -width - 1 : -1].log_softmax(dim=-1)
        total += float(torch.nn.functional.kl_div(steered, plain, reduction="sum", log_target=True))
        n += width
    found = answer_kl(tiny, completions, {"a": [steering] * len(completions)}, batch_size=5)["a"]
    assert found == pytest.approx(total / n, rel=1e-4)


# Log-probabilities that come with decoding


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_p": 0.8, "n_samples": 2, "system_prompt": "Be kind."},
        {"temperature": 1.0, "top_k": 5, "batch_size": 2},
    ],
)
def test_log_probs_of_decoding_are_those_of_reading(family, family_model, how):
    if "system_prompt" in how and family in ("gemma3", "gpt2"):
        how = {**how, "system_prompt": None}
    model = family_model(family)
    decoding = Decoding(max_new_tokens=7, **how)
    completions = generate(model, [c.prompt for c in answers(5)], decoding=decoding)
    for completion, read in zip(
        completions, answer_log_probs(model, completions, **decoding.asked_by), strict=True
    ):
        assert completion.log_probs is not None
        told = torch.tensor(completion.log_probs.values)
        torch.testing.assert_close(told, read, atol=1e-4, rtol=1e-4)


def test_only_unsteered_whole_answers_come_with_log_probs(tiny):
    prompts = [dataclasses.replace(c.prompt, response="The dog") for c in answers(3)]
    vector = Intervention(Site(1, "resid_post"), AddVector(torch.ones(32)))
    conditions = {"unsteered": (), "nothing": (), "steered": [vector]}
    by_condition = {"unsteered": True, "nothing": True, "steered": False}
    for completion in sweep(tiny, prompts, conditions, Decoding(max_new_tokens=3)):
        assert (completion.log_probs is not None) == by_condition[completion.condition]
    begun = generate(tiny, prompts, decoding=Decoding(max_new_tokens=3), continue_response=True)
    assert [completion.log_probs for completion in begun] == [None] * 3


def test_log_probs_are_kept_in_the_file_and_an_older_file_has_none(tiny, tmp_path):
    prompts, path = [c.prompt for c in answers(3)], tmp_path / "answers.jsonl"
    first = generate(tiny, prompts, decoding=Decoding(max_new_tokens=4), output=path)
    again = generate(tiny, prompts, decoding=Decoding(max_new_tokens=4), output=path)
    assert [c.log_probs for c in again] == [c.log_probs for c in first]
    assert all(len(c.log_probs.values) == len(c.tokens) for c in first)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(
            json.dumps({k: v for k, v in line.items() if k != "log_probs"}) + "\n" for line in lines
        )
    )
    older = generate(tiny, prompts, decoding=Decoding(max_new_tokens=4), output=path)
    assert older == first
    assert [c.log_probs for c in older] == [None] * 3


def test_an_answer_cut_at_a_stop_text_keeps_the_log_probs_of_its_tokens(tiny):
    prompt = answers(3)[2].prompt
    [whole] = generate(tiny, [prompt], decoding=Decoding(max_new_tokens=8))
    stop = whole.text[len(whole.text) // 2 :][:3]
    [cut] = generate(tiny, [prompt], decoding=Decoding(max_new_tokens=8, stop=(stop,)))
    assert len(cut.tokens) < len(whole.tokens)
    assert cut.log_probs.values == whole.log_probs.values[: len(cut.tokens)]
