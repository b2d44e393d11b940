"""Generation: the same answers in any batch, from Hugging Face, and after an interruption."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.tiny_models import CONTEXT, D_MODEL, sentences, tiny_model

from workbench.generation.answers import UNSTEERED, generate, sweep
from workbench.generation.decoding import Decoding
from workbench.models.load import load_model, model_info
from workbench.models.sites import Site
from workbench.models.tokens import encode, stop_ids
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene
from workbench.steering.interventions import AddVector, Intervention, add_vector, scale_neurons
from workbench.steering.vectors import SteeringVector

CATEGORIES = ("fraud", "malware", "harassment")


def questions(n, seed=0):
    """Make prompts of mixed lengths, of three categories in turn."""
    texts = sentences(2 * n, seed=seed)
    return [
        Prompt(
            f"p{i}",
            " ".join([texts[i], *texts[n : n + i % 5]]),
            None,
            CATEGORIES[i % 3],
            "unsafe",
            "test",
        )
        for i in range(n)
    ]


def steering_vector(model, seed=0, site=None):
    values = 4.0 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    site = site or Site(1, "resid_post")
    return SteeringVector(
        site, "fraud", values, "prompt_contrast", "content", 1.0, 3, 3, 20.0, model_info(model)
    )


@pytest.fixture
def ends(monkeypatch):
    """Return ``ends(model, tokens)``, which makes the model's answers end at these tokens too."""

    def set_ends(model, tokens):
        monkeypatch.setattr(
            model.original_model.generation_config, "eos_token_id", [int(token) for token in tokens]
        )

    return set_ends


def frequent_tokens(completions, n):
    """Find tokens that make many of these answers end early, at different lengths."""
    seen = torch.bincount(torch.tensor([token for c in completions for token in c.tokens]))
    return seen.argsort(descending=True, stable=True)[1 : 1 + n].tolist()


def counted_passes(model):
    """Return a list and hooks that note in it the rows and columns of every pass."""
    rows = []
    return rows, model.hooks(
        fwd_hooks=[("blocks.0.hook_resid_pre", lambda a, hook: rows.append(a.shape[:2]))]
    )


def by_hugging_face(model, prompts, max_new_tokens):
    """Answer greedily with Hugging Face's generate, one prompt at a time, without end tokens."""
    answers = []
    for row in encode(model, prompts):
        ids = torch.tensor([row.ids])
        out = model.original_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(stop_ids(model)),
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        ended = [place for place, token in enumerate(out) if token in stop_ids(model)]
        answers.append((tuple(out[: ended[0]]), "eos") if ended else (tuple(out), "length"))
    return answers


@pytest.mark.parametrize("family", ["llama3", "qwen2", "gemma3", "gpt2", "pythia"])
def test_a_batch_with_rows_that_end_early_is_hugging_faces_answers_one_by_one(
    family, family_model, ends
):
    model, prompts = family_model(family), questions(16)
    # Random models with tied embeddings repeat the last token; with turned ones they say more.
    turn = [Intervention(Site(0, "resid_pre"), lambda activation: activation.roll(1, dims=-1))]
    ends(
        model,
        frequent_tokens(generate(model, prompts, turn, decoding=Decoding(max_new_tokens=10)), 1),
    )
    rows, counting = counted_passes(model)
    with counting:
        together = generate(
            model, prompts, turn, decoding=Decoding(max_new_tokens=10, batch_size=16)
        )
    with intervene(model, turn):
        assert [(c.tokens, c.finish) for c in together] == by_hugging_face(model, prompts, 10)
    assert {c.finish for c in together} == {"eos", "length"}
    assert len({c.tokens for c in together}) >= 3
    sizes = [n for n, _ in rows[1:]]  # after the shared prefix
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 16  # rows that had ended were dropped
    assert all(c.prompt is prompt for c, prompt in zip(together, prompts, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 16, 48])
def test_batch_size_does_not_change_steered_answers(tiny, ends, batch_size):
    prompts = questions(16)
    ends(tiny, frequent_tokens(generate(tiny, prompts, decoding=Decoding(max_new_tokens=16)), 3))
    steering = {
        c: [add_vector(steering_vector(tiny, seed), 1.0)] for seed, c in enumerate(CATEGORIES[:2])
    }
    alone = [
        generate(
            tiny, [prompt], steering.get(prompt.category, ()), decoding=Decoding(max_new_tokens=16)
        )[0]
        for prompt in prompts
    ]
    together = generate(
        tiny, prompts, steering, decoding=Decoding(max_new_tokens=16, batch_size=batch_size)
    )
    assert [(c.tokens, c.finish) for c in together] == [(c.tokens, c.finish) for c in alone]
    assert {c.condition for c in together} == {"steered"}


def test_multiplier_zero_gives_the_unsteered_tokens(tiny):
    prompts = questions(6)
    zero = [add_vector(steering_vector(tiny), 0.0), *scale_neurons([(2, 1), (2, 5)], 1.0)]
    answers = sweep(
        tiny, prompts, {UNSTEERED: (), "zero": zero}, decoding=Decoding(max_new_tokens=12)
    )
    assert [c.tokens for c in answers[:6]] == [c.tokens for c in answers[6:]]


def test_a_sweep_is_its_conditions_run_separately(tiny, ends):
    prompts = questions(8)
    ends(tiny, frequent_tokens(generate(tiny, prompts, decoding=Decoding(max_new_tokens=16)), 3))
    vectors = [steering_vector(tiny, seed) for seed in range(3)]
    conditions = {
        UNSTEERED: (),
        "one": [add_vector(vectors[0], 1.0)],
        "two, of which one on the answer": [
            add_vector(vectors[1], -1.0),
            add_vector(steering_vector(tiny, 5, Site(2, "attn_out")), 1.0, positions="generated"),
        ],
        "neurons": scale_neurons([(1, n) for n in range(20)], -1.0),
        "by category": {"fraud": [add_vector(vectors[2], 1.0)], "malware": []},
        "by prompt before category": {
            "p0": [],
            "p4": [add_vector(vectors[1], 1.0)],
            "fraud": [add_vector(vectors[2], 1.0)],
        },
    }
    together = sweep(tiny, prompts, conditions, decoding=Decoding(max_new_tokens=16, batch_size=20))
    assert [c.condition for c in together] == [name for name in conditions for _ in prompts]
    separate = [
        completion
        for name, condition in conditions.items()
        for completion in generate(
            tiny, prompts, condition, condition=name, decoding=Decoding(max_new_tokens=16)
        )
    ]
    assert [(c.tokens, c.finish) for c in together] == [(c.tokens, c.finish) for c in separate]
    tokens = {(c.condition, c.prompt.id): c.tokens for c in together}
    fraud_ids = [prompt.id for prompt in prompts if prompt.category == "fraud"]
    assert all(tokens["by category", i] != tokens[UNSTEERED, i] for i in fraud_ids)
    assert all(
        tokens["by category", p.id] == tokens[UNSTEERED, p.id]
        for p in prompts
        if p.category != "fraud"
    )
    assert tokens["by prompt before category", "p0"] == tokens[UNSTEERED, "p0"]
    assert tokens["by prompt before category", "p3"] == tokens["by category", "p3"]
    assert tokens["by prompt before category", "p4"] != tokens[UNSTEERED, "p4"]


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
def test_every_end_token_ends_an_answer(family, family_model, ends):
    model, prompts = family_model(family), questions(8)
    plain = generate(model, prompts, decoding=Decoding(max_new_tokens=12))
    for token in frequent_tokens(plain, 3):
        ends(model, [token])
        assert token in stop_ids(model)
        for before, after in zip(
            plain, generate(model, prompts, decoding=Decoding(max_new_tokens=12)), strict=True
        ):
            place = before.tokens.index(token) if token in before.tokens else None
            assert after.tokens == before.tokens[:place]
            assert after.finish == (before.finish if place is None else "eos")
            assert after.text in before.text


def test_the_token_that_ends_a_turn_is_an_end_token_without_any_configuration(tiny, ends):
    ends(tiny, [])
    assert tiny.tokenizer.convert_tokens_to_ids("<|eot_id|>") in stop_ids(tiny)


def test_sampling_is_reproducible_and_independent_of_the_batch(tiny):
    prompts = questions(9)
    first = generate(tiny, prompts, decoding=Decoding(max_new_tokens=12, temperature=1.0, seed=3))
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = generate(
        tiny,
        prompts[::-1],
        decoding=Decoding(max_new_tokens=12, temperature=1.0, seed=3, batch_size=2),
    )[::-1]
    torch.set_rng_state(state)
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert [c.tokens for c in first] != [
        c.tokens
        for c in generate(
            tiny, prompts, decoding=Decoding(max_new_tokens=12, temperature=1.0, seed=4)
        )
    ]
    cold = generate(tiny, prompts, decoding=Decoding(max_new_tokens=12, temperature=1e-4))
    assert [c.tokens for c in cold] == [
        c.tokens for c in generate(tiny, prompts, decoding=Decoding(max_new_tokens=12))
    ]


def test_sampling_draws_the_same_numbers_under_every_condition(tiny):
    prompts = questions(5)
    zero = [add_vector(steering_vector(tiny), 0.0)]
    answers = sweep(
        tiny,
        prompts,
        {UNSTEERED: (), "zero": zero},
        decoding=Decoding(max_new_tokens=12, temperature=1.0),
    )
    assert [c.tokens for c in answers[:5]] == [c.tokens for c in answers[5:]]


def test_sampled_tokens_follow_the_distribution(tiny):
    n, temperature = 3000, 2.0
    prompts = [
        Prompt(f"q{i}", "plan a garden at home", None, "fraud", "unsafe", "test") for i in range(n)
    ]
    sampled = generate(
        tiny, prompts, decoding=Decoding(max_new_tokens=1, temperature=temperature, batch_size=n)
    )
    with torch.no_grad():
        logits = tiny(torch.tensor([encode(tiny, prompts[:1])[0].ids]))[0, -1].double()
    expected = torch.softmax(logits / temperature, dim=0)
    ends = list(stop_ids(tiny))
    counts = torch.bincount(
        torch.tensor([c.tokens[0] for c in sampled if c.tokens]), minlength=len(logits)
    ).double()
    counts[ends[0]] += sum(not c.tokens for c in sampled)
    merged = expected.clone()
    merged[ends[0]], merged[ends[1:]] = expected[ends].sum(), 0
    common = merged * n >= 5
    error = (counts - merged * n)[common] / (merged * n * (1 - merged))[common].sqrt()
    assert common.sum() > 20
    assert error.abs().max() < 4.5
    assert 0.7 < float((error**2).mean()) < 1.4


def test_top_p_samples_only_among_the_most_likely_tokens(tiny):
    n, top_p = 400, 0.5
    prompts = [Prompt(f"p{i}", "one two", None, "fraud", "unsafe", "t") for i in range(n)]
    decoding = Decoding(max_new_tokens=1, temperature=1.0, top_p=top_p, seed=1)
    sampled = generate(tiny, prompts, decoding=decoding)
    with torch.no_grad():
        logits = tiny(torch.tensor([encode(tiny, prompts[:1])[0].ids]))[0, -1].double()
    likely, order = torch.softmax(logits, dim=0).sort(descending=True)
    n_inside = int((likely.cumsum(0) < top_p).sum()) + 1
    inside = set(order[:n_inside].tolist())
    written = {c.tokens[0] for c in sampled if c.tokens}
    assert written <= inside
    assert len(written) > 1
    everything = generate(
        tiny, prompts, decoding=Decoding(max_new_tokens=1, temperature=1.0, seed=1)
    )
    assert {c.tokens[0] for c in everything if c.tokens} - inside


# Interruptions.


class StopAfter:
    """Press Ctrl-C in the n-th pass through the model, as a user may."""

    def __init__(self, n):
        self.left = n

    def __call__(self, activation, hook):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("passes", [1, 3, 12, 20])
def test_an_interrupted_call_goes_on_and_asks_nothing_twice(tiny, tmp_path, passes):
    prompts, output = questions(10), tmp_path / "answers" / "out.jsonl"
    conditions = {UNSTEERED: (), "steered": [add_vector(steering_vector(tiny), 1.0)]}
    settings = {"decoding": Decoding(max_new_tokens=6, batch_size=4), "output": output}
    whole = sweep(tiny, prompts, conditions, decoding=Decoding(max_new_tokens=6, batch_size=4))
    with (
        tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", StopAfter(passes))]),
        pytest.raises(KeyboardInterrupt),
    ):
        sweep(tiny, prompts, conditions, **settings)
    answered = output.read_text().splitlines() if output.exists() else []
    assert len(answered) % 4 == 0
    assert len(answered) == 4 * (0 if passes < 8 else 1 if passes < 14 else 3)
    rows, counting = counted_passes(tiny)
    with counting:
        resumed = sweep(tiny, prompts, conditions, **settings)
    assert resumed == whole
    first_passes = [n for n, width in rows[1:] if width > 1]
    assert sum(first_passes) == 20 - len(answered)
    lines = output.read_text().splitlines()
    assert lines[: len(answered)] == answered
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 20
    rows.clear()
    with tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", StopAfter(1))]):  # nothing is run at all
        assert sweep(tiny, prompts, conditions, **settings) == whole


def test_a_line_cut_by_a_kill_is_answered_again_and_only_that(tiny, tmp_path):
    prompts, output = questions(8), tmp_path / "out.jsonl"
    settings = {"decoding": Decoding(max_new_tokens=6, batch_size=4), "output": output}
    whole = generate(tiny, prompts, **settings)
    complete = output.read_bytes()
    lines = complete.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:-1]) + lines[-1][:25])
    rows, counting = counted_passes(tiny)
    with counting:
        assert generate(tiny, prompts, **settings) == whole
    # Its own batch only, so that rounding is the same.
    assert [n for n, width in rows[1:] if width > 1] == [4]
    assert output.read_bytes() == complete


def test_answers_in_the_file_belong_to_their_settings(tiny, tmp_path):
    prompts, output = questions(3), tmp_path / "out.jsonl"

    def asked(interventions=(), **settings):
        rows, counting = counted_passes(tiny)
        with counting:
            decoding = Decoding(**{"max_new_tokens": 4, **settings})
            generate(tiny, prompts, interventions, decoding, output=output)
        return bool(rows)

    assert asked()
    assert not asked()
    assert not asked(seed=5)  # greedy: no random numbers
    for settings in (
        {"max_new_tokens": 5},
        {"temperature": 1.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "top_p": 0.9},
        {"system_prompt": "Be kind."},
        {"interventions": [add_vector(steering_vector(tiny), 1.0)]},
        {"interventions": [add_vector(steering_vector(tiny), 1.5)]},
        {"interventions": [add_vector(steering_vector(tiny, 1), 1.0)]},
        {"interventions": [add_vector(steering_vector(tiny), 1.0, positions="prompt")]},
        {"interventions": scale_neurons([(1, 1)], 0.0)},
        {"interventions": scale_neurons([(1, 2)], 0.0)},
    ):
        assert asked(**settings), settings
        assert not asked(**settings), settings
    prompts[0] = Prompt("p0", "another question", None, "fraud", "unsafe", "test")
    assert asked()


def test_an_edit_that_nothing_identifies_is_not_kept_in_a_file(tiny, tmp_path):
    prompts, output = questions(2), tmp_path / "out.jsonl"
    edit = Intervention(Site(1, "resid_post"), lambda activation: activation * 2)
    assert generate(tiny, prompts, [edit], decoding=Decoding(max_new_tokens=2))
    with pytest.raises(
        ValueError,
        match=r"answers under the edit at L1\.resid_post \(function\) cannot be kept in a file",
    ):
        generate(tiny, prompts, [edit], decoding=Decoding(max_new_tokens=2), output=output)
    assert not output.exists()


def test_a_damaged_file_is_an_error_with_its_line(tiny, tmp_path):
    output = tmp_path / "out.jsonl"
    generate(tiny, questions(3), decoding=Decoding(max_new_tokens=2), output=output)
    lines = output.read_text().splitlines()
    output.write_text("\n".join([lines[0], lines[1][:20], lines[2], ""]))
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2: not valid JSON"):
        generate(tiny, questions(3), decoding=Decoding(max_new_tokens=2), output=output)


# Bad input.


def test_what_cannot_be_answered_is_refused(tiny):
    prompts = questions(2)
    for settings, message in (
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or above"),
        ({"temperature": float("nan")}, "temperature must be 0 .greedy. or above"),
        ({"system_prompt": 3}, "system_prompt must be a text, got 3"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_p": "0.5"}, "top_p must be a number, got '0.5'"),
        ({"stop": None}, "stop must be texts that are not empty, got None"),
        ({"template_keywords": {1: 2}}, "names of template_keywords must be texts"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoding(**settings)
    with pytest.raises(TypeError, match=r"decoding must be a wb.Decoding, got 6"):
        generate(tiny, prompts, [], 6)
    with pytest.raises(TypeError, match=r"vector must be a SteeringVector, got str; fit_"):
        add_vector("fraud", rho=0.1)
    with pytest.raises(ValueError, match="nothing to answer"):
        generate(tiny, [])
    with pytest.raises(ValueError, match="nothing to answer"):
        sweep(tiny, prompts, {})
    with pytest.raises(ValueError, match="prompt 'p0' comes 2 times; ids must be unique"):
        generate(tiny, [*prompts, prompts[0]])
    with pytest.raises(ValueError, match=rf"prompt 'p0' .*{CONTEXT} new ones.*context"):
        generate(tiny, prompts, decoding=Decoding(max_new_tokens=CONTEXT))
    narrow = Intervention(Site(1, "resid_post"), AddVector(torch.ones(5)))
    with pytest.raises(ValueError, match="width 5 does not fit"):
        generate(tiny, prompts, {"fraud": [narrow]})


def test_rows_of_a_batch_mean_nothing_to_generation(tiny):
    steering = add_vector(steering_vector(tiny), 1.0)
    with pytest.raises(
        ValueError, match="names rows of a batch, but generation makes its own batches"
    ):
        generate(tiny, questions(2), [steering.for_rows([0])])


def test_a_condition_that_names_no_prompt_is_refused(tiny):
    steering = [add_vector(steering_vector(tiny), 1.0)]
    with pytest.raises(
        ValueError,
        match=r"'steered' would steer nothing: no prompt has id or category 'frauds'\. "
        "Did you mean 'fraud'",
    ):
        generate(tiny, questions(4), {"frauds": steering})
    assert generate(
        tiny,
        questions(4),
        {"frauds": steering, "fraud": steering},
        decoding=Decoding(max_new_tokens=2),
    )  # a category not asked today


def test_a_chat_models_vector_steers_its_base_model_when_transfer_is_said(tiny, tmp_path):
    chat = load_model(tiny_model("llama3", tmp_path / "chat", seed=1), device="cpu")
    prompts, steering = questions(3), [add_vector(steering_vector(chat), 1.0)]
    with pytest.raises(ValueError, match="pass transfer=True"):
        generate(tiny, prompts, steering, decoding=Decoding(max_new_tokens=4))
    steered = generate(tiny, prompts, steering, decoding=Decoding(max_new_tokens=4), transfer=True)
    same_vector = [add_vector(steering_vector(tiny), 1.0)]
    assert [c.tokens for c in steered] == [
        c.tokens for c in generate(tiny, prompts, same_vector, decoding=Decoding(max_new_tokens=4))
    ]


def test_the_real_model_answers_as_with_hugging_face_alone_and_in_a_batch(real_model):
    prompts = [
        Prompt("a", "What is the capital of France?", None, "harmless", "neutral", "test"),
        Prompt(
            "b",
            "Write one sentence about a dog that is afraid of the rain.",
            None,
            "harmless",
            "neutral",
            "test",
        ),
        Prompt("c", "Say yes.", None, "harmless", "neutral", "test"),
    ]
    answers = generate(real_model, prompts, decoding=Decoding(max_new_tokens=12))
    assert [(c.tokens, c.finish) for c in answers] == by_hugging_face(real_model, prompts, 12)
    assert "Paris" in answers[0].text
    assert answers[0].finish == "eos"


def test_an_answer_goes_on_from_the_words_it_was_begun_with(tiny):
    plain = Prompt("a", "How do I fix a bicycle?", None, "harmless", "neutral", "test")
    whole = generate(tiny, [plain], decoding=Decoding(max_new_tokens=8))[0]
    begun = dataclasses.replace(plain, response="No. Turn the wheel")
    (answer,) = generate(tiny, [begun], decoding=Decoding(max_new_tokens=8), continue_response=True)
    context = encode(tiny, [begun], with_response=True)[0].ids
    tokens = list(context)
    for token in answer.tokens:
        logits = tiny(torch.tensor([tokens]), return_type="logits")[0, -1]
        assert int(logits.argmax()) == token
        tokens.append(token)
    assert (
        generate(tiny, [begun], decoding=Decoding(max_new_tokens=8))[0].tokens == whole.tokens
    )  # without it, the response is not read


def test_what_is_no_prompt_and_no_intervention_is_said(tiny):
    with pytest.raises(TypeError, match=r"prompts are given as a text, .*; row 1 is int"):
        generate(tiny, [7])
    with pytest.raises(TypeError, match=r"must be a list of interventions, .*given as decoding="):
        generate(tiny, questions(1), Decoding())
    with pytest.raises(TypeError, match="conditions must be a mapping"):
        sweep(tiny, questions(1), [add_vector(steering_vector(tiny), 1.0)])
