"""Linear layers with weights packed once for the processor's fast matrix product. Same numbers to rounding, more of them a second.

On many x86 processors oneDNN with a weight in its own layout is faster than the product torch calls by default, on others it is not: so it is
measured here, on this machine, with the model's own layers, before anything is packed. The operators are those that torch's own
compiler emits for frozen graphs; torch does not promise to keep them, so they are looked up, checked numerically, and left alone where either fails.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.files.store import key_of, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn


Choice = Literal["auto", "on", "off"]


Pair = tuple[Callable[[], "Tensor"], Callable[[], "Tensor"]]


CHOICES = ("auto", "on", "off")


ROWS = (512, 32)
"""Rows of the products that are measured: a batch of prompts, and one token of a batch that is being answered."""


LEAST_GAIN = 1.15
"""Below it packing is not worth the second copy of the weights that it takes."""


LEAST_WEIGHTS = 10_000_000
"""Models with fewer are not worth a measurement."""


TOLERANCE = 1e-4
"""Largest relative error that is taken for rounding."""


ROUNDS = 7


@dataclass(frozen=True)
class Packing:
    """What was done, and why.

    Attributes:
        packed: Whether the linear layers are packed.
        gain: Time of the plain product over that of the packed one, measured (geometric mean of many rows and few); nan where it was not.
        reason: In a few words.
        n_layers: Linear layers packed.
    """

    packed: bool
    gain: float
    reason: str
    n_layers: int = 0


def pack_linears(module: nn.Module, choice: Choice = "auto") -> Packing:
    """Pack the linear layers of a model, if that is faster here.

    A packed layer goes back to the plain product by itself where gradients are wanted, where its input is no float32 on the processor, and
    once its weight was written to. Packing takes a second copy of the weights.

    Args:
        module: Any model; its ``torch.nn.Linear`` layers count, wherever they are.
        choice: "auto" measures first (once a machine, torch and number of threads: the result is kept in the user's cache folder, so that a resumed
            run computes as it began), "on" packs wherever it is possible, "off" does nothing (and undoes it).

    Raises:
        ValueError: If the choice is unknown.
    """
    from torch import nn

    if choice not in CHOICES:
        raise ValueError(f"unknown choice of packing {choice!r}; choices: {', '.join(CHOICES)}.")
    linears = [m for m in module.modules() if type(m) is nn.Linear]
    for linear in linears:
        linear.__dict__.pop("forward", None)  # what an earlier call has put there
    nan = float("nan")
    if choice == "off":
        return Packing(False, nan, "switched off")
    linears = [
        m for m in linears if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32
    ]
    if not linears:
        return Packing(False, nan, "only float32 layers on the processor can be packed")
    if choice == "auto" and sum(m.weight.numel() for m in linears) < LEAST_WEIGHTS:
        return Packing(False, nan, "too small a model to matter")
    shapes = {tuple(m.weight.shape): m for m in linears}
    try:
        pairs = {rows: [_pair(m, rows) for m in shapes.values()] for rows in ROWS}
        if not all(_close(plain(), packed()) for own in pairs.values() for plain, packed in own):
            return Packing(False, nan, "the packed product gives other numbers here")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return Packing(False, nan, f"this torch has no packed product ({type(error).__name__})")
    gain = _known_gain(sorted(shapes), pairs) if choice == "auto" else _gain(pairs)
    if choice == "auto" and gain < LEAST_GAIN:
        return Packing(False, gain, "no faster here")
    for linear in linears:
        linear.__dict__["forward"] = _packed_forward(linear)
    return Packing(True, gain, "faster here" if gain >= LEAST_GAIN else "asked for", len(linears))


def is_packed(module: nn.Module) -> bool:
    """Whether any layer of a model is packed."""
    return any("forward" in m.__dict__ and hasattr(m, "in_features") for m in module.modules())


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """The plain products inside the block."""
    kept = [
        (m, m.__dict__.pop("forward"))
        for m in module.modules()
        if "forward" in m.__dict__ and hasattr(m, "weight")
    ]
    try:
        yield
    finally:
        for linear, own in kept:
            linear.__dict__["forward"] = own


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS[0])


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _packed_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = linear.weight, linear.bias
    packed, state = _packed(weight), (weight.data_ptr(), weight._version)

    def forward(x: Tensor) -> Tensor:
        own = linear.weight
        changed = own is not weight or (own.data_ptr(), own._version) != state
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or own.requires_grad)
        if (
            changed
            or wants_gradient
            or x.dtype != torch.float32
            or x.device.type != "cpu"
            or x.numel() == 0
        ):
            return torch.nn.functional.linear(x, own, linear.bias)
        return _product(x, packed, bias)

    return forward


def _pair(linear: nn.Linear, rows: int) -> Pair:
    """The plain and the packed product of a layer with one fixed input."""
    x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(0))
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    packed = _packed(weight)
    return lambda: torch.nn.functional.linear(x, weight, bias), lambda: _product(x, packed, bias)


def _close(plain: Tensor, packed: Tensor) -> bool:
    return bool((plain - packed).abs().max() <= TOLERANCE * plain.abs().max().clamp(min=1e-12))


def _known_gain(shapes: list[tuple[int, ...]], pairs: dict[int, list[Pair]]) -> float:
    """The gain as it was measured here before, else measured now and kept."""
    import platformdirs

    what = [
        torch.__version__,
        torch.get_num_threads(),
        platform.processor() or platform.machine(),
        _cpu_name(),
        shapes,
        ROWS,
    ]
    path = Path(platformdirs.user_cache_dir("workbench")) / "packing" / f"{key_of(what)}.json"
    try:
        return float(read_json(path)["gain"])
    except (OSError, ValueError, KeyError, TypeError):
        gain = _gain(pairs)
    with suppress(
        OSError
    ):  # a cache folder that cannot be written to costs a measurement each time, nothing else
        write_json(path, {"gain": gain, "what": what})
    return gain


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
    )


def _gain(pairs: dict[int, list[Pair]]) -> float:
    """Median over rounds of plain time over packed time, all shapes together, one after the other in each round; geometric mean over rows."""

    def seconds(functions: Iterable[Callable[[], Any]]) -> float:
        start = time.perf_counter()
        for function in functions:
            function()
        return time.perf_counter() - start

    gains = []
    with torch.no_grad():
        for own in pairs.values():
            ratios = [
                seconds(p for p, _ in own) / seconds(q for _, q in own) for _ in range(ROUNDS + 1)
            ]
            gains.append(statistics.median(ratios[1:]))
    return statistics.geometric_mean(gains)
