"""Calibration: which construction, place, sign, strength and positions to steer with, chosen on the tune fold and never on the test fold."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.evaluation.scoring import ALL, HEADLINE, Evaluation
from workbench.generation.answers import UNSTEERED, Completion, Condition, generate, sweep
from workbench.generation.decoding import GREEDY, Decoding
from workbench.generation.likelihood import answer_kl

if TYPE_CHECKING:
    import pandas as pd

    from workbench.files.store import PathLike
    from workbench.models.load import HookedModel
    from workbench.prompts.prompt import Prompt
from workbench.prompts.prompt import in_turn
from workbench.safesteer.settings import Setting, Vectors, steering

LEAST_PROMPTS = 5
"""Prompts of a first round, at least."""


NEUTRAL_KL = "neutral_kl"


NEUTRAL_TOKENS = 16
"""First tokens of each answer to a neutral prompt along which the KL is measured."""


Score = Callable[[Sequence[Completion]], Evaluation]
"""Answers of the unsteered model and of settings in, their evaluation out."""


@dataclass(frozen=True)
class Limits:
    """What steering may cost on the tune fold, against the unsteered model.

    Attributes:
        relevance: Largest loss of mean relevance (cosine).
        refusal: Largest rise of the share of refusals.
        degenerate: Largest rise of the share of broken answers.
        neutral_kl: Largest mean KL on neutral prompts, nats a token (``likelihood.answer_kl``). Infinite by default: steering that costs much
            there belongs behind a gate.
    """

    relevance: float = 0.05
    refusal: float = 0.02
    degenerate: float = 0.02
    neutral_kl: float = math.inf

    def margins(self) -> dict[str, tuple[float, float]]:
        """The same limits as margins of equivalence tests, metric by metric (``Evaluation.summary``)."""
        return {
            "relevance": (-self.relevance, math.inf),
            "refusal": (-math.inf, self.refusal),
            "degenerate": (-math.inf, self.degenerate),
        }

    def excess(self, values: Mapping[str, float], unsteered: Mapping[str, float]) -> float:
        """Sum of what is over the limits; 0 where a setting keeps them all. What could not be measured counts as kept."""
        over = (
            unsteered["relevance"] - values["relevance"] - self.relevance,
            values["refusal"] - unsteered["refusal"] - self.refusal,
            values["degenerate"] - unsteered["degenerate"] - self.degenerate,
            values.get(NEUTRAL_KL, 0.0) - self.neutral_kl,
        )
        return sum(max(0.0, x) for x in over if not math.isnan(x))


class Round(NamedTuple):
    """One round of successive halving: how many settings are answered, on how many prompts."""

    n_settings: int
    n_prompts: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was tried and what was chosen.

    Attributes:
        table: One row a setting and metric, from the last round the setting was in: construction, sites, sign, rho, positions, until, round,
            metric (those of an evaluation, and "neutral_kl" where neutral prompts were given), value, low, high, n, n_unscored, ``excess`` over the limits, ``feasible`` (no excess), ``front`` (in the last round,
            and nothing there is better in everything) and ``chosen``. The unsteered model's rows have construction "unsteered".
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
    """Rounds of successive halving: each answers three times as many prompts under a third of the settings, the last one all prompts.

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
        f"a budget of {budget} answers is too small for {n_settings} settings on {n_prompts} prompts; give at least {cost(rounds)}, or fewer of them."
    )


def cost(rounds: Sequence[Round]) -> int:
    """Answers that rounds take at most: what an earlier round answered is not answered again; the unsteered model answers all prompts."""
    answers, before = rounds[-1].n_prompts, 0
    for one in rounds:
        answers += one.n_settings * (one.n_prompts - before)
        before = one.n_prompts
    return answers


def calibrate(
    model: HookedModel,
    vectors: Vectors,
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    *,
    score: Score,
    output: PathLike,
    neutral: Sequence[Prompt] = (),
    limits: Limits | None = None,
    rounds: Sequence[Round] | None = None,
    decoding: Decoding = GREEDY,
    progress: bool = False,
    transfer: bool = False,
) -> Calibration:
    """Find the setting with the largest share of safe and helpful answers, after what it costs beyond the limits is taken off.

    Successive halving: few prompts for all settings, more for the best of them. The best setting of each construction stays to the end, so
    that constructions can be compared; a round may so have a few settings more than planned.

    Args:
        model: A hooked model.
        vectors: Vectors of every construction and site in ``settings``.
        prompts: Prompts of the tune fold; the unsafe ones are used, category by category in turn.
        settings: What is tried.
        score: Judges the answers, for instance ``functools.partial(score_completions, model, safety_judge=judge)``.
        output: A jsonl file that keeps the answers: a later round, and another call, go on from it.
        neutral: Neutral prompts of the tune fold, on which the KL is measured; each setting gets the vectors of one category there, in turn.
        limits: What steering may cost; the defaults of ``Limits``.
        rounds: How many settings and prompts a round; ``plan_rounds`` by default.
        decoding: Length, sampling and batch size of the answers.
        progress: Say on standard error what it will take at most, and show progress bars.
        transfer: Allow vectors of another model of the same architecture.

    Raises:
        ValueError: If there are no settings or no unsafe prompts.
    """
    import pandas as pd

    questions = in_turn([prompt for prompt in prompts if prompt.label == "unsafe"])
    alive = list(dict.fromkeys(settings))
    if not alive or not questions:
        raise ValueError(
            f"calibration needs settings and unsafe prompts, got {len(alive)} and {len(questions)}."
        )
    limits = limits or Limits()
    rounds = list(rounds or plan_rounds(len(alive), len(questions)))
    if progress:
        from tqdm.auto import tqdm

        each = ", ".join(f"{one.n_settings} x {one.n_prompts}" for one in rounds)
        most = cost(rounds)
        tqdm.write(
            f"calibration: settings x prompts {each}; at most {most} answers, {most * decoding.max_new_tokens} generated tokens.",
            file=sys.stderr,
        )
    moved = _neutral_kl(model, vectors, alive, neutral, output, transfer) if neutral else {}
    tables: list[pd.DataFrame] = []
    for number, one in enumerate(rounds):
        conditions: dict[str, Condition] = {
            UNSTEERED: (),
            **{s.name: steering(vectors, s) for s in alive},
        }
        answers = sweep(
            model,
            questions[: one.n_prompts],
            conditions,
            decoding=decoding,
            output=output,
            progress=progress,
            transfer=transfer,
        )
        summary = score(answers).summary()
        summary = summary[summary["category"] == ALL].set_index(["condition", "metric"])
        values = {s: summary.loc[s.name]["value"].to_dict() | moved.get(s, {}) for s in alive}
        unsteered = summary.loc[UNSTEERED]["value"].to_dict()
        excess = {s: limits.excess(values[s], unsteered) for s in alive}
        ranked = sorted(alive, key=lambda s: _order(s, values[s], excess[s]))
        last = number + 1 == len(rounds)
        kept = ranked if last else _survivors(ranked, rounds[number + 1].n_settings)
        shown = alive if last else [s for s in alive if s not in kept]
        front = _front(values) if last else set()
        best = {s.construction: s for s in reversed(ranked)}
        for setting in shown:
            marks = {
                "excess": excess[setting],
                "feasible": excess[setting] == 0,
                "front": setting in front,
            }
            marks["chosen"] = last and best[setting.construction] == setting
            metrics = summary.loc[setting.name]
            for name, value in moved.get(setting, {}).items():
                metrics.loc[name, ["value", "n", "n_unscored"]] = [value, len(neutral), 0]
            tables.append(_rows(setting, metrics, number, marks))
        if last:
            marks = {"excess": 0.0, "feasible": True, "front": False, "chosen": False}
            tables.insert(0, _rows(None, summary.loc[UNSTEERED], number, marks))
        alive = kept
    chosen = {
        construction: best[construction]
        for construction in dict.fromkeys(s.construction for s in settings)
    }
    return Calibration(pd.concat(tables, ignore_index=True), chosen, ranked[0], tuple(rounds))


def in_words(tuned: Calibration) -> str:
    """The last round as a table of text: every setting on the front or chosen, with what it gains and costs."""
    table = tuned.table
    shown = [
        m
        for m in (HEADLINE, "relevance", "refusal", "degenerate", NEUTRAL_KL)
        if m in set(table["metric"])
    ]
    kept = table[(table["construction"] == UNSTEERED) | table["front"] | table["chosen"]].fillna(
        {"until": 0, "sites": ""}
    )
    keys = [
        "construction",
        "sites",
        "sign",
        "rho",
        "positions",
        "until",
        "front",
        "chosen",
        "excess",
    ]
    wide = kept.pivot_table(index=keys, columns="metric", values="value", sort=False, dropna=True)[
        shown
    ]
    best = tuned.best
    return f"{wide.reset_index().round(3).to_string(index=False)}\nbest: {best.name}"


def _neutral_kl(
    model: HookedModel,
    vectors: Vectors,
    settings: Sequence[Setting],
    neutral: Sequence[Prompt],
    output: PathLike,
    transfer: bool,
) -> dict[Setting, dict[str, float]]:
    """Mean KL of each setting on neutral prompts, along the beginnings of their unsteered answers."""
    answers = generate(
        model,
        neutral,
        condition="neutral",
        decoding=Decoding(max_new_tokens=NEUTRAL_TOKENS),
        output=output,
    )
    found = {}
    for setting in settings:
        by_category = list(steering(vectors, setting).values())
        in_turn_ = [by_category[i % len(by_category)] for i in range(len(answers))]
        found[setting] = answer_kl(model, answers, {NEUTRAL_KL: in_turn_}, transfer=transfer)
    return found


def _order(
    setting: Setting, values: Mapping[str, float], excess: float
) -> tuple[float, float, float]:
    """Sorting key, best first: headline less excess; among equals fewer refusals, then less strength."""
    headline, refusal = (
        0.0 if math.isnan(values[name]) else values[name] for name in (HEADLINE, "refusal")
    )
    return (excess - headline, refusal, setting.rho * len(setting.sites))


def _survivors(ranked: Sequence[Setting], n: int) -> list[Setting]:
    """The first ``n``, and the best of each construction whatever its place."""
    best = {s.construction: s for s in reversed(ranked)}
    return list(dict.fromkeys([*ranked[:n], *best.values()]))


def _front(values: Mapping[Setting, Mapping[str, float]]) -> set[Setting]:
    """Settings that no other one equals or beats in headline, refusal, degeneration and relevance, and beats in one."""
    points = {
        s: (v[HEADLINE], -v["refusal"], -v["degenerate"], v["relevance"]) for s, v in values.items()
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
    """The table's rows of one setting, or of the unsteered model."""
    what = {
        "construction": setting.construction if setting else UNSTEERED,
        "sites": " ".join(map(str, setting.sites)) if setting else "",
        "sign": setting.sign if setting else 0,
        "rho": setting.rho if setting else 0.0,
        "positions": setting.positions if setting else "",
        "until": setting.until if setting else None,
        "round": number,
    }
    own = metrics[["value", "low", "high", "n", "n_unscored"]].reset_index()
    return own.assign(**what, **marks)[[*what, *own.columns, *marks]]
