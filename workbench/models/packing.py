"""Pack the weights of linear layers once, for the processor's fast matrix product.

It gives the same numbers to rounding, and more of them per second. On many x86 processors oneDNN
with a weight in its own layout is faster than the product torch calls by default, on others it is
not: so it is measured on this machine, with the model's own layers, before anything is packed. The
operators are those that torch's own compiler emits for frozen graphs; torch does not promise to
keep them, so they are looked up, checked numerically, and left alone where either fails.
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
from workbench.models.memory import drop_pages, free_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workbench.models.hooked_model import HookedModel


Choice = Literal["auto", "on", "off"]


CHOICES = ("auto", "on", "off")


Products = tuple[Callable[[], "Tensor"], Callable[[], "Tensor"]]
"""The plain and the faster product of one layer with a fixed input."""


ROWS = (512, 32)
"""Rows of the products that are measured: a batch of prompts, and one token of each answer."""


LEAST_GAIN = 1.15
"""Below it packing is not worth the second copy of the weights that it takes."""


MEMORY_LEFT = 1.25
"""Free memory that "auto" wants before it packs, as a multiple of what packing takes."""


LEAST_WEIGHTS = 10_000_000
"""Models with fewer are not worth a measurement."""


TOLERANCE = 1e-4
"""Largest relative error that is taken for rounding."""


ROUNDS = 7
"""Measurements whose median counts."""


_MARK = "is_packed_product"
"""Tells a layer's packed product from what other libraries put in the place of its own."""


@dataclass(frozen=True)
class Packing:
    """What was done to a model's linear layers, and why.

    Attributes:
        packed: Whether the linear layers are packed.
        gain: Time of the plain product over that of the packed one (geometric mean of many rows and
            few); nan where it was not measured.
        reason: In a few words.
        n_layers: Linear layers packed.
    """

    packed: bool
    gain: float
    reason: str
    n_layers: int = 0


def pack_linears(module: nn.Module, choice: Choice = "auto") -> Packing:
    """Pack the linear layers of a model, if that is faster here.

    A packed layer goes back to the plain product by itself where gradients are wanted, where its
    input is no float32 on the processor, and once its weight was written to. Packing takes a second
    copy of the weights. The first one leaves memory where it is mapped from its file, as
    safetensors maps it, and comes back when it is read (``memory``).

    Args:
        module: Any model; its ``torch.nn.Linear`` layers count, wherever they are.
        choice: "auto" measures first (once per machine, torch and number of threads: the result is
            kept in the user's cache folder, so that a resumed run computes as it began), "on" packs
            wherever it is possible, "off" does nothing (and undoes it).

    Raises:
        ValueError: If the choice is unknown.
    """
    from torch import nn

    if choice not in CHOICES:
        raise ValueError(f"unknown choice of packing {choice!r}; choices: {', '.join(CHOICES)}.")
    linears = [layer for layer in module.modules() if type(layer) is nn.Linear]
    for linear in filter(is_packed_layer, linears):
        del linear.__dict__["forward"]
    nan = float("nan")
    if choice == "off":
        return Packing(False, nan, "switched off")
    linears = list(filter(_can_be_packed, linears))
    if not linears:
        return Packing(False, nan, "only float32 layers on the processor can be packed")
    if choice == "auto" and (why_not := _why_not(linears)):
        return Packing(False, nan, why_not)
    one_per_shape = {tuple(layer.weight.shape): layer for layer in linears}
    try:
        # One packed copy for each shape: those of the measurement serve afterwards too.
        copies = {id(layer): _packed(layer.weight) for layer in one_per_shape.values()}
        products = {
            rows: [_products(layer, copies[id(layer)], rows) for layer in one_per_shape.values()]
            for rows in ROWS
        }
        same_numbers = all(
            _close(plain(), packed()) for layers in products.values() for plain, packed in layers
        )
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return Packing(False, nan, f"this torch has no packed product ({type(error).__name__})")
    if not same_numbers:
        return Packing(False, nan, "the packed product gives other numbers here")
    gain = (
        known_gain(sorted(one_per_shape), lambda: products) if choice == "auto" else _gain(products)
    )
    if choice == "auto" and gain < LEAST_GAIN:
        return Packing(False, gain, "no faster here")
    for linear in linears:
        copy = copies.pop(id(linear)) if id(linear) in copies else _packed(linear.weight)
        linear.__dict__["forward"] = _packed_forward(linear, copy)
        drop_pages(linear.weight)
    return Packing(True, gain, "faster here" if gain >= LEAST_GAIN else "asked for", len(linears))


def _why_not(linears: list[nn.Linear]) -> str:
    """Say why layers are not worth packing, before anything is measured; else the empty text."""
    n_weights = sum(layer.weight.numel() for layer in linears)
    if n_weights < LEAST_WEIGHTS:
        return "too small a model to matter"
    n_bytes, free = 4 * n_weights, free_memory()
    if free is not None and n_bytes * MEMORY_LEFT > free:
        return (
            f"memory is short: it takes {n_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free"
        )
    return ""


def is_packed(module: nn.Module | HookedModel) -> bool:
    """Tell whether any layer of a model is packed."""
    return any(map(is_packed_layer, module.modules()))


def _can_be_packed(linear: nn.Linear) -> bool:
    is_plain = "forward" not in linear.__dict__  # accelerate puts one there, to bring weights here
    return is_plain and linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32


def is_packed_layer(layer: nn.Module) -> bool:
    """Tell whether a layer is packed."""
    return getattr(layer.__dict__.get("forward"), _MARK, False)


@contextmanager
def unpacked(module: nn.Module | HookedModel) -> Iterator[None]:
    """Take the plain products inside the block."""
    packed_forwards: list[tuple[Any, Any]] = [
        (layer, layer.__dict__.pop("forward"))
        for layer in module.modules()
        if is_packed_layer(layer)
    ]
    try:
        yield
    finally:
        for linear, packed_forward in packed_forwards:
            linear.__dict__["forward"] = packed_forward
            drop_pages(linear.weight)


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS[0])


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _packed_forward(linear: nn.Linear, packed: Tensor) -> Callable[[Tensor], Tensor]:
    """Make the packed product of a layer, which goes back to the plain one where it must."""
    packed_weight, bias = linear.weight, linear.bias
    state = (packed_weight.data_ptr(), packed_weight._version)

    def forward(x: Tensor) -> Tensor:
        weight = linear.weight
        changed = weight is not packed_weight or (weight.data_ptr(), weight._version) != state
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if (
            changed
            or wants_gradient
            or x.dtype != torch.float32
            or x.device.type != "cpu"
            or x.numel() == 0
        ):
            return torch.nn.functional.linear(x, weight, linear.bias)
        return _product(x, packed, bias)

    setattr(forward, _MARK, True)
    return forward


def _products(linear: nn.Linear, packed: Tensor, rows: int) -> Products:
    """Make the plain and the packed product of a layer with one fixed input."""
    x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(0))
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    return lambda: torch.nn.functional.linear(x, weight, bias), lambda: _product(x, packed, bias)


def _close(plain: Tensor, packed: Tensor) -> bool:
    return bool((plain - packed).abs().max() <= TOLERANCE * plain.abs().max().clamp(min=1e-12))


def known_gain(shapes: list[Any], products: Callable[[], dict[int, list[Products]]]) -> float:
    """Read a gain as it was measured on this machine before, else measure it now and keep it.

    Args:
        shapes: What is multiplied, in JSON values: with torch's version, the processor and the
            number of threads it tells one measurement from another.
        products: Makes a plain and a faster product for each shape, by number of rows.

    Returns:
        Time of the plain products over that of the faster ones.
    """
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
        gain = _gain(products())
    # A cache folder that cannot be written to costs a measurement each time, nothing else.
    with suppress(OSError):
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


def _gain(products: dict[int, list[Products]]) -> float:
    """Measure the plain products' time over the packed ones'.

    In each round all shapes run one after the other; the gain is the median over rounds and the
    geometric mean over rows.
    """

    def seconds(functions: Iterable[Callable[[], Any]]) -> float:
        start = time.perf_counter()
        for function in functions:
            function()
        return time.perf_counter() - start

    gains = []
    with torch.no_grad():
        for layers in products.values():
            ratios = [
                seconds(plain for plain, _ in layers) / seconds(packed for _, packed in layers)
                for _ in range(ROUNDS + 1)  # the first one warms up
            ]
            gains.append(statistics.median(ratios[1:]))
    return statistics.geometric_mean(gains)
