"""Keep the activations of prompts in shards on disk, and read rows of them as they are asked for.

A shard is a safetensors file with some prompts' values at every site. It appears whole or not at
all, and its checksum stands in the manifest, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.files.store import file_checksum, key_of, read_json, write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models.sites import Site


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of one site that lie in shards; none of them is in memory.

    A file is opened for the time of a reading and mapped, so that only the rows asked for are
    brought from disk.

    Attributes:
        folder: Folder of the shards.
        site: Name of the site in them.
        size: Rows of every shard but the last.
        places: Where each row lies, counted over all shards.
        width: Numbers of a row.
    """

    folder: Path
    site: str
    size: int
    places: Int[np.ndarray, " row"]
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Give the shape of what ``read`` returns."""
        return len(self.places), self.width

    def at(self, rows: Sequence[int]) -> StoredRows:
        """Name some of the rows, in the order given; nothing is read."""
        return replace(self, places=self.places[np.asarray(rows, dtype=np.int64)])

    def read(self) -> Float[Tensor, "row d"]:
        """Read the rows into memory.

        Raises:
            FileNotFoundError: If the shards were removed meanwhile.
        """
        from safetensors import safe_open

        values = torch.empty(self.shape)
        shard_of_row = self.places // self.size
        for number in np.unique(shard_of_row):
            rows = np.flatnonzero(shard_of_row == number)
            path = shard_path(self.folder, int(number))
            if not path.is_file():
                raise FileNotFoundError(
                    f"the activations at {self.site} were kept in {path.name} of the store, which "
                    "is gone; cache them again, and keep the store while they are in use."
                )
            with safe_open(str(path), framework="pt") as file:
                mapped = file.get_tensor(self.site)
                inside = torch.from_numpy(self.places[rows] - number * self.size)
                values[torch.from_numpy(rows)] = mapped[inside]
        return values


def shard_path(folder: Path, number: int) -> Path:
    """Name the file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


@dataclass(frozen=True)
class ShardFolder:
    """The shards of exactly one measurement on disk, with a manifest of their checksums.

    Attributes:
        folder: Where they are.
        manifest: What was measured (``what``), the prompts' ids (``ids``), and the checksum of
            each shard by its number (``shards``).
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, store: Path, what: dict[str, Any], ids: list[str]) -> ShardFolder:
        """Open the folder of a measurement, or begin one.

        Args:
            store: Folder with the folders of all measurements.
            what: All that the values depend on.
            ids: Ids of the prompts.
        """
        what = json.loads(json.dumps(what))  # as it will be read back
        folder = store / key_of(what)
        path = folder / "manifest.json"
        if path.exists():
            try:
                manifest = read_json(path)
                if manifest["what"] == what and isinstance(manifest["shards"], dict):
                    return cls(folder, manifest)
            except (ValueError, KeyError, TypeError):
                pass
            warnings.warn(
                f"{path.name} of the activations in {folder.name} is damaged; computing them "
                "again.",
                stacklevel=4,
            )
        manifest = {"what": what, "ids": ids, "shards": {}}
        write_json(path, manifest)
        return cls(folder, manifest)

    def ensure(self, number: int, compute: Callable[[], Mapping[str, Tensor]]) -> None:
        """Compute and write a shard, unless it is there and whole."""
        if not self.is_whole(number):
            self.write(number, compute())

    def is_whole(self, number: int) -> bool:
        """Tell whether a shard is there as it was written; warn where one was there and is not."""
        checksum, path = self.manifest["shards"].get(str(number)), shard_path(self.folder, number)
        if checksum is None:
            return False
        if not path.is_file() or file_checksum(path) != checksum:
            warnings.warn(
                f"activation shard {path.name} is missing or damaged; computing it again.",
                stacklevel=4,
            )
            return False
        return True

    def write(self, number: int, values: Mapping[str, Tensor]) -> None:
        """Write a shard, and its checksum to the manifest."""
        metadata = {"shard": number, **self.manifest["what"]}
        checksum = write_tensors(shard_path(self.folder, number), values, metadata)
        self.manifest["shards"][str(number)] = checksum
        write_json(self.folder / "manifest.json", self.manifest)

    def rows(self, sites: Sequence[Site], order: Sequence[int]) -> dict[Site, StoredRows]:
        """Name the rows of each site, back in the order before they were sorted.

        Args:
            sites: Sites that were measured.
            order: The row that each place of the shards holds.
        """
        from safetensors import safe_open

        places = np.argsort(np.asarray(order, dtype=np.int64))
        size, names = self.manifest["what"]["shard"], {site: str(site) for site in sites}
        with safe_open(str(shard_path(self.folder, 0)), framework="pt") as file:
            widths = {site: file.get_slice(name).get_shape()[1] for site, name in names.items()}
        return {
            site: StoredRows(self.folder, name, size, places, widths[site])
            for site, name in names.items()
        }
