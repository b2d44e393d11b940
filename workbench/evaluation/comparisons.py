"""Questions put to an evaluation: one condition against another, which categories a vector reaches, whether two judges agree."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from workbench.evaluation.scoring import ALL, HEADLINE, RATES, Evaluation
from workbench.files.hints import did_you_mean
from workbench.generation.answers import UNSTEERED, Condition
from workbench.stats import estimates as statistics
from workbench.stats.agreement import measure_agreement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from workbench.steering.interventions import Intervention


def compare(
    evaluation: Evaluation,
    condition: str,
    reference: str,
    *,
    metrics: Sequence[str] | None = None,
    label: str = "unsafe",
    seed: int = 0,
) -> pd.DataFrame:
    """Two conditions prompt by prompt: own vector against another category's, steering against prompting, any against a control.

    Args:
        evaluation: Scores of both.
        condition: What is looked at.
        reference: What it is compared with.
        metrics: Which; all that both have by default.
        label: Prompts that count: "unsafe", "safe" or "neutral".
        seed: Of the bootstrap.

    Returns:
        One row a metric: metric, value, reference (their values), difference, difference_low, difference_high, p (McNemar's exact one for rates, else
        of the bootstrap), p_holm (corrected over the metrics), n, n_unscored.

    Raises:
        ValueError: If a condition or metric is unknown, or there are no such prompts.
    """
    import pandas as pd

    scores = evaluation.scores[evaluation.scores["label"] == label]
    known = list(dict.fromkeys(evaluation.scores["condition"]))
    for name in (condition, reference):
        if name not in known:
            raise ValueError(
                f"no condition {name!r}; conditions: {', '.join(known)}.{did_you_mean(name, known)}"
            )
    if scores.empty:
        raise ValueError(
            f"there are no {label} prompts; labels: {', '.join(dict.fromkeys(evaluation.scores['label']))}."
        )
    measured = list(dict.fromkeys(scores["metric"]))
    rows = []
    for metric in metrics or measured:
        if metric not in measured:
            raise ValueError(
                f"no metric {metric!r}; metrics: {', '.join(measured)}.{did_you_mean(metric, measured)}"
            )
        wide = scores[scores["metric"] == metric].pivot(
            index="prompt_id", columns="condition", values="value"
        )
        if condition not in wide or reference not in wide:
            continue
        before, after = (_or_none(wide[name]) for name in (reference, condition))
        difference = statistics.paired_difference(before, after, seed=seed)
        p = difference.p
        if metric in RATES:
            p = statistics.mcnemar(
                *([None if v is None else bool(v) for v in side] for side in (before, after))
            ).p
        row = {
            "metric": metric,
            "value": wide[condition].mean(),
            "reference": wide[reference].mean(),
        }
        row |= {
            "difference": difference.value,
            "difference_low": difference.low,
            "difference_high": difference.high,
        }
        rows.append(row | {"p": p, "n": difference.n, "n_unscored": difference.n_unscored})
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p") + 1, "p_holm", statistics.holm(table["p"].to_numpy()))
    return table


def leakage_conditions(steering: Mapping[str, Sequence[Intervention]]) -> dict[str, Condition]:
    """Conditions for a leakage matrix: every prompt, whatever its category, under one category's interventions at a time.

    Args:
        steering: Risk category to its interventions.
    """
    return {UNSTEERED: (), **{category: list(own) for category, own in steering.items()}}


def leakage_matrix(
    evaluation: Evaluation, metric: str = HEADLINE, *, seed: int = 0
) -> pd.DataFrame:
    """Steer with category A, measure on category B: what a vector does beyond its own category.

    Args:
        evaluation: Under ``leakage_conditions``.
        metric: What is measured.
        seed: Of the bootstrap.

    Returns:
        Columns steered (A), measured (B, and "other": all but A), difference, difference_low, difference_high, n, own (whether A is B). A vector that
        is a category's own does more on the diagonal than beside it.

    Raises:
        ValueError: If the metric is unknown, or the conditions are not named after categories.
    """
    import pandas as pd

    scores = evaluation.scores[
        (evaluation.scores["label"] == "unsafe") & (evaluation.scores["metric"] == metric)
    ]
    if scores.empty:
        known = list(dict.fromkeys(evaluation.scores["metric"]))
        raise ValueError(
            f"no metric {metric!r}; metrics: {', '.join(known)}.{did_you_mean(metric, known)}"
        )
    categories = list(dict.fromkeys(scores["category"]))
    steered = [c for c in dict.fromkeys(scores["condition"]) if c != evaluation.baseline]
    categories = [
        *(c for c in steered if c in categories),
        *(c for c in categories if c not in steered),
    ]
    strange = [c for c in steered if c not in categories]
    if strange:
        raise ValueError(
            f"condition {strange[0]!r} is no category; use leakage_conditions. Categories: {', '.join(categories)}."
        )
    wide = scores.pivot(index=["category", "prompt_id"], columns="condition", values="value")
    rows = []
    for a, b in itertools.product(steered, [*categories, "other"]):
        of = wide.index.get_level_values("category")
        own = wide[of != a] if b == "other" else wide[of == b]
        if own.empty:
            continue
        d = statistics.paired_difference(
            _or_none(own[evaluation.baseline]), _or_none(own[a]), seed=seed
        )
        row = {
            "steered": a,
            "measured": b,
            "difference": d.value,
            "difference_low": d.low,
            "difference_high": d.high,
        }
        rows.append(row | {"n": d.n, "own": a == b})
    return pd.DataFrame(rows)


def judge_agreement(
    evaluation: Evaluation, first: str = "safe", second: str = "safety_wording"
) -> pd.DataFrame:
    """Whether two yes/no measures of the same answers agree, condition by condition: steering can change how often a judge is wrong.

    Args:
        evaluation: Scores.
        first: One measure, taken as the verdict.
        second: Another one, taken as the truth for precision and recall.

    Returns:
        Columns condition ("all" first), kappa, low, high, accuracy, first_yes, second_yes (shares), n, n_unscored.

    Raises:
        ValueError: If a measure is missing or is no yes/no one.
    """
    import pandas as pd

    scores = evaluation.scores[evaluation.scores["label"] == "unsafe"]
    for name in (first, second):
        if name not in RATES or name not in set(scores["metric"]):
            there = [m for m in RATES if m in set(scores["metric"])]
            raise ValueError(
                f"no yes/no measure {name!r} of these answers; there are: {', '.join(there)}."
            )
    wide = scores[scores["metric"].isin([first, second])].pivot(
        index=["condition", "prompt_id"], columns="metric", values="value"
    )
    rows = []
    conditions = list(dict.fromkeys(scores["condition"]))
    for condition in [ALL, *conditions]:
        own = wide if condition == ALL else wide.loc[condition]
        a, b = (
            [None if v is None else bool(v) for v in _or_none(own[name])]
            for name in (first, second)
        )
        found = measure_agreement(a, b)
        row = {
            "condition": condition,
            "kappa": found.kappa.value,
            "low": found.kappa.low,
            "high": found.kappa.high,
        }
        row |= {
            "accuracy": found.accuracy.value,
            "first_yes": own[first].mean(),
            "second_yes": own[second].mean(),
        }
        rows.append(row | {"n": found.n, "n_unscored": found.n_unscored})
    return pd.DataFrame(rows)


def _or_none(values: pd.Series) -> list[float | None]:
    return [None if math.isnan(v) else float(v) for v in values]
