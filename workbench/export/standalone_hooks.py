"""Steer a transformers model through forward hooks: vectors inside, torch alone is needed.

Written by ``workbench export pytorch``, which puts the vectors into ``PLACES``. Load the model that
``MODEL`` names, and steer it inside a block::

    model = transformers.AutoModelForCausalLM.from_pretrained(...)
    with steering(model):
        model.generate(...)

``add_hooks(model)`` does the same until the handles that it returns are removed. Every token of
every prompt and answer is steered.
"""

import base64
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]

MODEL: dict = {}
"""What the vectors were measured on: name, dtype and number of blocks."""

PLACES: list = []
"""Per place: the module, whether its output or its input is changed, and the steps in order."""


@contextmanager
def steering(model: nn.Module, strength: float = 1.0) -> Iterator[nn.Module]:
    """Steer a model inside the block; ``strength`` multiplies what is added, 0 adds nothing."""
    handles = add_hooks(model, strength)
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def add_hooks(model: nn.Module, strength: float = 1.0) -> list[Any]:
    """Set the hooks on a transformers model and return their handles, each with ``remove()``."""
    modules, handles = dict(model.named_modules()), []
    missing = [place["module"] for place in PLACES if place["module"] not in modules]
    if missing:
        raise ValueError(f"this model has no module {missing[0]!r}; it is made for {MODEL}.")
    for place in PLACES:
        steps = [_step(values, strength) for values in place["steps"]]
        module = modules[place["module"]]
        if place["side"] == "output":
            handles.append(module.register_forward_hook(_after(steps)))
        else:
            handles.append(module.register_forward_pre_hook(_before(steps), with_kwargs=True))
    return handles


def _after(steps: list[Step]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_changed(output[0], steps), *output[1:])
        return _changed(output, steps)

    return hook


def _before(steps: list[Step]) -> Callable[..., Any]:
    def hook(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
        if inputs:
            return (_changed(inputs[0], steps), *inputs[1:]), keywords
        return inputs, {**keywords, "hidden_states": _changed(keywords["hidden_states"], steps)}

    return hook


def _changed(activation: Tensor, steps: list[Step]) -> Tensor:
    """Make the steps one after the other, each in float32 and rounded once."""
    for step in steps:
        wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
        activation = step(wide).to(activation.dtype)
    return activation


def _step(values: dict[str, Any], strength: float) -> Step:
    """Make one change of an activation of what the file says about it."""
    data = base64.b64decode(values["vector"])
    numbers = torch.tensor(struct.unpack(f"<{len(data) // 4}f", data))

    def add(wide: Tensor) -> Tensor:
        return wide + strength * numbers.to(wide.device)

    def add_and_keep_norm(wide: Tensor) -> Tensor:
        if strength == 0:
            return wide
        moved = add(wide)
        norm = moved.norm(dim=-1, keepdim=True)
        return torch.where(norm > 0, moved * (wide.norm(dim=-1, keepdim=True) / norm), 0.0)

    def to_target(wide: Tensor) -> Tensor:
        unit = numbers.to(wide.device)
        missing = values["target"] - wide @ unit
        if values["step"] == "raise":
            missing = missing.clamp(min=0)
        return wide + strength * missing[..., None] * unit

    return {"add": add, "keep_norm": add_and_keep_norm}.get(values["step"], to_target)
