"""Say what this project uses of a hooked model, so that any model that has it will do.

``TransformerBridge`` (TransformerLens 3.8 to 4.x) and ``HookedTransformer`` (3.x) both fit.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import nn


class ModelConfig(Protocol):
    """The sizes of a hooked model, as its ``cfg`` holds them."""

    n_layers: int
    """Number of blocks."""

    d_model: int
    """Width of the residual stream."""

    d_mlp: Any
    """Neurons per layer; TransformerLens lets it be None for models without an MLP."""

    n_heads: int
    """Attention heads per layer."""

    d_head: int
    """Width of one head."""

    n_ctx: int
    """Tokens that the context holds; 0 where no limit is known."""

    model_name: str
    """What results call the model."""


class HookedModel(Protocol):
    """A causal language model whose activations can be read and edited through hook points."""

    tokenizer: Any
    """The Hugging Face tokenizer."""

    blocks: Any
    """The blocks in order, each with ``mlp.W_out``, ``attn.W_O`` and its norms."""

    unembed: Any
    """The unembedding, with its matrix ``W_U``."""

    ln_final: Any
    """The norm before the unembedding."""

    @property
    def cfg(self) -> ModelConfig:
        """Sizes and name; TransformerLens's own holds more."""

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook points by name."""

    def hooks(self, fwd_hooks: list[Any] = ...) -> AbstractContextManager[Any]:
        """Set hooks, pairs of a hook point's name and a function, for the length of a block."""

    def modules(self) -> Iterator[nn.Module]:
        """Give every module of the model."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give every weight."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Run the model: logits, and the key-value cache where it is asked for."""


def hugging_face_model(model: HookedModel) -> Any | None:
    """Give the Hugging Face model inside a ``TransformerBridge``; None for another model."""
    return getattr(model, "original_model", None)


def input_device(model: HookedModel) -> torch.device:
    """Say where tokens and masks go: to the device of the embedding.

    The layers may lie on several devices (``load_model(device_map=...)``); what is added to an
    activation follows the activation's own device.
    """
    embedding = getattr(hugging_face_model(model), "get_input_embeddings", lambda: None)()
    weight = next(iter((embedding or model).parameters()))
    if weight.device.type != "meta":
        return torch.device(weight.device)
    # Weights that wait on disk are brought to the device on which their module runs.
    hooks = (getattr(part, "_hf_hook", None) for part in (embedding or model).modules())
    places = [getattr(hook, "execution_device", None) for hook in hooks]
    return torch.device(next((place for place in places if place is not None), "cpu"))


def quantization(config: Any) -> str | None:
    """Say how weights are packed, by a Hugging Face configuration; None where they are not."""
    packed = getattr(config, "quantization_config", None)
    if packed is None:
        return None
    values = packed if isinstance(packed, dict) else packed.to_dict()
    method = values.get("quant_method") or "unknown method"
    name = str(getattr(method, "value", method))
    ways = {4: values.get("load_in_4bit"), 8: values.get("load_in_8bit")}
    bits = next((bits for bits, is_so in ways.items() if is_so), values.get("bits"))
    return f"{name} {bits}-bit" if bits else name


_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


_LOCKS_LOCK = threading.Lock()


def model_lock(model: HookedModel) -> threading.RLock:
    """Give the lock of a model, for the time that hooks are set on it or a pass is under way.

    Hooks belong to the model, not to a thread: without it, the hooks of one thread would read and
    change the batches of another. The same thread may take it again.
    """
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def check_hooked(model: Any) -> None:
    """Raise unless something is a hooked model.

    Raises:
        TypeError: If it is a path, or a model without hook points.
    """
    if not hasattr(model, "hook_dict") or not hasattr(model, "cfg"):
        raise TypeError(
            f"a hooked model is needed, got {type(model).__name__}; wb.load_model makes one of a "
            "name, a folder or a .gguf file."
        )


def hook_points(model: HookedModel) -> Mapping[str, Any]:
    """List a model's hook points by name, aliases included.

    It waits for a pass of another thread, which has some of them out of the way.
    """
    with model_lock(model):
        return model.hook_dict


def vocabulary_width(model: HookedModel) -> int:
    """Count the logits of a token: entries of the unembedding, which may pass the tokenizer's."""
    config: Any = getattr(hugging_face_model(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    n_words = getattr(config, "vocab_size", None) or getattr(model.cfg, "d_vocab", None)
    return int(n_words or len(model.tokenizer))
