"""Build TransformerLens 3.x's ``HookedTransformer`` of a checkpoint on disk, as its users do.

``HookedTransformer.from_pretrained`` knows hub names only, so what it does step by step is done
here with a folder. TransformerLens 4 has no such class: tests of it are skipped there.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any


def exists() -> bool:
    """Tell whether the installed TransformerLens has a HookedTransformer."""
    return version("transformer-lens").startswith("3.")


REASON = "TransformerLens 4 has no HookedTransformer; make test-tl3 runs this with 3.x"


_BY_NAME: dict[str, dict[str, Any]] = {
    "Olmo2ForCausalLM": {},
    "Gemma2ForCausalLM": {
        "act_fn": "gelu_pytorch_tanh",
        "use_attn_scale": True,
        "attn_scale": 4.0,
        "use_local_attn": True,
        "attn_types": ["local", "global"] * 2,
        "window_size": 32,
        "attn_scores_soft_cap": 50.0,
        "output_logits_soft_cap": 30.0,
        "use_normalization_before_and_after": True,
        "rotary_base": 10000.0,
        "d_head": 16,
        "rotary_dim": 16,
    },
}
"""Settings of families whose sizes TransformerLens 3 knows by their published names only; other
settings are those of a Llama."""


def hooked_transformer(folder: str | Path, *, processed: bool = False, **config: Any) -> Any:
    """Load a checkpoint as a HookedTransformer.

    Args:
        folder: A checkpoint in Hugging Face's format.
        processed: As ``HookedTransformer.from_pretrained``: layer norms folded, weights centred.
            Otherwise as ``from_pretrained_no_processing``.
        config: Entries of the HookedTransformerConfig to set.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        # TransformerLens guesses the architecture from some names, so the folder gets another one.
        path = Path(parent) / "checkpoint"
        path.mkdir()
        written = json.loads((Path(folder) / "config.json").read_text())
        # Published GPT-2 checkpoints have the older name of their context too.
        written.setdefault("n_ctx", written.get("n_positions"))
        [architecture] = written["architectures"]
        if architecture in _BY_NAME:
            config = {"original_architecture": architecture, **_BY_NAME[architecture], **config}
            written |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
            written |= {"hidden_act": "silu"}
        (path / "config.json").write_text(json.dumps(written))
        cfg = loading.get_pretrained_model_config(
            str(path), hf_cfg=hf_model.config.to_dict(), device="cpu", fold_ln=processed
        )
        for name, value in {"model_name": Path(folder).name, **config}.items():
            setattr(cfg, name, value)
        state = loading.get_pretrained_state_dict(str(path), cfg, hf_model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    rms = str(cfg.normalization_type).startswith("RMS")
    model.load_and_process_state_dict(
        state,
        fold_ln=processed,
        center_writing_weights=processed and not rms,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return model
