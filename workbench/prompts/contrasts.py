"""Say who is compared with whom: a category's unsafe prompts, and their counterparts.

Steering vectors, tables of neurons, layers and gates all set a category's unsafe prompts against
others. Who these others are is decided here, from labels, categories and pairs alone. Row numbers
are places in the given prompts, in their order. A prompt of several categories is in the rows of
each of them.

Two readings of "twins" are kept apart. Pairs (``paired_rows``) are an unsafe prompt and the safe
one with the same ``pair_id``: what a paired difference needs. Where only two groups are compared,
the twins are all safe prompts of the category (``safe_rows``), paired or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from workbench.prompts.prompt import HARMLESS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from jaxtyping import Bool, Int

    from workbench.prompts.prompt import Prompt


Against = Literal["twins", "neutral", "other"]
"""What a category's unsafe prompts are compared with: see ``rows_against`` and ``sides_of``."""


SafeSide = Literal["paired", "generic"]
"""What a steering vector is fitted towards: see ``sides_to_fit``."""


RISKY, TWINS, LOOK_ALIKES, NEUTRAL = "risky", "twins", "look-alikes", "neutral"


KINDS = (RISKY, TWINS, LOOK_ALIKES, NEUTRAL)
"""Kinds of prompts beside a steering gate: of a risk category; safe ones written to match one of
those; other safe ones that sound risky; everyday ones."""


CLOSED_FOR = {NEUTRAL: "neutral", TWINS: "hard_safe", LOOK_ALIKES: "hard_safe"}
"""Kind of prompts that must not open a steering gate, to the name of the threshold against it."""


@dataclass(frozen=True, eq=False)
class Sides:
    """Hold the row numbers of a contrast in its fold; pairs stand at one place on both sides."""

    unsafe: Int[np.ndarray, " unsafe"]
    reference: Int[np.ndarray, " reference"]
    paired: bool

    def labels(
        self,
    ) -> tuple[
        Int[np.ndarray, " rows"], Bool[np.ndarray, " rows"], Int[np.ndarray, " rows"] | None
    ]:
        """Return rows, which of them are unsafe, and the pair of each (None without pairs)."""
        n, m = len(self.unsafe), len(self.reference)
        pairs = np.concatenate([np.arange(n), np.arange(m)]) if self.paired else None
        return np.concatenate([self.unsafe, self.reference]), np.arange(n + m) < n, pairs


def unsafe_rows(prompts: Sequence[Prompt], category: str | None = None) -> list[int]:
    """List the rows of unsafe prompts, of one category or of all."""
    return _rows(prompts, "unsafe", category)


def safe_rows(prompts: Sequence[Prompt], category: str | None = None) -> list[int]:
    """List the rows of safe prompts: a category's twins, or all twins and look-alikes."""
    return _rows(prompts, "safe", category)


def neutral_rows(prompts: Sequence[Prompt]) -> list[int]:
    """List the rows of everyday prompts."""
    return _rows(prompts, "neutral", None)


def other_unsafe_rows(prompts: Sequence[Prompt], category: str) -> list[int]:
    """List the rows of unsafe prompts of all other categories."""
    return [
        i for i, p in enumerate(prompts) if p.label == "unsafe" and category not in p.categories
    ]


def paired_rows(prompts: Sequence[Prompt], category: str) -> tuple[list[int], list[int]]:
    """List a category's unsafe rows that have a safe one with their ``pair_id``, and that one.

    Returns:
        Unsafe rows and safe rows, pair by pair. Where several safe prompts share a ``pair_id``, the
        last one counts.
    """
    safe_of = {
        p.pair_id: i for i, p in enumerate(prompts) if p.label == "safe" and p.pair_id is not None
    }
    pairs = [
        (i, safe_of[pair_id])
        for i in unsafe_rows(prompts, category)
        if (pair_id := prompts[i].pair_id) is not None and pair_id in safe_of
    ]
    return [i for i, _ in pairs], [j for _, j in pairs]


def generic_rows(prompts: Sequence[Prompt]) -> list[int]:
    """List the safe side that all categories share: everyday rows, or else all safe rows.

    Everyday is a prompt with label "neutral" or category "harmless".
    """
    everyday = [
        i for i, p in enumerate(prompts) if HARMLESS in p.categories or p.label == "neutral"
    ]
    return everyday or safe_rows(prompts)


def has_twins(prompts: Sequence[Prompt], categories: Iterable[str]) -> bool:
    """Tell whether every category has safe prompts of its own."""
    return all(safe_rows(prompts, category) for category in categories)


def sides_to_fit(
    prompts: Sequence[Prompt], category: str, safe_side: SafeSide
) -> tuple[list[int], list[int]]:
    """List the unsafe and the safe rows that a category's steering vector is fitted on.

    Args:
        prompts: Prompts of the fold.
        category: Risk category.
        safe_side: "paired": pairs (``paired_rows``), in one order on both sides. "generic": all
            unsafe rows of the category, and ``generic_rows``.

    Raises:
        ValueError: If the safe side is unknown.
    """
    if safe_side == "paired":
        return paired_rows(prompts, category)
    if safe_side == "generic":
        return unsafe_rows(prompts, category), generic_rows(prompts)
    raise ValueError(f"unknown safe_side {safe_side!r}; allowed: {', '.join(get_args(SafeSide))}.")


def rows_against(prompts: Sequence[Prompt], category: str, against: Against) -> list[int]:
    """List what a category's unsafe prompts are compared with as a group, not in pairs.

    Args:
        prompts: Prompts of the fold.
        category: Risk category.
        against: "twins" (safe prompts of the category), "neutral" (everyday prompts) or "other"
            (unsafe prompts of the other categories).

    Raises:
        ValueError: If the comparison is unknown.
    """
    if against == "twins":
        return safe_rows(prompts, category)
    if against == "neutral":
        return neutral_rows(prompts)
    if against == "other":
        return other_unsafe_rows(prompts, category)
    raise ValueError(f"unknown comparison {against!r}; allowed: {', '.join(get_args(Against))}.")


def sides_of(prompts: Sequence[Prompt], category: str, against: Against) -> Sides:
    """Collect both sides of a contrast, pair by pair where it is against twins.

    Other comparisons are those of ``rows_against``. A side is empty where the fold holds none
    of its prompts.
    """
    if against == "twins":
        unsafe, reference = paired_rows(prompts, category)
    else:
        unsafe = unsafe_rows(prompts, category)
        reference = rows_against(prompts, category, against)
    return Sides(np.array(unsafe, dtype=int), np.array(reference, dtype=int), against == "twins")


def kind_of(prompt: Prompt, categories: Collection[str]) -> str:
    """Tell which of ``KINDS`` a prompt is beside a steering gate of these categories."""
    if prompt.label == "unsafe":
        return RISKY
    if prompt.label == "neutral":
        return NEUTRAL
    return TWINS if set(prompt.categories) & set(categories) else LOOK_ALIKES


def rows_that_must_not_open(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """List the rows that must leave a steering gate closed, by the name of their threshold.

    Returns:
        "neutral": everyday prompts. "hard_safe": twins of risky prompts and other look-alikes.
    """
    return {"neutral": neutral_rows(prompts), "hard_safe": safe_rows(prompts)}


def _rows(prompts: Sequence[Prompt], label: str, category: str | None) -> list[int]:
    return [
        i
        for i, p in enumerate(prompts)
        if p.label == label and (category is None or category in p.categories)
    ]
