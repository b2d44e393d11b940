"""Read the cells of a row: what is missing, texts, labels, names of categories and lists.

Rows come from files (csv cells are texts, JSON has numbers and lists) and from tables in memory,
in which an empty cell is NaN.
"""

from __future__ import annotations

import ast
import json
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from workbench.files.hints import did_you_mean

LABEL_WORDS = {
    "unsafe": "unsafe",
    "harmful": "unsafe",
    "safe": "safe",
    "unharmful": "safe",
    "benign": "safe",
    "neutral": "neutral",
    "harmless": "neutral",
}
"""Words of a label column and the labels that they mean."""


YES, NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")
"""Words of a label column whose name is the question."""


_SAYS_UNSAFE = ("unsafe", "is_unsafe", "harmful", "is_harmful", "toxic", "toxicity")
"""Names of columns in which yes means unsafe."""


_SAYS_SAFE = ("safe", "is_safe")
"""Names of columns in which yes means safe."""


_NO_NAMES = ("", "nan", "none", "null")
"""What a missing name of a category or label looks like once it was made a text."""


def is_missing(value: object) -> bool:
    """Tell whether a cell holds nothing: None, NaN, pandas' NA and NaT, or blanks."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, numbers.Real):
        return math.isnan(value)
    return type(value).__name__ in ("NAType", "NaTType")


def text_in(value: object, column: str, place: str) -> str:
    """Return a cell's text without blanks around it; "" where it holds nothing.

    Raises:
        ValueError: If it holds something else than a text, with its place.
    """
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: column {column!r} holds {type(value).__name__}, a text is needed."
        )
    # A lone surrogate has no UTF-8.
    return value.encode("utf-8", "replace").decode("utf-8").strip()


def label_in(value: object, column: str, place: str) -> str | None:
    """Translate a value of a label column to unsafe, safe or neutral; None where it is missing.

    Raises:
        ValueError: If it is no known word, with its place.
    """
    word = "" if is_missing(value) else str(value).strip().lower()
    if word in _NO_NAMES:
        return None
    if word in LABEL_WORDS:
        return LABEL_WORDS[word]
    for columns, yes, no in ((_SAYS_UNSAFE, "unsafe", "safe"), (_SAYS_SAFE, "safe", "unsafe")):
        if column.lower() in columns and word in (*YES, *NO):
            return yes if word in YES else no
    raise ValueError(
        f"{place}: cannot read label {value!r} of column {column!r}; "
        f"labels: {', '.join(LABEL_WORDS)}."
    )


def names_in(value: object) -> list[str]:
    """List the names in a cell of categories, in order, each once.

    A cell holds one name, several with ";" or "|" between them, a list (also one written as a
    text), or an object of names and whether they hold.
    """
    if isinstance(value, Mapping):
        parts: list[Any] = [name for name, holds in value.items() if holds]
    else:
        parts = values_in(value)
        if parts == [value] and isinstance(value, str):
            parts = re.split(r"[;|]", value)
    names = [str(part).strip() for part in parts if not is_missing(part)]
    return list(dict.fromkeys(name for name in names if name.lower() not in _NO_NAMES))


def values_in(value: object) -> list[Any]:
    """Return the values of a list in a cell, also of one that was written as a text.

    Anything else is a list of one value; where the cell holds nothing the list is empty.
    """
    if isinstance(value, str) and value.strip()[:1] in ("[", "("):
        for parse in (json.loads, ast.literal_eval):  # as JSON, and as Python prints lists
            try:
                value = parse(str(value).strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            break
    if hasattr(value, "tolist"):  # an array, as parquet and pandas give them
        value = value.tolist()
    if isinstance(value, list | tuple | set):
        return list(value)
    return [] if is_missing(value) else [value]


def find_column(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """Find the first of some names among the columns; capitals do not matter where none is exact.

    Returns:
        The column as it is written, or None.
    """
    names, columns = list(names), list(columns)
    exact = next((name for name in names if name in columns), None)
    if exact is not None:
        return exact
    lower = {str(column).lower(): column for column in reversed(columns)}
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)


def missing_column(
    where: str, names: Iterable[str], present: Iterable[str], constants: Iterable[str] = ()
) -> ValueError:
    """Make the error for a column that is not there, with those that are."""
    names, present, constants = list(names), list(present), sorted(constants)
    wanted = " or ".join(repr(name) for name in names if name not in constants) or repr(names[-1])
    also = f" The same for all rows: {', '.join(constants)}." if constants else ""
    there = f"columns: {', '.join(map(repr, present))}.{did_you_mean(names[-1], present)}"
    return ValueError(f"{where}: column {wanted} is missing; {there}{also}")
