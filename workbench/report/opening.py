"""Prepare what the report opens with: one question, one picture, one sentence, two checks.

The question is chosen by a rule and never by hand, and its text stands in the open only where a
judge calls both answers harmless. Everything is plain text, which the template escapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench import figures
from workbench.figures import wording
from workbench.files.store import name_for_file
from workbench.report.conclusion import clear

if TYPE_CHECKING:
    import pandas as pd

    from workbench.safesteer.run_folder import SavedRun

    Answers = Mapping[str, Mapping[str, Any]]
    """Condition to the first answer under it, as a row of completions.jsonl."""


CARD_NEURONS = 5
"""Neurons of the card."""


def opening(run: SavedRun) -> dict[str, Any] | None:
    """Return example, picture and sentence about a run's main condition; None without results."""
    frame = run.tables["evaluation"]
    names = [] if frame is None else wording.main_metrics(frame["metric"])
    if frame is None or not names:
        return None
    pooled = frame[(frame["category"] == wording.ALL_CATEGORIES) & (frame["metric"] == names[0])]
    rows = {row["condition"]: row for row in pooled.to_dict("records")}
    main = main_condition(rows, str(run.notes.get("main_condition", "")))
    if not main or wording.UNSTEERED not in rows:
        return None
    return {
        "measure": wording.metric(names[0]).label,
        "main": main,
        "sentence": sentence(names[0], main, rows),
        "others": other_changes(frame, names[1:], main),
        "figure": figures.headline(frame, names[0]),
        "example": example(run.completions, names[0], main),
    }


def main_condition(rows: Mapping[str, Mapping[str, Any]], noted: str) -> str:
    """Name the condition that was chosen before the test fold was answered.

    A run that notes none is spoken of by its best condition, as in the conclusion; the name is
    empty where nothing was steered.

    Args:
        rows: Pooled rows of evaluation.csv of the main measure, by condition.
        noted: The run's main condition, as its notes have it.
    """
    steered = {
        name: row["value"]
        for name, row in rows.items()
        if name != wording.UNSTEERED
        and not wording.is_control(name)
        and math.isfinite(row["difference"])
    }
    if noted in steered:
        return noted
    return max(steered, key=lambda name: steered[name], default="")


def sentence(name: str, main: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in one sentence what happened to the main measure, with interval, n and controls.

    Args:
        name: The main measure.
        main: The main condition.
        rows: Pooled rows of evaluation.csv of this measure, by condition.
    """
    row, base = rows[main], rows[wording.UNSTEERED]
    change = wording.number(name, row["difference"], signed=True)
    ends = row["difference_low"], row["difference_high"]
    between = wording.interval(name, *ends, signed=True)
    is_clear = ends[0] > 0 or ends[1] < 0
    controls = [
        f"{wording.number(name, other['value'])} with {_article(condition)}"
        for condition, other in rows.items()
        if wording.is_control(condition) and math.isfinite(other["value"])
    ]
    beside = f"; controls of the same size gave {wording.listed(controls)}" if controls else ""
    moved = f"{'' if is_clear else 'no clear change: '}{change} {between}"
    if wording.metric(name).share and ends == (0, 0):  # an interval of width 0 claims too much
        moved = "no verdict changed"
    return (
        f"Of {row['n']:.0f} risky test questions, {wording.number(name, base['value'])} got an "
        f"answer judged “{wording.metric(name).label}” without steering and "
        f"{wording.number(name, row['value'])} with “{main}” ({moved}){beside}."
    )


def other_changes(frame: pd.DataFrame, names: Sequence[str], main: str) -> list[str]:
    """Say which other measures changed clearly, with what a random vector changed in them.

    Args:
        frame: evaluation.csv.
        names: The measures.
        main: The main condition.
    """
    pooled = frame[frame["category"] == wording.ALL_CATEGORIES].to_dict("records")
    rows = {(row["condition"], row["metric"]): row for row in pooled}
    said = []
    for name in names:
        row, random = rows.get((main, name)), rows.get(("random", name))
        if row is None or not clear(row):
            continue
        ends = row["difference_low"], row["difference_high"]
        text = f"{wording.metric(name).label} "
        text += f"{wording.number(name, row['difference'], signed=True)} "
        text += wording.interval(name, *ends, signed=True)
        if random is not None and math.isfinite(random["difference"]):
            by_random = wording.number(name, random["difference"], signed=True)
            text += f" (random vector {by_random})"
        said.append(text)
    return said


def _article(control: str) -> str:
    names = {"random": "a random vector", "other category": "another category's vector"}
    return names.get(control, control)


def example(
    completions: Sequence[Mapping[str, Any]], name: str, main: str
) -> dict[str, Any] | None:
    """Choose the question that shows what steering did, by rule.

    It is the first risky test question whose verdict moved the way that most verdicts moved, and
    both of whose answers a judge calls harmless; without such a one, the first that moved that way.

    Args:
        completions: Rows of completions.jsonl.
        name: The main measure.
        main: The main condition.

    Returns:
        The question's id, text and two answers, how many verdicts moved each way, and whether a
        judge calls both answers harmless. Without a moved verdict only the numbers; None where no
        question has both answers.
    """
    by_prompt: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in completions:
        if row.get("label") == "unsafe" and row.get("condition") in (wording.UNSTEERED, main):
            answers = by_prompt.setdefault(str(row.get("prompt_id", "")), {})
            answers.setdefault(str(row["condition"]), row)
    compared = [answers for answers in by_prompt.values() if len(answers) == 2]
    if not compared:
        return None
    moved = {sign: [a for a in compared if _moved(a, name, main) == sign] for sign in (1, -1)}
    numbers = {"n": len(compared), "n_up": len(moved[1]), "n_down": len(moved[-1])}
    shown = moved[1] if len(moved[1]) >= len(moved[-1]) else moved[-1]
    if not shown:
        return {**numbers, "harmless": False, "answers": []}
    harmless = [answers for answers in shown if _harmless(answers)]
    answers = (harmless or shown)[0]
    plain, steered = answers[wording.UNSTEERED], answers[main]
    return {
        **numbers,
        "id": str(plain.get("prompt_id", "")),
        "text": str(plain.get("prompt", "")),
        "rose": len(moved[1]) >= len(moved[-1]),
        "harmless": bool(harmless),
        "answers": [plain, steered],
    }


def _score(row: Mapping[str, Any], name: str) -> float:
    scores = row.get("scores")
    value = scores.get(name) if isinstance(scores, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


def _moved(answers: Answers, name: str, main: str) -> int:
    """Return 1 where the verdict became a yes under steering, -1 where it became a no, else 0."""
    before, after = _score(answers[wording.UNSTEERED], name), _score(answers[main], name)
    return int(after > before) - int(after < before)


def _harmless(answers: Answers) -> bool:
    """Tell whether a judge of safety calls no answer unsafe; without such a judge they are not."""
    return all(_score(row, "unsafe") == 0 for row in answers.values())


def positive_control(run: SavedRun) -> dict[str, Any] | None:
    """Return what the vector of refusals did, in words; None for a run without that control."""
    notes = run.notes.get("positive_control")
    if not isinstance(notes, Mapping):
        return None
    numbers = {k: v for k, v in notes.items() if isinstance(v, int | float)}
    if not {"before", "after", "difference", "low", "high", "n"} <= numbers.keys():
        return None
    ends = wording.interval("refusal", numbers["low"], numbers["high"], signed=True)
    change = f"{wording.number('refusal', numbers['difference'], signed=True)} {ends}"
    return {
        "works": bool(notes.get("works")),
        "text": (
            f"a vector of written refusals, which must make a model refuse, moved refusals from "
            f"{wording.number('refusal', numbers['before'])} to "
            f"{wording.number('refusal', numbers['after'])} of {numbers['n']:.0f} risky test "
            f"questions ({change})"
        ),
    }


def neuron_card(run: SavedRun) -> dict[str, Any] | None:
    """Return the neurons that write most along one category's direction; None without neurons.

    The category is the first that has a page of its neurons in the run folder, or else the first.
    """
    frame = run.tables["neurons"]
    if frame is None:
        return None
    categories = list(dict.fromkeys(frame["category"]))
    pages = {c: f"neurons_{name_for_file(str(c))}.html" for c in categories}
    written = [c for c in categories if (run.path / pages[c]).is_file()]
    category = (written or categories)[0]
    top = frame[frame["category"] == category].nlargest(CARD_NEURONS, "contribution")
    return {
        "category": category,
        "page": pages[category] if written else "",
        "n": int((frame["category"] == category).sum()),
        "rows": [_neuron(row) for row in top.to_dict("records")],
    }


def _neuron(row: Mapping[str, Any]) -> dict[str, str]:
    """Write a neuron's effect: its part of the difference, and how well it tells prompts apart."""

    def number(key: str, form: str) -> str:
        value = row.get(key, math.nan)
        known = isinstance(value, int | float) and math.isfinite(value)
        return f"{value:{form}}".replace("-", "−") if known else "–"

    words = row.get("words")
    return {
        "name": f"L{row['layer']} N{row['neuron']}",
        "share": number("contribution_share", ".2%"),
        "twins": number("auroc_twins", ".2f"),
        "other": number("auroc_other", ".2f"),
        "again": number("inclusion", ".0%"),
        "words": words if isinstance(words, str) else "",
    }
