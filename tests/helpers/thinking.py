"""Tiny models that think before they answer, with marks and templates of several kinds."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny_models import tiny_model

_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
SWITCH = (
    _TURNS + "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Qwen 3's way: the model opens its thoughts itself, and a keyword ends them before they begin."""
OPENED = _TURNS + "{{ '<think>\n' }}{% endif %}"
"""The template opens the thoughts, and nothing switches them off."""
EFFORT = (
    "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
"""Harmony: channels, and an effort."""
_HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>"]


def thinking_model(folder: str | Path, template: str = SWITCH) -> Path:
    """Save a tiny Qwen 3 whose vocabulary has the marks of a template; return its folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model("qwen3", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if template == EFFORT:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": _HARMONY, "eos_token": "<|return|>"}
        )
        ends = ["<|return|>", "<|endoftext|>"]
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    else:
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
