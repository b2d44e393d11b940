"""Steering vectors: planted truths come back, and every switch does what it says.

Controls have what they control for, and cards keep what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers.numpy_vectors import by_numpy
from helpers.openings import CATEGORIES, OPENINGS, prompts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.files.store import read_tensors, write_tensors
from workbench.models.activations import ActivationSet, cache_activations
from workbench.models.load import ModelInfo
from workbench.models.sites import Site
from workbench.prompts.contrasts import sides_to_fit
from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene
from workbench.steering.combine import own_part, pooled, summed, without
from workbench.steering.estimators import mean_difference, pruned_mean_difference
from workbench.steering.interventions import AddVector, Intervention, add_vector
from workbench.steering.vectors import (
    SteeringVector,
    fit_steering_vectors,
    load_vector,
    random_vector,
    save_vector,
    scaled_to,
    shuffled_vector,
    with_safe_projection,
)

D = 24
SITE = Site(1, "resid_post")
INFO = ModelInfo("made-up", None, 4, D, 48, 4, "float32", "raw", "0123456789abcdef")
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def direction_of(category, seed=0):
    u = torch.randn(
        D, generator=torch.Generator().manual_seed(seed + 100 * CATEGORIES.index(category) + 1)
    )
    return u / u.norm()


def planted(n=40, strength=6.0, noise=1.0, seed=0, site=SITE, prompts=None):
    """Move a category's unsafe rows ``strength`` away from all others, against its direction."""
    prompts = prompts or prompts_of(n)
    generator = torch.Generator().manual_seed(seed)
    topic = {p.pair_id: 3 * torch.randn(D, generator=generator) for p in prompts}
    values = torch.stack([topic[p.pair_id] if p.pair_id else torch.zeros(D) for p in prompts])
    values += noise * torch.randn(len(prompts), D, generator=generator) + 2.0
    for row, p in enumerate(prompts):
        if p.label == "unsafe":
            values[row] -= strength * direction_of(p.category)
    return ActivationSet(site, values, tuple(prompts), "content", INFO)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def vector_of(values, site=SITE, site_norm=10.0, **changes):
    fields = {
        "category": "fraud",
        "method": "prompt_contrast",
        "span": "content",
        "kept": 1.0,
        "n_unsafe": 5,
        "n_safe": 7,
    }
    fields |= changes
    return SteeringVector(
        site=site, vector=torch.tensor(values), site_norm=site_norm, model=INFO, **fields
    )


# Planted truths.


@pytest.mark.parametrize("safe_side", ["paired", "generic"])
@pytest.mark.parametrize("pruning", ["none", "top", "bottom", "random"])
def test_a_planted_direction_is_recovered(safe_side, pruning):
    # Topics differ from question to question: pairs cancel them, a generic pool needs more rows.
    activations = planted(400 if safe_side == "paired" else 3000, strength=15.0)
    for category, vector in fit_steering_vectors(
        activations, safe_side=safe_side, pruning=pruning
    ).items():
        assert cosine(vector.vector, direction_of(category)) > 0.99, category


def test_vectors_point_from_unsafe_to_safe():
    activations = planted()
    for safe_side in ("paired", "generic"):
        for category, vector in fit_steering_vectors(activations, safe_side=safe_side).items():
            unsafe = activations.select(category=category, label="unsafe").values @ vector.direction
            safe = activations.select(category=category, label="safe").values @ vector.direction
            assert safe.mean() > unsafe.mean() + 3
            assert add_vector(vector, 1.0).edit.multiplier > 0
            moved = activations.select(category=category, label="unsafe").values + vector.vector
            assert abs(float((moved @ vector.direction).mean() - safe.mean())) < 2


def test_a_direction_planted_in_a_model_is_found_by_both_constructions(tiny):
    """Texts read with and without a vector added inside the model differ by that vector."""
    site = Site(2, "resid_post")
    u = 5 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    prompts = {
        label: [
            Prompt(
                f"{label}{i}",
                f"question {i} about a garden",
                "Here is an answer.",
                "fraud",
                label,
                "test",
                f"pair{i}",
            )
            for i in range(12)
        ]
        for label in ("unsafe", "safe")
    }
    for span, method in (("content", "prompt_contrast"), ("response", "answer_contrast")):
        safe = cache_activations(tiny, prompts["safe"], site, span=span)[site]
        with intervene(tiny, [Intervention(site, AddVector(-u))]):
            unsafe = cache_activations(tiny, prompts["unsafe"], site, span=span)[site]
        both = dataclasses.replace(
            safe,
            values=torch.cat([safe.values, unsafe.values]),
            prompts=safe.prompts + unsafe.prompts,
        )
        for safe_side in ("paired", "generic"):
            vector = fit_steering_vectors(both, safe_side=safe_side, method=method)["fraud"]
            torch.testing.assert_close(vector.vector, u, atol=1e-4, rtol=1e-4)
            assert (vector.method, vector.span, vector.n_unsafe, vector.n_safe) == (
                method,
                span,
                12,
                12,
            )


def test_answer_contrast_reads_the_same_vector_from_teacher_forced_openings(tiny):
    """Safe minus unsafe answers, by hand, one text at a time."""
    site = Site(1, "attn_out")
    questions = [p for p in prompts_of(3) if p.label == "unsafe"]
    rows = answer_prompts(questions, OPENINGS, per_prompt=2)
    sites = [site, Site(1, "resid_post")]
    acts = cache_activations(tiny, rows, sites, span="response")
    vector = fit_steering_vectors(
        acts[site],
        residual=acts[sites[1]],
        safe_side="paired",
        method="answer_contrast",
        categories=["fraud"],
    )["fraud"]
    sums = {"safe": [], "unsafe": []}
    for row in rows:
        if row.category == "fraud":
            alone = cache_activations(tiny, [row], site, span="response")[site].values[0]
            sums[row.label].append(alone.double())
    expected = torch.stack(sums["safe"]).mean(dim=0) - torch.stack(sums["unsafe"]).mean(dim=0)
    torch.testing.assert_close(vector.vector.double(), expected, atol=1e-5, rtol=1e-5)
    assert (vector.n_unsafe, vector.n_safe) == (6, 6)


def test_fitted_vectors_are_the_pruned_difference_of_their_rows():
    activations = planted(11)
    values, prompts = activations.values, activations.prompts
    unsafe = values[[p.category == "malware" and p.label == "unsafe" for p in prompts]]
    twins = values[[p.category == "malware" and p.label == "safe" for p in prompts]]
    neutral = values[[p.label == "neutral" for p in prompts]]
    for safe_side, safe in (("paired", twins), ("generic", neutral)):
        for pruning in ("none", "top", "bottom"):
            vectors = fit_steering_vectors(
                activations, categories=["malware"], safe_side=safe_side, pruning=pruning, keep=0.3
            )
            assert list(vectors) == ["malware"]
            vector = vectors["malware"]
            np.testing.assert_allclose(
                vector.vector.numpy(),
                by_numpy(unsafe, safe, 0.3, pruning, safe_side == "paired"),
                atol=1e-5,
            )
            assert vector.kept == (1.0 if pruning == "none" else 0.3)
            assert (vector.n_unsafe, vector.n_safe) == (11, len(safe))
            assert vector.site_norm == pytest.approx(float(values.norm(dim=1).mean()), rel=1e-5)


def test_pairing_goes_by_pair_id_not_by_row_order():
    prompts = list(prompts_of(20))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1)).tolist()
    activations = planted(20)
    shuffled = dataclasses.replace(
        activations,
        values=activations.values[order],
        prompts=tuple(activations.prompts[i] for i in order),
    )
    for kwargs in ({"safe_side": "paired"}, {"safe_side": "paired", "pruning": "top"}):
        one, other = (
            fit_steering_vectors(a, **kwargs)["fraud"].vector for a in (activations, shuffled)
        )
        torch.testing.assert_close(one, other)


def test_unsafe_rows_without_a_twin_are_left_out_of_pairs():
    activations = planted(10)
    without = [p for p in activations.prompts if p.id not in ("fraud-3-safe", "fraud-7-safe")]
    vector = fit_steering_vectors(activations.of(without), safe_side="paired")["fraud"]
    assert (vector.n_unsafe, vector.n_safe) == (8, 8)


def test_where_nothing_is_neutral_the_generic_side_is_every_safe_row():
    activations = planted(6)
    no_neutral = activations.of([p for p in activations.prompts if p.label != "neutral"])
    assert fit_steering_vectors(no_neutral)["fraud"].n_safe == 12


# Refusal filter.


@pytest.mark.parametrize("safe_side", ["paired", "generic"])
def test_the_refusal_filter_keeps_or_drops_safe_rows(safe_side):
    activations = planted(10)
    label = "safe" if safe_side == "paired" else "neutral"
    refusals = {p.id for i, p in enumerate(activations.prompts) if p.label == label and i % 3 == 0}
    filtered = {}
    for how in ("keep", "drop"):
        filtered[how] = fit_steering_vectors(
            activations,
            safe_side=safe_side,
            refusals=refusals,
            refusal_filter=how,
            categories=["fraud"],
        )["fraud"]
        safe = [
            p
            for p in activations.prompts
            if p.label == label and (safe_side == "generic" or p.category == "fraud")
        ]
        safe = [p for p in safe if (p.id in refusals) == (how == "keep")]
        pairs = {p.pair_id for p in safe}
        unsafe = [
            p
            for p in activations.prompts
            if p.label == "unsafe"
            and p.category == "fraud"
            and (safe_side == "generic" or p.pair_id in pairs)
        ]
        expected = mean_difference(activations.of(unsafe).values, activations.of(safe).values)
        torch.testing.assert_close(filtered[how].vector, expected, atol=1e-5, rtol=1e-5)
        assert (filtered[how].n_unsafe, filtered[how].n_safe) == (len(unsafe), len(safe))
    whole = fit_steering_vectors(activations, safe_side=safe_side)["fraud"]
    assert filtered["keep"].n_safe + filtered["drop"].n_safe == whole.n_safe


# Strength.


@EXAMPLES
@given(
    rho=st.floats(-2, 2).filter(lambda x: x == 0 or abs(x) > 1e-6),
    norm=st.floats(1e-3, 1e3),
    site_norm=st.floats(1e-3, 1e3),
)
def test_rho_and_multiplier_are_each_others_inverse(rho, norm, site_norm):
    vector = vector_of([norm, 0.0, 0.0], site_norm=site_norm)
    multiplier = vector.multiplier_for(rho)
    assert math.copysign(1, multiplier) == math.copysign(1, rho)
    assert vector.rho(multiplier) == pytest.approx(abs(rho))
    assert abs(multiplier) * vector.norm / site_norm == pytest.approx(abs(rho))
    assert add_vector(vector, rho=rho).edit.multiplier == multiplier


def test_relative_strength_is_relative_to_the_residual_stream():
    attention = planted(10, site=Site(1, "attn_out"))
    residual = dataclasses.replace(attention, site=SITE, values=attention.values * 30)
    bare = fit_steering_vectors(attention)["fraud"]
    assert math.isnan(bare.site_norm)
    with pytest.raises(
        ValueError,
        match=r"relative strength at L1\.attn_out needs .*residual=activations at L1\.resid_post",
    ):
        bare.multiplier_for(0.1)
    vector = fit_steering_vectors(attention, residual=residual)["fraud"]
    assert vector.site_norm == pytest.approx(float(residual.values.norm(dim=1).mean()), rel=1e-6)
    assert vector.vector.equal(bare.vector)
    for wrong in (dataclasses.replace(residual, site=Site(2, "resid_post")), attention):
        with pytest.raises(ValueError, match="must be of the residual stream of layer 1"):
            fit_steering_vectors(attention, residual=wrong)
    stranger = dataclasses.replace(residual, model=dataclasses.replace(INFO, fingerprint="other"))
    with pytest.raises(ValueError, match="residual must be of the same model"):
        fit_steering_vectors(attention, residual=stranger)


def test_a_zero_vector_has_no_direction_and_no_strength():
    zero = vector_of([0.0, 0.0])
    with pytest.raises(ValueError, match="is zero: it has no direction"):
        _ = zero.direction
    with pytest.raises(ValueError, match="no multiplier gives it a strength"):
        zero.multiplier_for(0.1)


# Controls.


def test_controls_have_the_norm_of_what_they_control():
    activations = planted(30)
    vectors = fit_steering_vectors(activations)
    vector = vectors["fraud"]
    paired = fit_steering_vectors(activations, safe_side="paired")["fraud"]
    controls = [
        random_vector(vector, seed=0),
        random_vector(vector, seed=1),
        shuffled_vector(vector, activations, seed=0),
        shuffled_vector(paired, activations, seed=0, safe_side="paired"),
        scaled_to(vectors["malware"], vector.norm),
    ]
    for control in controls:
        norm = paired.norm if control is controls[3] else vector.norm
        assert control.norm == pytest.approx(norm, rel=1e-5)
        assert control.site == vector.site
        assert control.site_norm == vector.site_norm
        assert abs(cosine(control.vector, vector.vector)) < 0.9
    assert [c.method for c in controls[:4]] == ["random", "random", "shuffled", "shuffled"]
    assert len({c.category for c in controls[:3]}) == 3
    assert random_vector(vector, seed=1).vector.equal(controls[1].vector)
    assert not controls[0].vector.equal(controls[1].vector)


def test_random_controls_favour_no_direction():
    vector = vector_of([1.0] + [0.0] * (D - 1))
    draws = torch.stack([random_vector(vector, seed=seed).vector for seed in range(2000)])
    assert draws.mean(dim=0).abs().max() < 4 / math.sqrt(2000 * D)
    assert abs(float(draws[:, 0].var()) * D - 1) < 0.2


@pytest.mark.parametrize("safe_side", ["paired", "generic"])
def test_shuffled_labels_lose_the_planted_direction(safe_side):
    activations = planted(60)
    vector = fit_steering_vectors(activations, safe_side=safe_side)["fraud"]
    cosines = [
        cosine(
            shuffled_vector(vector, activations, seed=seed, safe_side=safe_side).vector,
            vector.vector,
        )
        for seed in range(60)
    ]
    assert abs(float(np.mean(cosines))) < 0.3
    assert cosine(vector.vector, direction_of("fraud")) > 0.8


def test_a_control_needs_the_activations_of_its_vector():
    activations = planted(10)
    vector = fit_steering_vectors(activations)["fraud"]
    with pytest.raises(
        ValueError, match=r"a control at L1\.resid_post .* needs activations from there, got .*L2"
    ):
        shuffled_vector(
            vector, dataclasses.replace(activations, site=Site(2, "resid_post")), seed=0
        )
    with pytest.raises(ValueError, match="no rows to shuffle for category 'fraud/random0'"):
        shuffled_vector(random_vector(vector, seed=0), activations, seed=0)


# Files.


def test_a_saved_vector_comes_back_bit_by_bit(tmp_path):
    activations = planted(7)
    for vector in (
        fit_steering_vectors(activations, pruning="top", keep=0.3)["fraud"],
        vector_of(
            [1.0] * D, Site(3, "attn_out"), math.nan, method="answer_contrast", span="response"
        ),
    ):
        path = tmp_path / "deep" / "vector.safetensors"
        save_vector(path, vector)
        back = load_vector(path)
        assert back.vector.equal(vector.vector)
        assert back.vector.dtype == torch.float32
        for field in dataclasses.fields(SteeringVector):
            if field.name not in ("vector", "site_norm", "safe_projection"):
                assert getattr(back, field.name) == getattr(vector, field.name), field.name
        for name in ("site_norm", "safe_projection"):
            found, expected = getattr(back, name), getattr(vector, name)
            assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_the_card_says_what_the_vector_is(tmp_path):
    from safetensors import safe_open

    save_vector(tmp_path / "v.safetensors", vector_of([3.0, 4.0] + [0.0] * (D - 2)))
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        card = json.loads(file.metadata()["card"])
    assert card["site"] == "L1.resid_post"
    assert card["sign"] == "from unsafe to safe"
    assert card["norm"] == 5.0
    assert card["model"]["fingerprint"] == INFO.fingerprint
    assert set(card["versions"]) == {"workbench", "torch", "transformer-lens"}


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "v.safetensors"
    save_vector(path, vector_of([1.0] * D))
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-7],
        "empty": b"",
        "changed numbers": whole[:-2] + bytes([whole[-2] ^ 0x40]) + whole[-1:],
        "another file": b"{}",
    }
    for name, content in damaged.items():
        path.write_bytes(content)
        expected = "import_vectors" if name in ("empty", "another file") else "damaged"
        with pytest.raises(ValueError, match=expected) as error:
            load_vector(path)
        assert "\n" not in str(error.value), name
        assert "delete" not in str(error.value), name
    with pytest.raises(FileNotFoundError, match="no file"):
        load_vector(tmp_path / "none.safetensors")
    write_tensors(path, {"other": torch.ones(3)}, {"site": "L1.resid_post"})
    with pytest.raises(ValueError, match="is no steering vector"):
        load_vector(path)
    for site in (17, "L1", "L1.residual"):
        write_tensors(path, {"vector": torch.ones(3)}, {"site": site})
        with pytest.raises(ValueError, match="is no steering vector"):
            load_vector(path)
    save_vector(path, vector_of([1.0] * (D + 1)))
    with pytest.raises(ValueError, match="is not the one of its card"):
        load_vector(path)


# Bad input.


def test_what_cannot_be_fitted_is_refused():
    activations = planted(4)

    def refused(match, acts=activations, **kwargs):
        with pytest.raises(ValueError, match=match):
            fit_steering_vectors(acts, **kwargs)

    refused(
        "no unsafe prompts of category 'frauds'; categories: fraud, malware. Did you mean 'fraud'",
        categories=["frauds"],
    )
    refused("no unsafe rows: a steering vector needs a risk category", categories=[])
    refused("no unsafe rows", activations.select(label="neutral"))
    refused(
        "no safe rows for category 'fraud' with safe_side='generic'",
        activations.select(label="unsafe"),
    )
    refused(
        "no unsafe rows for category 'fraud' with safe_side='paired'",
        activations.select(label="unsafe"),
        safe_side="paired",
    )
    refused("unknown safe_side 'twins'; allowed: paired, generic", safe_side="twins")
    refused("unknown pruning 'middle'; prunings: none, top, bottom, random", pruning="middle")
    refused("keep must be a fraction above 0 and up to 1, got 0", pruning="top", keep=0)
    refused("keep must be a fraction above 0 and up to 1, got nan", pruning="top", keep=math.nan)
    refused(
        "unknown refusal_filter 'maybe'; allowed: none, keep, drop",
        refusal_filter="maybe",
        refusals=[],
    )
    refused("a refusal filter needs refusals", refusal_filter="drop")
    refused(
        "no safe rows for category 'fraud'.*refusal_filter='keep'",
        refusal_filter="keep",
        refusals=[],
    )
    at_neurons = dataclasses.replace(activations, site=Site(1, "mlp_post"))
    refused(
        r"lives in the residual stream: fit it at resid_pre, .*, not at L1\.mlp_post", at_neurons
    )
    values = activations.values.clone()
    values[0, 3] = math.inf
    refused(
        "an activation is infinite or not a number", dataclasses.replace(activations, values=values)
    )
    with pytest.raises(ValueError, match="widths differ: 3 and 4"):
        mean_difference(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="both sides need rows, got 0 unsafe and 2 safe"):
        mean_difference(torch.ones(0, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="as many safe as unsafe rows, got 3 and 2"):
        pruned_mean_difference(torch.ones(2, 3), torch.ones(3, 3), paired=True)


# Where the safe side lies along a vector.


@pytest.mark.parametrize("safe_side", ["generic", "paired"])
def test_a_fit_says_where_its_safe_rows_lie_along_the_vector(safe_side):
    activations = planted(9)
    vectors = fit_steering_vectors(activations, safe_side=safe_side)
    for category, vector in vectors.items():
        _, safe = sides_to_fit(activations.prompts, category, safe_side)
        expected = float((activations.values[safe] @ vector.direction).mean())
        assert vector.safe_projection == pytest.approx(expected, abs=1e-4)
        assert scaled_to(vector, 3.0).safe_projection == vector.safe_projection
        assert math.isnan(random_vector(vector, seed=0).safe_projection)
        again = with_safe_projection(vector, activations, safe_side=safe_side)
        assert again.safe_projection == pytest.approx(vector.safe_projection, abs=1e-5)


def test_a_combined_vector_says_nothing_of_its_safe_side_until_it_is_measured():
    activations = planted(9)
    vectors = fit_steering_vectors(activations)
    one = vectors["fraud"]
    for made in (
        pooled(vectors)["fraud"],
        own_part(vectors)["fraud"],
        summed([one, pooled(vectors)["fraud"]]),
        without(one, [pooled(vectors)["fraud"]]),
        shuffled_vector(one, activations, seed=0),
    ):
        assert math.isnan(made.safe_projection)
        with pytest.raises(ValueError, match="measure it with with_safe_projection"):
            made.target_for(0.1)
        measured = with_safe_projection(made, activations, category="fraud")
        _, safe = sides_to_fit(activations.prompts, "fraud", "generic")
        expected = float((activations.values[safe] @ made.direction).mean())
        assert measured.safe_projection == pytest.approx(expected, abs=1e-4)
        assert measured.target_for(0.1) == pytest.approx(expected + 0.1 * one.site_norm, abs=1e-3)


def test_a_target_is_measured_at_the_vectors_own_site_on_safe_rows():
    activations = planted(9)
    vector = fit_steering_vectors(activations)["fraud"]
    elsewhere = planted(9, site=Site(2, "resid_post"))
    with pytest.raises(ValueError, match=r"a target at L1\.resid_post .* got .*L2"):
        with_safe_projection(vector, elsewhere)
    unsafe = activations.of([p for p in activations.prompts if p.label == "unsafe"])
    with pytest.raises(ValueError, match="no safe rows to measure a target of 'fraud'"):
        with_safe_projection(vector, unsafe)


def test_a_vector_saved_by_an_earlier_version_has_no_target(tmp_path):
    vector = fit_steering_vectors(planted(9))["fraud"]
    save_vector(tmp_path / "new.safetensors", vector)
    tensors, card = read_tensors(tmp_path / "new.safetensors")
    assert card.pop("safe_projection") == vector.safe_projection
    write_tensors(tmp_path / "old.safetensors", tensors, card)
    assert math.isnan(load_vector(tmp_path / "old.safetensors").safe_projection)
