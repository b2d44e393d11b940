"""Interventions: what they change at a site, and which ones do not fit a model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.interventions import EDITABLE, EXAMPLES, padded, run, state, steering_vector
from helpers.tiny_models import D_MLP, D_MODEL, LAYERS, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene
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


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model of the architecture of ``tiny``: its chat model, say."""
    return load_model(
        tiny_model("llama3", tmp_path_factory.mktemp("other") / "other", seed=1), device="cpu"
    )


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
    of_row = [
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
        tiny, [i.for_rows([row]) for row, each in enumerate(of_row) for i in each], tokens, mask
    )
    for row, interventions in enumerate(of_row):
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
    site, neurons = Site(1, "mlp_post"), [3, 17, 40]
    others = [n for n in range(D_MLP) if n not in neurons]
    _, before = run(tiny, [], tokens, mask, [site])
    for factor in (0.0, -2.0, 0.5):
        _, after = run(tiny, scale_neurons([(1, n) for n in neurons], factor), tokens, mask, [site])
        real = mask.bool()
        assert torch.equal(after[site][real][:, neurons], before[site][real][:, neurons] * factor)
        assert torch.equal(after[site][real][:, others], before[site][real][:, others])
    values = [0.25, -1.5, 3.0]
    _, after = run(
        tiny, clamp_neurons([(1, n) for n in reversed(neurons)], values[::-1]), tokens, mask, [site]
    )
    assert torch.equal(after[site][mask.bool()][:, neurons], torch.tensor(values).expand(11, -1))
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


def test_an_end_before_the_start_is_refused():
    with pytest.raises(
        ValueError, match="until must be a number of generated tokens from 0, or None, got -1"
    ):
        Intervention(Site(1, "resid_post"), AddVector(torch.zeros(4)), until=-1)


@pytest.mark.parametrize(
    "strength", [{"rho": float("nan")}, {"multiplier": float("inf")}, {"rho": "a"}]
)
def test_a_strength_that_is_no_finite_number_is_refused(tiny, strength):
    with pytest.raises(ValueError, match="must be a finite number"):
        add_vector(steering_vector(tiny, Site(1, "resid_post")), **strength)


def test_a_strength_may_be_a_number_of_numpy(tiny):
    vector = steering_vector(tiny, Site(1, "resid_post"))
    strength = np.linspace(0.5, 1.5, 3, dtype=np.float32)[1]
    assert add_vector(vector, strength).edit.multiplier == 1.0
    assert add_vector(vector, rho=strength).edit.multiplier == vector.multiplier_for(1.0)
