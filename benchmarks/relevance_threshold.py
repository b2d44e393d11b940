"""Where "on topic" begins: cosine of prompt and answer for the answers of a run, against answers to other prompts of the same category.

    python benchmarks/relevance_threshold.py --run runs/demo

The unsteered answers that are neither refusals nor broken are taken. ``evaluation.RELEVANT`` is the threshold in use.
"""

from __future__ import annotations

import argparse

import numpy as np

from workbench.evaluation.scoring import RELEVANT
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
    own = np.array([a is b for a, b in pairs])
    print(
        f"{own.sum()} answers with their prompts, {(~own).sum()} with another prompt of the category"
    )
    for threshold in sorted({0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, RELEVANT}):
        kept, wrong = (cosines[own] >= threshold).mean(), (cosines[~own] >= threshold).mean()
        used = "  <- in use" if threshold == RELEVANT else ""
        print(f"cosine >= {threshold:.2f}: own prompt {kept:.2f}, another prompt {wrong:.2f}{used}")


if __name__ == "__main__":
    main()
