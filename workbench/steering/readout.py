"""Read a steering vector as words: the tokens that it promotes and suppresses directly."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from workbench.models.load import model_info
from workbench.models.tokens import token_strings, vocabulary_size
from workbench.stats.selectivity import permutation_p
from workbench.steering.vectors import random_vector

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.steering.vectors import SteeringVector


N_RANDOM = 100
"""Random directions that a vector's largest and smallest logits are compared with."""

_ROWS = 16  # directions whose logits are held at a time

TokenLogits = tuple[tuple[str, float], ...]
"""Tokens and logits, the furthest from the mean first."""


@dataclass(frozen=True)
class LogitReadout:
    """Hold the tokens at both ends of a vector's logits, beside those of a random direction.

    Ten words easily look as if they meant something: the p values say how many random directions of
    the same norm have a logit as far out, (1 + those) / (1 + all).

    Attributes:
        promoted: Tokens with the largest logits.
        suppressed: Tokens with the smallest logits.
        random_promoted: Tokens with the largest logits of one random direction.
        random_suppressed: Tokens with its smallest logits.
        p_promoted: Share of random directions whose largest logit is at least as large.
        p_suppressed: Share of them whose smallest logit is at least as small.
    """

    promoted: TokenLogits
    suppressed: TokenLogits
    random_promoted: TokenLogits
    random_suppressed: TokenLogits
    p_promoted: float
    p_suppressed: float

    def to_frame(self) -> pd.DataFrame:
        """Tabulate them, one rank per row: each kind of token, and its logits."""
        import pandas as pd

        columns: dict[str, list[str] | list[float]] = {}
        for name in [field.name for field in fields(self) if not field.name.startswith("p_")]:
            columns[name] = [token for token, _ in getattr(self, name)]
            columns[f"{name}_logit"] = [logit for _, logit in getattr(self, name)]
        return pd.DataFrame(columns, index=pd.RangeIndex(1, len(self.promoted) + 1, name="rank"))


@torch.no_grad()
def logit_readout(
    vector: SteeringVector, model: HookedModel, k: int = 10, *, seed: int = 0
) -> LogitReadout:
    """Read a steering vector through the final norm and the unembedding.

    The norm's weight counts and its bias does not, every direction is brought to the same length by
    the norm, and the mean over the vocabulary is taken away, since a shift of all logits changes no
    probability. Only the direct path is seen: what later layers make of the vector is not in it, so
    a vector of an early layer says little. It is what ``logit_readout`` of TransformerLens 4
    computes, up to those shifts and to a cap on logits where the model has one.

    Args:
        vector: A steering vector; it points from unsafe to safe.
        model: What it was measured on.
        k: Tokens at either end.
        seed: Seed of the random directions; the first one is shown.

    Raises:
        ValueError: If the vector is zero or of another model, or k is out of range.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens; Geva et al. 2022
    (arXiv:2203.14680) for promoted and suppressed tokens of a direction.
    """
    n_words = min(model.unembed.W_U.shape[1], vocabulary_size(model))
    if not 1 <= k <= n_words:
        raise ValueError(f"k must be from 1 to the {n_words} tokens of the vocabulary, got {k!r}.")
    if vector.model.fingerprint != model_info(model).fingerprint:
        raise ValueError(f"{vector!r} is not of this model; give the one it was measured on.")
    randoms = [random_vector(vector, seed=seed + i) for i in range(N_RANDOM)]
    directions = torch.stack([vector.direction, *(one.direction for one in randoms)])
    highest, lowest = [], []
    ends: dict[str, TokenLogits] = {}
    for start in range(0, len(directions), _ROWS):
        logits = _logits(model, directions[start : start + _ROWS], n_words)
        highest.append(logits.amax(dim=1))
        lowest.append(logits.amin(dim=1))
        if start == 0:
            ends = {
                f"{prefix}{name}": _end(model, logits[row], k, largest=name == "promoted")
                for row, prefix in enumerate(("", "random_"))
                for name in ("promoted", "suppressed")
            }
    top, bottom = torch.cat(highest).cpu().numpy(), -torch.cat(lowest).cpu().numpy()
    return LogitReadout(
        **ends,
        p_promoted=permutation_p(top[0], top[1:]),
        p_suppressed=permutation_p(bottom[0], bottom[1:]),
    )


def _logits(
    model: HookedModel, directions: Float[Tensor, "row d_model"], n_words: int
) -> Float[Tensor, "row token"]:
    """Compute the logits of unit directions, without biases, centred."""
    # A direction as long as a usual activation, next to which the norm's epsilon is nothing.
    rows = directions * model.cfg.d_model**0.5
    norm = getattr(model, "ln_final", None)
    if norm is not None:
        like = next(iter(norm.parameters()), model.unembed.W_U)
        rows = torch.cat([rows, torch.zeros_like(rows[:1])]).to(like)
        normed = norm(rows[None])[0].float()
        rows = normed[:-1] - normed[-1:]  # what becomes of nothing is the bias
    unembedding = model.unembed.W_U.detach()[:, :n_words]
    logits = (rows.to(unembedding) @ unembedding).float()
    return logits - logits.mean(dim=1, keepdim=True)


def _end(
    model: HookedModel, logits: Float[Tensor, " token"], k: int, *, largest: bool
) -> TokenLogits:
    """Pair the tokens at one end with their logits."""
    values, ids = logits.topk(k, largest=largest)
    return tuple(zip(token_strings(model, ids.tolist()), values.tolist(), strict=True))
