"""What is said of a gate: counted on held-out prompts, and beside other ways of gating."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny_models import D_MODEL

from workbench.evaluation.gating import (
    AT_RANDOM,
    CLOSED,
    ORACLE,
    REFUSAL,
    REFUSING,
    activation_rates,
    beside_a_gate,
    cells,
    confusion,
    opened_for,
    refusing,
    roc,
    wrapping_rates,
)
from workbench.evaluation.metrics import HEADLINE
from workbench.evaluation.result import Evaluation
from workbench.figures import front
from workbench.figures.gates import gate_confusion, gate_rates, gate_roc
from workbench.generation.answers import UNSTEERED, Completion
from workbench.models.activations import ActivationSet
from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.stats.estimates import wilson_interval
from workbench.stats.selectivity import Threshold
from workbench.steering.gates import Gate
from workbench.steering.layer_gates import LayerGate

READ = Site(0, "resid_post")
KINDS = (
    ("unsafe", "fraud"),
    ("unsafe", "malware"),
    ("safe", "fraud"),
    ("safe", "hard_safe"),
    ("neutral", "harmless"),
)


@pytest.fixture(scope="module")
def gate(tiny):
    """Two categories, read off one dimension each."""
    thresholds = {
        "neutral": Threshold(1.0, 0.02, 0.0, 0.1, 50),
        "hard_safe": Threshold(0.5, 0.1, 0.0, 0.2, 50),
    }
    return Gate(
        READ,
        "content",
        ("fraud", "malware"),
        torch.eye(2, D_MODEL),
        torch.zeros(2),
        thresholds,
        1.0,
        model_info(tiny),
    )


@pytest.fixture(scope="module")
def held_out(tiny):
    """Ten prompts per kind; for a few of each the gate is made to do the wrong thing."""
    prompts, rows = [], []
    for label, category in KINDS:
        for i in range(10):
            row = torch.zeros(D_MODEL)
            # Two of ten are missed, and the first is taken for the other category.
            if label == "unsafe" and i < 8:
                categories = ("fraud", "malware") if i else ("malware", "fraud")
                row[categories.index(category)] = 2.0
            if (label == "safe" and i < 3) or (label == "neutral" and i == 9):
                row[0] = 1.5
            rows.append(row)
            prompts.append(Prompt(f"{category}-{label}-{i}", "text", None, category, label, "test"))
    return ActivationSet(READ, torch.stack(rows), tuple(prompts), "content", model_info(tiny))


def test_activation_rates_are_counted_by_kind_and_category(gate, held_out):
    rates = activation_rates(gate, held_out).set_index(["set", "category"])
    assert rates.loc[("risky", "all"), ["rate", "n", "own_rate"]].tolist() == [0.8, 20, 0.7]
    assert rates.loc[("risky", "all"), ["own_low", "own_high"]].tolist() == pytest.approx(
        wilson_interval(14, 20)
    )
    assert rates.loc[("twins", "all"), ["rate", "n", "asked"]].tolist() == [0.3, 10, 0.1]
    assert rates.loc[("look-alikes", "all"), "rate"] == 0.3
    assert rates.loc[("neutral", "all"), ["rate", "asked"]].tolist() == [0.1, 0.02]
    low, high = wilson_interval(8, 10)
    assert rates.loc[("risky", "fraud"), ["low", "high"]].tolist() == [low, high]
    assert math.isnan(rates.loc[("twins", "all"), "own_rate"])


def test_confusion_says_for_which_category_the_gate_opened(gate, held_out):
    table = confusion(gate, held_out).set_index(["truth", "opened"])["n"]
    assert table["fraud"].to_dict() == {"fraud": 7, "malware": 1, CLOSED: 2}
    assert table["look-alikes"].to_dict() == {"fraud": 3, "malware": 0, CLOSED: 7}
    assert table.sum() == len(held_out.prompts)


def test_the_curve_passes_through_the_threshold_and_its_area_is_the_aurocs(gate, held_out):
    curve = roc(gate, held_out)
    for _, against_one in curve.groupby("against"):
        area = np.trapezoid(against_one["recall"], against_one["false_rate"])
        assert area == pytest.approx(against_one["auroc"].iloc[0])
        assert (against_one["recall"].diff().dropna() >= 0).all()
    twins = curve[curve["against"] == "twins"]
    assert twins[twins["recall"] == 0.8]["false_rate"].min() == 0.0


def test_activations_of_another_place_are_refused(gate, held_out):
    with pytest.raises(ValueError, match="cache those activations"):
        roc(
            gate,
            ActivationSet(
                Site(1, "resid_post"), held_out.values, held_out.prompts, "content", held_out.model
            ),
        )


def evaluation(prompts, conditions):
    """Scores that tell the condition: the headline is 1 where it steered."""
    rows, completions = [], []
    for name, value in conditions.items():
        for place, p in enumerate(prompts):
            completions.append(Completion(p, name, (place, int(value)), "eos", name))
            for metric in (HEADLINE, "refusal", "degenerate"):
                score = value if metric == HEADLINE else 0.0
                rows.append((name, p.category, p.label, p.id, metric, score))
    frame = pd.DataFrame(
        rows, columns=["condition", "category", "label", "prompt_id", "metric", "value"]
    )
    return Evaluation(frame, UNSTEERED, tuple(completions), "judge")


def test_an_oracle_steers_exactly_the_risky_and_a_random_gate_as_many_as_fired(gate, held_out):
    opened = {
        p.id: c != CLOSED for p, c in zip(held_out.prompts, opened_for(gate, held_out), strict=True)
    }
    scored = evaluation(held_out.prompts, {UNSTEERED: 0.0, "steered": 1.0, "gated": 1.0})
    beside = beside_a_gate(scored, opened, "steered", "gated", seed=3)
    wide = beside.scores[beside.scores["metric"] == HEADLINE].pivot(
        index="prompt_id", columns="condition", values="value"
    )
    is_risky = {p.id: float(p.label == "unsafe") for p in held_out.prompts}
    assert wide[ORACLE].to_dict() == is_risky
    assert wide[AT_RANDOM].sum() == sum(opened.values())
    again = beside_a_gate(scored, opened, "steered", "gated", seed=3)
    pd.testing.assert_frame_equal(beside.scores, again.scores)
    texts = {(c.prompt.id, c.condition): c.text for c in beside.completions}
    assert all(
        texts[i, ORACLE] == ("steered" if risky else UNSTEERED) for i, risky in is_risky.items()
    )
    with pytest.raises(ValueError, match="no answers under 'strong'"):
        beside_a_gate(scored, opened, "strong", "gated")
    with pytest.raises(ValueError, match="is not known"):
        beside_a_gate(scored, {}, "steered", "gated")


def test_the_four_cells_count_prompts_and_identical_answers(gate, held_out):
    opened = {
        p.id: c != CLOSED for p, c in zip(held_out.prompts, opened_for(gate, held_out), strict=True)
    }
    scored = evaluation(held_out.prompts, {UNSTEERED: 0.0, "gated": 1.0})
    table = cells(scored, opened, "gated").set_index(["gate", "prompts"])
    assert table["n"].to_dict() == {
        ("open", "risky"): 16,
        ("open", "safe"): 7,
        ("closed", "risky"): 4,
        ("closed", "safe"): 23,
    }
    assert (table["identical"] == 0).all()
    assert (table[f"{HEADLINE}_after"] == 1).all()


def test_refusing_where_it_fires_leaves_the_other_answers(tiny, gate, held_out):
    opened = {p.id: p.label == "unsafe" for p in held_out.prompts}
    answers = [Completion(p, "an answer", (1, 2), "eos", UNSTEERED) for p in held_out.prompts]
    refused = refusing(answers, opened, tiny)
    assert {c.condition for c in refused} == {REFUSING}
    assert all((c.text == REFUSAL) == opened[c.prompt.id] for c in refused)


def test_the_figures_of_a_gate_and_a_front_hold_every_row(gate, held_out):
    assert len(gate_rates(activation_rates(gate, held_out)).data) == 4
    assert len(gate_roc(roc(gate, held_out)).data) == 3
    shown = gate_confusion(confusion(gate, held_out)).data[0]
    assert sum(int(text) for line in shown.text for text in line) == len(held_out.prompts)
    tried = pd.DataFrame(
        [
            {
                "construction": c, "sites": "L1.resid_post", "sign": 1, "rho": r,
                "positions": "all", "until": None, "round": 0,
                "metric": metric, "value": value, "front": r == 0.1, "chosen": r == 0.1,
            }
            for c, r in (("unsteered", 0.0), ("a<b>", 0.1), ("a<b>", 0.2))
            for metric, value in ((HEADLINE, r), ("relevance", 1 - r))
        ]
    )  # fmt: skip
    figure = front(tried)
    assert [len(trace.x) for trace in figure.data] == [2, 1, 1]
    assert "<b>" not in figure.data[0].name
    with pytest.raises(ValueError, match="'chosen' is missing"):
        front(tried.drop(columns="chosen"))


def test_a_prompt_of_two_categories_counts_in_both_and_either_is_its_own(gate, held_out):
    """One that the gate takes for its further category is opened for the right one."""
    place = next(i for i, p in enumerate(held_out.prompts) if p.category == "fraud")
    both = replace(held_out.prompts[place], more_categories=("malware",))
    assert opened_for(gate, held_out)[place] == "malware"
    prompts = (*held_out.prompts[:place], both, *held_out.prompts[place + 1 :])
    before, after = (
        activation_rates(gate, acts).query("set == 'risky'").set_index("category")
        for acts in (held_out, replace(held_out, prompts=prompts))
    )
    assert after["n"].to_dict() == {"all": 20, "fraud": 10, "malware": 11}
    assert after.loc["fraud", "own_rate"] == pytest.approx(before.loc["fraud", "own_rate"] + 0.1)


def test_rates_are_counted_by_wrapping_and_kind_with_their_auroc(gate, held_out):
    wrapped = {"none": held_out.prompts, "risky alone": held_out.prompts[:10]}
    rates = wrapping_rates(gate, {READ: held_out}, wrapped).set_index(["wrapping", "set"])
    plain = activation_rates(gate, held_out).set_index(["set", "category"])
    for kind in ("risky", "twins", "look-alikes", "neutral"):
        expected = plain.loc[(kind, "all"), ["rate", "low", "high", "n"]].tolist()
        assert rates.loc[("none", kind), ["rate", "low", "high", "n"]].tolist() == expected
    # 16 of 20 risky prompts score 2, the rest 0; 3 of 10 twins score 1.5, the rest 0
    assert rates.loc[("none", "twins"), "auroc"] == pytest.approx(0.8 + 0.2 * 0.7 / 2)
    assert (
        rates.loc[("none", "twins"), "auroc_low"]
        < 0.87
        < rates.loc[("none", "twins"), "auroc_high"]
    )
    # 18 of 20 risky prompts are reached at a score of 0 only, which all twins have
    assert rates.loc[("none", "twins"), "at_recall_90"] == 1.0
    assert np.isnan(rates.loc[("none", "risky"), ["auroc", "at_recall_90"]]).all()
    assert rates.loc["risky alone"].index.tolist() == ["risky"]
    assert rates.loc[("risky alone", "risky"), "rate"] == 0.8
    with pytest.raises(ValueError, match=r"no activations of it"):
        wrapping_rates(gate, {}, wrapped)


def test_a_gate_over_layers_is_counted_like_one_that_reads_one_layer(gate, held_out):
    """One site, projections and the same weights make the same gate."""
    over_layers = LayerGate(
        (READ,),
        "content",
        gate.categories,
        "joint_probe",
        torch.zeros(1, D_MODEL),
        gate.weights[None],
        torch.eye(2)[:, None],
        gate.bias,
        gate.thresholds,
        1.0,
        gate.model,
    )
    acts, wrapped = {READ: held_out}, {"none": held_out.prompts}
    pd.testing.assert_frame_equal(
        wrapping_rates(over_layers, acts, wrapped), wrapping_rates(gate, acts, wrapped)
    )
