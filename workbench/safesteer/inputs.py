"""SafeSteer on one page: the recipe that strings the rooms together, from prompts to a folder that holds the whole result.

fit fold   activations -> vectors (prompt contrast, answer contrast), directions for the neurons
tune fold  separability, neuron scores, sign, place and strength of each construction, the gate's threshold
test fold  answered once: unsteered, every construction, behind a gate, controls

Source: SafeSteer (Ghosh et al. 2025, arXiv:2506.04250) for the vectors and where they are added; contrasts of answers, the
calibration, the gate and the controls are this project's (README.md says why).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from workbench.evaluation.scoring import HARD_SAFE
from workbench.models.load import HookedModel, load_model
from workbench.prompts.benchmarks import prompts_from
from workbench.prompts.prompt import (
    Folds,
    Prompt,
    categories_of,
    in_turn,
    select_prompts,
    split_prompts,
)
from workbench.safesteer.calibration import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.safesteer.config import RunConfig

TEST_NEUTRAL, TEST_SAFE, TUNE_NEUTRAL = 24, 30, 16
"""Neutral prompts, and safe ones that look risky, answered under every test condition: what steering costs where there is no risk. Neutral
ones on which the calibration measures KL."""


def folds_of(config: RunConfig) -> Folds:
    """The prompts of a run, in their folds.

    Raises:
        ValueError: If the data set cannot be read, a category is unknown, or there is nothing unsafe in it.
    """
    prompts = prompts_from(config.prompts)
    own = prompts_from(None)
    if not any(
        p.label == "neutral" for p in prompts
    ):  # the generic safe pool of the paper's vectors
        prompts += select_prompts(own, label="neutral")
    if not any(p.label == "safe" for p in prompts):  # what a gate must not open for
        prompts += select_prompts(own, category=HARD_SAFE)
    if config.categories is not None:
        risky = select_prompts(prompts, category=config.categories)
        beside = [p for p in prompts if p.label == "neutral" or p.category == HARD_SAFE]
        prompts = risky + [p for p in beside if p.category not in config.categories]
    if not categories_of(prompts):
        raise ValueError("no unsafe prompts: a run needs at least one risk category.")
    return split_prompts(prompts, seed=config.seed)


def load_run_model(config: RunConfig) -> HookedModel:
    """The model of a run."""
    chosen: Any = config.packing
    return load_model(config.model, device=config.device, dtype=config.dtype, packing=chosen)


def _test_questions(test: Sequence[Prompt], config: RunConfig) -> list[Prompt]:
    risky = select_prompts(test, label="unsafe", limit=config.test_prompts)
    safe = in_turn([p for p in test if p.label == "safe"])[:TEST_SAFE]
    return risky + safe + select_prompts(test, label="neutral", limit=TEST_NEUTRAL)


def limits_of(config: RunConfig) -> Limits:
    """What steering may cost, as a run's settings say."""
    most = math.inf if config.neutral_kl is None else config.neutral_kl
    return Limits(config.relevance_loss, config.refusal_rise, config.degenerate_rise, most)
