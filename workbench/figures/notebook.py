"""How figures are drawn: panels, colors, names as plain text, and markup that notebooks show without a network."""

from __future__ import annotations

import html
import json
import math
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.figures.wording import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from plotly.graph_objects import Figure
from workbench.figures.style import _CONFIG


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

    shown = [
        html.escape(visible(token), quote=False) for token in tokens
    ]  # CircuitsVis parses tokens as markup
    values = [float(score) for score in scores]
    if len(shown) != len(values) or not shown:
        raise ValueError(
            f"token_scores needs one score a token, got {len(shown)} tokens and {len(values)} scores."
        )
    if not all(math.isfinite(value) for value in values):
        raise ValueError(
            "token_scores needs finite scores, got nan or inf; leave those tokens out or give 0."
        )
    largest = max(map(abs, values)) or 1.0  # one scale for both colors
    markup = colored_tokens(
        shown, values, -largest, largest
    ).local_src  # str() and _repr_html_ may load it from the network
    listed = json.dumps(
        shown
    )  # CircuitsVis puts it into a script as it is: "</script>" in a token would end that
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
        return Picture(
            figure.to_image("png", width=width, height=figure.layout.height or 450, scale=1.5)
        )

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
