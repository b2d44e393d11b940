"""Write tiny GGUF files, as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.tiny_models import tiny_tokenizer


def write_gguf(source: Path, path: Path, *, quantized: bool = False, skip: str = "") -> Path:
    """Write a tiny Llama as a GGUF file, in llama.cpp's order of rotary dimensions.

    Args:
        source: Folder of the tiny Llama 2.
        path: The file.
        quantized: Store matrices as Q8_0 blocks and the embedding in 16 bit.
        skip: A tensor that is left out.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = tiny_tokenizer("llama2")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    _write_header(writer, config, tokenizer)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {
        f"self_attn.{a}_proj": f"attn_{b}"
        for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
    }
    parts |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    for name, tensor in model.state_dict().items():
        name, values = name.removesuffix(".weight"), tensor.numpy()
        if name not in names:
            _, _, layer, part = name.split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                halves = values.reshape(config.num_attention_heads, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape).copy()
            name = f"blk.{layer}.{parts[part]}"
        name = f"{names.get(name, name)}.weight"
        if name == skip:
            continue
        kind = None
        if quantized and values.ndim == 2:
            is_embedding = name == "token_embd.weight"
            kind = gguf.GGMLQuantizationType.F16 if is_embedding else gguf.GGMLQuantizationType.Q8_0
            values = gguf.quantize(values, kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_header(writer: Any, config: Any, tokenizer: Any) -> None:
    """Write sizes, vocabulary and chat template."""
    own = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(own["vocab"], key=own["vocab"].__getitem__)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types(
        [3 if i < 2 else 1 for i in range(len(words))]
    )  # the first two are <s> and </s>
    writer.add_token_merges([" ".join(merge) for merge in own["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(tokenizer.chat_template)
