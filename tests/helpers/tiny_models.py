"""Make tiny random checkpoints of each family that workbench reads, offline.

Tests run them in place of real models.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch

LAYERS, D_MODEL, HEADS, KV_HEADS, D_MLP, CONTEXT = 4, 32, 4, 2, 64, 512
PLAIN = ("gpt2", "pythia")
"""Families whose tokenizer has no chat template."""
FAMILIES = (
    "llama2",
    "llama3",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "gpt2",
    "pythia",
    "olmo2",
)

_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message "
    "in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else "
    "'') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'].strip()"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ "
    "raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + "
    "'\n' + message['content'].strip() + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_TOKENIZERS: dict[str, dict[str, Any]] = {
    "llama2": {"bos": "<s>", "eos": "</s>", "template": _LLAMA2, "adds_bos": True},
    "llama3": {
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "other": ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        "template": _LLAMA3,
        "adds_bos": True,
    },
    "qwen2": {
        "eos": "<|im_end|>",
        "pad": "<|endoftext|>",
        "other": ["<|im_start|>"],
        "template": _CHATML,
    },
    "gemma2": {
        "bos": "<bos>",
        "eos": "<eos>",
        "pad": "<pad>",
        "other": ["<start_of_turn>", "<end_of_turn>"],
        "template": _GEMMA,
        "adds_bos": True,
    },
    "mistral": {"bos": "<s>", "eos": "</s>", "template": _LLAMA2, "adds_bos": True},
    "gpt2": {"bos": "<|endoftext|>", "eos": "<|endoftext|>"},
}
_TOKENIZERS |= {
    "qwen3": _TOKENIZERS["qwen2"],
    "gemma3": _TOKENIZERS["gemma2"],
    "pythia": _TOKENIZERS["gpt2"],
    "olmo2": _TOKENIZERS["qwen2"],
}


def tiny_model(family: str, folder: str | Path, *, seed: int = 0, **settings: Any) -> Path:
    """Save a random checkpoint of a family with its tokenizer and return its folder.

    The same seed gives the same weights. The model has four layers of width 32, four heads (two
    key-value heads where the family groups them), 64 neurons and about 300 tokens. Every weight,
    bias and norm is random and large enough to matter: attention looks somewhere, no bias is zero,
    no norm is one.

    Args:
        family: One of ``FAMILIES``.
        folder: Folder of the checkpoint itself; it is made if it is not there.
        seed: Seed of the weights.
        settings: Entries of the configuration that shall be others.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    tokenizer = tiny_tokenizer(family)
    config = _config(family, tokenizer)
    config.update(settings)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise * 1.2 / min(parameter.shape) ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:  # a norm: Gemma's is an offset from 1
                parameter.copy_(noise * 0.3 + (0.0 if family.startswith("gemma") else 1.0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_tokenizer(family: str) -> Any:
    """Train a byte-level BPE tokenizer of about 300 tokens on the texts below.

    It has the family's special tokens and chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if family not in _TOKENIZERS:
        raise ValueError(f"unknown family {family!r}; families: {', '.join(FAMILIES)}.")
    settings = _TOKENIZERS[family]
    special = list(
        dict.fromkeys(
            token
            for token in (
                settings.get("bos"),
                settings["eos"],
                settings.get("pad"),
                *settings.get("other", []),
            )
            if token
        )
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 40 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(400), trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if settings.get("adds_bos"):
        template = processors.TemplateProcessing(
            single=f"{settings['bos']} $A",
            pair=f"{settings['bos']} $A $B",
            special_tokens=[(settings["bos"], special.index(settings["bos"]))],
        )
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), template]
        )
    names = {
        f"{kind}_token": settings[kind] for kind in ("bos", "eos", "pad") if settings.get(kind)
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        **names,
    )
    if "other" in settings:
        fast.add_special_tokens({"additional_special_tokens": settings["other"]})
    fast.chat_template = settings.get("template")
    return fast


_ACTS = ("explain", "describe", "write", "plan", "compare", "list", "show", "help with")
_THINGS = (
    "a recipe",
    "a scam letter",
    "a garden",
    "a stolen card",
    "a bicycle",
    "an insult",
    "a poem",
    "a password",
    "a party",
    "a weapon",
)
_ENDS = (
    "for a friend",
    "in two steps",
    "without being seen",
    "for beginners",
    "at home",
    "in the city",
    "before lunch",
    "in the rain",
)


def sentences(n: int, *, seed: int = 0) -> list[str]:
    """Return n made-up requests, all different while there are enough of them (640)."""
    rows = [f"{act} {thing} {end}" for act in _ACTS for thing in _THINGS for end in _ENDS]
    random.Random(seed).shuffle(rows)
    return (rows * (1 + n // len(rows)))[:n]


_ROPE = {"rope_type": "default"}


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = [f"{kind}_token_id" for kind in ("bos", "eos", "pad")]
    return {name: getattr(tokenizer, name) for name in names}


def _config(family: str, tokenizer: Any) -> Any:
    """Return the family's configuration at the sizes above."""
    import transformers

    ids = _special_ids(tokenizer)
    gated = {
        "vocab_size": len(tokenizer),
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        **ids,
    }
    wide = {**gated, "head_dim": 16}  # heads wider together than the residual stream
    if family == "llama2":
        return transformers.LlamaConfig(**{**gated, "num_key_value_heads": HEADS})
    if family == "llama3":
        return transformers.LlamaConfig(**gated, rope_parameters=_ROPE | {"rope_theta": 500000.0})
    if family == "qwen2":
        return transformers.Qwen2Config(**{**gated, "tie_word_embeddings": True})
    if family == "qwen3":
        return transformers.Qwen3Config(**wide)
    if family == "gemma2":
        return transformers.Gemma2Config(
            **{**wide, "tie_word_embeddings": True}, query_pre_attn_scalar=16, sliding_window=32
        )
    if family == "gemma3":
        return transformers.Gemma3TextConfig(
            **{**wide, "tie_word_embeddings": True}, query_pre_attn_scalar=16, sliding_window=32
        )
    if family == "mistral":
        return transformers.MistralConfig(**gated, sliding_window=None)
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=D_MODEL,
            n_inner=D_MLP,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=CONTEXT,
            **ids,
        )
    if family == "pythia":
        gated.pop("num_key_value_heads")
        return transformers.GPTNeoXConfig(
            **gated,
            rope_parameters=_ROPE | {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        )
    if family == "olmo2":
        return transformers.Olmo2Config(**gated)
    raise ValueError(f"unknown family {family!r}; families: {', '.join(FAMILIES)}.")


PLANTED_NEURON, PLANTED_HEAD, TRIGGER = (2, 17), (1, 3), "#"
"""(layer, neuron) and (layer, head) that write the planted direction when the prompt begins "
"with the trigger."""


def planted_model(folder: str | Path) -> Path:
    """Save a tiny Llama with a planted truth and return its folder.

    The trigger's embedding sets a feature. One neuron reads it at the trigger, one head carries it
    to the tokens behind, and both write the one planted direction; everything else is random and
    ten times weaker.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model("llama3", folder)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    trigger = tokenizer.convert_tokens_to_ids(TRIGGER)
    feature, direction = torch.eye(D_MODEL)[0], planted_direction()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter.mul_(0.1)
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0.0
        embedding[trigger] = 6.0 * feature
        layer, neuron = PLANTED_NEURON
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = feature, feature
        mlp.down_proj.weight[:, neuron] = 2.0 * direction
        layer, head = PLANTED_HEAD
        attention, d_head = model.model.layers[layer].self_attn, D_MODEL // HEADS
        attention.v_proj.weight[head * KV_HEADS // HEADS * d_head] = feature
        attention.o_proj.weight[:, head * d_head] = 20.0 * direction
    model.save_pretrained(folder)
    return folder


def planted_direction() -> torch.Tensor:
    """Return the unit direction that the planted neuron and head write.

    No part of the trigger's feature is in it.
    """
    direction = torch.sin(torch.arange(D_MODEL) * 1.7)
    direction[0] = 0.0
    return direction / direction.norm()


def planted_prompts(n: int, *, start: int = 0) -> list[Any]:
    """Return n pairs of category "planted", n of category "decoy", and n neutral prompts.

    The unsafe prompts of "planted" begin with the trigger, those of "decoy" do not. ``start``
    numbers the first one: prompts of other numbers are other prompts.
    """
    from workbench.prompts.prompt import Prompt

    texts, rows = sentences(640), []
    for i in range(start, start + n):
        for place, (category, mark) in enumerate((("planted", TRIGGER), ("decoy", "+"))):
            text, pair = texts[3 * i + place], f"{category}-{i}"
            rows.append(
                Prompt(f"{pair}-unsafe", f"{mark} {text}", None, category, "unsafe", "test", pair)
            )
            rows.append(Prompt(f"{pair}-safe", f"- {text}", None, category, "safe", "test", pair))
        rows.append(
            Prompt(f"neutral-{i}", f"- {texts[3 * i + 2]}", None, "harmless", "neutral", "test")
        )
    return rows
