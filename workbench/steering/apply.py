"""Positions: which columns of a forward pass are prompt, which are generated, and so which of them an intervention means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from workbench.models.sites import Site

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from workbench.steering.gates import Gate, combined
from workbench.steering.interventions import AddVector, Intervention, check_interventions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from workbench.models.load import HookedModel
    from workbench.models.sites import Site


@dataclass(frozen=True, eq=False)
class GateState:
    """What a gate has read of each row of a batch.

    Attributes:
        scores: One a category; a running mean while a stepwise gate goes on reading.
        opening: How far it is open.
    """

    scores: Float[Tensor, "batch category"]
    opening: Float[Tensor, "batch category"]

    def rows(self, keep: Tensor) -> GateState:
        """The same for some rows of the batch."""
        return GateState(self.scores[keep], self.opening[keep])


@dataclass
class Steering:
    """What ``intervene`` yields: how often each site was reached, and where the prompt ends.

    Attributes:
        fired: Calls of each site's hook.
        prompt_length: Columns of the batch that belong to the prompt; None until the first forward pass has told.
        reached: Sites with the kinds of positions that at least one column had.
        gates: What each gate has read so far.
        content: True at the user's words, for the prompt's columns; None where nobody said.
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
        """Take note of a forward pass that begins: its lengths say which columns are prompt and which are generated."""
        self.new, self.past = tokens.shape[1], past
        self.mask = (
            mask[:, -self.new :].bool()
            if mask is not None and mask.ndim == 2 and self.new > 1
            else None
        )
        # Several columns are prompt, behind a cached prefix too. Without a cache, decoding runs all again with one token more.
        grown = past == 0 and self.last is not None and torch.equal(tokens[:, :-1], self.last)
        if not fixed and not grown and (past == 0 or self.new > 1):
            self.prompt_length = past + self.new
        self.last = tokens if past == 0 else None

    def selected(
        self, positions: str, activation: Tensor, until: int | None = None
    ) -> Bool[Tensor, "batch pos"] | bool:
        """Which columns of this pass a kind of positions means: a mask, or True for all and False for none of them.

        Args:
            positions: "all", "prompt" or "generated".
            activation: What the hook was given.
            until: Generated tokens after which no column is meant; None for no end.
        """
        end = self.new if self.prompt_length is None else self.prompt_length
        n_prompt = self.n_prompt
        if activation.shape[1] != self.new:
            raise RuntimeError(
                f"an activation has {activation.shape[1]} positions where the model was given {self.new}."
            )
        if (positions == "generated" and n_prompt == self.new) or (
            positions == "prompt" and n_prompt == 0
        ):
            return False
        n_open = self.new if until is None else min(max(end + until - self.past, 0), self.new)
        if n_open == 0:
            return False
        everything = n_open == self.new and (
            positions == "all" or n_prompt == (0 if positions == "generated" else self.new)
        )
        if everything and self.mask is None:
            return True
        chosen = (
            torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
            if self.mask is None
            else self.mask
        )
        if not everything:
            columns = torch.arange(self.new, device=activation.device)
            if positions != "all":
                chosen = chosen & ((columns < n_prompt) == (positions == "prompt"))
            chosen = chosen & (columns < n_open)
        return chosen

    @property
    def n_prompt(self) -> int:
        """Columns of this pass that are prompt, the first ones."""
        end = self.past + self.new if self.prompt_length is None else self.prompt_length
        return min(max(end - self.past, 0), self.new)

    def read(
        self, activation: Float[Tensor, "batch pos d"], span: str
    ) -> Float[Tensor, "batch d"] | None:
        """What a gate reads in this pass: the mean over the user's words, or the prompt's last token; None behind the prompt.

        Raises:
            ValueError: If the user's words are wanted and nobody said where they are.
        """
        n = self.n_prompt
        if n == 0:
            return None
        if span == "last":
            if self.mask is None:
                return activation[:, n - 1]
            columns = torch.arange(n, device=activation.device)
            last = (self.mask[:, :n] * columns).argmax(dim=1)
            return activation[torch.arange(len(activation), device=activation.device), last]
        if self.content is None:
            raise ValueError(
                "this gate reads the user's words: say which columns they are with intervene(content=...), or fit it with span='last'."
            )
        inside = self.content[:, self.past : self.past + n].to(activation.dtype)
        total = torch.einsum("bp,bpd->bd", inside, activation[:, :n])
        return total / inside.sum(dim=1, keepdim=True).clamp(min=1)

    def behind_template(self) -> Bool[Tensor, "batch pos"] | None:
        """Columns of this pass from the user's first word on, where it is known which these are and some are not."""
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

    Works under any way of running the model: the call itself, its own generate, a KV cache, left or right padding (told by the
    attention mask). Several interventions at one site are applied in their order.

    Args:
        model: A hooked model.
        interventions: What to change; several rows of a batch may have their own (``Intervention.for_rows``).
        prompt_length: Columns of the batch that belong to the prompt. By default the first pass is the prompt (and those of several
            columns that continue it) and what comes after it, token by token, is generated.
        content: True at the user's words, in the prompt's columns: what gates with span "content" read.
        gates: What gates have read of these rows before, where the prompt was run in another such block.
        transfer: Allow vectors that were measured on another model of the same architecture.

    Yields:
        A ``Steering`` that counts.

    Raises:
        ValueError: If a site does not exist, a width is wrong, or a vector belongs to another model.
        RuntimeError: At the end, if a site was never reached, or none of the positions (without ``prompt_length``): then nothing was
            steered.
    """
    interventions = list(interventions)
    check_interventions(model, interventions, transfer=transfer)
    by_site: dict[Site, list[Intervention]] = {}
    for intervention in interventions:
        by_site.setdefault(intervention.site, []).append(intervention)
    steering = Steering(
        dict.fromkeys(by_site, 0), prompt_length, gates=dict(gates or {}), content=content
    )
    fixed = prompt_length is not None

    def before_forward(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tokens = next(
            x
            for x in (keywords.get("input_ids"), keywords.get("inputs_embeds"), *args)
            if x is not None
        )
        cache = keywords.get("past_key_values", keywords.get("past_kv_cache"))
        past = (
            0
            if cache is None
            else int(cache.get_seq_length())
            if hasattr(cache, "get_seq_length")
            else int(cache[0].past_keys.shape[1])
        )
        steering.see(tokens, past, keywords.get("attention_mask"), fixed=fixed)

    def hook_of(site: Site, apply: Callable[[Tensor, Steering], Tensor]) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - TransformerLens passes it by name
            steering.fired[site] += 1
            return apply(activation.flatten(2), steering).view_as(activation)

        return hook

    def gate_hook_of(gate: Gate) -> Callable[..., None]:
        def hook(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 - TransformerLens passes it by name
            _read(gate, activation, steering)

        return hook

    watched = dict.fromkeys(one.gate for one in interventions if one.gate is not None)
    hooks: list[Any] = [(gate.site.hook_name, gate_hook_of(gate)) for gate in watched]
    hooks += [(site.hook_name, hook_of(site, _compile(own))) for site, own in by_site.items()]
    with ExitStack() as stack:
        if hooks:
            runner: Any = getattr(model, "original_model", model)
            handle = runner.register_forward_pre_hook(before_forward, with_kwargs=True)
            stack.callback(handle.remove)
            stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield steering
    silent = [site for site, count in steering.fired.items() if count == 0]
    if silent:
        raise RuntimeError(
            f"intervention at {silent[0].hook_name} never fired: the model was not run inside intervene()."
        )
    for intervention in interventions:
        if not fixed and (intervention.site, intervention.positions) not in steering.reached:
            raise RuntimeError(
                f"intervention at {intervention.site.hook_name} changed nothing: inside intervene() there were no positions "
                f"{intervention.positions!r}; generate more tokens, or say where the prompt ends with prompt_length."
            )


def _compile(interventions: Sequence[Intervention]) -> Callable[[Tensor, Steering], Tensor]:
    """One function for all interventions at a site. Vectors added at the same positions become one addition of a row-wise matrix."""
    groups: list[list[Intervention]] = []
    for intervention in interventions:
        last = groups[-1][-1] if groups else None
        if (
            last
            and isinstance(last.edit, AddVector)
            and isinstance(intervention.edit, AddVector)
            and (last.positions, last.until, last.gate)
            == (intervention.positions, intervention.until, intervention.gate)
        ):
            groups[-1].append(intervention)
        else:
            groups.append([intervention])
    appliers = [(group[0], _applier(group)) for group in groups]

    def apply(activation: Tensor, steering: Steering) -> Tensor:
        for first, edit in appliers:
            chosen = steering.selected(first.positions, activation, first.until)
            if chosen is False:
                continue
            steering.reached.add((first.site, first.positions))
            if first.gate is not None and (behind := steering.behind_template()) is not None:
                chosen = behind if chosen is True else chosen & behind
            edited = edit(activation, steering)
            activation = (
                edited if chosen is True else torch.where(chosen[..., None], edited, activation)
            )
        return activation

    return apply


def _applier(group: Sequence[Intervention]) -> Callable[[Tensor, Steering], Tensor]:
    """What a group of interventions does to an activation, gate or no gate."""
    gate, adds = group[0].gate, isinstance(group[0].edit, AddVector)
    if gate is None:
        plain = _adder(group) if adds else _editor(group[0])
        return lambda activation, _: plain(activation)
    return _gated_adder(group, gate) if adds else _gated_editor(group[0], gate)


def _read(gate: Gate, activation: Float[Tensor, "batch pos d"], steering: Steering) -> None:
    """Let a gate read this pass: the prompt once, and then, if it is stepwise, every new token."""
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


def _gated_adder(group: Sequence[Intervention], gate: Gate) -> Callable[[Tensor, Steering], Tensor]:
    """Each row's open categories' vectors; a row whose gate is closed stays bit for bit what it was."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def add(activation: Tensor, steering: Steering) -> Tensor:
        n_rows = activation.shape[0]
        key = (n_rows, activation.device)
        if key not in made:
            vectors = torch.zeros(n_rows, len(gate.categories), activation.shape[-1])
            for intervention in group:
                edit = intervention.edit
                rows = (
                    slice(None)
                    if intervention.rows is None
                    else _checked_rows(intervention.rows, n_rows)
                )
                own = edit.multiplier * edit.vector.float().cpu()  # type: ignore[union-attr]
                vectors[rows, gate.index(intervention.gate_category)] += own
            made[key] = vectors.to(activation.device)
        opening = steering.gates[gate].opening
        total = combined(opening, made[key], gate.several)[:, None].to(activation)
        return torch.where((opening > 0).any(dim=1)[:, None, None], activation + total, activation)

    return add


def _gated_editor(intervention: Intervention, gate: Gate) -> Callable[[Tensor, Steering], Tensor]:
    edit, place = _editor(intervention), gate.index(intervention.gate_category)

    def apply(activation: Tensor, steering: Steering) -> Tensor:
        opening = steering.gates[gate].opening[:, place][:, None, None].to(activation)
        return torch.where(
            opening > 0, activation + opening * (edit(activation) - activation), activation
        )

    return apply


def _adder(group: Sequence[Intervention]) -> Callable[[Tensor], Tensor]:
    """Sum of the group's vectors, row by row; made once for a batch size, device and dtype."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def add(activation: Tensor) -> Tensor:
        n_rows = activation.shape[0]
        everyone = all(intervention.rows is None for intervention in group)
        key = (1 if everyone else n_rows, activation.device, activation.dtype)
        if key not in made:
            total = torch.zeros(key[0], activation.shape[-1], dtype=torch.float32)
            for intervention in group:
                edit = intervention.edit
                rows = (
                    slice(None)
                    if intervention.rows is None
                    else _checked_rows(intervention.rows, n_rows)
                )
                total[rows] += edit.multiplier * edit.vector.float().cpu()  # type: ignore[union-attr]
            made[key] = total[:, None].to(activation)
        return activation + made[key]

    return add


def _editor(intervention: Intervention) -> Callable[[Tensor], Tensor]:
    def edit(activation: Tensor) -> Tensor:
        edited = intervention.edit(activation)
        if edited.shape != activation.shape:
            raise RuntimeError(
                f"the edit at {intervention.site} returned shape {tuple(edited.shape)} for {tuple(activation.shape)}."
            )
        edited = edited.to(activation.dtype)
        if intervention.rows is None:
            return edited
        member = torch.zeros(activation.shape[0], dtype=torch.bool, device=activation.device)
        member[_checked_rows(intervention.rows, activation.shape[0])] = True
        return torch.where(member[:, None, None], edited, activation)

    return edit


def _checked_rows(rows: tuple[int, ...], n_rows: int) -> list[int]:
    outside = [row for row in rows if not 0 <= row < n_rows]
    if outside:
        raise ValueError(
            f"an intervention names row {outside[0]} of a batch of {n_rows} rows (0-{n_rows - 1})."
        )
    return list(rows)
