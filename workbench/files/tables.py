"""Read tables that others wrote: csv, tsv, json, jsonl, txt and parquet.

The files are parsed; nothing in them is run.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import math
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.files.store import local_path

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.files.store import PathLike

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".parquet")


TEXT_COLUMNS = ("text", "prompt", "question", "instruction")
"""Columns that hold the text of a row, the first of them that is there."""


Numbered = list[tuple[str, dict[str, Any]]]
"""Rows with their places in words, for error messages: "mine.csv, line 3"."""


def read_rows(path: PathLike) -> list[dict[str, Any]]:
    """Read a table with named columns as one dict per row.

    Cells of csv and tsv files are texts. A json or jsonl file is a list of objects or of texts,
    holds one of them per line, or is one object with a list in it; which of these is told by its
    content, not by its name. The lines of a txt file are texts. A text alone becomes the column
    "text". What JSON and parquet hold as NaN is None.

    Args:
        path: The file; all but parquet may be compressed (.gz, .xz).

    Raises:
        ValueError: If there is no such file, its format is unknown, it holds no rows, a column
            comes twice, or it cannot be parsed (with the line).
    """
    rows = [row for _, row in read_numbered_rows(path)]
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def read_numbered_rows(path: PathLike, *, text: str | None = None) -> Numbered:
    """Read as ``read_rows`` does, each row with its place in words; there may be none.

    Args:
        path: The file.
        text: Name of the column of texts, where it is none of ``TEXT_COLUMNS``.
    """
    path = local_path(path)
    suffix = _format_of(path)
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(_text_of(path), path, suffix)
    if suffix == ".txt":
        lines = enumerate(_text_of(path).split("\n"), start=1)
        return [(f"{path}, line {i}", {"text": line.strip()}) for i, line in lines if line.strip()]
    return _json_rows(_text_of(path), path, text)


def read_cells(path: PathLike) -> list[list[str]]:
    """Read a csv or tsv file as lists of cells, the first line among them; blank lines are not.

    Raises:
        ValueError: If there is no such file, or it cannot be parsed (with the line).
    """
    path = local_path(path)
    return [cells for _, cells in _cells(_text_of(path), path, _format_of(path))]


def is_csv(path: PathLike) -> bool:
    """Tell whether a file is named as one of cells with delimiters, compressed or not."""
    return _suffix_of(local_path(path)) in (".csv", ".tsv")


def rows_of_object(value: Mapping[str, Any], text: str | None = None) -> list[dict[str, Any]]:
    """Turn one object into the rows that are meant.

    It is one row; or it holds one list of rows, or one of texts, beside other things; or it maps
    columns to their values, categories to lists of texts, or names to rows.

    Args:
        value: The object.
        text: Name of the column of texts, where it is none of ``TEXT_COLUMNS``.

    Raises:
        ValueError: If its columns are of different length.
    """
    if text not in value:
        text = next((name for name in value if str(name).lower() in TEXT_COLUMNS), None)
    if (text is not None and isinstance(value[text], str)) or any(
        map(_is_conversation, value.values())
    ):
        return [dict(value)]
    lists = {name: list(v) for name, v in value.items() if _is_list(v)}
    tables = [rows for rows in lists.values() if rows and _all_are(rows, Mapping)]
    if len(tables) == 1:
        return [dict(row) for row in tables[0]]
    if lists and len(lists) == len(value):
        if text is not None:
            return _rows_of_columns(lists)
        if all(_all_are(texts, str) for texts in lists.values()):
            return [{"text": t, "category": name} for name, texts in lists.items() for t in texts]
    if len(lists) == 1 and _all_are(texts := next(iter(lists.values())), str):
        return [{"text": text} for text in texts]
    if value and _all_are(value.values(), Mapping):
        return _rows_of_objects(value, text)
    return [dict(value)]


def _rows_of_columns(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name!r} {n}" for name, n in lengths.items())
        raise ValueError(f"columns must be of one length, got {said}.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _rows_of_objects(value: Mapping[str, Any], text: str | None) -> list[dict[str, Any]]:
    """Turn an object of objects into rows: columns by row name, as pandas writes them, or rows."""
    if text is not None:
        return [{name: cells.get(key) for name, cells in value.items()} for key in value[text]]
    return [{"id": str(name), **row} for name, row in value.items()]


def _is_list(value: object) -> bool:
    """Tell whether a value is a list, or what numpy and pandas have in place of one."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def _all_are(values: Any, kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def _is_conversation(value: object) -> bool:
    """Tell whether a value is a list of messages, each with who speaks and what is said."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, Mapping) and (m.keys() >= {"role", "content"} or "from" in m)
            for m in value
        )
    )


def _suffix_of(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz").removesuffix(".xz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _format_of(path: Path) -> str:
    """Name the format of a file that is there, by its suffix."""
    if not path.is_file():
        hint = " (it is a folder; name a file in it)" if path.is_dir() else ""
        raise ValueError(f"no file {str(path)!r}{hint}.")
    suffix = _suffix_of(path)
    if not suffix:
        raise ValueError(
            f"cannot read {str(path)!r}; formats: {', '.join(SUFFIXES)}, "
            "all but parquet also as .gz or .xz."
        )
    return suffix


def _text_of(path: Path) -> str:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.name.lower()[-3:], open)
    try:
        with opener(path, "rb") as file:
            content: bytes = file.read()
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = _as_windows_text(content)
        if text is None:
            raise ValueError(
                f"{path} cannot be read as text: {error}; save it as UTF-8."
            ) from error
        warnings.warn(
            f"{path} is not UTF-8; it is read as Windows-1252. Save it as UTF-8 if its letters "
            "come out wrong.",
            stacklevel=4,
        )
        return text
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}.") from error


def _as_windows_text(content: bytes) -> str | None:
    """Read bytes as Windows-1252, where they look like it: few accents between many letters."""
    accents = re.findall(rb"[\x80-\xff]+", content)
    letters = len(re.findall(rb"[A-Za-z]", content))
    if max(map(len, accents)) > 3 or 3 * sum(map(len, accents)) > letters:
        return None
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        return None


def _parquet_rows(path: Path) -> Numbered:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        names = parquet.ParquetFile(path).schema_arrow.names
        _check_header(names, path)
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a valid parquet file ({str(error).splitlines()[0]})."
        ) from error
    rows = ({k: _without_nan(v) for k, v in row.items()} for row in table.to_pylist())
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows, start=1)]


def _without_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _cells(text: str, path: Path, suffix: str) -> list[tuple[str, list[str]]]:
    """Cut a text into lines of cells, each with its place; blank lines are left out."""
    head, _, rest = text.lstrip("\r\n").partition("\n")
    named = re.fullmatch(r"sep=(.)\r?", head)  # how Excel says which delimiter a file has
    usual = "\t" if suffix == ".tsv" else ","
    others = max(",;\t", key=head.count)
    delimiter = named[1] if named else usual if usual in head or others not in head else others
    source = io.StringIO(rest if named else text, newline="")
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # a document may stand in one cell
    lines = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((f"{path}, line {reader.line_num + bool(named)}", cells))
    except csv.Error as error:
        line = reader.line_num + bool(named)
        raise ValueError(f"{path}, line {line}: not valid {suffix[1:]} ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return lines


def _csv_rows(text: str, path: Path, suffix: str) -> Numbered:
    lines = _cells(text, path, suffix)
    if not lines:
        return []
    header = lines[0][1]
    _check_header(header, path)
    for place, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{place}: not valid {suffix[1:]} (more or fewer cells than the header has)."
            )
    return [(place, dict(zip(header, cells, strict=True))) for place, cells in lines[1:]]


def _check_header(names: list[str], path: Path) -> None:
    """Raise where a column comes twice; without a name it is an index and nobody asks for it."""
    for name in names:
        if name.strip() and names.count(name) > 1:
            raise ValueError(f"{path}: column {name!r} comes twice; rename one of them.")


def _json_rows(text: str, path: Path, text_column: str | None) -> Numbered:
    """Read rows from a JSON value, or from one JSON value per line."""
    try:
        value = _parsed(text) if text.strip() else []
    except json.JSONDecodeError as error:
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if not _is_json(lines[0][1]):
            raise ValueError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg})."
            ) from error
        return [
            (f"{path}, line {i}", _row_of(_line(line, f"{path}, line {i}"), f"{path}, line {i}"))
            for i, line in lines
        ]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}.") from error
    if isinstance(value, dict):
        try:
            value = rows_of_object(value, text_column)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    elif _is_conversation(value) or not isinstance(value, list):
        value = [value]
    places = (f"{path}, row {i}" for i in range(1, len(value) + 1))
    return [(place, _row_of(row, place)) for place, row in zip(places, value, strict=True)]


def _row_of(value: Any, place: str) -> dict[str, Any]:
    """Make a row of one JSON value: an object, a text, or a list of messages."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if _is_conversation(value):
        return {"messages": value}
    raise ValueError(f"{place}: a JSON object is needed, got {type(value).__name__}.")


def _line(line: str, place: str) -> Any:
    try:
        return _parsed(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {error}.") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str) -> Any:
    """Parse JSON as Python writes it: NaN is a missing value, and no key may come twice."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"column {twice!r} comes twice in one object; rename one of them")
        return result

    def constant(name: str) -> float | None:
        return None if name == "NaN" else float(name)

    return json.loads(text, object_pairs_hook=object_of, parse_constant=constant)
