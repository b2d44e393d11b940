"""Read given answers once: how likely the model finds them, and its hidden states over them.

What answers have in common is read once for all of them: the template, their question, and the
words that several answers to one question begin with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from workbench.generation._logits import MEMORY, columns_at_a_time, some_or_all_logits
from workbench.generation._memory import bytes_per_token
from workbench.models.batches import (
    batches_by_length,
    may_share_prefix,
    pad_ids,
    share_prefix,
    widths_to_keep_apart,
)
from workbench.models.finite import check_finite
from workbench.models.forward import KeyValueCache, rows_of_cache, shares_prefixes
from workbench.models.hooked_model import model_lock
from workbench.models.progress import progress_bar
from workbench.models.sites import check_per_token, check_sites
from workbench.models.tokens import Encoded, encode, pad_id

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.generation.answers import Completion
    from workbench.models.hooked_model import HookedModel
    from workbench.models.sites import Site


SPARED = 8
"""Tokens that a common beginning must spare, at least: a row of its own costs about as much."""


@dataclass(frozen=True, eq=False)
class RowsRead:
    """Hold what one reading of rows gave, row by row.

    Attributes:
        log_probs: Log-probability of each response token, float32 on the CPU; empty where there is
            no response.
        states: Mean over the response's tokens at the site, float32 on the CPU; None where no site
            was asked for and where there is no response.
    """

    log_probs: list[Float[Tensor, " token"]]
    states: list[Float[Tensor, " d"] | None]


def read_rows(
    model: HookedModel,
    rows: Sequence[Encoded],
    *,
    site: Site | None = None,
    batch_size: int = 16,
) -> RowsRead:
    """Read responses behind their prompts, in one pass for all that is asked of them.

    Rows may be equal or begin alike: what they share is read once.

    Args:
        model: A hooked model, as for ``answer_log_probs``.
        rows: Prompts with responses.
        site: Where hidden states are averaged over a response's tokens; None reads none.
        batch_size: Rows per batch, at most.

    Raises:
        ValueError: If the model's numbers are infinite or undefined, or it has no such site.
    """
    if site is not None:
        check_sites(model, [site])
    first: dict[Any, int] = {}
    equal = [first.setdefault((row.ids, row.response), i) for i, row in enumerate(rows)]
    read = RowsRead([torch.zeros(0) for _ in rows], [None for _ in rows])
    answered = [i for i in first.values() if rows[i].response[1] > rows[i].response[0]]
    if answered:
        _read_distinct(model, rows, answered, site, batch_size, read)
    return RowsRead([read.log_probs[i] for i in equal], [read.states[i] for i in equal])


def _read_distinct(
    model: HookedModel,
    rows: Sequence[Encoded],
    answered: Sequence[int],
    site: Site | None,
    batch_size: int,
    read: RowsRead,
) -> None:
    """Read rows that have responses, of which no two are equal."""
    longest = max(len(rows[i].ids) for i in answered)
    with torch.no_grad():
        prefix = share_prefix(
            model,
            [rows[i] for i in answered],
            keep=lambda row: row.response[0] - 1,
            padded_columns=longest,
        )
        # A first part, a second and a third may each be padded.
        can_share = shares_prefixes() and may_share_prefix(model, 3 * longest)
        roots = _trees(rows, answered, prefix.length, can_share=can_share)
        rows_in_memory = MEMORY // max(1, 3 * longest * bytes_per_token(model))
        size = max(1, min(batch_size, rows_in_memory))
        reader = _Reader(model, rows, site, size, read)
        lengths = [root.end - root.start for root in roots]
        alike = widths_to_keep_apart(model, lengths)
        bar = progress_bar(len(answered), "readings", "reading", show=False)
        # Twice as many roots: the more there are, the less padding have those behind them.
        for places in batches_by_length(lengths, min(2 * size, rows_in_memory) or 1, alike=alike):
            nodes = [roots[place] for place in places]
            mask = torch.ones(len(nodes), prefix.length, dtype=torch.bool, device=prefix.device)
            before = [_Known(torch.zeros(0), None)] * len(nodes)
            reader.read(nodes, before, mask, partial(prefix.for_rows, len(nodes)), None)
            bar.update(len(answered) * len(nodes) / len(roots))


def with_answers(
    model: HookedModel, completions: Sequence[Completion], asked_by: Mapping[str, Any]
) -> list[Encoded]:
    """Encode every prompt with the answer's own token ids behind it."""
    prompts = [completion.prompt for completion in completions]
    rows = []
    for encoded, completion in zip(encode(model, prompts, **asked_by), completions, strict=True):
        n = len(encoded.ids)
        response = (n, n + len(completion.tokens))
        ids = encoded.ids + completion.tokens
        rows.append(dataclasses.replace(encoded, ids=ids, response=response))
    return rows


class _Node(NamedTuple):
    """Name tokens that some rows share, and what comes behind them in these rows."""

    row: int
    """Place of one of the rows."""
    start: int
    end: int
    ending: list[int]
    """Places of the rows that end with it."""
    children: list[_Node]

    def n_answer(self, rows: Sequence[Encoded]) -> int:
        """Count its tokens that are of the response."""
        return self.end - max(self.start, rows[self.row].response[0])


def _trees(
    rows: Sequence[Encoded], answered: Sequence[int], start: int, *, can_share: bool
) -> list[_Node]:
    """Make a tree for each prompt: its tokens with what all its responses share, then the rest."""
    if not can_share:
        return [_Node(i, start, len(rows[i].ids), [i], []) for i in answered]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in answered:
        by_prompt.setdefault(rows[i].ids[: rows[i].response[0]], []).append(i)
    trees = []
    for places in by_prompt.values():
        sorted_ids = sorted(rows[i].ids for i in places)
        n_shared = _n_common(sorted_ids[0], sorted_ids[-1])
        groups = shared_beginnings([rows[i].ids[n_shared:] for i in places])
        children = [
            _node(rows, [places[member] for member in members], n_shared, n_shared + n)
            for members, n in groups
        ]
        trees.append(_gathered(places[0], start, n_shared, children))
    return trees


def _node(rows: Sequence[Encoded], places: Sequence[int], start: int, end: int) -> _Node:
    """Make the node of what some rows share, with a child for what each has behind it."""
    if len(places) == 1:
        return _Node(places[0], start, len(rows[places[0]].ids), list(places), [])
    rests = [_Node(i, end, len(rows[i].ids), [i], []) for i in places]
    return _gathered(places[0], start, end, rests)


def _gathered(row: int, start: int, end: int, children: Sequence[_Node]) -> _Node:
    """Make a node of children, of which those without tokens end with it."""
    ending = [place for child in children if child.end == end for place in child.ending]
    return _Node(row, start, end, ending, [child for child in children if child.end > end])


def shared_beginnings(sequences: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Group sequences by a common beginning, so that the fewest tokens are read in two steps.

    The first step reads each group's beginning once, the second what is left of each sequence.

    Args:
        sequences: Token ids, one sequence at least.

    Returns:
        Groups: which sequences, and how many tokens they share; all of them for one alone.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    # Neighbours in this order share most. Each run stands for some neighbours, with the tokens
    # that all of them share and their best groups; runs that share more are closed before those
    # around them.
    open_runs: list[_Neighbours] = []
    for end, i in enumerate(order, start=1):
        run = _Neighbours(len(sequences[i]), end - 1, 0, [([i], len(sequences[i]))])
        shared = _n_common(sequences[i], sequences[order[end]]) if end < len(order) else -1
        while open_runs and open_runs[-1].depth > shared:
            run = open_runs.pop().joined(run).closed(end)
        if open_runs and open_runs[-1].depth == shared:
            open_runs[-1] = open_runs[-1].joined(run)
        else:
            open_runs.append(run._replace(depth=shared))
    return open_runs[0].groups


class _Neighbours(NamedTuple):
    """Hold a run of sorted sequences: what they share, and the best groups so far."""

    depth: int
    start: int
    saved: int
    groups: list[tuple[list[int], int]]

    def joined(self, other: _Neighbours) -> _Neighbours:
        """Take the groups of the run behind it."""
        saved, groups = self.saved + other.saved, self.groups + other.groups
        return self._replace(saved=saved, groups=groups)

    def closed(self, end: int) -> _Neighbours:
        """Make one group of the run, which ends here, if that saves more."""
        saved = (end - self.start - 1) * self.depth - SPARED
        if saved <= self.saved:
            return self
        members = [i for group, _ in self.groups for i in group]
        return self._replace(saved=saved, groups=[(members, self.depth)])


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class _Known(NamedTuple):
    """Hold what is known of a row up to some token: log-probabilities, and the sum of states."""

    log_probs: Float[Tensor, " token"]
    sum_of_states: Float[Tensor, " d"] | None


class _Passed(NamedTuple):
    """Hold what a pass gave. Its logits are let go before what comes behind it is read."""

    log_probs: Float[Tensor, "node token"]
    """Of the tokens that are of responses, at the right end."""
    sums: Float[Tensor, "node d"] | None
    cache: KeyValueCache | None
    ends: Float[Tensor, "node d_vocab"] | None
    """Log-probabilities of the token behind each node; None where nothing comes behind."""


@dataclass(frozen=True, eq=False)
class _Reader:
    """Read trees of shared tokens, from their roots on."""

    model: HookedModel
    rows: Sequence[Encoded]
    site: Site | None
    batch_size: int
    found: RowsRead

    def read(
        self,
        nodes: Sequence[_Node],
        before: Sequence[_Known],
        past: Bool[Tensor, "node past"],
        cache: Callable[[], KeyValueCache | None],
        ends: Float[Tensor, "node d_vocab"] | None,
    ) -> None:
        """Read nodes and all that comes behind them.

        Args:
            nodes: What is read.
            before: What is known of each node's rows already.
            past: True at the real tokens in front of each node.
            cache: Makes what the model keeps of these.
            ends: Log-probabilities of each node's first token; None for roots, which begin with
                tokens of prompts.
        """
        tokens, real = pad_ids(
            [self.rows[node.row].ids[node.start : node.end] for node in nodes],
            pad_id=pad_id(self.model),
            side="left",
        )
        tokens, mask = tokens.to(past.device), torch.cat([past, real.to(past.device)], dim=1)
        passed = self._pass(nodes, tokens, mask, cache, ends)
        known = []
        for i, (node, one) in enumerate(zip(nodes, before, strict=True)):
            of_node = passed.log_probs[i, passed.log_probs.shape[1] - node.n_answer(self.rows) :]
            sums = None if passed.sums is None else passed.sums[i]
            known.append(_after(one, of_node, sums))
            self._keep(node, known[-1])
        if passed.ends is not None:
            self._go_on(nodes, known, mask, passed.cache, passed.ends)

    def _pass(
        self,
        nodes: Sequence[_Node],
        tokens: Int[Tensor, "node pos"],
        mask: Bool[Tensor, "node past_and_pos"],
        cache: Callable[[], KeyValueCache | None],
        ends: Float[Tensor, "node d_vocab"] | None,
    ) -> _Passed:
        """Run nodes; give the log-probabilities of their tokens that are of responses."""
        sizes = [node.n_answer(self.rows) for node in nodes]
        n, device = max(sizes), tokens.device
        starts = torch.tensor([[n - size] for size in sizes], device=device)
        is_answer = torch.arange(n, device=device) >= starts
        goes_on = any(node.children for node in nodes)
        # The first column of all has none before it: what is there is told by the ends.
        n_inside = min(n, tokens.shape[1] - 1)
        logits_of, sums, kept = self._run(tokens, mask, n_inside + 1, is_answer, cache(), goes_on)
        log_probs = _chosen(self.model, logits_of, tokens[:, tokens.shape[1] - n_inside :])
        log_probs = torch.nn.functional.pad(log_probs, (n - n_inside, 0))
        if ends is not None:
            # Each node is all response, and begins where its part of the columns does.
            log_probs = log_probs.scatter(1, starts, ends.gather(1, tokens.gather(1, starts)))
        log_probs = log_probs.masked_fill(~is_answer, 0.0)
        values, last = log_probs, None
        if goes_on:
            last = logits_of(slice(n_inside, n_inside + 1))[:, 0].float().log_softmax(dim=-1)
            values = torch.cat([log_probs, last.amax(dim=1, keepdim=True)], dim=1)
        ids = [self.rows[node.row].prompt.id for node in nodes]
        check_finite(self.model, values, ids, tokens, mask, cache=cache)
        return _Passed(log_probs.cpu(), sums, kept, last)

    def _run(
        self,
        tokens: Int[Tensor, "node pos"],
        mask: Bool[Tensor, "node past_and_pos"],
        n: int,
        is_answer: Bool[Tensor, "node last"],
        cache: KeyValueCache | None,
        use_cache: bool,
    ) -> tuple[
        Callable[[slice], Float[Tensor, "node some d_vocab"]],
        Float[Tensor, "node d"] | None,
        KeyValueCache | None,
    ]:
        """Run a pass; add up the states at the site over the last columns that are of responses."""
        site, sums = self.site, []

        def read(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 - passed by their names
            check_per_token(activation, site.hook_name if site else "")
            inside = activation.flatten(2)[:, activation.shape[1] - is_answer.shape[1] :].float()
            weights = is_answer.to(inside.device, torch.float32)
            sums.append(torch.bmm(weights[:, None], inside)[:, 0].cpu())

        hooks = [] if site is None else [(site.hook_name, read)]
        with model_lock(self.model), self.model.hooks(fwd_hooks=hooks) if hooks else nullcontext():
            logits_of, kept = some_or_all_logits(
                self.model, tokens, mask, n, cache=cache, use_cache=use_cache
            )
        return logits_of, sums[0] if sums else None, kept

    def _keep(self, node: _Node, known: _Known) -> None:
        """Keep what is known of the rows that end with a node."""
        for place in node.ending:
            n, total = len(known.log_probs), known.sum_of_states
            self.found.log_probs[place] = known.log_probs.clone()
            self.found.states[place] = None if total is None else total / n

    def _go_on(
        self,
        nodes: Sequence[_Node],
        known: Sequence[_Known],
        mask: Bool[Tensor, "node past"],
        cache: KeyValueCache | None,
        ends: Float[Tensor, "node d_vocab"],
    ) -> None:
        """Read what comes behind some nodes, in batches of similar length."""
        pairs = [(i, child) for i, node in enumerate(nodes) for child in node.children]
        widths = [child.end - child.start for _, child in pairs]
        alike = widths_to_keep_apart(self.model, widths)
        for places in batches_by_length(widths, self.batch_size, alike=alike):
            parents = [pairs[place][0] for place in places]
            index = torch.tensor(parents, device=mask.device)
            self.read(
                [pairs[place][1] for place in places],
                [known[i] for i in parents],
                mask[index],
                partial(rows_of_cache, cache, index),
                ends[index],
            )


def _after(
    before: _Known, log_probs: Float[Tensor, " token"], sums: Float[Tensor, " d"] | None
) -> _Known:
    """Add what a node gave to what was known in front of it."""
    if sums is not None and before.sum_of_states is not None:
        sums = sums + before.sum_of_states
    return _Known(torch.cat([before.log_probs, log_probs]), sums)


def _chosen(
    model: HookedModel,
    logits_of: Callable[[slice], Float[Tensor, "row some d_vocab"]],
    targets: Int[Tensor, "row n"],
) -> Float[Tensor, "row n"]:
    """Give the log-probabilities of tokens, each by the logits of the column before it."""
    parts = [torch.zeros(len(targets), 0, device=targets.device)]
    if targets.shape[1]:
        for columns in columns_at_a_time(model, *targets.shape):
            logits = logits_of(columns).float()
            chosen = logits.gather(2, targets[:, columns, None])[..., 0]
            # Row by row, in memory that is near.
            parts.append(chosen - torch.stack([row.logsumexp(dim=-1) for row in logits]))
    return torch.cat(parts, dim=1)
