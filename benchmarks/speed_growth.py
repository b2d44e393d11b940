"""Measure how time and memory grow, each size in a process of its own.

    python benchmarks/speed_growth.py embedded 2 reading 200 32    # started by speed.py
    python benchmarks/speed_growth.py embedded 2 memory

The first reads streamed moments at all sites of 200 prompts of 32 tokens; the second loads, reads,
answers and sweeps, and says how much memory each took at most.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import torch
from speed_measure import say, timed

KINDS = ("attn_out", "resid_post", "mlp_post")


BY_PROMPTS = ((50, 0), (200, 0), (1000, 0), (5000, 0))
"""Numbers of the project's own prompts."""


BY_LENGTH = ((8, 32), (8, 128), (8, 512), (8, 1024))
"""Prompts, and their tokens with the template."""


def in_process(model: str, threads: int, *arguments: object) -> dict[str, Any]:
    """Run this script in a process of its own and read what it prints.

    Returns:
        What it measured, or {"failed": the last line it said}.
    """
    said = " ".join(map(str, arguments))
    say(f"{model}: {said}, in a process of its own")
    command = [sys.executable, __file__, model, str(threads), *map(str, arguments)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        return {"failed": f"{said}: {lines[-1][:200] if lines else run.returncode}"}
    return json.loads(run.stdout.strip().splitlines()[-1])


def growth(model: str, threads: int) -> dict[str, Any]:
    """Measure streamed moments by the number of prompts and by their length."""
    return {
        "by prompts": [in_process(model, threads, "reading", *size) for size in BY_PROMPTS],
        "by length": [in_process(model, threads, "reading", *size) for size in BY_LENGTH],
    }


def main() -> None:
    """Measure one size and print it as JSON."""
    name, threads, what, *size = sys.argv[1:]
    torch.set_num_threads(int(threads))
    found = memory(name) if what == "memory" else reading(name, *map(int, size))
    print(json.dumps(found))


def reading(name: str, n: int, n_tokens: int) -> dict[str, float]:
    """Read moments of n prompts that differ; those of 0 tokens are as long as they are."""
    from speed_tasks import computed_tokens, long_prompts

    import workbench as wb
    from workbench.models.activations import class_moments
    from workbench.models.tokens import encode

    model = wb.load_model(name, device="cpu")
    sites = [site for kind in KINDS for site in wb.sites_of_kind(model, kind)]
    if n_tokens:
        prompts = long_prompts(model, n, n_tokens)
    else:
        known = wb.select_prompts(wb.load_prompts(), label="unsafe")
        prompts = [
            replace(known[i % len(known)], id=f"p{i}", text=f"{known[i % len(known)].text} ({i})")
            for i in range(n)
        ]
    class_moments(model, prompts[:8], sites)
    gc.collect()
    before = resident()
    with Peak() as peak:
        spent = timed(lambda: class_moments(model, prompts, sites))
    encoded = encode(model, prompts)
    return {
        "prompts": n,
        "tokens": sum(len(row.ids) for row in encoded) / n,
        "computed": computed_tokens(encoded) / n,
        "cpu": spent.cpu,
        "wall": spent.wall,
        "MiB": peak.mib - before,
    }


def memory(name: str) -> dict[str, Any]:
    """Say how much memory loading takes at most, and each work over the loaded model.

    Returns:
        MiB, mapped files among it: of the weights; at most while loading, over what Python and its
        libraries take; at most in each work, over the loaded model.
    """
    import transformer_lens.model_bridge  # noqa: F401 - not to be counted as memory of a model
    import transformers.models.llama.modeling_llama  # noqa: F401

    import workbench as wb
    from workbench.models.load import load_model

    wb.generate, wb.load_prompts, wb.cache_activations  # noqa: B018 - imported when they are named
    gc.collect()
    before = resident()
    with Peak() as peak:
        model = load_model(name, device="cpu")
    found: dict[str, Any] = {"loading": peak.mib - before}
    weights = {id(one): one.numel() * one.element_size() for one in model.parameters()}
    found["weights"] = sum(weights.values()) / 2**20
    prompts = wb.load_prompts()
    sites = [site for kind in KINDS for site in wb.sites_of_kind(model, kind)]
    conditions: dict[str, Any] = {f"c{k}": () for k in range(12)}
    works = {
        "reading 200 prompts": lambda: wb.cache_activations(model, prompts[:200], sites),
        "answering 16 prompts x 16 tokens": lambda: wb.generate(
            model, prompts[:16], (), wb.Decoding(max_new_tokens=16)
        ),
        "sweep of 12 x 16 prompts x 4 tokens": lambda: wb.sweep(
            model, prompts[:16], conditions, wb.Decoding(max_new_tokens=4)
        ),
    }
    gc.collect()
    loaded = resident()
    found["loaded"] = loaded - before
    found["works"] = {}
    for what, run in works.items():
        with Peak() as peak:
            run()
        gc.collect()
        found["works"][what] = peak.mib - loaded
    return found


def resident() -> float:
    """Read the resident memory in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


class Peak:
    """Records the largest resident memory inside a block, looked at every 20 ms."""

    def __enter__(self) -> Peak:
        self.mib, self._on = resident(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()
        self.mib = max(self.mib, resident())

    def _watch(self) -> None:
        while self._on:
            self.mib = max(self.mib, resident())
            time.sleep(0.02)


if __name__ == "__main__":
    main()
