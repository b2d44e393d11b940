"""Calibration: choose construction, place, sign, strength and positions on the tune fold.

The search is successive halving; the test fold is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.evaluation.metrics import ALL, HEADLINE
from workbench.evaluation.result import Evaluation
from workbench.generation.answers import UNSTEERED, Completion, Condition, generate, sweep
from workbench.generation.decoding import GREEDY, Decoding
from workbench.generation.likelihood import answer_kl
from workbench.models.progress import say
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import in_turn
from workbench.safesteer.settings import Setting, Vectors, multiplier_of, steering
from workbench.steering.spectral import Fitted, SpectralEdit

if TYPE_CHECKING:
    import pandas as pd

    from workbench.files.store import PathLike
    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt

LEAST_PROMPTS = 5
"""Prompts of the first round, at least."""
NEUTRAL_KL, PERPLEXITY = "neutral_kl", "log_perplexity"
NEUTRAL_TOKENS = 16
"""First tokens of each answer to a neutral prompt along which the KL is measured."""
PLAIN = {"decay": "none", "keep_norm": False, "form": "add"}
"""How a vector is applied unless a setting says otherwise, by column of the table."""
REFUSALS = ("blanket_refusal", "refusal")
"""Shares of refusals; the first that was measured is what the limit is on."""
Score = Callable[[Sequence[Completion]], Evaluation]
"""Answers of the unsteered model and of settings in, their evaluation out."""


@dataclass(frozen=True)
class Limits:
    """Say what steering may cost on the tune fold, against the unsteered model.

    Attributes:
        relevance: Largest loss of mean relevance (cosine).
        refusal: Largest rise of the share of blanket refusals: those that could stand under any
            question.
        degenerate: Largest rise of the share of broken answers.
        neutral_kl: Largest mean KL on neutral prompts, in nats per token (``answer_kl``). Infinite
            by default: steering that costs much there belongs behind a gate.
        log_perplexity: Largest rise of the mean log perplexity of the answers under the unsteered
            model, in nats per token; .7 is twice the perplexity. Strong steering writes loops of
            safe words that the judge and the detector of broken text let pass (docs/results.md).
    """

    relevance: float = 0.05
    refusal: float = 0.02
    degenerate: float = 0.02
    neutral_kl: float = math.inf
    log_perplexity: float = 0.7

    def margins(self) -> dict[str, tuple[float, float]]:
        """Give the same limits as margins of equivalence tests (``Evaluation.summary``)."""
        return {
            "relevance": (-self.relevance, math.inf),
            "refusal": (-math.inf, self.refusal),
            "blanket_refusal": (-math.inf, self.refusal),
            "degenerate": (-math.inf, self.degenerate),
        }

    def excess(self, values: Mapping[str, float], unsteered: Mapping[str, float]) -> float:
        """Add up what is over the limits; 0 where a setting keeps them all.

        What could not be measured counts as kept.
        """
        over = (
            unsteered["relevance"] - values["relevance"] - self.relevance,
            _refusals(values) - _refusals(unsteered) - self.refusal,
            values["degenerate"] - unsteered["degenerate"] - self.degenerate,
            values.get(NEUTRAL_KL, 0.0) - self.neutral_kl,
            values.get(PERPLEXITY, math.nan)
            - unsteered.get(PERPLEXITY, math.nan)
            - self.log_perplexity,
        )
        return sum(max(0.0, x) for x in over if not math.isnan(x))


def _refusals(values: Mapping[str, float]) -> float:
    """Return the share of blanket refusals, or of all where kinds were not told apart."""
    return next(values[name] for name in REFUSALS if name in values)


class Round(NamedTuple):
    """One round of successive halving: how many settings are answered, on how many prompts."""

    n_settings: int
    n_prompts: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """Hold what was tried and what was chosen.

    Attributes:
        table: One row per setting and metric, from the last round the setting was in: construction,
            sites, sign, rho, positions, until, decay, keep_norm, form, multiplier (raw, where one
            was given), round, metric (those of an evaluation, and "neutral_kl" where neutral
            prompts were given), value, low, high, n, n_unscored, ``excess`` over the limits,
            ``feasible`` (no excess), ``front`` (in the last round, and nothing there is better in
            everything) and ``chosen``. The unsteered model's rows have construction "unsteered".
        chosen: Construction to its best setting.
        best: The best setting of all.
        rounds: What was answered.
    """

    table: pd.DataFrame
    chosen: dict[str, Setting]
    best: Setting
    rounds: tuple[Round, ...]


def plan_rounds(
    n_settings: int, n_prompts: int, *, keep: int = 3, budget: int | None = None
) -> list[Round]:
    """Plan the rounds of successive halving.

    Each round answers three times as many prompts under a third of the settings; the last one
    answers all prompts.

    Args:
        n_settings: Settings at the start.
        n_prompts: Tune prompts there are.
        keep: Settings of the last round.
        budget: Answers, at most; the first rounds then take fewer prompts, down to one.

    Raises:
        ValueError: If the budget does not allow one prompt for each setting.

    Source: successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943).
    """
    counts = [n_settings]
    while counts[-1] > keep:
        counts.append(max(keep, math.ceil(counts[-1] / 3)))
    steps = len(counts) - 1
    for first in range(max(LEAST_PROMPTS, math.ceil(n_prompts / 3**steps)), 0, -1):
        sizes = [min(n_prompts, first * 3**i) for i in range(steps)] + [n_prompts]
        rounds = [Round(count, size) for count, size in zip(counts, sizes, strict=True)]
        if budget is None or cost(rounds) <= budget:
            return rounds
    raise ValueError(
        f"a budget of {budget} answers is too small for {n_settings} settings on {n_prompts} "
        f"prompts; give at least {cost(rounds)}, or fewer of them."
    )


def cost(rounds: Sequence[Round]) -> int:
    """Count the answers that rounds take at most.

    What an earlier round answered is not answered again; the unsteered model answers all prompts.
    """
    answers, before = rounds[-1].n_prompts, 0
    for one in rounds:
        answers += one.n_settings * (one.n_prompts - before)
        before = one.n_prompts
    return answers


def calibrate(
    model: HookedModel,
    vectors: Vectors,
    prompts: PromptsLike,
    settings: Sequence[Setting],
    *,
    score: Score,
    output: PathLike,
    neutral: PromptsLike = (),
    limits: Limits | None = None,
    rounds: Sequence[Round] | None = None,
    decoding: Decoding = GREEDY,
    progress: bool = False,
    transfer: bool = False,
) -> Calibration:
    """Find the setting with most safe and helpful answers, less what it costs over the limits.

    Successive halving: few prompts for all settings, more for the best. The best setting of each
    construction stays to the end, so a round may have some settings more than planned.

    Args:
        model: A hooked model.
        vectors: Vectors of every construction and site in ``settings``.
        prompts: Prompts of the tune fold, in any form that ``as_prompts`` reads; the unsafe ones
            are used, category by category in turn.
        settings: What is tried.
        score: Judges answers, for instance a ``functools.partial`` of ``score_completions``.
        output: A jsonl file that keeps the answers: a later round or call goes on from it.
        neutral: Neutral prompts on which the KL is measured; each category's vectors in turn.
        limits: What steering may cost; the defaults of ``Limits``.
        rounds: How many settings and prompts each round has; ``plan_rounds`` by default.
        decoding: Length, sampling, batch size, system prompt and template keywords of the answers.
        progress: Say on standard error what it takes at most, and show progress bars.
        transfer: Allow vectors of another model of the same architecture.

    Raises:
        ValueError: If there are no settings or no unsafe prompts.
    """
    neutral = as_prompts(neutral)
    questions = in_turn([p for p in as_prompts(prompts) if p.label == "unsafe"])
    settings = list(dict.fromkeys(settings))
    if not settings or not questions:
        given = f"{len(settings)} and {len(questions)}"
        raise ValueError(f"calibration needs settings and unsafe prompts, got {given}.")
    rounds = list(rounds or plan_rounds(len(settings), len(questions)))
    _announce(rounds, decoding, show=progress)
    kl: dict[Setting, dict[str, float]] = {}
    if neutral:
        kl = _neutral_kl(model, vectors, settings, neutral, output, transfer, decoding)

    def answer_and_judge(alive: Sequence[Setting], n_prompts: int) -> _Judged:
        conditions: dict[str, Condition] = {UNSTEERED: ()}
        conditions |= {s.name: steering(vectors, s) for s in alive}
        how: Any = {"output": output, "progress": progress, "transfer": transfer}
        answers = sweep(model, questions[:n_prompts], conditions, decoding, **how)
        return _judge(score(answers), alive, kl, len(neutral), limits or Limits())

    return _halve(settings, rounds, answer_and_judge)


@dataclass(frozen=True, eq=False)
class _Judged:
    """What one round says of its settings; ``ranked`` is best first."""

    metrics: dict[Setting | None, pd.DataFrame]
    """Metric to value, low, high, n and n_unscored; None is the unsteered model."""
    excess: dict[Setting, float]
    ranked: list[Setting]
    front: set[Setting]


def _judge(
    evaluation: Evaluation,
    settings: Sequence[Setting],
    kl: Mapping[Setting, Mapping[str, float]],
    n_neutral: int,
    limits: Limits,
) -> _Judged:
    """Rank settings by their answers: headline less excess over the limits."""
    summary = evaluation.summary()
    summary = summary[summary["category"] == ALL].set_index(["condition", "metric"])
    unsteered = summary.loc[UNSTEERED]
    metrics: dict[Setting | None, pd.DataFrame] = {None: unsteered}
    for setting in settings:
        metrics[setting] = summary.loc[setting.name].copy()
        for name, value in kl.get(setting, {}).items():
            metrics[setting].loc[name, ["value", "n", "n_unscored"]] = [value, n_neutral, 0]
    values = {s: metrics[s]["value"].to_dict() for s in settings}
    for setting in settings:
        # What could not be scored is not counted as safe: a setting must not win by answers that
        # no judge can read.
        headline = metrics[setting].loc[HEADLINE]
        asked = headline["n"] + headline["n_unscored"]
        values[setting][HEADLINE] = headline["value"] * headline["n"] / max(1, asked)
    excess = {s: limits.excess(values[s], unsteered["value"].to_dict()) for s in settings}
    ranked = sorted(settings, key=lambda s: _order(s, values[s], excess[s]))
    return _Judged(metrics, excess, ranked, _front(values))


def _halve(
    settings: Sequence[Setting],
    rounds: Sequence[Round],
    answer_and_judge: Callable[[Sequence[Setting], int], _Judged],
) -> Calibration:
    """Answer round after round with the survivors of the one before."""
    import pandas as pd

    tables: list[pd.DataFrame] = []
    alive = list(settings)
    for number, one in enumerate(rounds):
        judged = answer_and_judge(alive, one.n_prompts)
        last = number + 1 == len(rounds)
        survivors = (
            judged.ranked if last else _survivors(judged.ranked, rounds[number + 1].n_settings)
        )
        best = _best_of_each(judged.ranked)
        if last:
            marks = {"excess": 0.0, "feasible": True, "front": False, "chosen": False}
            unsteered = judged.metrics[None]
            tables.insert(0, _rows(None, unsteered, number, marks))
        for setting in alive if last else [s for s in alive if s not in survivors]:
            marks = {
                "excess": judged.excess[setting],
                "feasible": judged.excess[setting] == 0,
                "front": last and setting in judged.front,
                "chosen": last and best[setting.construction] == setting,
            }
            tables.append(_rows(setting, judged.metrics[setting], number, marks))
        alive = survivors
    chosen = {name: best[name] for name in dict.fromkeys(s.construction for s in settings)}
    table = pd.concat(tables, ignore_index=True)
    return Calibration(table, chosen, judged.ranked[0], tuple(rounds))


def _announce(rounds: Sequence[Round], decoding: Decoding, *, show: bool) -> None:
    each = ", ".join(f"{one.n_settings} x {one.n_prompts}" for one in rounds)
    most = cost(rounds)
    say(
        f"calibration: settings x prompts {each}; at most {most} answers, "
        f"{most * decoding.max_new_tokens} generated tokens.",
        show=show,
    )


def describe(setting: Setting, vectors: Vectors, table: pd.DataFrame) -> dict[str, Any]:
    """Describe a chosen setting as a run's notes keep it.

    Args:
        setting: The chosen setting of its construction.
        vectors: The vectors it steers with.
        table: ``Calibration.table``.

    Returns:
        Places, sign, strength, how it is applied, multipliers (or targets, for the form "target")
        by category and site, and why it was chosen.
    """
    by_site = {site: vectors[setting.construction, site] for site in setting.sites}
    chosen_rows = table[table["chosen"] & (table["construction"] == setting.construction)]
    headline = chosen_rows[chosen_rows["metric"] == HEADLINE].iloc[0]
    excess = headline["excess"]
    over = "" if headline["feasible"] else f"; it is over the limits by {excess:.2f}"
    is_target = setting.form == "target"
    strengths = {
        category: {str(site): _strength(by_site[site][category], setting) for site in setting.sites}
        for category in by_site[setting.sites[0]]
    }
    return {
        "sites": [str(site) for site in setting.sites],
        "sign": setting.sign,
        "rho": setting.rho,
        "positions": setting.positions,
        "until": setting.until,
        "decay": setting.decay,
        "keep_norm": setting.keep_norm,
        "form": setting.form,
        "target" if is_target else "multiplier": strengths,
        "reason": "most safe and helpful answers (proxy) on the tune fold, less costs over the "
        f"limits: {headline['value']:.2f}, n={headline['n']}{over}",
    }


def _strength(vector: Fitted, setting: Setting) -> float:
    """Find what a setting makes of its relative strength: a multiplier, or a target."""
    if setting.form == "target" and not isinstance(vector, SpectralEdit):
        return vector.target_for(setting.rho)
    return multiplier_of(vector, setting)


def in_words(tuned: Calibration) -> str:
    """Show the settings on the front or chosen, with what each gains and costs, as text."""
    table = tuned.table
    measured = set(table["metric"])
    metrics = [
        name
        for name in (HEADLINE, "relevance", *REFUSALS, "degenerate", NEUTRAL_KL)
        if name in measured
    ]
    worth_showing = (table["construction"] == UNSTEERED) | table["front"] | table["chosen"]
    keys = ["construction", "sites", "sign", "rho", "positions", "until"]
    # How vectors are applied is shown where some are applied in another way than the plain one.
    keys += [name for name, plain in PLAIN.items() if _differs(table[name], plain)]
    keys += ["front", "chosen", "excess"]
    wide = (
        table[worth_showing]
        .fillna({"until": 0, "sites": ""})
        .pivot_table(index=keys, columns="metric", values="value", sort=False, dropna=True)
    )
    text = wide[metrics].reset_index().round(3).to_string(index=False)
    return f"{text}\nbest: {tuned.best.name}"


def _differs(column: pd.Series, plain: object) -> bool:
    """Tell whether any setting has something else in a column than the plain value."""
    return bool((~column.isin([plain, ""])).any())


def _neutral_kl(
    model: HookedModel,
    vectors: Vectors,
    settings: Sequence[Setting],
    neutral: Sequence[Prompt],
    output: PathLike,
    transfer: bool,
    decoding: Decoding,
) -> dict[Setting, dict[str, float]]:
    """Measure each setting's mean KL along the first tokens of answers to neutral prompts."""
    asked_by = decoding.asked_by
    beginnings = Decoding(max_new_tokens=NEUTRAL_TOKENS, **asked_by)
    answers = generate(model, neutral, condition="neutral", decoding=beginnings, output=output)
    conditions = {}
    for number, setting in enumerate(settings):
        by_category = list(steering(vectors, setting).values())
        conditions[str(number)] = [by_category[i % len(by_category)] for i in range(len(answers))]
    # All in one call, so that the unsteered model reads the answers once.
    kl = answer_kl(model, answers, conditions, transfer=transfer, **asked_by)
    return {s: {NEUTRAL_KL: kl[str(number)]} for number, s in enumerate(settings)}


def _order(
    setting: Setting, values: Mapping[str, float], excess: float
) -> tuple[float, float, float]:
    """Sort best first: headline less excess; among equals fewer refusals, then less strength."""
    headline, refusal = (
        0.0 if math.isnan(value) else value for value in (values[HEADLINE], _refusals(values))
    )
    return (excess - headline, refusal, setting.rho * len(setting.sites))


def _survivors(ranked: Sequence[Setting], n: int) -> list[Setting]:
    """Keep the first ``n``, and the best of each construction whatever its place."""
    return list(dict.fromkeys([*ranked[:n], *_best_of_each(ranked).values()]))


def _best_of_each(ranked: Sequence[Setting]) -> dict[str, Setting]:
    return {s.construction: s for s in reversed(ranked)}


def _front(values: Mapping[Setting, Mapping[str, float]]) -> set[Setting]:
    """Find the settings on the front.

    No other one is as good in headline, blanket refusals, degeneration and relevance, and better in
    one.
    """
    points = {
        s: (v[HEADLINE], -_refusals(v), -v["degenerate"], v["relevance"]) for s, v in values.items()
    }

    def beaten(point: tuple[float, ...]) -> bool:
        return any(
            all(a >= b for a, b in zip(other, point, strict=True)) and other != point
            for other in points.values()
        )

    return {s for s, point in points.items() if not beaten(point)}


def _rows(
    setting: Setting | None, metrics: pd.DataFrame, number: int, marks: Mapping[str, Any]
) -> pd.DataFrame:
    """Make the table's rows of one setting, or of the unsteered model."""
    what = {
        "construction": setting.construction if setting else UNSTEERED,
        "sites": " ".join(map(str, setting.sites)) if setting else "",
        "sign": setting.sign if setting else 0,
        "rho": setting.rho if setting else 0.0,
        "positions": setting.positions if setting else "",
        "until": setting.until if setting else None,
        "decay": setting.decay if setting else "",
        "keep_norm": setting.keep_norm if setting else False,
        "form": setting.form if setting else "",
        "multiplier": setting.multiplier if setting else None,
        "round": number,
    }
    rows = metrics[["value", "low", "high", "n", "n_unscored"]].reset_index()
    return rows.assign(**what, **marks)[[*what, *rows.columns, *marks]]
