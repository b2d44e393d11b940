"""Choose the data type that ``load_model(dtype="auto")`` reads a model in.

A processor with AMX or AVX512-BF16 multiplies 16 bit numbers several times as fast as 32 bit ones;
on another it is slower. So for a large model it is measured on this machine, with products of the
model's own shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.hooked_model import quantization
from workbench.models.packing import LEAST_GAIN, ROWS, known_gain
from workbench.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from workbench.models.packing import Products


LARGE = 1_000_000_000
"""Weights from which a model on the processor is read in the data type that is faster."""


@dataclass(frozen=True)
class Precision:
    """A data type for a model's weights, and why.

    Attributes:
        dtype: The data type; None is the checkpoint's own.
        reason: In a few words.
        gain: Time of the float32 product over that of the bfloat16 one; nan where it was not
            measured.
    """

    dtype: torch.dtype | None
    reason: str
    gain: float = math.nan


def choose_precision(config: Any, *, on_processor: bool) -> Precision:
    """Choose the data type of a model whose user left it open.

    On a GPU, for a quantised checkpoint and for a model of less than ``LARGE`` weights it is the
    checkpoint's own. A larger one on the processor is read in bfloat16 where that product is faster
    by ``LEAST_GAIN``, else in float32. The measurement is kept in the user's cache folder.

    Args:
        config: Configuration of the checkpoint, from transformers.
        on_processor: Whether all its weights go to the processor.
    """
    if not on_processor:
        return Precision(None, "the checkpoint's own: not on the processor alone")
    if quantization(config) is not None:
        return Precision(None, "the checkpoint's own: it is quantised")
    n_weights = count_weights(config)
    if n_weights < LARGE:
        return Precision(None, f"the checkpoint's own: {n_weights / 1e6:.0f} million weights")
    shape = _shape_of_mlp(config)
    gain = known_gain(["bfloat16", *shape], lambda: _products(*shape))
    faster = gain >= LEAST_GAIN
    return Precision(
        torch.bfloat16 if faster else torch.float32,
        f"its product takes {gain:.2f} times as long in float32 as in bfloat16 here",
        gain,
    )


def count_weights(config: Any) -> int:
    """Count the weights of a model by its configuration; none is made."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_transformers():
        shell: Any = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in shell.parameters())


def _shape_of_mlp(config: Any) -> tuple[int, int]:
    """Give the widths between which most of a model's products go."""
    text = config.get_text_config(decoder=True)
    width = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None) or 4 * width
    return width, int(inner)


def _products(width: int, inner: int) -> dict[int, list[Products]]:
    """Make a product in float32 and in bfloat16, for many rows and for few."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(inner, width, generator=generator)
    rough = exact.bfloat16()

    def pair(rows: int) -> Products:
        x = torch.randn(rows, width, generator=generator)
        short = x.bfloat16()
        linear = torch.nn.functional.linear
        return lambda: linear(x, exact), lambda: linear(short, rough)

    return {rows: [pair(rows)] for rows in ROWS}
