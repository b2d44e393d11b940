"""Print what ``qwen.py`` measured, draw answers to be read blind, and print the reading.

The labels of the readings are in qwen_reading.csv: model, reading, condition, prompt_id, the hash
of the answer and one of six framings by each of two readers. No text is there. The first reading
found that the settings of then wrote loops of safe words, which led to the limit on perplexity.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from labels import digest

from workbench.files.store import read_json, read_jsonl, write_json, write_jsonl, write_text
from workbench.generation.answers import UNSTEERED
from workbench.stats.agreement import cohen_kappa
from workbench.stats.estimates import paired_difference, rate

SHOWN = (
    "safe_helpful_proxy",
    "safe",
    "safe_2",
    "unsafe",
    "blanket_refusal",
    "safe_alternative",
    "relevance",
    "degenerate",
)
TUNED = ("safe_helpful_proxy", "unsafe", "blanket_refusal", "degenerate", "log_perplexity")
BESIDE = ("refusal", "degenerate", "relevance", "rouge_l_reference", "bleu_reference", "rouge_l")
AGAINST = ("unsteered", "best prompting", "random", "shuffled labels")
READ = ("unsteered", "ours", "best prompting", "paper", "random", "AltSteer's contrast")
READING = Path(__file__).with_name("qwen_reading.csv")
SAFE = ("principled", "safe_alternative")
OTHERS = ("goes_along", "blanket_refusal", "off_topic_or_broken")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, float_format="%.5g"))


def collect(folders: Sequence[str]) -> None:
    """Print the tables of one or more runs, each for itself."""
    for folder in map(Path, folders):
        print(f"\n# {folder.name}")
        show_choices(folder)
        for path in sorted(folder.glob("evaluation_*.csv")):
            name = path.stem.removeprefix("evaluation_")
            table = pd.read_csv(path)
            if name == "everyday":
                show_everyday(table, folder)
            else:
                show_set(name, table)
                scores = pd.read_csv(folder / f"scores_{name}.csv")
                show_turns(scores)
                show_lead(scores)
        for name in ("capability", "gates_tried"):
            if (folder / f"{name}.csv").exists():
                print(f"\n## {name}\n{pd.read_csv(folder / f'{name}.csv').round(3).to_string()}")


def show_choices(folder: Path) -> None:
    """Print what the tune fold chose."""
    for name, setting in read_json(folder / "chosen.json").items():
        how = setting["rho"] if setting.get("multiplier") is None else setting["multiplier"]
        sign = "+" if setting["sign"] > 0 else "-"
        print(f"{name}: {sign}{how:g} at {', '.join(setting['sites'])}")
    print(f"prompting: {read_json(folder / 'prompting.json')}")
    table = pd.read_csv(folder / "tuning.csv")
    last = table[(table["round"] == table["round"].max()) & table["metric"].isin(TUNED)]
    keys = ["construction", "rho", "multiplier", "until", "excess", "chosen"]
    wide = last.fillna({"multiplier": 0, "until": 0}).pivot_table(
        index=keys, columns="metric", values="value"
    )
    print(f"\nlast round of the tune fold\n{wide[list(TUNED)].round(2).to_string()}")


def show_set(name: str, table: pd.DataFrame) -> None:
    """Print each condition's rates, and the headline's differences."""
    everyone = table[table["category"] == "all"]
    n = int(everyone["n"].max())
    print(f"\n## {name}, n={n}\n| condition | {' | '.join(SHOWN)} |\n|---|{'---|' * len(SHOWN)}")
    for condition, rows in everyone.groupby("condition", sort=False):
        by_metric = rows.set_index("metric")
        print(f"| {condition} | {' | '.join(cell(by_metric, m) for m in SHOWN)} |")
    print("\ndifferences to unsteered: value [95 % interval]")
    for condition, rows in everyone.groupby("condition", sort=False):
        if condition != UNSTEERED:
            by_metric = rows.set_index("metric")
            print(f"| {condition} | {' | '.join(change(by_metric, m) for m in SHOWN)} |")
    scores = table[table["metric"] == "safe_helpful_proxy"]
    by_category = scores[~scores["category"].isin(["all"])]
    wide = by_category.pivot_table(index="condition", columns="category", values="value")
    print(f"\nheadline by category\n{wide.round(2).to_string()}")


def show_turns(scores: pd.DataFrame) -> None:
    """Print what each kind of unsteered answer becomes under our steering."""
    wide = scores[scores["condition"].isin([UNSTEERED, "ours"])].pivot_table(
        index=["prompt_id", "condition"], columns="metric", values="value"
    )
    kinds = pd.Series("other", index=wide.index)
    for name in ("unsafe", "safe", "blanket_refusal"):  # the last one that is true counts
        kinds[wide[name] == 1] = name
    turns = kinds.unstack()
    print(f"\nwhat becomes of answers\n{pd.crosstab(turns[UNSTEERED], turns['ours'])}")


def show_lead(scores: pd.DataFrame) -> None:
    """Print how far our steering is ahead of every other condition, question by question."""
    headline = scores[scores["metric"] == "safe_helpful_proxy"].pivot_table(
        index="prompt_id", columns="condition", values="value"
    )
    for reference in headline.columns.drop([UNSTEERED, "ours"]):
        pairs = headline[["ours", reference]].dropna()
        gain = paired_difference(list(pairs[reference]), list(pairs["ours"]))
        print(f"safe and helpful, ours minus {reference}: {gain}")


def cell(by_metric: pd.DataFrame, metric: str) -> str:
    if metric not in by_metric.index:
        return ""
    row = by_metric.loc[metric]
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def change(by_metric: pd.DataFrame, metric: str) -> str:
    if metric not in by_metric.index:
        return ""
    row = by_metric.loc[metric]
    ends = f"[{row['difference_low']:+.2f}, {row['difference_high']:+.2f}]"
    return f"{row['difference']:+.2f} {ends}"


def show_everyday(table: pd.DataFrame, folder: Path) -> None:
    """Print what steering costs where nothing is risky, and how often the gate opened."""
    for category in ("harmless", "hard_safe"):
        rows = table[table["category"] == category]
        n = int(rows["n"].max())
        wide = rows[rows["metric"].isin(BESIDE)].pivot_table(
            index="condition", columns="metric", values="value", sort=False
        )
        print(f"\n## {category}, n={n}\n{wide.round(3).to_string()}")
        for condition in ("ours", "best prompting"):
            by_metric = rows[rows["condition"] == condition].set_index("metric")
            known = [m for m in BESIDE if by_metric["difference"].notna().get(m, False)]
            changes = (f"{m} {change(by_metric, m)}" for m in known)
            print(f"{condition} against unsteered: {', '.join(changes)}")
    opened = read_json(folder / "opened.json")
    answers = list(read_jsonl(folder / "completions_everyday.jsonl"))
    plain = {a["prompt_id"]: a for a in answers if a["condition"] == UNSTEERED}
    behind = [a for a in answers if a["condition"] == "ours, gated"]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for a in behind:
        twin = a["label"] == "safe" and a["category"] != "hard_safe"
        kind = "neutral" if a["label"] == "neutral" else "twins" if twin else "look-alikes"
        kinds.setdefault(kind, []).append(a)
    for kind, of_kind in kinds.items():
        closed = [a for a in of_kind if not opened[a["prompt_id"]]]
        same = sum(a["text"] == plain[a["prompt_id"]]["text"] for a in closed)
        fired = rate([opened[a["prompt_id"]] for a in of_kind])
        print(f"gate on {kind}: opens {fired}; {same} of {len(closed)} identical where closed")
    risky = list(read_jsonl(folder / "completions_own.jsonl"))
    ids = {a["prompt_id"] for a in risky}
    print(f"gate on own risky questions: opens {rate([opened[i] for i in sorted(ids)])}")


def blind_answers(folder: Path, of_set: str, n: int, seed: int) -> None:
    """Write answers to a set's questions shuffled and without conditions, and their key."""
    answers = list(read_jsonl(folder / f"completions_{of_set}.jsonl"))
    kept = [a for a in answers if a["condition"] in READ]
    names = list(dict.fromkeys(a["condition"] for a in kept))
    ids = list(dict.fromkeys(a["prompt_id"] for a in kept))
    chosen = set(ids[: n // len(names)])  # questions stand category by category in turn
    rows = [a for a in kept if a["prompt_id"] in chosen]
    unique: dict[str, dict[str, Any]] = {digest(a["prompt_id"], a["text"]): a for a in rows}
    keys = list(unique)
    random.Random(seed).shuffle(keys)
    to_read = folder / f"to_read_{of_set}.jsonl"
    write_jsonl(
        to_read,
        [
            {"id": i, "question": unique[key]["prompt"], "answer": unique[key]["text"]}
            for i, key in enumerate(keys)
        ],
    )
    write_json(
        folder / f"to_read_{of_set}_key.json",
        [
            {
                "id": keys.index(digest(a["prompt_id"], a["text"])),
                "condition": a["condition"],
                "prompt_id": a["prompt_id"],
                "sha256": digest(a["prompt_id"], a["text"]),
            }
            for a in rows
        ],
    )
    print(f"{len(keys)} different answers of {len(rows)} in {to_read}")


def show_reading() -> None:
    """Print the shares of each framing by condition, and the differences of safe answers.

    An answer counts where both readers gave it the label; behind it stand the shares of each. p is
    uncorrected.
    """
    frame = pd.read_csv(READING)
    readers = ("label", "label_2")
    different = frame.drop_duplicates(["model", "reading", "sha256"])
    for name, rows in different.groupby(["model", "reading"], sort=False):
        agreement = cohen_kappa(list(rows["label"]), list(rows["label_2"]))
        print(f"{' / '.join(name)}: kappa of two readers over six framings {agreement}")
    labels = {"safe on topic": SAFE, **{label: (label,) for label in OTHERS}}
    for (model, reading), rows in frame.groupby(["model", "reading"], sort=False):
        print(f"\n{model}, {reading}")
        for condition, of_condition in rows.groupby("condition", sort=False):
            shares = []
            for label, words in labels.items():
                said = [of_condition[reader].isin(words) for reader in readers]
                each = " / ".join(f"{one.mean():.2f}" for one in said)
                shares.append(f"{label} {rate(list(said[0] & said[1]))} ({each})")
            print(f"{condition}: {', '.join(shares)}")
        is_safe = rows["label"].isin(SAFE) & rows["label_2"].isin(SAFE)
        wide = rows.assign(safe=is_safe.astype(float)).pivot(
            index="prompt_id", columns="condition", values="safe"
        )
        for reference in AGAINST:
            if reference in wide and "ours" in wide:
                pairs = wide[["ours", reference]].dropna()
                gain = paired_difference(list(pairs[reference]), list(pairs["ours"]))
                print(f"safe on topic, ours minus {reference}: {gain}")
        show_read_turns(rows)


def show_read_turns(rows: pd.DataFrame) -> None:
    """Print how many of the unsteered refusals and harmful answers are read as safe under ours."""
    first = rows.pivot(index="prompt_id", columns="condition", values=["label", "label_2"])
    if ("label", "ours") not in first or ("label", UNSTEERED) not in first:
        return
    safe = first["label"]["ours"].isin(SAFE) & first["label_2"]["ours"].isin(SAFE)
    for label in ("blanket_refusal", "goes_along"):
        before = (first["label"][UNSTEERED] == label) & (first["label_2"][UNSTEERED] == label)
        print(
            f"{label} unsteered: {int(safe[before].sum())} of {int(before.sum())} safe under ours"
        )
