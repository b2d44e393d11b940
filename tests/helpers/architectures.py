"""Build a tiny random model of any architecture that TransformerLens lists, and try it.

Sizes are set by the names that configurations give them, so that no architecture needs an entry of
its own, but for the few that would otherwise refuse their sizes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from helpers.tiny_models import sentences, tiny_tokenizer
from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.sites import Site
from workbench.models.tokens import encode, stop_ids
from workbench.neurons.attribution import class_difference, direct_attribution, writing_sites
from workbench.neurons.splits import writing_activations
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import AddVector, Intervention

LAYERS = 4
NEW_TOKENS = 8
MOST_WEIGHTS = 20_000_000
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("head_dim", "kv_channels"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    "hidden_size_per_layer_input": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 32,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "word_embed_proj_dim": 32,
    "index_head_dim": 8,
    "index_n_heads": 16,
    "index_topk": 16,
    "n_groups": 1,
    "rotary_dim": 4,
    "tie_word_embeddings": False,
    "use_mamba_kernels": False,
    "first_k_dense_replace": 1,
}
_MIXED = ["conv", "full_attention"] * 2
_EYES = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_OF_CONFIG: dict[str, dict[str, Any]] = {
    "BambaConfig": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
    "Gemma3Config": {"vision_config": _EYES, "mm_tokens_per_image": 4},
    "GraniteMoeHybridConfig": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "Lfm2Config": {"layer_types": _MIXED},
    "Lfm2MoeConfig": {"layer_types": _MIXED},
    "Mamba2Config": {"num_heads": 8},
    "ModernBertDecoderConfig": {"bos_token_id": 0},
    "Zamba2Config": {
        "layer_types": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 8,
    },
}
"""What single configurations need beside the sizes."""


def listed_architectures() -> list[str]:
    """Give the names that TransformerLens lists, sorted."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return sorted(SUPPORTED_ARCHITECTURES)


def tiny_architecture(name: str, *, seed: int = 0) -> tuple[Any, Any]:
    """Build a random model of an architecture, and its tokenizer.

    Raises:
        LookupError: If this transformers has no causal language model of that name.
    """
    import transformers

    # Some are spelt otherwise by the checkpoints (MPT, PhiMoE).
    spelt = {one.lower(): one for one in dir(transformers)}.get(name.lower(), name)
    kind = getattr(transformers, spelt, None)
    config_kind = getattr(kind, "config_class", None)
    if config_kind is None:
        raise LookupError("transformers has no such class; its code comes with a checkpoint")
    loaded = transformers.AutoModelForCausalLM._model_mapping.get(config_kind, None)
    if loaded is None or loaded.__name__ != spelt:
        raise LookupError("transformers loads no causal language model under that name")
    tokenizer = copy.deepcopy(tiny_tokenizer("qwen2"))
    config = _tiny_config(config_kind, tokenizer)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in kind(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights whatever sizes are set")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    _randomize(model, seed)
    model.config.architectures = [name]
    return model.eval(), tokenizer


def _tiny_config(kind: Any, tokenizer: Any) -> Any:
    """Set every size that a configuration has a name for."""
    default = kind()
    known = {**vars(default), **dict.fromkeys(getattr(default, "attribute_map", {}))}
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["bos_token_id"] = None
    if "kv_lora_rank" in known:  # such attention has no groups
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if "vocab_size_per_layer_input" in known:
        sizes["vocab_size_per_layer_input"] = len(tokenizer)
    settings = sizes | {"vocab_size": len(tokenizer), **ids}
    for name, part in getattr(kind, "sub_configs", {}).items():
        if part is not kind and hasattr(part, "sub_configs"):
            settings[name] = _tiny_config(part, tokenizer).to_dict()
    return kind(**settings | _OF_CONFIG.get(kind.__name__, {}))


def _randomize(model: nn.Module, seed: int) -> None:
    """Make matrices large enough to matter; what is no plain matrix stays as it is."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Embedding):
                weight.copy_(torch.randn(weight.shape, generator=generator))
            elif isinstance(module, nn.Linear | Conv1D):
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * 1.2 / min(weight.shape) ** 0.5)


def questions() -> list[Prompt]:
    """Give six prompts of three lengths, two classes."""
    return [
        Prompt(str(i), text * (1 + i % 3), None, "fraud", "unsafe" if i % 2 else "safe", "t")
        for i, text in enumerate(sentences(6))
    ]


def activation_error(model: Any, alone: Any, prompts: list[Prompt]) -> float:
    """Compare the residual stream behind every block with what Hugging Face's blocks return.

    Args:
        model: The hooked model.
        alone: The same model in Hugging Face's hands: no padding, no cache.
        prompts: What both read.
    """
    sites = [Site(layer, "resid_post") for layer in range(model.cfg.n_layers)]
    cached = cache_activations(model, prompts, sites)
    largest = 0.0
    states: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(_blocks(model, alone)):
        block.register_forward_hook(
            lambda _module, _args, out, layer=layer: states.update(
                {layer: out[0] if isinstance(out, tuple) else out}
            )
        )
    for row, encoded in enumerate(encode(model, prompts)):
        with torch.no_grad():
            alone(torch.tensor([encoded.ids]), use_cache=False)
        for site in sites:
            expected = states[site.layer][0, slice(*encoded.content)].mean(dim=0)
            found = cached[site].values[row]
            largest = max(largest, float((found - expected).norm() / expected.norm()))
    return largest


def answers_are_equal(
    model: Any, alone: Any, prompts: list[Prompt], vector: torch.Tensor | None = None
) -> bool:
    """Compare answers of a batch with those of each prompt alone, and with Hugging Face's."""
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    steered = [Intervention(Site(1, "resid_post"), AddVector(vector))] if vector is not None else []
    together = generate(model, prompts, steered, decoding)
    singly = [generate(model, [prompt], steered, decoding)[0] for prompt in prompts]
    for encoded, one, other in zip(encode(model, prompts), together, singly, strict=True):
        if not one.tokens == other.tokens == _greedy(alone, encoded.ids, stop_ids(model)):
            return False
    return True


def _greedy(alone: Any, prompt: tuple[int, ...], stops: frozenset[int]) -> tuple[int, ...]:
    """Write the likeliest tokens by running the whole text again for each of them."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS:
        with torch.no_grad():
            logits = alone(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if int(logits.argmax()) in stops:
            break
        ids.append(int(logits.argmax()))
    return tuple(ids[len(prompt) :])


def steered_answers_are_equal(model: Any, alone: Any, prompts: list[Prompt]) -> bool:
    """Compare steered answers with those of Hugging Face's model with a hook of its own.

    A zero vector must change nothing.
    """
    width = model.cfg.d_model
    vector = 3 * torch.randn(width, generator=torch.Generator().manual_seed(1))
    if not answers_are_equal(model, alone, prompts, torch.zeros(width)):
        return False

    def add(_module: Any, _args: Any, out: Any) -> Any:
        return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    handle = _blocks(model, alone)[1].register_forward_hook(add)
    try:
        return answers_are_equal(model, alone, prompts, vector)
    finally:
        handle.remove()


def _blocks(model: Any, alone: Any) -> nn.ModuleList:
    """Find the list of blocks that text runs through; what sees or hears has one too."""
    lists = [
        module
        for module in alone.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.cfg.n_layers
    ]
    ran: list[nn.ModuleList] = []
    handles = [
        blocks[0].register_forward_hook(lambda *_, blocks=blocks: ran.append(blocks))
        for blocks in lists
    ]
    with torch.no_grad():
        alone(torch.tensor([[7, 8, 9]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return ran[0]


def attribution_error(model: Any, prompts: list[Prompt]) -> float:
    """Attribute a difference to heads and neurons; return what the parts miss."""
    site = Site(2, "resid_post")
    cached = cache_activations(model, prompts, [site, *writing_sites(model, site)])
    written = writing_activations(model, cached, site)
    difference = class_difference(written, prompts[1::2], prompts[::2])
    return direct_attribution(model, site, difference[site], difference).error
