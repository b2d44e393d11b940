"""Say how likely a few tokens are to come next, for many prompts, without writing any."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from workbench.models.batches import batches_by_length, pad_ids, share_prefix, widths_to_keep_apart
from workbench.models.finite import check_finite
from workbench.models.forward import last_logits
from workbench.models.hooked_model import input_device
from workbench.models.tokens import pad_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.models.tokens import Encoded


def next_token_logits(
    model: HookedModel,
    encoded: Sequence[Encoded],
    ids: Sequence[int],
    *,
    batch_size: int = 16,
) -> Float[Tensor, "row id"]:
    """Compute the logits of a few tokens behind each prompt.

    What all prompts begin with is run once. Logits are kept for the last token of a row and the
    tokens that are asked for, so that a large vocabulary costs no memory.

    Args:
        model: A hooked model.
        encoded: Prompts as token ids.
        ids: Tokens whose logits are wanted.
        batch_size: Rows per batch.

    Returns:
        One float32 row per prompt, on the CPU.

    Raises:
        ValueError: If the model's numbers are infinite or undefined.
    """
    lengths = [len(row.ids) for row in encoded]
    values = torch.zeros(len(encoded), len(ids))
    if not encoded:
        return values
    device = input_device(model)
    with torch.no_grad():
        prefix = share_prefix(
            model, encoded, keep=lambda row: len(row.ids) - 1, padded_columns=max(lengths)
        )
        alike = widths_to_keep_apart(model, lengths)
        for rows in batches_by_length(lengths, batch_size, alike=alike):
            ends = [encoded[i].ids[prefix.length :] for i in rows]
            tokens, real = pad_ids(ends, pad_id=pad_id(model), side="left")
            tokens, real = tokens.to(device), real.to(device)
            mask = torch.cat([real.new_ones(len(rows), prefix.length), real], dim=1)
            begin = partial(prefix.for_rows, len(rows))
            logits, _ = last_logits(model, tokens, mask, 1, cache=begin())
            wanted = logits[:, -1, list(ids)].float()
            names = [encoded[i].prompt.id for i in rows]
            check_finite(model, wanted, names, tokens, mask, cache=begin)
            values[rows] = wanted.cpu()
    return values
