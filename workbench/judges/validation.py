"""Validation of judges: labelled answers in, agreement with the labels out. A judge without this line is a hint, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files.hints import did_you_mean
from workbench.files.tables import read_rows
from workbench.judges.patterns import RefusalPatterns
from workbench.stats.agreement import Agreement, measure_agreement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.files.store import PathLike
    from workbench.judges.base import Judge, Verdict


MEASURES = ("refusal", "unsafe")


_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")


@dataclass(frozen=True)
class LabelledAnswers:
    """Answers with what somebody said of them.

    Attributes:
        prompts: Questions.
        responses: Their answers.
        truth: Measure ("refusal", "unsafe") to yes, no or None (not labelled) for each answer.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    truth: Mapping[str, tuple[bool | None, ...]]


def read_labelled(path: PathLike) -> LabelledAnswers:
    """Read labelled answers: columns prompt, response, and refusal or unsafe (yes or no) or label (refusal, unsafe, safe, ...).

    Args:
        path: csv, tsv, json, jsonl or parquet.

    Raises:
        ValueError: If a column is missing or a label is no yes or no, with the row.
    """
    rows = read_rows(path)
    for name in ("prompt", "response"):
        if name not in rows[0]:
            raise ValueError(
                f"{path} has no column {name!r}; columns: {', '.join(rows[0])}.{did_you_mean(name, rows[0])}"
            )
    truth: dict[str, tuple[bool | None, ...]] = {}
    for measure in MEASURES:
        if measure in rows[0]:
            truth[measure] = tuple(
                _yes_or_no(row.get(measure), path, i) for i, row in enumerate(rows, start=1)
            )
        elif "label" in rows[0]:
            labels = [str(row.get("label") or "").strip().lower() for row in rows]
            if measure in labels:
                truth[measure] = tuple(label == measure if label else None for label in labels)
    if not truth:
        raise ValueError(
            f"{path} has no labels: it needs a column refusal, unsafe or label; columns: {', '.join(rows[0])}."
        )
    prompts, responses = (
        tuple(str(row.get(name) or "") for row in rows) for name in ("prompt", "response")
    )
    return LabelledAnswers(prompts, responses, truth)


def validate(judge: Judge, answers: LabelledAnswers) -> dict[str, Agreement]:
    """Agreement of a judge with labels, for every measure that it gives verdicts on.

    Args:
        judge: Any judge.
        answers: From ``read_labelled``.

    Raises:
        ValueError: If the judge says nothing about what is labelled.
    """
    verdicts = judge(answers.prompts, answers.responses)
    found = {}
    for measure, truth in answers.truth.items():
        predicted = [_outcome(verdict, measure) for verdict in verdicts]
        if any(outcome is not None for outcome in predicted) and _measures(verdicts, measure):
            found[measure] = measure_agreement(predicted, truth)
    if not found:
        said = ", ".join(sorted({verdict.label for verdict in verdicts}))
        raise ValueError(
            f"{judge.name} says nothing of {' or '.join(answers.truth)} (its verdicts: {said}); give labels of what it measures."
        )
    return found


def open_judge(name: str, *, device: str | None = None) -> Judge:
    """A judge by name: "patterns", "framing" (read by the embedded model), the file of a probe, or a family of guard models.

    Args:
        name: Which.
        device: Where a model runs.

    Raises:
        ValueError: If there is no such judge.
    """
    from workbench.judges.framing import load_framing_judge
    from workbench.judges.guards import guard_families, load_guard
    from workbench.judges.probe import load_probe
    from workbench.models.load import load_model

    if name == "patterns":
        return RefusalPatterns()
    if name == "framing":
        return load_framing_judge(load_model("embedded", device=device))
    if name in guard_families():
        return load_guard(name, device=device)
    if Path(name).is_file():
        return load_probe(name)
    known = ["patterns", "framing", *guard_families()]
    raise ValueError(
        f"no judge {name!r}; judges: {', '.join(known)}, or the file of a trained probe.{did_you_mean(name, known)}"
    )


def lines(found: Mapping[str, Agreement]) -> list[str]:
    """One line a measure, to be read."""
    return [
        f"{measure}: accuracy {own.accuracy}, precision {own.precision}, recall {own.recall}, kappa {own.kappa}"
        for measure, own in found.items()
    ]


def known_answers(
    answers: LabelledAnswers, measure: str
) -> tuple[list[str], list[str], list[bool]]:
    """Prompts, responses and truth of the answers that are labelled for a measure.

    Raises:
        ValueError: If none is.
    """
    if measure not in answers.truth:
        raise ValueError(f"no labels of {measure!r}; labelled: {', '.join(answers.truth)}.")
    rows = [
        (prompt, response, label)
        for prompt, response, label in zip(
            answers.prompts, answers.responses, answers.truth[measure], strict=True
        )
        if label is not None
    ]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _outcome(verdict: Verdict, measure: str) -> bool | None:
    return None if verdict.label == "unscored" else verdict.label == measure


def _measures(verdicts: Sequence[Verdict], measure: str) -> bool:
    """Whether these verdicts are about a measure: a judge of refusals says nothing of harm, and the other way round."""
    about = {"refusal": {"refusal", "not_refusal"}, "unsafe": {"unsafe", "safe"}}[measure]
    return any(verdict.label in about for verdict in verdicts)


def _yes_or_no(value: Any, path: PathLike, row: int) -> bool | None:
    text = "" if value is None else str(value).strip().lower()
    if text in ("", "nan", "none"):
        return None
    if text not in _YES + _NO:
        raise ValueError(
            f"{path}, row {row}: a label is yes or no (true, false, 1, 0), got {str(value)[:40]!r}."
        )
    return text in _YES
