"""The command ``workbench plan``: what a million prompts would cost, on named machines."""

from __future__ import annotations

import sys


def plan(
    *,
    model: str = "llama-3.1-70b",
    hardware: str = "nvidia-h100",
    product: float | None = None,
    bandwidth: float | None = None,
    memory: float | None = None,
    devices: int | None = None,
    prompts: int = 1_000_000,
    prompt_tokens: float = 20,
    prefix_tokens: float = 25,
    new_tokens: float = 64,
    conditions: int = 2,
    sites: int = 4,
    judge: str = "qwen2.5-1.5b",
    weight_bytes: float = 2,
    hours: float = 24,
    json: bool = False,
) -> None:
    """Estimate what caching, steered answers and judging cost; nothing is run.

    Args:
        model: a config.json, a folder that holds one, or a name such as llama-3.1-70b
        hardware: nvidia-l40s, nvidia-a100, nvidia-h100, nvidia-h200 (eight each) or two-cores
        product: measured operations a second of one device (default: half of its data sheet's)
        bandwidth: measured bytes a second from its memory (default: .7 of its data sheet's)
        memory: bytes of one device
        devices: devices of one machine
        prompts: number of prompts
        prompt_tokens: tokens of a prompt behind what all begin with
        prefix_tokens: tokens that all begin with
        new_tokens: tokens of an answer
        conditions: answers to each prompt
        sites: layers whose residual stream is cached, the last ones
        judge: the model that judges, given as --model is
        weight_bytes: bytes of a weight (4 float32, 2 bfloat16, 1 int8)
        hours: time in which all should be done
        json: print the numbers as JSON
    """
    from json import dumps

    from workbench.engines.plan import in_words, make_plan

    measured = {"product": product, "bandwidth": bandwidth, "memory": memory, "devices": devices}
    made = make_plan(
        model, hardware, measured=measured, judge=judge, n_sites=sites, hours=hours,
        prompts=prompts, prompt_tokens=prompt_tokens, prefix_tokens=prefix_tokens,
        new_tokens=new_tokens, conditions=conditions, weight_bytes=weight_bytes,
    )  # fmt: skip
    text = dumps(made.to_dict(), indent=1) if json else in_words(made)
    sys.stdout.write(text + "\n")
