"""The style of all figures: colors, symbols, grids of panels, and names as plain text.

Colors stay apart for color-blind readers. Marks with a meaning of their own (a control, a chosen
setting, one that breaks too much text) differ by symbol, and what only a color tells apart, such as
the lines of categories or the tiles of a heat map, is named on hover.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from workbench.figures.wording import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from plotly.graph_objects import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette without black and yellow: readable on white and on black."""


INK, MUTED, GRID = "#24292f", "#808891", "rgba(128,136,145,0.25)"

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")

_FONT = (
    "ui-sans-serif, system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', "
    "Arial, sans-serif"
)

_MAX_LABEL = 40


class Panels:
    """A grid of panels that is filled first and becomes a figure at the end.

    Plotly checks a whole figure again at each change of it, which would take seconds.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        titles: Sequence[str],
        gap: float,
        shared_xaxes: bool = False,
    ) -> None:
        from plotly.subplots import make_subplots

        gaps = {"horizontal_spacing": 0.03, "vertical_spacing": gap if rows > 1 else 0}
        self._figure = make_subplots(
            rows,
            columns,
            subplot_titles=titles,
            shared_yaxes=True,
            shared_xaxes=shared_xaxes,
            **gaps,
        )
        self._columns = columns
        self._traces: list[dict[str, Any]] = []
        self._layout: dict[str, Any] = {"shapes": []}

    def add(self, row: int, column: int, **trace: Any) -> None:
        """Add a scatter trace to a panel; rows and columns count from 0."""
        place = self._place(row, column)
        self._traces.append(
            {"type": "scatter", "xaxis": f"x{place}", "yaxis": f"y{place}", **trace}
        )

    def line(
        self,
        row: int,
        column: int,
        *,
        x: float | None = None,
        y: float | None = None,
        dash: str = "dot",
    ) -> None:
        """Draw a line through the whole panel, at an x or at a y."""
        place = self._place(row, column)
        ends = (
            {"x0": 0, "x1": 1, "y0": y, "y1": y}
            if x is None
            else {"x0": x, "x1": x, "y0": 0, "y1": 1}
        )
        axes = {
            "xref": f"x{place}" + " domain" * (x is None),
            "yref": f"y{place}" + " domain" * (x is not None),
        }
        self._layout["shapes"].append(
            {
                "type": "line",
                **ends,
                **axes,
                "line": {"color": MUTED, "width": 1.2, "dash": dash},
                "layer": "below",
            }
        )

    def axis(self, which: str, row: int, column: int, **settings: Any) -> None:
        """Change settings of a panel's "x" or "y" axis."""
        self._layout.setdefault(f"{which}axis{self._place(row, column)}", {}).update(settings)

    def figure(self) -> Figure:
        """Return everything that was added as one figure; to be called once."""
        self._figure.add_traces(self._traces)
        return self._figure.update_layout(self._layout)

    def _place(self, row: int, column: int) -> str:
        number = row * self._columns + column + 1
        return "" if number == 1 else str(number)


def styled(figure: Figure, *, height: int, legend: bool = False, left: int = 70) -> Figure:
    """Give a figure this project's style: white, for a notebook or paper.

    A page may replace the colors of text and grid; see the report's template.
    """
    axis = {
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": GRID,
        "automargin": True,
        "title": {"font": {"size": 12}},
    }
    figure.update_layout(
        template={
            "layout": {
                "xaxis": axis,
                "yaxis": axis,
                "font": {"family": _FONT, "size": 12, "color": INK},
            }
        },
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=height,
        showlegend=legend,
        legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"},
        margin={"l": left, "r": 20, "t": 50, "b": 90 if legend else 60},
        hoverlabel={"align": "left"},
    )
    figure.update_annotations(font={"size": 13})
    return figure


def check_table(what: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a table has these columns and any rows.

    Raises:
        ValueError: If not, with the figure's name and what is missing.
    """
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"{what} needs columns {', '.join(columns)}; {missing[0]!r} is missing.")
    if frame.empty:
        raise ValueError(f"{what}: there are no rows to show.")


def plain_label(text: str) -> str:
    """Write a name so that Plotly shows it letter by letter; a long one is cut."""
    text = visible(str(text).replace("\n", " "))
    return html.escape(
        text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…", quote=False
    )


def name_in_words(name: str) -> str:
    """Write a category's or construction's name in words, as plain text."""
    return plain_label(name.replace("_", " "))


def of_category(frame: pd.DataFrame, what: str, column: str, name: str) -> pd.DataFrame:
    """Return the rows of a table whose column holds a name.

    Raises:
        ValueError: If there are none; it lists the names that there are.
    """
    rows = frame[frame[column] == name]
    if rows.empty:
        known = ", ".join(map(repr, dict.fromkeys(frame[column])))
        raise ValueError(f"{what}: no rows of {column} {name!r}; there are: {known}.")
    return rows
