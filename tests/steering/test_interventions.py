"""Interventions: what they change, where, when, and that nothing of them stays behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.tiny_models import D_MLP, D_MODEL, LAYERS, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.forward import prefix_cache, reading, rows_of_cache
from workbench.models.load import load_model, model_info
from workbench.models.sites import Site
from workbench.models.tokens import encode, stop_ids
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import Steering, intervene
from workbench.steering.interventions import (
    AblateDirection,
    AddVector,
    ClampNeurons,
    Intervention,
    ScaleNeurons,
    ablate_direction,
    add_vector,
    clamp_neurons,
    scale_neurons,
)
from workbench.steering.vectors import SteeringVector

EDITABLE = ("resid_pre", "resid_post", "attn_out", "mlp_out")
EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model of the architecture of ``tiny``: its chat model, say."""
    return load_model(
        tiny_model("llama3", tmp_path_factory.mktemp("other") / "other", seed=1), device="cpu"
    )


def steering_vector(model, site, seed=0, scale=1.0):
    values = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)) * scale
    return SteeringVector(
        site, "fraud", values, "prompt_contrast", "content", 1.0, 3, 3, 20.0, model_info(model)
    )


def padded(lengths, side, width=None, seed=0):
    """Random tokens with padding on one side, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    tokens = torch.randint(10, 290, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    return tokens, mask


def run(model, interventions, tokens, mask, sites=(), **keywords):
    """Logits, and the activations at sites after the interventions."""
    seen = {}

    def reader(site):
        def read(activation, hook):
            seen[site] = activation.detach().flatten(2).clone()

        return read

    with (
        torch.no_grad(),
        intervene(model, interventions, **keywords),
        model.hooks(fwd_hooks=[(site.hook_name, reader(site)) for site in sites]),
    ):
        logits = model(tokens, attention_mask=mask)
    return logits, seen


@EXAMPLES
@given(
    kind=st.sampled_from(EDITABLE),
    layer=st.integers(0, LAYERS - 1),
    positions=st.sampled_from(["all", "prompt"]),
    side=st.sampled_from(["left", "right"]),
)
def test_multiplier_zero_is_bit_identical_to_the_unsteered_model(
    tiny, kind, layer, positions, side
):
    tokens, mask = padded([7, 3, 5], side)
    vector = steering_vector(tiny, Site(layer, kind), scale=100.0)
    plain, _ = run(tiny, [], tokens, mask)
    steered, _ = run(tiny, [add_vector(vector, 0.0, positions=positions)], tokens, mask)
    assert torch.equal(plain, steered)


@EXAMPLES
@given(
    kind=st.sampled_from(EDITABLE),
    layer=st.integers(0, LAYERS - 1),
    multiplier=st.floats(-3, 3),
    side=st.sampled_from(["left", "right"]),
    rows=st.sets(st.integers(0, 3)),
    prompt_length=st.integers(1, 8),
    positions=st.sampled_from(["all", "prompt", "generated"]),
)
def test_the_change_at_the_site_is_m_times_the_vector_there_and_zero_elsewhere(
    tiny, kind, layer, multiplier, side, rows, prompt_length, positions
):
    tokens, mask = padded([8, 2, 5, 1], side)
    site = Site(layer, kind)
    vector = steering_vector(tiny, site)
    _, before = run(tiny, [], tokens, mask, [site])
    intervention = add_vector(vector, multiplier, positions=positions).for_rows(rows)
    _, after = run(tiny, [intervention], tokens, mask, [site], prompt_length=prompt_length)
    inside = mask.bool() & torch.tensor([row in rows for row in range(4)])[:, None]
    columns = torch.arange(8) < prompt_length
    if positions != "all":
        inside &= columns if positions == "prompt" else ~columns
    change = after[site] - before[site]
    torch.testing.assert_close(
        change[inside],
        (multiplier * vector.vector).expand(int(inside.sum()), -1),
        atol=1e-5,
        rtol=0,
    )
    assert torch.equal(after[site][~inside], before[site][~inside])


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_steering_the_output_of_a_block_is_steering_the_input_of_the_next(tiny, layer):
    tokens, mask = padded([7, 3], "left")
    vector = steering_vector(tiny, Site(layer, "resid_post"))
    next_block = dataclasses.replace(vector, site=Site(layer + 1, "resid_pre"))
    first, _ = run(tiny, [add_vector(vector, 1.5)], tokens, mask)
    second, _ = run(tiny, [add_vector(next_block, 1.5)], tokens, mask)
    plain, _ = run(tiny, [], tokens, mask)
    assert torch.equal(first, second)
    assert not torch.allclose(first, plain)


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_what_is_added_to_a_branch_arrives_in_the_residual_stream(tiny, kind):
    tokens, mask = padded([6, 6], "left")
    vector = steering_vector(tiny, Site(1, kind))
    arrival = Site(1, "resid_mid") if kind == "attn_out" else Site(1, "resid_post")
    _, before = run(tiny, [], tokens, mask, [arrival])
    _, after = run(tiny, [add_vector(vector, 2.0)], tokens, mask, [arrival])
    change = after[arrival] - before[arrival]
    torch.testing.assert_close(change, (2.0 * vector.vector).expand_as(change), atol=1e-5, rtol=0)


def test_editing_resid_mid_is_refused_with_the_site_that_does_the_same(tiny):
    vector = steering_vector(tiny, Site(2, "resid_mid"))
    with pytest.raises(
        ValueError, match=r"L2\.resid_mid can be read but not edited.*L2\.attn_out instead"
    ):
        run(tiny, [add_vector(vector, 1.0)], *padded([4], "left"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_their_own_vectors_multipliers_and_positions_are_the_rows_run_alone(tiny, side):
    tokens, mask = padded([8, 3, 6, 5], side)
    own = [
        [add_vector(steering_vector(tiny, Site(1, "attn_out"), seed=1), 2.0)],
        [],
        [
            add_vector(
                steering_vector(tiny, Site(1, "attn_out"), seed=2), -1.0, positions="prompt"
            ),
            add_vector(steering_vector(tiny, Site(2, "resid_post"), seed=3), 0.5),
        ],
        [
            *ablate_direction(steering_vector(tiny, Site(1, "attn_out"), seed=4)),
            *scale_neurons([(2, 3), (2, 9)], 0.0),
        ],
    ]
    together, _ = run(
        tiny, [i.for_rows([row]) for row, each in enumerate(own) for i in each], tokens, mask
    )
    for row, interventions in enumerate(own):
        real = mask[row].bool()
        alone, _ = run(tiny, interventions, tokens[row : row + 1, real], mask[row : row + 1, real])
        torch.testing.assert_close(together[row, real], alone[0], atol=2e-5, rtol=1e-5)


def test_interventions_at_one_site_are_applied_in_their_order(tiny):
    tokens, mask = padded([5], "left")
    site = Site(1, "resid_post")
    vector = steering_vector(tiny, site)
    _, last_ablated = run(
        tiny, [add_vector(vector, 3.0), *ablate_direction(vector)], tokens, mask, [site]
    )
    _, last_added = run(
        tiny, [*ablate_direction(vector), add_vector(vector, 3.0)], tokens, mask, [site]
    )
    torch.testing.assert_close(
        last_ablated[site] @ vector.direction, torch.zeros(1, 5), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        last_added[site] @ vector.direction,
        torch.full((1, 5), 3.0 * vector.norm),
        atol=1e-4,
        rtol=0,
    )


@EXAMPLES
@given(target=st.floats(-5, 5), layer=st.integers(0, LAYERS - 1), kind=st.sampled_from(EDITABLE))
def test_ablation_leaves_the_target_along_the_direction_and_all_else_alone(
    tiny, target, layer, kind
):
    tokens, mask = padded([6, 4], "left")
    site = Site(layer, kind)
    vector = steering_vector(tiny, site)
    u = vector.direction
    _, before = run(tiny, [], tokens, mask, [site])
    _, after = run(tiny, ablate_direction(vector, target=target), tokens, mask, [site])
    real = mask.bool()
    torch.testing.assert_close(after[site][real] @ u, torch.full((10,), target), atol=1e-4, rtol=0)
    across = [a[site][real] - (a[site][real] @ u)[:, None] * u for a in (before, after)]
    torch.testing.assert_close(*across, atol=1e-4, rtol=0)


def test_ablation_at_several_sites(tiny):
    tokens, mask = padded([6], "left")
    sites = [Site(layer, "resid_post") for layer in range(LAYERS)]
    vector = steering_vector(tiny, sites[0])
    _, after = run(tiny, ablate_direction(vector, sites=sites), tokens, mask, sites)
    for site in sites:
        assert (after[site] @ vector.direction).abs().max() < 1e-4


def test_scaled_and_clamped_neurons_are_exact_and_the_others_untouched(tiny):
    tokens, mask = padded([7, 4], "left")
    site, chosen = Site(1, "mlp_post"), [3, 17, 40]
    others = [n for n in range(D_MLP) if n not in chosen]
    _, before = run(tiny, [], tokens, mask, [site])
    for factor in (0.0, -2.0, 0.5):
        _, after = run(tiny, scale_neurons([(1, n) for n in chosen], factor), tokens, mask, [site])
        real = mask.bool()
        assert torch.equal(after[site][real][:, chosen], before[site][real][:, chosen] * factor)
        assert torch.equal(after[site][real][:, others], before[site][real][:, others])
    values = [0.25, -1.5, 3.0]
    _, after = run(
        tiny, clamp_neurons([(1, n) for n in reversed(chosen)], values[::-1]), tokens, mask, [site]
    )
    assert torch.equal(after[site][mask.bool()][:, chosen], torch.tensor(values).expand(11, -1))
    assert torch.equal(after[site][mask.bool()][:, others], before[site][mask.bool()][:, others])
    assert torch.equal(after[site][~mask.bool()], before[site][~mask.bool()])


def test_neurons_of_several_layers_become_one_intervention_a_layer():
    edits = clamp_neurons([(2, 5), (0, 1), (2, 3)], [1.0, 2.0, 3.0])
    assert [(str(i.site), i.edit.neurons, i.edit.values.tolist()) for i in edits] == [
        ("L0.mlp_post", (1,), [2.0]),
        ("L2.mlp_post", (5, 3), [1.0, 3.0]),
    ]


def test_edits_leave_their_input_as_it_is():
    activation = torch.randn(2, 3, 8)
    before = activation.clone()
    u = torch.randn(8)
    for edit in (
        AddVector(u, 2.0),
        AblateDirection(u / u.norm()),
        ScaleNeurons((1, 2), 0.0),
        ClampNeurons((1, 2), torch.ones(2)),
    ):
        edited = edit(activation)
        assert edited.data_ptr() != activation.data_ptr()
        assert not torch.equal(edited, before)
        assert torch.equal(activation, before)


# Positions under a key-value cache and without one: the columns that were changed, whoever decodes.
PROMPT, NEW = 6, 5


def changed_columns(model, positions, decode):
    """Per pass, what an intervention changed at its site: the readers stand before and behind it."""
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


def state(model):
    """Everything an intervention could leave behind."""
    return (
        [len(point.fwd_hooks) for point in model.hook_dict.values()],
        len(model.original_model._forward_pre_hooks),
        [len(module._forward_hooks) for module in model.modules()],
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


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


def refused(model, interventions, match, **keywords):
    before = state(model)
    with pytest.raises(ValueError, match=match), intervene(model, interventions, **keywords):
        pytest.fail("the block was entered")
    assert state(model) == before


def test_what_does_not_fit_the_model_is_refused_before_anything_runs(tiny):
    narrow = Intervention(Site(1, "resid_post"), AddVector(torch.ones(D_MODEL - 1)))
    refused(
        tiny,
        [narrow],
        rf"width {D_MODEL - 1} does not fit L1\.resid_post, which has width {D_MODEL}",
    )
    refused(
        tiny,
        [Intervention(Site(1, "mlp_post"), AddVector(torch.ones(D_MODEL)))],
        f"has width {D_MLP}",
    )
    refused(
        tiny,
        [Intervention(Site(1, "resid_post"), AblateDirection(torch.ones(D_MLP)))],
        f"width {D_MLP}",
    )
    refused(tiny, scale_neurons([(1, D_MLP)], 0.0), f"width {D_MLP + 1} does not fit")
    refused(tiny, clamp_neurons([(1, D_MLP + 3)], [0.0]), f"width {D_MLP + 4} does not fit")
    refused(
        tiny,
        [Intervention(Site(40, "resid_post"), AddVector(torch.ones(D_MODEL)))],
        r"4 layers \(0-3\)",
    )
    refused(
        tiny,
        [ablate_direction(steering_vector(tiny, Site(1, "resid_post")))],
        r"got a list in it; .*\*ablate",
    )
    with pytest.raises(
        ValueError, match="unknown positions 'answer'; allowed: all, prompt, generated"
    ):
        add_vector(steering_vector(tiny, Site(1, "resid_post")), 1.0, positions="answer")
    with pytest.raises(ValueError, match="either multiplier or rho"):
        add_vector(steering_vector(tiny, Site(1, "resid_post")))
    with pytest.raises(ValueError, match="one value per neuron, got 1 for 2"):
        clamp_neurons([(1, 1), (1, 2)], [0.0])
    with pytest.raises(ValueError, match="neuron must be a whole number from 0, got -1"):
        scale_neurons([(1, -1)], 0.0)


@pytest.mark.parametrize("edit", [AddVector(torch.ones(D_MODEL)), ScaleNeurons((1,), 0.0)])
def test_rows_beyond_the_batch_are_refused(tiny, edit):
    tokens, mask = padded([4, 4], "left")
    intervention = Intervention(Site(1, "resid_post"), edit)
    for rows in ([2], [-1]):
        with pytest.raises(ValueError, match=rf"names row {rows[0]} of a batch of 2 rows \(0-1\)"):
            run(tiny, [intervention.for_rows(rows)], tokens, mask)


def test_an_edit_that_changes_the_shape_is_refused(tiny):
    with pytest.raises(
        RuntimeError,
        match=r"the edit at L1\.resid_post returned shape \(1, 4, 16\) for \(1, 4, 32\)",
    ):
        run(
            tiny, [Intervention(Site(1, "resid_post"), lambda a: a[..., :16])], *padded([4], "left")
        )


def test_a_vector_of_another_model_needs_transfer_and_the_same_architecture(tiny, other):
    vector = steering_vector(other, Site(1, "resid_post"))
    refused(tiny, [add_vector(vector, 1.0)], "refit it, or pass transfer=True")
    steered, _ = run(tiny, [add_vector(vector, 1.0)], *padded([4], "left"), transfer=True)
    assert not torch.equal(steered, run(tiny, [], *padded([4], "left"))[0])
    taller = dataclasses.replace(vector, model=dataclasses.replace(vector.model, n_layers=5))
    refused(tiny, [add_vector(taller, 1.0)], "only models of one architecture", transfer=True)


def test_a_model_in_bfloat16_takes_float32_vectors(tmp_path):
    model = load_model(tiny_model("llama3", tmp_path / "tiny"), device="cpu", dtype="bfloat16")
    tokens, mask = padded([6, 4], "left")
    site = Site(1, "resid_post")
    vector = steering_vector(model, site)
    assert vector.vector.dtype == torch.float32
    interventions = [
        add_vector(vector, 2.0),
        *ablate_direction(vector, target=1.0),
        *scale_neurons([(2, 1)], 0.5),
    ]
    logits, after = run(model, interventions, tokens, mask, [site])
    assert logits.dtype == after[site].dtype == torch.bfloat16
    _, before = run(model, [], tokens, mask, [site])
    _, after = run(model, [add_vector(vector, 2.0)], tokens, mask, [site])
    change = (after[site] - before[site]).float()[mask.bool()]
    scale = after[site].float().abs().max()
    torch.testing.assert_close(
        change, (2.0 * vector.vector).expand_as(change), atol=float(scale) / 128, rtol=0
    )
    prompt = Prompt("a", "plan a garden", None, "fraud", "unsafe", "test")
    assert generate(model, [prompt], interventions, decoding=Decoding(max_new_tokens=3))


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma2", "qwen3", "olmo2"])
def test_every_family_is_changed_where_it_is_steered(family, family_model):
    model = family_model(family)
    tokens, mask = padded([6, 4], "left")
    sites = [Site(1, kind) for kind in (*EDITABLE, "mlp_post", "z")]
    sites = [site for site in sites if site.hook_name in model.hook_dict]
    plain, before = run(model, [], tokens, mask, sites)
    for site in sites:
        vector = torch.randn(before[site].shape[-1], generator=torch.Generator().manual_seed(0))
        logits, after = run(
            model, [Intervention(site, AddVector(vector, 2.0))], tokens, mask, [site]
        )
        change = (after[site] - before[site])[mask.bool()]
        torch.testing.assert_close(change, (2.0 * vector).expand_as(change), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits, plain), site


def test_an_intervention_ends_after_so_many_generated_tokens(tiny):
    """Token by token with a cache: prompt and the first two generated columns are steered, later ones are not."""
    steering = Steering(prompt_length=3)
    activation = torch.zeros(1, 1, 4)
    chosen = []
    for past, new in ((0, 3), (3, 1), (4, 1), (5, 1)):
        steering.past, steering.new = past, new
        chosen.append(steering.selected("all", activation.expand(1, new, 4), 2))
    assert chosen == [True, True, True, False]
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
        generate(tiny, asked, own, decoding=Decoding(max_new_tokens=8))[0].tokens
        for own in (whole, prompt_only)
    ]
    assert texts[0] == texts[1]


def test_an_end_before_the_start_is_refused():
    with pytest.raises(
        ValueError, match="until must be a number of generated tokens from 0, or None, got -1"
    ):
        Intervention(Site(1, "resid_post"), AddVector(torch.zeros(4)), until=-1)


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
