"""The one decode loop: prompt pass and token by token decoding of batches whose rows have interventions of their own."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.models.forward import (
    allows_padding_behind,
    fast,
    forward,
    has_key_value_cache,
    prefix_cache,
    rows_of_cache,
    shared_prefix_length,
)
from workbench.models.shared_layers import run_below
from workbench.models.tokens import Batch, Encoded, pad, pad_id, span_mask, stop_ids
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models.load import HookedModel
    from workbench.steering.interventions import Intervention


MEMORY = 2**30
"""Bytes of keys and values that a batch may take by default."""


MOST_ROWS = 96
"""Rows of a batch by default, at most: the processor's products are no faster with more."""


@dataclass(frozen=True, eq=False)
class Row:
    """One answer to write: its prompt, the name of what is done meanwhile, and under which key it is kept."""

    encoded: Encoded
    condition: str
    group: int  # rows of one group have the same interventions
    key: str


class DecodeLoop:
    """Prompt pass and token by token decoding of batches whose rows have interventions of their own."""

    def __init__(
        self,
        model: HookedModel,
        groups: Sequence[Sequence[Intervention]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        transfer: bool,
    ) -> None:
        self.model, self.groups = model, groups
        self.max_new_tokens, self.temperature, self.seed, self.transfer = (
            max_new_tokens,
            temperature,
            seed,
            transfer,
        )
        self.device = next(iter(model.parameters())).device
        self.stops = torch.tensor(sorted(stop_ids(model)), device=self.device)
        # On a GPU a look at which rows have ended makes the host wait; on a CPU it costs nothing.
        self.look_every = 1 if self.device.type == "cpu" else 16
        self.n_prefix = 0
        self.prefix: Any = None

    def share_prefix(self, encoded: Sequence[Encoded], batch_size: int) -> None:
        """Compute the tokens all prompts begin with once for each group of interventions."""
        if not has_key_value_cache(self.model):
            return
        # What a gate lets through acts from the user's words on, which it has to see.
        has_gate = any(one.gate is not None for group in self.groups for one in group)
        self.n_prefix = shared_prefix_length(
            encoded, keep=lambda row: row.content[0] if has_gate else len(row.ids) - 1
        )
        if not self.n_prefix:
            return
        caches = []
        for start in range(0, len(self.groups), batch_size):
            own = range(start, min(start + batch_size, len(self.groups)))
            with self._steered([(i,) for i in own], prompt_length=self.n_prefix, gates=None):
                caches.append(
                    prefix_cache(self.model, encoded[0].ids[: self.n_prefix], rows=len(own))
                )
        if not allows_padding_behind(
            caches[0], max(len(row.ids) for row in encoded) + self.max_new_tokens
        ):
            return
        self.prefix = caches[0]
        for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
            layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
            layer.values = torch.cat([layer.values, *(other.values for other in others)])

    def run(self, rows: Sequence[Row]) -> list[tuple[list[int], Literal["eos", "length"]]]:
        """Token ids and the way it ended, for each row."""
        batch = pad(
            [row.encoded for row in rows],
            pad_id=pad_id(self.model),
            side="left",
            device=self.device,
        )
        suffix, mask, cache = self._behind_prefix(rows, batch)
        n_rows, width = len(rows), mask.shape[1]
        chosen = torch.zeros((n_rows, self.max_new_tokens), dtype=torch.long, device=self.device)
        draws = self._draws(rows)
        alive = torch.arange(
            n_rows, device=self.device
        )  # which row of the results each row of the batch is
        ended = torch.zeros(n_rows, dtype=torch.bool, device=self.device)
        tokens, step = suffix, 0
        content = span_mask([row.encoded for row in rows], batch, "content")
        gates: Any = {}
        steered = [one for row in rows for one in self.groups[row.group]]
        lowest = min(
            (s.layer for one in steered for s in (one.site, one.gate and one.gate.site) if s),
            default=0,
        )
        below = run_below(
            self.model, lowest, suffix, mask, cache, [row.encoded.ids for row in rows]
        )
        while step < self.max_new_tokens:  # one turn for each set of rows alive
            groups = [(rows[i].group,) for i in alive.tolist()]
            with (
                self._steered(
                    groups, prompt_length=width, content=content, gates=gates
                ) as steering,
                fast(self.model),
            ):
                while step < self.max_new_tokens:
                    with below.known(self.model, cache) if below and step == 0 else nullcontext():
                        logits, cache = forward(
                            self.model, tokens, mask, cache=cache, use_cache=True
                        )
                    next_tokens = self._choose(
                        logits, draws[alive, step] if draws is not None else None
                    )
                    chosen[alive, step] = next_tokens
                    ended = ended | torch.isin(next_tokens, self.stops)
                    step += 1
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                    new = next_tokens[:, None]
                    tokens = (
                        torch.cat([tokens, new], dim=1) if cache is None else new
                    )  # no cache: all is run again
                    if step % self.look_every == 0 and self._worth_dropping(ended):
                        break
            if step == self.max_new_tokens or bool(ended.all()):
                break
            keep = (~ended).nonzero()[:, 0]
            alive, ended, mask, tokens, content = (
                x[keep] for x in (alive, ended, mask, tokens, content)
            )
            gates = {gate: state.rows(keep) for gate, state in steering.gates.items()}
            if cache is not None:
                cache.batch_select_indices(keep)
        return [self._cut(ids) for ids in chosen.tolist()]

    def _behind_prefix(self, rows: Sequence[Row], batch: Batch) -> tuple[Tensor, Tensor, Any]:
        """The batch without its shared prefix, the mask of prefix and rest, and the cache that holds the prefix."""
        if self.prefix is None:
            return batch.tokens, batch.mask, None
        n = self.n_prefix
        shorter = [dataclasses.replace(row.encoded, ids=row.encoded.ids[n:]) for row in rows]
        rest = pad(shorter, pad_id=pad_id(self.model), side="left", device=self.device)
        cache = rows_of_cache(
            self.prefix, torch.tensor([row.group for row in rows], device=self.device)
        )
        return rest.tokens, torch.cat([rest.mask.new_ones(len(rows), n), rest.mask], dim=1), cache

    def _steered(self, groups_of_rows: Sequence[tuple[int]], *, gates: Any, **keywords: Any) -> Any:
        """Context in which each row of the batch has its group's interventions; without gated ones where ``gates`` is None."""
        rows_of: dict[int, list[int]] = {}
        for row, (group,) in enumerate(groups_of_rows):
            rows_of.setdefault(group, []).append(row)
        everyone = len(rows_of) == 1
        interventions = [
            intervention if everyone else intervention.for_rows(own)
            for group, own in rows_of.items()
            for intervention in self.groups[group]
            if gates is not None or intervention.gate is None
        ]
        return intervene(self.model, interventions, gates=gates, transfer=self.transfer, **keywords)

    def _choose(
        self, logits: Float[Tensor, "batch d_vocab"], draws: Float[Tensor, " batch"] | None
    ) -> Int[Tensor, " batch"]:
        if draws is None:
            return logits.argmax(dim=-1)
        cumulative = torch.softmax(logits.double() / self.temperature, dim=-1).cumsum(dim=-1)
        return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:])[:, 0].clamp(
            max=logits.shape[-1] - 1
        )

    def _draws(self, rows: Sequence[Row]) -> Float[Tensor, "batch step"] | None:
        """Uniform random numbers from seed and prompt alone: the same in any batch and under every condition."""
        if self.temperature == 0:
            return None
        draws = []
        for row in rows:
            own = int(
                hashlib.sha256(f"{self.seed}|{row.encoded.prompt.id}".encode()).hexdigest()[:15], 16
            )
            draws.append(
                torch.rand(
                    self.max_new_tokens,
                    generator=torch.Generator().manual_seed(own),
                    dtype=torch.float64,
                )
            )
        return torch.stack(draws).to(self.device)

    def _worth_dropping(self, ended: Tensor) -> bool:
        """Whether so many rows have ended that a smaller batch pays for copying the cache."""
        n_ended = int(ended.sum())
        return n_ended == len(ended) or n_ended >= max(1, len(ended) // 8)

    def _cut(self, ids: list[int]) -> tuple[list[int], Literal["eos", "length"]]:
        stops = set(self.stops.tolist())
        for place, token in enumerate(ids):
            if token in stops:
                return ids[:place], "eos"
        return ids, "length"


def rows_that_fit(model: HookedModel, n_tokens: int) -> tuple[int, int]:
    """Rows of a batch by default, and the bytes of keys and values that one takes.

    Args:
        model: A hooked model.
        n_tokens: Length of the longest row, its answer included.
    """
    from workbench.models._growing_cache import ROOM

    cfg = model.cfg
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    size = next(iter(model.parameters())).element_size()
    each = 2 * cfg.n_layers * heads * cfg.d_head * size * (n_tokens + ROOM)
    return max(1, min(MOST_ROWS, MEMORY // each)), each
