"""Gates over layers: planted truths at several sites, and answers that they let be steered."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.gates import questions, vector
from helpers.tiny_models import D_MODEL, LAYERS

from workbench.generation.answers import UNSTEERED, sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import ActivationSet, cache_activations
from workbench.models.errors import CannotBeDone
from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.prompts.attacks import wrap_in_turn
from workbench.prompts.prompt import Prompt
from workbench.stats.selectivity import Threshold
from workbench.steering.edits import AddVector
from workbench.steering.interventions import ablate_direction, suppress
from workbench.steering.layer_gates import (
    PENALTIES,
    LayerGate,
    choose_layer_gate,
    fit_layer_gate,
    load_layer_gate,
    open_conditions,
    save_layer_gate,
)

SITES = tuple(Site(layer, "resid_post") for layer in range(3))
ALL_SITES = tuple(Site(layer, "resid_post") for layer in range(LAYERS))
WAYS = tuple(PENALTIES)
CLASSES = (
    ("unsafe", "fraud"),
    ("unsafe", "malware"),
    ("safe", "fraud"),
    ("neutral", "harmless"),
)


def planted(model, n, fold, seed, *, sites=SITES, strength=4.0, wrapped=False):
    """Plant a dimension a category at every site; wrapped prompts have another one in common."""
    generator = torch.Generator().manual_seed(seed)
    prompts, values = [], {site: [] for site in sites}
    for label, category in CLASSES:
        for i in range(n):
            prompts.append(
                Prompt(f"{fold}-{category}-{label}-{i}", "a text", None, category, label, "test")
            )
    if wrapped:
        prompts += wrap_in_turn([p for p in prompts if p.label != "neutral"])
    for prompt in prompts:
        for site in sites:
            row = torch.randn(D_MODEL, generator=generator)
            if prompt.label == "unsafe":
                row[("fraud", "malware").index(prompt.category)] += strength
            if "+" in prompt.id:
                row[2] += 3 * strength
            values[site].append(row)
    info = model_info(model)
    return {
        site: ActivationSet(site, torch.stack(rows), tuple(prompts), "content", info)
        for site, rows in values.items()
    }


def opened(gate, acts):
    return (gate.opening(gate.scores(acts)) > 0).any(dim=1)


def rows(acts, label, *, wrapped=None):
    prompts = acts[SITES[0]].prompts
    return torch.tensor(
        [p.label == label and (wrapped is None or ("+" in p.id) == wrapped) for p in prompts]
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_planted_category_opens_the_gate_and_the_thresholds_keep_their_rates(tiny, way):
    fit, tune = planted(tiny, 60, "fit", 0), planted(tiny, 100, "tune", 1)
    gate = fit_layer_gate(fit, tune, way=way)
    new = planted(tiny, 100, "test", 2)
    opening = gate.opening(gate.scores(new))
    assert gate.categories == ("fraud", "malware")
    for place, category in enumerate(gate.categories):
        of_category = rows(new, "unsafe") & torch.tensor(
            [p.category == category for p in new[SITES[0]].prompts]
        )
        assert opening[of_category, place].mean() > 0.95
    for label, name, rate in (("neutral", "neutral", 0.02), ("safe", "hard_safe", 0.10)):
        assert opened(gate, tune)[rows(tune, label)].float().mean() <= rate
        assert opened(gate, new)[rows(new, label)].float().mean() < rate + 0.07
        assert gate.thresholds[name].rate == rate
        assert gate.thresholds[name].n == 100


@pytest.mark.parametrize("way", WAYS)
def test_the_sign_is_kept_and_a_prompt_on_the_other_side_does_not_open_it(tiny, way):
    gate = fit_layer_gate(planted(tiny, 60, "fit", 0), planted(tiny, 100, "tune", 1), way=way)
    strong, opposite = (
        planted(tiny, 20, "test", 2, strength=strength) for strength in (12.0, -12.0)
    )
    assert opened(gate, strong)[rows(strong, "unsafe")].all()
    assert not opened(gate, opposite)[rows(opposite, "unsafe")].any()


def test_the_mean_of_cosines_is_that_of_a_loop_by_hand(tiny):
    fit = planted(tiny, 20, "fit", 0)
    gate = fit_layer_gate(fit, planted(tiny, 60, "tune", 1))
    new = planted(tiny, 5, "test", 2)
    prompts = fit[SITES[0]].prompts
    fraud = torch.tensor([p.label == "unsafe" and p.category == "fraud" for p in prompts])
    benign = torch.tensor([p.label != "unsafe" for p in prompts])
    by_hand = []
    for site in SITES:
        center = fit[site].values[benign].mean(dim=0)
        direction = fit[site].values[fraud].mean(dim=0) - center
        centered = new[site].values - center
        by_hand.append(torch.nn.functional.cosine_similarity(centered, direction[None]))
    expected = torch.stack(by_hand).mean(dim=0)
    torch.testing.assert_close(gate.scores(new)[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_wrapped_twins_must_not_open_it_and_count_for_the_threshold(tiny, way):
    fit, tune = (
        planted(tiny, 60, "fit", 0, wrapped=True),
        planted(tiny, 100, "tune", 1, wrapped=True),
    )
    gate = fit_layer_gate(fit, tune, way=way)
    assert gate.thresholds["hard_safe"].n == 200
    new = planted(tiny, 60, "test", 2, wrapped=True)
    assert opened(gate, new)[rows(new, "safe", wrapped=True)].float().mean() < 0.2
    plain = planted(tiny, 60, "fit", 0), planted(tiny, 100, "tune", 1)
    assert fit_layer_gate(*plain, way=way).thresholds["hard_safe"].n == 100


def test_cosines_are_weighted_by_what_other_prompts_say_of_them(tiny):
    """Nothing is planted: a gate that scored prompts by their own part in it would open for all."""
    fit = planted(tiny, 30, "fit", 0, strength=0.0)
    gate = fit_layer_gate(fit, planted(tiny, 100, "tune", 1), way="weighted_cosines", penalty=1.0)
    scores = gate.scores(planted(tiny, 100, "test", 2, strength=0.0)).amax(dim=1)
    new = planted(tiny, 100, "test", 2, strength=0.0)
    risky, safe = scores[rows(new, "unsafe")], scores[rows(new, "safe")]
    assert abs(risky.mean() - safe.mean()) < 0.5
    assert gate.combine.abs().amax() < 40


def test_the_gate_that_ranks_the_tune_fold_best_is_chosen_and_all_are_told(tiny):
    fit, tune = planted(tiny, 30, "fit", 0), planted(tiny, 60, "tune", 1, strength=2.0)
    gate, tried = choose_layer_gate(fit, tune, penalties={**PENALTIES, "joint_probe": (1e3,)})
    assert set(tried["way"]) == set(WAYS)
    best = tried.loc[tried["auroc"].idxmax()]
    assert gate.way == best["way"]
    again = fit_layer_gate(fit, tune, way=best["way"], penalty=best["penalty"])
    torch.testing.assert_close(gate.scores(tune), again.scores(tune))
    only_safe = [p for p in tune[SITES[0]].prompts if p.label == "safe"]
    without_risk = {site: acts.of(only_safe) for site, acts in tune.items()}
    with pytest.raises(CannotBeDone, match=r"got 0 and 60"):
        choose_layer_gate(fit, without_risk)


def test_a_saved_gate_over_layers_comes_back_the_same(tiny, tmp_path):
    tune = planted(tiny, 5, "tune", 1)
    gate = fit_layer_gate(planted(tiny, 20, "fit", 0), tune, neutral_rate=0.01, form="soft")
    assert gate.threshold == math.inf
    assert "5 neutral prompts" in gate.why_closed
    assert not gate.opening(gate.scores(tune)).any()
    save_layer_gate(tmp_path / "gate.safetensors", gate)
    back = load_layer_gate(tmp_path / "gate.safetensors")
    assert torch.equal(back.scores(tune), gate.scores(tune))
    for field in ("sites", "categories", "thresholds", "model", "form", "way", "scale", "span"):
        assert getattr(back, field) == getattr(gate, field)
    (tmp_path / "gate.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"damaged"):
        load_layer_gate(tmp_path / "gate.safetensors")


def test_folds_that_do_not_fit_are_refused(tiny):
    fit, tune = planted(tiny, 10, "fit", 0), planted(tiny, 10, "tune", 1)
    with pytest.raises(ValueError, match=r"is in both folds"):
        fit_layer_gate(fit, fit)
    with pytest.raises(ValueError, match=r"the same sites"):
        fit_layer_gate(fit, {SITES[0]: tune[SITES[0]]})
    with pytest.raises(ValueError, match=r"Did you mean 'mean_cosine'"):
        fit_layer_gate(fit, tune, way="mean_cosin")
    gate = fit_layer_gate(fit, tune)
    with pytest.raises(ValueError, match=r"L0\.resid_post is not among"):
        gate.scores({SITES[1]: tune[SITES[1]]})


def of_real_activations(model, value, form="hard"):
    """Make a gate over all layers of a tiny model that opens above a value of its score."""
    torch.manual_seed(3)
    acts = cache_activations(model, questions(12), ALL_SITES)
    directions = torch.nn.functional.normalize(torch.randn(LAYERS, 2, D_MODEL), dim=-1)
    gate = LayerGate(
        ALL_SITES,
        "content",
        ("fraud", "malware"),
        "mean_cosine",
        torch.stack([acts[site].values.mean(dim=0) for site in ALL_SITES]),
        directions,
        torch.eye(2)[:, None].repeat(1, LAYERS, 1) / LAYERS,
        torch.zeros(2),
        {"neutral": Threshold(value, 0.02, 0.0, 1.0, 3)},
        0.5,
        model_info(model),
        form,
    )
    return gate, gate.scores(acts)


def both(model, rho=0.4):
    return {c: [suppress(vector(model, i, c), rho)] for i, c in enumerate(("fraud", "malware"))}


def test_prompts_it_stays_closed_for_are_answered_bit_for_bit_and_the_others_are_steered(tiny):
    prompts = questions(12)
    _, scores = of_real_activations(tiny, 0.0)
    middle = float(scores.amax(dim=1).median())
    gate, _ = of_real_activations(tiny, middle)
    condition = open_conditions(tiny, gate, prompts, both(tiny))
    expected = (scores.amax(dim=1) > middle).tolist()
    assert [bool(condition[p.id]) for p in prompts] == expected
    for p, row in zip(prompts, scores, strict=True):
        for one in condition[p.id]:
            assert one.label.endswith(gate.categories[int(row.argmax())])
    decoding = Decoding(max_new_tokens=8)
    answers = sweep(tiny, prompts, {UNSTEERED: (), "opened": condition}, decoding)
    alone = sweep(tiny, prompts, {UNSTEERED: ()}, decoding)
    assert [a.tokens for a in answers[:12]] == [a.tokens for a in alone]
    same = [a.tokens == b.tokens for a, b in zip(alone, answers[12:], strict=True)]
    log_probs = [a.log_probs == b.log_probs for a, b in zip(alone, answers[12:], strict=True)]
    for i, is_open in enumerate(expected):
        assert is_open or (same[i] and log_probs[i])
    assert not all(same)


def test_a_gate_that_stays_closed_for_all_is_the_unsteered_model(tiny):
    gate, _ = of_real_activations(tiny, math.inf)
    condition = open_conditions(tiny, gate, questions(4), both(tiny))
    assert condition == {p.id: [] for p in questions(4)}
    answers = sweep(
        tiny, questions(4), {UNSTEERED: (), "closed": condition}, Decoding(max_new_tokens=6)
    )
    assert [a.tokens for a in answers[:4]] == [a.tokens for a in answers[4:]]


def test_an_open_gate_steers_like_no_gate(tiny):
    gate, scores = of_real_activations(tiny, -math.inf)
    gate = dataclasses.replace(gate, scale=1.0)
    condition = open_conditions(tiny, gate, questions(4), both(tiny))
    by_hand = {
        p.id: both(tiny)[gate.categories[int(row.argmax())]]
        for p, row in zip(questions(4), scores, strict=False)
    }
    answers = sweep(
        tiny, questions(4), {"gate": condition, "hand": by_hand}, Decoding(max_new_tokens=6)
    )
    assert [a.tokens for a in answers[:4]] == [a.tokens for a in answers[4:]]


def test_a_soft_gate_weakens_added_vectors_and_refuses_edits_without_a_strength(tiny):
    gate, scores = of_real_activations(tiny, 0.0, form="soft")
    highest, best = scores.amax(dim=1), scores.argmax(dim=1)
    condition = open_conditions(tiny, gate, questions(12), both(tiny))
    some_between = False
    for p, score, place in zip(questions(12), highest.tolist(), best.tolist(), strict=True):
        share = min(max(score / gate.scale, 0.0), 1.0)
        full = both(tiny)[gate.categories[place]][0].edit
        some_between |= 0 < share < 1
        assert len(condition[p.id]) == (share > 0)
        for one in condition[p.id]:
            assert isinstance(one.edit, AddVector)
            assert one.edit.multiplier == pytest.approx(share * full.multiplier, rel=1e-5)
    assert some_between
    with pytest.raises(ValueError, match=r"take a hard gate"):
        open_conditions(
            tiny, gate, questions(12), {c: ablate_direction(vector(tiny)) for c in gate.categories}
        )


def test_a_gate_is_refused_by_another_model_category_or_form(tiny):
    gate, _ = of_real_activations(tiny, 0.0)
    with pytest.raises(ValueError, match=r"Did you mean 'fraud'"):
        open_conditions(tiny, gate, questions(1), {"frauds": []})
    other = dataclasses.replace(gate, model=dataclasses.replace(gate.model, fingerprint="0" * 16))
    with pytest.raises(ValueError, match=r"fit it again"):
        open_conditions(tiny, other, questions(1), both(tiny))
    with pytest.raises(ValueError, match=r"hard or soft, got 'stepwise'"):
        dataclasses.replace(gate, form="stepwise")
    with pytest.warns(UserWarning, match=r"promises nothing there"):
        open_conditions(tiny, gate, questions(1), both(tiny), system_prompt="Be brief.")
