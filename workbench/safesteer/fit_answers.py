"""Answers behind the fit questions: what each construction of a run is to be fitted on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.prompts.choices import choice_prompts
from workbench.safesteer.constructions import GUIDED, GUIDED_BOTH, Reads, reads_of, wanted_names
from workbench.safesteer.own_answers import (
    alternative_contrast,
    answered_harmlessly,
    any_answer,
    kept_alternatives,
    kept_by,
    kept_harmless,
    safe_against_both,
    self_contrast,
    went_along,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.files.store import PathLike
    from workbench.generation.decoding import Decoding
    from workbench.judges.base import Judge
    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.prompt import Prompt


LEAST_PAIRS = 8
"""Pairs of own answers over all categories, below which there is no vector from them."""
_KEPT = {
    "own answers": "pairs of the model's own answers were kept",
    "plain answers": "pairs of a safe and a plain answer of the model were there",
    "alternatives": "pairs of an alternative and a blanket refusal of the model were there",
    "against both": "pairs of an alternative and an answer of each other kind were there",
}


class FitAnswers(NamedTuple):
    """Hold rows with answers, and which fit prompts the model answered how."""

    rows: dict[Reads, list[Prompt]]
    """Rows by what reads them, beside the written openings; none where there are too few pairs."""
    went_along: list[Prompt]
    """Unsafe prompts that the model goes along with, where a construction asks for them."""
    harmless: list[Prompt]
    """Neutral prompts that it answers harmlessly, where a construction asks for them."""
    left_out: dict[str, str]
    """Kind of rows that there are too few of, and why."""


UNANSWERED = FitAnswers({}, [], [], {})
"""For a model that vectors are not fitted on."""


def answers_to_fit_on(
    model: HookedModel,
    fit: Sequence[Prompt],
    names: Sequence[str] | None,
    *,
    judge: Judge | None,
    refusals: Judge,
    output: PathLike,
    decoding: Decoding,
    seed: int = 0,
    progress: bool = False,
) -> FitAnswers:
    """Let the model answer the fit questions, as far as constructions need it, and keep by judges.

    Args:
        model: A hooked model.
        fit: Prompts of the fit fold.
        names: Constructions; None for those that are no mere baselines.
        judge: Judge of safety that picks answers; None where wording does.
        refusals: Judge of refusals.
        output: A jsonl file that keeps the answers; each is written once, whoever needs it.
        decoding: Length of the answers.
        seed: Seed of the order of two choices.
        progress: Show progress bars.
    """
    reads, names = reads_of(names), wanted_names(names)
    how: dict[str, Any] = {"output": output, "decoding": decoding, "progress": progress}
    rows = _own_answers(model, fit, reads, judge, refusals, how)
    left_out: dict[str, str] = {}
    for kind in list(rows):
        n_pairs = len(rows[kind]) // 2
        if n_pairs < LEAST_PAIRS:
            left_out[kind] = f"{n_pairs} {_KEPT[kind]}, and {LEAST_PAIRS} are needed for a vector."
            del rows[kind]
    if "choices" in reads:
        rows["choices"] = choice_prompts(fit, seed=seed)
    along: list[Prompt] = []
    harmless: list[Prompt] = []
    if {GUIDED, GUIDED_BOTH} & set(names):
        along = went_along(model, fit, kept_by(judge)[1], **how)
    if GUIDED_BOTH in names:
        harmless = answered_harmlessly(model, fit, kept_harmless(judge, refusals), **how)
    return FitAnswers(rows, along, harmless, left_out)


def _own_answers(
    model: HookedModel,
    fit: Sequence[Prompt],
    reads: set[Reads],
    judge: Judge | None,
    refusals: Judge,
    how: dict[str, Any],
) -> dict[Reads, list[Prompt]]:
    """Make the rows of own answers that are wanted, however few they come to be."""
    keep_safe, keep_unsafe = kept_by(judge)
    alternative, blanket = kept_alternatives(judge, refusals)
    kept: dict[str, Any] = {"keep_alternative": alternative, "keep_refusal": blanket}
    rows: dict[Reads, list[Prompt]] = {}
    if "own answers" in reads:
        rows["own answers"] = self_contrast(
            model, fit, keep_safe=keep_safe, keep_unsafe=keep_unsafe, **how
        )
    if "plain answers" in reads:
        rows["plain answers"] = self_contrast(
            model, fit, keep_safe=keep_safe, keep_unsafe=any_answer, **how
        )
    if "alternatives" in reads:
        rows["alternatives"] = alternative_contrast(model, fit, **kept, **how)
    if "against both" in reads:
        rows["against both"] = safe_against_both(model, fit, **kept, keep_along=keep_unsafe, **how)
    return rows
