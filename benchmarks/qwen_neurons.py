"""Ask which neurons and heads of a chat model carry a risk category, and which blanket refusal.

    python benchmarks/qwen_neurons.py --out runs/qwen_neurons    # some 8,500 short answers
    python benchmarks/qwen_neurons.py --out runs/qwen_neurons --collect    # print its tables

Rankings are by contribution to a direction of the fit fold, measured on the tune fold: a category's
questions against their safe twins, and questions that the model answers with a blanket refusal
against risky ones that it answers in another way. The first of each ranking are then silenced, or
clamped to their mean on the other class, while the model answers questions of the test fold, beside
matched random sets. At last neurons of the unsteered model get, while it writes, the values that
they have in a steered one. Attributions are in float32, answers in bfloat16. An interrupted run
goes on from the answers in --out. Control sets that no time is left for (--minutes) are left out,
and the run says so.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from judge_answers import DEPTHS, FIT_PER_CATEGORY, RHO, keep_all

import workbench as wb
from workbench.evaluation.scoring import score_completions
from workbench.files.store import read_jsonl, write_json, write_jsonl, write_text
from workbench.neurons.heads import (
    MATCHED_HEADS,
    HeadReference,
    head_interventions,
    head_reference,
    head_statistics,
)
from workbench.neurons.outcomes import compare_with_controls
from workbench.neurons.patching import contrast_activations, patched_answers
from workbench.neurons.silencing import (
    NeuronReference,
    matched_controls,
    matching_statistics,
    neuron_interventions,
    neuron_reference,
)
from workbench.neurons.summaries import overlap, overlap_against_chance, stability, survivors
from workbench.prompts.prompt import in_turn
from workbench.safesteer.own_answers import self_contrast
from workbench.stats.estimates import ratio_of_means
from workbench.stats.selectivity import auroc, auroc_interval
from workbench.steering.combine import pooled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.models.activations import ActivationSet
    from workbench.steering.vectors import SteeringVector

MODEL = "qwen2.5-coder-0.5b"
CATEGORIES = ("hate_speech", "privacy_violation", "illegal_activity")
REFUSAL, OTHERWISE = "blanket_refusal", "other answers"
DEPTHS_TRIED = (0.34, 0.5, 0.67, 0.83)
"""Where the attributed direction may stand; the tune fold's AUROC of refusal decides."""
SIZES: dict[str, float] = {"top 100": 100, "top 500": 500, "top 5 %": 0.05}
HEAD_SIZES = {"top 5": 5, "top 20": 20}
METHODS = {
    REFUSAL: [(size, method) for size in SIZES for method in ("zero", "clamp")],
    **{name: [("top 5 %", "zero")] for name in CATEGORIES},
}
"""What is done to the first neurons of each ranking."""
N_NEUTRAL, PER_OTHER_CATEGORY = 24, 2
WHOLE_BROKEN, WHOLE_LOG_PERPLEXITY = 0.05, 0.5
"""Text is whole where no more answers than this, over the unsteered model's, are broken, and its
mean log perplexity to the unsteered model rises by no more than this."""
METRICS = (
    *("blanket_refusal", "refusal", "unsafe", "safe", "safe_helpful_proxy"),
    *("relevant_answer", "degenerate", "log_perplexity"),
)
"""What is measured of answers; unsafe is going along, and safe_helpful_proxy the headline."""
N_PATCHED_CONTROLS = 5
Unit = tuple[int, int]
Fold = dict[wb.Site, "ActivationSet"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/qwen_neurons", help="folder of answers and tables")
    parser.add_argument("--collect", action="store_true", help="print the tables there, and stop")
    parser.add_argument("--sets", type=int, default=20, help="matched random sets of a ranking")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--questions", type=int, default=50, help="test questions, at most 50")
    parser.add_argument("--control-questions", type=int, default=50, help="answered under controls")
    parser.add_argument("--minutes", type=float, default=120, help="no stage begins after these")
    options = parser.parse_args()
    if options.collect:
        collect(Path(options.out))
    else:
        measure(options)


@dataclass
class Answers:
    """Write answers to the same questions under conditions, and score them."""

    model: Any
    questions: list[wb.Prompt]
    n_controlled: int
    out: Path
    max_new_tokens: int
    refusals: Any
    safety: Any
    perplexities: dict[Any, Any] = field(default_factory=dict)

    def plain(self, prompts: Sequence[wb.Prompt]) -> list[wb.Completion]:
        """Answer prompts with the unsteered model."""
        decoding = wb.Decoding(self.max_new_tokens)
        output = self.out / "answers.jsonl"
        return wb.generate(self.model, prompts, (), decoding, output=output, progress=True)

    @property
    def controlled(self) -> list[wb.Prompt]:
        """Questions that are answered under controls, too: the first ones."""
        return self.questions[: self.n_controlled]

    def scores(self, conditions: Mapping[str, Any], questions: Sequence[wb.Prompt]) -> pd.DataFrame:
        """Answer questions under conditions, and unsteered, and score the answers."""
        completions = wb.sweep(
            self.model,
            questions,
            {"unsteered": (), **conditions},
            wb.Decoding(self.max_new_tokens),
            output=self.out / "answers.jsonl",
            progress=True,
            transfer=True,  # references are of the same weights in float32
        )
        return self.scored(completions)

    def scored(self, completions: Sequence[wb.Completion]) -> pd.DataFrame:
        """Score answers that are there."""
        judges: Any = {"judge": self.refusals, "safety_judge": self.safety}
        result = score_completions(self.model, completions, measured=self.perplexities, **judges)
        return result.scores[result.scores["metric"].isin(METRICS)]


@dataclass
class Ranking:
    """Hold a ranking of neurons and heads, and what their changes and controls are made of."""

    neurons: list[Unit]
    heads: list[Unit]
    neuron_values: NeuronReference
    head_values: HeadReference
    neuron_statistics: pd.DataFrame
    head_statistics: pd.DataFrame

    def top(self, size: str) -> list[Unit]:
        """Take the first neurons of a ranking."""
        n = SIZES[size]
        return self.neurons[: int(n if n >= 1 else n * len(self.neurons))]

    def edit_neurons(self, neurons: Sequence[Unit], method: Any) -> list[wb.Intervention]:
        """Silence ("zero") or clamp neurons."""
        return neuron_interventions(self.neuron_values, neurons, method)

    def edit_heads(self, heads: Sequence[Unit], method: Any) -> list[wb.Intervention]:
        """Silence ("zero") or clamp heads."""
        return head_interventions(self.head_values, heads, method)


def measure(options: argparse.Namespace) -> None:
    """Rank on the fit and tune fold, change units on the test fold, and write the tables."""
    start, out = time.monotonic(), Path(options.out)
    folds = wb.split_prompts(wb.load_prompts(), seed=0)
    answers = Answers(
        wb.load_model(MODEL, dtype="bfloat16"),
        questions_of(folds.test)[: options.questions],
        options.control_questions,
        out,
        options.max_new_tokens,
        wb.judges.open_judge("refusal"),
        wb.judges.cached(wb.judges.open_judge("framing"), out / "framing.jsonl"),
    )
    risky = wb.select_prompts([*folds.fit, *folds.tune], label="unsafe")
    plain = answers.plain(risky)
    refused = blanket_refusals(answers, plain, folds.fit, out)
    rankings = rank(folds, refused, out)
    gc.collect()  # the model in float32 holds itself
    print(f"ranked after {(time.monotonic() - start) / 60:.0f} minutes")

    def time_is_left(what: str) -> bool:
        left = (time.monotonic() - start) / 60 < options.minutes
        if not left:
            print(f"no time left for {what}; run again with --minutes to go on")
        return left

    whole = change_neurons(answers, rankings)
    control_neurons(answers, rankings, REFUSAL, whole, options.sets)
    if time_is_left("patching"):
        patch(answers, folds, plain, rankings[REFUSAL])
    for size in reversed(HEAD_SIZES):
        if time_is_left(f"heads, {size}"):
            change_heads(answers, rankings[REFUSAL], size, options.sets)
    for category in reversed(CATEGORIES):
        if time_is_left(f"controls of {category}"):
            control_neurons(answers, rankings, category, whole, options.sets)
    print(f"done after {(time.monotonic() - start) / 60:.0f} minutes")
    collect(out)


def questions_of(test: Sequence[wb.Prompt]) -> list[wb.Prompt]:
    """Take all questions of the attributed categories and some of each other one, in turn."""
    some = {p.id for p in wb.select_prompts(test, label="unsafe", limit=PER_OTHER_CATEGORY)}
    return in_turn(
        [
            prompt
            for prompt in wb.select_prompts(test, label="unsafe")
            if prompt.category in CATEGORIES or prompt.id in some
        ]
    )


def blanket_refusals(
    answers: Answers, plain: Sequence[wb.Completion], fit: Sequence[wb.Prompt], out: Path
) -> set[str]:
    """Find the questions that the plain model answers with a blanket refusal."""
    verdicts = answers.refusals([a.prompt.text for a in plain], [a.text for a in plain])
    in_fit = {prompt.id for prompt in fit}
    kinds = pd.DataFrame(
        {
            "prompt_id": [a.prompt.id for a in plain],
            "fold": ["fit" if a.prompt.id in in_fit else "tune" for a in plain],
            "category": [a.prompt.category for a in plain],
            "kind": [
                (v.framing or REFUSAL) if v.label == "refusal" else OTHERWISE for v in verdicts
            ],
        }
    )
    counts = kinds.groupby(["fold", "category"])["kind"].value_counts().unstack(fill_value=0)
    write_csv(out, "plain_answers", counts.reset_index())
    return set(kinds.loc[kinds["kind"] == REFUSAL, "prompt_id"])


def rank(folds: wb.Folds, refused: set[str], out: Path) -> dict[str, Ranking]:
    """Rank neurons and heads of the categories and of blanket refusal; write what describes it."""
    model = wb.load_model(MODEL, dtype="float32")
    tried = [wb.Site(int(depth * model.cfg.n_layers), "resid_post") for depth in DEPTHS_TRIED]
    parts = [
        wb.Site(0, "resid_pre"),
        *(s for kind in ("z", "mlp_post") for s in wb.sites_of_kind(model, kind)),
    ]

    def cache(prompts: Sequence[wb.Prompt], span: str) -> Fold:
        store = out / "activations"
        return wb.cache_activations(
            model, prompts, [*tried, *parts], span=span, store=store, progress=True
        )

    in_category = [cache(in_contrast(fold), "content") for fold in (folds.fit, folds.tune)]
    asked = [wb.select_prompts(fold, label="unsafe") for fold in (folds.fit, folds.tune)]
    of_refusal = {
        "content": [
            relabelled({site: cached.of(risky) for site, cached in fold.items()}, refused)
            for fold, risky in zip(in_category, asked, strict=True)
        ],
        "last": [relabelled(cache(risky, "last"), refused) for risky in asked],
    }
    spans = separation(of_refusal, tried)
    write_csv(out, "spans", spans)
    best = spans.loc[spans["auroc"].idxmax()]
    site = next(site for site in tried if str(site) == best["site"])
    refusal_folds = of_refusal[best["span"]]

    tables = {}
    for units, attribute, options in (
        ("neurons", wb.attribute_neurons, {"n_permutations": 200, "n_resamples": 100}),
        ("heads", wb.attribute_heads, {"n_resamples": 100}),
    ):
        how: Any = {"site": site, **options}
        by_contrast = [
            attribute(model, *refusal_folds, reference="neutral", **how),
            attribute(model, *in_category, categories=CATEGORIES, **how),
        ]
        tables[units] = by_contrast
    describe(tables, refusal_folds, in_category, site, out)
    neurons, heads = (pd.concat(tables[units], ignore_index=True) for units in tables)
    fits = {REFUSAL: refusal_folds[0], **dict.fromkeys(CATEGORIES, in_category[0])}
    return {
        name: ranking_of(
            model, fit, site, *(table[table["category"] == name] for table in (neurons, heads))
        )
        for name, fit in fits.items()
    }


def in_contrast(fold: Sequence[wb.Prompt]) -> list[wb.Prompt]:
    """Take all risky prompts, the twins of the attributed categories and some everyday prompts."""
    return [
        *wb.select_prompts(fold, label="unsafe"),
        *wb.select_prompts(fold, label="safe", category=CATEGORIES),
        *wb.select_prompts(fold, label="neutral", limit=N_NEUTRAL),
    ]


def relabelled(fold: Fold, refused: set[str]) -> Fold:
    """Make refused prompts a category of their own, and the others what it is compared with."""
    prompts = tuple(
        replace(
            prompt,
            category=REFUSAL if prompt.id in refused else OTHERWISE,
            label="unsafe" if prompt.id in refused else "neutral",
            more_categories=(),
            pair_id=None,
        )
        for prompt in next(iter(fold.values())).prompts
    )
    return {site: replace(cached, prompts=prompts) for site, cached in fold.items()}


def direction_of(fit: ActivationSet, category: str) -> SteeringVector:
    """Fit a contrast's vector: against the other answers for refusal, against twins else."""
    side: Any = "generic" if category == REFUSAL else "paired"
    return wb.fit_steering_vectors(fit, categories=[category], safe_side=side)[category]


def separation(of_refusal: Mapping[str, Sequence[Fold]], sites: Sequence[wb.Site]) -> pd.DataFrame:
    """Measure on the tune fold how well the fit fold's direction tells refused questions apart."""
    rows = []
    for span, (fit, tune) in of_refusal.items():
        for site in sites:
            away = direction_of(fit[site], REFUSAL).direction.double()  # points to other answers
            is_refused = np.array([p.category == REFUSAL for p in tune[site].prompts])
            value = float(auroc((tune[site].values.double() @ -away).numpy(), is_refused))
            counts = int(is_refused.sum()), int((~is_refused).sum())
            low, high = auroc_interval(value, *counts)
            row = {"span": span, "site": str(site), "auroc": value, "low": low, "high": high}
            rows.append(row | {"n_refused": counts[0], "n_other": counts[1]})
    return pd.DataFrame(rows)


def describe(
    tables: Mapping[str, Sequence[pd.DataFrame]],
    refusal_folds: Sequence[Fold],
    in_category: Sequence[Fold],
    site: wb.Site,
    out: Path,
) -> None:
    """Write how complete, stable and alike the rankings are, and which units pass the tests."""
    complete = [
        {"site": str(site), "category": category, **parts}
        for table in tables["neurons"]
        for category, parts in table.attrs["parts"].items()
    ]
    write_csv(out, "completeness", pd.DataFrame(complete))
    vectors = {REFUSAL: direction_of(refusal_folds[0][site], REFUSAL)}
    vectors |= {name: direction_of(in_category[0][site], name) for name in CATEGORIES}
    u = torch.stack([vector.direction.double() for vector in vectors.values()])
    u /= u.norm(dim=1, keepdim=True)
    cosines = pd.DataFrame((u @ u.T).numpy(), columns=list(vectors))
    write_csv(out, "directions", cosines.assign(category=list(vectors)))
    for units, sizes in (("neurons", (50, 100, 500)), ("heads", (5, 20))):
        table = pd.concat(tables[units], ignore_index=True)
        write_csv(out, f"{units}_stability", stability(table, sizes[0]).assign(k=sizes[0]))
        chance = [overlap_against_chance(table, k) for k in sizes]
        write_csv(out, f"{units}_overlap", pd.concat(chance, ignore_index=True))
        shares = overlap(table, sizes[0]).rename_axis("category").reset_index()
        write_csv(out, f"{units}_overlap_of_halves", shares)
        first = table[table["rank"] <= 20]
        write_csv(out, f"{units}_first", first)
        if units == "neurons":
            write_csv(out, "neurons_survivors", survivors(table))
            layers = table[table["rank"] <= 500].groupby(["category", "layer"]).size()
            write_csv(out, "neurons_layers", layers.unstack("layer", fill_value=0).reset_index())


def ranking_of(
    model: Any, fit: Fold, site: wb.Site, neurons: pd.DataFrame, heads: pd.DataFrame
) -> Ranking:
    """Collect one ranking with the values of the fit fold."""
    category = str(neurons["category"].iloc[0])
    other_label = "neutral" if category == REFUSAL else "safe"
    prompts = fit[site].prompts
    unsafe = wb.select_prompts(prompts, category=category, label="unsafe")
    asked: Any = {} if category == REFUSAL else {"category": category}
    other = wb.select_prompts(prompts, label=other_label, **asked)
    of_neurons = neuron_reference(fit, unsafe, other)
    of_heads = head_reference(model, fit, unsafe, other)
    ranked_neurons, ranked_heads = (
        [
            (int(layer), int(unit))
            for layer, unit in table.sort_values("rank")[["layer", name]].to_numpy()
        ]
        for table, name in ((neurons, "neuron"), (heads, "head"))
    )
    vector = direction_of(fit[site], category)
    statistics = matching_statistics(model, of_neurons, vector)
    below = {layer for layer, _ in ranked_heads}
    of_all_heads = head_statistics(model, of_heads)
    of_all_heads = of_all_heads[of_all_heads["layer"].isin(below)]
    return Ranking(ranked_neurons, ranked_heads, of_neurons, of_heads, statistics, of_all_heads)


def change_neurons(answers: Answers, rankings: Mapping[str, Ranking]) -> dict[str, str]:
    """Silence and clamp the first of each ranking; return the size to compare with controls.

    It is the largest that keeps text whole, or the smallest where none does.
    """
    conditions = {
        f"{name}, {size}, {method}": ranking.edit_neurons(ranking.top(size), method)
        for name, ranking in rankings.items()
        for size, method in METHODS[name]
    }
    scores = answers.scores(conditions, answers.questions)
    table = compare_with_controls(scores, dict.fromkeys(conditions, ()), metrics=METRICS)
    write_csv(answers.out, "neurons_changed", table)
    change = table.set_index(["condition", "metric"])["difference"]
    whole = {}
    for name in rankings:
        sizes = [size for size, method in METHODS[name] if method == "zero"]
        fitting = [
            size
            for size in sizes
            if change[f"{name}, {size}, zero", "degenerate"] <= WHOLE_BROKEN
            and change[f"{name}, {size}, zero", "log_perplexity"] <= WHOLE_LOG_PERPLEXITY
        ]
        whole[name] = fitting[-1] if fitting else sizes[0]
    write_json(answers.out / "controlled_sizes.json", whole)
    print(f"compared with controls: {whole}")
    return whole


def control_neurons(
    answers: Answers,
    rankings: Mapping[str, Ranking],
    name: str,
    whole: Mapping[str, str],
    n_sets: int,
) -> None:
    """Silence matched random sets beside the first neurons of a ranking."""
    ranking, size = rankings[name], whole[name]
    target = ranking.top(size)
    drawn = matched_controls(ranking.neuron_statistics, target, n_sets=n_sets)
    condition = f"{name}, {size}, zero"
    random = {
        f"{name}, {size}, random {i}": ranking.edit_neurons(members, "zero")
        for i, members in enumerate(drawn.sets)
    }
    conditions = {condition: ranking.edit_neurons(target, "zero"), **random}
    scores = answers.scores(conditions, answers.controlled)
    table = compare_with_controls(scores, {condition: list(random)}, metrics=METRICS)
    matching = {"same_cell": drawn.same_cell, **{f"ratio_{k}": v for k, v in drawn.ratios.items()}}
    write_csv(answers.out, f"neurons_controlled_{name}", table.assign(**matching))


def change_heads(answers: Answers, ranking: Ranking, size: str, n_sets: int) -> None:
    """Silence and clamp the first heads for blanket refusal, beside matched random heads."""
    target = ranking.heads[: HEAD_SIZES[size]]
    drawn = matched_controls(ranking.head_statistics, target, n_sets=n_sets, by=MATCHED_HEADS)
    random = {
        f"heads, {size}, random {i}": ranking.edit_heads(members, "zero")
        for i, members in enumerate(drawn.sets)
    }
    silent, clamped = f"heads, {size}, zero", f"heads, {size}, clamp"
    conditions = {
        silent: ranking.edit_heads(target, "zero"),
        clamped: ranking.edit_heads(target, "clamp"),
        **random,
    }
    scores = answers.scores(conditions, answers.controlled)
    controls: dict[str, list[str]] = {silent: list(random), clamped: []}
    table = compare_with_controls(scores, controls, metrics=METRICS)
    matching = {"same_cell": drawn.same_cell, **{f"ratio_{k}": v for k, v in drawn.ratios.items()}}
    write_csv(answers.out, f"heads_changed_{HEAD_SIZES[size]}", table.assign(**matching))


def patch(
    answers: Answers, folds: wb.Folds, plain: Sequence[wb.Completion], ranking: Ranking
) -> None:
    """Measure the share of steering's effect that the neurons it moves most carry."""
    model, out = answers.model, answers.out
    steering, vector = self_contrast_steering(answers, folds.fit)
    asked = {p.id for p in wb.select_prompts(folds.fit, label="unsafe", limit=PER_OTHER_CATEGORY)}
    read = [answer for answer in plain if answer.prompt.id in asked]
    contrast = contrast_activations(model, read, steering)
    top = contrast.ranked(int(SIZES["top 5 %"] * contrast.rms.numel()))
    statistics = matching_statistics(model, ranking.neuron_values, vector)
    drawn = matched_controls(statistics, top, n_sets=N_PATCHED_CONTROLS)
    sets = {"top 5 %": top} | {f"random {i}": s for i, s in enumerate(drawn.sets)}
    file = out / f"patched_{len(answers.controlled)}.jsonl"
    if file.exists():
        by_id = {prompt.id: prompt for prompt in answers.controlled}
        patched = [
            wb.Completion(by_id[r["prompt_id"]], r["text"], (), r["finish"], r["condition"])
            for r in read_jsonl(file)
        ]
    else:
        patched = patched_answers(
            model,
            answers.controlled,
            sets,
            steering,
            max_new_tokens=answers.max_new_tokens,
        )
        names = ("text", "finish", "condition")
        rows = [
            {"prompt_id": a.prompt.id, **{name: getattr(a, name) for name in names}}
            for a in patched
        ]
        write_jsonl(file, rows)
    runs = wb.sweep(
        model,
        answers.controlled,
        {"unsteered": (), "steered": steering},
        wb.Decoding(answers.max_new_tokens),
        output=out / "answers.jsonl",
        progress=True,
    )
    scores = answers.scored([*runs, *patched])
    controls = {"steered": (), "top 5 %": list(sets)[1:], **dict.fromkeys(list(sets)[1:], ())}
    table = compare_with_controls(scores, controls, metrics=METRICS)
    write_csv(out, "patching", table.assign(same_cell=drawn.same_cell))
    write_csv(out, "patching_shares", shares_of_steering(scores, list(sets)))


def self_contrast_steering(
    answers: Answers, fit: Sequence[wb.Prompt]
) -> tuple[list[wb.Intervention], SteeringVector]:
    """Fit the pooled self-contrast at four layers; return it, and the last layer's vector."""
    model = answers.model
    sites = [wb.Site(int(depth * model.cfg.n_layers), "resid_post") for depth in DEPTHS]
    risky = wb.select_prompts(fit, label="unsafe", limit=FIT_PER_CATEGORY)
    own = self_contrast(
        model,
        risky,
        keep_safe=keep_all,
        keep_unsafe=keep_all,
        decoding=wb.Decoding(48),
        output=answers.out / "own.jsonl",
        progress=True,
    )
    store: Any = {"store": answers.out / "activations"}
    of_answers = wb.cache_activations(model, own, sites, span="response", **store)
    of_prompts = wb.cache_activations(model, risky, sites, **store)
    steering = []
    for site in sites:
        vectors = wb.fit_steering_vectors(
            of_answers[site], residual=of_prompts[site], safe_side="paired", method="self"
        )
        vector = next(iter(pooled(vectors).values()))
        steering.append(wb.add_vector(vector, rho=RHO))
    return steering, vector


def shares_of_steering(scores: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Compute the share of each change by steering that patched answers have."""
    rows = []
    for metric in METRICS:
        wide = scores[scores["metric"] == metric].pivot(
            index="prompt_id", columns="condition", values="value"
        )
        for name in names:
            known = wide[["unsteered", "steered", name]].dropna()
            plain = known["unsteered"]
            share = ratio_of_means(list(known[name] - plain), list(known["steered"] - plain))
            row = {"metric": metric, "condition": name, "share": share.value}
            rows.append(row | {"low": share.low, "high": share.high, "n": share.n})
    return pd.DataFrame(rows)


def write_csv(out: Path, name: str, table: pd.DataFrame) -> None:
    write_text(out / f"{name}.csv", table.to_csv(index=False, float_format="%.4g"))


def collect(out: Path) -> None:
    """Print every table of a run."""
    files = sorted(out.glob("*.csv"))
    if not files:
        raise SystemExit(f"no tables in {out}: run without --collect first.")
    for file in files:
        if file.stem.endswith("_first"):
            continue
        print(f"\n{file.stem}")
        print(pd.read_csv(file).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
