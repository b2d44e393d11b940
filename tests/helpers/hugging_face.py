"""Read activations from Hugging Face's own modules, to compare the hooked model with.

Prompts are read one at a time and without padding.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.sites import Site

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def plain_model(source: str | Path) -> Any:
    """Load a checkpoint by transformers, with the attention that TransformerLens computes."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()


def activations(model: Any, ids: Sequence[int]) -> dict[Site, torch.Tensor]:
    """Read every site of every layer, (pos, d): what blocks and their parts take and give."""
    got: dict[Site, torch.Tensor] = {}
    handles = []

    def read(module: Any, site: Site, *, entering: bool = False) -> None:
        def hook(_: Any, args: tuple, keywords: dict, out: Any) -> None:
            value = (args[0] if args else keywords["hidden_states"]) if entering else out
            got[site] = (value[0] if isinstance(value, tuple) else value).detach()[0].clone()

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    core = next(
        part
        for name in ("model", "transformer", "gpt_neox")
        if (part := getattr(model, name, None)) is not None
    )
    for layer, block in enumerate(first_of(core, "layers", "h")):
        attention, mlp = first_of(block, "self_attn", "attn", "attention"), block.mlp
        read(block, Site(layer, "resid_pre"), entering=True)
        read(block, Site(layer, "resid_post"))
        read(first_of(attention, "o_proj", "c_proj", "dense"), Site(layer, "z"), entering=True)
        read(
            first_of(mlp, "down_proj", "c_proj", "dense_4h_to_h"),
            Site(layer, "mlp_post"),
            entering=True,
        )
        # Gemma and OLMo 2 norm what attention and MLP add to the stream; others add it as it is.
        normed = hasattr(block, "post_feedforward_layernorm")
        read(block.post_attention_layernorm if normed else attention, Site(layer, "attn_out"))
        read(block.post_feedforward_layernorm if normed else mlp, Site(layer, "mlp_out"))
    with torch.no_grad():
        model(torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    # Pythia has attention and MLP side by side, and no stream between them.
    if not hasattr(core, "final_layer_norm"):
        for layer in range(len(first_of(core, "layers", "h"))):
            got[Site(layer, "resid_mid")] = (
                got[Site(layer, "resid_pre")] + got[Site(layer, "attn_out")]
            )
    return got


def first_of(module: Any, *names: str) -> Any:
    """Return the first of these parts that a module has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


@contextmanager
def calls_of(module: Any) -> Iterator[list[tuple[int, ...]]]:
    """Record the shapes of what a module is called with, one entry per call."""
    shapes: list[tuple[int, ...]] = []

    def count(_: Any, args: tuple, keywords: dict) -> None:
        value = (
            args[0] if args else next(v for v in keywords.values() if isinstance(v, torch.Tensor))
        )
        shapes.append(tuple(value.shape[:2]))

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()
