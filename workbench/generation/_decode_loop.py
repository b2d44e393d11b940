"""Decode batches token by token; each row of a batch has interventions of its own.

Every answer of the package is written here, but for those of dynamic activation patching, which
decodes two runs on one text side by side (``neurons.patching``).
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from workbench.generation._beginnings import parts_by_beginning
from workbench.generation._choice import drawn, likeliest, log_probs_of, random_numbers
from workbench.generation._memory import (
    RowBytes,
    bytes_per_row,
    bytes_per_token,
    memory_budget,
    rows_that_fit,
)
from workbench.models.batches import Batch, may_share_prefix, pad, span_mask
from workbench.models.finite import not_finite
from workbench.models.forward import (
    fast,
    forward,
    has_key_value_cache,
    joined_caches,
    keep_rows,
    prefix_cache,
    rows_of_cache,
    shared_prefix_length,
)
from workbench.models.hooked_model import input_device
from workbench.models.shared_layers import Below, run_below
from workbench.models.tokens import Encoded, pad_id, stop_ids
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.generation._endings import Endings
    from workbench.generation.decoding import Decoding
    from workbench.models.hooked_model import HookedModel
    from workbench.steering.interventions import Intervention


@dataclass(frozen=True, eq=False)
class Row:
    """Name one answer to write: prompt, condition, sample, and the key under which it is kept."""

    encoded: Encoded
    condition: str
    group: int  # rows of one group have the same interventions
    key: str
    sample: int = 0


@dataclass(eq=False)
class _State:
    """Hold where a batch is: what the next pass reads, and which rows are still written."""

    tokens: Int[Tensor, "row position"]
    mask: Tensor
    cache: Any
    content: Tensor
    alive: Int[Tensor, " row"]
    """Row of the results that each row of the batch writes."""
    ended: Tensor
    finite: Tensor
    """Whether each row's logits were finite so far."""
    gates: Any = field(default_factory=dict)
    step: int = 0

    def append(self, next_tokens: Int[Tensor, " row"], stops: Int[Tensor, " stop"]) -> None:
        """Take the tokens just chosen into the state."""
        self.ended = self.ended | torch.isin(next_tokens, stops)
        self.step += 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        new = next_tokens[:, None]
        # Without a cache the whole text is run again.
        self.tokens = torch.cat([self.tokens, new], dim=1) if self.cache is None else new

    def keep(self, rows: Int[Tensor, " kept"], steering: Any) -> None:
        """Go on with some of the rows."""
        self.alive, self.ended, self.mask = self.alive[rows], self.ended[rows], self.mask[rows]
        self.tokens, self.content = self.tokens[rows], self.content[rows]
        self.finite = self.finite[rows]
        self.gates = {gate: state.rows(rows) for gate, state in steering.gates.items()}
        if self.cache is not None:
            keep_rows(self.cache, rows)


class Decoded(NamedTuple):
    """Hold what was decoded of one row.

    Attributes:
        tokens: Token ids, without the one that ended the answer.
        finish: How it ended.
        log_probs: Log-probability of each token under the unsteered model, at temperature 1 and
            among all tokens; None for a row that is steered or goes on from a begun answer.
    """

    tokens: list[int]
    finish: Literal["eos", "length"]
    log_probs: list[float] | None


class DecodeLoop:
    """Run the prompt pass and the decoding of batches whose rows have their own interventions."""

    def __init__(
        self,
        model: HookedModel,
        groups: Sequence[Sequence[Intervention]],
        decoding: Decoding,
        transfer: bool,
        endings: Endings,
    ) -> None:
        self.model, self.groups, self.decoding, self.transfer = model, groups, decoding, transfer
        self.endings = endings
        self.max_new_tokens = decoding.max_new_tokens
        self.device = input_device(model)
        check_gates(model, [one for group in groups for one in group])
        self.stops = torch.tensor(sorted(stop_ids(model)), device=self.device)
        # On a GPU a look at which rows have ended makes the host wait; on a CPU it costs nothing.
        self.look_every = 1 if self.device.type == "cpu" else 16
        self.memory = memory_budget(model)
        self.n_prefix = 0
        self.prefix: Any = None

    def parts(self, encoded: Sequence[Encoded]) -> list[list[int]]:
        """Part rows that begin in different ways, as long as that saves more than it costs."""
        if not self._may_share(encoded):
            return [list(range(len(encoded)))]
        return parts_by_beginning(
            encoded, self._first_needed, len(self.groups), self.max_new_tokens
        )

    def _may_share(self, encoded: Sequence[Encoded]) -> bool:
        longest = max(len(row.ids) for row in encoded) + self.max_new_tokens
        return may_share_prefix(self.model, longest)

    def _first_needed(self, encoded: Encoded) -> int:
        """Find a prompt's first token that no prefix may hold."""
        # What a gate lets through acts from the user's words on, which it has to see.
        has_gate = any(one.gate is not None for group in self.groups for one in group)
        return encoded.content[0] if has_gate else len(encoded.ids) - 1

    def row_bytes(self, encoded: Encoded) -> RowBytes:
        """Count the bytes that a row takes behind the prefix that was planned."""
        return bytes_per_row(
            self.model,
            len(encoded.ids),
            self.max_new_tokens,
            n_prefix=self.n_prefix,
            is_sampled=self.decoding.temperature > 0,
        )

    def plan_prefix(self, encoded: Sequence[Encoded]) -> int:
        """Find how many tokens all prompts share; return the tokens of all groups' prefixes.

        A prefix is kept for each group of interventions. Where all of them would take more than
        half of the memory, none is.
        """
        self.n_prefix = 0
        if self._may_share(encoded):
            self.n_prefix = shared_prefix_length(encoded, self._first_needed)
        if self.n_prefix * len(self.groups) * bytes_per_token(self.model) > self.memory // 2:
            self.n_prefix = 0
        return self.n_prefix * len(self.groups)

    def share_prefix(self, encoded: Sequence[Encoded], batch_size: int) -> None:
        """Compute the tokens all prompts begin with once for each group of interventions."""
        self.prefix = None
        if not self.plan_prefix(encoded):
            return
        prefix, caches = encoded[0].ids[: self.n_prefix], []
        row = bytes_per_row(self.model, self.n_prefix, 0)
        size = min(batch_size, rows_that_fit(self.model, self.memory, row))
        for start in range(0, len(self.groups), size):
            groups = range(start, min(start + size, len(self.groups)))
            with self._steered(groups, prompt_length=self.n_prefix, gates=None):
                caches.append(prefix_cache(self.model, prefix, rows=len(groups)))
        self.prefix = joined_caches(caches)

    def run(self, rows: Sequence[Row]) -> list[Decoded]:
        """Write the answers of a batch."""
        batch = pad(
            [row.encoded for row in rows],
            pad_id=pad_id(self.model),
            side="left",
            device=self.device,
        )
        state = self._before_the_first_token(rows, batch)
        written = torch.zeros(
            (len(rows), self.max_new_tokens), dtype=torch.long, device=self.device
        )
        log_probs = torch.zeros(written.shape, device=self.device)
        draws, width = self._draws(rows), state.mask.shape[1]
        below = self._layers_below(rows, state)
        while state.step < self.max_new_tokens:  # one turn for each set of rows alive
            alive = state.alive.tolist()
            groups = [rows[i].group for i in alive]
            plain = [place for place, i in enumerate(alive) if self._is_plain(rows[i])]
            with (
                self._steered(
                    groups, prompt_length=width, content=state.content, gates=state.gates
                ) as steering,
                fast(self.model),
            ):
                self._decode_until_rows_drop(
                    state, written, draws, below, log_probs, torch.tensor(plain, device=self.device)
                )
            if not bool(state.finite.all()):
                raise self._not_finite(rows, batch, state, written)
            if state.step == self.max_new_tokens or bool(state.ended.all()):
                break
            state.keep((~state.ended).nonzero()[:, 0], steering)
        decoded = []
        for row, ids, values in zip(rows, written.tolist(), log_probs.tolist(), strict=True):
            tokens, finish = self._cut(ids)
            known = values[: len(tokens)] if self._is_plain(row) else None
            decoded.append(Decoded(tokens, finish, known))
        return decoded

    def _is_plain(self, row: Row) -> bool:
        """Tell whether nothing is done to the model in a row, which begins with a whole prompt."""
        start, end = row.encoded.response
        return not self.groups[row.group] and start == end

    def _before_the_first_token(self, rows: Sequence[Row], batch: Batch) -> _State:
        """Set up the state whose next pass reads the prompts."""
        tokens, mask, cache = self._behind_prefix(rows, batch)
        return _State(
            tokens=tokens,
            mask=mask,
            cache=cache,
            content=span_mask([row.encoded for row in rows], batch, "content"),
            alive=torch.arange(len(rows), device=self.device),
            ended=torch.zeros(len(rows), dtype=torch.bool, device=self.device),
            finite=torch.ones(len(rows), dtype=torch.bool, device=self.device),
        )

    def _layers_below(self, rows: Sequence[Row], state: _State) -> Below | None:
        """Compute, once per prompt, the layers below the lowest one that is steered or read."""
        steered = [one for row in rows for one in self.groups[row.group]]
        sites = (site for one in steered for site in (one.site, one.gate and one.gate.site) if site)
        lowest = min((site.layer for site in sites), default=0)
        ids = [row.encoded.ids for row in rows]
        return run_below(self.model, lowest, state.tokens, state.mask, state.cache, ids)

    def _decode_until_rows_drop(
        self,
        state: _State,
        written: Int[Tensor, "row step"],
        draws: Float[Tensor, "row step"] | None,
        below: Below | None,
        log_probs: Float[Tensor, "row step"],
        plain: Int[Tensor, " plain"],
    ) -> None:
        """Decode token by token until so many rows have ended that a smaller batch pays.

        The log-probabilities of the tokens of the rows in ``plain`` are written, too.
        """
        while state.step < self.max_new_tokens:
            known = below.known(self.model, state.cache) if below and state.step == 0 else None
            with known or nullcontext():
                logits, state.cache = forward(
                    self.model, state.tokens, state.mask, cache=state.cache, use_cache=True
                )
            random = draws[state.alive, state.step] if draws is not None else None
            # The largest logit of a row that holds an undefined one is undefined.
            largest, first = likeliest(logits)
            state.finite = state.finite & largest.isfinite()
            next_tokens = self._choose(logits, random, first)
            written[state.alive, state.step] = next_tokens
            if len(plain):
                chosen = log_probs_of(logits, largest, next_tokens, plain)
                log_probs[state.alive[plain], state.step] = chosen
            state.append(next_tokens, self.stops)
            is_look = state.step % self.look_every == 0
            if self.decoding.stop and is_look:
                self._end_at_stop_texts(state, written)
            if is_look and (not bool(state.finite.all()) or self._worth_dropping(state.ended)):
                return

    def _not_finite(
        self, rows: Sequence[Row], batch: Batch, state: _State, written: Int[Tensor, "row step"]
    ) -> ValueError:
        """Say where the numbers of the first row that left what can be held did so."""
        row = int(state.alive[int((~state.finite).nonzero()[0])])
        new = written[row : row + 1, : state.step]
        tokens = torch.cat([batch.tokens[row : row + 1], new], dim=1)
        mask = torch.cat([batch.mask[row : row + 1], torch.ones_like(new, dtype=torch.bool)], dim=1)
        content = span_mask([one.encoded for one in rows], batch, "content")[row : row + 1]
        group = rows[row].group
        prompt_length, prompt_id = batch.tokens.shape[1], rows[row].encoded.prompt.id
        with self._steered([group], prompt_length=prompt_length, content=content, gates={}):
            is_steered = bool(self.groups[group])
            return not_finite(self.model, prompt_id, tokens, mask, 0, is_steered=is_steered)

    def _end_at_stop_texts(self, state: _State, written: Int[Tensor, "row step"]) -> None:
        """Mark the rows whose answers have come to a stop text."""
        for row, ids in enumerate(written[state.alive, : state.step].tolist()):
            if not state.ended[row] and self.endings.has_stopped(ids):
                state.ended[row] = True

    def _behind_prefix(self, rows: Sequence[Row], batch: Batch) -> tuple[Tensor, Tensor, Any]:
        """Return the tokens behind the shared prefix, the mask of both, and the prefix's cache."""
        if self.prefix is None:
            return batch.tokens, batch.mask, None
        n = self.n_prefix
        shorter = [dataclasses.replace(row.encoded, ids=row.encoded.ids[n:]) for row in rows]
        rest = pad(shorter, pad_id=pad_id(self.model), side="left", device=self.device)
        cache = rows_of_cache(
            self.prefix, torch.tensor([row.group for row in rows], device=self.device)
        )
        return rest.tokens, torch.cat([rest.mask.new_ones(len(rows), n), rest.mask], dim=1), cache

    def _steered(self, group_of_row: Sequence[int], *, gates: Any, **keywords: Any) -> Any:
        """Return a context in which each row has its group's interventions.

        Where ``gates`` is None, gated ones are left out.
        """
        rows_of: dict[int, list[int]] = {}
        for row, group in enumerate(group_of_row):
            rows_of.setdefault(group, []).append(row)
        is_one_group = len(rows_of) == 1
        interventions = [
            intervention if is_one_group else intervention.for_rows(group_rows)
            for group, group_rows in rows_of.items()
            for intervention in self.groups[group]
            if gates is not None or intervention.gate is None
        ]
        return intervene(self.model, interventions, gates=gates, transfer=self.transfer, **keywords)

    def _choose(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        draws: Float[Tensor, " batch"] | None,
        likeliest_tokens: Int[Tensor, " batch"],
    ) -> Int[Tensor, " batch"]:
        """Choose each row's next token: the likeliest, or the one its random number falls on."""
        if draws is None:
            return likeliest_tokens
        return drawn(logits, draws, self.decoding)

    def _draws(self, rows: Sequence[Row]) -> Float[Tensor, "batch step"] | None:
        """Draw numbers from seed, prompt and sample alone: the same in any batch and condition."""
        if self.decoding.temperature == 0:
            return None
        draws = [random_numbers(self.decoding, row.encoded.prompt.id, row.sample) for row in rows]
        return torch.stack(draws).to(self.device)

    def _worth_dropping(self, ended: Tensor) -> bool:
        """Say whether so many rows have ended that a smaller batch pays for copying the cache."""
        n_ended = int(ended.sum())
        return n_ended == len(ended) or n_ended >= max(1, len(ended) // 8)

    def _cut(self, ids: list[int]) -> tuple[list[int], Literal["eos", "length"]]:
        """Cut an answer before its first end token, and say how it ended."""
        stops = set(self.stops.tolist())
        for place, token in enumerate(ids):
            if token in stops:
                return ids[:place], "eos"
        return ids, "length"


def check_gates(model: HookedModel, interventions: Iterable[Intervention]) -> None:
    """Raise where a gate has to read token by token, and the model keeps no cache to go on from.

    Without one the whole text runs again for every token, and the gate would read the prompt again.

    Raises:
        ValueError: If there is such a gate.
    """
    gates = (one.gate for one in interventions if one.gate is not None)
    if any(gate.form == "stepwise" for gate in gates) and not has_key_value_cache(model):
        raise ValueError(
            f"a stepwise gate reads every token once, but {model.cfg.model_name!r} keeps no cache "
            "to go on from; give the gate the form 'hard' or 'soft'."
        )
