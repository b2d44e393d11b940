"""Measure whether neurons found on the project's prompts also work on a public benchmark.

    python benchmarks/neuron_transfer.py --safebench safebench.csv

For each category the 50 neurons with the largest AUROC against neutral prompts (either side of .5)
are picked on the fit fold. Their AUROC is then measured on the project's held-out prompts (tune and
test) and on SafeBench's category of the same name, on which nothing was fitted, against the same
held-out neutral prompts. The winner's curse shows in the first step, the change of data in the
second.
"""

from __future__ import annotations

import argparse

import numpy as np

import workbench as wb
from workbench.stats.estimates import mean
from workbench.stats.selectivity import auroc

CATEGORIES = ("hate_speech", "privacy_violation", "illegal_activity")
TOP = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--safebench", required=True, help="SafeBench's csv file")
    parser.add_argument("--model", default="embedded")
    options = parser.parse_args()
    model = wb.load_model(options.model)
    folds = wb.split_prompts(wb.load_prompts(), seed=0)
    public = wb.select_prompts(
        wb.read_dataset(f"safebench:{options.safebench}"), category=CATEGORIES
    )
    unsafe = wb.select_prompts(
        [*folds.fit, *folds.tune, *folds.test], category=CATEGORIES, label="unsafe"
    )
    neutral = wb.select_prompts([*folds.fit, *folds.tune, *folds.test], label="neutral")
    sites = wb.sites_of_kind(model, "mlp_post")
    acts = wb.cache_activations(model, [*unsafe, *neutral, *public], sites, progress=True)
    row_of = {prompt.id: i for i, prompt in enumerate([*unsafe, *neutral, *public])}
    neurons = np.concatenate([acts[site].values.numpy() for site in sites], axis=1)

    def values(prompts: list[wb.Prompt]) -> np.ndarray:
        return neurons[[row_of[prompt.id] for prompt in prompts]]

    held_out = [*folds.tune, *folds.test]
    for category in CATEGORIES:
        sets = {
            "own, fit": (
                wb.select_prompts(folds.fit, category=category, label="unsafe"),
                wb.select_prompts(folds.fit, label="neutral"),
            ),
            "own, held out": (
                wb.select_prompts(held_out, category=category, label="unsafe"),
                wb.select_prompts(held_out, label="neutral"),
            ),
            "SafeBench": (
                wb.select_prompts(public, category=category),
                wb.select_prompts(held_out, label="neutral"),
            ),
        }
        scores = {}
        for name, (of_category, others) in sets.items():
            labels = np.arange(len(of_category) + len(others)) < len(of_category)
            scores[name] = auroc(values([*of_category, *others]), labels)
        side = np.sign(scores["own, fit"] - 0.5)
        top = np.argsort(-np.abs(scores["own, fit"] - 0.5), kind="stable")[:TOP]
        means = []
        for name, score in scores.items():
            toward_side = 0.5 + side[top] * (score[top] - 0.5)
            means.append(f"{name} {mean(toward_side)}")
        drop = side[top] * (scores["own, held out"] - scores["SafeBench"])[top]
        print(
            f"{category}: AUROC of the top {TOP}: {'; '.join(means)}; "
            f"drop held out to SafeBench {mean(drop)}"
        )


if __name__ == "__main__":
    main()
