"""Measure the pooled self-contrast on the test fold beside prompting and controls.

    python benchmarks/steering.py --out runs/steering --seed 0    # fifteen minutes on two cores
    python benchmarks/steering.py --collect runs/steering0 runs/steering1    # compare seeds

The headline is the share of answers that are safe, on topic and no refusal. Place and strength were
chosen on tune-fold questions of seed 0 (``workbench run`` does that by successive halving); here
they are fixed, and the test fold is answered once. The random control has eight directions of equal
norm, in turn over the prompts. The gate is fitted as a run does it. blind.jsonl holds the answers
shuffled and without their conditions, to be read blind; ``--reading`` prints what a language model
read, in three readings of different conditions and strictness (steering_reading.csv).
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

import workbench as wb
from workbench.evaluation.comparisons import judge_agreement
from workbench.evaluation.gating import (
    CLOSED,
    REFUSING,
    activation_rates,
    beside_a_gate,
    cells,
    confusion,
    opened_for,
    refusing,
    roc,
)
from workbench.evaluation.scoring import score_completions
from workbench.files.store import write_json, write_jsonl, write_text
from workbench.judges.framing import framing_judge_for
from workbench.prompts.prompt import in_turn
from workbench.safesteer.conditions import ALWAYS, GATED, behind_gate, controls, for_everyone
from workbench.safesteer.constructions import Measured, fit_all
from workbench.safesteer.own_answers import instructed, kept_by, self_contrast, went_along
from workbench.safesteer.settings import Setting, steering
from workbench.stats.estimates import paired_difference, rate
from workbench.steering.combine import summed

FOUR_SITES = tuple(wb.Site(layer, "resid_post") for layer in (10, 12, 14, 16))
FRAMINGS = ("goes_along", "neutral", "off_topic_or_broken", "refusal", "safe_reframing")
"""The words of the readings in steering_reading.csv, which is older than today's six framings."""
ONE_SITE, GATE_SITE = wb.Site(15, "resid_post"), wb.Site(9, "resid_post")
MILD, STRONG, ONE_LAYER = 0.06, 0.09, 0.17
N_RANDOM, N_BESIDE = 8, 30
FITTED = ("prompt_contrast", "prompt_guided", "answer_contrast_pooled", "self_contrast_pooled")
MAIN = "self-contrast, rho .06"
SETTINGS = {
    MAIN: Setting("self_contrast_pooled", FOUR_SITES, 1, MILD),
    "self-contrast, rho .09": Setting("self_contrast_pooled", FOUR_SITES, 1, STRONG),
    "openings, rho .06": Setting("answer_contrast_pooled", FOUR_SITES, 1, MILD),
    "openings and self-contrast, rho .06": Setting("both", FOUR_SITES, 1, MILD),
    "prompt contrast": Setting("prompt_contrast", (ONE_SITE,), 1, ONE_LAYER),
    "prompt contrast, guided": Setting("prompt_guided", (ONE_SITE,), 1, ONE_LAYER),
}
SHOWN = (
    "safe_helpful_proxy",
    "safe",
    "unsafe",
    "refusal",
    "relevant_answer",
    "degenerate",
    "relevance",
    "log_perplexity",
    "distinct_2",
    "rouge_l",
    "bleu",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/steering", help="folder for answers and tables")
    parser.add_argument(
        "--reading", action="store_true", help="print the blind reading that is committed, and stop"
    )
    parser.add_argument(
        "--collect",
        nargs="+",
        metavar="FOLDER",
        help="print the results of several seeds side by side, and stop",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds and controls")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, help="test prompts per category (default: all)")
    options = parser.parse_args()
    if options.reading:
        show_reading()
    elif options.collect:
        collect(options.collect)
    else:
        measure(Path(options.out), options.seed, options.max_new_tokens, options.limit)


def measure(out: Path, seed: int, max_new_tokens: int, limit: int | None) -> None:
    """Fit on the fit fold, answer the test fold under every condition, and write the tables."""
    model = wb.load_model("embedded")
    judge = framing_judge_for(model)
    folds = wb.split_prompts(wb.load_prompts(), seed=seed)
    fitted = fit_everything(model, judge, folds, out)
    held_out = fitted.prompts[GATE_SITE].of(folds.test)
    for name, table in (("rates", activation_rates), ("confusion", confusion), ("roc", roc)):
        write_csv(out / f"gate_{name}.csv", table(fitted.gate, held_out))
    openings = opened_for(fitted.gate, held_out)
    fired = {
        prompt.id: opening != CLOSED for prompt, opening in zip(folds.test, openings, strict=True)
    }

    # answer the test fold
    questions = questions_of(folds.test, limit)
    conditions = conditions_of(fitted, questions, fired, seed)
    sampling: dict[str, Any] = {
        "decoding": wb.Decoding(max_new_tokens=max_new_tokens),
        "output": out / "test.jsonl",
        "progress": True,
    }
    completions = wb.sweep(model, questions, for_everyone(conditions, questions), **sampling)
    prompted = wb.generate(model, instructed(questions), condition="instruction", **sampling)
    completions += [
        replace(answer, prompt=question)
        for answer, question in zip(prompted, questions, strict=True)
    ]
    completions += refusing(completions, fired, model)

    # score the answers and write them
    result = score_completions(model, completions, safety_judge=judge)
    summary = beside_a_gate(result, fired, MAIN, GATED, seed=seed).summary(seed=seed)
    write_csv(out / "evaluation.csv", summary)
    write_csv(out / "gate_cells.csv", cells(result, fired, GATED))
    write_jsonl(out / "completions.jsonl", result.answers())
    write_blind(out, completions, seed)
    show(result, summary)
    print(f"\ngate at {GATE_SITE}")
    print(activation_rates(fitted.gate, held_out).round(3).to_string(index=False))
    print(cells(result, fired, GATED).round(3).T.to_string())
    print(judge_agreement(result).round(2).to_string(index=False))


class Fitted(NamedTuple):
    """What was fitted on the fit fold: vectors by construction and site, and the gate."""

    prompts: Any
    own_answers: Any
    vectors: dict[Any, Any]
    gate: wb.Gate


def fit_everything(model: Any, judge: Any, folds: wb.Folds, out: Path) -> Fitted:
    """Let the model answer the fit fold, and fit vectors and gate on prompts and answers."""
    fit, tune, test = folds
    keep_safe, keep_unsafe = kept_by(judge)
    own_pairs = self_contrast(
        model,
        fit,
        keep_safe=keep_safe,
        keep_unsafe=keep_unsafe,
        output=out / "fit.jsonl",
        progress=True,
    )
    n_questions = sum(prompt.label == "unsafe" for prompt in fit)
    print(f"{len(own_pairs) // 2} pairs of own answers kept, of {n_questions} questions")
    store: Any = {"store": out / "activations"}
    sites = [*FOUR_SITES, ONE_SITE]
    prompts = wb.cache_activations(model, [*fit, *tune, *test], [GATE_SITE, *sites], **store)
    answers: dict[Any, Any] = {
        name: wb.cache_activations(model, pairs, sites, span="response", **store)
        for name, pairs in (
            ("openings", wb.answer_prompts(fit)),
            ("own answers", own_pairs),
        )
    }
    guided = went_along(model, fit, keep_unsafe, output=out / "fit.jsonl", progress=True)
    print(f"{len(guided)} questions that the model goes along with")
    measured = Measured(prompts, answers, frozenset(prompt.id for prompt in guided))
    vectors: dict[Any, Any] = dict(fit_all(measured, fit, FITTED))
    for site in FOUR_SITES:
        both = (vectors["self_contrast_pooled", site], vectors["answer_contrast_pooled", site])
        vectors["both", site] = {
            category: summed([by_category[category] for by_category in both])
            for category in both[0]
        }
    gate = wb.fit_gate(prompts[GATE_SITE].of(fit), prompts[GATE_SITE].of(tune))
    return Fitted(prompts, answers["own answers"], vectors, gate)


def questions_of(test: Sequence[wb.Prompt], limit: int | None) -> list[wb.Prompt]:
    """Take the unsafe test prompts, and some of their safe twins and of the neutral ones."""
    unsafe = in_turn(wb.select_prompts(test, label="unsafe", limit=limit))
    safe = in_turn([prompt for prompt in test if prompt.label == "safe"])[:N_BESIDE]
    return [*unsafe, *safe, *wb.select_prompts(test, label="neutral", limit=N_BESIDE)]


def conditions_of(
    fitted: Fitted, questions: Sequence[wb.Prompt], fired: dict[str, bool], seed: int
) -> dict[str, Any]:
    """Name the conditions: constructions, the main one behind its gate, and controls."""
    vectors, main_setting = fitted.vectors, SETTINGS[MAIN]
    conditions: dict[str, Any] = {
        name: steering(vectors, setting) for name, setting in SETTINGS.items()
    }
    share_opened = sum(fired[prompt.id] for prompt in questions) / len(questions)
    conditions |= behind_gate(vectors, main_setting, fitted.gate, share_opened)
    shuffled = controls(vectors, main_setting, fitted.own_answers, seed=seed)
    conditions["shuffled labels"] = shuffled["shuffled labels"]
    draws = [
        [
            wb.add_vector(
                wb.random_vector(
                    next(iter(vectors["self_contrast_pooled", site].values())),
                    seed=1000 * draw + seed + site.layer,
                ),
                rho=MILD,
            )
            for site in FOUR_SITES
        ]
        for draw in range(N_RANDOM)
    ]
    conditions["random"] = {prompt.id: draws[i % N_RANDOM] for i, prompt in enumerate(questions)}
    return conditions


def write_blind(out: Path, completions: Sequence[wb.Completion], seed: int) -> None:
    """Write the answers to unsafe questions shuffled and without conditions, and their key."""
    to_read = [
        answer
        for answer in completions
        if answer.prompt.label == "unsafe" and answer.condition not in (GATED, ALWAYS, REFUSING)
    ]
    order = list(range(len(to_read)))
    random.Random(seed).shuffle(order)
    write_jsonl(
        out / "blind.jsonl",
        [{"key": i, "prompt": to_read[i].prompt.text, "answer": to_read[i].text} for i in order],
    )
    key = {
        str(i): [answer.condition, answer.prompt.id, text_digest(answer.text)]
        for i, answer in enumerate(to_read)
    }
    write_json(out / "blind_key.json", key)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, float_format="%.5g"))


def text_digest(text: str) -> str:
    """Hash by which a reading names an answer."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def show_reading() -> None:
    """Print the rates of each label in each reading, and the differences to unsteered."""
    frame = pd.read_csv(Path(__file__).with_name("steering_reading.csv"))
    for (reading, condition), answers in frame.groupby(["reading", "condition"]):
        rates = {label: rate(list(answers["label"] == label)) for label in FRAMINGS}
        print(
            f"reading {reading} {condition:36} "
            + ", ".join(f"{label} {value}" for label, value in rates.items())
        )
    for reading, answers in frame.groupby("reading"):
        wide = answers.assign(safe=answers["label"] == "safe_reframing").pivot(
            index="prompt_id", columns="condition", values="safe"
        )
        for condition in wide.columns.drop("unsteered"):
            pairs = wide[["unsteered", condition]].dropna()
            change = paired_difference(list(pairs["unsteered"]), list(pairs[condition]))
            print(f"reading {reading}, safe reframing, {condition} minus unsteered: {change}")


def collect(folders: list[str]) -> None:
    """Print values of several runs side by side, one per seed: "seed 0 / seed 1".

    Below stands the paired difference of the headline to unsteered in each run.
    """
    frames = [pd.read_csv(Path(folder) / "evaluation.csv") for folder in folders]
    summaries = [frame[frame["category"] == "all"] for frame in frames]
    table = {}
    for metric in SHOWN[:7]:
        columns = [
            summary[summary["metric"] == metric].set_index("condition")["value"]
            for summary in summaries
        ]
        table[metric] = pd.concat(columns, axis=1).map("{:.2f}".format).agg(" / ".join, axis=1)
    print(pd.DataFrame(table).to_string())
    for folder, summary in zip(folders, summaries, strict=True):
        headline = summary[summary["metric"] == SHOWN[0]].dropna(subset="difference")
        for row in headline.itertuples():
            print(
                f"{folder} {row.condition}: {row.difference:+.2f} "
                f"[{row.difference_low:+.2f}, {row.difference_high:+.2f}] n={row.n:.0f}"
            )


def show(result: wb.Evaluation, summary: pd.DataFrame) -> None:
    """Print the values of each condition, their differences to unsteered and to controls."""
    for category in ("all", "hard_safe", "harmless"):
        category_rows = summary[summary["category"] == category]
        print(f"\n{category}, n={int(category_rows['n'].max())}")
        print(
            category_rows.pivot(index="condition", columns="metric", values="value")[list(SHOWN)]
            .round(3)
            .to_string()
        )
    differences = summary[(summary["category"] == "all") & summary["metric"].isin(SHOWN)]
    columns = [
        "condition",
        "metric",
        "difference",
        "difference_low",
        "difference_high",
        "p_holm",
        "no_loss_p",
    ]
    print(differences[columns].round(3).to_string(index=False))
    for control in ("random", "shuffled labels", "instruction"):
        print(f"\n{MAIN} against {control}")
        print(wb.compare(result, MAIN, control, metrics=SHOWN[:7]).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
