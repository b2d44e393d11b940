"""Do neurons found on the project's own prompts keep telling a category apart on a public benchmark that nothing was fitted on?

    python benchmarks/neuron_transfer.py --safebench safebench.csv

For each category the 50 neurons with the largest AUROC against neutral prompts (either side of .5) are picked on the fit fold. Their AUROC is then
measured on the project's held-out prompts (tune and test) and on SafeBench's category of the same name, against the same held-out neutral prompts.
The winner's curse shows in the first step, the change of data in the second.
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
    own = wb.select_prompts(
        [*folds.fit, *folds.tune, *folds.test], category=CATEGORIES, label="unsafe"
    )
    neutral = wb.select_prompts([*folds.fit, *folds.tune, *folds.test], label="neutral")
    sites = wb.sites_of_kind(model, "mlp_post")
    acts = wb.cache_activations(model, [*own, *neutral, *public], sites, progress=True)
    row = {prompt.id: i for i, prompt in enumerate([*own, *neutral, *public])}
    neurons = np.concatenate([acts[site].values.numpy() for site in sites], axis=1)

    def values(prompts: list[wb.Prompt]) -> np.ndarray:
        return neurons[[row[prompt.id] for prompt in prompts]]

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
        for name, (unsafe, other) in sets.items():
            labels = np.arange(len(unsafe) + len(other)) < len(unsafe)
            scores[name] = auroc(values([*unsafe, *other]), labels)
        side = np.sign(scores["own, fit"] - 0.5)
        chosen = np.argsort(-np.abs(scores["own, fit"] - 0.5), kind="stable")[:TOP]
        line = []
        for name, score in scores.items():
            signed = 0.5 + side[chosen] * (score[chosen] - 0.5)
            line.append(f"{name} {mean(signed)}")
        drop = side[chosen] * (scores["own, held out"] - scores["SafeBench"])[chosen]
        print(
            f"{category}: AUROC of the top {TOP}: "
            + "; ".join(line)
            + f"; drop held out to SafeBench {mean(drop)}"
        )


if __name__ == "__main__":
    main()
