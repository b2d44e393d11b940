"""Measure what steering costs in vLLM: tokens a second with no vector, one, and one per request.

    .venv-vllm/bin/python benchmarks/vllm_steering.py
    .venv-vllm/bin/python benchmarks/vllm_steering.py --model qwen2.5-coder-0.5b --requests 64
    python benchmarks/vllm_steering.py --model BIG --shell --dtype bfloat16 --tensor-parallel 4

The last line is for a model on GPUs, of which no weights are loaded beside vLLM's.
One engine answers the same prompts in every case, and every answer has the same number of tokens,
so that nothing but the steering differs. Cases take turns, and the table gives the median of their
rounds and the ratio to the plain requests of the same round, which name no vector.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

import workbench as wb
from workbench.engines._vllm_worker import TAG
from workbench.engines._wire import pack
from workbench.engines.vllm import VLLMEngine, open_vllm
from workbench.models.shell import load_shell
from workbench.steering.edits import AddVector

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    options = arguments()
    if options.shell:
        model = load_shell(options.model, dtype=options.dtype)
    else:
        model = wb.load_model(options.model, dtype=options.dtype)
    engine = open_vllm(
        options.model,
        model,
        tensor_parallel_size=options.tensor_parallel,
        max_model_len=options.max_model_len,
        max_num_seqs=options.requests,
    )
    prompts = prompts_of(engine, options.requests)
    cases = cases_of(engine, options.requests)
    tokens = options.requests * options.tokens
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, tags in cases.items():
            seconds = timed(engine, prompts, tags, options.tokens)
            if number:
                rates[name].append(tokens / seconds)
    print(
        f"\n{options.model}, {options.dtype}, {options.requests} requests x {options.tokens} tokens"
    )
    print("| requests | tokens/s | of plain (per round) |")
    print("|---|---|---|")
    for name, measured in rates.items():
        ratios = [a / b for a, b in zip(measured, rates["plain"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"| {name} | {statistics.median(measured):.0f} | "
            f"{statistics.median(ratios):.2f} ({spread}) |"
        )
    engine.close()


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="what load_model takes")
    parser.add_argument("--shell", action="store_true", help="load no weights beside vLLM's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def prompts_of(engine: VLLMEngine, n: int) -> list[tuple[int, ...]]:
    """Encode so many of the project's neutral prompts."""
    neutral = wb.select_prompts(wb.load_prompts(), label="neutral")
    chosen = (neutral * (1 + n // len(neutral)))[:n]
    return [row.ids for prompt in chosen for row in wb.models.encode(engine.model, [prompt])]


def cases_of(engine: VLLMEngine, n: int) -> dict[str, list[dict[str, Any] | None]]:
    """Say for each case what every request names: no plan, one for all, or one of its own."""
    layers, width = engine.model.cfg.n_layers, engine.model.cfg.d_model
    generator = torch.Generator().manual_seed(0)
    middle = wb.Site(layers // 2, "resid_post")

    def adds(site: wb.Site) -> wb.Intervention:
        return wb.Intervention(site, AddVector(torch.randn(width, generator=generator), 0.05))

    plans = {f"one {i}": [adds(middle)] for i in range(n)}
    plans |= {
        f"four {i}": [adds(wb.Site(layers * k // 5, "resid_post")) for k in range(1, 5)]
        for i in range(n)
    }
    plans |= {
        f"odd {i}": [wb.Intervention(middle, plans[f"one {i}"][0].edit, positions="generated")]
        for i in range(n)
    }
    engine.llm.collective_rpc("workbench_plans", args=(pack(plans),))
    return {
        "plain": [None] * n,
        "one vector for all": [{"plan": "one 0"}] * n,
        "a vector of its own each": [{"plan": f"one {i}"} for i in range(n)],
        "the same, at four layers": [{"plan": f"four {i}"} for i in range(n)],
        "the same, generated tokens alone": [{"plan": f"odd {i}"} for i in range(n)],
    }


def timed(
    engine: VLLMEngine,
    prompts: Sequence[Sequence[int]],
    tags: Sequence[dict[str, Any] | None],
    n_tokens: int,
) -> float:
    """Answer all prompts with exactly so many tokens, and give the seconds."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=0.0,
            max_tokens=n_tokens,
            min_tokens=n_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if tag is None else {TAG: tag},
        )
        for tag in tags
    ]
    given: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
    start = time.perf_counter()
    engine.llm.generate(given, parameters, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
