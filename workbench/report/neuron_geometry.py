"""Geometry of the neuron dashboard: numbers in, coordinates and path data out, for the template to draw as inline SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from workbench.neurons.profiles import Histogram


SHADES = 7
"""Steps from one neuron in a cell to the most."""


_BINS = 72


def score_map(
    own: pd.DataFrame,
    score: str,
    title: str,
    note: str,
    marks: Sequence[tuple[int, int, str]],
    linked: set[tuple[int, int]],
) -> dict[str, Any]:
    """All neurons, layer by score: shaded by how many there are, the chosen ones as dots."""
    known = own[own[score].notna()]
    values, layers = known[score].to_numpy(dtype=float), known["layer"].to_numpy(dtype=int)
    low, high = (
        (0.0, 1.0)
        if score.startswith("auroc")
        else (min(0.0, values.min()), max(0.0, values.max()))
    )
    high = high if high > low else low + 1.0
    n_layers, left, width = int(layers.max()) + 1, 30.0, 430.0
    step = min(24.0, max(3.0, 270 / n_layers))

    def x_of(value: float) -> float:
        return round(left + (value - low) / (high - low) * width, 1)

    column = np.clip(((values - low) / (high - low) * _BINS).astype(int), 0, _BINS - 1)
    counts = np.zeros((n_layers, _BINS), dtype=int)
    np.add.at(counts, (layers, column), 1)
    shade = np.ceil(np.log1p(counts) / np.log1p(max(1, counts.max())) * SHADES).astype(int)
    cell = width / _BINS
    paths = []
    for level in range(1, SHADES + 1):
        cells = [
            f"M{left + x * cell:.1f} {y * step:.1f}h{cell:.1f}v{step:.1f}h-{cell:.1f}z"
            for y, x in np.argwhere(shade == level)
        ]
        paths.append((level, "".join(cells)))
    value_of = dict(
        zip(
            zip(layers.tolist(), known["neuron"].tolist(), strict=True),
            values.tolist(),
            strict=True,
        )
    )
    dots = [
        {
            "x": x_of(value_of[layer, neuron]),
            "y": round((layer + 0.5) * step, 1),
            "role": role,
            "link": anchor(layer, neuron) if (layer, neuron) in linked else "",
            "text": f"L{layer} N{neuron}: {svg_number(value_of[layer, neuron])}"
            + (" (control)" if role == "control" else ""),
        }
        for layer, neuron, role in sorted(marks, key=lambda mark: mark[2])
        if (layer, neuron) in value_of
    ]
    every = 10 if n_layers > 40 else 5 if n_layers > 8 else 1
    return {
        "title": title,
        "note": note,
        "paths": paths,
        "dots": dots,
        "left": left,
        "right": left + width,
        "bottom": round(n_layers * step, 1),
        "rows": [(layer, round((layer + 0.5) * step, 1)) for layer in range(0, n_layers, every)],
        "ticks": [(x_of(tick), svg_number(tick)) for tick in _ticks(low, high)],
        "zero": x_of(0.5 if score.startswith("auroc") else 0.0),
    }


def ridges(
    histogram: Histogram,
    groups: Mapping[str, Callable[[str, str], bool]],
    own_name: str,
    *,
    root: bool = False,
) -> dict[str, Any]:
    """A histogram as rows of steps on one axis, one row a group, each scaled to its share of the group's own count."""
    edges, left, width, height = histogram.edges, 92.0, 216.0, 19.0
    counts = np.array(histogram.counts, dtype=float)
    span = (edges[-1] - edges[0]) or 1.0
    xs = [left + (edge - edges[0]) / span * width for edge in edges]
    rows = []
    for name, belongs in groups.items():
        own = counts[[belongs(*key) for key in histogram.classes]].sum(axis=0)
        if own.sum():
            rows.append((name, int(own.sum()), own / own.sum()))
    top = max((float(shares.max()) for _, _, shares in rows), default=1.0)
    drawn = []
    for i, (name, n, shares) in enumerate(rows):
        base = (i + 1) * height
        heights = (np.sqrt(shares / top) if root else shares / top) * (height - 3)
        steps = "".join(f"V{base - h:.1f}H{x:.1f}" for h, x in zip(heights, xs[1:], strict=True))
        drawn.append(
            {
                "name": name,
                "n": n,
                "y": base,
                "path": f"M{xs[0]:.1f} {base:.1f}{steps}V{base:.1f}Z",
                "own": name == own_name,
            }
        )
    ticks = [
        (round(left + (tick - edges[0]) / span * width, 1), svg_number(tick))
        for tick in _ticks(edges[0], edges[-1], 4)
    ]
    return {
        "rows": drawn,
        "height": len(drawn) * height,
        "ticks": ticks,
        "left": left,
        "right": left + width,
    }


def anchor(layer: int, neuron: int) -> str:
    """Name of a neuron's card in the page, for links."""
    return f"L{layer}N{neuron}"


def _ticks(low: float, high: float, n: int = 6) -> list[float]:
    """Round numbers between two, about n of them."""
    rough = (high - low) / n
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
    return [
        round(i * step, 10)
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def svg_number(value: Any, form: str = ".3g") -> str:
    """A number as readers want it, or a dash where there is none."""
    if value is None or value != value:
        return "–"
    return format(float(value) + 0.0, form).replace("-", "−")
