"""Settings that say how a vector is applied: tried, named, kept in a run and read again."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers.category_vectors import CATEGORIES, SITE, questions, vectors_of, with_targets
from helpers.encoders import WordEncoder

from workbench.evaluation.scoring import score_completions
from workbench.figures.wording import how_applied
from workbench.generation.decoding import Decoding
from workbench.models.activations import ActivationSet
from workbench.models.load import model_info
from workbench.prompts.prompt import Prompt
from workbench.safesteer import saved_run
from workbench.safesteer.calibration import Round, calibrate, describe, in_words
from workbench.safesteer.conditions import ALWAYS, GATED, behind_gate, controls
from workbench.safesteer.run_folder import vector_file
from workbench.safesteer.settings import Setting, grid, steering
from workbench.steering.edits import AddVector, RaiseTo
from workbench.steering.vectors import save_vector

VARIANTS = [
    {},
    {"keep_norm": True},
    {"decay": "sqrt"},
    {"decay": "linear", "until": 8},
    {"form": "target"},
]


def test_names_of_plain_settings_stay_and_ways_have_names_of_their_own():
    settings = grid(["a"], [(SITE,)], [0.1], signs={"a": (1, -1)}, variants=VARIANTS)
    assert [s.name for s in settings] == [
        "a L1.resid_post +0.1",
        "a L1.resid_post +0.1 norm kept",
        "a L1.resid_post +0.1 decay sqrt",
        "a L1.resid_post +0.1 first 8 decay linear",
        "a L1.resid_post target +0.1",
        "a L1.resid_post -0.1",
        "a L1.resid_post -0.1 norm kept",
        "a L1.resid_post -0.1 decay sqrt",
        "a L1.resid_post -0.1 first 8 decay linear",
    ]


def test_a_variant_that_sets_what_an_extent_sets_comes_once():
    settings = grid(
        ["a"], [(SITE,)], [0.1], extents=[("all", None), ("all", 4)], variants=[{"until": 8}]
    )
    assert settings == [Setting("a", (SITE,), 1, 0.1, "all", 8)]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"strength": 2}, "cannot have 'strength'; allowed: positions, until, decay"),
        ({"form": "rotate"}, "unknown form 'rotate'; allowed: add, target"),
        ({"form": "target", "decay": "sqrt"}, "a target .* takes no decay and no keep_norm"),
        ({"form": "target", "keep_norm": True}, "a target .* takes no decay and no keep_norm"),
    ],
)
def test_a_variant_that_cannot_be_done_is_refused_before_anything_runs(variant, message):
    with pytest.raises(ValueError, match=message):
        grid(["a"], [(SITE,)], [0.1], variants=[variant])


def test_a_setting_is_applied_as_it_says(tiny):
    vectors = with_targets(vectors_of(tiny))
    way = Setting("a", (SITE,), -1, 0.2, "generated", 3, "linear", keep_norm=True)
    for category, (one,) in steering(vectors, way).items():
        assert (one.positions, one.until, one.decay) == ("generated", 3, "linear")
        assert one.edit.keep_norm
        expected = vectors["a", SITE][category].multiplier_for(-0.2)
        assert one.edit.multiplier == pytest.approx(expected)
    target = Setting("a", (SITE,), 1, 0.2, until=3, form="target")
    for category, (one,) in steering(vectors, target).items():
        assert isinstance(one.edit, RaiseTo)
        assert one.edit.target == pytest.approx(2.5 + 0.2 * 10.0)
        assert torch.equal(one.edit.direction, vectors["a", SITE][category].direction)
        assert one.until == 3


def test_a_target_needs_the_safe_sides_projection_and_the_vectors_own_direction(tiny):
    target = Setting("a", (SITE,), 1, 0.2, form="target")
    with pytest.raises(ValueError, match=r"a target at L1\.resid_post needs the safe side's mean"):
        steering(vectors_of(tiny), target)
    with pytest.raises(ValueError, match=r"along the vector \(sign 1\)"):
        steering(with_targets(vectors_of(tiny)), target._replace(sign=-1))


def test_a_calibration_keeps_the_ways_in_its_table_and_words(tiny, tmp_path):
    vectors = with_targets(vectors_of(tiny, ["a"]))
    how = {
        "score": partial(score_completions, tiny, encoder=WordEncoder()),
        "decoding": Decoding(max_new_tokens=3),
        "output": tmp_path / "tune.jsonl",
    }
    settings = grid(["a"], [(SITE,)], [0.3], variants=VARIANTS)
    tuned = calibrate(
        tiny, vectors, questions(2), settings, rounds=[Round(len(settings), 4)], **how
    )
    rows = tuned.table[tuned.table["construction"] == "a"]
    found = rows[["decay", "keep_norm", "form"]].drop_duplicates().apply(tuple, axis=1)
    assert set(found) == {(s.decay, s.keep_norm, s.form) for s in settings}
    heading = in_words(tuned).splitlines()[0].split()
    assert {"decay", "keep_norm", "form"} <= set(heading)
    plain = calibrate(tiny, vectors, questions(2), settings[:1], rounds=[Round(1, 4)], **how)
    assert not {"decay", "keep_norm", "form"} & set(in_words(plain).splitlines()[0].split())
    assert how_applied(describe(settings[3], vectors, _chosen(settings[3]))) == (
        "linear decay, ends after 8 generated tokens"
    )


def _chosen(setting):
    """Make the row of a calibration's table that says why a setting was chosen."""
    row = {"construction": setting.construction, "chosen": True, "feasible": True}
    return pd.DataFrame(
        [{**row, "metric": "safe_helpful_proxy", "value": 0.5, "n": 4, "excess": 0}]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_run_steers_as_the_setting_it_chose(tiny, tmp_path, monkeypatch, variant):
    vectors = with_targets(vectors_of(tiny, ["a"]))
    (setting,) = grid(["a"], [(SITE,)], [0.2], variants=[variant])
    note = json.loads(json.dumps(describe(setting, vectors, _chosen(setting))))
    (tmp_path / "vectors").mkdir()
    for category, vector in vectors["a", SITE].items():
        save_vector(tmp_path / "vectors" / vector_file("a", SITE, category), vector)
    run = SimpleNamespace(path=tmp_path, notes={"chosen": {"a": note}, "main": "a"})
    monkeypatch.setattr(saved_run, "read_run", lambda folder: run)
    expected = steering(vectors, setting)
    for category in CATEGORIES:
        ((found,), (own,)) = (
            saved_run.steering_from(tmp_path, category),
            expected[category],
        )
        assert found.site == own.site
        ways = [(one.positions, one.until, one.decay, one.label) for one in (found, own)]
        assert ways[0] == ways[1]
        assert type(found.edit) is type(own.edit)
        activation = torch.randn(2, 3, len(vectors["a", SITE][category].vector))
        assert torch.equal(found.edit(activation), own.edit(activation))
    if not variant:  # a run of an earlier version: nothing is said of how
        for name in ("decay", "keep_norm", "form", "until", "positions"):
            del note[name]
        (found,) = saved_run.steering_from(tmp_path, "fraud")
        assert isinstance(found.edit, AddVector)
        assert (found.decay, found.until, found.edit.keep_norm) == ("none", None, False)


def test_controls_are_applied_as_the_setting_they_are_controls_for(tiny):
    vectors = with_targets({("answer_contrast", SITE): vectors_of(tiny, ["a"])["a", SITE]})
    rows = [
        Prompt(f"{c}{i}/{label}", f"q {i}", f"r {label}", c, label, "s", pair_id=f"{c}{i}")
        for c in CATEGORIES
        for i in range(3)
        for label in ("unsafe", "safe")
    ]
    info = model_info(tiny)
    values = torch.randn(len(rows), info.d_model, generator=torch.Generator().manual_seed(0))
    answers = {SITE: ActivationSet(SITE, values, tuple(rows), "response", info)}
    setting = Setting("answer_contrast", (SITE,), 1, 0.2, until=4, decay="altsteer", keep_norm=True)
    made = controls(vectors, setting, answers)
    assert set(made) == {"random", "shuffled labels", "other category"}
    for one in (i for by_category in made.values() for each in by_category.values() for i in each):
        assert (one.until, one.decay, one.edit.keep_norm) == (4, "altsteer", True)
        assert float((one.edit.multiplier * one.edit.vector).norm()) == pytest.approx(2.0, rel=1e-4)
    targets = controls(
        vectors, setting._replace(decay="none", keep_norm=False, form="target"), answers
    )
    for by_category in targets.values():
        for category, (one,) in by_category.items():
            safe = [i for i, p in enumerate(rows) if (p.category, p.label) == (category, "safe")]
            along = float((values[safe] @ one.edit.direction).mean())
            assert one.edit.target == pytest.approx(along + 0.2 * 10.0, abs=1e-4)


def test_a_target_has_no_always_on_steering_of_the_same_mean_strength(tiny):
    from helpers.gates import gate

    vectors = with_targets(vectors_of(tiny, ["a"]))
    add = Setting("a", (SITE,), 1, 0.2)
    a_gate = gate(tiny)
    assert set(behind_gate(vectors, add, a_gate, 0.5)) == {GATED, ALWAYS}
    assert set(behind_gate(vectors, add._replace(form="target"), a_gate, 0.5)) == {GATED}
