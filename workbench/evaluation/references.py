"""Compare the answers of each condition with reference answers, as one corpus.

Papers report the BLEU of a corpus, which is not the mean of the BLEU of its sentences (the metric
``bleu_reference``): n-grams are counted over all answers before they are divided.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from workbench.judges.overlap import bleu_counts, bleu_of_counts
from workbench.stats.estimates import bootstrap_interval

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from jaxtyping import Int

    from workbench.evaluation.result import Evaluation
    from workbench.generation.answers import Completion


def corpus_bleu(evaluation: Evaluation, *, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Compute each condition's corpus BLEU against the prompts' references, in [0, 100].

    It is sacrebleu's with its default smoothing, on the tokens of ``wb.judges.bleu`` (13a;
    characters of scripts without spaces). All prompts with a reference count, whatever their label;
    several answers to a prompt are drawn together. Answers that were cut in their thoughts are left
    out.

    Args:
        evaluation: Answers under several conditions to prompts of which some have a reference.
        n_resamples: Bootstrap resamples of prompts.
        seed: Seed of the bootstrap.

    Returns:
        Columns condition, value, low, high, n (prompts), n_unscored (answers left out), and
        difference, difference_low, difference_high: what the condition has more than the baseline
        on the prompts that both answered, with the same prompts drawn for both.

    Raises:
        ValueError: If no prompt has a reference answer, or n_resamples is below 1.
    """
    import pandas as pd

    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}; 2000 is usual.")
    answers: dict[str, list[Completion]] = {}
    for completion in evaluation.completions:
        if completion.prompt.reference and completion.prompt.reference.strip():
            answers.setdefault(completion.condition, []).append(completion)
    if not answers:
        raise ValueError(
            "no answer of this evaluation is to a prompt with a reference; give prompts one as "
            "wb.Prompt(..., reference=...) or in a column 'reference'."
        )
    counts = {condition: _counts_by_prompt(given) for condition, given in answers.items()}
    rows = []
    for condition, of_prompt in counts.items():
        row: dict[str, Any] = {"condition": condition}
        row |= _estimate([of_prompt], n_resamples, seed)
        row["n"] = len(of_prompt)
        row["n_unscored"] = sum(c.is_cut_in_thoughts for c in answers[condition])
        row |= dict.fromkeys(("difference", "difference_low", "difference_high"), math.nan)
        if condition != evaluation.baseline:
            sides = [counts.get(evaluation.baseline, {}), of_prompt]
            change = _estimate(sides, n_resamples, seed)
            row |= {"difference": change["value"]}
            row |= {f"difference_{end}": change[end] for end in ("low", "high")}
        rows.append(row)
    return pd.DataFrame(rows)


def _counts_by_prompt(completions: list[Completion]) -> dict[str, Int[np.ndarray, " 10"]]:
    """Add up the counts of each prompt's answers."""
    scored = [c for c in completions if not c.is_cut_in_thoughts]
    rows = bleu_counts([str(c.prompt.reference) for c in scored], [c.text for c in scored])
    counts: dict[str, Int[np.ndarray, " 10"]] = {}
    for completion, row in zip(scored, rows, strict=True):
        prompt_id = completion.prompt.id
        counts[prompt_id] = counts[prompt_id] + row if prompt_id in counts else row
    return counts


def _estimate(
    sides: list[dict[str, Int[np.ndarray, " 10"]]], n_resamples: int, seed: int
) -> dict[str, float]:
    """Estimate the BLEU of one side, or what the second has more than the first, over prompts."""
    import numpy as np

    shared = [key for key in sides[-1] if all(key in side for side in sides)]
    if not shared:
        return dict.fromkeys(("value", "low", "high"), math.nan)
    tables = [np.stack([side[key] for key in shared]) for side in sides]
    draws = [
        np.array([bleu_of_counts(counts) for counts in _resampled(table, n_resamples, seed)])
        for table in tables
    ]
    values = [bleu_of_counts(table.sum(axis=0)) for table in tables]
    if len(sides) == 1:
        samples, value = draws[0], values[0]
    else:
        samples, value = draws[1] - draws[0], values[1] - values[0]
    low, high = bootstrap_interval(samples, len(shared))
    return {"value": value, "low": low, "high": high}


def _resampled(
    table: Int[np.ndarray, "prompt 10"], n_resamples: int, seed: int
) -> Int[np.ndarray, "draw 10"]:
    """Add up the counts of prompts drawn with replacement; the same seed draws the same prompts."""
    import numpy as np

    n, rng = len(table), np.random.default_rng(seed)
    # As many resamples at a time as keep memory small.
    sizes = np.diff([*range(0, n_resamples, max(1, 1_000_000 // n)), n_resamples])
    chances = np.full(n, 1 / n)
    return np.concatenate([rng.multinomial(n, chances, size=size) @ table for size in sizes])
