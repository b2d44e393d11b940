"""Edits: what is done to an activation, as frozen functions of a tensor. They know nothing of models, rows or positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class AddVector:
    """Add ``multiplier * vector``."""

    vector: Float[Tensor, " d"]
    multiplier: float = 1.0

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation moved by the vector."""
        return activation + (self.multiplier * self.vector).to(activation)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.vector)


@dataclass(frozen=True, eq=False)
class AblateDirection:
    """Set the projection on a unit direction to ``target`` (0: the activation no longer says anything along it)."""

    direction: Float[Tensor, " d"]
    target: float = 0.0

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation with the projection replaced."""
        u = self.direction.to(activation)
        return activation + (self.target - activation @ u)[..., None] * u

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.direction)


@dataclass(frozen=True, eq=False)
class RaiseTo:
    """Raise the projection on a unit direction to ``target``; an activation that is there already or beyond stays as it is."""

    direction: Float[Tensor, " d"]
    target: float

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation with the missing part of the projection added."""
        u = self.direction.to(activation)
        return activation + (self.target - activation @ u).clamp(min=0)[..., None] * u

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
        """The activation with these neurons scaled."""
        factors = torch.ones(activation.shape[-1], device=activation.device, dtype=activation.dtype)
        factors[list(self.neurons)] = self.factor
        return activation * factors

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
        """The activation with these neurons set."""
        index = torch.tensor(self.neurons, device=activation.device, dtype=torch.long)
        return activation.index_copy(-1, index, self.values.to(activation).expand(*activation.shape[:-1], -1))

    @property
    def width(self) -> int:
        """Least width of the activations it fits."""
        return max(self.neurons, default=-1) + 1


Edit = AddVector | AblateDirection | RaiseTo | ScaleNeurons | ClampNeurons | Callable[[Tensor], Tensor]
