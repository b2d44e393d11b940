"""Part rows that begin in different ways, such as with two system prompts or sets of examples.

What all rows of a part begin with is computed once. All rows together could share only what comes
before their first difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.models.forward import shared_prefix_length

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workbench.models.tokens import Encoded


TOKENS_PER_STEP = 64
"""Tokens of prompts that are read in the time that a step of decoding takes with one row: 0.9 and
57 ms for 135 million weights on two cores."""


def parts_by_beginning(
    encoded: Sequence[Encoded], keep: Callable[[Encoded], int], n_copies: int, n_steps: int
) -> list[list[int]]:
    """Part rows where the longer beginnings of the parts save more than more batches cost.

    Args:
        encoded: The rows.
        keep: First position of a row whose activations or logits are needed.
        n_copies: How often each beginning is computed: once for every group of interventions.
        n_steps: Tokens of an answer. A part makes about one more batch, which takes so many steps.

    Returns:
        Indices of each part's rows, the part with the longest row first.
    """
    worth = TOKENS_PER_STEP * n_steps
    parts = _parts(list(range(len(encoded))), encoded, keep, n_copies, worth)
    return sorted(parts, key=lambda part: -max(len(encoded[row].ids) for row in part))


def _parts(
    rows: list[int],
    encoded: Sequence[Encoded],
    keep: Callable[[Encoded], int],
    n_copies: int,
    worth: int,
) -> list[list[int]]:
    shared = shared_prefix_length([encoded[row] for row in rows], keep)
    branches: dict[int | None, list[int]] = {}
    for row in rows:
        following = next(iter(encoded[row].ids[shared : shared + 1]), None)
        branches.setdefault(following, []).append(row)
    parts, others = [], []
    for branch in branches.values() if len(branches) > 1 else ():
        longer = shared_prefix_length([encoded[row] for row in branch], keep) - shared
        # A part reads again what all rows share.
        if longer * (len(branch) - n_copies) - shared * n_copies > worth:
            parts += _parts(branch, encoded, keep, n_copies, worth)
        else:
            others += branch
    if not parts:
        return [rows]
    return [*parts, sorted(others)] if others else parts
