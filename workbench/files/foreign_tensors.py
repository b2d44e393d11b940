"""Read the vectors in files that other libraries wrote: named rows of numbers, never a pickle.

What a file is, is told by its first bytes and not by its name.
"""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from workbench.files.store import existing_file

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float

    from workbench.files.store import PathLike


class ForeignTensors(NamedTuple):
    """Hold what a file of another library says.

    Attributes:
        format: "gguf", "safetensors", "json", "npy" or "npz".
        rows: Arrays of float32 by their name in the file; "" is the name in one that has none.
        location: Where in a block they belong, in the file's own word; "" where it does not say.
    """

    format: str
    rows: dict[str, Float[np.ndarray, "..."]]
    location: str = ""


def file_format(path: PathLike) -> str:
    """Tell a file's format by its first bytes.

    Returns:
        "gguf", "safetensors", "json", "npy", "npz", "pickle", or "" for none of them.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = existing_file(path)
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"GGUF"):
        return "gguf"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(".pkl") for name in names):
            return "pickle"
        return "npz" if names and all(name.endswith(".npy") for name in names) else ""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if start.lstrip()[:1] == b"{":
        return "json"
    # torch.save before 1.6 and plain pickles begin with the pickle protocol.
    return "pickle" if start[:1] == b"\x80" else ""


def read_foreign(path: PathLike) -> ForeignTensors:
    """Read the named rows of a file.

    GGUF control vectors (repeng, llama.cpp, EasySteer), safetensors, NumPy's npy and npz, and JSON
    objects of lists, also under "directions" (.svec of activation-steering).

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a pickle, which is never read, damaged, or of another format.
    """
    path, kind = existing_file(path), file_format(path)
    if kind == "pickle":
        raise ValueError(f"{path} is {PICKLED}")
    readers = {
        "gguf": _from_gguf,
        "safetensors": _from_safetensors,
        "json": _from_json,
        "npy": _from_numpy,
        "npz": _from_numpy,
    }
    if kind not in readers:
        raise ValueError(
            f"{path} holds no vectors that can be read; formats: {', '.join(readers)}. "
            "Is the file complete?"
        )
    from safetensors import SafetensorError

    try:
        rows = readers[kind](path)
    except (
        SafetensorError,
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        EOFError,
        OSError,
        RecursionError,
        zipfile.BadZipFile,
    ) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as {kind} ({cause[:200]}).") from error
    if not rows:
        raise ValueError(f"{path} holds no vectors.")
    return ForeignTensors(kind, rows, _location(path) if kind == "json" else "")


PICKLED = (
    "a pickle (torch.save), which can run code and is never read; convert it once where you trust "
    "it: python -c \"import torch, safetensors.torch as s; s.save_file({'layer_15': "
    "torch.load('direction.pt', weights_only=True)}, 'direction.safetensors')\""
)
"""What is said of a file that is a pickle, with the line that makes safetensors of it."""


def _from_gguf(path: Path) -> dict[str, Float[np.ndarray, "..."]]:
    """Read the tensors ``direction.N``; a file without them is a model."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = [t for t in GGUFReader(path).tensors if t.name.startswith("direction.")]
    if not tensors:
        raise ValueError("it has no tensors 'direction.N': is it a model?")
    return {
        str(t.name): np.array(dequantize(t.data, t.tensor_type), dtype=np.float32) for t in tensors
    }


def _from_safetensors(path: Path) -> dict[str, Float[np.ndarray, "..."]]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118


def _from_json(path: Path) -> dict[str, Float[np.ndarray, "..."]]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "directions" in content:
        content = content["directions"]
    if not isinstance(content, dict):
        raise ValueError("an object from layers to lists is needed")
    return {
        name: np.array(row, dtype=np.float32)
        for name, row in content.items()
        if isinstance(row, list)
    }


def _location(path: Path) -> str:
    """Read where in a block the vectors of an .svec file of steerability belong."""
    meta = json.loads(path.read_text(encoding="utf-8")).get("meta")
    return str(meta.get("location") or "") if isinstance(meta, dict) else ""


def _from_numpy(path: Path) -> dict[str, Float[np.ndarray, "..."]]:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return {"": _real(content)}
    with content:
        return {name: _real(content[name]) for name in content.files}


def _real(array: np.ndarray) -> Float[np.ndarray, "..."]:
    """Bring an array to float32; complex numbers would lose a part of themselves."""
    if np.iscomplexobj(array):
        raise ValueError("it holds complex numbers")
    return array.astype(np.float32)
