"""Choose the likeliest token of each row, and say how likely tokens are, reading logits once.

A step of 96 rows has up to 15 million logits: to read them takes as long as some layers of a small
model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


WIDTH = 64
"""Logits in a piece whose largest one is found first."""


ROWS = 8
"""Rows whose log-probabilities are computed at a time, so that they stay in the processor's cache.
"""


def likeliest(
    logits: Float[Tensor, "row d_vocab"],
) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"]]:
    """Find the largest logit of each row, undefined where one is, and the first token that has it.

    On a processor torch finds a value several times faster than its place, so places are only
    looked for among the largest values of pieces, and then within one piece.
    """
    n_rows, n_words = logits.shape
    if logits.device.type != "cpu" or n_words % WIDTH:
        return logits.max(dim=-1)
    pieces = logits.unflatten(-1, (-1, WIDTH))
    largest, piece = pieces.amax(dim=-1).max(dim=-1)
    place = pieces[torch.arange(n_rows), piece].argmax(dim=-1)
    return largest, piece * WIDTH + place


def log_probs_of(
    logits: Float[Tensor, "row d_vocab"],
    largest: Float[Tensor, " row"],
    tokens: Int[Tensor, " row"],
    rows: Int[Tensor, " some"],
) -> Float[Tensor, " some"]:
    """Give the log-probability of the token of some rows.

    Args:
        logits: Those of all rows.
        largest: The largest logit of each row.
        tokens: One token of each row.
        rows: Which rows.
    """
    parts = []
    for some in rows.split(ROWS):
        above = logits[some].float() - largest[some, None].float()
        chosen = above.gather(1, tokens[some, None])[:, 0]
        parts.append(chosen - above.exp_().sum(dim=-1).log())
    return torch.cat(parts)
