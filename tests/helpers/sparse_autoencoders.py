"""Tiny sparse autoencoders, in the files of sae-lens and of Gemma Scope."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
VECTORS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


def random_tensors(architecture: str, d: int, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw the weights of an SAE of ``n`` features."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": draw(d, n) / d**0.5, "W_dec": draw(n, d), "b_dec": draw(d) / 4}
    tensors |= {name: draw(n) / 4 for name in VECTORS[architecture]}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    return tensors


def write_sae_lens(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write a folder as sae-lens 6 does."""
    n, d = tensors["W_dec"].shape
    hook = config.pop("hook_name", "blocks.1.hook_resid_post")
    whole = {
        "d_in": d,
        "d_sae": n,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": hook},
        "architecture": "standard",
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(whole))
    save_file({name: value.contiguous() for name, value in tensors.items()}, _weights(folder))
    return folder


def write_gemma_scope(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a folder as Gemma Scope has it: params.npz alone."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in tensors.items()})
    return folder


def _weights(folder: Path) -> Path:
    return folder / "sae_weights.safetensors"
