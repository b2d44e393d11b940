"""Every construction of a run is there, fitted on what its name says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from workbench.models.sites import Site
from workbench.prompts.choices import choice_prompts
from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import Folds, Prompt, load_prompts, select_prompts
from workbench.safesteer.constructions import (
    CONSTRUCTIONS,
    GUIDED,
    OWN,
    Measured,
    constructions_of,
    fit_all,
    measure,
)
from workbench.safesteer.own_answers import ALONG
from workbench.steering.vectors import fit_steering_vectors

CATEGORIES = ("hate_speech", "illegal_activity")


def against_both(fit: list[Prompt]) -> list[Prompt]:
    rows = answer_prompts(fit)
    named = [replace(row, id=f"{row.id}/2", pair_id=f"{row.pair_id}/{ALONG}") for row in rows]
    return [*rows, *named]


@pytest.fixture(scope="module")
def folds() -> Folds:
    known = load_prompts()
    risky = [
        p for c in CATEGORIES for p in select_prompts(known, category=c, label="unsafe", limit=4)
    ]
    fit = [*risky, *select_prompts(known, label="neutral", limit=6)]
    return Folds(fit, [], [])


@pytest.fixture(scope="module")
def measured(tiny: Any, folds: Folds, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    alone = [folds.fit[0], folds.fit[1], folds.fit[5]]
    return measure(
        tiny,
        folds,
        tmp_path_factory.mktemp("store"),
        answers=dict.fromkeys(OWN, answer_prompts(folds.fit))
        | {"choices": choice_prompts(folds.fit), "against both": against_both(folds.fit)},
        went_along=alone,
        harmless=folds.fit[8:12],
    )


def test_every_construction_has_a_vector_for_every_category(
    measured: Measured, folds: Folds
) -> None:
    vectors = fit_all(measured, folds.fit, list(CONSTRUCTIONS))
    assert set(constructions_of(vectors)) == set(CONSTRUCTIONS)
    assert all(set(own) == set(CATEGORIES) for own in vectors.values())


def test_the_guided_vector_is_the_papers_from_the_prompts_a_judge_chose(
    measured: Measured, folds: Folds
) -> None:
    site = Site(1, "resid_post")
    guided = fit_all(measured, folds.fit, [GUIDED])[GUIDED, site]
    chosen = [folds.fit[0], folds.fit[1], folds.fit[5], *folds.fit[8:]]
    expected = fit_steering_vectors(measured.prompts[site].of(chosen))
    for category in CATEGORIES:
        torch.testing.assert_close(guided[category].vector, expected[category].vector)
        assert guided[category].method == GUIDED
        assert guided[category].fitted_on == expected[category].fitted_on


def test_without_a_judge_there_is_no_guided_vector(measured: Measured, folds: Folds) -> None:
    assert not fit_all(measured._replace(went_along=frozenset()), folds.fit, [GUIDED])
