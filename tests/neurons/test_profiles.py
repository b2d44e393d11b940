"""Profiles of neurons and what their weights say, against looking at everything by hand."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from helpers.tiny_models import sentences, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.models.activations import token_activations
from workbench.models.load import hooked, load_model
from workbench.models.sites import Site
from workbench.models.tokens import token_strings
from workbench.neurons.profiles import (
    NeuronProfile,
    _Counts,
    _TopTokens,
    profile_neurons,
    random_neurons,
)
from workbench.neurons.weights import N_RANDOM, reading_site, vocabulary_of, weight_cosines
from workbench.prompts.prompt import Prompt

NEURONS = [(2, 5), (0, 63), (2, 0)]
PLANTED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama3", tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def prompts():
    kinds = [("fraud", "unsafe"), ("fraud", "safe"), ("harmless", "neutral")]
    return [
        Prompt(f"p{i}", text + " please" * (i % 5), None, *kinds[i % 3], "test")
        for i, text in enumerate(sentences(30))
    ]


def edited(folder, edit):
    """The checkpoint with its Hugging Face weights changed before it is hooked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        edit(hf_model)
    return hooked(hf_model, AutoTokenizer.from_pretrained(folder), "edited")


def by_hand(model, prompts, neuron):
    """Every content token's (activation, prompt id, position), one prompt at a time.

    Without prefix, batch or padding.
    """
    everything = []
    for prompt in prompts:
        row, values = token_activations(model, prompt, Site(neuron[0], "mlp_post"))
        everything += [(float(values[i, neuron[1]]), prompt.id, i) for i in range(*row.content)]
    return everything


def test_a_neuron_planted_on_a_token_is_highest_at_that_token(folder, prompts):
    tokenizer = load_model(folder).tokenizer
    rows = [tokenizer(prompt.text, add_special_tokens=False).input_ids for prompt in prompts]
    token = next(i for i in rows[3] if sum(i in row for row in rows) < 15)

    def plant(hf_model):
        layer = hf_model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()  # so that the first MLP sees one token at a time
        seen = layer.post_attention_layernorm(hf_model.model.embed_tokens.weight[token])
        layer.mlp.gate_proj.weight[PLANTED] = seen
        layer.mlp.up_proj.weight[PLANTED] = seen

    model = edited(folder, plant)
    profile = profile_neurons(model, [(0, PLANTED)], prompts, n_examples=4)[0]
    text = token_strings(model, [token])[0]
    assert [example.tokens[example.peak] for example in profile.highest] == [text] * 4
    others = {p.id: row for p, row in zip(prompts, rows, strict=True)}
    assert all(token in others[example.prompt_id] for example in profile.highest)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("per_prompt", [1, 3])
def test_the_stream_finds_what_looking_at_everything_finds(model, prompts, batch_size, per_prompt):
    profiles = profile_neurons(
        model,
        NEURONS,
        prompts,
        n_examples=6,
        tokens_per_prompt=per_prompt,
        context=2,
        batch_size=batch_size,
    )
    for neuron, profile in zip(NEURONS, profiles, strict=True):
        assert (profile.layer, profile.neuron) == neuron
        everything = by_hand(model, prompts, neuron)
        for sign, examples in ((1, profile.highest), (-1, profile.lowest)):
            of_prompt: dict[str, list[float]] = {}
            for value, prompt_id, _ in sorted(everything, key=lambda entry: -sign * entry[0]):
                of_prompt.setdefault(prompt_id, []).append(value)
            allowed = sorted(
                (v for best in of_prompt.values() for v in best[:per_prompt]), reverse=sign > 0
            )[:6]
            np.testing.assert_allclose(
                [example.value for example in examples], allowed, rtol=1e-4, atol=1e-6
            )


def test_an_example_shows_the_users_words_around_its_token_and_their_activations(model, prompts):
    profile = profile_neurons(model, NEURONS[:1], prompts, n_examples=5, context=3)[0]
    of_id = {prompt.id: prompt for prompt in prompts}
    for example in profile.highest + profile.lowest:
        row, values = token_activations(model, of_id[example.prompt_id], Site(2, "mlp_post"))
        words = token_strings(model, row.ids)
        first = next(
            at - example.peak
            for at in range(*row.content)
            if abs(float(values[at, 5]) - example.value) < 1e-5
            and words[at] == example.tokens[example.peak]
        )
        last = first + len(example.tokens)
        assert row.content[0] <= first
        assert last <= row.content[1]
        assert tuple(words[first:last]) == example.tokens
        np.testing.assert_allclose(example.activations, values[first:last, 5], rtol=1e-4, atol=1e-6)
        assert example.peak == 3 or first == row.content[0]
        assert (example.category, example.label) == (
            of_id[example.prompt_id].category,
            of_id[example.prompt_id].label,
        )


@pytest.mark.parametrize("batch_size", [2, 64])
def test_histograms_count_each_class_as_one_pass_over_fixed_bins_would(model, prompts, batch_size):
    profile = profile_neurons(model, NEURONS[:1], prompts, batch_size=batch_size)[0]
    everything = by_hand(model, prompts, NEURONS[0])
    for histogram, unit in ((profile.per_token, "token"), (profile.per_prompt, "prompt")):
        assert histogram.classes == (
            ("fraud", "safe"),
            ("fraud", "unsafe"),
            ("harmless", "neutral"),
        )
        for (category, label), counts in zip(histogram.classes, histogram.counts, strict=True):
            values = [
                [value for value, prompt_id, _ in everything if prompt_id == prompt.id]
                for prompt in prompts
                if (prompt.category, prompt.label) == (category, label)
            ]
            flat = (
                [np.mean(of_prompt) for of_prompt in values]
                if unit == "prompt"
                else [value for of_prompt in values for value in of_prompt]
            )
            assert list(np.histogram(flat, histogram.edges)[0]) == list(counts)
        assert len(histogram.edges) - 1 <= 40
        assert sum(map(sum, histogram.counts)) == (
            len(prompts) if unit == "prompt" else len(everything)
        )


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 39), max_size=4),
    k=st.integers(1, 6),
)
def test_top_tokens_and_counts_do_not_depend_on_how_the_stream_is_cut(values, cuts, k):
    tensor = torch.tensor(values)[:, None]
    whole, counted = _TopTokens.empty(1, k, 1, 1, 1), _Counts.empty(1, 1)
    parts, counted_parts = _TopTokens.empty(1, k, 1, 1, 1), _Counts.empty(1, 1)
    inside = torch.ones(len(values), 1, dtype=torch.bool)
    whole.update(torch.arange(len(values)), tensor[:, None], inside)
    counted.update(torch.zeros(len(values), dtype=torch.long), tensor)
    edges = [0, *sorted({cut for cut in cuts if cut < len(values)}), len(values)]
    for a, b in itertools.pairwise(edges):
        parts.update(torch.arange(a, b), tensor[a:b, None], inside[a:b])
        counted_parts.update(torch.zeros(b - a, dtype=torch.long), tensor[a:b])
    assert whole.values[:, 0].tolist() == sorted(values, reverse=True)[:k] + [-float("inf")] * (
        k - len(values)
    )
    for name in ("values", "prompts", "columns", "windows"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert torch.equal(counted.counts, counted_parts.counts)
    histogram = counted.histogram(0, (("a", "unsafe"),))
    assert sum(histogram.counts[0]) == len(values)
    assert list(np.histogram(np.float32(values), histogram.edges)[0]) == list(histogram.counts[0])


def test_what_is_held_does_not_grow_with_the_number_of_prompts():
    def held(n_prompts):
        top, counts = _TopTokens.empty(3, 4, 2, 5, 1), _Counts.empty(3, 2)
        for i in range(0, n_prompts, 8):
            values = torch.randn(8, 9, 3, generator=torch.Generator().manual_seed(i))
            top.update(torch.arange(i, i + 8), values, torch.ones(8, 9, dtype=torch.bool))
            counts.update(torch.zeros(72, dtype=torch.long), values.flatten(0, 1))
        tensors = [
            v for part in (top, counts) for v in vars(part).values() if isinstance(v, torch.Tensor)
        ]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert held(8) == held(800)


def test_fewer_tokens_than_asked_for_are_all_there_is(model, prompts):
    profile = profile_neurons(model, NEURONS[:1], prompts[:2], n_examples=8)[0]
    assert sorted(example.prompt_id for example in profile.highest) == ["p0", "p1"]


def test_other_spans_are_read_too(model):
    answered = [
        Prompt(f"a{i}", text, "sure, here is " + text, "fraud", "unsafe", "t")
        for i, text in enumerate(sentences(6))
    ]
    by_span = {
        span: profile_neurons(model, NEURONS[:1], answered, span=span)[0]
        for span in ("response", "last", "all")
    }
    assert sum(map(sum, by_span["last"].per_token.counts)) == 6
    assert all(e.peak == len(e.tokens) - 1 for e in by_span["last"].highest)
    assert sum(map(sum, by_span["all"].per_token.counts)) > sum(
        map(sum, by_span["response"].per_token.counts)
    )
    assert "".join(by_span["response"].highest[0].tokens).strip()


@pytest.mark.parametrize("family", ["llama3", "qwen2", "gemma2", "olmo2", "gpt2", "pythia"])
def test_a_neuron_that_writes_an_unembedding_row_promotes_that_token(family, tmp_path):
    model = load_model(tiny_model(family, tmp_path))
    token = 120
    word = token_strings(model, [token])[0]
    with torch.no_grad():
        weight = model.ln_final(probe := torch.tensor([1.0, -1.0] * 16)[None, None] * 1e3)[0, 0]
        weight = (weight - model.ln_final(0 * probe)[0, 0]) * torch.tensor([1.0, -1.0] * 16)
        row = model.unembed.W_U[:, token] / weight
        post = getattr(model.blocks[3], "ln2_post", None)
        if post is not None:
            row = row / post(probe * 0 + 1e3)[0, 0]
        W_out = model.blocks[3].mlp.W_out
        W_out[PLANTED], W_out[PLANTED + 1] = row, -row
        assert torch.equal(model.blocks[3].mlp.W_out[PLANTED], row)
    plus, minus, other = vocabulary_of(model, 3, [PLANTED, PLANTED + 1, 40])
    assert plus.promoted[0][0] == minus.suppressed[0][0] == word
    assert plus.promoted[0][1] == pytest.approx(-minus.suppressed[0][1], rel=1e-4)
    assert plus.promoted[0][1] > other.promoted[0][1]
    effects = [effect for _, effect in plus.promoted]
    assert effects == sorted(effects, reverse=True)


@pytest.mark.parametrize("family", ["llama3", "gemma3", "olmo2", "gpt2", "pythia"])
def test_the_vocabulary_is_what_the_models_own_norms_and_unembedding_make_of_the_output(
    family, tmp_path
):
    """A norm scales a vector given to it alone by one number.

    So the model's own end shows the effects up to that number.
    """
    model = load_model(tiny_model(family, tmp_path))
    with torch.no_grad():
        out = model.blocks[2].mlp.W_out[PLANTED][None, None] * 100
        if family in ("gemma2", "gemma3", "olmo2"):
            out = model.original_model.model.layers[2].post_feedforward_layernorm(out)
        effects = (model.unembed(model.ln_final(out)) - model.unembed(model.ln_final(0 * out)))[
            0, 0
        ].double()
    effects = (effects - effects.mean()) / effects.std(correction=0)
    order = effects.argsort(descending=True)
    vocabulary = vocabulary_of(model, 2, [PLANTED])[0]
    for words, ids in (
        (vocabulary.promoted, order[:10]),
        (vocabulary.suppressed, order.flip(0)[:10]),
    ):
        assert [word for word, _ in words] == token_strings(model, ids.tolist())
        np.testing.assert_allclose([effect for _, effect in words], effects[ids], rtol=1e-3)
    assert vocabulary.kurtosis == pytest.approx(float((effects**4).mean()) - 3, abs=1e-2)


def test_a_pointed_vocabulary_is_told_from_random_neurons(folder):
    def sharpen(hf_model):
        weight = hf_model.lm_head.weight
        weight.mul_(0.1)
        weight[120] *= 100  # one token's row stands out, and one neuron writes along it
        hf_model.model.layers[3].mlp.down_proj.weight[:, PLANTED] = (
            weight[120] / hf_model.model.norm.weight
        )

    pointed, plain = vocabulary_of(edited(folder, sharpen), 3, [PLANTED, 30])
    assert (
        pointed.p_promoted <= 2 / 65
    )  # it may be drawn itself: the whole layer of 64 is the comparison
    assert pointed.promoted[0][1] > plain.promoted[0][1]
    assert all(
        1 / (1 + N_RANDOM) <= p <= 1
        for p in (plain.p_kurtosis, plain.p_promoted, plain.p_suppressed)
    )


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2", "pythia", "olmo2"])
def test_input_cosines_say_how_the_neuron_answers_to_the_residual_stream(family, tmp_path):
    """What the neuron sees is the residual's projection on its weights, over the norm's scale."""
    model = load_model(tiny_model(family, tmp_path))
    layer, neuron, site = 1, 9, reading_site(model, 1)
    block, read = model.blocks[layer], {}
    names = [site.hook_name, f"blocks.{layer}.mlp.hook_pre"]
    if family != "olmo2":  # nothing stands between the stream and its MLP
        names.append(f"blocks.{layer}.ln2.hook_scale")

    def keep(name):
        return lambda activation, hook: read.__setitem__(name, activation[0].clone())

    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep(name)) for name in names]):
        model(torch.arange(20, 40)[None])
    residual, pre = read[site.hook_name], read[names[1]][:, neuron]
    scale = read[names[2]][:, 0] if len(names) == 3 else torch.ones(20)
    matrix = block.mlp.W_gate if family not in ("gpt2", "pythia") else block.mlp.W_in
    constant = 0.0
    if family in ("gpt2", "pythia"):
        constant = (
            block.ln2(torch.zeros(1, 1, 32))[0, 0] @ matrix[:, neuron] + block.mlp.b_in[neuron]
        )
    projection = (pre - constant) * scale
    cosines = [
        next(
            c.value
            for c in weight_cosines(model, layer, [neuron], {"c": {site: r}})[0]
            if c.side in ("gate", "in")
        )
        for r in residual
    ]
    seen = torch.tensor(cosines) * residual.norm(dim=1)
    factor = (projection @ seen) / (seen @ seen)
    assert factor > 0
    torch.testing.assert_close(
        projection, factor * seen, rtol=1e-3, atol=1e-3 * float(projection.abs().max())
    )


def test_output_cosine_is_one_along_what_the_neuron_writes(model):
    u = model.blocks[2].mlp.W_out[5]
    reads, site = reading_site(model, 2), Site(3, "resid_post")
    directions = {"fraud": {site: 3 * u, reads: torch.randn(32)}, "other": {site: -u}}
    (first, second) = weight_cosines(model, 2, [5, 6], directions, site)
    assert {(c.category, c.side) for c in first} == {
        ("fraud", "gate"),
        ("fraud", "up"),
        ("fraud", "out"),
        ("other", "out"),
    }
    out = {c.category: c for c in first if c.side == "out"}
    assert out["fraud"].value == pytest.approx(1, abs=1e-5)
    assert out["other"].value == pytest.approx(-1, abs=1e-5)
    assert out["fraud"].share == 1 / 64
    assert all(abs(c.value) < 0.9 for c in second)
    assert weight_cosines(model, 2, [5], {"fraud": {}}, site) == [()]


def test_a_profile_comes_back_from_json(model, prompts):
    site = Site(3, "resid_post")
    profile = profile_neurons(
        model, NEURONS[:1], prompts[:6], site=site, directions={"fraud": {site: torch.ones(32)}}
    )[0]
    assert NeuronProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    assert profile.cosines
    with pytest.raises(ValueError, match="not a neuron profile"):
        NeuronProfile.from_dict({"layer": 1})


def test_random_controls_are_other_neurons_of_the_same_layers(model):
    targets = [(2, n) for n in range(20)] + [(1, 3)]
    controls = random_neurons(model, targets, seed=1)
    assert [layer for layer, _ in controls] == [layer for layer, _ in targets]
    assert len({*targets, *controls}) == 42
    assert (
        controls == random_neurons(model, targets, seed=1) != random_neurons(model, targets, seed=2)
    )
    with pytest.raises(ValueError, match="too few"):
        random_neurons(model, [(2, n) for n in range(40)])


def test_errors_say_what_is_allowed(model, prompts):
    with pytest.raises(ValueError, match=r"no neuron 64 in layer 1: it has 64 neurons \(0-63\)"):
        profile_neurons(model, [(1, 64)], prompts)
    with pytest.raises(ValueError, match="4 layers"):
        profile_neurons(model, [(4, 0)], prompts)
    with pytest.raises(ValueError, match="at least one neuron"):
        profile_neurons(model, [], prompts)
    with pytest.raises(ValueError, match="unknown span"):
        profile_neurons(model, NEURONS, prompts, span="words")
    with pytest.raises(ValueError, match="batch_size"):
        profile_neurons(model, NEURONS, prompts, batch_size=0)
    with pytest.raises(ValueError, match="must be a vector of 32"):
        weight_cosines(
            model,
            2,
            [5],
            {"fraud": {Site(3, "resid_post"): torch.zeros(32)}},
            Site(3, "resid_post"),
        )
