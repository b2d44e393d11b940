"""Correct judged rates and differences for the judge's errors, condition by condition.

``corrected`` takes labels of a blind sample (``blind.py``). ``bounded`` has to do with what is
known of the judge from other answers, and says less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from workbench.evaluation.blind import LEAST_READ, check_labels, readable_answers
from workbench.evaluation.metrics import HEADLINE, RATES
from workbench.stats import estimates
from workbench.stats.agreement import Agreement, measure_agreement
from workbench.stats.estimates import Estimate, bootstrap_interval, bootstrap_p

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float, Int

    from workbench.evaluation.result import Evaluation


N_RESAMPLES = 2000
"""Bootstrap resamples of prompts."""


class _ByPrompt(NamedTuple):
    """Hold means over a prompt's answers; 0 where there are none.

    ``judged`` is that of all answers, ``judged_read`` and ``labels`` are those of the answers that
    were read. ``is_there`` and ``is_read`` say where there are any.
    """

    judged: Float[np.ndarray, "prompts conditions"]
    is_there: Bool[np.ndarray, "prompts conditions"]
    judged_read: Float[np.ndarray, "prompts conditions"]
    labels: Float[np.ndarray, "prompts conditions"]
    is_read: Bool[np.ndarray, "prompts conditions"]


class _Corrected(NamedTuple):
    """Hold the corrected rate of each condition, the baseline first, with its resamples.

    ``n`` and ``n_read`` count prompts; ``reasons`` says why a condition is not corrected ("" where
    it is).
    """

    rates: Float[np.ndarray, " conditions"]
    draws: Float[np.ndarray, "draws conditions"]
    n: Int[np.ndarray, " conditions"]
    n_read: Int[np.ndarray, " conditions"]
    reasons: list[str]

    @classmethod
    def of(
        cls,
        answers: pd.DataFrame,
        labels: Mapping[str, bool | None],
        conditions: list[str],
        seed: int,
    ) -> _Corrected:
        """Estimate the rates of conditions from judged answers and labels of some."""
        data = _by_prompt(answers, conditions)
        n, n_read = data.is_there.sum(axis=0), data.is_read.sum(axis=0)
        reasons = _reasons(answers, labels, conditions, n_read)
        return cls(*_rates(data, seed), n, n_read, reasons)

    def counts_of(self, i: int) -> dict[str, Any]:
        """Return a condition's counts, and the reason why it is not corrected."""
        return {"n_read": self.n_read[i], "n": self.n[i], "reason": self.reasons[i]}

    def rates_of(self, i: int) -> dict[str, float]:
        """Return a condition's rate and its difference to the baseline, with intervals and p."""
        nothing = (math.nan, math.nan, math.nan)
        rate, difference, p = nothing, nothing, math.nan
        n, fewest = int(self.n_read[i]), int(min(self.n_read[[0, i]]))
        if not self.reasons[i]:
            draws = self.draws[:, i]
            rate = (float(self.rates[i]), *bootstrap_interval(draws[~np.isnan(draws)], n))
        if i and not (self.reasons[0] or self.reasons[i]):
            change = self.draws[:, i] - self.draws[:, 0]
            change = change[~np.isnan(change)]
            value = float(self.rates[i] - self.rates[0])
            difference = (value, *bootstrap_interval(change, fewest))
            p = bootstrap_p(change, fewest)
        return (
            _ends("corrected", "", *rate)
            | _ends("difference", "difference_", *difference)
            | {"p": p}
        )


def corrected(
    evaluation: Evaluation,
    labels: Mapping[str, bool | None],
    *,
    metric: str = HEADLINE,
    label: str = "unsafe",
    seed: int = 0,
) -> pd.DataFrame:
    """Correct a judged rate and its differences by what a blind reader said of some answers.

    The rate is the judge's over all answers, plus what reader and judge differ by, on average, over
    those that were read: prediction-powered inference. How far the judge is relied on is tuned per
    condition from 0 (the labels alone) to 1, so that a useless judge costs nothing. Intervals are
    bootstrapped over prompts, each with all its answers and labels. An error of the judge that the
    reader did not meet may be there: the spread of errors counts as that of one among the prompts
    read, at least. An answer the judge could not score counts as the mean of those it could.

    Args:
        evaluation: Scores with their answers.
        labels: From ``read_blind``: whether each answer is what the metric says, None where it was
            not read.
        metric: A yes/no metric.
        label: Prompts that count, as in ``blind_sample``.
        seed: Seed of the bootstrap.

    Returns:
        One row per condition: metric, condition, judged with judged_low and judged_high, corrected
        with low and high, the same of differences to the baseline (judged_difference..,
        difference..) with p and p_holm (corrected over conditions), the judge's precision and
        recall among the answers read with their ends and n, n_read and n (prompts), and reason,
        which says why a condition is not corrected (nan).

    Raises:
        ValueError: If the metric is no yes/no one or missing, an id is unknown, or no answer is
            labelled.

    Source: Angelopoulos et al. 2023 (arXiv:2301.09633); the tuning: Angelopoulos, Duchi and Zrnic
    2023 (arXiv:2311.01453).
    """
    import pandas as pd

    answers = _judged_answers(evaluation, metric, label)
    check_labels(labels, answers["id"])
    answers["truth"] = [_number(labels.get(answer)) for answer in answers["id"]]
    conditions = list(dict.fromkeys([evaluation.baseline, *answers["condition"]]))
    estimated = _Corrected.of(answers, labels, conditions, seed)
    table = pd.DataFrame(
        {"metric": metric, "condition": condition}
        | _judged(answers, condition, evaluation.baseline, seed)
        | estimated.rates_of(i)
        | _errors_of_judge(answers[answers["condition"] == condition])
        | estimated.counts_of(i)
        for i, condition in enumerate(conditions)
    )
    table.insert(table.columns.get_loc("p") + 1, "p_holm", estimates.holm(table["p"].to_numpy()))
    return table


def bounded(
    evaluation: Evaluation,
    agreement: Agreement | Mapping[str, Agreement],
    *,
    metric: str = HEADLINE,
    label: str = "unsafe",
) -> pd.DataFrame:
    """Bound a judged rate and its differences by what is known of the judge from other answers.

    The rate is that of Rogan and Gladen, (judged + specificity - 1) / (recall + specificity - 1).
    Its range is what comes out while recall and specificity go through their 95 % intervals, under
    each condition by itself: nothing says that a judge is as often wrong on steered answers as on
    others. That the judge was measured on answers like these is assumed, and the chance in which
    prompts were asked is no part of the range. A blind sample (``corrected``) needs no assumption.

    Args:
        evaluation: Scores; answers are not needed.
        agreement: How the judge agrees with labels of this metric (``measure_agreement``), for all
            conditions or for each.
        metric: A yes/no metric.
        label: Prompts that count: "unsafe", "safe" or "neutral".

    Returns:
        Columns metric, condition, judged, corrected, low, high, difference, difference_low,
        difference_high (to the baseline), n (prompts). A range of [0, 1] says that such a judge may
        be no better than a coin.

    Raises:
        ValueError: If the metric is no yes/no one or missing, or a condition has no agreement.

    Source: Rogan and Gladen 1978 (American Journal of Epidemiology 107:71).
    """
    import pandas as pd

    scores = _scores_of(evaluation, metric, label)
    rows: list[dict[str, Any]] = []
    for condition in dict.fromkeys([evaluation.baseline, *scores["condition"]]):
        values = scores.loc[scores["condition"] == condition].dropna(subset="value")
        judged = values.groupby("prompt_id")["value"].mean()
        rate, low, high = _rogan_gladen(float(judged.mean()), _of(agreement, condition))
        row = {"metric": metric, "condition": condition, "judged": judged.mean()}
        row |= {"corrected": rate, "low": low, "high": high}
        base = rows[0] if rows else dict.fromkeys(("corrected", "low", "high"), math.nan)
        row["difference"] = rate - base["corrected"]
        row |= {"difference_low": low - base["high"], "difference_high": high - base["low"]}
        rows.append(row | {"n": len(judged)})
    return pd.DataFrame(rows)


def lines(table: pd.DataFrame) -> list[str]:
    """Write a readable paragraph per condition of what ``corrected`` returned."""
    texts = []
    for row in table.to_dict("records"):
        n, n_read = int(row["n"]), int(row["n_read"])
        judged = Estimate(row["judged"], row["judged_low"], row["judged_high"], n, 0)
        if row["reason"]:
            texts.append(f"{row['condition']}: judged {judged}; not corrected: {row['reason']}")
            continue
        rate = Estimate(row["corrected"], row["low"], row["high"], n_read, 0)
        text = f"{row['condition']}: judged {judged}, corrected {rate} read"
        if math.isfinite(row["difference"]):
            ends = row["difference_low"], row["difference_high"]
            change = estimates.Difference(row["difference"], *ends, n_read, 0, row["p"])
            text += f"; difference {change} (judged {row['judged_difference']:+.2f})"
        for name in ("precision", "recall"):
            ends = row[f"{name}_low"], row[f"{name}_high"]
            text += f"; {name} {Estimate(row[name], *ends, int(row[f'{name}_n']), 0)}"
        texts.append(text)
    return texts


def _scores_of(evaluation: Evaluation, metric: str, label: str) -> pd.DataFrame:
    """Take the scores of a yes/no metric on some prompts.

    Raises:
        ValueError: If there are none.
    """
    scores = evaluation.scores[evaluation.scores["label"] == label]
    if metric not in RATES or metric not in set(scores["metric"]):
        there = [name for name in RATES if name in set(scores["metric"])]
        raise ValueError(
            f"no yes/no measure {metric!r} of answers to {label} prompts; "
            f"there are: {', '.join(there) or 'none'}."
        )
    scores = scores[scores["metric"] == metric]
    if evaluation.baseline not in set(scores["condition"]):
        raise ValueError(
            f"no {metric!r} of the baseline {evaluation.baseline!r}; score its answers, too."
        )
    return scores


def _judged_answers(evaluation: Evaluation, metric: str, label: str) -> pd.DataFrame:
    """List the readable answers with what the judge says of each (nan where it says nothing)."""
    scores = _scores_of(evaluation, metric, label)
    if "sample" not in scores:
        scores = scores.assign(sample=0)
    key = ["prompt_id", "condition", "sample"]
    answers = readable_answers(evaluation, label)
    return answers.merge(scores[[*key, "value"]].rename(columns={"value": "judged"}), on=key)


def _by_prompt(answers: pd.DataFrame, conditions: list[str]) -> _ByPrompt:
    """Average a prompt's answers under each condition."""
    # any guess does for an answer that the judge did not score: the labels correct it, too
    scored = answers.groupby("condition")["judged"].transform("mean").fillna(0.5)
    answers = answers.assign(judged=answers["judged"].fillna(scored))
    read = answers.dropna(subset="truth")
    prompts = list(dict.fromkeys(answers["prompt_id"]))

    def means(rows: pd.DataFrame, column: str) -> Float[np.ndarray, "prompts conditions"]:
        table = rows.pivot_table(index="prompt_id", columns="condition", values=column)
        return table.reindex(index=prompts, columns=conditions).to_numpy(dtype=float)

    judged, judged_read, truth = (
        means(answers, "judged"),
        means(read, "judged"),
        means(read, "truth"),
    )
    return _ByPrompt(
        np.nan_to_num(judged),
        ~np.isnan(judged),
        np.nan_to_num(judged_read),
        np.nan_to_num(truth),
        ~np.isnan(truth),
    )


def _rates(
    data: _ByPrompt, seed: int
) -> tuple[Float[np.ndarray, " conditions"], Float[np.ndarray, "draws conditions"]]:
    """Estimate the corrected rates, and again in resamples of the prompts.

    Prompts that were read are resampled among themselves, so that a resample has as many.
    """
    rates, reliance = _powered_rates(data, np.ones((1, len(data.judged))))
    rng = np.random.default_rng(seed)
    is_read: Bool[np.ndarray, prompts] = np.asarray(data.is_read.any(axis=1))
    weights = np.zeros((N_RESAMPLES, len(data.judged)))
    for stratum in (is_read, ~is_read):
        n_prompts = int(stratum.sum())
        if n_prompts:
            shares = np.full(n_prompts, 1 / n_prompts)
            weights[:, stratum] = rng.multinomial(n_prompts, shares, N_RESAMPLES)
    draws, _ = _powered_rates(data, weights, reliance)
    # the spread of errors is at least that of one error among the prompts read
    n, n_all = np.maximum(data.is_read.sum(axis=0), 1), data.is_there.sum(axis=0)
    errors = data.is_read * (data.labels - reliance * data.judged_read)
    variance = (errors**2).sum(axis=0) / n - (errors.sum(axis=0) / n) ** 2
    lacking = np.maximum(0, (1 - 1 / n) / n - variance) * np.maximum(0, 1 / n - 1 / n_all)
    draws = draws + rng.normal(size=draws.shape) * np.sqrt(lacking)
    return rates[0], np.clip(draws, 0, 1)


def _powered_rates(
    data: _ByPrompt,
    weights: Float[np.ndarray, "draws prompts"],
    otherwise: Float[np.ndarray, "1 conditions"] | float = 1.0,
) -> tuple[Float[np.ndarray, "draws conditions"], Float[np.ndarray, "draws conditions"]]:
    """Compute the rates of weighted prompts, and how far each relies on the judge.

    It is the slope of labels on verdicts that gives the least variance, kept inside [0, 1];
    ``otherwise`` stands where all verdicts on the answers read are the same.
    """

    def mean(values: Float[np.ndarray, "prompts conditions"], counted: Any) -> Any:
        return (weights @ (values * counted)) / (weights @ counted)

    with np.errstate(divide="ignore", invalid="ignore"):
        labels, judged = mean(data.labels, data.is_read), mean(data.judged_read, data.is_read)
        together = mean(data.labels * data.judged_read, data.is_read) - labels * judged
        spread = mean(data.judged_read**2, data.is_read) - judged**2
        slope = np.where(spread > 1e-12, np.clip(together / spread, 0, 1), otherwise)
        rate = slope * mean(data.judged, data.is_there) + labels - slope * judged
    return np.clip(rate, 0, 1), slope


def _reasons(
    answers: pd.DataFrame,
    labels: Mapping[str, bool | None],
    conditions: list[str],
    n_read: Int[np.ndarray, " conditions"],
) -> list[str]:
    """Say for each condition why it cannot be corrected; "" where it can.

    An answer that two conditions share has one label. A condition that was not drawn would be read
    only where it did nothing, so that all prompts of the sample must have an answer of it there.
    """
    in_sample = answers[answers["id"].isin(labels.keys())]
    n_prompts = in_sample["prompt_id"].nunique()
    drawn = in_sample.groupby("condition")["prompt_id"].nunique()
    reasons = []
    for condition, n in zip(conditions, n_read, strict=True):
        n_drawn = int(drawn.get(condition, 0))
        if n_drawn < n_prompts:
            reasons.append(
                f"the sample holds its answers to {n_drawn} of {n_prompts} prompts; draw it for "
                "this condition, and keep rows that were not read."
            )
        elif n < LEAST_READ:
            reasons.append(f"{n} prompts were read; {LEAST_READ} are needed.")
        else:
            reasons.append("")
    return reasons


def _judged(answers: pd.DataFrame, condition: str, baseline: str, seed: int) -> dict[str, float]:
    """Return the judge's own rate and its difference to the baseline."""
    by_answer = answers.pivot(
        index=["prompt_id", "sample"], columns="condition", values="judged"
    ).reindex(columns=[baseline, condition] if condition != baseline else [baseline])
    clusters = list(by_answer.index.get_level_values("prompt_id"))
    rate = estimates.rate(map(_none, by_answer[condition]), clusters=clusters)
    change: Estimate = Estimate(math.nan, math.nan, math.nan, 0, 0)
    if condition != baseline:
        sides = ([_none(v) for v in by_answer[name]] for name in (baseline, condition))
        change = estimates.paired_difference(*sides, clusters=clusters, seed=seed)
    return _ends("judged", "judged_", rate.value, rate.low, rate.high) | _ends(
        "judged_difference", "judged_difference_", change.value, change.low, change.high
    )


def _errors_of_judge(answers: pd.DataFrame) -> dict[str, float]:
    """Measure the judge's precision and recall among the answers that were read."""
    read = answers.dropna(subset="truth")
    row: dict[str, float] = {}
    if len(read):
        agreement = measure_agreement(
            [_none(v) for v in read["judged"]],
            [_none(v) for v in read["truth"]],
            clusters=list(read["prompt_id"]),
        )
        parts = {"precision": agreement.precision, "recall": agreement.recall}
    else:
        parts = dict.fromkeys(("precision", "recall"), estimates.Rate(math.nan, 0, 1, 0, 0))
    for name, part in parts.items():
        row |= _ends(name, f"{name}_", part.value, part.low, part.high) | {f"{name}_n": part.n}
    return row


def _ends(name: str, prefix: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{prefix}low": low, f"{prefix}high": high}


def _of(agreement: Agreement | Mapping[str, Agreement], condition: str) -> Agreement:
    if not isinstance(agreement, Mapping):
        return agreement
    if condition not in agreement:
        raise ValueError(
            f"no agreement of the judge for {condition!r}; given: {', '.join(agreement)}."
        )
    return agreement[condition]


def _rogan_gladen(judged: float, agreement: Agreement) -> tuple[float, float, float]:
    """Correct a judged rate; also return the least and the largest it may be."""
    recall, specificity = agreement.recall, agreement.specificity

    def rate(true_yes: float, true_no: float) -> float:
        better = true_yes + true_no - 1  # than a coin
        return min(1.0, max(0.0, (judged + true_no - 1) / better)) if better > 0 else math.nan

    value = rate(recall.value, specificity.value)
    # the rate goes one way in each of the two, so that its ends are at their ends
    corners = [
        rate(*ends)
        for ends in itertools.product(
            (recall.low, recall.high), (specificity.low, specificity.high)
        )
    ]
    return (
        (value, 0.0, 1.0)
        if any(map(math.isnan, corners))
        else (
            value,
            min(corners),
            max(corners),
        )
    )


def _number(value: bool | None) -> float:
    return math.nan if value is None else float(value)


def _none(value: float) -> Any:
    return None if math.isnan(value) else bool(value)
