"""Turn rows of unlike length into batches and their results back into the given order.

The one place that sorts rows by length, cuts them into batches, pads them and computes the prefix
that they share once. (Decoding computes such a prefix per condition, for each has its own hooks.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from workbench.models.forward import (
    KeyValueCache,
    allows_padding_behind,
    has_key_value_cache,
    prefix_cache,
    rows_of_cache,
    shared_prefix_length,
)
from workbench.models.hooked_model import input_device
from workbench.models.trusted_paths import trusts

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from jaxtyping import Bool, Int, Shaped
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.models.tokens import Encoded


PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Encoded prompts padded to one length.

    Attributes:
        tokens: Token ids.
        mask: True where there is a token, False where there is padding.
        starts: Column of each row's first real token.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    starts: Int[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The leading tokens that all rows share, computed once.

    Attributes:
        length: Number of tokens; 0 where nothing is shared.
        cache: Their keys and values, one row; None where nothing is shared.
        device: Where the model is.
    """

    length: int
    cache: KeyValueCache | None
    device: torch.device

    def for_rows(self, n: int) -> KeyValueCache | None:
        """Copy the cache for a batch of n rows; None where nothing is shared."""
        if self.cache is None:
            return None
        return rows_of_cache(self.cache, torch.zeros(n, dtype=torch.long, device=self.device))


def order_by_length(
    lengths: Sequence[int], *, longest_first: bool = True, ties: Sequence[str] | None = None
) -> list[int]:
    """Sort rows by length, so that batches of neighbours hold little padding.

    Args:
        lengths: Tokens per row.
        longest_first: Begin with the longest row, so that trouble with memory shows at once.
        ties: What orders rows of one length; without it they stay in the given order.

    Returns:
        Indices of the rows.
    """
    sign = -1 if longest_first else 1
    return sorted(
        range(len(lengths)), key=lambda row: (sign * lengths[row], ties[row] if ties else "")
    )


def batches_by_length(
    lengths: Sequence[int],
    size: int,
    *,
    longest_first: bool = True,
    ties: Sequence[str] | None = None,
    alike: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Cut rows sorted by length (see ``order_by_length``) into batches of their indices.

    Args:
        lengths: Tokens per row.
        size: Largest number of rows per batch.
        longest_first: See ``order_by_length``.
        ties: See ``order_by_length``.
        alike: What the rows of a batch must have in common (see ``widths_to_keep_apart``).
    """
    order = order_by_length(lengths, longest_first=longest_first, ties=ties)
    if alike is None:
        return [order[start : start + size] for start in range(0, len(order), size)]
    groups: dict[Hashable, list[int]] = {}
    for row in order:
        groups.setdefault(alike[row], []).append(row)
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def widths_to_keep_apart(
    model: HookedModel, widths: Sequence[Hashable], side: PaddingSide = "left"
) -> Sequence[Hashable] | None:
    """Return widths of which no two may share a batch; None where padding changes nothing.

    Models that read token by token (RWKV) take padding for words.

    Args:
        model: A hooked model.
        widths: Tokens of each row; several numbers where a row has several parts.
        side: Where the padding would stand.
    """
    changes_nothing = trusts(model, "padding" if side == "left" else "right_padding")
    return None if changes_nothing else widths


def batches_under_budget(
    encoded: Sequence[Encoded], size: int, max_tokens: int, *, mixed: bool = True
) -> Iterator[list[Encoded]]:
    """Cut consecutive rows into batches of at most ``size`` rows and ``max_tokens`` tokens.

    Padding counts as tokens; a single row that is longer than the budget goes alone.

    Args:
        encoded: The rows.
        size: Largest number of rows per batch.
        max_tokens: Largest number of tokens per batch.
        mixed: Whether rows of different lengths may share a batch.
    """
    batch: list[Encoded] = []
    width = 0
    for row in encoded:
        wider = max(width, len(row.ids))
        is_full = len(batch) == size or wider * (len(batch) + 1) > max_tokens
        if batch and (is_full or (not mixed and len(row.ids) != width)):
            yield batch
            batch, wider = [], len(row.ids)
        batch.append(row)
        width = wider
    yield batch


def in_given_order(
    values: Shaped[Tensor, "row ..."], order: Sequence[int]
) -> Shaped[Tensor, "row ..."]:
    """Put values of rows that ran in some order back into the order before the sort."""
    return values[torch.tensor(order).argsort()]


def pad(
    encoded: Sequence[Encoded],
    *,
    pad_id: int,
    side: PaddingSide,
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad encoded prompts to one length.

    Args:
        encoded: The rows.
        pad_id: Any token id: padding is told by the mask, never by its id.
        side: "left" for generation, "right" or "left" for reading activations.
        device: Where the tensors go.
    """
    tokens, mask = pad_ids([row.ids for row in encoded], pad_id=pad_id, side=side)
    padding = tokens.shape[1] - mask.sum(dim=1)
    starts = padding if side == "left" else torch.zeros_like(padding)
    return Batch(tokens.to(device), mask.to(device), starts.to(device))


def pad_ids(
    rows: Sequence[Sequence[int]], *, pad_id: int, side: PaddingSide
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Pad rows of token ids to one length, on the CPU; the mask is True at real tokens."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    tokens = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
    return tokens, pad_sequence(real, batch_first=True, padding_side=side)


def span_mask(encoded: Sequence[Encoded], batch: Batch, span: str) -> Bool[Tensor, "batch pos"]:
    """Mark the tokens of a span in the columns of a padded batch."""
    device = batch.tokens.device
    in_row = torch.tensor([row.span(span) for row in encoded], device=device)
    in_batch = in_row + batch.starts[:, None]
    columns = torch.arange(batch.tokens.shape[1], device=device)
    return (columns >= in_batch[:, :1]) & (columns < in_batch[:, 1:])


def share_prefix(
    model: HookedModel,
    encoded: Sequence[Encoded],
    keep: Callable[[Encoded], int],
    *,
    padded_columns: int | None = None,
) -> SharedPrefix:
    """Run the tokens that all rows begin with once, with the hooks that are set.

    Args:
        model: A hooked model. One without a cache to go on from shares nothing.
        encoded: The rows.
        keep: First position of a row whose activations or logits are needed.
        padded_columns: Width of the widest batch, where padding will stand between the prefix and
            what follows it: nothing is shared if the model does not allow that.
    """
    device = input_device(model)
    if not may_share_prefix(model, padded_columns):
        return SharedPrefix(0, None, device)
    length = shared_prefix_length(encoded, keep)
    cache = prefix_cache(model, encoded[0].ids[:length]) if length else None
    return SharedPrefix(length, cache, device)


def may_share_prefix(model: HookedModel, padded_columns: int | None = None) -> bool:
    """Tell whether rows may go on from a prefix that was run once; see ``share_prefix``."""
    return (
        has_key_value_cache(model)
        and trusts(model, "prefix")
        and (
            padded_columns is None
            or not trusts(model, "padding")  # then no row of a batch is padded
            or allows_padding_behind(model, padded_columns)
        )
    )
