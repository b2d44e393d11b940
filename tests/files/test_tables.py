"""Test that tables are read row by row, and that damaged ones say where."""

import csv
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
        ("a.csv", b"a\n\xff\xfe\n", "cannot be read as text: .* save it as UTF-8"),
        ("a.csv", "a\n你好，世界\n".encode("gbk"), "cannot be read as text: .* save it as UTF-8"),
        ("a.csv", b"a,b,a\n1,2,3\n", "column 'a' comes twice; rename one of them"),
        ("a.json", b'[{"a": 1, "b": 2, "a": 3}]', "column 'a' comes twice in one object"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 3}\n', "line 2: column 'a' comes twice"),
        ("a.json", b'{"text": ["x", "y"], "label": ["z"]}', "one length, got 'text' 2, 'label' 1"),
        ("a.json", b'{\n "a": 1,\n "b": \n}', "line 4: not valid JSON"),
        ("a.json", b"7", "row 1: a JSON object is needed, got int"),
        ("a.txt", b" \n\n", "holds no rows"),
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


# Shapes of files


TEXTS = [{"text": "how one"}, {"text": "how two"}]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("lines.txt", "how one\n\n  how two\r\n", TEXTS),
        ("strings.json", json.dumps(["how one", "how two"], indent=1), TEXTS),
        ("strings.jsonl", '"how one"\n"how two"\n', TEXTS),
        ("columns.json", json.dumps({"text": ["how one", "how two"]}, indent=1), TEXTS),
        ("one_list.json", json.dumps({"n": 2, "prompts": ["how one", "how two"]}), TEXTS),
        ("rows.json", json.dumps({"rate": 0.1, "by": {"x": 1}, "rows": TEXTS}, indent=2), TEXTS),
        ("orient.json", json.dumps({"text": {"0": "how one", "1": "how two"}}), TEXTS),
        ("row.json", json.dumps({"text": "how one", "choices": ["a"]}, indent=2),
         [{"text": "how one", "choices": ["a"]}]),
        ("named.json", json.dumps({"a": {"text": "how one"}}), [{"id": "a", "text": "how one"}]),
        ("by_category.json", json.dumps({"fraud": ["how one"], "malware": ["how two", "how"]}),
         [{"text": "how one", "category": "fraud"}, {"text": "how two", "category": "malware"},
          {"text": "how", "category": "malware"}]),
        ("no_rows.json", json.dumps({"rate": 0.1, "by": {"x": 1}}, indent=2),
         [{"rate": 0.1, "by": {"x": 1}}]),
        ("nan.json", '[{"a": NaN, "b": [NaN, 1]}]', [{"a": None, "b": [None, 1]}]),
        ("semicolons.csv", 'text;n\n"one; two";1\n', [{"text": "one; two", "n": "1"}]),
        ("excel.csv", "sep=;\r\ntext;n\r\nhow;1\r\n", [{"text": "how", "n": "1"}]),
        ("tabs.csv", "text\tn\nhow, one\t1\n", [{"text": "how, one", "n": "1"}]),
        ("commas.tsv", "text,n\nhow,1\n", [{"text": "how", "n": "1"}]),
        ("one_column.csv", 'text\n"how; one"\n', [{"text": "how; one"}]),
        ("blank.csv", "text,n\n,\nhow,1\n , \n", [{"text": "how", "n": "1"}]),
        ("indices.csv", ",,text\n0,0,how\n", [{"": "0", "text": "how"}]),
    ],
)  # fmt: skip
def test_the_shapes_that_people_have_are_read(tmp_path, name, content, rows):
    assert read_rows(write(tmp_path / name, content)) == rows
    assert read_rows(write(tmp_path / f"{name}.gz", content, gzip.open)) == rows


def test_a_list_of_messages_is_one_row_and_a_list_of_lists_several(tmp_path):
    chat = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    assert read_rows(write(tmp_path / "a.json", json.dumps(chat))) == [{"messages": chat}]
    assert (
        read_rows(write(tmp_path / "b.json", json.dumps([chat, chat]))) == [{"messages": chat}] * 2
    )
    rows = [{"messages": chat}]
    assert read_rows(write(tmp_path / "c.jsonl", json.dumps(rows[0]) + "\n")) == rows


def test_nan_of_parquet_is_missing_and_a_doubled_column_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": [float("nan"), 1.0]}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [{"a": None}, {"a": 1.0}]
    doubled = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    parquet.write_table(doubled, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="column 'a' comes twice"):
        read_rows(tmp_path / "b.parquet")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes("text\r\n你好, é\r\n".replace(", ", "").encode(encoding))
    assert read_rows(tmp_path / "a.csv") == [{"text": "你好é"}]


def test_windows_letters_are_read_with_a_warning(tmp_path):
    text = "text\nWie grüße ich “höflich”? Ça coûte 5 €, s’il te plaît.\n".replace(", ", " ")
    (tmp_path / "a.csv").write_bytes(text.encode("cp1252"))
    with pytest.warns(UserWarning, match=r"a\.csv is not UTF-8; it is read as Windows-1252"):
        [row] = read_rows(tmp_path / "a.csv")
    assert row["text"] == text.split("\n")[1]


def test_a_cell_may_hold_a_document(tmp_path):
    limit = csv.field_size_limit()
    [row] = read_rows(write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n"))
    assert len(row["text"]) == 200_000
    assert csv.field_size_limit() == limit
