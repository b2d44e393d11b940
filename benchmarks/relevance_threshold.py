"""Compare thresholds of the cosine of prompt and answer above which an answer is on topic.

    python benchmarks/relevance_threshold.py --run runs/demo

Each unsteered answer of a run that is neither a refusal nor broken is compared with its prompt and
with the other prompts of its category. ``RELEVANT`` in workbench/evaluation/metrics.py is the
threshold in use.
"""

from __future__ import annotations

import argparse

import numpy as np

from workbench.evaluation.metrics import RELEVANT
from workbench.judges.text_quality import relevance
from workbench.safesteer.run_folder import read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="folder of a run")
    run = read_run(parser.parse_args().run)
    answers = [
        row
        for row in run.completions
        if row["condition"] == "unsteered"
        and not row["scores"]["refusal"]
        and not row["scores"]["degenerate"]
    ]
    pairs = [(a, b) for a in answers for b in answers if a["category"] == b["category"]]
    cosines = np.array(
        relevance([a["prompt"] for a, _ in pairs], [b["text"] for _, b in pairs]), dtype=float
    )
    is_own_prompt = np.array([a is b for a, b in pairs])
    print(
        f"{is_own_prompt.sum()} answers with their prompts, "
        f"{(~is_own_prompt).sum()} with another prompt of the category"
    )
    for threshold in sorted({0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, RELEVANT}):
        right = (cosines[is_own_prompt] >= threshold).mean()
        wrong = (cosines[~is_own_prompt] >= threshold).mean()
        note = "  <- in use" if threshold == RELEVANT else ""
        print(
            f"cosine >= {threshold:.2f}: own prompt {right:.2f}, another prompt {wrong:.2f}{note}"
        )


if __name__ == "__main__":
    main()
