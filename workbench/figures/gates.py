"""Draw what a gate opens for, from the gate tables of a run folder.

As in every figure of this folder, names are shown as plain text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.figures.style import (
    COLORS,
    SYMBOLS,
    Panels,
    check_table,
    name_in_words,
    plain_label,
    styled,
)
from workbench.figures.wording import in_order

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

SET_NAMES = {
    "risky": "risky prompts",
    "twins": "safe twins",
    "look-alikes": "look-alikes",
    "neutral": "everyday prompts",
}
"""Kinds of prompts that a gate is tested on, and what figures and the report call them."""


def gate_rates(frame: pd.DataFrame) -> Figure:
    """Draw how often a gate opens on each kind of prompt, by category, with intervals.

    Args:
        frame: gate_rates.csv or ``gating.activation_rates``.

    Returns:
        One panel per kind of prompt; the dotted line is the rate its threshold was set for.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    check_table("gate_rates", frame, ("set", "category", "rate", "low", "high", "n"))
    kinds = in_order(frame["set"], tuple(SET_NAMES))
    categories = list(dict.fromkeys(frame["category"]))
    titles = [plain_label(SET_NAMES.get(kind, kind)) for kind in kinds]
    panels = Panels(1, len(kinds), titles=titles, gap=0)
    for column, kind in enumerate(kinds):
        _add_rates(panels, column, kind, frame[frame["set"] == kind].to_dict("records"), categories)
    return styled(panels.figure(), height=150 + 26 * len(categories), left=140)


def _add_rates(
    panels: Panels,
    column: int,
    kind: str,
    rows: Sequence[dict[str, Any]],
    categories: Sequence[str],
) -> None:
    """Add the panel of one kind of prompt: a mark with its interval per category."""
    panels.add(
        0,
        column,
        x=[row["rate"] for row in rows],
        y=[categories.index(row["category"]) for row in rows],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row["high"] - row["rate"] for row in rows],
            "arrayminus": [row["rate"] - row["low"] for row in rows],
            "width": 0,
        },
        mode="markers",
        showlegend=False,
        marker={
            "size": 8,
            "color": COLORS[0 if kind == "risky" else 1],
            "symbol": SYMBOLS[column % len(SYMBOLS)],
        },
        customdata=[
            f"{row['rate']:.0%} [{row['low']:.0%}, {row['high']:.0%}], n = {row['n']:.0f}"
            for row in rows
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    for asked in {row["asked"] for row in rows if math.isfinite(row.get("asked", math.nan))}:
        panels.line(0, column, x=asked)
    shares = {"range": [-0.03, 1.03], "tickformat": ".0%", "nticks": 4, "tickangle": 0}
    panels.axis("x", 0, column, title={"text": "opens on"}, **shares)
    ticks = {
        "tickvals": list(range(len(categories))),
        "ticktext": [name_in_words(category) for category in categories],
    }
    panels.axis("y", 0, column, range=[len(categories) - 0.4, -0.6], zeroline=False, **ticks)


def gate_roc(frame: pd.DataFrame) -> Figure:
    """Draw recall on risky prompts against false activations on safe ones, at every threshold.

    Args:
        frame: gate_roc.csv or ``gating.roc``.

    Returns:
        One curve per kind of safe prompt.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    check_table("gate_roc", frame, ("against", "false_rate", "recall", "auroc", "low", "high"))
    panels = Panels(1, 1, titles=[""], gap=0)
    for k, kind in enumerate(in_order(frame["against"], tuple(SET_NAMES))):
        curve = frame[frame["against"] == kind]
        first = curve.iloc[0]
        area = f"AUROC {first['auroc']:.2f} [{first['low']:.2f}, {first['high']:.2f}]"
        panels.add(
            0,
            0,
            x=curve["false_rate"].tolist(),
            y=curve["recall"].tolist(),
            mode="lines",
            name=f"{plain_label(SET_NAMES.get(kind, kind))}: {area}",
            line={
                "color": COLORS[k % len(COLORS)],
                "width": 2,
                "dash": ("solid", "dash", "dot")[k % 3],
                "shape": "hv",
            },
        )
    x_title, y_title = {"text": "false activations"}, {"text": "risky prompts it opens on"}
    panels.axis("x", 0, 0, title=x_title, tickformat=".0%", range=[-0.01, 1.01])
    panels.axis("y", 0, 0, title=y_title, tickformat=".0%", range=[0, 1.02])
    return styled(panels.figure(), height=430, legend=True)


def gate_confusion(frame: pd.DataFrame) -> Figure:
    """Draw for which category a gate opens, by the category of the prompt.

    Args:
        frame: gate_confusion.csv or ``gating.confusion``.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    check_table("gate_confusion", frame, ("truth", "opened", "n", "share"))
    return heat_map(
        frame,
        rows="truth",
        columns="opened",
        value="share",
        text="n",
        titles=("the gate opens for", "prompts of"),
        label="share of a row",
    )


def heat_map(
    frame: pd.DataFrame,
    *,
    rows: str,
    columns: str,
    value: str,
    text: str,
    titles: tuple[str, str],
    label: str,
) -> Figure:
    """Draw a table of shares or differences as tiles with their numbers.

    Examples are the confusion of a gate and the leakage between categories.

    Args:
        frame: One row per tile.
        rows: Column that names the tile's row.
        columns: Column that names the tile's column.
        value: Column of the number that colors the tile.
        text: Column of what is written in the tile.
        titles: Titles of the columns' and of the rows' axis.
        label: Title of the color bar.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    import plotly.graph_objects as go

    check_table("heat_map", frame, (rows, columns, value, text))
    row_names = list(dict.fromkeys(frame[rows]))
    column_names = list(dict.fromkeys(frame[columns]))
    tiles = {(row[rows], row[columns]): row for row in frame.to_dict("records")}

    def grid(field: str) -> list[list[Any]]:
        return [[tiles.get((r, c), {}).get(field) for c in column_names] for r in row_names]

    figure = go.Figure(
        go.Heatmap(
            z=grid(value),
            x=list(range(len(column_names))),
            y=list(range(len(row_names))),
            text=[[plain_label("" if t is None else str(t)) for t in line] for line in grid(text)],
            texttemplate="%{text}",
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": plain_label(label)}, "thickness": 12},
            hovertemplate="%{text}<extra></extra>",
            **_tile_colors(frame[value]),
        )
    )
    figure.update_xaxes(title=titles[0], tickangle=-40, **_tile_axis(column_names))
    figure.update_yaxes(title=titles[1], autorange="reversed", **_tile_axis(row_names))
    height = 210 + 28 * len(row_names)
    return styled(figure, height=height, left=150).update_layout(margin={"b": 130})


def _tile_colors(values: pd.Series) -> dict[str, Any]:
    """Return a color scale around zero if a value is below zero, else from zero upwards."""
    if not (values < 0).any():
        return {"colorscale": "Blues", "zmin": 0}
    largest = max(float(values.abs().max()), 1e-9)
    return {"colorscale": "RdBu", "zmin": -largest, "zmax": largest}


def _tile_axis(names: Sequence[Any]) -> dict[str, Any]:
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [name_in_words(str(name)) for name in names],
        "showgrid": False,
    }
