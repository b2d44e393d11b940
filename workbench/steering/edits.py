"""Describe what is done to an activation: edits, frozen functions of a tensor.

An edit knows nothing of models, rows or positions. ``interventions`` says where and when one is
made, and ``apply`` makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def at_least_float32(activation: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Give an activation as edits compute with it: a 16 bit one in float32, others as they are.

    What an edit makes of it is rounded to the model's dtype once, at the end.
    """
    return activation.to(torch.promote_types(activation.dtype, torch.float32))


def moved(
    activation: Float[Tensor, "*batch d"], addition: Float[Tensor, "*#batch d"], *, keep_norm: bool
) -> Float[Tensor, "*batch d"]:
    """Add something to an activation, in float32 at least.

    Args:
        activation: What is moved, in residual-stream units.
        addition: What is added, in the same units.
        keep_norm: Whether each token's activation is scaled back to the L2 norm it had: its
            direction changes alone. Where nothing is added it stays as it is, bit for bit. What
            the addition cancels exactly has no direction left, and becomes 0.
    """
    wide = at_least_float32(activation)
    addition = addition.to(wide)
    after = wide + addition
    if keep_norm:
        norm_after = after.norm(dim=-1, keepdim=True)
        scale = wide.norm(dim=-1, keepdim=True) / norm_after
        scaled = torch.where(norm_after > 0, after * scale, 0.0)
        after = torch.where((addition != 0).any(dim=-1, keepdim=True), scaled, wide)
    return after.to(activation)


@dataclass(frozen=True, eq=False)
class AddVector:
    """Add ``multiplier * vector``; with ``keep_norm`` the activation is scaled to its old norm.

    Where the norm is kept only the direction of each token's activation changes.
    """

    vector: Float[Tensor, " d"]
    multiplier: float = 1.0
    keep_norm: bool = False

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Move the activation by the vector."""
        return moved(activation, self.multiplier * self.vector, keep_norm=self.keep_norm)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.vector)


@dataclass(frozen=True, eq=False)
class AblateDirection:
    """Set the projection on a unit direction to ``target``.

    At 0 the activation no longer says anything along the direction.
    """

    direction: Float[Tensor, " d"]
    target: float = 0.0

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Replace the projection."""
        wide = at_least_float32(activation)
        u = self.direction.to(wide)
        return (wide + (self.target - wide @ u)[..., None] * u).to(activation)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.direction)


@dataclass(frozen=True, eq=False)
class RaiseTo:
    """Raise the projection on a unit direction to ``target``.

    An activation that is there already or beyond stays as it is.
    """

    direction: Float[Tensor, " d"]
    target: float

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Add the missing part of the projection."""
        wide = at_least_float32(activation)
        u = self.direction.to(wide)
        return (wide + (self.target - wide @ u).clamp(min=0)[..., None] * u).to(activation)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.direction)


@dataclass(frozen=True, eq=False)
class ScaleNeurons:
    """Multiply the activations of some neurons; factor 0 silences them."""

    neurons: tuple[int, ...]
    factor: float

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Scale these neurons."""
        wide = at_least_float32(activation)
        factors = torch.ones(wide.shape[-1], device=wide.device, dtype=wide.dtype)
        factors[list(self.neurons)] = self.factor
        return (wide * factors).to(activation)

    @property
    def width(self) -> int:
        """Least width of the activations it fits."""
        return max(self.neurons, default=-1) + 1


@dataclass(frozen=True, eq=False)
class ClampNeurons:
    """Set some neurons to given values, for instance to their mean on safe prompts."""

    neurons: tuple[int, ...]
    values: Float[Tensor, " neuron"]

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Set these neurons."""
        index = torch.tensor(self.neurons, device=activation.device, dtype=torch.long)
        return activation.index_copy(
            -1, index, self.values.to(activation).expand(*activation.shape[:-1], -1)
        )

    @property
    def width(self) -> int:
        """Least width of the activations it fits."""
        return max(self.neurons, default=-1) + 1


Edit = (
    AddVector | AblateDirection | RaiseTo | ScaleNeurons | ClampNeurons | Callable[[Tensor], Tensor]
)
"""What is done to an activation: one of these, or any function of a tensor."""
