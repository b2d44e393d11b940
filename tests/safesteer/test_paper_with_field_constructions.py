"""The paper's settings beside the field's constructions: neither takes anything from the other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.runs import write_few_prompts
from helpers.tiny_models import tiny_model

from workbench.files.store import read_json, read_jsonl
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt, load_prompts, split_prompts
from workbench.safesteer import recalibration, recipe
from workbench.safesteer.config import RunConfig
from workbench.safesteer.constructions import (
    CONSTRUCTIONS,
    GUIDED_BOTH,
    PROMPT,
    Measured,
    fit_all,
    measure,
)
from workbench.safesteer.paper import at_norms_of, contrasted, places_of, settings_of
from workbench.safesteer.recalibration import recalibrate
from workbench.safesteer.recipe import run
from workbench.safesteer.saved_run import steering_from
from workbench.safesteer.settings import Setting, raw_grid, steering
from workbench.steering.estimators import pruned_mean_difference
from workbench.steering.spectral import EditSpectrum, SpectralEdit
from workbench.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.prompts.prompt import Folds

STREAM, ATTENTION = Site(2, "resid_post"), Site(2, "attn_out")
SHARES = CONSTRUCTIONS["sea"].rhos


@pytest.fixture(scope="module")
def folds(few_prompts: Path) -> Folds:
    return split_prompts(load_prompts(few_prompts), seed=0)


@pytest.fixture(scope="module")
def measured(tiny: Any, folds: Folds, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    places = [(STREAM,), (ATTENTION,)]
    return measure(tiny, folds, tmp_path_factory.mktemp("store"), places=places)


def read_as(tiny: Any, fit: list[Prompt], measured: Measured, **settings: Any) -> Measured:
    judge: Any = None  # no refusal filter asks it
    return contrasted(RunConfig(**settings), tiny, fit, measured, judge)


def test_raw_multiples_pass_by_edits_and_places_of_other_kinds(
    tiny: Any, folds: Folds, measured: Measured
) -> None:
    vectors = fit_all(measured, folds.fit, [PROMPT, "sea"])
    places = [(STREAM,), (ATTENTION,), (ATTENTION, STREAM)]
    raw = raw_grid(vectors, [PROMPT, "sea"], places, [0.5, 1.0])
    assert {(s.construction, s.sites) for s in raw} == {(PROMPT, place) for place in places}
    config = RunConfig(multipliers=(0.5, 1.0))
    tried = settings_of(config, vectors, [PROMPT, "sea"], places)
    of_edit = [s for s in tried if s.construction == "sea"]
    assert {s.sites for s in of_edit} == {(STREAM,)}
    assert tuple(s.rho for s in of_edit) == SHARES
    assert {s.multiplier for s in of_edit} == {None}
    assert {s.multiplier for s in tried if s.construction == PROMPT} == {0.5, 1.0}
    assert [i.edit.rho for i in steering(vectors, of_edit[0])["fraud"]] == [SHARES[0]]


def test_relative_strengths_are_tried_with_the_signs_kinds_and_strengths_of_each_record(
    folds: Folds, measured: Measured
) -> None:
    vectors = fit_all(measured, folds.fit, [PROMPT, "sea"])
    places = [(STREAM,), (ATTENTION,)]
    tried = settings_of(RunConfig(rhos=(0.1,)), vectors, [PROMPT, "sea"], places)
    assert {(s.sites, s.sign, s.rho) for s in tried if s.construction == PROMPT} == {
        (place, sign, 0.1) for place in places for sign in (1, -1)
    }
    assert {(s.sites, s.sign, s.rho) for s in tried if s.construction == "sea"} == {
        ((STREAM,), 1, share) for share in SHARES
    }
    given = settings_of(RunConfig(rhos=(0.7,)), vectors, ["sea"], places, own_rhos=False)
    assert [s.rho for s in given] == [0.7]


def test_an_edit_is_fitted_on_questions_however_prompts_are_contrasted(
    tiny: Any, folds: Folds, measured: Measured
) -> None:
    behind = read_as(tiny, folds.fit, measured, span="last", pruning="top", keep=0.5)
    with_paper, plain = (
        fit_all(one, folds.fit, [PROMPT, "sea", "caa"]) for one in (behind, measured)
    )
    for category, edit in with_paper["sea", STREAM].items():
        same = plain["sea", STREAM][category]
        assert isinstance(edit, SpectralEdit)
        assert isinstance(same, SpectralEdit)
        assert torch.equal(edit.mean, same.mean)
        assert torch.equal(edit.keep, same.keep)
    by_paper, as_ever = (each[PROMPT, STREAM]["fraud"] for each in (with_paper, plain))
    assert isinstance(by_paper, SteeringVector)
    assert isinstance(as_ever, SteeringVector)
    assert not torch.allclose(by_paper.vector, as_ever.vector, atol=1e-3)


def test_guidance_on_both_sides_is_contrasted_as_the_paper_says(
    tiny: Any, folds: Folds, measured: Measured
) -> None:
    ids = {
        label: [p.id for p in folds.fit if p.label == label][1:] for label in ("unsafe", "neutral")
    }
    judged = measured._replace(
        went_along=frozenset(ids["unsafe"]), harmless=frozenset(ids["neutral"])
    )
    behind = read_as(tiny, folds.fit, judged, pruning="top", keep=0.5)
    vector = fit_all(behind, folds.fit, [GUIDED_BOTH])[GUIDED_BOTH, STREAM]["fraud"]
    assert isinstance(vector, SteeringVector)
    unsafe, neutral = (
        measured.prompts[STREAM]
        .of(
            [
                p
                for p in folds.fit
                if p.id in ids[label] and (label == "neutral" or p.category == "fraud")
            ]
        )
        .values
        for label in ("unsafe", "neutral")
    )
    by_hand = pruned_mean_difference(unsafe, neutral, which="top", keep=0.5)
    assert torch.allclose(vector.vector, by_hand, atol=1e-5)
    # What is judged harmless are neutral prompts; twins are not.
    twins = read_as(tiny, folds.fit, judged, safe_side="paired")
    assert fit_all(twins, folds.fit, [GUIDED_BOTH]) == {}


def test_controls_of_an_edit_in_a_run_are_fitted_on_its_questions(
    tiny: Any, folds: Folds, measured: Measured
) -> None:
    behind = read_as(tiny, folds.fit, measured, span="last")
    vectors = fit_all(behind, folds.fit, ["sea"])
    job: Any = SimpleNamespace(config=RunConfig(span="last"))
    made: Any = recipe.controls_of(job, behind, vectors, Setting("sea", (STREAM,), 1, 0.5))
    assert set(made) == {"random", "shuffled labels"}
    [shuffled] = made["shuffled labels"]["fraud"]
    [real] = steering(vectors, Setting("sea", (STREAM,), 1, 0.5))["fraud"]
    assert torch.equal(shuffled.edit.mean, real.edit.mean)
    assert not torch.equal(shuffled.edit.keep, real.edit.keep)


def test_outputs_of_mlps_have_every_vector_and_no_edit(
    tiny: Any, folds: Folds, tmp_path: Path
) -> None:
    config = RunConfig(site="mlp_out", layers=(2,), multipliers=(1.0,))
    places = places_of(config, tiny)
    measured = measure(tiny, folds, tmp_path / "store", places=places)
    vectors = fit_all(measured, folds.fit, [PROMPT, "answer_contrast", "sea"])
    site = Site(2, "mlp_out")
    assert set(vectors) == {(PROMPT, site), ("answer_contrast", site)}
    for chosen in (config, replace(config, multipliers=None, rhos=(0.1,))):
        tried = settings_of(chosen, vectors, [PROMPT, "answer_contrast"], places)
        assert {(s.construction, s.sites) for s in tried} == {(n, (s,)) for n, s in vectors}


def test_transferred_edits_stay_and_vectors_take_the_norms_of_the_steered_model(
    folds: Folds, measured: Measured
) -> None:
    vectors = fit_all(measured, folds.fit, [PROMPT, "sea"])
    doubled = measured._replace(
        prompts={s: replace(a, values=2 * a.values) for s, a in measured.prompts.items()}
    )
    moved = at_norms_of(doubled, vectors, folds.fit)
    assert moved["sea", STREAM] == vectors["sea", STREAM]
    before, after = (each[PROMPT, STREAM]["fraud"] for each in (vectors, moved))
    assert isinstance(before, SteeringVector)
    assert isinstance(after, SteeringVector)
    assert after.site_norm == pytest.approx(2 * before.site_norm, rel=1e-4)


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Run the paper's preset with an edit of another model beside its vector."""
    from workbench.models.load import load_model

    folder = tmp_path_factory.mktemp("mixed")
    chat = tiny_model("llama3", folder / "chat", seed=1)
    model = load_model(tiny_model("llama3", folder / "base"), device="cpu")
    config = RunConfig(
        prompts=str(write_few_prompts(folder / "few.jsonl")), tune_prompts=2, max_new_tokens=4,
        preset="paper", site="resid_post", layers=(2,), constructions=("sea",),
        vectors_from=str(chat), device="cpu",
    )  # fmt: skip
    return run(config, folder / "run", model=model), model


def test_a_paper_run_carries_an_edit_of_another_model_from_fit_to_steering(
    mixed_run: tuple[Path, Any],
) -> None:
    out, _ = mixed_run
    notes = read_json(out / "run.json")
    assert set(notes["chosen"]) == {PROMPT, "sea"}
    assert notes["chosen"]["sea"]["rho"] in SHARES
    conditions = {row["condition"] for row in read_jsonl(out / "completions.jsonl")}
    assert conditions >= {"unsteered", "prompt contrast", "sea", "random", "shuffled labels"}
    [steered] = steering_from(out, "fraud", construction="sea")
    assert isinstance(steered.edit, EditSpectrum)
    assert steered.edit.rho == notes["chosen"]["sea"]["rho"]
    assert steered.model.fingerprint == notes["model"]["fingerprint"]


@pytest.mark.parametrize(("given", "expected"), [(None, set(SHARES)), ([0.7], {0.7})])
def test_an_edit_is_searched_again_at_its_own_shares_or_those_given(
    given: Any, expected: set[float], mixed_run: tuple[Path, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Any] = []

    def looked_at(*arguments: Any, **_: Any) -> None:
        asked.extend(arguments[3])
        raise KeyboardInterrupt

    monkeypatch.setattr(recalibration, "calibrate", looked_at)
    out, model = mixed_run
    with pytest.raises(KeyboardInterrupt):
        recalibrate(out, rhos=given, model=model)
    assert {s.rho for s in asked if s.construction == "sea"} == expected
    assert {s.multiplier for s in asked if s.construction == PROMPT} == (
        {0.5, 1.0} if given is None else {None}
    )
