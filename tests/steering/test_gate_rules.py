"""The rules of a gate by hand: its scores, thresholds and scale, and when it opens and closes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gates import READ, gate
from helpers.tiny_models import D_MODEL
from sklearn.linear_model import LogisticRegression

from workbench.models.activations import ActivationSet
from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.stats.selectivity import Threshold, conformal_threshold
from workbench.steering.gates import combined, fit_gate, load_gate, save_gate

KINDS = {
    "fraud": ("unsafe", "fraud"),
    "malware": ("unsafe", "malware"),
    "twin": ("safe", "fraud"),
    "neutral": ("neutral", "harmless"),
}


def fold(model: Any, name: str, counts: dict[str, int], seed: int) -> ActivationSet:
    """Activations far from zero, of a different spread in each dimension; twins lie near fraud."""
    generator = torch.Generator().manual_seed(seed)
    rows, prompts = [], []
    for kind, n in counts.items():
        label, category = KINDS[kind]
        for i in range(n):
            row = 5.0 + torch.randn(D_MODEL, generator=generator) * torch.linspace(0.5, 3, D_MODEL)
            row[0] += {"fraud": 3.0, "twin": 1.5}.get(kind, 0.0)
            row[1] += {"malware": 3.0}.get(kind, 0.0)
            rows.append(row)
            prompts.append(Prompt(f"{name}-{kind}-{i}", "text", None, category, label, "test"))
    return ActivationSet(READ, torch.stack(rows), tuple(prompts), "content", model_info(model))


@pytest.fixture(scope="module")
def folds(tiny: Any) -> tuple[ActivationSet, ActivationSet]:
    fit = fold(tiny, "fit", {"fraud": 60, "malware": 25, "twin": 40, "neutral": 90}, 0)
    return fit, fold(tiny, "tune", {"fraud": 30, "malware": 20, "twin": 40, "neutral": 60}, 1)


def rows_of(acts: ActivationSet, label: str) -> list[int]:
    return [i for i, prompt in enumerate(acts.prompts) if prompt.label == label]


def highest(fitted: Any, acts: ActivationSet) -> np.ndarray:
    return (acts.values.double() @ fitted.weights.double().T + fitted.bias.double()).amax(1).numpy()


def test_scores_are_the_log_odds_of_a_category_against_all_safe_prompts(folds: Any) -> None:
    """Unbalanced classes, and values whose mean is far from zero."""
    fit, tune = folds
    fitted = fit_gate(fit, tune, penalty=2.0)
    values = fit.values.double().numpy()
    mean, scale = values.mean(axis=0), values.std(axis=0, ddof=1)
    classes = [p.category if p.label == "unsafe" else "safe" for p in fit.prompts]
    reference = LogisticRegression(C=0.5, max_iter=2000).fit((values - mean) / scale, classes)
    new = (tune.values.double().numpy() - mean) / scale
    log = reference.predict_log_proba(new)
    names = list(reference.classes_)
    expected = np.stack(
        [log[:, names.index(c)] - log[:, names.index("safe")] for c in fitted.categories], axis=1
    )
    np.testing.assert_allclose(fitted.scores(tune.values).numpy(), expected, atol=2e-3)


def test_a_smaller_penalty_lets_weights_grow(folds: Any) -> None:
    small, large = (fit_gate(*folds, penalty=penalty).weights.norm() for penalty in (0.5, 200.0))
    assert small > 1.5 * large


def test_each_threshold_is_the_conformal_one_of_its_own_set(folds: Any) -> None:
    fit, tune = folds
    fitted = fit_gate(fit, tune, neutral_rate=0.05, hard_rate=0.2)
    scores = highest(fitted, tune)
    for name, label, rate in (("neutral", "neutral", 0.05), ("hard_safe", "safe", 0.2)):
        expected = conformal_threshold(scores[rows_of(tune, label)], rate)
        assert fitted.thresholds[name].value == pytest.approx(expected.value, abs=1e-4)
        assert fitted.thresholds[name].n == expected.n
    assert fitted.threshold == max(t.value for t in fitted.thresholds.values())
    assert fitted.thresholds["neutral"].value != fitted.thresholds["hard_safe"].value


def test_the_scale_is_the_median_of_risky_prompts_that_pass(folds: Any) -> None:
    """Twins above the threshold, and risky prompts below it, do not count."""
    fit, tune = folds
    fitted = fit_gate(fit, tune, neutral_rate=0.3, hard_rate=0.5)
    above = highest(fitted, tune) - fitted.threshold
    assert (above[rows_of(tune, "safe")] > 0).any()
    risky = above[rows_of(tune, "unsafe")]
    assert (risky < 0).any()
    assert fitted.scale == pytest.approx(float(np.median(risky[risky > 0])), abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"site": Site(1, "resid_post")},
        {"span": "last"},
        {"model": "other"},
    ],
)
def test_folds_of_different_places_are_refused(folds: Any, change: dict[str, Any]) -> None:
    fit, tune = folds
    if change.get("model"):
        change = {"model": dataclasses.replace(tune.model, fingerprint="0" * 16)}
    with pytest.raises(ValueError, match="both folds need one site, span and model"):
        fit_gate(fit, dataclasses.replace(tune, **change))


def at(threshold: float) -> Threshold:
    return Threshold(threshold, 0.1, 0.0, 1.0, 20)


def opened(a_gate: Any, *scores: float, before: Any = None) -> list[float]:
    earlier = None if before is None else torch.tensor([before])
    return a_gate.opening(torch.tensor([scores]), earlier)[0].tolist()


def test_a_score_at_the_threshold_stays_closed(tiny: Any) -> None:
    for form in ("hard", "soft", "stepwise"):
        a_gate = gate(tiny, at(1.0), form=form)
        assert opened(a_gate, 1.0, 0.0) == [0, 0]
        assert opened(a_gate, 1.25, 0.0)[0] > 0


def test_a_stepwise_gate_closes_hysteresis_times_scale_below_the_threshold(tiny: Any) -> None:
    a_gate = gate(tiny, at(1.0), form="stepwise", hysteresis=0.5, scale=4.0)
    assert opened(a_gate, -0.9, -9.0, before=[1.0, 0.0]) == [1, 0]
    assert opened(a_gate, -1.1, -9.0, before=[1.0, 0.0]) == [0, 0]
    assert opened(a_gate, -0.9, -9.0, before=[0.0, 0.0]) == [0, 0]
    assert opened(gate(tiny, at(1.0), hysteresis=0.5), 0.9, -9.0, before=[1.0, 0.0]) == [0, 0]


def test_a_stepwise_gate_holds_one_category_at_a_time_unless_it_whitens(tiny: Any) -> None:
    fields = {"form": "stepwise", "hysteresis": 1.0, "scale": 2.0}
    one = gate(tiny, at(1.0), **fields)
    assert opened(one, 0.5, 3.0, before=[1.0, 0.0]) == [1, 0], "the open one stays alone"
    assert opened(one, -2.0, 3.0, before=[1.0, 0.0]) == [0, 1], "and then the other may open"
    several = gate(tiny, at(1.0), several="whitened", **fields)
    assert opened(several, 0.5, 3.0, before=[1.0, 0.0]) == [1, 1]


def test_several_categories_pass_one_by_one_or_together(tiny: Any) -> None:
    assert opened(gate(tiny, at(0.0)), 2.0, 3.0) == [0, 1]
    assert opened(gate(tiny, at(0.0), several="whitened"), 2.0, 3.0) == [1, 1]
    soft = gate(tiny, at(0.0), several="whitened", form="soft", scale=4.0)
    assert opened(soft, 2.0, 8.0) == [0.5, 1.0]


def test_whitened_vectors_below_the_cap_are_the_shortest_that_reach_each_length() -> None:
    """At right angles nothing is capped at the longest: their sum is longer, and so is cut."""
    vectors = torch.tensor([[[3.0, 0, 0], [0, 4.0, 0]]])
    total = combined(torch.ones(1, 2), vectors, "whitened")[0]
    torch.testing.assert_close(total, torch.tensor([3.0, 4.0, 0]) * 4 / 5, rtol=1e-3, atol=1e-3)
    # Two of one direction: each is reached by its own length; the mean of both, below the cap.
    alike = torch.tensor([[[2.0, 0, 0], [4.0, 0, 0]]])
    total = combined(torch.ones(1, 2), alike, "whitened")[0]
    torch.testing.assert_close(total, torch.tensor([3.0, 0, 0]), rtol=1e-3, atol=1e-3)
    # Half open counts half.
    half = combined(torch.tensor([[0.5, 0.0]]), vectors, "whitened")[0]
    torch.testing.assert_close(half, torch.tensor([1.5, 0, 0]), rtol=1e-3, atol=1e-3)


def test_gates_that_act_differently_have_different_keys(tiny: Any) -> None:
    a_gate = gate(tiny, at(1.0))
    others = [
        {"bias": torch.ones(2)},
        {"weights": a_gate.weights + 1},
        {"thresholds": {"neutral": at(2.0)}},
        {"scale": 2.0},
        {"hysteresis": 0.1},
        {"memory": 0.1},
        {"form": "soft"},
        {"several": "whitened"},
        {"span": "last"},
        {"site": Site(0, "resid_pre")},
    ]
    keys = [str(dataclasses.replace(a_gate, **change).key) for change in [{}, *others]]
    assert len(set(keys)) == len(keys)


def test_a_saved_gate_keeps_what_is_not_default(tiny: Any, tmp_path: Any) -> None:
    changed = gate(
        tiny, at(1.0), form="stepwise", several="whitened", hysteresis=0.25, memory=0.4, scale=3.0
    )
    save_gate(tmp_path / "gate.safetensors", changed)
    back = load_gate(tmp_path / "gate.safetensors")
    assert back.key == changed.key
    assert (back.hysteresis, back.memory, back.scale) == (0.25, 0.4, 3.0)


def test_a_gate_that_cannot_open_says_how_many_prompts_it_takes(tiny: Any) -> None:
    fit = fold(tiny, "fit", {"fraud": 10, "twin": 10, "neutral": 10}, 0)
    tune = fold(tiny, "tune", {"fraud": 10, "twin": 8, "neutral": 48}, 1)
    fitted = fit_gate(fit, tune)
    assert fitted.threshold == float("inf")
    assert fitted.why_closed == (
        "48 neutral prompts of the tune fold are too few to promise a rate of 0.02 (49 are needed) "
        "and 8 hard safe prompts of the tune fold are too few to promise a rate of 0.1 "
        "(9 are needed)"
    )
    enough = fold(tiny, "tune", {"fraud": 10, "twin": 9, "neutral": 49}, 1)
    assert fit_gate(fit, enough).why_closed == ""
