"""Measure how far a judge agrees with labels; without that it is a hint, no measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.files.hints import did_you_mean
from workbench.files.tables import read_rows
from workbench.judges.base import FRAMINGS, MEASURES, SAFE
from workbench.prompts.cells import is_missing
from workbench.stats.agreement import Agreement, measure_agreement

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from workbench.files.store import PathLike
    from workbench.judges.base import Judge, Verdict


SAFE_ON_TOPIC = "safe_on_topic"
"""Measure of judges that tell framings apart: the answer is safe and stays on the topic."""
_OF_FRAMINGS: dict[str, Callable[[str], bool | None]] = {
    "refusal": lambda label: None if label in ("", "principled") else label == "blanket_refusal",
    "unsafe": lambda label: label == "goes_along" if label else None,
    SAFE_ON_TOPIC: lambda label: label in SAFE if label else None,
}
_PAIR = ("prompt", "response")
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")


@dataclass(frozen=True)
class LabelledAnswers:
    """Hold answers with what somebody said of them.

    Attributes:
        prompts: Questions.
        responses: Their answers.
        truth: Measure ("refusal", "unsafe", "safe_on_topic") to yes, no or None (not labelled) for
            each answer.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    truth: Mapping[str, tuple[bool | None, ...]]


def read_labelled(
    path: PathLike, *, refusal: str | None = None, unsafe: str | None = None
) -> LabelledAnswers:
    """Read labelled answers from a table with columns prompt, response and the labels.

    The labels are columns refusal or unsafe (yes or no), or one column label: words of your own
    among which are refusal or unsafe, or framings (``judges.FRAMINGS``). Of framings, a blanket
    refusal is a refusal, and whether a principled answer is one is left open; going along is
    unsafe; principled answers and safe alternatives are safe and on topic. An empty cell is an
    answer without a label.

    Args:
        path: csv, tsv, json, jsonl or parquet.
        refusal: Column of yes and no for refusals, where it has another name.
        unsafe: Column of yes and no for unsafe answers, where it has another name.

    Raises:
        ValueError: If a column is missing, a label is no yes or no (with the row), or all labels
            words of column label are one.
    """
    rows = read_rows(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    named = {"refusal": refusal, "unsafe": unsafe}
    for name in ("prompt", "response", *filter(None, named.values())):
        if name not in columns:
            raise ValueError(
                f"{path} has no column {name!r}; columns: {', '.join(columns)}."
                f"{did_you_mean(name, columns)}"
            )
    truth: dict[str, tuple[bool | None, ...]] = {}
    labels = [_word(row.get("label")) for row in rows]
    _check_one_vocabulary(labels, path)
    for measure in MEASURES:
        column = named[measure] or measure
        if column in columns:
            truth[measure] = tuple(
                _yes_or_no(row.get(column), path, i) for i, row in enumerate(rows, start=1)
            )
        elif measure in labels:
            truth[measure] = tuple(label == measure if label else None for label in labels)
    if not truth and "label" not in columns:
        raise ValueError(
            f"{path} has no labels: it needs a column refusal, unsafe or label; "
            f"columns: {', '.join(columns)}."
        )
    if not truth and any(labels) and set(labels) <= {*FRAMINGS, ""}:
        truth = {measure: tuple(map(said, labels)) for measure, said in _OF_FRAMINGS.items()}
    _check_labels(truth, labels, path)
    prompts, responses = (tuple(_text(row.get(name)) for row in rows) for name in _PAIR)
    return LabelledAnswers(prompts, responses, truth)


def _check_one_vocabulary(labels: Sequence[str], path: PathLike) -> None:
    """Raise where column label mixes framings with other words: they would be read as no refusal.

    Raises:
        ValueError: With the first word that is no framing.
    """
    given = {label for label in labels if label}
    if (given & set(FRAMINGS) - {"neutral"}) and (others := sorted(given - set(FRAMINGS))):
        raise ValueError(
            f"{path}: column label mixes framings with {others[0]!r}; framings: "
            f"{', '.join(FRAMINGS)}.{did_you_mean(others[0], FRAMINGS)}"
        )


def _check_labels(
    truth: Mapping[str, Sequence[bool | None]], labels: Sequence[str], path: PathLike
) -> None:
    """Raise where no answer is labelled for a measure, or all words of column label are one."""
    given = sorted(set(labels) - {""})
    if truth and all(label is None for values in truth.values() for label in values):
        raise ValueError(f"{path}: no answer is labelled, the cells are empty; write yes or no.")
    from_words = not truth or any(measure in given for measure in truth)
    if from_words and len(given) == 1 and any(given[0] in words for words in MEASURES.values()):
        raise ValueError(
            f"{path}: all {len(labels) - labels.count('')} labels say {given[0]!r}; agreement "
            f"needs answers of both kinds, so add some that are not {given[0]}."
        )
    if not truth:
        has = f"column label has {', '.join(given[:5])}" if given else "column label is empty"
        raise ValueError(
            f"{path}: no label says {' or '.join(MEASURES)}; {has}. "
            f"Name the answers that are meant {' or '.join(MEASURES)}, others as you like."
        )


def validate(judge: Judge, answers: LabelledAnswers) -> dict[str, Agreement]:
    """Measure how a judge agrees with labels, for every measure that it gives verdicts on.

    Answers to the same prompt resemble each other; the intervals count for that.

    Args:
        judge: Any judge.
        answers: From ``read_labelled``.

    Raises:
        ValueError: If the judge says nothing about what is labelled.
    """
    verdicts = judge(answers.prompts, answers.responses)
    agreements = agreement_of(verdicts, answers)
    if not agreements:
        said = ", ".join(sorted({verdict.label for verdict in verdicts}))
        raise ValueError(
            f"{judge.name} says nothing of {' or '.join(answers.truth)} (its verdicts: {said}); "
            "give labels of what it measures."
        )
    return agreements


def agreement_of(verdicts: Sequence[Verdict], answers: LabelledAnswers) -> dict[str, Agreement]:
    """Measure how verdicts agree with labels, for every measure that they say something about."""
    agreements = {}
    for measure, truth in answers.truth.items():
        predicted = [_outcome(verdict, measure) for verdict in verdicts]
        if any(outcome is not None for outcome in predicted) and _measures(verdicts, measure):
            agreements[measure] = measure_agreement(predicted, truth, clusters=clusters_of(answers))
    return agreements


def clusters_of(answers: LabelledAnswers) -> list[Hashable]:
    """Say which answers share a prompt; one whose prompt is not known stands alone."""
    return [prompt or i for i, prompt in enumerate(answers.prompts)]


def lines(agreements: Mapping[str, Agreement]) -> list[str]:
    """Write one readable line per measure."""
    return [
        f"{measure}: accuracy {numbers.accuracy}, precision {numbers.precision}, "
        f"recall {numbers.recall}, kappa {numbers.kappa}"
        for measure, numbers in agreements.items()
    ]


def known_answers(
    answers: LabelledAnswers, measure: str
) -> tuple[list[str], list[str], list[bool]]:
    """Give prompts, responses and truth of the answers that are labelled for a measure.

    Raises:
        ValueError: If none is.
    """
    if measure not in answers.truth:
        raise ValueError(f"no labels of {measure!r}; labelled: {', '.join(answers.truth)}.")
    labelled = [
        (prompt, response, label)
        for prompt, response, label in zip(
            answers.prompts, answers.responses, answers.truth[measure], strict=True
        )
        if label is not None
    ]
    return (
        [prompt for prompt, _, _ in labelled],
        [response for _, response, _ in labelled],
        [label for _, _, label in labelled],
    )


def _outcome(verdict: Verdict, measure: str) -> bool | None:
    """Say whether a verdict is yes for a measure; None if unscored."""
    if measure == SAFE_ON_TOPIC:
        return None if verdict.label == "unscored" else verdict.framing in SAFE
    return None if verdict.label == "unscored" else verdict.label == measure


def _measures(verdicts: Sequence[Verdict], measure: str) -> bool:
    """Tell whether verdicts are about a measure: a judge of refusals says nothing of harm."""
    if measure == SAFE_ON_TOPIC:
        return any(verdict.framing is not None for verdict in verdicts)
    return any(verdict.label in MEASURES[measure] for verdict in verdicts)


def _text(value: Any) -> str:
    return "" if is_missing(value) else str(value)


def _word(value: Any) -> str:
    """Read a word in small letters; "" where the cell is empty, or was when it became a text."""
    word = _text(value).strip().lower()
    return "" if word in ("nan", "none", "null") else word


def _yes_or_no(value: Any, path: PathLike, row: int) -> bool | None:
    """Read a label; None where the cell is empty."""
    text = _word(value)
    if not text:
        return None
    if text not in _YES + _NO:
        raise ValueError(
            f"{path}, row {row}: a label is yes or no (true, false, 1, 0), "
            f"got {str(value)[:40]!r}; correct it, or leave it empty."
        )
    return text in _YES
