"""Compare what changing a set of units did to scored answers with what matched random sets did.

It reads a table of scores, as ``Evaluation.scores`` is one, and needs no model: answers can be
written, kept and judged elsewhere first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.stats.estimates import mean, paired_difference, rate
from workbench.stats.selectivity import permutation_p

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd


def compare_with_controls(
    scores: pd.DataFrame,
    controls: Mapping[str, Sequence[str]],
    *,
    baseline: str = "unsteered",
    metrics: Sequence[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate each condition's effect on answers, and compare it with its controls' effects.

    Args:
        scores: Columns condition, prompt_id, metric and value (nan where unscored): one answer per
            prompt and condition.
        controls: For each condition of interest the conditions that are its controls; none where
            it has none.
        baseline: Condition in which nothing was changed.
        metrics: Which, in this order; all by default.
        seed: Seed of the bootstrap.

    Returns:
        One row per condition and metric, the baseline first: condition, metric, value, low, high, n
        (a share with Wilson's interval where all scores are 0 or 1, else a mean with a bootstrap
        interval), difference, difference_low, difference_high (paired, to the baseline),
        control_mean, control_low, control_high (mean, smallest and largest difference of a
        control), n_controls, and p: (1 + controls that differ from the baseline at least as much,
        either way) / (1 + controls).

    Raises:
        ValueError: If a condition or metric is not in the table, or a prompt has two answers under
            a condition.
    """
    import pandas as pd

    metrics = list(dict.fromkeys(scores["metric"])) if metrics is None else list(metrics)
    _check(scores, [baseline, *controls, *(c for of in controls.values() for c in of)], metrics)
    rows = []
    for metric in metrics:
        wide = scores[scores["metric"] == metric].pivot(
            index="prompt_id", columns="condition", values="value"
        )
        is_rate = bool(wide.isin([0, 1]).where(wide.notna(), other=True).all(axis=None))
        for condition in dict.fromkeys([baseline, *controls]):
            values = _or_none(wide[condition])
            level = rate(_yes_or_no(values)) if is_rate else mean(values, seed=seed)
            row: dict[str, Any] = {"condition": condition, "metric": metric}
            row |= {name: getattr(level, name) for name in ("value", "low", "high", "n")}
            if condition != baseline:
                row |= _change(wide, baseline, condition, controls[condition], seed)
            rows.append(row)
    order = {name: place for place, name in enumerate([baseline, *controls])}
    table = pd.DataFrame(rows).reindex(columns=_COLUMNS)
    return table.sort_values(
        "condition", key=lambda names: names.map(order), kind="stable"
    ).reset_index(drop=True)


_COLUMNS = (
    *("condition", "metric", "value", "low", "high", "n"),
    *("difference", "difference_low", "difference_high"),
    *("control_mean", "control_low", "control_high", "n_controls", "p"),
)


def _change(
    wide: pd.DataFrame, baseline: str, condition: str, controls: Sequence[str], seed: int
) -> dict[str, float]:
    """Measure a condition's paired difference to the baseline, and those of its controls."""
    plain = _or_none(wide[baseline])
    change, *others = (
        paired_difference(plain, _or_none(wide[name]), seed=seed) for name in (condition, *controls)
    )
    row = {
        "difference": change.value,
        "difference_low": change.low,
        "difference_high": change.high,
        "n_controls": len(others),
    }
    known = np.array([other.value for other in others if np.isfinite(other.value)])
    if len(known) and np.isfinite(change.value):
        row |= {
            "control_mean": float(known.mean()),
            "control_low": float(known.min()),
            "control_high": float(known.max()),
            "p": permutation_p(abs(change.value), np.abs(known)),
        }
    return row


def _or_none(values: pd.Series) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _yes_or_no(values: Sequence[float | None]) -> list[bool | None]:
    return [None if value is None else bool(value) for value in values]


def _check(scores: pd.DataFrame, conditions: Sequence[str], metrics: Sequence[str]) -> None:
    """Raise unless the table has the conditions and metrics, with one answer per prompt."""
    for column, names in (("condition", conditions), ("metric", metrics)):
        known = list(dict.fromkeys(scores[column]))
        for name in names:
            if name not in known:
                raise ValueError(
                    f"no {column} {name!r} in the scores; they have {', '.join(known)}."
                )
    several = scores.duplicated(["condition", "prompt_id", "metric"])
    if several.any():
        prompt_id = scores.loc[several, "prompt_id"].iloc[0]
        raise ValueError(
            f"prompt {prompt_id!r} has several answers under one condition: average them first."
        )
