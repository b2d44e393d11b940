"""Names of a request are looked up in what was read of the run, and nowhere else."""

from __future__ import annotations

import json
import shutil

import pytest

from workbench.safesteer.saved_run import gated_steering_from, steering_from
from workbench.serve.catalogue import Catalogue, Choice
from workbench.steering.interventions import description


@pytest.fixture(scope="module")
def catalogue(finished):
    return Catalogue.read(finished)


def described(interventions):
    return sorted(json.dumps(description(one)) for one in interventions)


def multipliers(interventions):
    return [one.edit.multiplier for one in interventions]


def test_without_a_word_the_runs_gate_decides(catalogue, finished) -> None:
    assert described(catalogue.interventions(Choice())) == described(gated_steering_from(finished))


def test_a_category_is_steered_always_or_behind_the_gate(catalogue, finished) -> None:
    always = catalogue.interventions(Choice(category="fraud"))
    assert described(always) == described(steering_from(finished, "fraud"))
    behind = catalogue.interventions(Choice(category="fraud", gate=True))
    assert {one.gate_category for one in behind} == {"fraud"}
    assert all(one.gate is catalogue.gate for one in behind)


def test_strength_is_a_multiple_of_the_chosen_one_or_given(catalogue) -> None:
    chosen = catalogue.interventions(Choice(category="fraud"))
    twice = catalogue.interventions(Choice(category="fraud", scale=2.0))
    assert multipliers(twice) == pytest.approx([2 * value for value in multipliers(chosen)])
    rho = catalogue.interventions(Choice(category="fraud", rho=-0.2))
    weaker = catalogue.interventions(Choice(category="fraud", rho=-0.1))
    assert multipliers(rho) == pytest.approx([2 * value for value in multipliers(weaker)])
    assert all(
        one * other < 0 for one, other in zip(multipliers(rho), multipliers(chosen), strict=True)
    )
    for nothing in (Choice(rho=0.0), Choice(scale=0.0, category="fraud"), Choice(off=True)):
        assert catalogue.interventions(nothing) == ()


def test_a_vector_file_is_added_at_its_site(catalogue) -> None:
    name = next(name for name in catalogue.names if name.endswith(".resid_post.fraud"))
    (one,) = catalogue.interventions(Choice(vector=name))
    assert one.edit.multiplier == 1.0
    assert str(one.site) in name
    with pytest.raises(ValueError, match="is of category 'fraud'"):
        catalogue.interventions(Choice(vector=name, category="malware"))


def test_equal_choices_get_one_tuple_so_that_they_are_steered_together(catalogue) -> None:
    choice = {"category": "malware", "scale": 1.25}
    assert catalogue.interventions(Choice(**choice)) is catalogue.interventions(Choice(**choice))


@pytest.mark.parametrize(
    "choice",
    [
        {"vector": "../run"},
        {"vector": "/etc/passwd"},
        {"vector": "x" * 10_000},
        {"category": "no_such"},
        {"gate": False},
    ],
)
def test_what_the_run_does_not_have_is_refused_in_a_line(catalogue, choice) -> None:
    with pytest.raises(ValueError, match=r"in this run; it has|has to be named") as refused:
        catalogue.interventions(Choice(**choice))
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, -101.0])
def test_strengths_out_of_range_are_refused(value) -> None:
    with pytest.raises(ValueError, match="must be a number from -100 to 100"):
        Choice(rho=value)
    with pytest.raises(ValueError, match="must be a number from -100 to 100"):
        Choice(scale=value)


def test_a_run_without_a_gate_asks_for_a_category(finished, tmp_path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "gate.safetensors").unlink()
    catalogue = Catalogue.read(run)
    with pytest.raises(ValueError, match="has no gate; name a category"):
        catalogue.interventions(Choice())
    assert catalogue.interventions(Choice(category="fraud"))


def test_vectors_of_another_model_are_refused(catalogue, tiny, family_model) -> None:
    catalogue.check(tiny)
    with pytest.raises(ValueError, match="was fitted on"):
        catalogue.check(family_model("qwen2"))


def test_a_file_that_is_written_over_changes_nothing_that_was_read(finished, tmp_path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    catalogue = Catalogue.read(run)
    choices = [Choice(), *(Choice(vector=name, category=None) for name in catalogue.names[-3:])]
    choices += [Choice(category="fraud")]
    before = [described(catalogue.interventions(choice)) for choice in choices]
    for path in [*(run / "vectors").iterdir(), run / "gate.safetensors"]:
        path.write_bytes(b"\x7f" * path.stat().st_size)
    fresh = [Choice(**{**vars(choice), "scale": 1.0}) for choice in choices]
    assert [described(catalogue.interventions(choice)) for choice in fresh] == before
