"""Generation: answers of the model, steered or not. One decode loop for one condition or for a sweep of many."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.forward import (
    allows_padding_behind,
    fast,
    forward,
    has_key_value_cache,
    prefix_cache,
    rows_of_cache,
    shared_prefix_length,
)
from workbench.intervening import intervene
from workbench.interventions import Intervention, check_interventions, description
from workbench.models import model_info
from workbench.prompts import Prompt
from workbench.sites import did_you_mean
from workbench.storage import PathLike, append_jsonl, key_of, read_jsonl
from workbench.tokens import Batch, Encoded, decode, encode, pad, pad_id, span_mask, stop_ids, template_text

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models import HookedModel

UNSTEERED = "unsteered"
Condition = Sequence[Intervention] | Mapping[str, Sequence[Intervention]]
"""What is done to the model: interventions for every prompt, or a mapping that names them by prompt id or by category (prompts
with neither stay unsteered)."""


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        prompt: What was asked.
        text: The answer, without special tokens.
        tokens: Its token ids, without the one that ended it.
        finish: "eos" if the model ended it, "length" if max_new_tokens did.
        condition: Name of what was done to the model.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    finish: Literal["eos", "length"]
    condition: str


@dataclass(frozen=True, eq=False)
class _Row:
    encoded: Encoded
    condition: str
    group: int  # rows of one group have the same interventions
    key: str


def generate(
    model: HookedModel,
    prompts: Sequence[Prompt],
    interventions: Condition = (),
    *,
    condition: str = UNSTEERED,
    max_new_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.0,
    batch_size: int = 48,
    system_prompt: str | None = None,
    output: PathLike | None = None,
    progress: bool = False,
    transfer: bool = False,
    continue_response: bool = False,
) -> list[Completion]:
    """Answer prompts under one condition; see ``sweep`` for several at once, and for the arguments.

    Args:
        model: A hooked model.
        prompts: What to answer.
        interventions: What is done meanwhile; nothing by default.
        condition: Name of it in the results.
        max_new_tokens: Length limit of an answer; this and the following are the arguments of ``sweep``.
        seed: For sampling.
        temperature: 0 takes the most likely token.
        batch_size: Rows a batch, at most.
        system_prompt: Words for the system turn.
        output: A jsonl file that keeps every answer as soon as it is there.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Go on from each prompt's ``response``.

    Returns:
        One completion a prompt, in order.
    """
    if condition == UNSTEERED and interventions:
        condition = "steered"
    return sweep(
        model,
        prompts,
        {condition: interventions},
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        batch_size=batch_size,
        system_prompt=system_prompt,
        output=output,
        progress=progress,
        transfer=transfer,
        continue_response=continue_response,
    )


def sweep(
    model: HookedModel,
    prompts: Sequence[Prompt],
    conditions: Mapping[str, Condition],
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.0,
    batch_size: int = 48,
    system_prompt: str | None = None,
    output: PathLike | None = None,
    progress: bool = False,
    transfer: bool = False,
    continue_response: bool = False,
) -> list[Completion]:
    """Answer prompts under several conditions, as rows of common batches.

    The template prefix is computed once a condition, rows that have ended are dropped, and every condition draws the same random numbers
    for a prompt, so that comparisons are paired.

    Args:
        model: A hooked model.
        prompts: What to answer.
        conditions: Name to interventions: a list for every prompt, or a mapping from category (or prompt id) to such a list.
        max_new_tokens: Length limit of an answer.
        seed: For sampling: the same seed, prompt and step give the same random number in any batch.
        temperature: 0 takes the most likely token, else the distribution is sampled at this temperature.
        batch_size: Rows (prompts x conditions) a batch, at most.
        system_prompt: Words for the system turn.
        output: A jsonl file that keeps every answer as soon as it is there; a second call with the same model, prompts, conditions and
            settings goes on from it, whatever else is in the file.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Go on from each prompt's ``response`` as the words the answer has begun with; the completion is what follows.

    Returns:
        Completions, condition by condition, prompts in order.

    Raises:
        ValueError: If an argument is out of range or an intervention does not fit the model.
    """
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0:
        given = f"{max_new_tokens}, {batch_size}, {temperature}"
        raise ValueError(f"max_new_tokens and batch_size must be at least 1 and temperature at least 0, got {given}.")
    if not prompts or not conditions:
        raise ValueError("nothing to answer: give at least one prompt and one condition.")
    most_common, times = Counter(prompt.id for prompt in prompts).most_common(1)[0]
    if times > 1:
        raise ValueError(f"prompt {most_common!r} comes {times} times; ids must be unique in a set.")
    encoded = encode(
        model, prompts, with_response=continue_response, system_prompt=system_prompt, max_new_tokens=max_new_tokens
    )
    settings = {
        "model": model_info(model).fingerprint,
        "template": template_text(model, system_prompt),
        "max_new_tokens": max_new_tokens,
        "seed": seed if temperature else None,
        "temperature": temperature,
    }
    rows, groups = _rows(model, encoded, conditions, settings, transfer, kept=output is not None)
    done = _read_output(output, {row.key for row in rows})
    # The batches are those of an uninterrupted run, so that a resumed run has the same rounding, and so the same text.
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].encoded.ids), rows[i].encoded.prompt.id))
    batches = [[rows[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    waiting = [batch for batch in batches if any(row.key not in done for row in batch)]

    from tqdm.auto import tqdm

    loop = _DecodeLoop(model, groups, max_new_tokens, temperature, seed, transfer)
    with tqdm(total=len(rows), desc="answers", unit="answer", disable=not progress) as bar, torch.no_grad():
        bar.update(len(rows) - sum(len(batch) for batch in waiting))
        if waiting:
            loop.share_prefix([row.encoded for row in rows], batch_size)
        for batch in waiting:
            new = []
            for row, (tokens, finish) in zip(batch, loop.run(batch), strict=True):
                if row.key not in done:
                    done[row.key] = {"text": decode(model, tokens), "tokens": tokens, "finish": finish}
                    names = {"key": row.key, "prompt_id": row.encoded.prompt.id, "condition": row.condition}
                    new.append(names | done[row.key])
            if output is not None:
                append_jsonl(output, new)
            bar.update(len(batch))
    answers = ((row, done[row.key]) for row in rows)
    return [
        Completion(row.encoded.prompt, own["text"], tuple(own["tokens"]), own["finish"], row.condition)
        for row, own in answers
    ]


class _DecodeLoop:
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
        self.max_new_tokens, self.temperature, self.seed, self.transfer = max_new_tokens, temperature, seed, transfer
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
        self.n_prefix = shared_prefix_length(encoded, keep=lambda row: row.content[0] if has_gate else len(row.ids) - 1)
        if not self.n_prefix:
            return
        caches = []
        for start in range(0, len(self.groups), batch_size):
            own = range(start, min(start + batch_size, len(self.groups)))
            with self._steered([(i,) for i in own], prompt_length=self.n_prefix, gates=None):
                caches.append(prefix_cache(self.model, encoded[0].ids[: self.n_prefix], rows=len(own)))
        if not allows_padding_behind(caches[0], max(len(row.ids) for row in encoded) + self.max_new_tokens):
            return
        self.prefix = caches[0]
        for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
            layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
            layer.values = torch.cat([layer.values, *(other.values for other in others)])

    def run(self, rows: Sequence[_Row]) -> list[tuple[list[int], Literal["eos", "length"]]]:
        """Token ids and the way it ended, for each row."""
        batch = pad([row.encoded for row in rows], pad_id=pad_id(self.model), side="left", device=self.device)
        suffix, mask, cache = self._behind_prefix(rows, batch)
        n_rows, width = len(rows), mask.shape[1]
        chosen = torch.zeros((n_rows, self.max_new_tokens), dtype=torch.long, device=self.device)
        draws = self._draws(rows)
        alive = torch.arange(n_rows, device=self.device)  # which row of the results each row of the batch is
        ended = torch.zeros(n_rows, dtype=torch.bool, device=self.device)
        tokens, step = suffix, 0
        content = span_mask([row.encoded for row in rows], batch, "content")
        gates: Any = {}
        while step < self.max_new_tokens:  # one turn for each set of rows alive
            groups = [(rows[i].group,) for i in alive.tolist()]
            with (
                self._steered(groups, prompt_length=width, content=content, gates=gates) as steering,
                fast(self.model),
            ):
                while step < self.max_new_tokens:
                    logits, cache = forward(self.model, tokens, mask, cache=cache, use_cache=True)
                    next_tokens = self._choose(logits, draws[alive, step] if draws is not None else None)
                    chosen[alive, step] = next_tokens
                    ended = ended | torch.isin(next_tokens, self.stops)
                    step += 1
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                    new = next_tokens[:, None]
                    tokens = torch.cat([tokens, new], dim=1) if cache is None else new  # no cache: all is run again
                    if step % self.look_every == 0 and self._worth_dropping(ended):
                        break
            if step == self.max_new_tokens or bool(ended.all()):
                break
            keep = (~ended).nonzero()[:, 0]
            alive, ended, mask, tokens, content = (x[keep] for x in (alive, ended, mask, tokens, content))
            gates = {gate: state.rows(keep) for gate, state in steering.gates.items()}
            if cache is not None:
                cache.batch_select_indices(keep)
        return [self._cut(ids) for ids in chosen.tolist()]

    def _behind_prefix(self, rows: Sequence[_Row], batch: Batch) -> tuple[Tensor, Tensor, Any]:
        """The batch without its shared prefix, the mask of prefix and rest, and the cache that holds the prefix."""
        if self.prefix is None:
            return batch.tokens, batch.mask, None
        n = self.n_prefix
        shorter = [dataclasses.replace(row.encoded, ids=row.encoded.ids[n:]) for row in rows]
        rest = pad(shorter, pad_id=pad_id(self.model), side="left", device=self.device)
        cache = rows_of_cache(self.prefix, torch.tensor([row.group for row in rows], device=self.device))
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
        return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:])[:, 0].clamp(max=logits.shape[-1] - 1)

    def _draws(self, rows: Sequence[_Row]) -> Float[Tensor, "batch step"] | None:
        """Uniform random numbers from seed and prompt alone: the same in any batch and under every condition."""
        if self.temperature == 0:
            return None
        draws = []
        for row in rows:
            own = int(hashlib.sha256(f"{self.seed}|{row.encoded.prompt.id}".encode()).hexdigest()[:15], 16)
            draws.append(
                torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(own), dtype=torch.float64)
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


def _rows(
    model: HookedModel,
    encoded: Sequence[Encoded],
    conditions: Mapping[str, Condition],
    settings: dict[str, Any],
    transfer: bool,
    *,
    kept: bool,
) -> tuple[list[_Row], list[list[Intervention]]]:
    """One row a condition and prompt, and the distinct lists of interventions that they point to."""
    groups: list[list[Intervention]] = [[]]
    rows = []
    for name, condition in conditions.items():
        by_owner = condition if isinstance(condition, Mapping) else {None: condition}
        lists = {owner: list(interventions) for owner, interventions in by_owner.items()}
        group_of, description_of = {}, {}
        known = {row.prompt.id for row in encoded} | {row.prompt.category for row in encoded}
        if isinstance(condition, Mapping) and any(lists.values()) and known.isdisjoint(lists):
            given = str(next(iter(lists)))
            raise ValueError(
                f"condition {name!r} would steer nothing: no prompt has id or category {given!r}.{did_you_mean(given, known)}"
            )
        for owner, interventions in lists.items():
            check_interventions(model, interventions, transfer=transfer)
            if any(intervention.rows is not None for intervention in interventions):
                raise ValueError(
                    f"condition {name!r} names rows of a batch, but generation makes its own batches; "
                    "give a mapping from prompt id (or category) to interventions."
                )
            description_of[owner] = [description(intervention) for intervention in interventions] if kept else []
            group_of[owner] = len(groups) if interventions else 0
            if interventions:
                groups.append(interventions)
        for row in encoded:
            own = next((name for name in (row.prompt.id, row.prompt.category) if name in group_of), None)
            begun = [row.prompt.response] if row.response[1] > row.response[0] else []
            key = key_of([settings, row.prompt.id, row.prompt.text, name, description_of.get(own, []), *begun])
            rows.append(_Row(row, name, group_of.get(own, 0), key))
    return rows, groups


def _read_output(output: PathLike | None, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Answers of earlier calls, by key."""
    if output is None or not Path(output).exists():
        return {}
    return {row["key"]: row for row in read_jsonl(output, cut_last=True) if row.get("key") in wanted}
