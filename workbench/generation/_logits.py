"""Compute the logits of many columns a few at a time, so that memory is bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.models.forward import KeyValueCache, last_logits, late_logits
from workbench.models.hooked_model import vocabulary_width

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel


MEMORY = 2**30
"""Bytes of logits and what is made of them that are held at a time, for a vocabulary of any size.

What fits into it is computed at once."""


_COPIES = 3
"""Of the logits, in float32: two distributions and their product."""


def columns_at_a_time(model: HookedModel, n_rows: int, n_columns: int) -> Iterator[slice]:
    """Cut columns into pieces whose logits, for all rows, stay within the memory."""
    per_column = n_rows * vocabulary_width(model) * 4 * _COPIES
    step = max(1, min(n_columns, MEMORY // per_column))
    for start in range(0, n_columns, step):
        yield slice(start, min(start + step, n_columns))


def some_or_all_logits(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row past_and_pos"],
    n: int,
    *,
    cache: KeyValueCache | None = None,
    use_cache: bool = False,
) -> tuple[Callable[[slice], Float[Tensor, "row some d_vocab"]], KeyValueCache | None]:
    """Run a pass; return a function that gives logits of its last ``n`` columns, and the cache.

    They are computed at once where they fit into the memory, else when they are asked for.
    Arguments are those of ``last_logits``.
    """
    if len(list(columns_at_a_time(model, len(tokens), n))) == 1:
        logits, cache = last_logits(model, tokens, mask, n, cache=cache, use_cache=use_cache)
        return lambda columns: logits[:, columns], cache
    return late_logits(model, tokens, mask, n, cache=cache, use_cache=use_cache)
