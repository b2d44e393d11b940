"""Applied interventions: which positions they reach, and that nothing of them stays."""

from __future__ import annotations

import pytest
import torch
from helpers.interventions import padded, run, state, steering_vector
from helpers.tiny_models import tiny_model

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.forward import prefix_cache, reading, rows_of_cache
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.models.tokens import encode, stop_ids
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import Steering, intervene
from workbench.steering.interventions import (
    AddVector,
    Intervention,
    add_vector,
    scale_neurons,
)

# Positions under a key-value cache and without one: which columns change, whoever decodes.
PROMPT, NEW = 6, 5


def changed_columns(model, positions, decode):
    """Tell what an intervention changed in each pass: readers stand before and behind it."""
    site = Site(1, "attn_out")
    before, after = [], []
    with (
        torch.no_grad(),
        model.hooks(
            fwd_hooks=[(site.hook_name, lambda activation, hook: before.append(activation.clone()))]
        ),
        intervene(model, [add_vector(steering_vector(model, site), 1.0, positions=positions)]),
        model.hooks(
            fwd_hooks=[(site.hook_name, lambda activation, hook: after.append(activation.clone()))]
        ),
    ):
        decode()
    return [(a != b).any(dim=-1) for a, b in zip(after, before, strict=True)]


def decoders(model, tokens, mask):
    hugging_face = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    bridge = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False}
    return {
        "bridge": lambda: model.generate(tokens, attention_mask=mask, **bridge),
        "bridge, no cache": lambda: model.generate(
            tokens, attention_mask=mask, use_past_kv_cache=False, **bridge
        ),
        "hugging face": lambda: model.original_model.generate(
            tokens, attention_mask=mask, **hugging_face
        ),
        "hugging face, no cache": lambda: model.original_model.generate(
            tokens, attention_mask=mask, use_cache=False, **hugging_face
        ),
    }


@pytest.mark.parametrize(
    "how", ["bridge", "bridge, no cache", "hugging face", "hugging face, no cache"]
)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_positions_are_the_same_whoever_decodes(tiny, positions, how):
    tokens, mask = padded([PROMPT, 3], "left")
    passes = changed_columns(tiny, positions, decoders(tiny, tokens, mask)[how])
    assert len(passes) == NEW
    if "no cache" in how:
        assert [p.shape[1] for p in passes] == [PROMPT + step for step in range(NEW)]
        changed = passes[-1]
    else:
        assert [p.shape[1] for p in passes] == [PROMPT] + [1] * (NEW - 1)
        changed = torch.cat(passes, dim=1)
    is_prompt = torch.arange(PROMPT + NEW - 1) < PROMPT
    expected = torch.cat([mask.bool(), torch.ones(2, NEW - 1, dtype=torch.bool)], dim=1)
    if positions != "all":
        expected &= is_prompt if positions == "prompt" else ~is_prompt
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_our_generation_and_hugging_faces_agree_under_steering(tiny, positions):
    prompt = Prompt("a", "plan a garden before lunch", None, "fraud", "unsafe", "test")
    steering = [
        add_vector(
            steering_vector(tiny, Site(1, "resid_post"), scale=3.0), 1.0, positions=positions
        )
    ]
    ours = generate(tiny, [prompt], steering, decoding=Decoding(max_new_tokens=12))[0]
    ids = torch.tensor([encode(tiny, [prompt])[0].ids])
    with intervene(tiny, steering):
        theirs = tiny.original_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(stop_ids(tiny)),
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
    assert list(ours.tokens) == [token for token in theirs if token not in stop_ids(tiny)]
    assert ours.tokens != generate(tiny, [prompt], decoding=Decoding(max_new_tokens=12))[0].tokens


def test_a_prompt_read_behind_a_cached_prefix_is_still_prompt(tiny):
    tokens, mask = padded([7, 7], "left")
    tokens[1, :3] = tokens[0, :3]
    site = Site(2, "resid_post")
    steering = [add_vector(steering_vector(tiny, Site(1, "attn_out")), 1.0, positions="prompt")]
    _, whole = run(tiny, steering, tokens, mask, [site])
    parts = []
    with torch.no_grad(), intervene(tiny, steering):
        prefix = prefix_cache(tiny, tokens[0, :3].tolist())
        with reading(
            tiny, [(site.hook_name, lambda activation: parts.append(activation.clone()))]
        ) as read:
            read(tokens[:, 3:], mask, rows_of_cache(prefix, torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(parts[0], whole[site][:, 3:], atol=1e-5, rtol=1e-5)


def test_a_second_prompt_in_the_same_block_is_prompt_again(tiny):
    def two_prompts():
        for lengths in ([4], [5], [3]):
            tokens, mask = padded(lengths, "left", seed=lengths[0])
            tiny(tokens, attention_mask=mask)

    assert all(columns.all() for columns in changed_columns(tiny, "prompt", two_prompts))


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_our_own_generation_changes_the_same_positions(tiny, positions):
    site = Site(1, "attn_out")
    prompt = Prompt("a", "plan a garden before lunch", None, "fraud", "unsafe", "test")
    n_prompt = len(encode(tiny, [prompt])[0].ids)
    steering = [add_vector(steering_vector(tiny, site), 1.0, positions=positions)]
    kinds = []

    def edit(
        activation,
    ):  # sees what the steering before it made of zeros: the columns of this pass that it reached
        kinds.append(
            (activation != 0).any(dim=-1)[-1]
        )  # the shared prefix is computed for unsteered rows first
        return activation

    blank = Intervention(site, lambda activation: torch.zeros_like(activation))
    tokens = generate(
        tiny,
        [prompt],
        [blank, *steering, Intervention(site, edit)],
        decoding=Decoding(max_new_tokens=NEW),
    )[0].tokens
    assert len(tokens) == NEW
    is_prompt = torch.arange(n_prompt + NEW - 1) < n_prompt
    expected = {"all": torch.ones_like(is_prompt), "prompt": is_prompt, "generated": ~is_prompt}[
        positions
    ]
    assert torch.equal(torch.cat(kinds), expected)


# What must not happen silently.


def test_nothing_is_left_behind_after_an_exception(tiny):
    before = state(tiny)
    tokens, mask = padded([4], "left")
    plain, _ = run(tiny, [], tokens, mask)
    steering = [
        add_vector(steering_vector(tiny, Site(1, "resid_post")), 5.0),
        *scale_neurons([(2, 1)], 0.0),
    ]

    def interrupted():
        with torch.no_grad(), intervene(tiny, steering):
            tiny(tokens, attention_mask=mask)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    def broken(activation):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tiny, [*steering, Intervention(Site(2, "resid_post"), broken)], tokens, mask)
    prompt = Prompt("a", "plan a garden", None, "fraud", "unsafe", "test")
    with pytest.raises(ZeroDivisionError):
        generate(
            tiny,
            [prompt],
            [*steering, Intervention(Site(2, "resid_post"), broken)],
            decoding=Decoding(max_new_tokens=3),
        )
    assert state(tiny) == before
    assert torch.equal(run(tiny, [], tokens, mask)[0], plain)


def test_a_users_own_hooks_and_an_outer_intervention_stay(tiny):
    tokens, mask = padded([4], "left")
    site = Site(1, "resid_post")
    vector = steering_vector(tiny, site)
    calls = []
    tiny.add_hook(site.hook_name, lambda activation, hook: calls.append(1))
    try:
        twice, _ = run(tiny, [add_vector(vector, 2.0)], tokens, mask)
        with torch.no_grad(), intervene(tiny, [add_vector(vector, 1.0)]):
            nested, _ = run(tiny, [add_vector(vector, 1.0)], tokens, mask)
            once = tiny(tokens, attention_mask=mask)
        torch.testing.assert_close(nested, twice, atol=1e-5, rtol=1e-5)
        assert torch.equal(once, run(tiny, [add_vector(vector, 1.0)], tokens, mask)[0])
        assert len(calls) == 4
    finally:
        tiny.reset_hooks()


def test_an_intervention_that_never_fired_is_an_error(tiny):
    steering = [add_vector(steering_vector(tiny, Site(3, "resid_post")), 1.0)]
    with (
        pytest.raises(
            RuntimeError,
            match=r"intervention at blocks\.3\.hook_resid_post never fired: the model was not run",
        ),
        intervene(tiny, steering),
    ):
        pass


def test_positions_that_never_came_are_an_error(tiny):
    tokens, mask = padded([4], "left")
    steering = [
        add_vector(steering_vector(tiny, Site(3, "resid_post")), 1.0, positions="generated")
    ]
    with pytest.raises(RuntimeError, match="there were no positions 'generated'"):
        run(tiny, steering, tokens, mask)
    run(tiny, steering, tokens, mask, prompt_length=4)  # said by the caller: its own responsibility


def test_counts_say_how_often_each_site_was_reached(tiny):
    site = Site(0, "mlp_out")
    with (
        torch.no_grad(),
        intervene(tiny, [add_vector(steering_vector(tiny, site), 1.0)]) as steering,
    ):
        assert steering.fired == {site: 0}
        tiny.generate(
            padded([4], "left")[0],
            max_new_tokens=3,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )
    assert steering.fired == {site: 3}
    assert steering.prompt_length == 4


# Where steering ends.


def test_an_intervention_ends_after_so_many_generated_tokens(tiny):
    """With a cache, the prompt and the first two generated columns are steered, no later ones."""
    steering = Steering(prompt_length=3)
    activation = torch.zeros(1, 1, 4)
    columns = []
    for past, new in ((0, 3), (3, 1), (4, 1), (5, 1)):
        steering.past, steering.new = past, new
        columns.append(steering.selected("all", activation.expand(1, new, 4), 2))
    assert columns == [True, True, True, False]
    steering.past, steering.new = 0, 6
    mask = steering.selected("generated", torch.zeros(1, 6, 4), 2)
    assert mask[0].tolist() == [False, False, False, True, True, False]
    assert (
        steering.selected("prompt", torch.zeros(1, 6, 4), 0)[0].tolist() == [True] * 3 + [False] * 3
    )


def test_an_end_before_the_first_generated_token_leaves_the_prompt_only(tiny):
    vector = torch.randn(tiny.cfg.d_model, generator=torch.Generator().manual_seed(0))
    site = Site(1, "resid_post")
    whole = [Intervention(site, AddVector(vector, 5.0), "all", until=0)]
    prompt_only = [Intervention(site, AddVector(vector, 5.0), "prompt")]
    asked = [Prompt("a", "How do I fix a bicycle?", None, "harmless", "neutral", "test")]
    texts = [
        generate(tiny, asked, steering, decoding=Decoding(max_new_tokens=8))[0].tokens
        for steering in (whole, prompt_only)
    ]
    assert texts[0] == texts[1]


def test_a_vector_of_a_chat_model_steers_its_base_model_when_asked_to(tiny, tmp_path_factory):
    """The base model has other weights, the same architecture and no chat template."""
    base = load_model(
        tiny_model("llama3", tmp_path_factory.mktemp("base") / "base", seed=3), device="cpu"
    )
    base.tokenizer.chat_template = None
    prompts = [
        Prompt(f"p{i}", f"What is in the garden {i}?", None, "fraud", "unsafe", "test")
        for i in range(3)
    ]
    steering = [add_vector(steering_vector(tiny, Site(1, "resid_post")), rho=0.8)]
    with pytest.raises(ValueError, match=r"refit it, or pass transfer=True"):
        generate(base, prompts, steering, decoding=Decoding(max_new_tokens=4))
    steered = generate(base, prompts, steering, decoding=Decoding(max_new_tokens=4), transfer=True)
    assert [c.tokens for c in steered] != [
        c.tokens for c in generate(base, prompts, decoding=Decoding(max_new_tokens=4))
    ]
