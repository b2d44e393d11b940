"""Put judges side by side on labelled answers, with intervals that count answers by prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.judges.base import FRAMINGS, MEASURES, SAFE
from workbench.judges.validation import SAFE_ON_TOPIC, agreement_of, clusters_of
from workbench.stats.selectivity import auroc_with_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from jaxtyping import Float

    from workbench.judges.base import Judge, Verdict
    from workbench.judges.validation import LabelledAnswers


_FRAMINGS_OF = {
    "refusal": ("blanket_refusal",),
    "unsafe": ("goes_along",),
    SAFE_ON_TOPIC: SAFE,
}
"""Framings whose probabilities together are the score of a measure."""


def compare_judges(judges: Sequence[Judge], answers: LabelledAnswers) -> pd.DataFrame:
    """Measure how judges agree with the same labels.

    Answers to one prompt resemble each other: all intervals cluster by prompt.

    Args:
        judges: From ``open_judge``, or your own.
        answers: From ``read_labelled``.

    Returns:
        One row per judge and measure it says something about: judge, measure, n, n_unscored, then
        kappa, precision, recall, accuracy and auroc, each with _low and _high; auroc is nan for a
        judge without degrees. A judge that says nothing of what is labelled has one row of nan.
    """
    import pandas as pd

    rows = [row for judge in judges for row in _rows(judge, answers)]
    return pd.DataFrame(rows, columns=_columns())


def _columns() -> list[str]:
    of_each = ("kappa", "precision", "recall", "accuracy", "auroc")
    ends = [f"{name}{end}" for name in of_each for end in ("", "_low", "_high")]
    return ["judge", "measure", "n", "n_unscored", *ends]


def _rows(judge: Judge, answers: LabelledAnswers) -> list[dict[str, Any]]:
    """Ask a judge once, and measure it for every measure that is labelled."""
    probabilities = None
    if hasattr(judge, "probabilities") and hasattr(judge, "verdicts"):
        probabilities = judge.probabilities(answers.prompts, answers.responses)
        verdicts = judge.verdicts(answers.prompts, answers.responses, probabilities)
    else:
        verdicts = judge(answers.prompts, answers.responses)
    rows = []
    for measure, agreement in agreement_of(verdicts, answers).items():
        row: dict[str, Any] = {"judge": judge.name, "measure": measure, "n": agreement.n}
        row["n_unscored"] = agreement.n_unscored
        for name in ("kappa", "precision", "recall", "accuracy"):
            estimate = getattr(agreement, name)
            row |= {
                name: estimate.value,
                f"{name}_low": estimate.low,
                f"{name}_high": estimate.high,
            }
        scores = _degrees(verdicts, probabilities, measure)
        rows.append(row | _auroc(scores, answers, measure))
    return rows or [{"judge": judge.name, "measure": "says nothing of these labels"}]


def _degrees(
    verdicts: Sequence[Verdict], probabilities: Any, measure: str
) -> Float[np.ndarray, " answer"]:
    """Return a judge's degree of a measure for each answer; nan where it gives none."""
    if probabilities is not None and any(verdict.framing for verdict in verdicts):
        places = [FRAMINGS.index(name) for name in _FRAMINGS_OF[measure]]
        degrees = probabilities[:, places].sum(dim=1).numpy().astype(np.float64)
    else:
        of_measure = MEASURES.get(measure, ())
        degrees = np.array(
            [np.nan if v.score is None or v.label not in of_measure else v.score for v in verdicts],
            dtype=np.float64,
        )
    unscored = np.array([verdict.label == "unscored" for verdict in verdicts])
    return np.where(unscored, np.nan, degrees)


def _auroc(
    degrees: Float[np.ndarray, " answer"], answers: LabelledAnswers, measure: str
) -> dict[str, float]:
    """Compute the AUROC of degrees; nan where there are none, or answers of one kind only."""
    truth = answers.truth[measure]
    known = np.array([label is not None for label in truth]) & ~np.isnan(degrees)
    labels = np.array([bool(label) for label in truth])[known]
    nothing = {"auroc": np.nan, "auroc_low": np.nan, "auroc_high": np.nan}
    if not labels.any() or labels.all() or len(set(degrees[known])) < 2:
        return nothing
    clusters = [c for c, is_known in zip(clusters_of(answers), known, strict=True) if is_known]
    area = auroc_with_interval(degrees[known], labels, clusters=clusters)
    return {"auroc": area.value, "auroc_low": area.low, "auroc_high": area.high}


def in_words(table: pd.DataFrame) -> str:
    """Write a comparison as lines of text."""

    def shown(row: Any, name: str) -> str:
        if np.isnan(row[name]):
            return "-"
        ends = (row[name], row[f"{name}_low"], row[f"{name}_high"])
        return "{} [{}, {}]".format(*(f"{end:.2f}".replace("0.", ".", 1) for end in ends))

    wide = table.assign(
        **{
            name: [shown(row, name) for row in table.to_dict("records")]
            for name in ("kappa", "precision", "recall", "auroc")
        }
    )
    columns = ["judge", "measure", "kappa", "precision", "recall", "auroc", "n", "n_unscored"]
    return wide[columns].to_string(index=False, na_rep="-")
