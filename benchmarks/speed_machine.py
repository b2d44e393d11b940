"""Measure the limits of this machine: products of a model's shapes, and reading memory.

What a work reaches is told as a share of the best exact product: the quicker of torch's plain
float32 product and oneDNN's with packed weights, both on aligned memory.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_measure import measured, median
from speed_tasks import Subject

import workbench as wb

ROWS = (16, 96, 512)
"""Rows of the products: a batch of answers, a batch of many, and a batch of prompts."""


DECODED = 96
"""Most rows of a step of decoding."""


EXACT = ("plain", "packed")
"""Products that give float32's numbers."""


FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
"""What /proc/cpuinfo calls the instructions that products may use."""


def processor() -> str:
    """Name the processor, as Linux lists it or as Python knows it."""
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor()


def features() -> dict[str, Any]:
    """Say which instructions for products this processor has, in words and by name."""
    flags = set(" ".join(_cpuinfo("flags")[:1]).split())
    if not flags:
        return {"words": "unknown: there is no /proc/cpuinfo here", "flags": []}
    named = [name for name in FEATURES if name in flags]
    has = [word for word, flag in (("AVX-512", "avx512f"), ("AMX", "amx_tile")) if flag in flags]
    words = " and ".join(has) if has else "neither AVX-512 nor AMX"
    return {"words": f"{words} ({', '.join(named)})" if named else words, "flags": named}


def _cpuinfo(key: str) -> list[str]:
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return []
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.partition(":") for line in lines]
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def versions() -> dict[str, str]:
    """Name the versions of what is measured, and the commit where git knows it."""
    named = ("workbench", "torch", "transformers", "transformer-lens")
    told = {name: importlib.metadata.version(name) for name in named}
    root = Path(__file__).resolve().parents[1]
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return told | ({"commit": commit} if commit else {}) | {"python": platform.python_version()}


def products(subject: Subject) -> dict[str, Any]:
    """Measure the products of the linear layers, by rows and by kind.

    The head is among them where answers are decoded (up to 96 rows): prompts do without it.

    Returns:
        For each number of rows the seconds of each kind, and the operations of one row.
    """
    head = subject.raw.get_output_embeddings().weight
    layers = [m.weight for m in subject.raw.modules() if type(m) is torch.nn.Linear]
    layers = [weight for weight in layers if weight is not head]
    times, flop = {}, {}
    for rows in ROWS:
        weights = [*layers, head] if rows <= DECODED else layers
        flop[str(rows)] = 2 * sum(weight.numel() for weight in weights)
        with torch.no_grad():
            running = _products([weight.detach().clone() for weight in weights], rows)
            for run in running.values():
                run()
            title = f"{subject.name}: products, {rows} rows"
            times[str(rows)], _ = measured(title, running, subject.sizes.rounds)
    return {"times": times, "flop": flop}


def _products(weights: list[torch.Tensor], rows: int) -> dict[str, Callable[[], None]]:
    """Make each kind of product of all weights with fixed inputs."""
    widths = {weight.shape[1] for weight in weights}
    inputs = {width: torch.randn(rows, width) for width in widths}
    halves = {width: x.bfloat16() for width, x in inputs.items()}
    in_half = [weight.bfloat16() for weight in weights]

    def plain_product() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    def half_product() -> None:
        for weight in in_half:
            torch.nn.functional.linear(halves[weight.shape[1]], weight)

    running = {"plain": plain_product, "bf16": half_product}
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
    except (AttributeError, RuntimeError, NotImplementedError):
        return running  # this torch has no packed product

    def packed_product() -> None:
        for weight, copy in zip(weights, packed, strict=True):
            torch.ops.mkldnn._linear_pointwise(inputs[weight.shape[1]], copy, None, "none", [], "")

    return {"plain": plain_product, "packed": packed_product, "bf16": half_product}


def rates(found: dict[str, Any], rows: int, kind: str, clock: str) -> list[float]:
    """Give the operations a second of a kind of product: of the median, then of each round."""
    seconds = found["times"][str(rows)][kind][clock]
    return [found["flop"][str(rows)] * rows / one for one in (median(seconds), *seconds)]


def best_exact(found: dict[str, Any], rows: int, clock: str) -> float:
    """Give the operations a second of the quickest product that is exact."""
    kinds = [kind for kind in EXACT if kind in found["times"][str(rows)]]
    return max(rates(found, rows, kind, clock)[0] for kind in kinds)


def bandwidth(rounds: int, n: int = 64_000_000) -> dict[str, list[float]]:
    """Measure reading memory: seconds to add up float32 numbers that no cache holds."""
    big = torch.randn(n)
    times, _ = measured("reading memory", {"read": big.sum}, rounds)
    return {clock: [4 * n / one / 1e9 for one in seconds] for clock, seconds in
            times["read"].items()}  # fmt: skip


def decoding(subject: Subject) -> dict[str, Any] | None:
    """Measure decoding alone, at many rows: longer answers less shorter ones.

    Returns:
        Row-steps between the two, and seconds of each by round; None where it is not asked for.
    """
    sizes = subject.sizes
    if sizes.decoded is None:
        return None
    prompts = subject.spread(sizes.wide)
    short, long = sizes.decoded

    def answers(n_new: int) -> int:
        decoding = wb.Decoding(max_new_tokens=n_new, batch_size=len(prompts))
        return sum(len(one.tokens) for one in wb.generate(subject.model, prompts, (), decoding))

    n_steps = answers(long) - answers(short)
    running = {"short": lambda: answers(short), "long": lambda: answers(long)}
    times, _ = measured(f"{subject.name}: decoding {len(prompts)} rows", running, sizes.rounds)
    return {"rows": len(prompts), "row-steps": n_steps, "times": times}
