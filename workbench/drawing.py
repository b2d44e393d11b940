"""How figures are drawn: panels, colors, names as plain text, and markup that notebooks show without a network."""

from __future__ import annotations

import html
import json
import math
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.wording import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from plotly.graph_objects import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette without black and yellow: readable on white and on black."""
INK, MUTED, GRID = "#24292f", "#808891", "rgba(128,136,145,0.25)"
_FONT = "ui-sans-serif, system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
_MAX_LABEL = 40
_CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]]}
"""Buttons are named one by one: among the default ones is an upload to a server."""


class Panels:
    """A grid of panels that is filled first and made a figure at the end: Plotly checks each change of a figure anew, which takes seconds."""

    def __init__(
        self, rows: int, columns: int, *, titles: Sequence[str], gap: float, shared_xaxes: bool = False
    ) -> None:
        from plotly.subplots import make_subplots

        gaps = {"horizontal_spacing": 0.03, "vertical_spacing": gap if rows > 1 else 0}
        self._figure = make_subplots(
            rows, columns, subplot_titles=titles, shared_yaxes=True, shared_xaxes=shared_xaxes, **gaps
        )
        self._columns = columns
        self._traces: list[dict[str, Any]] = []
        self._layout: dict[str, Any] = {"shapes": []}

    def add(self, row: int, column: int, **trace: Any) -> None:
        """A scatter trace in a panel; rows and columns count from 0."""
        place = self._place(row, column)
        self._traces.append({"type": "scatter", "xaxis": f"x{place}", "yaxis": f"y{place}", **trace})

    def line(self, row: int, column: int, *, x: float | None = None, y: float | None = None, dash: str = "dot") -> None:
        """A line through the whole panel, at an x or at a y."""
        place = self._place(row, column)
        ends = {"x0": 0, "x1": 1, "y0": y, "y1": y} if x is None else {"x0": x, "x1": x, "y0": 0, "y1": 1}
        axes = {"xref": f"x{place}" + " domain" * (x is None), "yref": f"y{place}" + " domain" * (x is not None)}
        self._layout["shapes"].append(
            {"type": "line", **ends, **axes, "line": {"color": MUTED, "width": 1.2, "dash": dash}, "layer": "below"}
        )

    def axis(self, which: str, row: int, column: int, **settings: Any) -> None:
        """Settings of a panel's "x" or "y" axis."""
        self._layout.setdefault(f"{which}axis{self._place(row, column)}", {}).update(settings)

    def figure(self) -> Figure:
        """All of it, once."""
        self._figure.add_traces(self._traces)
        return self._figure.update_layout(self._layout)

    def _place(self, row: int, column: int) -> str:
        number = row * self._columns + column + 1
        return "" if number == 1 else str(number)


def styled(figure: Figure, *, height: int, legend: bool = False, left: int = 70) -> Figure:
    """The figure in this project's style: white, for a notebook or paper; a page may take other colors."""
    axis = {
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": GRID,
        "automargin": True,
        "title": {"font": {"size": 12}},
    }
    figure.update_layout(
        template={"layout": {"xaxis": axis, "yaxis": axis, "font": {"family": _FONT, "size": 12, "color": INK}}},
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
    """Raise where a table lacks a column or has no rows.

    Raises:
        ValueError: With the figure's name and what is missing.
    """
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"{what} needs columns {', '.join(columns)}; {missing[0]!r} is missing.")
    if frame.empty:
        raise ValueError(f"{what}: there are no rows to show.")


def plain(text: str) -> str:
    """A name as Plotly shows it letter by letter, cut where it would fill the figure."""
    text = visible(str(text).replace("\n", " "))
    return html.escape(text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…", quote=False)


def name_in_words(name: str) -> str:
    """A category's or construction's name, in words."""
    return plain(name.replace("_", " "))


@dataclass(frozen=True)
class Html:
    """Markup that Jupyter shows as it is, and that needs no network."""

    markup: str

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return f"Html({len(self.markup):,} characters)"


def token_scores(tokens: Sequence[str], scores: Iterable[float]) -> Html:
    """Tokens colored by a score (blue above zero, red below), with the numbers on hover; CircuitsVis draws them.

    Args:
        tokens: Texts of the tokens; anything in them is shown, nothing is run.
        scores: One number a token (list, array or tensor).

    Raises:
        ValueError: If lengths differ or a score is not finite.
    """
    from circuitsvis.tokens import colored_tokens

    shown = [html.escape(visible(token), quote=False) for token in tokens]  # CircuitsVis parses tokens as markup
    values = [float(score) for score in scores]
    if len(shown) != len(values) or not shown:
        raise ValueError(f"token_scores needs one score a token, got {len(shown)} tokens and {len(values)} scores.")
    if not all(math.isfinite(value) for value in values):
        raise ValueError("token_scores needs finite scores, got nan or inf; leave those tokens out or give 0.")
    largest = max(map(abs, values)) or 1.0  # one scale for both colors
    markup = colored_tokens(
        shown, values, -largest, largest
    ).local_src  # str() and _repr_html_ may load it from the network
    listed = json.dumps(shown)  # CircuitsVis puts it into a script as it is: "</script>" in a token would end that
    if markup.count(listed) != 1:
        raise RuntimeError(
            "circuitsvis writes tokens in another way than 1.43 does; token_scores has to be adapted to escape them."
        )
    return Html(markup.replace(listed, script_safe(listed)))


_library_shown = False


@dataclass(frozen=True)
class Picture:
    """A still picture that Jupyter, and whatever shows a saved notebook, can show."""

    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"Picture({len(self.png):,} bytes)"


def show(figure: Figure, *, library: bool | None = None) -> Html | Picture:
    """A figure for a notebook that is also read offline, where Plotly's own renderer leaves a blank.

    Where Plotly's renderer is set to "png" (``plotly.io.renderers.default`` or PLOTLY_RENDERER) it is a still picture instead, drawn by
    kaleido: small, and shown by pages that run no scripts.

    Args:
        figure: Any Plotly figure.
        library: Whether to bring plotly.js (5 MB) along; by default the first call of a process does, and the others use it.

    Returns:
        What a cell should end with.
    """
    global _library_shown
    import plotly.io
    from plotly.offline import get_plotlyjs

    if plotly.io.renderers.default == "png":
        width = figure.layout.width or 900
        return Picture(figure.to_image("png", width=width, height=figure.layout.height or 450, scale=1.5))

    library = not _library_shown if library is None else library
    _library_shown = _library_shown or library
    place, height = f"figure-{uuid.uuid4().hex}", figure.layout.height or 450
    source = f"<script>{get_plotlyjs()}</script>" if library else ""
    missing = "plotly.js comes with the first figure of this notebook: run it from the top."
    return Html(
        f'{source}<div id="{place}" style="min-height:{height}px">{missing}</div>'
        "<script>if (window.Plotly) {"
        f'const place = document.getElementById("{place}"), figure = {script_safe(figure.to_json())};'
        f"place.textContent = ''; Plotly.newPlot(place, figure.data, figure.layout, {json.dumps(_CONFIG)});"
        "}</script>"
    )


def script_safe(source: str) -> str:
    """JSON that can stand inside a script element, whatever its texts say."""
    return source.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
