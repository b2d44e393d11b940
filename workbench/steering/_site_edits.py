"""Turn the interventions of one site into one function of the activation there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from workbench.steering.edits import AddVector, at_least_float32, moved
from workbench.steering.gates import combined

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from workbench.steering.apply import Steering
    from workbench.steering.gates import Gate
    from workbench.steering.interventions import Intervention


Share: TypeAlias = "Float[Tensor, '#batch pos 1'] | None"
"""Share of its strength that an intervention has at each column; None for all of it."""


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
