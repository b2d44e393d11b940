"""Make tiny random checkpoints in which something is missing that most models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.tiny_models import D_MODEL, tiny_model, tiny_tokenizer


def _sizes(family: str) -> tuple[Any, dict[str, Any]]:
    """Return a family's tokenizer, and settings that many configurations share."""
    tokenizer = tiny_tokenizer(family)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return tokenizer, {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **{name: getattr(tokenizer, name) for name in names},
    }


def _save(config: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Save a model of a configuration with random weights that are large enough to matter."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    scale = 1.0 if "embed" in name else 1.2 / min(parameter.shape) ** 0.5
                    parameter.copy_(torch.randn(parameter.shape) * scale)
                elif parameter.ndim == 3:  # experts, one matrix each
                    parameter.copy_(torch.randn(parameter.shape) * 1.2 / 32**0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_mixtral(folder: str | Path) -> Path:
    """Save a mixture of experts: its MLPs have no neurons that all tokens share."""
    import transformers

    tokenizer, sizes = _sizes("mistral")
    config = transformers.MixtralConfig(
        **sizes,
        intermediate_size=64,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    return _save(config, tokenizer, folder)


def layer_norm_behind_mlp(folder: str | Path) -> Any:
    """Load a tiny Gemma 2 with a LayerNorm in place of the RMS norm behind each MLP."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from workbench.models.load import hooked

    source = tiny_model("gemma2", folder)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    for layer in model.model.layers:
        layer.post_feedforward_layernorm = torch.nn.LayerNorm(D_MODEL)
    return hooked(model, AutoTokenizer.from_pretrained(source), "layer-norm-behind")
