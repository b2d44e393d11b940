"""Safe, on topic, not a refusal: the pooled self-contrast on the test fold, beside prompting, other constructions and controls.

    python benchmarks/steering.py --out runs/steering --seed 0    # about fifteen minutes on two cores

    python benchmarks/steering.py --collect runs/steering0 runs/steering1    # several seeds side by side

Place and strength were chosen on tune-fold questions of seed 0 (``workbench run`` does that by successive halving); here they are fixed,
and the test fold is answered once. The random control has eight directions of equal norm, in turn over the prompts. The gate is fitted as
a run does it. blind.jsonl holds the answers shuffled and without their conditions, to be read blind; ``--reading`` prints what a language
model read, in three readings of different conditions and strictness (steering_reading.csv).
"""

from __future__ import annotations

import argparse
import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import workbench as wb
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
from workbench.judges.framing import FRAMINGS, framing_judge_for
from workbench.prompts.prompt import in_turn
from workbench.safesteer.conditions import ALWAYS, GATED, behind_gate, controls, for_everyone
from workbench.safesteer.constructions import Measured, fit_all
from workbench.safesteer.own_answers import instructed, kept_by, self_contrast, went_along
from workbench.safesteer.settings import Setting, steering
from workbench.stats.estimates import paired_difference, rate
from workbench.steering.combine import summed

LAYERS, ALONE, GATE = (10, 12, 14, 16), 15, 9
MILD, STRONG, ONE_LAYER = 0.06, 0.09, 0.17
N_RANDOM, N_BESIDE = 8, 30
FITTED = ("prompt_contrast", "prompt_guided", "answer_contrast_pooled", "self_contrast_pooled")
MAIN = "self-contrast, rho .06"
SHOWN = (
    "safe_helpful_proxy",
    "safe",
    "unsafe",
    "refusal",
    "relevant_answer",
    "degenerate",
    "relevance",
)
SHOWN += ("log_perplexity", "distinct_2", "rouge_l", "bleu")


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
    parser.add_argument("--seed", type=int, default=0, help="of the folds and controls")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, help="test prompts a category; default all")
    options = parser.parse_args()
    if options.reading:
        show_reading()
        return
    if options.collect:
        collect(options.collect)
        return
    out, seed = Path(options.out), options.seed
    model = wb.load_model("embedded")
    judge = framing_judge_for(model)
    fit, tune, test = wb.split_prompts(wb.load_prompts(), seed=seed)
    keep_safe, keep_unsafe = kept_by(judge)
    own = self_contrast(
        model,
        fit,
        keep_safe=keep_safe,
        keep_unsafe=keep_unsafe,
        output=out / "fit.jsonl",
        progress=True,
    )
    print(
        f"{len(own) // 2} pairs of own answers kept, of {sum(p.label == 'unsafe' for p in fit)} questions"
    )

    four = tuple(wb.Site(layer, "resid_post") for layer in LAYERS)
    alone, gate_site = wb.Site(ALONE, "resid_post"), wb.Site(GATE, "resid_post")
    store: Any = {"store": out / "activations"}
    prompts = wb.cache_activations(model, [*fit, *tune, *test], [gate_site, *four, alone], **store)
    answers = {
        name: wb.cache_activations(model, rows, [*four, alone], span="response", **store)
        for name, rows in (("openings", wb.answer_prompts(fit)), ("own answers", own))
    }
    guided = went_along(model, fit, keep_unsafe, output=out / "fit.jsonl", progress=True)
    print(f"{len(guided)} questions that the model goes along with")
    measured = Measured(prompts, answers, frozenset(p.id for p in guided))
    vectors: dict[Any, Any] = dict(fit_all(measured, fit, FITTED))
    for site in four:
        both = (vectors["self_contrast_pooled", site], vectors["answer_contrast_pooled", site])
        vectors["both", site] = {c: summed([v[c] for v in both]) for c in both[0]}
    settings = {
        MAIN: Setting("self_contrast_pooled", four, 1, MILD),
        "self-contrast, rho .09": Setting("self_contrast_pooled", four, 1, STRONG),
        "openings, rho .06": Setting("answer_contrast_pooled", four, 1, MILD),
        "openings and self-contrast, rho .06": Setting("both", four, 1, MILD),
        "prompt contrast": Setting("prompt_contrast", (alone,), 1, ONE_LAYER),
        "prompt contrast, guided": Setting("prompt_guided", (alone,), 1, ONE_LAYER),
    }
    gate = wb.fit_gate(prompts[gate_site].of(fit), prompts[gate_site].of(tune))
    held_out = prompts[gate_site].of(test)
    for name, table in (("rates", activation_rates), ("confusion", confusion), ("roc", roc)):
        write_text(
            out / f"gate_{name}.csv", table(gate, held_out).to_csv(index=False, float_format="%.5g")
        )
    fired = dict(
        zip((p.id for p in test), (c != CLOSED for c in opened_for(gate, held_out)), strict=True)
    )

    risky = in_turn(wb.select_prompts(test, label="unsafe", limit=options.limit))
    beside = in_turn([p for p in test if p.label == "safe"])[:N_BESIDE]
    questions = [*risky, *beside, *wb.select_prompts(test, label="neutral", limit=N_BESIDE)]
    main_setting = settings[MAIN]
    draws = [
        [
            wb.add_vector(
                wb.random_vector(
                    next(iter(vectors["self_contrast_pooled", s].values())),
                    seed=1000 * d + seed + s.layer,
                ),
                rho=MILD,
            )
            for s in four
        ]
        for d in range(N_RANDOM)
    ]
    made: dict[str, Any] = {name: steering(vectors, setting) for name, setting in settings.items()}
    made |= behind_gate(
        vectors, main_setting, gate, sum(fired[p.id] for p in questions) / len(questions)
    )
    made["shuffled labels"] = controls(vectors, main_setting, answers["own answers"], seed=seed)[
        "shuffled labels"
    ]
    made["random"] = {p.id: draws[i % N_RANDOM] for i, p in enumerate(questions)}
    sampled: dict[str, Any] = {
        "decoding": wb.Decoding(max_new_tokens=options.max_new_tokens),
        "output": out / "test.jsonl",
        "progress": True,
    }
    completions = wb.sweep(model, questions, for_everyone(made, questions), **sampled)
    prompted = wb.generate(model, instructed(questions), condition="instruction", **sampled)
    completions += [replace(a, prompt=p) for a, p in zip(prompted, questions, strict=True)]
    completions += refusing(completions, fired, model)
    result = score_completions(model, completions, safety_judge=judge)
    everything = beside_a_gate(result, fired, MAIN, GATED, seed=seed)
    summary = everything.summary(seed=seed)
    write_text(out / "evaluation.csv", summary.to_csv(index=False, float_format="%.5g"))
    write_text(
        out / "gate_cells.csv", cells(result, fired, GATED).to_csv(index=False, float_format="%.5g")
    )
    write_jsonl(out / "completions.jsonl", result.answers())
    read = [
        a
        for a in completions
        if a.prompt.label == "unsafe" and a.condition not in (GATED, ALWAYS, REFUSING)
    ]
    order = list(range(len(read)))
    random.Random(seed).shuffle(order)
    rows = [{"key": i, "prompt": read[i].prompt.text, "answer": read[i].text} for i in order]
    write_jsonl(out / "blind.jsonl", rows)
    key = {str(i): [a.condition, a.prompt.id, text_digest(a.text)] for i, a in enumerate(read)}
    write_json(out / "blind_key.json", key)
    show(result, summary)
    print(f"\ngate at {gate_site}")
    print(activation_rates(gate, held_out).round(3).to_string(index=False))
    print(cells(result, fired, GATED).round(3).T.to_string())
    print(wb.judge_agreement(result).round(2).to_string(index=False))


def text_digest(text: str) -> str:
    """Hash by which a reading names an answer."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def show_reading() -> None:
    frame = pd.read_csv(Path(__file__).with_name("steering_reading.csv"))
    for (reading, condition), own in frame.groupby(["reading", "condition"]):
        rates = {label: rate(list(own["label"] == label)) for label in FRAMINGS}
        print(
            f"reading {reading} {condition:36} "
            + ", ".join(f"{label} {value}" for label, value in rates.items())
        )
    for reading, own in frame.groupby("reading"):
        wide = own.assign(safe=own["label"] == "safe_reframing").pivot(
            index="prompt_id", columns="condition", values="safe"
        )
        for condition in wide.columns.drop("unsteered"):
            pairs = wide[["unsteered", condition]].dropna()
            change = paired_difference(list(pairs["unsteered"]), list(pairs[condition]))
            print(f"reading {reading}, safe reframing, {condition} minus unsteered: {change}")


def collect(folders: list[str]) -> None:
    """Values of several runs side by side, one a seed: "seed 0 / seed 1"; and the paired difference to unsteered of the headline in each."""
    frames = [pd.read_csv(Path(folder) / "evaluation.csv") for folder in folders]
    risky = [frame[frame["category"] == "all"] for frame in frames]
    table = {}
    for metric in SHOWN[:7]:
        columns = [own[own["metric"] == metric].set_index("condition")["value"] for own in risky]
        table[metric] = pd.concat(columns, axis=1).map("{:.2f}".format).agg(" / ".join, axis=1)
    print(pd.DataFrame(table).to_string())
    for folder, own in zip(folders, risky, strict=True):
        head = own[own["metric"] == SHOWN[0]].dropna(subset="difference")
        for row in head.itertuples():
            print(
                f"{folder} {row.condition}: {row.difference:+.2f} [{row.difference_low:+.2f}, {row.difference_high:+.2f}] n={row.n:.0f}"
            )


def show(result: wb.Evaluation, summary: pd.DataFrame) -> None:
    for category in ("all", "hard_safe", "harmless"):
        own = summary[summary["category"] == category]
        print(f"\n{category}, n={int(own['n'].max())}")
        print(
            own.pivot(index="condition", columns="metric", values="value")[list(SHOWN)]
            .round(3)
            .to_string()
        )
    own = summary[(summary["category"] == "all") & summary["metric"].isin(SHOWN)]
    columns = [
        "condition",
        "metric",
        "difference",
        "difference_low",
        "difference_high",
        "p_holm",
        "no_loss_p",
    ]
    print(own[columns].round(3).to_string(index=False))
    for control in ("random", "shuffled labels", "instruction"):
        print(f"\n{MAIN} against {control}")
        print(wb.compare(result, MAIN, control, metrics=SHOWN[:7]).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
