from .store import (
    append_jsonl,
    atomic_path,
    data_path,
    file_checksum,
    local_path,
    read_json,
    read_jsonl,
    read_tensors,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)
from .tables import read_rows

__all__ = [
    "append_jsonl",
    "atomic_path",
    "data_path",
    "file_checksum",
    "local_path",
    "read_json",
    "read_jsonl",
    "read_rows",
    "read_tensors",
    "write_json",
    "write_jsonl",
    "write_tensors",
    "write_text",
]
