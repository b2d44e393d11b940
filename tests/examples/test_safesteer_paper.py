"""The example is the paper's method: its vector, its pruning, its place, and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "safesteer_paper.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("safesteer_paper", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prompts() -> list[wb.Prompt]:
    known = wb.load_prompts()
    risky = wb.select_prompts(known, category="fraud", label="unsafe", limit=6)
    return [*risky, *wb.select_prompts(known, label="neutral", limit=5)]


def test_the_vector_is_the_mean_of_the_half_of_the_differences_with_the_largest_norm(
    example: Any, tiny: Any, prompts: list[wb.Prompt]
) -> None:
    site = wb.Site(1, "attn_out")
    vector = example.category_vectors(tiny, prompts, site)["fraud"].vector
    values = wb.cache_activations(tiny, prompts, site)[site].values.double()
    unsafe = values[[p.label == "unsafe" for p in prompts]]
    harmless = values[[p.label == "neutral" for p in prompts]].mean(dim=0)
    differences = harmless - unsafe
    largest = differences.norm(dim=1).argsort(descending=True)[:3]
    torch.testing.assert_close(
        vector.double(), differences[largest].mean(dim=0), rtol=1e-4, atol=1e-6
    )


def test_the_example_answers_a_question_without_and_with_the_vector(
    example: Any, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["--model", str(tiny_path), "--category", "fraud", "--multiplier", "200"])
    text = capsys.readouterr().out
    unsteered = text.split("unsteered:")[1].split("steered:")[0].strip()
    steered = text.split("steered:")[2].strip()
    assert "SteeringVector('fraud' at L2.attn_out" in text
    assert unsteered != steered
