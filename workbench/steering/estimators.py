"""Make a direction out of two sets of activations: tensors in, a tensor out.

Differences of means, with and without pruning, and the field's other ways. Every result points from
unsafe to safe.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from workbench.stats.linear_probe import fit_linear_probe

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


Pruning = Literal["none", "top", "bottom", "random"]
"""Which differences are kept: all, those with the largest or smallest norms, or any."""


def mean_difference(
    unsafe: Float[Tensor, "unsafe d"], safe: Float[Tensor, "safe d"]
) -> Float[Tensor, " d"]:
    """Subtract the mean of the unsafe rows from the mean of the safe rows, in float64.

    Args:
        unsafe: Activations of one category, residual-stream units.
        safe: Activations at the same site and span.

    Returns:
        Vector from unsafe to safe, float32, not normalised.

    Raises:
        ValueError: If a set is empty or widths differ.

    Source: SafeSteer (Ghosh et al. 2025, arXiv:2506.04250), the vector omega.
    """
    _check_sides(unsafe, safe)
    return (safe.double().mean(dim=0) - unsafe.double().mean(dim=0)).float()


def pruned_mean_difference(
    unsafe: Float[Tensor, "unsafe d"],
    safe: Float[Tensor, "safe d"],
    *,
    keep: float = 0.5,
    which: Pruning = "top",
    paired: bool = False,
    seed: int = 0,
) -> Float[Tensor, " d"]:
    """Average the safe-minus-unsafe differences over the largest ones only.

    A difference with a large norm is taken to be a clear case of the category. Whether that helps
    is an empirical question: the bottom and random parts of the same size are its controls.

    Args:
        unsafe: Activations of one category, residual-stream units.
        safe: Activations at the same site and span. Paired: row i belongs to row i of ``unsafe``;
            else their mean is taken.
        keep: Fraction of differences kept, in (0, 1]; at least one is kept.
        which: "top" (largest L2 norm first), "bottom", "random", or "none" (no pruning).
        paired: Whether rows belong together.
        seed: Seed of "random".

    Returns:
        Vector from unsafe to safe, float32, not normalised.

    Raises:
        ValueError: If a set is empty, widths differ, paired sets differ in length, or keep is
            outside (0, 1].

    Source: SafeSteer (Ghosh et al. 2025, arXiv:2506.04250), pruning by the norm's median
    (keep = 0.5).
    """
    _check_sides(unsafe, safe)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a fraction above 0 and up to 1, got {keep}.")
    if which not in ("none", "top", "bottom", "random"):
        raise ValueError(f"unknown pruning {which!r}; prunings: none, top, bottom, random.")
    if paired and len(unsafe) != len(safe):
        raise ValueError(
            f"paired differences need as many safe as unsafe rows, got {len(safe)} and "
            f"{len(unsafe)}."
        )
    differences = (safe.double() if paired else safe.double().mean(dim=0)) - unsafe.double()
    # At keep = 0.5 those above the median.
    n_kept = max(1, math.floor(keep * len(differences) + 1e-9))
    if which == "none":
        order = torch.arange(len(differences))
        n_kept = len(differences)
    elif which == "random":
        order = torch.randperm(len(differences), generator=torch.Generator().manual_seed(seed))
    else:
        order = differences.norm(dim=1).argsort(descending=which == "top", stable=True)
    return differences[order[:n_kept]].mean(dim=0).float()


def principal_direction(
    unsafe: Float[Tensor, "pair d"], safe: Float[Tensor, "pair d"]
) -> Float[Tensor, " d"]:
    """Find the first principal component of paired differences, turned from unsafe to safe.

    The differences are not centred: what they share, their mean, is what is looked for. The
    source gives them random signs and centres them, which is the same for many pairs. With few it
    is not: where two signs out of two are equal, centring takes the shared direction away.

    Args:
        unsafe: Activations, residual-stream units; row i belongs to row i of ``safe``.
        safe: Activations at the same site and span.

    Returns:
        Direction from unsafe to safe, float32, at unit norm.

    Raises:
        ValueError: If the sets do not pair up or hold fewer than two pairs.

    Source: representation reading of RepE (Zou et al. 2023, arXiv:2310.01405).
    """
    if unsafe.shape != safe.shape or len(unsafe) < 2:
        raise ValueError(
            f"principal_direction needs two pairs or more, row by row, got {len(unsafe)} and "
            f"{len(safe)} rows."
        )
    differences = safe.double() - unsafe.double()
    _, _, components = torch.linalg.svd(differences, full_matrices=False)
    direction = components[0]
    toward_safe = (differences @ direction).mean() >= 0
    return (direction if toward_safe else -direction).float()


def probe_direction(
    unsafe: Float[Tensor, "unsafe d"], safe: Float[Tensor, "safe d"], *, penalty: float = 1.0
) -> Float[Tensor, " d"]:
    """Find the normal of a logistic regression that tells safe from unsafe rows.

    Args:
        unsafe: Activations, residual-stream units.
        safe: Activations at the same site and span.
        penalty: Weight of the squared norm, on standardised activations.

    Returns:
        Direction from unsafe to safe, float32, at unit norm.

    Raises:
        ValueError: If a side is empty.
    """
    _check_filled(unsafe, safe)
    labels = ["against safe"] * len(unsafe) + ["safe"] * len(safe)
    direction = fit_linear_probe(torch.cat([unsafe, safe]), labels, penalty=penalty).weights[0]
    return (direction / direction.norm()).float()


def spectral_directions(
    neutral: Float[Tensor, "pair d"], other: Float[Tensor, "pair d"], *, share: float = 0.9
) -> Float[Tensor, "d k"]:
    """Find the directions of neutral activations that covary most with other ones.

    These are the first left singular vectors of the centred cross-covariance, as many as explain
    ``share`` of its summed singular values.

    Args:
        neutral: Activations, residual-stream units; row i belongs to row i of ``other``.
        other: Activations at the same site.
        share: Share that is explained, above 0 and at most 1.

    Returns:
        Orthonormal columns, float32; none where nothing covaries.

    Raises:
        ValueError: If the sets do not pair up, hold fewer than two pairs, or share is out of range.

    Source: SEA (Qiu et al. 2024, arXiv:2405.09719).
    """
    _check_sides(other, neutral)
    if len(neutral) != len(other) or len(neutral) < 2:
        raise ValueError(
            f"a covariance needs two pairs or more, row by row, got {len(neutral)} and "
            f"{len(other)} rows."
        )
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}.")
    sides = [(rows.double() - rows.double().mean(dim=0)).T for rows in (neutral, other)]
    # Few rows, wide activations: the singular vectors of a small core, in a basis of the rows.
    (basis, core), (_, other_core) = (torch.linalg.qr(side) for side in sides)
    left, sizes, _ = torch.linalg.svd(core @ other_core.T)
    total = sizes.sum()
    if total <= 1e-12 * sides[0].norm() * sides[1].norm():
        return torch.zeros(neutral.shape[1], 0)
    explained = sizes.cumsum(dim=0) / total
    n_kept = 1 + int((explained < share - 1e-9).sum())
    return (basis @ left[:, :n_kept]).float()


def _check_filled(unsafe: Tensor, safe: Tensor) -> None:
    if len(unsafe) == 0 or len(safe) == 0:
        raise ValueError(f"both sides need rows, got {len(unsafe)} unsafe and {len(safe)} safe.")


def _check_sides(unsafe: Tensor, safe: Tensor) -> None:
    _check_filled(unsafe, safe)
    if unsafe.shape[1] != safe.shape[1]:
        raise ValueError(
            f"widths differ: {unsafe.shape[1]} and {safe.shape[1]}; use activations of one site "
            "and model."
        )
    if not (unsafe.isfinite().all() and safe.isfinite().all()):
        raise ValueError(
            "an activation is infinite or not a number: run the model in float32 or bfloat16."
        )
