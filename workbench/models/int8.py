"""Keep the weights of linear layers as whole numbers of eight bits, for the processor.

Each row of a weight is divided by a scale of its own and rounded, which is all that is lost: inputs
and sums stay in the model's data type. It takes a quarter of float32's memory, and so of the time
that reading weights takes, and needs no package beside torch. It is for where exactness is not
asked. The scale of a row is its largest absolute value over 127, as in Dettmers et al. (2022,
arXiv:2208.07339), who quantise the inputs too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.models.memory import drop_pages

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


METHOD = "int8 weights"
"""What results call this quantisation."""


ROWS = 32
"""Largest number of rows for torch's own product with eight bits; for more, weights are unpacked
once, which then costs less than it spares."""


STEP = 32
"""Inputs of that product must be a multiple of it: torch reads beyond the end of others."""


LARGEST = 127
"""Whole numbers go from minus this to this."""


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept in eight bits.

    Attributes:
        weight: Whole numbers, (out, in).
        scale: What one of them stands for, row by row.
        bias: As in the layer it was made of.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values = linear.weight.detach().float()
        scale = values.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        whole = (values / scale[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*row in"]) -> Float[Tensor, "*row out"]:
        """Multiply by the weight that the whole numbers and their scales stand for."""
        scale: Tensor = self.scale.to(x.dtype)  # type: ignore[assignment]
        rows = x.reshape(-1, self.in_features)
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        fits = 0 < len(rows) <= ROWS and self.in_features % STEP == 0
        if x.device.type == "cpu" and fits and not wants_gradient:
            product = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, scale)
        else:
            product = torch.nn.functional.linear(rows, self.weight.to(x.dtype)) * scale
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*x.shape[:-1], self.out_features)


def quantize_linears(hf_model: Any) -> int:
    """Put an ``Int8Linear`` in the place of every linear layer but the unembedding.

    The unembedding stays as it is, as bitsandbytes leaves it: an error in it is an error of every
    logit. Layers are replaced one after the other, so that no second copy of the model is made.
    The configuration says that weights are quantised, and so do results.

    Args:
        hf_model: A Hugging Face model on the processor.

    Returns:
        Layers that were replaced.

    Raises:
        ValueError: If it has no linear layer beside the unembedding.
    """
    head = hf_model.get_output_embeddings()
    linears = [
        (holder, name, layer)
        for holder in list(hf_model.modules())
        for name, layer in list(holder.named_children())
        if type(layer) is nn.Linear and layer is not head
    ]
    if not linears:
        raise ValueError(
            f"a {type(hf_model).__name__} has no linear layers to quantise; leave out quantize."
        )
    while linears:
        holder, name, layer = linears.pop()
        setattr(holder, name, Int8Linear(layer))
        drop_pages(layer.weight)  # mapped with others that stay
        del layer
    hf_model.config.quantization_config = {"quant_method": METHOD}
    return sum(isinstance(module, Int8Linear) for module in hf_model.modules())
