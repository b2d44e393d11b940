"""Fit a framing judge on answers that were read blind, and test it on what it has not seen.

    python benchmarks/fit_framing.py --answers runs/*.jsonl --judged FOLDER
        --out data/framing_judge.safetensors
    python benchmarks/fit_framing.py --answers runs/*.jsonl --judged FOLDER
        --reader qwen2.5-coder-1.5b --dtype bfloat16 --site L16.resid_post --penalty 300
        --out data/framing_judge_qwen2.5-coder-1.5b.safetensors

The answers come from benchmarks/framing.py (the embedded model) and benchmarks/judge_answers.py
(two Qwen models); with ``--judged FOLDER`` also 210 answers of five other models, cut at 400
characters, of the label files of the refusal-direction project (arXiv 2406.11717). The labels are
those of data/framing_labels.csv. What is reported is of answers of a model *and* of categories that
were both left out of the fit; what is written is fitted on everything. With
``--letters`` nothing is fitted: the reader is asked by the rubric, as "local:MODEL" asks models for
which no fitted judge ships.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from labels import digest, read_labels

import workbench as wb
from workbench.files.store import read_json, read_jsonl
from workbench.judges.base import FRAMINGS, SAFE
from workbench.judges.framing import (
    READS,
    FramingJudge,
    fit_framing,
    hidden_states,
    save_framing_judge,
)
from workbench.judges.local import load_local_judge
from workbench.models.load import model_info
from workbench.prompts.prompt import text_key
from workbench.stats.agreement import cohen_kappa, measure_agreement
from workbench.stats.estimates import Estimate
from workbench.stats.selectivity import auroc_with_interval

CUT = 400
"""Characters of an answer of the refusal-direction project that were read."""
PARTS = 5
"""Groups of categories that are left out in turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", nargs="+", required=True, help="jsonl files of answers")
    parser.add_argument("--judged", help="folder with label files of arXiv 2406.11717")
    parser.add_argument("--reader", default="embedded")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--reads", default=READS[0], choices=READS)
    parser.add_argument("--site", default="L18.resid_post")
    parser.add_argument("--penalty", type=float, default=100.0)
    parser.add_argument("--letters", action="store_true", help="ask by the rubric; fit nothing")
    parser.add_argument("--out", help="file of the judge; without it the numbers are printed only")
    options = parser.parse_args()
    show_readings()
    rows = labelled_rows(options.answers, options.judged)
    reader = wb.load_model(options.reader, dtype=options.dtype, packing="off")
    site = wb.Site.parse(options.site)
    pairs = [row["prompt"] for row in rows], [row["text"] for row in rows]
    if options.letters:
        rows, scores = _readable(rows, load_local_judge(reader).probabilities(*pairs))
        show(measure(rows, scores.numpy()))
        return
    states = hidden_states(reader, *pairs, site, reads=options.reads)
    rows, states = _readable(rows, states)
    card = {**describe(rows), **measure(rows, held_out(rows, states, options.penalty))}
    known = held_out(rows, states, options.penalty, models=False)
    card["models_known"] = measure(rows, known)
    print("model and categories left out of the fit")
    show(card)
    print("categories left out of the fit, models known")
    show(card["models_known"])
    if options.out:
        labels = [row["label"] for row in rows]
        weights, bias = fit_framing(states, labels, penalty=options.penalty)
        info = model_info(reader)
        card |= {"reader": info.name, "reader_fingerprint": info.fingerprint}
        card |= {"reader_dtype": options.dtype, "reads": options.reads, "penalty": options.penalty}
        save_framing_judge(options.out, FramingJudge(reader, site, weights, bias, card))


def labelled_rows(files: Sequence[str], judged: str | None) -> list[dict[str, Any]]:
    """Bring answers and labels together by hash; each distinct answer once."""
    labels = {row["sha256"]: row for row in read_labels()}
    texts = [row for path in files for row in read_jsonl(path)]
    texts += answers_of_others(judged) if judged else []
    rows = {}
    for row in texts:
        if row["sha256"] in labels:
            known = labels[row["sha256"]]
            rows[row["sha256"]] = {**row, "label": known["label"], "model": known["model"]}
    print(f"{len(rows)} of {len(labels)} labelled answers are there")
    return list(rows.values())


def answers_of_others(folder: str) -> list[dict[str, Any]]:
    """Read the answers of the refusal-direction project, cut as they were read."""
    rows = []
    for path in sorted(Path(folder).glob("*/*_evaluations.json")):
        for answer in read_json(path)["completions"]:
            text = answer["response"][:CUT]
            key = digest(answer["prompt"], text)
            rows.append({"prompt": answer["prompt"], "text": text, "sha256": key})
            rows[-1] |= {"category": "other", "condition": path.stem.split("_")[1]}
    return rows


def _readable(rows: Sequence[dict[str, Any]], states: Any) -> tuple[list[dict[str, Any]], Any]:
    kept = ~states.isnan().any(dim=1)
    return [row for row, is_kept in zip(rows, kept.tolist(), strict=True) if is_kept], states[kept]


def held_out(
    rows: Sequence[dict[str, Any]], states: Any, penalty: float, *, models: bool = True
) -> np.ndarray:
    """Score each answer by a judge fitted without its category and, with ``models``, its model.

    Questions of the five other models have categories of their own; they are left out in fifths.
    """
    labels = np.array([row["label"] for row in rows])
    group = np.array([group_of(row["model"]) for row in rows])
    category = np.array([row["category"] for row in rows])
    is_other = category == "other"
    category[is_other] = [
        f"other {int(text_key(row['prompt']), 16) % PARTS}"
        for row in rows
        if row["category"] == "other"
    ]
    names = sorted(set(category))
    scores = np.full((len(rows), len(FRAMINGS)), np.nan)
    for model in sorted(set(group)) if models else [None]:
        for part in (names[i::PARTS] for i in range(PARTS)):
            of_part, of_model = np.isin(category, part), group == model if models else True
            test, train = of_part & of_model, ~of_part & ~(of_model if models else of_part)
            if not test.any():
                continue
            weights, bias = fit_framing(states[train], list(labels[train]), penalty=penalty)
            scores[test] = (states[test] @ weights.T + bias).softmax(dim=1).numpy()
    return scores


def group_of(model: str) -> str:
    """Take the five models of the refusal-direction project as one group."""
    return model if model == "embedded" or model.startswith("qwen2.5-coder") else "five others"


def show_readings() -> None:
    """Print how the two readings of the same answers agree, group by group of models."""
    by_group: dict[str, list[dict[str, str]]] = {}
    for row in read_labels():
        if row["label_1"] and row["label_2"]:
            by_group.setdefault(group_of(row["model"]), []).append(row)
    for name, rows in by_group.items():
        first, second = ([row[column] for row in rows] for column in ("label_1", "label_2"))
        print(f"{name}: two readings, kappa {cohen_kappa(first, second)}")


def describe(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say what a judge is fitted on."""
    twice = [r for r in read_labels() if r["label_1"] and r["label_2"]]
    passes = cohen_kappa([r["label_1"] for r in twice], [r["label_2"] for r in twice])
    return {
        "labels": f"{len(rows)} answers of eight models, read blind and shuffled by a language "
        "model, not by a person",
        "passes": plain(passes),
        "languages": ["en"],
        "unseen": "model and categories both left out of the fit; models_known: categories alone",
        "questions": sorted({text_key(row["prompt"]) for row in rows}),
    }


def measure(rows: Sequence[dict[str, Any]], scores: np.ndarray) -> dict[str, Any]:
    """Measure held-out scores, over all answers and group by group of models."""
    groups = {"all": np.ones(len(rows), bool)}
    models = np.array([group_of(row["model"]) for row in rows])
    groups |= {name: models == name for name in sorted(set(models))}
    card: dict[str, Any] = {}
    for name, chosen in groups.items():
        truth = np.array([row["label"] for row in rows])[chosen]
        prompts = [row["prompt"] for row, is_chosen in zip(rows, chosen, strict=True) if is_chosen]
        said = np.array(FRAMINGS)[scores[chosen].argmax(axis=1)]
        safe = measure_agreement(
            list(np.isin(said, SAFE)), list(np.isin(truth, SAFE)), clusters=prompts
        )
        along = scores[chosen][:, FRAMINGS.index("goes_along")]
        numbers = {
            "agreement": safe.to_dict(),
            "auroc_goes_along": plain(
                auroc_with_interval(along, truth == "goes_along", clusters=prompts)
            ),
            "kappa_framings": plain(cohen_kappa(list(said), list(truth), clusters=prompts)),
            "agreement_goes_along": measure_agreement(
                list(said == "goes_along"), list(truth == "goes_along"), clusters=prompts
            ).to_dict(),
        }
        card |= numbers if name == "all" else {name: numbers}
    return card


def plain(estimate: Estimate) -> dict[str, float]:
    """Turn an estimate into numbers for a card."""
    ends = {name: round(getattr(estimate, name), 4) for name in ("value", "low", "high")}
    return {**ends, "n": estimate.n}


def show(card: dict[str, Any]) -> None:
    """Print a card's numbers, group by group."""
    for name, numbers in {"all": card, **card}.items():
        if isinstance(numbers, dict) and "auroc_goes_along" in numbers and name != "models_known":
            for what in ("kappa", "precision", "recall"):
                value = numbers["agreement"][what]
                print(f"{name}: safe and on topic, {what}", _short(value), f"n={value['n']}")
            print(f"{name}: going along, AUROC", _short(numbers["auroc_goes_along"]))
            kappa = numbers["agreement_goes_along"]["kappa"]
            print(f"{name}: going along, kappa", _short(kappa))
            print(f"{name}: six framings, kappa", _short(numbers["kappa_framings"]))


def _short(value: dict[str, float]) -> str:
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


if __name__ == "__main__":
    main()
