"""Apply interventions to a running model, at the right columns, rows and gates.

``intervene`` hooks a model for the length of a ``with`` block. From the lengths of each forward
pass, ``Steering`` knows which columns are prompt and which are generated; from what a steering gate
reads, ``GateState`` knows how far it is open for each row. The functions below ``intervene`` turn
the interventions of one site into one function of the activation there.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import einops
import torch

from workbench.models.hooked_model import model_lock
from workbench.models.hooked_transformer import is_hooked_transformer, watch_passes
from workbench.models.sites import check_per_token
from workbench.steering.edits import AddVector, at_least_float32, moved
from workbench.steering.gates import Gate, combined
from workbench.steering.interventions import Intervention, check_interventions, decayed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from workbench.models.hooked_model import HookedModel
    from workbench.models.sites import Site

    Share = Float[Tensor, "1 pos 1"] | None
    """Share of its strength that an intervention has at each column; None for all of it."""


@dataclass(frozen=True, eq=False)
class GateState:
    """Hold what a gate has read of each row of a batch.

    Attributes:
        scores: One per category; a running mean while a stepwise gate goes on reading.
        opening: How far the gate is open.
    """

    scores: Float[Tensor, "batch category"]
    opening: Float[Tensor, "batch category"]

    def rows(self, keep: Tensor) -> GateState:
        """Select some rows of the batch."""
        keep = keep.to(self.scores.device)
        return GateState(self.scores[keep], self.opening[keep])


@dataclass
class Steering:
    """Follow the forward passes inside ``intervene``: how often sites are reached, and where.

    Attributes:
        fired: Calls of each site's hook.
        prompt_length: Columns of the batch that belong to the prompt; None until the first forward
            pass has told.
        reached: Sites with the kinds of positions that at least one column had.
        gates: What each gate has read so far.
        content: True at the user's words, for the prompt's columns; None where nobody said.
        past: Columns before this pass, which a cache holds.
        new: Columns of this pass.
        mask: False at this pass's padding; None where there is none, or one column only.
        last: Tokens of the last pass without a cache, to see that the next one continues them.
    """

    fired: dict[Site, int] = field(default_factory=dict)
    prompt_length: int | None = None
    reached: set[tuple[Site, str]] = field(default_factory=set)
    gates: dict[Any, GateState] = field(default_factory=dict)
    content: Bool[Tensor, "batch prompt"] | None = None
    past: int = 0
    new: int = 0
    mask: Bool[Tensor, "batch pos"] | None = None
    last: Tensor | None = None

    def see(
        self, tokens: Tensor, past: int, mask: Bool[Tensor, "batch pos"] | None, *, fixed: bool
    ) -> None:
        """Take note of a forward pass that begins, and of where its prompt ends.

        Args:
            tokens: What the model is given.
            past: Columns that its cache holds.
            mask: Attention mask over past and new columns, where there is one.
            fixed: Whether the prompt's length was given and is not to be read off.
        """
        self.new, self.past = tokens.shape[1], past
        self.mask = None
        if mask is not None and mask.ndim == 2 and self.new > 1:
            self.mask = mask[:, -self.new :].bool()
        # Several columns are prompt, behind a cached prefix too. Without a cache, decoding runs all
        # columns again with one token more.
        grown = past == 0 and self.last is not None and torch.equal(tokens[:, :-1], self.last)
        if not fixed and not grown and (past == 0 or self.new > 1):
            self.prompt_length = past + self.new
        self.last = tokens if past == 0 else None

    @property
    def n_prompt(self) -> int:
        """Columns of this pass that are prompt, the first ones."""
        end = self.past + self.new if self.prompt_length is None else self.prompt_length
        return min(max(end - self.past, 0), self.new)

    def selected(
        self, positions: str, activation: Tensor, until: int | None = None
    ) -> Bool[Tensor, "batch pos"] | bool:
        """Select the columns of this pass that a kind of positions means.

        Args:
            positions: "all", "prompt" or "generated".
            activation: What the hook was given.
            until: Generated tokens after which no column is meant; None for no end.

        Returns:
            A mask, or True for all columns and False for none of them.

        Raises:
            RuntimeError: If the activation has other columns than the model was given.
        """
        end = self.new if self.prompt_length is None else self.prompt_length
        n_prompt = self.n_prompt
        if activation.shape[1] != self.new:
            raise RuntimeError(
                f"an activation has {activation.shape[1]} positions where the model was given "
                f"{self.new}."
            )
        # No column: this pass has none of the kind, or all come after the end.
        if (positions == "generated" and n_prompt == self.new) or (
            positions == "prompt" and n_prompt == 0
        ):
            return False
        n_open = self.new if until is None else min(max(end + until - self.past, 0), self.new)
        if n_open == 0:
            return False
        # Every column: no mask is needed, unless there is padding.
        everything = n_open == self.new and (
            positions == "all" or n_prompt == (0 if positions == "generated" else self.new)
        )
        if everything and self.mask is None:
            return True
        columns = (
            torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
            if self.mask is None
            else self.mask.to(activation.device)
        )
        if not everything:
            place = torch.arange(self.new, device=activation.device)
            if positions != "all":
                columns = columns & ((place < n_prompt) == (positions == "prompt"))
            columns = columns & (place < n_open)
        return columns

    def share(self, intervention: Intervention, device: torch.device) -> Share:
        """Compute an intervention's share of its strength at this pass's columns; None for all."""
        if intervention.decay == "none":
            return None
        end = self.past + self.new if self.prompt_length is None else self.prompt_length
        places = torch.arange(self.new, device=device, dtype=torch.float32)
        steps = (places + (self.past - end)).clamp(min=0)
        return decayed(intervention.decay, intervention.until, steps)[None, :, None]

    def read(
        self, activation: Float[Tensor, "batch pos d"], span: str
    ) -> Float[Tensor, "batch d"] | None:
        """Pool what a gate reads in this pass; None where the pass has nothing of the prompt.

        Args:
            activation: What the hook at the gate's site was given.
            span: "content": the mean over the user's words. "last": the prompt's last token.

        Raises:
            ValueError: If the user's words are wanted and nobody said where they are.
        """
        n_prompt = self.n_prompt
        if n_prompt == 0:
            return None
        if span == "last":
            if self.mask is None:
                return activation[:, n_prompt - 1]
            columns = torch.arange(n_prompt, device=activation.device)
            last = (self.mask[:, :n_prompt].to(activation.device) * columns).argmax(dim=1)
            return activation[torch.arange(len(activation), device=activation.device), last]
        if self.content is None:
            raise ValueError(
                "this gate reads the user's words: say which columns they are with "
                "intervene(content=...), or fit it with span='last'."
            )
        wide = at_least_float32(activation[:, :n_prompt])  # in 16 bit a long sum loses its words
        inside = self.content[:, self.past : self.past + n_prompt].to(wide)
        total = einops.einsum(inside, wide, "batch pos, batch pos d -> batch d")
        return total / inside.sum(dim=1, keepdim=True).clamp(min=1)

    def behind_template(self) -> Bool[Tensor, "batch pos"] | None:
        """Mark this pass's columns from the user's first word on; None for all, or if unknown."""
        if self.content is None or self.n_prompt == 0:
            return None
        begun = self.content.cumsum(dim=1)[:, self.past : self.past + self.n_prompt] > 0
        return torch.cat([begun, begun.new_ones(len(begun), self.new - self.n_prompt)], dim=1)


@contextmanager
def intervene(
    model: HookedModel,
    interventions: Iterable[Intervention],
    *,
    prompt_length: int | None = None,
    content: Bool[Tensor, "batch prompt"] | None = None,
    gates: Mapping[Gate, GateState] | None = None,
    transfer: bool = False,
) -> Iterator[Steering]:
    """Change the model's computation inside the block, and nowhere else.

    Works under any way of running the model: the call itself, its own generate, a KV cache, left or
    right padding (told by the attention mask). Several interventions at one site are applied in
    their order. One thread at a time: another one that runs the model by this package's functions
    waits until the block ends.

    Args:
        model: A hooked model.
        interventions: What to change; several rows of a batch may have their own
            (``Intervention.for_rows``).
        prompt_length: Columns of the batch that belong to the prompt. By default the first pass is
            the prompt (and those of several columns that continue it) and what comes after it,
            token by token, is generated.
        content: True at the user's words, in the prompt's columns: what gates with span "content"
            read.
        gates: What gates have read of these rows before, where the prompt was run in another such
            block.
        transfer: Allow vectors that were measured on another model of the same architecture.

    Yields:
        A ``Steering`` that counts.

    Raises:
        ValueError: If a site does not exist, a width is wrong, or a vector belongs to another
            model.
        RuntimeError: At the end, if a site was never reached, or none of the positions (without
            ``prompt_length``): then nothing was steered.
    """
    interventions = list(interventions)
    check_interventions(model, interventions, transfer=transfer)
    sites = dict.fromkeys((intervention.site for intervention in interventions), 0)
    steering = Steering(sites, prompt_length, gates=dict(gates or {}), content=content)
    fixed = prompt_length is not None
    hooks = _hooks(interventions, steering)
    with ExitStack() as stack:
        stack.enter_context(model_lock(model))
        if hooks:
            for handle in _watch(model, steering, fixed):
                stack.callback(handle.remove)
            stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield steering
    _check_reached(interventions, steering, fixed)


def _watch(model: HookedModel, steering: Steering, fixed: bool) -> Iterator[RemovableHandle]:
    """Set hooks that tell ``steering`` of each forward pass before it runs."""
    if is_hooked_transformer(model):
        yield from watch_passes(model, partial(steering.see, fixed=fixed))
        return

    def before_forward(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = (keywords.get("input_ids"), keywords.get("inputs_embeds"), *args)
        tokens = next(x for x in given if x is not None)
        cache = keywords.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        steering.see(tokens, past, keywords.get("attention_mask"), fixed=fixed)

    runner: Any = getattr(model, "original_model", model)
    yield runner.register_forward_pre_hook(before_forward, with_kwargs=True)


def _hooks(interventions: Sequence[Intervention], steering: Steering) -> list[Any]:
    """Make the hooks of a block, by hook name: gates read first, then sites are edited."""

    def gate_hook_of(gate: Gate) -> Callable[..., None]:
        def hook(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 - passed by its name
            check_per_token(activation, gate.site.hook_name)
            _read(gate, activation, steering)

        return hook

    def hook_of(site: Site, apply: Callable[[Tensor, Steering], Tensor]) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - passed by its name
            check_per_token(activation, site.hook_name)
            steering.fired[site] += 1
            return apply(activation.flatten(2), steering).view_as(activation)

        return hook

    by_site: dict[Site, list[Intervention]] = {}
    for intervention in interventions:
        by_site.setdefault(intervention.site, []).append(intervention)
    watched = dict.fromkeys(one.gate for one in interventions if one.gate is not None)
    hooks: list[Any] = [(gate.site.hook_name, gate_hook_of(gate)) for gate in watched]
    hooks += [(site.hook_name, hook_of(site, compiled(here))) for site, here in by_site.items()]
    return hooks


def _check_reached(interventions: Sequence[Intervention], steering: Steering, fixed: bool) -> None:
    """Raise where an intervention of a finished block changed nothing."""
    silent = [site for site, count in steering.fired.items() if count == 0]
    if silent:
        raise RuntimeError(
            f"intervention at {silent[0].hook_name} never fired: the model was not run inside "
            "intervene()."
        )
    for intervention in interventions:
        if not fixed and (intervention.site, intervention.positions) not in steering.reached:
            raise RuntimeError(
                f"intervention at {intervention.site.hook_name} changed nothing: inside "
                f"intervene() there were no positions {intervention.positions!r}; generate more "
                "tokens, or say where the prompt ends with prompt_length."
            )


def _read(gate: Gate, activation: Float[Tensor, "batch pos d"], steering: Steering) -> None:
    """Let a gate read this pass: the prompt once, and every new token if it is stepwise."""
    pooled = steering.read(activation, gate.span)
    if pooled is not None:
        scores = gate.scores(pooled)
        steering.gates[gate] = GateState(scores, gate.opening(scores))
    elif gate not in steering.gates:
        raise RuntimeError(
            "a gate has not seen the prompt: run it inside intervene(), or hand over gates=."
        )
    elif gate.form == "stepwise":
        before = steering.gates[gate]
        scores = gate.memory * before.scores + (1 - gate.memory) * gate.scores(activation[:, -1])
        steering.gates[gate] = GateState(scores, gate.opening(scores, before.opening))


def compiled(interventions: Sequence[Intervention]) -> Callable[[Tensor, Steering], Tensor]:
    """Make one function of all interventions at a site, in their order.

    Additions that come to the same together become one addition of a row-wise matrix.
    """
    groups: list[list[Intervention]] = []
    for intervention in interventions:
        group = _group_to_join(groups, intervention)
        if group is None:
            groups.append([intervention])
        else:
            group.append(intervention)
    appliers = [(group[0], _applier(group)) for group in groups]

    def apply(activation: Tensor, steering: Steering) -> Tensor:
        for first, edit in appliers:
            columns = steering.selected(first.positions, activation, first.until)
            if columns is False:
                continue
            steering.reached.add((first.site, first.positions))
            if first.gate is not None and (behind := steering.behind_template()) is not None:
                behind = behind.to(activation.device)
                columns = behind if columns is True else columns & behind
            edited = edit(activation, steering, steering.share(first, activation.device))
            activation = (
                edited if columns is True else torch.where(columns[..., None], edited, activation)
            )
        return activation

    return apply


def _group_to_join(
    groups: Sequence[list[Intervention]], one: Intervention
) -> list[Intervention] | None:
    """Find the group of additions that another one may become a part of; None for a new group.

    Vectors that are added one after the other are a sum, so neighbors become one. Where the norm
    is kept after each addition they are none: such an addition joins one of other rows, or of
    another category behind the same gate, which adds up what it lets through.
    """
    if not isinstance(one.edit, AddVector):
        return None
    if not one.edit.keep_norm:
        return groups[-1] if groups and _are_alike(groups[-1][0], one) else None
    joined = None
    for group in reversed(groups):
        apart = [_have_other_rows(other, one) for other in group]
        may_join = _are_alike(group[0], one) and all(
            is_apart or (one.gate is not None and other.gate_category != one.gate_category)
            for is_apart, other in zip(apart, group, strict=True)
        )
        joined = group if may_join else joined
        if not all(apart):
            break
    return joined


def _are_alike(one: Intervention, other: Intervention) -> bool:
    """Tell whether two interventions add vectors in one way, at the same positions, together."""
    if not isinstance(one.edit, AddVector) or not isinstance(other.edit, AddVector):
        return False
    ways = [(x.positions, x.until, x.decay, x.gate) for x in (one, other)]
    return ways[0] == ways[1] and one.edit.keep_norm == other.edit.keep_norm


def _have_other_rows(one: Intervention, other: Intervention) -> bool:
    """Tell whether two interventions share no row of the batch."""
    if one.rows is None or other.rows is None:
        return False
    return set(one.rows).isdisjoint(other.rows)


def _applier(group: Sequence[Intervention]) -> Callable[[Tensor, Steering, Share], Tensor]:
    """Make what a group of interventions does to an activation, behind its gate if it has one."""
    gate, adds = group[0].gate, isinstance(group[0].edit, AddVector)
    if gate is not None:
        return _gated_adder(group, gate) if adds else _gated_editor(group[0], gate)
    plain = _adder(group) if adds else _editor(group[0])
    return lambda activation, _, share: plain(activation, share)


def _adder(group: Sequence[Intervention]) -> Callable[[Tensor, Share], Tensor]:
    """Add the group's vectors, row by row; summed once per batch size, device and dtype.

    Vectors stay float32 until they have been added, so that 16 bit round once.
    """
    sums: dict[tuple[Any, ...], Tensor] = {}
    everyone = all(intervention.rows is None for intervention in group)
    keep_norm = _keeps_norm(group)

    def add(activation: Tensor, share: Share) -> Tensor:
        n_rows, wide = activation.shape[0], at_least_float32(activation)
        key = (1 if everyone else n_rows, wide.device, wide.dtype)
        if key not in sums:
            total = torch.zeros(key[0], wide.shape[-1], dtype=torch.float32)
            for intervention in group:
                total[_places(intervention, n_rows)] += _scaled_vector(intervention)
            sums[key] = total[:, None].to(wide)
        addition = sums[key] if share is None else share * sums[key]
        return moved(activation, addition, keep_norm=keep_norm)

    return add


def _gated_adder(
    group: Sequence[Intervention], gate: Gate
) -> Callable[[Tensor, Steering, Share], Tensor]:
    """Add each row's open categories' vectors; a closed row stays bit for bit what it was."""
    by_category: dict[tuple[Any, ...], Tensor] = {}
    keep_norm = _keeps_norm(group)

    def add(activation: Tensor, steering: Steering, share: Share) -> Tensor:
        n_rows = activation.shape[0]
        key = (n_rows, activation.device)
        if key not in by_category:
            vectors = torch.zeros(n_rows, len(gate.categories), activation.shape[-1])
            for intervention in group:
                category = gate.index(intervention.gate_category)
                vectors[_places(intervention, n_rows), category] += _scaled_vector(intervention)
            by_category[key] = vectors.to(activation.device)
        opening = steering.gates[gate].opening.to(activation.device)
        total = combined(opening, by_category[key], gate.several)[:, None]
        addition = total if share is None else share * total
        edited = moved(activation, addition, keep_norm=keep_norm)
        return torch.where((opening > 0).any(dim=1)[:, None, None], edited, activation)

    return add


def _editor(intervention: Intervention) -> Callable[[Tensor, Share], Tensor]:
    """Make an edit that checks its result's shape and keeps to the intervention's rows.

    Where it has a share of its strength it goes that share of its way.
    """

    def edit(activation: Tensor, share: Share) -> Tensor:
        edited = intervention.edit(activation)
        if edited.shape != activation.shape:
            raise RuntimeError(
                f"the edit at {intervention.site} returned shape {tuple(edited.shape)} for "
                f"{tuple(activation.shape)}."
            )
        if share is not None:
            wide = at_least_float32(activation)
            edited = wide + share * (edited - wide)
        edited = edited.to(activation.dtype)
        if intervention.rows is None:
            return edited
        member = torch.zeros(activation.shape[0], dtype=torch.bool, device=activation.device)
        member[_places(intervention, activation.shape[0])] = True
        return torch.where(member[:, None, None], edited, activation)

    return edit


def _gated_editor(
    intervention: Intervention, gate: Gate
) -> Callable[[Tensor, Steering, Share], Tensor]:
    """Make an edit that goes as far as the gate is open; a closed row stays bit for bit."""
    edit, category = _editor(intervention), gate.index(intervention.gate_category)

    def apply(activation: Tensor, steering: Steering, share: Share) -> Tensor:
        wide = at_least_float32(activation)
        opening = steering.gates[gate].opening[:, category][:, None, None].to(wide)
        edited = (wide + opening * (edit(activation, share) - wide)).to(activation)
        return torch.where(opening > 0, edited, activation)

    return apply


def _keeps_norm(group: Sequence[Intervention]) -> bool:
    return any(isinstance(one.edit, AddVector) and one.edit.keep_norm for one in group)


def _scaled_vector(intervention: Intervention) -> Float[Tensor, " d"]:
    edit = intervention.edit
    return edit.multiplier * edit.vector.float().cpu()  # type: ignore[union-attr]


def _places(intervention: Intervention, n_rows: int) -> slice | list[int]:
    """Index the rows of the batch that an intervention applies to."""
    if intervention.rows is None:
        return slice(None)
    outside = [row for row in intervention.rows if not 0 <= row < n_rows]
    if outside:
        raise ValueError(
            f"an intervention names row {outside[0]} of a batch of {n_rows} rows (0-{n_rows - 1})."
        )
    return list(intervention.rows)
