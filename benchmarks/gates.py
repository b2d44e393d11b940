"""Compare gates that read one layer, several or all, also under attacks and in two turns.

    python benchmarks/gates.py --model qwen2.5-coder-0.5b --dtype bfloat16 --out runs/gates

Gates are fitted on the fit fold and calibrated on the tune fold, both with risky and safe questions
that are wrapped in the templates for fitting. On the test fold, and on some of it wrapped in the
held-out templates, it is counted how often each gate opens: gates.csv has recall of risky prompts
and false activations of the others. Public sets may be tested too, and half of them be fitted on:
SafeBench (risky) and XSTest (its safe look-alikes).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

import workbench as wb
from workbench.evaluation.gating import wrapping_rates
from workbench.models.activations import ActivationSet
from workbench.prompts.attacks import wrap_in_turn, wrapped_sets
from workbench.safesteer.run_folder import write_table
from workbench.steering.gates import Gate, fit_gate
from workbench.steering.layer_gates import LayerGate, choose_layer_gate, fit_layer_gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Acts = Mapping[wb.Site, ActivationSet]
    Reader = Callable[[Sequence[wb.Prompt]], Acts]

JUDGED = ("unsafe", "safe")
RATES: dict[str, Any] = {"neutral_rate": 0.02, "hard_rate": 0.05}
"""Shares of everyday and of safe prompts that may open a gate."""


def main() -> None:
    options = _options()
    model = wb.load_model(options.model, dtype=options.dtype)
    folds = wb.split_prompts(wb.load_prompts(), seed=options.seed)
    sites = wb.sites_of_kind(model, "resid_post")

    def read(prompts: Sequence[wb.Prompt]) -> Acts:
        """Read one set after the other, so that a run that was interrupted goes on."""
        store = Path(options.out) / "activations"
        return wb.cache_activations(
            model, prompts, sites, span=options.span, store=store, progress=True
        )

    more_fit, more_test = public_prompts(options)
    used = [more_fit] if options.more_to_fit else []
    fit, tune = (with_attacks(read, fold, options.seed) for fold in (folds.fit, folds.tune))
    fit = joined([fit, *map(read, used)])
    sets = test_sets(folds.test, more_test, options)
    acts = joined(
        [
            read(wb.select_prompts(prompts, label=label))
            for prompts in sets.values()
            for label in dict.fromkeys(p.label for p in prompts)
        ]
    )
    tables = []
    for name, gate in gates_of(fit, tune, sites, options.layer).items():
        rates = wrapping_rates(gate, acts, sets)
        tables.append(rates.assign(gate=name, why_closed=gate.why_closed))
        print(f"\n{name}: {gate!r}\n{rates.round(3).to_string(index=False)}", flush=True)
    write_table(Path(options.out) / "gates.csv", pd.concat(tables, ignore_index=True))


def gates_of(
    fit: Acts, tune: Acts, sites: Sequence[wb.Site], layer: int | None
) -> dict[str, Gate | LayerGate]:
    """Fit the gates that are compared: name to gate."""
    one = sites[len(sites) * 4 // 9 if layer is None else layer]
    quarters = [sites[len(sites) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]
    at_quarters = [{site: acts[site] for site in quarters} for acts in (fit, tune)]
    chosen, tried = choose_layer_gate(fit, tune, **RATES)
    print(f"\ntried on all layers:\n{tried.round(3).to_string(index=False)}", flush=True)
    return {
        f"one layer ({one})": fit_gate(fit[one], tune[one], **RATES),
        "mean cosine, quarters": fit_layer_gate(*at_quarters, way="mean_cosine", **RATES),
        "mean cosine, all layers": fit_layer_gate(fit, tune, way="mean_cosine", **RATES),
        "joint probe, quarters": fit_layer_gate(*at_quarters, way="joint_probe", **RATES),
        f"chosen, all layers ({chosen.way})": chosen,
    }


def with_attacks(read: Reader, fold: Sequence[wb.Prompt], seed: int) -> Acts:
    """Read a fold as it is, and its risky and safe prompts wrapped."""
    return joined(
        [read(fold), read(wrap_in_turn(wb.select_prompts(fold, label=JUDGED), seed=seed))]
    )


def joined(parts: Iterable[Acts]) -> Acts:
    """Put the rows of several readings together, site by site."""
    parts = list(parts)
    whole = {}
    for site, first in parts[0].items():
        values = torch.cat([part[site].values for part in parts])
        prompts = tuple(prompt for part in parts for prompt in part[site].prompts)
        whole[site] = ActivationSet(site, values, prompts, first.span, first.model, first.asked_as)
    return whole


def test_sets(
    test: Sequence[wb.Prompt], public: Sequence[wb.Prompt], options: argparse.Namespace
) -> dict[str, list[wb.Prompt]]:
    """Make the sets of the test: the fold, some of it under each attack and in two turns."""
    few = wb.select_prompts(test, label=JUDGED, limit=options.limit)
    sets = wrapped_sets([*few, *wb.select_prompts(test, label="neutral")], seed=options.seed)
    sets["none"] = list(test)
    return sets | ({"public sets": list(public)} if public else {})


def public_prompts(options: argparse.Namespace) -> tuple[list[wb.Prompt], list[wb.Prompt]]:
    """Read SafeBench and the safe prompts of XSTest, a half to fit on and a half to test on."""
    ours, prompts = wb.categories_of(wb.load_prompts()), []
    if options.safebench:
        public = wb.read_dataset(f"safebench:{options.safebench}")
        prompts += [prompt for prompt in public if prompt.category in ours]
    if options.xstest:
        prompts += wb.select_prompts(wb.read_dataset(f"xstest:{options.xstest}"), label="safe")
    if not prompts:
        return [], []
    halves = wb.split_prompts(prompts, seed=options.seed, fractions=(0.5, 0.0, 0.5))
    return halves.fit, halves.test


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", required=True, help="folder for activations and gates.csv")
    parser.add_argument("--seed", type=int, default=0, help="of folds and drawn templates")
    parser.add_argument("--span", default="content", choices=("content", "last"))
    parser.add_argument("--layer", type=int, help="of the gate at one layer (default: 4/9 of all)")
    parser.add_argument(
        "--limit", type=int, default=6, help="questions per category and label that are wrapped"
    )
    parser.add_argument("--safebench", help="SafeBench's csv file")
    parser.add_argument("--xstest", help="XSTest's csv file")
    parser.add_argument("--more-to-fit", action="store_true", help="fit on half of the public sets")
    return parser.parse_args()


if __name__ == "__main__":
    main()
