"""Write JSON, text and safetensors files atomically and read them with checks; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor


PathLike = str | os.PathLike[str]


def data_path(name: str) -> Path:
    """Find a file of the project's data folder, in a checkout or in an installed package.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"no data file {name!r} beside the package; reinstall workbench.")


def local_path(path: PathLike) -> Path:
    """Make a path of what was given, with "~" as the user's own folder."""
    return Path(path).expanduser()


def existing_file(path: PathLike) -> Path:
    """Check that a path is a file and return it; ``~`` is the user's home folder.

    Raises:
        FileNotFoundError: If there is no such file, with the path as given.
    """
    path = local_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}.")
    return path


def name_for_file(text: str) -> str:
    """Turn any text, such as a category, into a part of a file name, one for one.

    A short word of small letters, digits, "_" and "-" stays as it is. Of another text such a word
    is made, with a hash behind it that tells it from its like: names may be too long for a file,
    hold a slash, or differ in capitals alone.
    """
    word = re.sub(r"[^a-z0-9_-]+", "_", text.lower())[:60].strip("_")
    if word == text:
        return text
    return f"{word}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:8]}"


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Give a temporary path that replaces ``path`` when the block ends without an exception.

    A reader sees the old file or the whole new one, never a half. After an exception the old file
    is as it was and the temporary one, which lies in the same folder, is gone.
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes its files private; a result gets the rights of any new file
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
    """Write a JSON file atomically, indented, with its keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: PathLike) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not valid JSON, with the line.
    """
    path = existing_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def write_jsonl(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file of one JSON object per line and flush them to disk.

    If the process is killed, at most the line being written is lost (see ``read_jsonl``).
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: PathLike, *, cut_last: bool = False) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; blank lines are skipped.

    Args:
        path: The file.
        cut_last: For files written by ``append_jsonl``: a last line without a line end was cut
            off when the process was killed. Drop it, from the file too, so that appending goes
            on after a whole line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a JSON object, with the number of the line.
    """
    return [row for _, row in read_numbered_jsonl(path, cut_last=cut_last)]


def read_numbered_jsonl(
    path: PathLike, *, cut_last: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """Read as ``read_jsonl`` does, each row with the number of its line, counted from 1.

    The numbers are for error messages about what a row holds.
    """
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
        The file's SHA-256 checksum.
    """
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(_apart(tensors), temporary, metadata={"card": json.dumps(card)})
        return file_checksum(temporary)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy those tensors that share memory with another, which safetensors refuses."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        storage = values.untyped_storage()
        is_whole = storage.nbytes() == values.numel() * values.element_size()
        is_apart = is_whole and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = values if is_apart else values.clone()
    return apart


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
            names = file.keys()  # safe_open gives no dict: one cannot iterate over it
            return {name: file.get_tensor(name) for name in names}, card
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); give another file, or have "
            "workbench write this one again."
        ) from error
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} was not written by workbench: its header holds no card ({error}); "
            "give a file of workbench."
        ) from error


def file_checksum(path: PathLike) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with local_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Hash a tensor's float32 values (16 hexadecimal digits of the SHA-256), for cache keys."""
    values = tensor.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def key_of(value: Any) -> str:
    """Hash a JSON value (16 hexadecimal digits of its SHA-256), for cache keys."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]
