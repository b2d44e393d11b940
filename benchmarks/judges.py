"""Measure how well the offline judges do on answers of other models.

    python benchmarks/judges.py --labels FOLDER

The judges are refusal patterns, "not refused", and embedding probes of harm. FOLDER holds one
folder per model with the label files of the refusal-direction project (arXiv 2406.11717): 100
prompts under three conditions, labelled by Llama Guard 2 and by a list of substrings. Neither is a
person: these are agreements between judges.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from workbench.files.store import read_json
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.probe import train_probe
from workbench.stats.agreement import Agreement, measure_agreement
from workbench.stats.selectivity import auroc, auroc_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--labels", required=True, help="folder that holds one folder of label files per model"
    )
    rows = read(Path(parser.parse_args().labels))
    models = sorted({row["model"] for row in rows})
    n_prompts = len({row["prompt"] for row in rows})
    print(f"{len(rows)} answers of {len(models)} models, {n_prompts} prompts\n")
    compare_patterns(rows, models)
    compare_probes(rows, models)


def compare_patterns(rows: list[dict[str, Any]], models: list[str]) -> None:
    """Compare the refusal patterns with both labels, model by model and over all of them."""
    verdicts = RefusalPatterns()([row["prompt"] for row in rows], [row["response"] for row in rows])
    refused = np.array([verdict.label == "refusal" for verdict in verdicts])
    complied = np.array([row["complied"] for row in rows])
    unsafe = np.array([row["unsafe"] for row in rows])
    prompts = np.array([row["prompt"] for row in rows])
    print("refusal patterns against the substring list")
    for model in [*models, "all"]:
        is_of_model = np.array([model in (row["model"], "all") for row in rows])
        result = measure_agreement(
            refused[is_of_model], ~complied[is_of_model], clusters=prompts[is_of_model]
        )
        print(f"  {model:28} {short(result)}")
    print("\n'not refused' against Llama Guard 2's 'unsafe'")
    for model in [*models, "all"]:
        is_of_model = np.array([model in (row["model"], "all") for row in rows])
        result = measure_agreement(
            ~refused[is_of_model], unsafe[is_of_model], clusters=prompts[is_of_model]
        )
        print(f"  {model:28} {short(result)}")


def compare_probes(rows: list[dict[str, Any]], models: list[str]) -> None:
    """Fit embedding probes on some models or prompts and test them on others."""
    print(
        "\nembedding probe of Llama Guard 2's 'unsafe', trained on four models, tested on the fifth"
    )
    halves = np.random.default_rng(0).permutation(sorted({row["prompt"] for row in rows}))
    seen = set(halves[: len(halves) // 2])
    unseen_scores, leak_scores, truth_unseen, truth_leak = [], [], [], []
    for model in models:
        others = [row for row in rows if row["model"] != model]
        model_rows = [row for row in rows if row["model"] == model]
        for half in (seen, set(halves) - seen):
            probe = fit([row for row in others if row["prompt"] in half])
            test = [row for row in model_rows if row["prompt"] not in half]
            unseen_scores += score(probe, test)
            truth_unseen += [row["unsafe"] for row in test]
        leak_scores += score(fit(others), model_rows)
        truth_leak += [row["unsafe"] for row in model_rows]
    report("unseen model and unseen prompts", unseen_scores, truth_unseen)
    report("unseen model, prompts shared with the fit: a leak", leak_scores, truth_leak)
    shuffled = np.random.default_rng(1).permutation(len(rows))
    train, test = (
        [rows[i] for i in part] for part in (shuffled[: len(rows) // 2], shuffled[len(rows) // 2 :])
    )
    report(
        "random halves, prompts and models shared: a leak",
        score(fit(train), test),
        [row["unsafe"] for row in test],
    )


def read(folder: Path) -> list[dict[str, Any]]:
    rows = [
        {"model": path.parent.name, "prompt": row["prompt"], "response": row["response"]}
        | {
            "unsafe": bool(row["is_jailbreak_llamaguard2"]),
            "complied": bool(row["is_jailbreak_substring_matching"]),
        }
        for path in sorted(folder.glob("*/*.json"))
        for row in read_json(path)["completions"]
    ]
    if not rows:
        raise SystemExit(
            f"no label files in {folder}: give the folder that holds one folder per model."
        )
    return rows


def fit(rows: list[dict[str, Any]]) -> Any:
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    return train_probe(
        prompts, responses, [row["unsafe"] for row in rows], measures="unsafe", source="benchmark"
    )


def score(probe: Any, rows: list[dict[str, Any]]) -> list[float]:
    verdicts = probe([row["prompt"] for row in rows], [row["response"] for row in rows])
    return [0.0 if verdict.score is None else verdict.score for verdict in verdicts]


def report(what: str, scores: list[float], truth: list[bool]) -> None:
    area = float(auroc(np.array(scores), np.array(truth)))
    low, high = auroc_interval(area, sum(truth), len(truth) - sum(truth))
    at_half = measure_agreement([value > 0.5 for value in scores], truth)
    print(f"  {what}: AUROC {area:.3f} [{low:.3f}, {high:.3f}]; at .5 {short(at_half)}")


def short(result: Agreement) -> str:
    return (
        f"accuracy {result.accuracy}, precision {result.precision}, "
        f"recall {result.recall}, kappa {result.kappa}"
    )


if __name__ == "__main__":
    main()
