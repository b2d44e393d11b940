"""How well the offline judges do on answers of other models: refusal patterns, "not refused", and embedding probes of harm.

    python benchmarks/judges.py --labels FOLDER

FOLDER holds one folder a model with the label files of the refusal-direction project (arXiv 2406.11717): 100 prompts under three conditions,
labelled by Llama Guard 2 and by a list of substrings. Neither is a person: these are agreements between judges.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from workbench.files.store import read_json
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.probe import train_probe
from workbench.stats.agreement import agreement
from workbench.stats.selectivity import auroc, auroc_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--labels", required=True, help="folder with a folder of label files for each model"
    )
    rows = read(Path(parser.parse_args().labels))
    models = sorted({row["model"] for row in rows})
    refused = [
        v.label == "refusal"
        for v in RefusalPatterns()([r["prompt"] for r in rows], [r["response"] for r in rows])
    ]
    print(
        f"{len(rows)} answers of {len(models)} models, {len({r['prompt'] for r in rows})} prompts\n"
    )
    print("refusal patterns against the substring list")
    for model in [*models, "all"]:
        own = [i for i, row in enumerate(rows) if model in (row["model"], "all")]
        print(
            f"  {model:28} {short(agreement([refused[i] for i in own], [not rows[i]['complied'] for i in own]))}"
        )
    print("\n'not refused' against Llama Guard 2's 'unsafe'")
    for model in [*models, "all"]:
        own = [i for i, row in enumerate(rows) if model in (row["model"], "all")]
        print(
            f"  {model:28} {short(agreement([not refused[i] for i in own], [rows[i]['unsafe'] for i in own]))}"
        )

    print(
        "\nembedding probe of Llama Guard 2's 'unsafe', trained on four models, tested on the fifth"
    )
    halves = np.random.default_rng(0).permutation(sorted({row["prompt"] for row in rows}))
    seen = set(halves[: len(halves) // 2])
    unseen_scores, leak_scores, truth_unseen, truth_leak = [], [], [], []
    for model in models:
        others = [row for row in rows if row["model"] != model]
        own = [row for row in rows if row["model"] == model]
        for half in (seen, set(halves) - seen):
            probe = fit([row for row in others if row["prompt"] in half])
            test = [row for row in own if row["prompt"] not in half]
            unseen_scores += score(probe, test)
            truth_unseen += [row["unsafe"] for row in test]
        leak_scores += score(fit(others), own)
        truth_leak += [row["unsafe"] for row in own]
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
            f"no label files in {folder}: give the folder that holds one folder a model."
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
    print(
        f"  {what}: AUROC {area:.3f} [{low:.3f}, {high:.3f}]; at .5 {short(agreement([s > 0.5 for s in scores], truth))}"
    )


def short(own: Any) -> str:
    return f"accuracy {own.accuracy}, precision {own.precision}, recall {own.recall}, kappa {own.kappa}"


if __name__ == "__main__":
    main()
