"""Give back the memory of weights that are mapped from a file, and say how much is free.

safetensors maps a checkpoint that is loaded in its own data type: its pages are the file's, come
into memory when they are read, and can be read from the file again at any time. The system drops
them by itself where memory is short; here they are dropped as soon as they are not needed, so that
a packed model does not hold its weights twice.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


_IN_MEMORY, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61
"""Bits of an entry of /proc/self/pagemap."""


def drop_pages(tensor: Tensor) -> bool:
    """Drop the pages of a tensor from memory if they are those of a file, as the file has them.

    The values stay what they are: the next reading fetches them from the file. Pages that were
    written to, or were never of a file, are left alone, and so is everything on systems other than
    Linux.

    Args:
        tensor: A tensor on the processor, such as a weight.

    Returns:
        Whether it is of a file and was dropped.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return False
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or size < 3 * page:
        return False
    first = -(-tensor.data_ptr() // page)  # whole pages: others share the ends
    n = (tensor.data_ptr() + size) // page - first
    if not _is_of_file(first, n):
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    where, length = ctypes.c_void_p(first * page), ctypes.c_size_t(n * page)
    return madvise(where, length, mmap.MADV_DONTNEED) == 0


def _is_of_file(first: int, n: int) -> bool:
    """Tell whether all pages in memory are a file's, and none was written to."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            entries = np.frombuffer(pagemap.read(8 * n), dtype=np.uint64)
    except OSError:
        return False
    in_memory = (entries & np.uint64(_IN_MEMORY)) != 0
    of_file = (entries & np.uint64(_OF_FILE)) != 0
    swapped = (entries & np.uint64(_SWAPPED)) != 0
    return len(entries) == n and bool(of_file[in_memory].all()) and not bool(swapped.any())


def free_memory() -> int | None:
    """Say how many bytes can still be taken, by the machine and by the limit of a container.

    Returns:
        Bytes; None where this system does not say (it is Linux that does).
    """
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        largest = (group / "memory.max").read_text(encoding="ascii").strip()
        if largest != "max":
            used = (group / "memory.current").read_text(encoding="ascii")
            limits.append(int(largest) - int(used))
    except (OSError, ValueError):
        pass
    return min(limits, default=None)
