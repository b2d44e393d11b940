"""Say what this project uses of a hooked model, so that any model that has it will do.

``TransformerBridge`` (TransformerLens 3.8 to 4.x) and ``HookedTransformer`` (3.x) both fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

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
