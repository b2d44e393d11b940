"""Test that tables are read row by row, and that damaged ones say where."""

import gzip
import json
import lzma

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.files.tables import read_rows

ROWS = [
    {"question": 'Why "so", twice?\nReally', "topic": "a,b"},
    {"question": "Grüße, 你好", "topic": ""},
]


def write(path, text, opener=open):
    with opener(path, "wb") as file:
        file.write(text.encode())
    return path


def as_csv(rows, delimiter=","):
    def cell(value):
        return '"' + value.replace('"', '""') + '"'

    return "\r\n".join(
        delimiter.join(map(cell, cells))
        for cells in [list(rows[0]), *(list(r.values()) for r in rows)]
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", as_csv(ROWS)),
        ("a.tsv", as_csv(ROWS, "\t")),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.jsonl", "\n\n".join(json.dumps(row) for row in ROWS) + "\n"),
        ("lines.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("bom.csv", "\ufeff" + as_csv(ROWS)),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path, name, text):
    assert read_rows(write(tmp_path / name, text)) == ROWS
    assert read_rows(write(tmp_path / f"{name}.gz", text, gzip.open)) == ROWS
    assert read_rows(write(tmp_path / f"{name}.xz", text, lzma.open)) == ROWS


def test_parquet_keeps_nested_values(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": "q", "category": {"self_harm": True}, "label": None, "tags": ["x"]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.integers() | st.none()}), min_size=1)
)
def test_json_lines_come_back_as_they_went(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ("a.json", b'[\n {"a": 1},\n {"a": }\n]', "line 3: not valid JSON"),
        ("a.json", b'[{"a": 1}, 7]', "row 2: a JSON object is needed, got int"),
        ("a.jsonl", b"[]", "holds no rows"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3: not valid csv"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2: not valid csv"),
        ("a.csv", b'a,b\n1,"2\n', "not valid csv"),
        ("a.csv", b"a,b\n", "holds no rows"),
        ("a.csv", b"a\n\xff\xfe\n", "cannot be read as text"),
        ("a.csv.gz", b"a,b\n1,2\n", "cannot be read as text"),
        ("a.json.xz", b"a,b\n1,2\n", "cannot be read as text"),
        ("a.parquet", b"not parquet", "not a valid parquet file"),
        ("a.xlsx", b"", "formats: .csv"),
    ],
)
def test_a_damaged_file_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*gone\.csv"):
        read_rows(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match="it is a folder"):
        read_rows(tmp_path)
