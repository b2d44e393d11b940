"""Figures of calibration and gates, from tables of a run folder: what each setting costs, and what a gate opens for.

The same rules as in ``visuals``: pure functions of tables, names as plain text, no meaning by color alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from workbench.figures.style import COLORS, Panels, check_table, name_in_words, plain_label, styled
from workbench.figures.wording import in_order

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
from workbench.figures.style import SYMBOLS

SET_NAMES = {
    "risky": "risky prompts",
    "twins": "safe twins",
    "look-alikes": "look-alikes",
    "neutral": "everyday prompts",
}


def gate_rates(frame: pd.DataFrame) -> Figure:
    """How often a gate opens on each kind of prompt, category by category, with intervals.

    Args:
        frame: gate_rates.csv or ``gate_report.activation_rates``.

    Returns:
        One panel a kind of prompt; the dotted line is the rate its threshold was set for.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    check_table("gate_rates", frame, ("set", "category", "rate", "low", "high", "n"))
    kinds = in_order(frame["set"], tuple(SET_NAMES))
    categories = list(dict.fromkeys(frame["category"]))
    panels = Panels(
        1, len(kinds), titles=[plain_label(SET_NAMES.get(kind, kind)) for kind in kinds], gap=0
    )
    for j, kind in enumerate(kinds):
        rows = frame[frame["set"] == kind].to_dict("records")
        panels.add(
            0,
            j,
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
                "symbol": SYMBOLS[j % len(SYMBOLS)],
            },
            customdata=[
                f"{row['rate']:.0%} [{row['low']:.0%}, {row['high']:.0%}], n = {row['n']:.0f}"
                for row in rows
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
        for asked in {row["asked"] for row in rows if math.isfinite(row.get("asked", math.nan))}:
            panels.line(0, j, x=asked)
        panels.axis(
            "x",
            0,
            j,
            range=[-0.03, 1.03],
            tickformat=".0%",
            title={"text": "opens on"},
            nticks=4,
            tickangle=0,
        )
        ticks = {
            "tickvals": list(range(len(categories))),
            "ticktext": [name_in_words(c) for c in categories],
        }
        panels.axis("y", 0, j, range=[len(categories) - 0.4, -0.6], zeroline=False, **ticks)
    return styled(panels.figure(), height=150 + 26 * len(categories), left=140)


def gate_roc(frame: pd.DataFrame) -> Figure:
    """Recall on risky prompts against false activations on each kind of safe ones, at every threshold.

    Args:
        frame: gate_roc.csv or ``gate_report.roc``.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    check_table("gate_roc", frame, ("against", "false_rate", "recall", "auroc", "low", "high"))
    panels = Panels(1, 1, titles=[""], gap=0)
    for k, kind in enumerate(in_order(frame["against"], tuple(SET_NAMES))):
        own = frame[frame["against"] == kind]
        first = own.iloc[0]
        area = f"AUROC {first['auroc']:.2f} [{first['low']:.2f}, {first['high']:.2f}]"
        panels.add(
            0,
            0,
            x=own["false_rate"].tolist(),
            y=own["recall"].tolist(),
            mode="lines",
            name=f"{plain_label(SET_NAMES.get(kind, kind))}: {area}",
            line={
                "color": COLORS[k % len(COLORS)],
                "width": 2,
                "dash": ("solid", "dash", "dot")[k % 3],
                "shape": "hv",
            },
        )
    panels.axis(
        "x", 0, 0, title={"text": "false activations"}, tickformat=".0%", range=[-0.01, 1.01]
    )
    panels.axis(
        "y", 0, 0, title={"text": "risky prompts it opens on"}, tickformat=".0%", range=[0, 1.02]
    )
    return styled(panels.figure(), height=430, legend=True)


def gate_confusion(frame: pd.DataFrame) -> Figure:
    """For which category a gate opens, by the category of the prompt.

    Args:
        frame: gate_confusion.csv or ``gate_report.confusion``.

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
    """A table of shares or differences as tiles with their numbers: confusion of a gate, leakage between categories.

    Args:
        frame: One row a tile.
        rows: Column that names the tile's row.
        columns: Column that names its column.
        value: Column of the number that colors it.
        text: Column of what is written in it.
        titles: Of the columns' and the rows' axis.
        label: Of the color bar.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    import plotly.graph_objects as go

    check_table("heat_map", frame, (rows, columns, value, text))
    down, across = list(dict.fromkeys(frame[rows])), list(dict.fromkeys(frame[columns]))
    tile = {(row[rows], row[columns]): row for row in frame.to_dict("records")}

    def grid(column: str) -> list[list[Any]]:
        return [[tile.get((a, b), {}).get(column) for b in across] for a in down]

    signed = bool((frame[value] < 0).any())
    largest = max(float(frame[value].abs().max()), 1e-9)
    colors = (
        {"colorscale": "RdBu", "zmin": -largest, "zmax": largest}
        if signed
        else {"colorscale": "Blues", "zmin": 0}
    )
    tiles = go.Heatmap(
        z=grid(value),
        x=list(range(len(across))),
        y=list(range(len(down))),
        text=[[plain_label(str(t)) if t is not None else "" for t in line] for line in grid(text)],
        texttemplate="%{text}",
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": plain_label(label)}, "thickness": 12},
        hovertemplate="%{text}<extra></extra>",
        **colors,
    )
    figure = go.Figure(tiles)
    figure.update_xaxes(
        title=titles[0],
        tickvals=list(range(len(across))),
        ticktext=[name_in_words(str(a)) for a in across],
        tickangle=-40,
        showgrid=False,
    )
    figure.update_yaxes(
        title=titles[1],
        tickvals=list(range(len(down))),
        ticktext=[name_in_words(str(d)) for d in down],
        autorange="reversed",
        showgrid=False,
    )
    return styled(figure, height=210 + 28 * len(down), left=150).update_layout(margin={"b": 130})
