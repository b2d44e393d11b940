"""Read multiple-choice questions, in the forms that public sets have."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files.store import PathLike, data_path
from workbench.files.tables import is_csv, read_cells, read_numbered_rows
from workbench.prompts.cells import find_column, is_missing, values_in

if TYPE_CHECKING:
    import pandas as pd

LETTERS = "ABCDEFGHIJ"
"""Names of the columns of choices, and of the answers, in files of lettered choices."""


_ANSWER = ("answer", "answerKey", "label", "gold")
"""Columns of the right choice, the first of them that is there."""


@dataclass(frozen=True)
class Question:
    """Hold a multiple-choice question.

    Attributes:
        id: Name of the question.
        text: What is asked.
        choices: The answers to choose from, two or more.
        answer: Place of the right choice, from 0.
    """

    id: str
    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(
    source: PathLike | pd.DataFrame | Iterable[Mapping[str, Any] | Question] | None = None,
) -> list[Question]:
    """Read multiple-choice questions, one row each.

    Choices are a list in a column choices (as MMLU has them on the hub; ARC's object of text and
    label too), or stand in columns A, B, C, ... The answer is a place from 0, a letter, or the
    right choice's words. Beside lettered columns a letter is a place, whatever the choices say; an
    answer that may be a place as well as words is refused. The files of MMLU's own archive have no
    header: question, choices and a letter in each line.

    Args:
        source: A csv, tsv, json, jsonl or parquet file, a data frame, or dicts; None takes the few
            that come with the project. ``Question`` objects stay as they are.

    Raises:
        ValueError: If a row has no question, fewer than two choices, or an answer that is none of
            them or not clear, with its number.
    """
    given: Any = data_path("capability.jsonl") if source is None else source
    name = "question"
    if isinstance(given, str | os.PathLike):
        name = Path(given).name.split(".")[0]
        found = _headerless_rows(given) or [row for _, row in read_numbered_rows(given)]
        rows = [(f"{given}, row {i}", row) for i, row in enumerate(found, start=1)]
    else:
        items = list(given.to_dict("records") if hasattr(given, "to_dict") else given)
        if items and all(isinstance(item, Question) for item in items):
            return items
        rows = [(f"row {i}", dict(row)) for i, row in enumerate(items, start=1)]
    if not rows:
        raise ValueError(f"there are no questions in {given!r:.60}.")
    return [_question(row, place, f"{name}-{i}") for i, (place, row) in enumerate(rows, start=1)]


def _headerless_rows(path: PathLike) -> list[dict[str, Any]]:
    """Read a file whose first line is a question already; nothing where it is a header."""
    lines = read_cells(path) if is_csv(path) else []
    if not lines or not _is_lettered(lines[0]) or "question" in (c.lower() for c in lines[0]):
        return []
    rows = []
    for number, cells in enumerate(lines, start=1):
        if not _is_lettered(cells):
            raise ValueError(
                f"{path}, row {number}: a question, choices and a letter are needed, got {cells}."
            )
        question, *choices, answer = cells
        lettered = dict(zip(LETTERS, choices, strict=False))
        rows.append({"question": question, **lettered, "answer": answer})
    return rows


def _is_lettered(cells: Sequence[str]) -> bool:
    """Tell whether cells are a question, its choices, and the letter of one of these."""
    n = len(cells) - 2
    return 2 <= n <= len(LETTERS) and cells[-1].strip().upper() in tuple(LETTERS[:n])


def _question(row: Mapping[str, Any], place: str, name: str) -> Question:
    asked, answer = _cell(row, "question", "text", "prompt"), _cell(row, *_ANSWER)
    text = "" if is_missing(asked) else str(asked).strip()
    given, letters = _choices(row, place)
    choices = [str(choice).strip() for choice in given]
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    if is_number and all(isinstance(choice, str) for choice in given):
        right = [answer] if 0 <= answer < len(given) else []  # a place, not one of the words
    else:
        right = _places(answer, choices, letters)
    if not text or len(choices) < 2 or not right:
        raise ValueError(
            f"{place}: a question, two choices or more (choices, or A, B, ...) and an answer among "
            f"them are needed, got question {text!r:.40}, {len(choices)} choices, answer "
            f"{answer!r:.20}."
        )
    if len(right) > 1:
        raise ValueError(
            f"{place}: answer {answer!r:.20} may be the place of {choices[right[0]]!r:.20} (from "
            f"0) or the words of another choice; write a letter, in columns A, B, ..."
        )
    own_name = row.get("id")
    name = name if is_missing(own_name) else str(own_name)
    return Question(name, text, tuple(choices), right[0])


def _cell(row: Mapping[str, Any], *names: str) -> Any:
    """Return the cell of the first of some columns that is there; None without any."""
    column = find_column(names, row)
    return None if column is None else row[column]


def _choices(row: Mapping[str, Any], place: str) -> tuple[list[Any], list[str]]:
    """Return the choices of a row and the letters that they go by (none for a bare list)."""
    listed = _cell(row, "choices", "options")
    if isinstance(listed, Mapping):  # ARC: two lists, of texts and of the names of these
        names = [str(name) for name in values_in(listed.get("label"))]
        return values_in(listed.get("text")), names
    if len(values_in(listed)) > 1:
        return values_in(listed), []
    cells = [_cell(row, letter) for letter in LETTERS]
    filled = [i for i, cell in enumerate(cells) if not is_missing(cell)]
    if filled != list(range(len(filled))):
        gap = next(i for i in range(len(LETTERS)) if i not in filled)
        raise ValueError(f"{place}: choice {LETTERS[gap]} is empty and one behind it is not.")
    return [cells[i] for i in filled], list(LETTERS[: len(filled)])


def _places(answer: Any, choices: Sequence[str], letters: Sequence[str]) -> list[int]:
    """List the places that an answer may mean: one where it is clear, none where it means none."""
    if is_missing(answer):
        return []
    text = str(answer).strip()
    if text.upper() in (letter.upper() for letter in letters):
        return [[letter.upper() for letter in letters].index(text.upper())]
    meant = [choices.index(text)] if text in choices else []
    if not letters and len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        meant.append(LETTERS.index(text.upper()))
    number = int(answer) if isinstance(answer, float) and answer.is_integer() else text
    is_place = not isinstance(answer, bool) and str(number).isdecimal()
    if is_place and int(number) < len(choices):
        meant.insert(0, int(number))
    return list(dict.fromkeys(meant))
