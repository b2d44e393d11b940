"""Steering by category in a harness is that of the construction the run's gate is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from workbench import cli
from workbench.evaluation import capability
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import steering_from

if TYPE_CHECKING:
    from pathlib import Path


def is_the_gates(interventions: Any, folder: Path) -> bool:
    """Tell whether vectors and strengths are those of the gate's construction."""
    notes = read_run(folder).notes
    assert len(notes["chosen"]) > 1
    expected = steering_from(folder, "fraud", construction=notes["gate"]["construction"])
    return len(interventions) == len(expected) and all(
        torch.equal(one.edit.vector, other.edit.vector)
        and one.edit.multiplier == other.edit.multiplier
        and one.site == other.site
        for one, other in zip(interventions, expected, strict=True)
    )


def test_lm_eval_steers_with_the_construction_of_the_gate(finished: Path, tiny: Any) -> None:
    pytest.importorskip("lm_eval")
    from workbench.integrations.lm_eval import SteeredLM

    model = SteeredLM(str(finished), steering="fraud", model=tiny)
    assert is_the_gates(model.interventions, finished)


def test_inspect_steers_with_the_construction_of_the_gate(finished: Path, tiny: Any) -> None:
    pytest.importorskip("inspect_ai")
    from workbench.integrations.inspect_ai import SteeredModel

    model = SteeredModel(str(finished), steering="fraud", hooked=tiny)
    assert is_the_gates(model.interventions, finished)


def test_capability_steers_always_with_the_construction_of_the_gate(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def multiple_choice(_: Any, __: Any, conditions: Any, **___: Any) -> None:
        asked.append(conditions)
        raise RuntimeError("seen")

    monkeypatch.setattr(capability, "multiple_choice", multiple_choice)
    monkeypatch.setattr(cli, "_model_of", lambda run: None)
    assert cli.main(["capability", "--run", str(finished), "--category", "fraud"]) == 2
    (conditions,) = asked
    assert is_the_gates(conditions["always on"], finished)
    assert {one.gate_category for one in conditions["gated"]} == {"fraud", "malware"}
