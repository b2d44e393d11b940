"""Hold a judge in memory only while it judges, so that two models need not fit at once."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from workbench.judges.base import check_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from workbench.judges.base import Judge, Verdict


PART = 64
"""Answers that are judged at a time: what a kill may lose."""


@dataclass(eq=False)
class OnDemand:
    """Load a judge when it is asked and let it go afterwards; made by ``on_demand``.

    Attributes:
        load: Makes the judge.
        name: Its name, known from the first time it was loaded.
        agreement: What it says of its agreement with labels, or None.
        fitted_on: Keys of the questions whose answers it was fitted on.
    """

    load: Callable[[], Judge] = field(repr=False)
    name: str
    agreement: str | None = None
    fitted_on: frozenset[str] = frozenset()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Judge each answer, and free the judge's memory."""
        return [verdict for _, verdict in self.stream(prompts, responses)]

    def stream(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge answers part by part and give each verdict with its row, in order.

        Raises:
            RuntimeError: If what is loaded is another judge than the first time.
        """
        check_pairs(prompts, responses)
        if not prompts:
            return
        judge = self.load()
        try:
            if judge.name != self.name:
                raise RuntimeError(
                    f"the judge was {self.name!r} when the run began and is {judge.name!r} now; "
                    "leave its files alone while a run goes on."
                )
            for start in range(0, len(prompts), PART):
                part = slice(start, start + PART)
                yield from enumerate(judge(prompts[part], responses[part]), start)
        finally:
            del judge
            free_memory()


def on_demand(load: Callable[[], Judge]) -> OnDemand:
    """Load a judge once, so that what is wrong with it is said at once, and let it go.

    Args:
        load: Makes the judge; the same one each time.
    """
    judge = load()
    facts = getattr(judge, "agreement", None), frozenset(getattr(judge, "fitted_on", ()))
    known = OnDemand(load, judge.name, *facts)
    del judge
    free_memory()
    return known


def free_memory() -> None:
    """Give memory that nothing refers to back, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
