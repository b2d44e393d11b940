"""Lay out the drawings of the neuron dashboard: numbers in, coordinates and SVG paths out.

The template draws them as inline SVG.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from workbench.neurons.profiles import Histogram


SHADES = 7
"""Shades of a cell, from one neuron to the largest number of them."""

_BINS = 72
"""Cells along the axis of the score."""


def score_map(
    neurons: pd.DataFrame,
    score: str,
    title: str,
    note: str,
    marks: Sequence[tuple[int, int, str]],
    linked: set[tuple[int, int]],
) -> dict[str, Any]:
    """Lay out a map of all neurons, layer by score, shaded by how many neurons a cell holds.

    Args:
        neurons: One row per neuron: layer, neuron and the score.
        score: Column of the score.
        title: Title of the map.
        note: What is written below the title.
        marks: Layer, neuron and role ("target" or "control") of each dot.
        linked: Neurons that have a card.
    """
    known = neurons[neurons[score].notna()]
    values, layers = known[score].to_numpy(dtype=float), known["layer"].to_numpy(dtype=int)
    is_auroc = score.startswith("auroc")
    low, high = (0.0, 1.0) if is_auroc else (min(0.0, values.min()), max(0.0, values.max()))
    high = high if high > low else low + 1.0
    n_layers, left, width = int(layers.max()) + 1, 30.0, 430.0
    step = min(24.0, max(3.0, 270 / n_layers))  # height of a layer

    def x_of(value: float) -> float:
        return round(left + (value - low) / (high - low) * width, 1)

    column = np.clip(((values - low) / (high - low) * _BINS).astype(int), 0, _BINS - 1)
    counts = np.zeros((n_layers, _BINS), dtype=int)
    np.add.at(counts, (layers, column), 1)
    pairs = zip(layers.tolist(), known["neuron"].tolist(), strict=True)
    value_of = dict(zip(pairs, values.tolist(), strict=True))
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
    every = 10 if n_layers > 40 else 5 if n_layers > 8 else 1  # layers between two labels
    return {
        "title": title,
        "note": note,
        "paths": _shaded_cells(counts, left, width / _BINS, step),
        "dots": dots,
        "left": left,
        "right": left + width,
        "bottom": round(n_layers * step, 1),
        "rows": [(layer, round((layer + 0.5) * step, 1)) for layer in range(0, n_layers, every)],
        "ticks": [(x_of(tick), svg_number(tick)) for tick in _ticks(low, high)],
        "zero": x_of(0.5 if is_auroc else 0.0),
    }


def _shaded_cells(
    counts: np.ndarray, left: float, cell: float, step: float
) -> list[tuple[int, str]]:
    """Return a path per shade that draws all its cells; shades are logarithmic in the count."""
    shade = np.ceil(np.log1p(counts) / np.log1p(max(1, counts.max())) * SHADES).astype(int)
    paths = []
    for level in range(1, SHADES + 1):
        cells = [
            f"M{left + x * cell:.1f} {y * step:.1f}h{cell:.1f}v{step:.1f}h-{cell:.1f}z"
            for y, x in np.argwhere(shade == level)
        ]
        paths.append((level, "".join(cells)))
    return paths


def ridges(
    histogram: Histogram,
    groups: Mapping[str, Callable[[str, str], bool]],
    highlighted: str,
    *,
    root: bool = False,
) -> dict[str, Any]:
    """Lay out a histogram as rows of steps on one axis, one row per group.

    A row's heights are shares of its own group, so that groups of different size compare.

    Args:
        histogram: Counts by class and bin.
        groups: Name of each group, and the test of category and label for what belongs to it.
        highlighted: Group that is drawn in another color.
        root: Draw square roots of the shares, which shows small ones.
    """
    edges, left, width, height = histogram.edges, 92.0, 216.0, 19.0
    counts = np.array(histogram.counts, dtype=float)
    span = (edges[-1] - edges[0]) or 1.0
    xs = [left + (edge - edges[0]) / span * width for edge in edges]
    rows = []
    for name, belongs in groups.items():
        group = counts[[belongs(*key) for key in histogram.classes]].sum(axis=0)
        if group.sum():
            rows.append((name, int(group.sum()), group / group.sum()))
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
                "own": name == highlighted,
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
    """Return the name of a neuron's card in the page, for links."""
    return f"L{layer}N{neuron}"


def _ticks(low: float, high: float, n: int = 6) -> list[float]:
    """Return about n round numbers between two."""
    rough = (high - low) / n
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
    return [
        round(i * step, 10)
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def svg_number(value: Any, form: str = ".3g") -> str:
    """Write a number as readers want it, or a dash where there is none."""
    if value is None or value != value:
        return "–"
    return format(float(value) + 0.0, form).replace("-", "−")
