"""Files on disk: safetensors and JSON only, written atomically, read with checks. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor


PathLike = str | os.PathLike[str]


def data_path(name: str) -> Path:
    """Path of a file of the project's own data folder, in a checkout or in an installed package.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"no data file {name!r} beside the package; reinstall workbench.")


def existing_file(path: PathLike) -> Path:
    """The path, if it is a file.

    Raises:
        FileNotFoundError: If it is not, with the path as given.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}.")
    return path


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an exception.

    A reader sees the old file or the whole new one, never a half; after an exception nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; a result is not
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: PathLike) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, with the line.
    """
    path = existing_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def write_jsonl(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line and flush it to disk, so that a kill loses at most the line being written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: PathLike, *, cut_last: bool = False) -> list[dict[str, Any]]:
    """Read one JSON object a line; blank lines are skipped.

    Args:
        path: The file.
        cut_last: For files written by ``append_jsonl``: a last line without its line end was cut by a kill; drop it,
            from the file too, so that appending goes on from a whole line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a JSON object, with its number.
    """
    return [row for _, row in read_numbered_jsonl(path, cut_last=cut_last)]


def read_numbered_jsonl(
    path: PathLike, *, cut_last: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """``read_jsonl`` with the number of each row's line, from 1, for messages about what a row holds."""
    path = existing_file(path)
    content = path.read_bytes()
    if cut_last and content and not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        with path.open("rb+") as file:
            file.truncate(len(content))
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: a JSON object is needed, got {type(row).__name__}."
            )
        rows.append((number, row))
    return rows


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """Write tensors as safetensors, atomically, with a JSON card in the file's header.

    Args:
        path: The file to write.
        tensors: Named tensors, on any device.
        card: JSON values that say what the tensors are.

    Returns:
        SHA-256 checksum of the file.
    """
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        # Copies: safetensors refuses tensors that share memory.
        copies = {
            name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()
        }
        save_file(copies, temporary, metadata={"card": json.dumps(card)})
        return file_checksum(temporary)


def read_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and their card, as written by ``write_tensors``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds no card.
    """
    from safetensors import SafetensorError, safe_open

    path = existing_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            card = json.loads((file.metadata() or {})["card"])
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or was not written by workbench ({error}); delete and rebuild it."
        ) from error


def file_checksum(path: PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Short hash of a tensor's values, for keys."""
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[
        :16
    ]


def key_of(value: Any) -> str:
    """A short stable key of a JSON value (16 hexadecimal digits of its SHA-256), for caches."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]
