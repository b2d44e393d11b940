"""Let a key-value cache grow in place.

Decoding then appends to a buffer with spare columns, where transformers copies all it holds for
every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from workbench.models.forward import SPARE_COLUMNS

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer: the filled part of buffers that hold spare columns.

    Whatever transformers puts in their place (other rows, fewer tokens) is no longer a part of the
    buffers and is copied into new ones.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        self.__dict__.update(layer.__dict__)
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # gradients need what was there before
            return super().update(key_states, value_states, *args, **keywords)
        filled: tuple[Any, Any] = self.keys, self.values
        start, end = filled[0].shape[-2], filled[0].shape[-2] + key_states.shape[-2]
        if self.buffers is None or not all(map(_begins, self.buffers, filled, (end, end))):
            self.buffers = _with_spare_columns(filled[0], end), _with_spare_columns(filled[1], end)
        keys, values = self.buffers
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values


def grow_in_place(cache: Any) -> None:
    """Give the filled layers of a transformers cache buffers to grow in.

    Sliding windows and other kinds of layer stay as they are.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = _GrowingLayer(layer)


def _begins(buffer: Tensor, filled: Tensor, end: int) -> bool:
    """Tell whether a tensor is the first part of a buffer that reaches up to column ``end``."""
    same_memory = buffer.data_ptr() == filled.data_ptr() and buffer.stride() == filled.stride()
    return same_memory and len(buffer) == len(filled) and end <= buffer.shape[-2]


def _with_spare_columns(
    filled: Float[Tensor, "batch head pos d_head"], end: int
) -> Float[Tensor, "batch head pos_and_spare d_head"]:
    """Copy a tensor into a buffer that reaches ``SPARE_COLUMNS`` beyond column ``end``."""
    batch, heads, start, d_head = filled.shape
    buffer = filled.new_empty(batch, heads, end + SPARE_COLUMNS, d_head)
    buffer[..., :start, :] = filled
    return buffer
