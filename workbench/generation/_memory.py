"""How many rows a batch of answers has: as many as a share of the free memory holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from workbench.models.forward import SPARE_COLUMNS
from workbench.models.hooked_model import (
    hugging_face_model,
    input_device,
    vocabulary_width,
)
from workbench.models.trusted_paths import trusts

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel


LEAST = 2**30
"""Bytes that batches may take however little memory is free, or where nobody says how much is."""
MOST_ON_CPU = 2**32
"""Bytes that they take at most on a processor, which other programs use, too."""
SHARE = 0.5
"""Share of the free memory that they may take. The rest is left to what passes through the layers,
and to whatever else runs there."""
MOST_ROWS = 96
"""Rows per batch by default, at most, on a processor."""
MOST_ROWS_ON_GPU = 256
"""The same on a GPU, which reads all weights once for every step, whatever the number of rows."""

_MEMORY_INFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where Linux keeps the memory that a container may use, by the version of its control groups."""


@dataclass(frozen=True)
class RowBytes:
    """Hold the bytes that one row of a batch takes.

    Attributes:
        kept: Keys, values and logits.
        passing: Activations of one layer while the prompt is read.
    """

    kept: int
    passing: int


def memory_budget(model: HookedModel) -> int:
    """Find the bytes that a batch and the prefixes beside it may take.

    It is a power of two: as what is free changes from call to call, a call that goes on from an
    interrupted one still makes the same batches, mostly.
    """
    devices = {one.device for one in model.parameters() if one.device.type != "meta"}
    free = [free_bytes(model, device) for device in devices or {input_device(model)}]
    known = [n_bytes for n_bytes in free if n_bytes is not None]
    if len(known) < len(free):
        return LEAST
    allowed = int(SHARE * min(known)) * len(known)  # layers, and so keys, lie on all devices
    budget = max(LEAST, 1 << max(0, allowed.bit_length() - 1))
    return min(budget, MOST_ON_CPU) if input_device(model).type == "cpu" else budget


def free_bytes(model: HookedModel, device: torch.device) -> int | None:
    """Find how much memory is free on a device beside the model's weights; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    available = _kibibytes(_MEMORY_INFO, "MemAvailable")
    if available is None:
        return None
    # Weights that are mapped from a file are in use, but count as available.
    free = 1024 * available - weight_bytes(model, device)
    used = 1024 * (_kibibytes(_STATUS, "VmRSS") or 0)
    limits = [limit for limit in map(_container_limit, _CONTAINER_LIMITS) if limit is not None]
    return max(0, min([free, *(limit - used for limit in limits)]))


def weight_bytes(model: HookedModel, device: torch.device | None = None) -> int:
    """Count the bytes of a model's weights, those on one device if one is named."""
    weights = (one for one in model.parameters() if device is None or one.device == device)
    sizes = {one.data_ptr(): one.numel() * one.element_size() for one in weights}
    return sum(sizes.values())


def most_rows(model: HookedModel) -> int:
    """Say how many rows a batch has at most, however much memory there is."""
    return MOST_ROWS if input_device(model).type == "cpu" else MOST_ROWS_ON_GPU


def bytes_per_token(model: HookedModel) -> int:
    """Count the bytes of one token's keys and values."""
    cfg = model.cfg
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    size = next(iter(model.parameters())).element_size()
    return 2 * cfg.n_layers * heads * cfg.d_head * size


def bytes_per_row(
    model: HookedModel,
    n_prompt: int,
    n_new: int,
    *,
    n_prefix: int = 0,
    is_sampled: bool = False,
) -> RowBytes:
    """Count the bytes that a row of a batch takes.

    Args:
        model: A hooked model.
        n_prompt: Tokens of its prompt.
        n_new: Tokens of its answer, at most.
        n_prefix: Tokens of the prompt that were read before, for all rows.
        is_sampled: Whether tokens are drawn, for which probabilities are sorted in float64.
    """
    cfg = model.cfg
    size = next(iter(model.parameters())).element_size()
    kept = bytes_per_token(model) * (n_prompt + n_new + SPARE_COLUMNS)
    kept += vocabulary_width(model) * (size + 40 * is_sampled)
    n_read = n_prompt - n_prefix
    passing = n_read * size * (6 * cfg.d_model + 3 * (cfg.d_mlp or 4 * cfg.d_model))
    is_fused = hugging_face_model(model) is not None and trusts(model, "fused")
    if (
        not is_fused
    ):  # all scores of a layer are there at once: with mask, in float32, and cast back
        passing += 12 * cfg.n_heads * n_read * n_prompt
    return RowBytes(kept, passing)


def rows_that_fit(model: HookedModel, budget: int, row: RowBytes, *, n_prefixes: int = 0) -> int:
    """Count the rows a batch has by default.

    They are never fewer than ``LEAST`` bytes hold the keys, values and logits of.

    Args:
        model: A hooked model.
        budget: Bytes that the batch may take, see ``memory_budget``.
        row: Bytes of its longest row.
        n_prefixes: Tokens of all prefixes that are kept beside the batch.
    """
    prefixes = n_prefixes * bytes_per_token(model)
    in_budget = (budget - prefixes) // max(1, row.kept + row.passing)
    in_least = (min(budget, LEAST) - prefixes) // max(1, row.kept)
    return max(1, min(most_rows(model), max(in_budget, in_least)))


def _kibibytes(file: Path, name: str) -> int | None:
    """Read one number from a list of names and sizes in kB as Linux keeps them; None if absent."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((int(size) for size in sizes), None)


def _container_limit(file: Path) -> int | None:
    """Read how many bytes a container may use; None where there is no limit."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
