from .hints import did_you_mean
from .store import (
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
    tensor_digest,
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
    "did_you_mean",
    "existing_file",
    "file_checksum",
    "key_of",
    "read_json",
    "read_jsonl",
    "read_numbered_jsonl",
    "read_rows",
    "read_tensors",
    "tensor_digest",
    "write_json",
    "write_jsonl",
    "write_tensors",
    "write_text",
]
