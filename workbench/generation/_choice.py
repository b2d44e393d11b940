"""Choose the next token of each row, and say how likely tokens are, reading logits once.

A step of 96 rows has up to 15 million logits: to read them takes as long as some layers of a small
model.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.generation.decoding import Decoding


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


def random_numbers(decoding: Decoding, prompt_id: str, sample: int) -> Float[Tensor, " step"]:
    """Draw a number for each token of an answer, from seed, prompt and sample alone.

    They are the same in any batch and under every condition.
    """
    name = f"|sample {sample}" if sample else ""
    digest = hashlib.sha256(f"{decoding.seed}|{prompt_id}{name}".encode())
    generator = torch.Generator().manual_seed(int(digest.hexdigest()[:15], 16))
    return torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64)


def drawn(
    logits: Float[Tensor, "row d_vocab"], numbers: Float[Tensor, " row"], decoding: Decoding
) -> Int[Tensor, " row"]:
    """Choose the token that each row's random number falls on."""
    probabilities = torch.softmax(logits.double() / decoding.temperature, dim=-1)
    if decoding.top_k is not None:
        probabilities = _first(probabilities, decoding.top_k)
    if decoding.top_p < 1:
        probabilities = _most_likely(probabilities, decoding.top_p)
    cumulative = probabilities.cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:])[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)


def _first(
    probabilities: Float[Tensor, "batch d_vocab"], top_k: int
) -> Float[Tensor, "batch d_vocab"]:
    """Keep the probabilities of the ``top_k`` likeliest tokens, made to sum to 1; 0 elsewhere."""
    kept, places = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, places, kept / kept.sum(-1, keepdim=True))


def _most_likely(
    probabilities: Float[Tensor, "batch d_vocab"], top_p: float
) -> Float[Tensor, "batch d_vocab"]:
    """Keep the probabilities of the fewest tokens that together reach ``top_p``; 0 elsewhere."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))
