"""Show figures and colored tokens in a notebook that may be read offline.

Whatever they need is inside the markup: it loads nothing from the network.
"""

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

_CONFIG = {
    "displaylogo": False,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}
"""Plotly's buttons, named one by one: among the default ones is an upload to a server."""

_library_shown = False


@dataclass(frozen=True)
class Html:
    """Markup that Jupyter shows as it is, and that needs no network."""

    markup: str

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return f"Html({len(self.markup):,} characters)"


@dataclass(frozen=True)
class Picture:
    """A still picture that Jupyter, and whatever shows a saved notebook, can show."""

    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"Picture({len(self.png):,} bytes)"


def token_scores(tokens: Sequence[str], scores: Iterable[float]) -> Html:
    """Color tokens by a score, blue above zero and red below, with the numbers on hover.

    CircuitsVis draws them.

    Args:
        tokens: Texts of the tokens; anything in them is shown, nothing is run.
        scores: One number per token (list, array or tensor).

    Raises:
        ValueError: If lengths differ or a score is not finite.
    """
    from circuitsvis.tokens import colored_tokens

    # CircuitsVis parses tokens as markup, so they are escaped.
    shown = [html.escape(visible(token), quote=False) for token in tokens]
    values = [float(score) for score in scores]
    if len(shown) != len(values) or not shown:
        raise ValueError(
            f"token_scores needs one score per token, got {len(shown)} tokens and "
            f"{len(values)} scores."
        )
    if not all(math.isfinite(value) for value in values):
        raise ValueError(
            "token_scores needs finite scores, got nan or inf; leave those tokens out or give 0."
        )
    largest = max(map(abs, values)) or 1.0  # one scale for both colors
    # local_src, because str() and _repr_html_ may load the library from the network
    markup = colored_tokens(shown, values, -largest, largest).local_src
    # CircuitsVis puts this list into a script as it is: "</script>" in a token would end that
    token_list = json.dumps(shown)
    if markup.count(token_list) != 1:
        raise RuntimeError(
            "circuitsvis writes tokens in another way than 1.43 does; "
            "token_scores has to be adapted to escape them."
        )
    return Html(markup.replace(token_list, script_safe(token_list)))


def show(figure: Figure, *, library: bool | None = None) -> Html | Picture:
    """Return a figure for a notebook that is also read offline.

    Plotly's own notebook renderer leaves a blank there. Where that renderer is set to "png"
    (``plotly.io.renderers.default`` or PLOTLY_RENDERER) the figure is a still picture instead,
    drawn by kaleido: small, and shown by pages that run no scripts.

    Args:
        figure: Any Plotly figure.
        library: Whether to bring plotly.js (5 MB) along; by default the first call of a process
            does, and the others use it.

    Returns:
        What a cell should end with.
    """
    global _library_shown
    import plotly.io

    if plotly.io.renderers.default == "png":
        width = figure.layout.width or 900
        return Picture(
            figure.to_image("png", width=width, height=figure.layout.height or 450, scale=1.5)
        )

    library = not _library_shown if library is None else library
    _library_shown = _library_shown or library
    place = f"figure-{uuid.uuid4().hex}"
    # Plotly's export escapes "<", ">" and "/" in every text, so none can end its script.
    markup = plotly.io.to_html(
        figure,
        config=_CONFIG,
        include_plotlyjs=library,
        full_html=False,
        default_height="450px",
        div_id=place,
        post_script=f'document.getElementById("{place}-missing")?.remove();',
    )
    missing = "plotly.js comes with the first figure of this notebook: run it from the top."
    return Html(f'<p id="{place}-missing">{missing}</p>{markup}')


def script_safe(source: str) -> str:
    """Return JSON so that it can stand inside a script element, whatever its texts say."""
    return source.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
