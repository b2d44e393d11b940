"""Write the page that says what a run did and found, for somebody who did not run it.

The page is a single file and needs no network. Everything in a run folder is treated as foreign
text: it is escaped, hidden characters are spelled out, and the page's Content-Security-Policy lets
only its own two scripts run, by their hashes.

For that reason figures are data here, drawn by the page's own script: Plotly's HTML export would
add a script per figure, each with a hash of its own, and could not follow the page's light and dark
colors.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import figures
from workbench.figures import wording
from workbench.figures.notebook import script_safe
from workbench.files.store import PathLike, file_checksum, write_text
from workbench.report import conclusion, opening, sections
from workbench.safesteer.run_folder import SavedRun, read_run
from workbench.stats.estimates import pairs_for_no_loss

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


MAX_PROMPTS = 60
"""Prompts whose answers are printed: a page that somebody reads, not an archive."""

TOP_NEURONS = 15
"""Neurons per category in the printed table."""

NEURON_COLUMNS = {
    "layer": "layer",
    "neuron": "neuron",
    "contribution": "contribution",
    "inclusion": "inclusion",
    "auroc_twins": "AUROC, safe twins",
    "auroc_other": "AUROC, other risks",
    "auroc_neutral": "AUROC, everyday",
    "p_fwer": "family-wise p",
    "survives_twins": "confirmed, safe twins",
    "survives_other": "confirmed, other risks",
}
"""Columns of the neuron table that are printed, with their headings; so are columns of text."""


def write_report(folder: PathLike) -> Path:
    """Write report.html into a run folder.

    Args:
        folder: A folder that ``run`` wrote.

    Returns:
        Path of the page.

    Raises:
        ValueError: If the folder holds no run.
    """
    run = read_run(folder)
    path = run.path / "report.html"
    write_text(path, render(run))
    return path


def render(run: SavedRun) -> str:
    """Render the page of a run as text."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    page = {
        "notes": run.notes,
        "title": f"Steering {run.notes['model'].get('name', 'a model')}",
        "date": _date(run.notes.get("started")),
        "run_name": run.path.name,
        **_opening(run),
        "done": _what_was_done(run),
        "read_blind": sections.read_blind(run),
        "judges": sections.judges(run),
        "tuned_by": sections.tuned_by(run),
        "two_judges": sections.two_judges(run),
        **_results(run),
        "fitted": _fitted(run),
        "separability": _figure(figures.separability, run.tables["separability"]),
        "best_layer": sections.best_layer(run.tables["separability"]),
        "tuning": _figure(figures.tuning, run.tables["tuning"]),
        "front": sections.front_figure(run),
        "left_out": sections.left_out_of_the_search(run),
        "gate": sections.gate(run),
        "chosen": _chosen(run.notes["chosen"]),
        "neurons": _neurons(run.tables["neurons"]),
        **_answers(run.completions),
        "made": _how_it_was_made(run),
        "plotly_js": Markup(get_plotlyjs().replace("\r\n", "\n")),
        "figure_json": lambda figure: Markup(script_safe(figure.to_json())),
    }
    return _template().render(page)


def _opening(run: SavedRun) -> dict[str, Any]:
    """Return what the page begins with; the answers of its example are printed as all others."""
    first = opening.opening(run)
    shown = None if first is None else first["example"]
    if shown is not None:
        shown["answers"] = [_answer(row) for row in shown["answers"]]
    return {
        "opening": first,
        "positive_control": opening.positive_control(run),
        "neuron_card": opening.neuron_card(run),
    }


def _template() -> Any:
    """Load the template; whatever it prints is escaped, hidden characters spelled out."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def spelled_out(value: Any) -> Any:
        return (
            wording.visible(value)
            if isinstance(value, str) and not isinstance(value, Markup)
            else value
        )

    environment = Environment(
        autoescape=True,
        finalize=spelled_out,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": _words, "listed": wording.listed, "csp_hash": _csp_hash}
    path = Path(__file__).with_name("templates") / "report.html.jinja"
    return environment.from_string(path.read_text(encoding="utf-8"))


def _what_was_done(run: SavedRun) -> list[str]:
    """Say in three paragraphs what was done in a run."""
    model = run.notes["model"].get("name", "The model")
    if not run.completions:
        return [f"{model} was prepared for steering, but no answers to test prompts were made."]
    labels = {str(row.get("prompt_id")): row.get("label") for row in run.completions}
    n_unsafe = sum(label == "unsafe" for label in labels.values())
    n_harmless = len(labels) - n_unsafe
    conditions = list(dict.fromkeys(str(row.get("condition")) for row in run.completions))
    controls = [name for name in conditions if wording.is_control(name)]
    steered = [name for name in conditions if name != wording.UNSTEERED and name not in controls]
    n_categories = len(run.notes["categories"])
    categories = "risk category" if n_categories == 1 else "risk categories"
    asked = f"{n_unsafe} unsafe prompts of {n_categories} {categories}"
    asked += f" and {n_harmless} harmless ones" if n_harmless else ""
    beside = (
        " and against controls, which steer with vectors that should do nothing in particular "
        f"({wording.listed(controls)})"
        if controls
        else ""
    )
    return [
        f"{model} answered {asked}, first as it is (unsteered) and then while it was steered. None "
        "of these prompts was used to build or tune the steering.",
        "Steering adds a vector to the model's inner state while the model writes. The steered "
        f"conditions here are {wording.listed(steered) or 'none'}. Vectors were measured on one "
        f"set of prompts ({_fold(run, 'fit')}); their sign, place and strength were chosen on "
        f"{_tuned_on(run)} of a second set.",
        f"{_who_scored(run)} Each change is counted prompt by prompt against the unsteered "
        f"model{beside}.{_cut_in_thoughts(run)}",
    ]


def _cut_in_thoughts(run: SavedRun) -> str:
    """Say how many answers were cut while the model was still thinking; nothing for none."""
    n = sum(
        row.get("finish") == "length"
        and bool(row.get("thinking"))
        and not str(row.get("text") or "").strip()
        for row in run.completions
    )
    return (
        f" {n} of {len(run.completions)} answers were cut at the length limit while the model was "
        "still thinking: they are unscored in every measure, and what is left of each condition "
        "may be the easier prompts."
        if n
        else ""
    )


def _who_scored(run: SavedRun) -> str:
    """Say what scored the answers: the judges of the run's notes, then built-in methods."""
    measured: dict[str, list[str]] = {}
    for judge in sections.judges(run):
        measured.setdefault(str(judge["name"]), []).append(f"“{judge['measures']}”")
    if not measured:
        return "This run names no judge of the answers."
    names = {sections.BUILT_IN: "methods built into workbench"}
    scored = [
        f"{names.get(judge, f'“{judge}”')} scored {wording.listed(measures)}"
        for judge, measures in measured.items()
    ]
    if run.tables["corrected"] is not None:
        return f"Some of the answers were read blind, all were scored: {', '.join(scored)}."
    return f"No person read the answers: {', '.join(scored)}."


def _tuned_on(run: SavedRun) -> str:
    frame = run.tables["tuning"]
    return f"{frame['n'].max():.0f} prompts" if frame is not None and "n" in frame else "prompts"


def _fold(run: SavedRun, name: str) -> str:
    counts = run.notes["folds"].get(name)
    total = (
        sum(v for v in counts.values() if isinstance(v, int)) if isinstance(counts, Mapping) else 0
    )
    return f"{total} prompts" if total else "size not noted"


def _results(run: SavedRun) -> dict[str, Any]:
    """Return the conclusion, the test fold's tables by category, and those of the controls."""
    frame, scores = run.tables["evaluation"], run.tables["scores"]
    if frame is None:
        nothing = conclusion.Conclusion(
            "none", "There is nothing to conclude: this run has no evaluation of test prompts."
        )
        return {"conclusion": nothing, "results": [], "controls": []}
    if "label" in frame:  # rows of harmless prompts are no part of the pooled ones
        harmless = (frame["label"] != "unsafe") & (frame["category"] == wording.ALL_CATEGORIES)
        frame = frame.assign(category=frame["category"].mask(harmless, frame["label"]))
    versus = conclusion.control_differences(scores) if scores is not None else None
    categories = wording.in_order(frame["category"], (wording.ALL_CATEGORIES,))
    known = wording.in_order(frame["metric"], tuple(wording.METRICS))
    main = wording.main_metrics(known) or known[:5]
    needed = _prompts_for_no_loss(run.notes["config"])
    return {
        "conclusion": conclusion.conclude(
            frame, versus, main_condition=str(run.notes.get("main_condition", ""))
        ),
        "results": [
            {
                "name": "all risk categories" if category == wording.ALL_CATEGORIES else category,
                "figure": _figure(figures.evaluation, frame, category, main),
                **_told_apart(_metric_tables(frame, category, main, needed)),
                "rest": _metric_tables(
                    frame, category, [name for name in known if name not in main], needed
                ),
            }
            for category in categories
        ],
        "controls": [] if versus is None else _control_tables(versus),
    }


def _fitted(run: SavedRun) -> list[dict[str, Any]]:
    """Return the tables of questions that vectors were fitted on; none where they had no turn."""
    frame = run.tables["evaluation_fitted"]
    if frame is None:
        return []
    known = wording.in_order(frame["metric"], tuple(wording.METRICS))
    return _metric_tables(frame, wording.ALL_CATEGORIES, wording.main_metrics(known), {})


def _told_apart(tables: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Part the tables with a clear difference to the unsteered model from those without one."""
    is_clear = [any(row["beyond"] for row in table["rows"]) for table in tables]
    pairs = list(zip(tables, is_clear, strict=True))
    return {
        "main": [t for t, it_is in pairs if it_is],
        "null": [t for t, it_is in pairs if not it_is],
    }


def _prompts_for_no_loss(config: Mapping[str, Any]) -> dict[str, int]:
    """Say for shares with a margin how many prompts it takes to show that nothing was lost."""
    margins = {"refusal": config.get("refusal_rise"), "degenerate": config.get("degenerate_rise")}
    return {
        name: pairs_for_no_loss(margin)
        for name, margin in margins.items()
        if isinstance(margin, float) and 0 < margin < 1
    }


def _metric_tables(
    frame: pd.DataFrame, category: str, metrics: Iterable[str], needed: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return a table per metric with a row per condition, the unsteered model first."""
    tables = []
    for name in metrics:
        rows = frame[(frame["category"] == category) & (frame["metric"] == name)].to_dict("records")
        # a stable sort: the other conditions keep their order
        rows.sort(key=lambda row: row["condition"] != wording.UNSTEERED)
        shown = wording.metric(name)
        if rows:
            tables.append(
                {
                    "label": shown.label,
                    "better": shown.better,
                    "rows": [_cells(name, row, needed.get(name, 0)) for row in rows],
                }
            )
    return tables


def _cells(name: str, row: Mapping[str, Any], needed: int = 0) -> dict[str, Any]:
    """Write a row of results as the page prints it; no loss takes ``needed`` prompts to show."""

    def count(key: str) -> str:
        value = row.get(key, math.nan)
        return f"{value:.0f}" if math.isfinite(value) else "–"

    ends = row["difference_low"], row["difference_high"]
    return {
        "condition": row["condition"],
        "control": wording.is_control(row["condition"]),
        "value": wording.number(name, row["value"]),
        "interval": wording.interval(name, row.get("low", math.nan), row.get("high", math.nan)),
        "n": count("n"),
        "unscored": count("n_unscored"),
        "change": wording.number(name, row["difference"], signed=True)
        if math.isfinite(row["difference"])
        else "",
        "change_interval": wording.interval(name, *ends, signed=True),
        "beyond": conclusion.clear(row) != 0,
        "p": wording.p_value(row.get("p_holm", row.get("p", math.nan))),
        "kept": _no_loss(row.get("no_loss_p", math.nan), row.get("n", math.nan), needed),
    }


def _no_loss(p: float, n: float, needed: int) -> str:
    if not math.isfinite(p):
        return ""
    if n < needed:
        return f"cannot be shown with {n:.0f} prompts ({needed} needed)"
    return "yes" if p <= wording.LEVEL else "not shown"


def _control_tables(versus: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table per steered condition: its differences, a line per metric, by control."""
    tables = []
    for condition, differences in versus.groupby("condition", sort=False):
        controls = list(dict.fromkeys(differences["control"]))
        corrected = differences.assign(p=differences["p_holm"], value=math.nan)
        cells = {(row["metric"], row["control"]): row for row in corrected.to_dict("records")}
        lines = [
            (wording.metric(m).label, [_cells(m, cells[m, c]) for c in controls])
            for m in dict.fromkeys(differences["metric"])
        ]
        tables.append({"condition": condition, "controls": controls, "lines": lines})
    return tables


def _figure(draw: Any, frame: pd.DataFrame | None, *arguments: Any) -> Figure | None:
    return None if frame is None or frame.empty else draw(frame, *arguments)


def _chosen(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the chosen setting of each construction as the page prints it."""
    rows = []
    for construction, setting in chosen.items():
        setting = setting if isinstance(setting, Mapping) else {}
        sites, sign = setting.get("sites") or [], setting.get("sign")
        names = " ".join(map(str, sites)) if isinstance(sites, list) else str(sites)
        ways = {1: "along the vector", -1: "against the vector"}
        rows.append(
            {
                "construction": construction,
                "sites": wording.short_sites(names) if isinstance(sites, list) else names,
                "sign": ways.get(sign, "–") if isinstance(sign, int) else "–",
                "rho": ", ".join(
                    filter(None, (_short(setting.get("rho")), wording.how_applied(setting)))
                ),
                "reason": setting.get("reason", ""),
            }
        )
    return rows


def _neurons(frame: pd.DataFrame | None) -> dict[str, Any] | None:
    """Return the map of all layers, and a figure and a ranked table per category."""
    import pandas as pd

    if frame is None:
        return None
    texts = [
        name
        for name in frame
        if name != "category" and not pd.api.types.is_numeric_dtype(frame[name])
    ]
    columns = [name for name in NEURON_COLUMNS if name in frame] + [
        name for name in texts if name not in NEURON_COLUMNS
    ]
    categories = []
    for category, rows in frame.groupby("category", sort=False):
        top = rows.sort_values("contribution", key=abs, ascending=False)[:TOP_NEURONS]
        lines = [
            [(_short(row[name]), name in texts) for name in columns]
            for row in top.to_dict("records")
        ]
        categories.append(
            {
                "name": category,
                "figure": figures.neuron_map(frame, category),
                "rows": lines,
                "n": len(rows),
            }
        )
    headings = [(NEURON_COLUMNS.get(name, _words(name)), name in texts) for name in columns]
    return {"map": figures.layer_scores(frame), "columns": headings, "categories": categories}


def _answers(completions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Group answers by category and prompt, for at most ``MAX_PROMPTS`` prompts.

    They are the first prompts of each category in turn, so that none is picked by hand.
    """
    prompts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in completions:
        prompts.setdefault(
            (str(row.get("category", "")), str(row.get("prompt_id", ""))), []
        ).append(row)
    by_category: dict[str, list[list[Mapping[str, Any]]]] = {}
    for (category, _), rows in prompts.items():
        by_category.setdefault(category, []).append(rows)
    # Take prompts one by one from each category in turn, until there are enough of them.
    n_taken = [0] * len(by_category)
    while sum(n_taken) < min(MAX_PROMPTS, len(prompts)):
        for place, in_category in enumerate(by_category.values()):
            has_more = n_taken[place] < len(in_category)
            n_taken[place] += int(has_more and sum(n_taken) < MAX_PROMPTS)
    groups = []
    for (category, in_category), n in zip(by_category.items(), n_taken, strict=True):
        unsafe = any(rows[0].get("label", "unsafe") == "unsafe" for rows in in_category[:n])
        shown = [_side_by_side(rows) for rows in in_category[:n]]
        groups.append({"name": category, "unsafe": unsafe, "prompts": shown})
    n_shown = sum(n_taken)
    return {"answers": groups, "n_shown": n_shown, "n_left_out": len(prompts) - n_shown}


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a prompt with its answers: unsteered first, then steered, and the controls apart."""
    answers = [
        _answer(row)
        for row in sorted(rows, key=lambda row: row.get("condition") != wording.UNSTEERED)
    ]
    return {
        "id": str(rows[0].get("prompt_id", "")),
        "text": str(rows[0].get("prompt", "")),
        "answers": [answer for answer in answers if not answer["control"]],
        "controls": [answer for answer in answers if answer["control"]],
    }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer as the page prints it, with badges for what its judges found."""
    scores = row["scores"] if isinstance(row.get("scores"), Mapping) else {}
    badges = [
        (kind, text)
        for name, kind, text in (
            ("refusal", "refusal", "refusal"),
            ("degenerate", "broken", "broken text"),
            ("safe_helpful_proxy", "safe", "safe and helpful (proxy)"),
        )
        if scores.get(name) == 1
    ]
    badges += (
        [("none", "refusal not scored")]
        if "refusal" in scores and scores["refusal"] is None
        else []
    )
    relevance = scores.get("relevance")
    condition, text = str(row.get("condition", "")), row.get("text")
    sample = row.get("sample") or 0
    return {
        "condition": f"{condition} ({sample + 1})"
        if isinstance(sample, int) and sample
        else condition,
        "control": wording.is_control(condition),
        "text": text if isinstance(text, str) else "",
        "thinking": str(row.get("thinking") or ""),
        "badges": badges,
        "relevance": wording.number("relevance", relevance)
        if isinstance(relevance, int | float)
        else "–",
        "cut": row.get("finish") == "length",
    }


def _how_it_was_made(run: SavedRun) -> dict[str, Any]:
    """Return the run's settings, versions, times and files as the page prints them."""
    notes = run.notes
    durations = {
        name: _duration(s) for name, s in notes["durations"].items() if isinstance(s, int | float)
    }
    total = sum(s for s in notes["durations"].values() if isinstance(s, int | float))
    labels = list(
        dict.fromkeys(
            label
            for counts in notes["folds"].values()
            if isinstance(counts, Mapping)
            for label in counts
        )
    )
    return {
        "model": {
            **{name: _short(value) for name, value in notes["model"].items()},
            "slow_ways": "; ".join(
                f"{way} ({reason})" for way, reason in notes.get("slow_ways", {}).items()
            )
            or "none",
        },
        "config": {name: _short(value) for name, value in notes["config"].items()},
        "versions": notes["versions"],
        "durations": durations | ({"together": _duration(total)} if durations else {}),
        "labels": labels,
        "folds": {
            k: [c.get(x, 0) for x in labels]
            for k, c in notes["folds"].items()
            if isinstance(c, Mapping)
        },
        "prompts": {name: _short(value) for name, value in notes["prompts"].items()},
        "files": [
            _file(path)
            for path in sorted(run.path.iterdir())
            if path.name[0] != "." and path.name != "report.html"
        ],
    }


def _file(path: Path) -> tuple[str, str, str]:
    """Return name, size, and the start of the checksum; a folder has no checksum."""
    if path.is_file():
        return path.name, _size(path.stat().st_size), file_checksum(path)[:16]
    inside = [p.stat().st_size for p in path.rglob("*") if p.is_file()]
    return f"{path.name}/ ({len(inside)} files)", _size(sum(inside)), "–"


def _short(value: Any) -> str:
    """Write a value of the notes or of a table in few characters."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:{'.2f' if abs(value) >= 0.1 or value == 0 else '.2g'}}".replace("-", "−")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _date(started: Any) -> str:
    try:
        return f"{datetime.datetime.fromisoformat(started):%d %B %Y}".lstrip("0")
    except (TypeError, ValueError):
        return "date not noted"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB" if n >= 1e3 else f"{n} B"


def _csp_hash(script: str) -> str:
    """Return what a Content-Security-Policy calls a script: nothing with another text runs."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode()}"
