"""Test that files appear whole or not at all, and that damaged ones say so."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.files import store
from workbench.files.store import (
    append_jsonl,
    atomic_path,
    data_path,
    existing_file,
    file_checksum,
    key_of,
    read_json,
    read_jsonl,
    read_numbered_jsonl,
    read_tensors,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)

if TYPE_CHECKING:
    from pathlib import Path

in_one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)
json_rows = st.lists(
    st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=3), max_size=4
)


class TroubleError(Exception):
    pass


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: type[BaseException]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [TroubleError, KeyboardInterrupt, SystemExit])
def test_a_file_whose_writing_fails_stays_as_it_was(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_a_new_file_whose_writing_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TroubleError):
        write_half(tmp_path / "new" / "a.txt", TroubleError)
    assert names_in(tmp_path / "new") == []


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # another file system could not replace atomically
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_two_writers_do_not_share_their_temporary_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as first, atomic_path(tmp_path / "a") as second:
        assert first != second


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


@in_one_folder
@given(json_values)
def test_json_reads_back_what_was_written(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_json_is_one_line_with_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.json is not valid JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


@in_one_folder
@given(json_rows, json_rows)
def test_jsonl_reads_back_what_was_written_and_appended(
    tmp_path: Path, first: list, second: list
) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, first)
    append_jsonl(path, second)
    assert read_jsonl(path) == first + second
    assert read_jsonl(path, cut_last=True) == first + second


def test_line_ends_inside_a_text_do_not_split_a_row(tmp_path: Path) -> None:
    row = {"text": "a\nb\r\nc\u2028d\u2029e\x85f\x0bg\x1ch"}
    write_jsonl(tmp_path / "rows.jsonl", [row, row])
    assert read_jsonl(tmp_path / "rows.jsonl") == [row, row]


@in_one_folder
@given(json_rows.filter(bool), st.data())
def test_a_last_line_cut_by_a_kill_is_dropped_and_appending_goes_on(
    tmp_path: Path, rows: list, data: st.DataObject
) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    content = path.read_bytes()
    start = content.rfind(b"\n", 0, len(content) - 1) + 1  # of the last line
    path.write_bytes(content[: data.draw(st.integers(start, len(content) - 1))])
    assert read_jsonl(path, cut_last=True) == rows[:-1]
    assert path.read_bytes() == content[:start]
    append_jsonl(path, rows[-1:])
    assert path.read_bytes() == content


def test_without_being_told_a_file_is_never_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')  # written by hand, without a last line end
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a": 1}\n{"a": 2}'


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"a": ', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"[1]", "a JSON object is needed, got list"),
        (b"3", "a JSON object is needed, got int"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number_in_the_file(
    tmp_path: Path, line: bytes, what: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n \n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 4: {what}") as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value)


def test_rows_come_with_the_numbers_of_their_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\n{"a": 1}\n\n{"a": 2}')
    assert read_numbered_jsonl(tmp_path / "rows.jsonl") == [(2, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize("reader", [existing_file, read_json, read_jsonl, read_tensors])
def test_a_missing_file_is_named_as_it_was_given(reader, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no file '.*nowhere\.x'\.$"):
        reader(tmp_path / "nowhere.x")
    with pytest.raises(FileNotFoundError):
        reader(tmp_path)  # a folder


def test_tensors_and_their_card_read_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": base,
        "view": base[1:3, ::2],
        "transposed": base.T,
        "half": torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.bfloat16),
        "gradient": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "ids": torch.tensor([1, 2**40]),
    }
    card = {"text": "é\n\u2028", "list": [1, None, 0.1]}
    checksum = write_tensors(tmp_path / "t.safetensors", tensors, card)
    back, card_back = read_tensors(tmp_path / "t.safetensors")
    assert card_back == card
    assert checksum == file_checksum(tmp_path / "t.safetensors")
    assert checksum == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
        assert back[name].dtype == tensor.dtype


def test_one_tensor_under_two_names_is_written_twice(tmp_path: Path) -> None:
    same = torch.ones(3)
    write_tensors(tmp_path / "t.safetensors", {"a": same, "b": same}, {})
    back, _ = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(back["a"], back["b"])


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2)}
    assert write_tensors(tmp_path / "1", tensors, {"x": 1}) == write_tensors(
        tmp_path / "2", tensors, {"x": 1}
    )


def test_tensors_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, {})
    before = path.read_bytes()

    def cut(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "file_checksum", cut)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"a": torch.ones(1)}, {})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["t.safetensors"]


def test_damaged_tensor_files_say_so_in_one_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(50)}, {})
    whole = path.read_bytes()
    for content in (b"", b"rubbish", whole[:-3], whole[:20], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"t\.safetensors is damaged or no safetensors file.*write this one again\.$",
        ):
            read_tensors(path)
    for metadata in (None, {"card": "{"}):
        save_file({"a": torch.ones(1)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"was not written by workbench: .*no card") as error:
            read_tensors(path)
        assert "delete" not in str(error.value)


def test_a_key_depends_on_the_value_not_on_the_order_of_its_names() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    keys = {
        key_of(value)
        for value in ({"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1}, [1, 2], [2, 1], None, "é", "e")
    }
    assert len(keys) == 9
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
    assert (
        key_of({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:16]
    )  # the same in every session


def test_a_data_file_is_found_and_a_missing_one_named() -> None:
    assert json.loads(data_path("refusal_patterns.json").read_text(encoding="utf-8"))
    with pytest.raises(FileNotFoundError, match=r"no data file 'nothing\.json' beside the package"):
        data_path("nothing.json")
