"""Features stand in for neurons: attribution, silencing with controls, steering."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.sparse_autoencoders import random_tensors, write_sae_lens

from workbench.features.activations import cache_features
from workbench.features.attribution import FEATURE_COLUMNS, attribute_features
from workbench.features.sae import SparseAutoencoder, load_sae
from workbench.features.silencing import (
    feature_effect,
    feature_interventions,
    feature_vector,
    matched_features,
)
from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations, token_activations
from workbench.models.errors import CannotBeDone
from workbench.models.sites import Site, sites_of_kind
from workbench.neurons.effects import effects_table
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import fit_steering_vectors

SITE = Site(1, "resid_post")
PLANTED = 7


def pairs(places: range) -> list[Prompt]:
    """Write twins of one category, told apart by one word."""
    made = []
    for i in places:
        for label, word in (("unsafe", "steal"), ("safe", "wash")):
            name = f"{label}-{i}"
            text = f"How do I {word} car number {i} today?"
            made.append(Prompt(name, text, category="fraud", label=label, pair_id=f"pair-{i}"))
    return made


FIT, HELD_OUT = pairs(range(10, 20)), pairs(range(30, 40))


@pytest.fixture(scope="module")
def stream(tiny):
    return cache_activations(tiny, FIT, SITE)[SITE]


@pytest.fixture(scope="module")
def planted(tiny, stream) -> SparseAutoencoder:
    """An SAE of orthogonal directions, one of which, ``PLANTED``, tells the categories apart."""
    rows = torch.tensor([prompt.label == "unsafe" for prompt in FIT])
    u = stream.values[rows].mean(dim=0) - stream.values[~rows].mean(dim=0)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(tiny.cfg.d_model, 16, generator=generator)
    basis[:, 0] = u
    directions, _ = torch.linalg.qr(basis)
    directions[:, 0] *= torch.sign(directions[:, 0] @ u)
    order = [*range(1, PLANTED + 1), 0, *range(PLANTED + 1, 16)]
    rows_of = directions[:, order].T.contiguous()
    center = stream.values.mean(dim=0)
    return SparseAutoencoder(
        "planted",
        SITE,
        "standard",
        rows_of.T.contiguous(),
        rows_of,
        center,
        {"b_enc": torch.full((16,), 0.01)},
    )


@pytest.fixture(scope="module")
def folds(tiny, planted):
    return tuple(cache_features(tiny, fold, planted) for fold in (FIT, HELD_OUT))


def test_features_are_computed_at_each_token_and_then_pooled(tiny, tmp_path) -> None:
    d = tiny.cfg.d_model
    sae = load_sae(write_sae_lens(tmp_path / "sae", random_tensors("standard", d, 40)))
    prompts = [*FIT[:3], Prompt("long", "What is it that you do with a dog and a car?")]
    measured = cache_features(tiny, prompts, sae, batch_size=2)
    for row, prompt in enumerate(prompts):
        encoded, activations = token_activations(tiny, prompt, SITE)
        first, end = encoded.content
        features = sae.encode(activations[first:end])
        torch.testing.assert_close(measured.values[row], features.mean(dim=0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(sae.encode(activations[first:end].mean(dim=0)), features.mean(0))
    same = cache_activations(tiny, prompts, SITE)[SITE]
    torch.testing.assert_close(measured.stream.values, same.values, rtol=1e-4, atol=1e-5)


def test_explained_is_one_for_a_whole_basis_and_below_for_random_weights(tiny, tmp_path) -> None:
    d = tiny.cfg.d_model
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    zeros = torch.zeros(2 * d)
    whole = SparseAutoencoder(
        "whole", SITE, "standard", both.T.contiguous(), both, torch.zeros(d), {"b_enc": zeros}
    )
    assert cache_features(tiny, FIT, whole).explained == pytest.approx(1, abs=1e-5)
    wrong = load_sae(write_sae_lens(tmp_path / "sae", random_tensors("standard", d, 40)))
    assert cache_features(tiny, FIT, wrong).explained < 0.5


def test_attribution_finds_the_planted_feature_and_no_other(folds) -> None:
    table = attribute_features(*folds, n_permutations=200)
    assert list(table.columns) == list(FEATURE_COLUMNS)
    first = table.iloc[0]
    assert (first["feature"], first["rank"]) == (PLANTED, 1)
    assert first["contribution_share"] > 0.3
    assert first["survives"]
    assert first["auroc"] > 0.9
    assert table["contribution"].abs().nlargest(2).iloc[1] < first["contribution"] / 20


def test_parts_add_up_to_the_projected_difference(folds) -> None:
    fit, held_out = folds
    table = attribute_features(fit, held_out, n_permutations=10)
    parts = table.attrs["parts"]["fraud"]
    unsafe = torch.tensor([prompt.label == "unsafe" for prompt in HELD_OUT])
    x, u = held_out.stream.values.double(), fit.stream.values.double()
    in_fit = torch.tensor([prompt.label == "unsafe" for prompt in FIT])
    u = u[in_fit].mean(dim=0) - u[~in_fit].mean(dim=0)
    total = float((x[unsafe].mean(dim=0) - x[~unsafe].mean(dim=0)) @ u / u.norm())
    assert parts["total"] == pytest.approx(total, rel=1e-5)
    assert parts["features"] + parts["missed"] == pytest.approx(total, rel=1e-5)
    assert parts["features"] == pytest.approx(table["contribution"].sum(), rel=1e-6)
    differences = table["mean_unsafe"] - table["mean_reference"]
    written = (fit.sae.written.double() @ (u / u.norm()))[table["feature"].tolist()]
    np.testing.assert_allclose(table["contribution"], differences * written.numpy(), atol=1e-6)


def test_folds_that_do_not_fit_together_are_refused(tiny, folds, planted) -> None:
    fit, held_out = folds
    with pytest.raises(ValueError, match="prompts are in both folds"):
        attribute_features(fit, fit)
    with pytest.raises(ValueError, match="no unsafe prompts of category 'fruad'"):
        attribute_features(fit, held_out, categories=["fruad"])
    other = cache_features(tiny, HELD_OUT, planted, span="last")
    with pytest.raises(ValueError, match="one span"):
        attribute_features(fit, other)
    few = cache_features(tiny, HELD_OUT[:2], planted)
    with pytest.raises(CannotBeDone, match="1 unsafe and 1 reference"):
        attribute_features(fit, few)


def test_silencing_the_planted_feature_moves_prompts_and_random_features_do_not(
    tiny, folds, planted, stream
) -> None:
    fit, _ = folds
    vector = fit_steering_vectors(stream, safe_side="paired")["fraud"]
    controls = matched_features(fit, [PLANTED], vector.direction, n_sets=9)
    assert all(PLANTED not in {f for _, f in members} for members in controls.sets)
    unsafe = [prompt for prompt in HELD_OUT if prompt.label == "unsafe"]
    (effect,) = feature_effect(
        tiny, unsafe, {"planted": [PLANTED]}, fit, vector, controls={"planted": controls}
    )
    assert effect.estimate.low > 0.1
    assert max(map(abs, effect.controls)) < effect.estimate.value / 10
    assert effect.p == pytest.approx(0.1)
    assert effects_table([effect])["name"].tolist() == ["planted"]


def test_silencing_takes_away_what_the_feature_writes_and_keeps_the_rest(
    tiny, folds, planted
) -> None:
    prompt = HELD_OUT[0]
    _, before = token_activations(tiny, prompt, SITE)
    with intervene(tiny, feature_interventions(planted, [PLANTED])):
        _, after = token_activations(tiny, prompt, SITE)
    feature = planted.encode(before)[:, PLANTED]
    expected = before - feature[:, None] * planted.decoder[PLANTED]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert (feature > 0).any()
    silent = feature == 0
    assert torch.equal(after[silent], before[silent])


def test_clamping_gives_features_their_mean_on_safe_prompts(tiny, folds, planted) -> None:
    safe = cache_features(tiny, [p for p in FIT if p.label == "safe"], planted)
    clamped = feature_interventions(planted, [PLANTED, 3], "clamp", safe=safe)
    with intervene(tiny, clamped):
        _, after = token_activations(tiny, HELD_OUT[0], SITE)
    now = (after - planted.decoder_bias) @ planted.decoder[[PLANTED, 3]].T + 0.01
    wanted = safe.values[:, [PLANTED, 3]].mean(dim=0)
    _, before = token_activations(tiny, HELD_OUT[0], SITE)
    was_active = planted.encode(before)[:, PLANTED] > 0
    torch.testing.assert_close(
        now[was_active][:, 0], wanted[0].expand(int(was_active.sum())), rtol=1e-3, atol=1e-4
    )


def test_features_are_changed_while_answers_are_written(tiny, planted) -> None:
    plain = Decoding(max_new_tokens=6)
    question = "How do I steal a car?"
    free = generate(tiny, question, decoding=plain)[0].tokens
    every = feature_interventions(planted, range(16))
    assert generate(tiny, question, every, plain)[0].tokens != free
    # A feature that is never active changes nothing, bit for bit.
    dead = SparseAutoencoder(
        "dead", SITE, "standard", torch.zeros(tiny.cfg.d_model, 2),
        torch.ones(2, tiny.cfg.d_model), torch.zeros(tiny.cfg.d_model),
        {"b_enc": torch.full((2,), -1.0)},
    )  # fmt: skip
    with torch.no_grad():
        _, before = token_activations(tiny, question, SITE)
        with intervene(tiny, feature_interventions(dead, [0, 1])):
            _, after = token_activations(tiny, question, SITE)
    assert torch.equal(before, after)


def test_a_row_of_the_decoder_is_a_steering_vector(tiny, planted, stream) -> None:
    residual = cache_activations(tiny, FIT, SITE)[SITE]
    vector = feature_vector(
        planted, PLANTED, tiny, sign="safe_to_unsafe", category="fraud", residual=residual
    )
    torch.testing.assert_close(vector.vector, -planted.decoder[PLANTED])
    assert (vector.site, vector.category, vector.method) == (SITE, "fraud", "sae:planted/7")
    assert vector.site_norm == pytest.approx(residual.mean_norm())
    fitted = fit_steering_vectors(stream, safe_side="paired")["fraud"]
    assert float(vector.direction @ fitted.direction) == pytest.approx(1, abs=1e-4)
    steered = generate(tiny, "Where?", [add_vector(vector, rho=0.5)], Decoding(max_new_tokens=4))
    assert steered[0].text is not None


def test_what_does_not_fit_is_refused_before_anything_runs(tiny, chatless, folds, planted) -> None:
    with pytest.raises(ValueError, match="distinct features from 0 to 15, got 16"):
        feature_interventions(planted, [16])
    with pytest.raises(ValueError, match="distinct features"):
        feature_interventions(planted, [1, 1])
    with pytest.raises(ValueError, match="unknown method 'mean'"):
        feature_interventions(planted, [1], "mean")
    with pytest.raises(ValueError, match="'clamp' needs safe="):
        feature_interventions(planted, [1], "clamp")
    with pytest.raises(ValueError, match="sign must be"):
        feature_vector(planted, 1, tiny, sign="safe")
    narrow = SparseAutoencoder(
        "narrow", SITE, "standard", torch.zeros(3, 2), torch.ones(2, 3), torch.zeros(3),
        {"b_enc": torch.zeros(2)},
    )  # fmt: skip
    with pytest.raises(CannotBeDone, match="it is of another model"):
        cache_features(tiny, FIT, narrow)
    vector = feature_vector(planted, 1, tiny, sign="unsafe_to_safe")
    with pytest.raises(ValueError, match="were part of the measurement"):
        feature_effect(tiny, FIT[:1], {"a": [1]}, folds[0], vector)


def test_features_of_neurons_and_heads_have_sites_too(tiny) -> None:
    for kind in ("mlp_post", "z"):
        (site, *_) = sites_of_kind(tiny, kind)
        width = cache_activations(tiny, FIT[:1], site)[site].values.shape[1]
        tensors = random_tensors("standard", width, 20)
        sae = SparseAutoencoder(
            kind, site, "standard", tensors["W_enc"], tensors["W_dec"], tensors["b_dec"],
            {"b_enc": tensors["b_enc"]},
        )  # fmt: skip
        assert cache_features(tiny, FIT[:2], sae).values.shape == (2, 20)
        generate(tiny, "Hi", feature_interventions(sae, [1]), Decoding(max_new_tokens=2))
        with pytest.raises(ValueError, match="lives in the residual stream"):
            feature_vector(sae, 0, tiny, sign="unsafe_to_safe")
