"""Read tables that others wrote: csv, tsv, json, jsonl and parquet.

The files are parsed; nothing in them is run.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.files.store import PathLike

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def read_rows(path: PathLike) -> list[dict[str, Any]]:
    """Read a table with named columns as one dict per row.

    Cells of csv and tsv files are texts. A json or jsonl file is a list of objects or holds one
    object per line; which of the two is told by its content, not by its name.

    Args:
        path: The file; csv, tsv, json and jsonl may be compressed (.gz, .xz).

    Raises:
        ValueError: If there is no such file, its format is unknown, it holds no rows, or it
            cannot be parsed (with the line).
    """
    path = Path(path)
    if not path.is_file():
        hint = " (it is a folder; name a file in it)" if path.is_dir() else ""
        raise ValueError(f"no file {str(path)!r}{hint}.")
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz").removesuffix(".xz")).suffix
    if suffix not in SUFFIXES:
        raise ValueError(
            f"cannot read {str(path)!r}; formats: {', '.join(SUFFIXES)}, "
            "all but parquet also as .gz or .xz."
        )
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix in (".json", ".jsonl"):
        rows = _json_rows(_text_of(path), path)
    else:
        rows = _csv_rows(_text_of(path), path, suffix)
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def _text_of(path: Path) -> str:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.name.lower()[-3:], open)
    try:
        with opener(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}.") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a valid parquet file ({str(error).splitlines()[0]})."
        ) from error


def _csv_rows(text: str, path: Path, suffix: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",", strict=True
    )
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error("more or fewer cells than the header has")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: not valid {suffix[1:]} ({error})."
        ) from error
    return rows


def _json_rows(text: str, path: Path) -> list[dict[str, Any]]:
    # a list is parsed whole; anything else line by line, numbered for error messages
    is_list = text.lstrip().startswith("[")
    parts = [(1, text)] if is_list else list(enumerate(text.split("\n"), start=1))
    rows: list[Any] = []
    for number, part in parts:
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number + error.lineno - 1}: not valid JSON ({error.msg})."
            ) from error
        rows += value if is_list else [value]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number}: a JSON object is needed, got {type(row).__name__}."
            )
    return rows
