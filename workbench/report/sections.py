"""Prepare sections of the report: a blind reader, judges, calibration, layers, the gate.

Figures and texts are handed to the page's template, which escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench import figures
from workbench.figures import wording
from workbench.figures.gates import SET_NAMES

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from workbench.safesteer.run_folder import SavedRun


BUILT_IN = "built-in method"
"""What the page calls the origin of a measure that no judge of the run's notes covers."""

COMPARED = (
    ("all", "safe_helpful_proxy"),
    ("all", "refusal"),
    ("hard_safe", "refusal"),
    ("hard_safe", "relevance"),
    ("harmless", "refusal"),
    ("harmless", "relevance"),
)
"""Kinds of prompts and measures in which ways of gating are compared."""

_SAID_TOO = {"safe_helpful_proxy": ("unsafe",), "refusal": ("blanket_refusal",)}
"""What a judge says besides the measure that a run names it for."""

_PROMPTS = {"all": "risky", "hard_safe": "safe, look risky", "harmless": "everyday"}


def judges(run: SavedRun) -> list[dict[str, Any]]:
    """List the judges that a run names, and what none of them measures.

    Each main measure without a named judge gets a line of its own: it comes from a method built
    into workbench, whose agreement with labels is not known.
    """
    named = [judge for judge in run.notes["judges"] if isinstance(judge, Mapping)]
    rows = [
        {name: judge.get(name) for name in ("name", "measures", "agreement")} for judge in named
    ]
    frame = run.tables["evaluation"]
    measured = [] if frame is None else wording.main_metrics(frame["metric"])
    covered = {name for row in rows for name in _measured_by(row["measures"])}
    rows += [
        {"name": BUILT_IN, "measures": name, "agreement": None}
        for name in measured
        if name not in covered
    ]
    return [row | {"measures": _labels(row["measures"], measured)} for row in rows]


def _measured_by(measure: Any) -> tuple[str, ...]:
    """Name a judge's measure and what else it says: a judge of safety says unsafe as well."""
    return (str(measure), *_SAID_TOO.get(str(measure), ()))


def _labels(measure: Any, measured: Sequence[str]) -> str:
    """Write a judge's measures in words, those besides the first only where the run has them."""
    first, *others = _measured_by(measure)
    names = [first, *(name for name in others if name in measured)]
    return ", ".join(wording.metric(name).label for name in names)


def tuned_by(run: SavedRun) -> dict[str, Any] | None:
    """Say which judge picked answers and tuned the strength, and whether it reports as well.

    Steering that is chosen by a judge fits that judge's errors, so its numbers flatter where the
    same judge reports. None for a run that does not say.
    """
    notes = run.notes.get("tuned_by")
    if not isinstance(notes, Mapping):
        return None
    named = {name: str(notes.get(name) or "") for name in ("name", "agreement")}
    return {**named, "reports": bool(notes.get("reports"))}


def read_blind(run: SavedRun) -> dict[str, Any] | None:
    """Return what is left of judged rates and changes after a blind reading; None without one."""
    frame = run.tables["corrected"]
    if frame is None:
        return None
    rows = frame.to_dict("records")
    name = str(rows[0]["metric"])
    return {
        "measure": wording.metric(name).label,
        "n_read": f"{frame['n_read'].max():.0f}",
        "rows": [_corrected(name, row) for row in rows],
        "reasons": [(row["condition"], row["reason"]) for row in rows if row["reason"]],
    }


def _corrected(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Write a condition's judged and corrected numbers as the page prints them."""

    def with_ends(key: str, prefix: str, *, signed: bool = False) -> str:
        if not math.isfinite(row[key]):
            return "–"
        ends = wording.interval(name, row[f"{prefix}low"], row[f"{prefix}high"], signed=signed)
        return f"{wording.number(name, row[key], signed=signed)} {ends}"

    return {
        "condition": row["condition"],
        "control": wording.is_control(row["condition"]),
        "judged": with_ends("judged", "judged_"),
        "corrected": with_ends("corrected", ""),
        "judged_change": with_ends("judged_difference", "judged_difference_", signed=True),
        "change": with_ends("difference", "difference_", signed=True),
        "beyond": row["difference_low"] > 0 or row["difference_high"] < 0,
        "p": wording.p_value(row["p_holm"]) or "–",
        "precision": f"{with_ends('precision', 'precision_')} of {row['precision_n']:.0f}",
        "recall": f"{with_ends('recall', 'recall_')} of {row['recall_n']:.0f}",
        "n_read": f"{row['n_read']:.0f} of {row['n']:.0f}",
    }


def two_judges(run: SavedRun) -> list[dict[str, Any]]:
    """Say how far two judges agree, per condition: the judge of safety and a second one.

    The second one is another judge, or the list of safety phrases.
    """
    frame = run.tables["judge_agreement"]
    return [
        {
            "condition": "all conditions"
            if row["condition"] == wording.ALL_CATEGORIES
            else row["condition"],
            "kappa": wording.number("kappa", row["kappa"])
            + " "
            + wording.interval("kappa", row["low"], row["high"]),
            "first": wording.number("safe", row["first_yes"]),
            "second": wording.number("safe", row["second_yes"]),
            "n": f"{row['n']:.0f}",
            "names": [
                wording.metric(row.get(which) or usual).label
                for which, usual in (("first", "safe"), ("second", "safety_wording"))
            ],
        }
        for row in ([] if frame is None else frame.to_dict("records"))
    ]


def front_figure(run: SavedRun) -> Figure | None:
    """Draw the front of the calibration; None for a run without one."""
    frame = run.tables["tuning"]
    if frame is None or "front" not in frame or wording.MAIN[0] not in set(frame["metric"]):
        return None
    return figures.front(frame)


def left_out_of_the_search(run: SavedRun) -> str:
    """Say how many settings the calibration tried in part, and how many it never answered."""
    frame = run.tables["tuning"]
    if frame is None or "dropped" not in frame:
        return ""
    settings = frame[(frame["metric"] == wording.MAIN[0]) & (frame["sign"] != 0)]
    is_dropped = settings["dropped"] != ""
    untried = int((settings["n"] == 0).sum())
    early = int(is_dropped.sum()) - untried
    return (
        f"Of {len(settings)} settings {early} left the search early and {untried} were not "
        "answered; the column dropped of tuning.csv says why."
    )


def best_layer(frame: pd.DataFrame | None) -> dict[str, Any] | None:
    """Return the layer and kind of site that tell categories apart best, and all means there.

    Best means against their safe twins, or in the hardest comparison that the table has.
    """
    if frame is None:
        return None
    hardest = wording.in_order(frame["against"], tuple(wording.AGAINST))[0]
    means = frame.groupby(["against", "kind", "layer"])["auroc"].mean()
    kind, layer = means[hardest].idxmax()
    sides = wording.in_order(frame["against"], tuple(wording.AGAINST))
    values = [
        (wording.AGAINST.get(s, s), f"{means[s, kind, layer]:.2f}")
        for s in sides
        if (s, kind, layer) in means.index
    ]
    return {
        "layer": layer,
        "kind": kind,
        "hardest": wording.AGAINST.get(hardest, hardest),
        "values": values,
    }


def gate(run: SavedRun) -> dict[str, Any] | None:
    """Return figures and tables of the gate; None for a run that has none."""
    rates, confusion, roc = (run.tables[f"gate_{name}"] for name in ("rates", "confusion", "roc"))
    notes = run.notes.get("gate")
    if rates is None or confusion is None or not isinstance(notes, Mapping):
        return None
    asked = notes["asked"] if isinstance(notes.get("asked"), Mapping) else {}
    pooled = rates[rates["category"] == "all"].to_dict("records")
    risky = next((row for row in pooled if row["set"] == "risky"), None)
    return {
        "site": str(notes.get("site", "–")),
        "steered": str(notes.get("condition", "–")),
        "threshold": str(notes.get("threshold", "–")),
        "closed": str(notes.get("threshold")) == "inf",
        "asked": {
            SET_NAMES["neutral"] if name == "neutral" else "safe prompts that look risky": _share(
                rate
            )
            for name, rate in asked.items()
        },
        "risky": None if risky is None else _opens_on(risky),
        "pooled": [_opens_on(row) for row in pooled],
        "rates": figures.gate_rates(rates),
        "roc": None if roc is None else figures.gate_roc(roc),
        "confusion": figures.gate_confusion(confusion),
        "cells": _cells(run.tables["gate_cells"]),
        "comparison": _comparison(run.tables["gate_comparison"]),
    }


def _opens_on(row: Mapping[str, Any]) -> dict[str, str]:
    """Say how often a gate opens on a kind of prompts, and how often for the right category."""
    own_ends = [row.get(name, math.nan) for name in ("own_low", "own_high")]
    own = _share(row["own_rate"])
    if all(math.isfinite(end) for end in own_ends):
        own += f" [{_share(own_ends[0])}, {_share(own_ends[1])}]"
    return {
        "name": SET_NAMES.get(row["set"], row["set"]),
        "rate": _share(row["rate"]),
        "interval": f"[{_share(row['low'])}, {_share(row['high'])}]",
        "n": f"{row['n']:.0f}",
        "own": own,
    }


def _cells(frame: pd.DataFrame | None) -> list[dict[str, str]]:
    """Return the four cells of an open or closed gate and of risky or safe prompts."""
    if frame is None:
        return []
    shown = ("safe_helpful_proxy", "refusal", "degenerate")
    return [
        {
            "gate": str(row["gate"]),
            "prompts": str(row["prompts"]),
            "n": f"{row['n']:.0f}",
            "identical": f"{_share(row['identical'])} "
            f"[{_share(row['identical_low'])}, {_share(row['identical_high'])}]",
            **{
                name: f"{_share(row[f'{name}_before'])} → {_share(row[f'{name}_after'])}"
                for name in shown
            },
        }
        for row in frame.to_dict("records")
    ]


def _comparison(frame: pd.DataFrame | None) -> dict[str, Any] | None:
    """Return a table of conditions by kinds of prompts and measures.

    A cell is the value, and the paired change with its interval.
    """
    if frame is None:
        return None
    rows = {
        (row["condition"], row["category"], row["metric"]): row for row in frame.to_dict("records")
    }
    columns = [key for key in COMPARED if any((c, *key) in rows for c in frame["condition"])]
    lines = []
    for condition in wording.in_order(frame["condition"], (wording.UNSTEERED,)):
        cells = []
        for category, name in columns:
            row = rows.get((condition, category, name))
            if row is None:
                cells.append(("–", ""))
                continue
            ends = wording.interval(
                name, row["difference_low"], row["difference_high"], signed=True
            )
            change = (
                f"{wording.number(name, row['difference'], signed=True)} {ends}" if ends else ""
            )
            cells.append((wording.number(name, row["value"]), change))
        lines.append((condition, cells))
    headings = [f"{_PROMPTS[category]}: {wording.metric(name).label}" for category, name in columns]
    counts = {
        _PROMPTS[c]: max(int(row["n"]) for key, row in rows.items() if key[1] == c)
        for c in dict.fromkeys(category for category, _ in columns)
    }
    return {"headings": headings, "lines": lines, "counts": counts}


def _share(value: Any) -> str:
    return (
        wording.number("refusal", float(value))
        if isinstance(value, int | float) and math.isfinite(value)
        else "–"
    )
