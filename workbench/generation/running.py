"""Write answers in a batch that rows join and leave while the others are written.

``DecodeLoop`` knows all its rows beforehand; a server does not. Here a prompt is read in a pass of
its own, with its own interventions, and its keys and values take the place of a row that has ended,
or are put beside the others. Then all rows are written on together, one token each. A row that is
shorter than the widest has padding in front, as in any batch, and it never looks at another row: an
answer is the one that its row gets alone, to rounding.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from workbench.generation._choice import drawn, likeliest, random_numbers
from workbench.generation._decode_loop import check_gates
from workbench.models.batches import pad, span_mask
from workbench.models.forward import fast, forward, has_key_value_cache, keep_rows
from workbench.models.hooked_model import input_device
from workbench.models.tokens import pad_id, stop_ids
from workbench.models.trusted_paths import trusts
from workbench.steering.apply import GateState, Steering, hooked
from workbench.steering.interventions import check_interventions

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.generation._endings import Endings
    from workbench.generation.decoding import Decoding
    from workbench.models.hooked_model import HookedModel
    from workbench.models.tokens import Encoded
    from workbench.steering.interventions import Intervention


TRIMMED = 32
"""Columns that are padding in all rows before they are cut off."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Describe one answer that is to be written.

    Attributes:
        encoded: The prompt.
        interventions: What is done to the model in this row; rows that share one tuple are steered
            together.
        decoding: Length, temperature, top_p, top_k and seed; one answer, whatever ``n_samples``.
        endings: Finds stop texts.
        sample: Number of the answer among those to the same prompt.
        n_likely: Likeliest tokens that are named at each place, with the log-probability of the one
            written; None names none.
    """

    encoded: Encoded
    interventions: tuple[Intervention, ...]
    decoding: Decoding
    endings: Endings
    sample: int = 0
    n_likely: int | None = None


class Token(NamedTuple):
    """Hold the next token of an answer.

    Attributes:
        asked: Whose it is.
        id: The token; where the answer ended with it ("eos") it is no part of it.
        finish: How the answer ended with this token; None where it goes on, and "failed" where
            numbers left what can be held.
        log_prob: Its log-probability in this row, at temperature 1 and among all tokens, where
            it was asked for.
        likely: The likeliest tokens there with theirs.
        is_open: Whether a gate of this row lets something through; None where it has no gate.
    """

    asked: Asked
    id: int
    finish: Literal["eos", "length", "stop", "failed"] | None
    log_prob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()
    is_open: bool | None = None


@dataclass(eq=False)
class _Row:
    """Hold one answer as far as it is written."""

    asked: Asked
    numbers: Float[Tensor, " step"] | None
    tokens: list[int] = field(default_factory=list)
    has_ended: bool = False


@dataclass(eq=False)
class _State:
    """Hold what a batch's next pass goes on from, row by row."""

    rows: list[_Row]
    last: Int[Tensor, " row"]
    mask: Bool[Tensor, "row column"]
    ends: Int[Tensor, " row"]
    """Column at which each row's prompt ended."""
    gates: dict[Any, GateState]
    cache: Any


class RunningBatch:
    """Write answers of rows that come and go; one thread uses it.

    Args:
        model: A hooked model.

    Raises:
        ValueError: If the model keeps no cache to go on from.
    """

    def __init__(self, model: HookedModel) -> None:
        if not has_key_value_cache(model):
            raise ValueError(
                f"{model.cfg.model_name!r} keeps no cache to go on from, so rows cannot join a "
                "batch; answer with wb.generate instead."
            )
        self.model, self.device = model, input_device(model)
        self.stops = stop_ids(model)
        self._stack: ExitStack | None = None
        self._checked: weakref.WeakSet[Intervention] = weakref.WeakSet()
        self._steering = Steering()
        self._state: _State | None = None
        self._pads = trusts(model, "padding")

    @property
    def alive(self) -> list[Asked]:
        """What is being written."""
        rows = self._state.rows if self._state is not None else []
        return [row.asked for row in rows if not row.has_ended]

    @property
    def width(self) -> int:
        """Columns of the batch; 0 where nothing is written."""
        return self._state.mask.shape[1] if self._state is not None else 0

    def may_join(self, asked: Sequence[Asked], other: Asked) -> bool:
        """Tell whether another row may be read together with some, now.

        A model that takes padding for words, or keeps something else than keys and values of all
        columns, writes its batches one after the other.
        """
        if self._state is not None and self.alive and not self._is_joinable():
            return False
        alike = (len(one.encoded.ids) == len(other.encoded.ids) for one in asked)
        return self._pads or all(alike)

    def _is_joinable(self) -> bool:
        from transformers.cache_utils import DynamicLayer

        from workbench.models._growing_cache import _GrowingLayer

        layers = self._state.cache.layers if self._state is not None else []
        plain = (DynamicLayer, _GrowingLayer)
        return self._pads and all(type(layer) in plain for layer in layers)

    @torch.no_grad()
    def join(self, asked: Sequence[Asked]) -> list[Token]:
        """Read prompts, write their first tokens, and put their rows beside the others.

        Where it raises, the batch is as it was.

        Raises:
            ValueError: If an intervention does not fit the model.
        """
        for one in asked:
            check_gates(self.model, one.interventions)
        self._hook(asked)
        joined = self._read(asked)
        tokens = joined.tokens
        if all(row.has_ended for row in joined.state.rows):
            return tokens
        if self._state is None or not self.alive:
            self._state = joined.state
        else:
            self._put_beside(self._state, joined.state)
        return tokens

    @torch.no_grad()
    def step(self) -> list[Token]:
        """Write one token of every row."""
        state = self._state
        if state is None or not self.alive:
            return []
        self._drop_ended(state)
        self._hook([])
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(state.rows), 1)], dim=1)
        steering = self._steering
        steering.change(_per_row([None if row.has_ended else row.asked for row in state.rows]))
        steering.ends, steering.content, steering.gates = state.ends, None, dict(state.gates)
        logits, state.cache = forward(
            self.model, state.last[:, None], state.mask, cache=state.cache, use_cache=True
        )
        state.gates = {gate: steering.gates[gate] for gate in state.gates}
        return self._written(state, logits)

    def leave(self, asked: Collection[Asked]) -> None:
        """Stop writing some answers."""
        gone = set(map(id, asked))
        for row in self._state.rows if self._state is not None else []:
            row.has_ended = row.has_ended or id(row.asked) in gone

    def close(self) -> None:
        """Forget all rows and take the hooks away."""
        self._state = None
        self.unhook()

    def unhook(self) -> None:
        """Take the hooks away until the next pass, so that the model can be looked at."""
        self._steering = Steering()
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def _hook(self, asked: Sequence[Asked]) -> None:
        """See that the sites and gates of all rows are hooked, and that new interventions fit."""
        new = [x for one in asked for x in one.interventions if x not in self._checked]
        if new:
            self.unhook()
            check_interventions(self.model, new)
            self._checked.update(new)
        wanted = [x for one in (*self.alive, *asked) for x in one.interventions]
        sites = {one.site for one in wanted}
        gates = {one.gate for one in wanted if one.gate is not None}
        is_hooked = sites <= self._steering.fired.keys() and gates <= self._steering.hooked_gates
        if self._stack is not None and is_hooked:
            return
        self.unhook()
        with ExitStack() as stack:
            steering = stack.enter_context(hooked(self.model, wanted))
            stack.enter_context(fast(self.model))
            self._steering, self._stack = steering, stack.pop_all()

    def _read(self, asked: Sequence[Asked]) -> _Joined:
        """Read prompts in one pass, and write the first token of each."""
        encoded = [one.encoded for one in asked]
        batch = pad(encoded, pad_id=pad_id(self.model), side="left", device=self.device)
        width = batch.tokens.shape[1]
        steering = self._steering
        steering.change(_per_row(asked))
        steering.ends, steering.prompt_length, steering.gates = None, width, {}
        steering.content = span_mask(encoded, batch, "content")
        logits, cache = forward(self.model, batch.tokens, batch.mask, use_cache=True)
        rows = [_Row(one, self._numbers(one)) for one in asked]
        state = _State(
            rows,
            last=batch.tokens[:, -1],
            mask=batch.mask,
            ends=torch.full((len(rows),), width, device=self.device),
            gates=dict(steering.gates),
            cache=cache,
        )
        tokens = self._written(state, logits)
        is_open = _open_rows(state)
        marked = [token._replace(is_open=is_open[i]) for i, token in enumerate(tokens)]
        return _Joined(state, marked)

    def _numbers(self, asked: Asked) -> Float[Tensor, " step"] | None:
        if asked.decoding.temperature == 0:
            return None
        return random_numbers(asked.decoding, asked.encoded.prompt.id, asked.sample).to(self.device)

    def _written(self, state: _State, logits: Float[Tensor, "row d_vocab"]) -> list[Token]:
        """Choose the next token of every row that is still written."""
        largest, chosen = likeliest(logits)
        finite = largest.isfinite().tolist()
        chosen = chosen.clone()
        for place, row in enumerate(state.rows):
            if row.numbers is not None and not row.has_ended and finite[place]:
                number, step = row.numbers[len(row.tokens)], slice(place, place + 1)
                chosen[step] = drawn(logits[step], number[None], row.asked.decoding)
        state.last = chosen
        written = []
        for place, (row, token) in enumerate(zip(state.rows, chosen.tolist(), strict=True)):
            if row.has_ended:
                continue
            row.tokens.append(token)
            finish = self._finish(row, token) if finite[place] else "failed"
            row.has_ended = finish is not None
            named: dict[str, Any] = {}
            if row.asked.n_likely is not None and finite[place]:
                named = _log_probs(logits[place], token, row.asked.n_likely)
            written.append(Token(row.asked, token, finish, **named))
        return written

    def _finish(self, row: _Row, token: int) -> Literal["eos", "length", "stop"] | None:
        if token in self.stops:
            return "eos"
        if row.asked.decoding.stop and row.asked.endings.has_stopped(row.tokens):
            return "stop"
        return "length" if len(row.tokens) == row.asked.decoding.max_new_tokens else None

    def _put_beside(self, state: _State, new: _State) -> None:
        """Put new rows into the places of rows that have ended, and the rest behind the others.

        Nothing of the rows that are written is changed before all of it is there.
        """
        going = [i for i, row in enumerate(new.rows) if not row.has_ended]
        _keep(new, torch.tensor(going, device=self.device))
        width = max(state.mask.shape[1], new.mask.shape[1])
        more, more_new = width - state.mask.shape[1], width - new.mask.shape[1]
        free = [i for i, row in enumerate(state.rows) if row.has_ended][: len(new.rows)]

        def placed(rows: Tensor, other: Tensor) -> Tensor:
            return _placed(rows, other, torch.tensor(free, device=rows.device, dtype=torch.long))

        layers = [
            [
                placed(
                    _widened(getattr(layer, name), more), _widened(getattr(other, name), more_new)
                )
                for name in ("keys", "values")
            ]
            for layer, other in zip(state.cache.layers, new.cache.layers, strict=True)
        ]
        gates = {}
        for gate in {**state.gates, **new.gates}:
            one, other = (_known(gate, part, self.device) for part in (state, new))
            gates[gate] = GateState(
                placed(one.scores, other.scores), placed(one.opening, other.opening)
            )
        mask = placed(
            torch.nn.functional.pad(state.mask, (more, 0)),
            torch.nn.functional.pad(new.mask, (more_new, 0)),
        )
        state.mask, state.gates = mask, gates
        state.ends = placed(state.ends + more, new.ends + more_new)
        state.last = placed(state.last, new.last)
        for layer, (keys, values) in zip(state.cache.layers, layers, strict=True):
            layer.keys, layer.values = keys, values
        for i, place in enumerate(free):
            state.rows[place] = new.rows[i]
        state.rows += new.rows[len(free) :]

    def _drop_ended(self, state: _State) -> None:
        """Go on without rows that have ended, where a smaller batch pays for copying its cache."""
        going = [i for i, row in enumerate(state.rows) if not row.has_ended]
        n_ended = len(state.rows) - len(going)
        if n_ended and n_ended >= len(state.rows) // 8:
            _keep(state, torch.tensor(going, device=self.device))
        if not self._is_joinable():
            return
        alive = torch.tensor([not row.has_ended for row in state.rows], device=self.device)
        first = int((state.mask & alive[:, None]).any(dim=0).int().argmax())
        if first >= TRIMMED:
            state.mask, state.ends = state.mask[:, first:], state.ends - first
            for layer in state.cache.layers:
                layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]


class _Joined(NamedTuple):
    """Hold rows whose prompts were read, and their first tokens."""

    state: _State
    tokens: list[Token]


def _per_row(asked: Sequence[Asked | None]) -> list[Intervention]:
    """List the interventions of a batch, each for its rows; None is a row that has ended."""
    rows_of: dict[int, list[int]] = {}
    lists: dict[int, tuple[Intervention, ...]] = {}
    for row, one in enumerate(asked):
        if one is not None:
            lists[id(one.interventions)] = one.interventions
            rows_of.setdefault(id(one.interventions), []).append(row)
    if len(lists) == 1:
        return list(*lists.values())
    return [one.for_rows(rows_of[key]) for key, steered in lists.items() for one in steered]


def _open_rows(state: _State) -> list[bool | None]:
    """Tell for each row whether its gates let something through."""
    opened: list[bool | None] = []
    for place, row in enumerate(state.rows):
        own = {(x.gate, x.gate_category) for x in row.asked.interventions if x.gate is not None}
        openings = [
            float(state.gates[gate].opening[place, gate.index(category)]) for gate, category in own
        ]
        opened.append(any(value > 0 for value in openings) if own else None)
    return opened


def _log_probs(logits: Float[Tensor, " d_vocab"], token: int, n: int) -> dict[str, Any]:
    """Give the log-probability of a token and of the likeliest ones."""
    values = logits.float().log_softmax(dim=-1)
    likely: tuple[tuple[int, float], ...] = ()
    if n:
        best = values.topk(min(n, len(values)))
        likely = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return {"log_prob": float(values[token]), "likely": likely}


def _known(gate: Any, state: _State, device: torch.device) -> GateState:
    """Give what a gate has read of some rows: that it is closed, where it read none of them."""
    if gate in state.gates:
        return state.gates[gate]
    shape = (len(state.rows), len(gate.categories))
    scores = torch.full(shape, float("-inf"), device=device)
    return GateState(scores, torch.zeros(shape, device=device))


def _keep(state: _State, rows: Int[Tensor, " kept"]) -> None:
    """Go on with some rows."""
    if len(rows) == len(state.rows):
        return
    state.rows = [state.rows[i] for i in rows.tolist()]
    state.last, state.mask, state.ends = state.last[rows], state.mask[rows], state.ends[rows]
    state.gates = {gate: known.rows(rows) for gate, known in state.gates.items()}
    keep_rows(state.cache, rows)


def _widened(
    columns: Float[Tensor, "row head column d"], more: int
) -> Float[Tensor, "row head column_and_more d"]:
    """Put columns in front of those that a layer keeps."""
    return torch.nn.functional.pad(columns, (0, 0, more, 0)) if more else columns


def _placed(rows: Tensor, new: Tensor, places: Int[Tensor, " place"]) -> Tensor:
    """Write the first new rows into places among the others, and put the rest behind them.

    Nothing is lost of what is written over: the rows there have ended.
    """
    n = len(places)
    if n:
        rows[places] = new[:n].to(rows)
    return torch.cat([rows, new[n:].to(rows)]) if n < len(new) else rows
