"""What tests of statistics share: random cases, and how often chance alone makes a claim."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

quick = settings(max_examples=60, deadline=None, derandomize=True)
two_ratings = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
seeds = st.integers(0, 10_000)


def false_positives(experiment: Callable[[np.random.Generator], bool], n: int = 4000) -> float:
    """Share of null experiments that claim an effect at 5 %; its standard error is .35 points."""
    rng = np.random.default_rng(2024)
    return float(np.mean([experiment(rng) for _ in range(n)]))
