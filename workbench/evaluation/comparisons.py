"""Compare conditions, categories and judges of an evaluation.

One condition against another, which categories a vector reaches, and whether two judges agree.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from workbench.evaluation.metrics import ALL, HEADLINE, RATES
from workbench.evaluation.result import Evaluation
from workbench.files.hints import did_you_mean
from workbench.generation.answers import UNSTEERED, Condition
from workbench.stats import estimates
from workbench.stats.agreement import measure_agreement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    """Compare two conditions prompt by prompt.

    For instance a category's own vector with another category's, steering with prompting, or any
    condition with a control.

    Args:
        evaluation: Scores of both.
        condition: The condition that is looked at.
        reference: The condition it is compared with.
        metrics: Metrics; all that both have by default.
        label: Prompts that count: "unsafe", "safe" or "neutral".
        seed: Seed of the bootstrap.

    Returns:
        One row per metric: metric, value, reference (their values), difference, difference_low,
        difference_high, p (McNemar's exact one for rates, else of the bootstrap), p_holm (corrected
        over the metrics), n, n_unscored.

    Raises:
        ValueError: If a condition or metric is unknown, there are no such prompts, or the two
            conditions share no metric.
    """
    import pandas as pd

    scores = evaluation.scores[evaluation.scores["label"] == label]
    _check_known("condition", (condition, reference), evaluation.scores["condition"])
    if scores.empty:
        labels = ", ".join(dict.fromkeys(evaluation.scores["label"]))
        raise ValueError(f"there are no {label} prompts; labels: {labels}.")
    measured = list(dict.fromkeys(scores["metric"]))
    _check_known("metric", metrics or (), measured)
    rows = []
    for metric in metrics or measured:
        by_prompt = scores[scores["metric"] == metric].pivot(
            index=_answer(scores), columns="condition", values="value"
        )
        if condition in by_prompt and reference in by_prompt:
            sides = by_prompt[reference], by_prompt[condition]
            rows.append({"metric": metric, **_paired(*sides, metric=metric, seed=seed)})
    if not rows:
        raise ValueError(
            f"{condition!r} and {reference!r} share no metric on {label} prompts; "
            "score both with the same judges."
        )
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p") + 1, "p_holm", estimates.holm(table["p"].to_numpy()))
    return table


def _paired(before: pd.Series, after: pd.Series, *, metric: str, seed: int) -> dict[str, float]:
    """Compare two conditions on the same prompts: values, paired difference and its p.

    Several answers to a prompt are averaged, with the p of the bootstrap over prompts.
    """
    sides = _or_none(before), _or_none(after)
    clusters = list(before.index.get_level_values("prompt_id"))
    difference = estimates.paired_difference(*sides, clusters=clusters, seed=seed)
    p = difference.p
    if metric in RATES and len(set(clusters)) == len(clusters):
        yes_no = ([None if v is None else bool(v) for v in side] for side in sides)
        p = estimates.mcnemar(*yes_no).p
    return {
        "value": after.groupby(level="prompt_id", sort=False).mean().mean(),
        "reference": before.groupby(level="prompt_id", sort=False).mean().mean(),
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "p": p,
        "n": difference.n,
        "n_unscored": difference.n_unscored,
    }


def _answer(scores: pd.DataFrame) -> list[str]:
    """Name the columns that tell answers of one condition apart."""
    return ["prompt_id", "sample"] if "sample" in scores else ["prompt_id"]


def _check_known(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    distinct = list(dict.fromkeys(known))
    for name in names:
        if name not in distinct:
            raise ValueError(
                f"no {what} {name!r}; {what}s: {', '.join(distinct)}.{did_you_mean(name, distinct)}"
            )


def leakage_conditions(steering: Mapping[str, Sequence[Intervention]]) -> dict[str, Condition]:
    """Make the conditions of a leakage matrix: all prompts under one category's interventions.

    Args:
        steering: Risk category to its interventions.
    """
    return {UNSTEERED: (), **{category: list(edits) for category, edits in steering.items()}}


def leakage_matrix(
    evaluation: Evaluation, metric: str = HEADLINE, *, seed: int = 0
) -> pd.DataFrame:
    """Measure what a vector does beyond its own category: steer with A, measure on B.

    Args:
        evaluation: Scores under ``leakage_conditions``.
        metric: Metric whose change is measured.
        seed: Seed of the bootstrap.

    Returns:
        Columns steered (A), measured (B, and "other": all but A), difference, difference_low,
        difference_high, n, own (whether A is B). A vector that is a category's own does more on the
        diagonal than beside it.

    Raises:
        ValueError: If the metric is unknown, or the conditions are not named after categories.
    """
    import pandas as pd

    unsafe = evaluation.scores[evaluation.scores["label"] == "unsafe"]
    _check_known("metric", [metric], unsafe["metric"])
    scores = unsafe[unsafe["metric"] == metric]
    categories = list(dict.fromkeys(scores["category"]))
    steered = [c for c in dict.fromkeys(scores["condition"]) if c != evaluation.baseline]
    categories = [
        *(c for c in steered if c in categories),
        *(c for c in categories if c not in steered),
    ]
    strange = [c for c in steered if c not in categories]
    if strange:
        raise ValueError(
            f"condition {strange[0]!r} is no category; use leakage_conditions. "
            f"Categories: {', '.join(categories)}."
        )
    by_prompt = scores.pivot(
        index=["category", *_answer(scores)], columns="condition", values="value"
    )
    category = by_prompt.index.get_level_values("category")
    rows = []
    for a, b in itertools.product(steered, [*categories, "other"]):
        measured = by_prompt[category != a] if b == "other" else by_prompt[category == b]
        if measured.empty:
            continue
        sides = measured[evaluation.baseline], measured[a]
        paired = _paired(*sides, metric=metric, seed=seed)
        shown = ("difference", "difference_low", "difference_high", "n")
        row = {"steered": a, "measured": b, **{name: paired[name] for name in shown}}
        rows.append(row | {"own": a == b})
    return pd.DataFrame(rows)


def judge_agreement(
    evaluation: Evaluation, first: str = "safe", second: str | None = None
) -> pd.DataFrame:
    """Say whether two yes/no measures of the same answers agree, condition by condition.

    Steering can change how often a judge is wrong. Intervals count for what answers to one prompt
    have in common.

    Args:
        evaluation: Scores of unsafe prompts by both measures.
        first: A yes/no metric.
        second: Another one; by default that of the second judge of safety, "safe_2", and
            "safety_wording" where there was none.

    Returns:
        Columns condition ("all" first), kappa, low, high, accuracy (share of answers on which both
        say the same), first_yes, second_yes (shares), n, n_unscored, and first and second (the
        measures).

    Raises:
        ValueError: If a measure is missing or is no yes/no one.
    """
    import pandas as pd

    scores = evaluation.scores[evaluation.scores["label"] == "unsafe"]
    measured = set(scores["metric"])
    second = second or ("safe_2" if "safe_2" in measured else "safety_wording")
    for name in (first, second):
        if name not in RATES or name not in measured:
            there = [m for m in RATES if m in measured]
            raise ValueError(
                f"no yes/no measure {name!r} of these answers; there are: {', '.join(there)}."
            )
    by_answer = scores[scores["metric"].isin([first, second])].pivot(
        index=["condition", *_answer(scores)], columns="metric", values="value"
    )
    rows = [{"condition": ALL, **_agreement(by_answer, first, second)}]
    for condition in dict.fromkeys(scores["condition"]):
        answers = by_answer.loc[condition]
        rows.append({"condition": condition, **_agreement(answers, first, second)})
    return pd.DataFrame(rows)


def _agreement(answers: pd.DataFrame, first: str, second: str) -> dict[str, Any]:
    """Measure how two yes/no measures of some answers agree, prompts as clusters."""
    a, b = (
        [None if v is None else bool(v) for v in _or_none(answers[name])]
        for name in (first, second)
    )
    prompts = list(answers.index.get_level_values("prompt_id"))
    agreed = measure_agreement(a, b, clusters=prompts)
    return {
        "kappa": agreed.kappa.value,
        "low": agreed.kappa.low,
        "high": agreed.kappa.high,
        "accuracy": agreed.accuracy.value,
        "first_yes": answers[first].mean(),
        "second_yes": answers[second].mean(),
        "n": agreed.n,
        "n_unscored": agreed.n_unscored,
        "first": first,
        "second": second,
    }


def _or_none(values: pd.Series) -> list[float | None]:
    """Turn nan, which marks an unscored answer, into None."""
    return [None if math.isnan(v) else float(v) for v in values]
