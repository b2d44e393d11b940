"""Compute pruned differences with numpy, to compare steering vectors with."""

from __future__ import annotations

import numpy as np


def by_numpy(unsafe, safe, keep, which, paired):
    unsafe, safe = unsafe.double().numpy(), safe.double().numpy()
    differences = (safe if paired else safe.mean(axis=0, keepdims=True)) - unsafe
    if which == "none":
        return differences.mean(axis=0)
    norms = np.linalg.norm(differences, axis=1)
    n_kept = max(1, int(np.floor(keep * len(norms) + 1e-9)))
    order = np.argsort(-norms if which == "top" else norms, kind="stable")
    return differences[order[:n_kept]].mean(axis=0)
