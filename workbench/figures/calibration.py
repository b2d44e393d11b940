"""Draw a calibration: what each setting that was tried gains, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.figures.style import (
    COLORS,
    MUTED,
    SYMBOLS,
    Panels,
    check_table,
    name_in_words,
    plain_label,
    styled,
)
from workbench.figures.wording import UNSTEERED, how_applied, metric, number, short_sites

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

COSTS = ("relevance", "degenerate", "refusal", "neutral_kl")
"""Measures of what steering may cost, each set against the share of safe and helpful answers."""

_HEADLINE = "safe_helpful_proxy"

_COLUMNS = ("construction", "sites", "sign", "rho", "metric", "value", "front", "chosen")


def front(frame: pd.DataFrame) -> Figure:
    """Draw every setting by what it gains and what it costs.

    Filled marks are on the front (no other setting is as good in everything and better in
    something), rings mark the chosen settings. A small open mark left the search in an earlier
    round, on fewer prompts.

    Args:
        frame: tuning.csv or ``Calibration.table``: columns construction, sites, sign, rho, metric,
            value, front and chosen.

    Returns:
        One panel per cost: share of safe and helpful answers against it.

    Raises:
        ValueError: If a column is missing, or there are no rows of the share of safe and helpful
            answers or of any cost.
    """
    check_table("front", frame, _COLUMNS)
    costs = [name for name in COSTS if name in set(frame["metric"])]
    if _HEADLINE not in set(frame["metric"]) or not costs:
        raise ValueError(f"front: needs rows of {_HEADLINE!r} and of a cost ({', '.join(COSTS)}).")
    settings = _settings(frame)
    panels = Panels(1, len(costs), titles=["" for _ in costs], gap=0)
    for column, cost in enumerate(costs):
        _add_settings(panels, column, cost, settings)
        share = {"tickformat": ".0%"} if metric(cost).share else {}
        title = {"text": metric(cost).label}
        panels.axis("x", 0, column, title=title, nticks=5, tickangle=0, **share)
        highest = max((row[_HEADLINE] for row in settings if _known(row, cost)), default=1.0)
        panels.axis("y", 0, column, tickformat=".0%", range=[-0.04, highest + 0.06])
    panels.axis("y", 0, 0, title={"text": plain_label(metric(_HEADLINE).label)})
    return styled(panels.figure(), height=430, legend=True)


def _settings(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one record per setting, with each metric under its own name."""
    ways = ("positions", "until", "decay", "keep_norm", "form", "round")
    optional = [name for name in ways if name in frame]
    table = frame.fillna({"until": -1} if "until" in frame else {}).pivot_table(
        index=["construction", "sites", "sign", "rho", *optional, "front", "chosen"],
        columns="metric",
        values="value",
        dropna=True,
        observed=True,
    )
    return table.reset_index().to_dict("records")


def _add_settings(
    panels: Panels, column: int, cost: str, settings: Sequence[dict[str, Any]]
) -> None:
    """Add one panel's marks: settings by construction, rings, and the unsteered model."""
    steered = [row for row in settings if row["construction"] != UNSTEERED]
    last_round = max((row.get("round", 0) for row in steered), default=0)
    for k, construction in enumerate(dict.fromkeys(row["construction"] for row in steered)):
        rows = [row for row in steered if row["construction"] == construction and _known(row, cost)]
        symbol = SYMBOLS[k % len(SYMBOLS)]
        panels.add(
            0,
            column,
            x=[row[cost] for row in rows],
            y=[row[_HEADLINE] for row in rows],
            mode="markers",
            name=name_in_words(construction),
            legendgroup=construction,
            showlegend=column == 0,
            marker={
                "color": COLORS[k % len(COLORS)],
                "symbol": [symbol if row["front"] else f"{symbol}-open" for row in rows],
                "size": [11 if row.get("round", 0) == last_round else 6 for row in rows],
            },
            customdata=[_hover(row, cost) for row in rows],
            hovertemplate="%{customdata}<extra>" + name_in_words(construction) + "</extra>",
        )
    ring = {"size": 19, "symbol": "circle-open", "color": MUTED, "line": {"width": 2}}
    cross = {"size": 12, "symbol": "x", "color": MUTED}
    chosen = [row for row in steered if row["chosen"]]
    unsteered = [row for row in settings if row["construction"] == UNSTEERED]
    for name, rows, marker, hover in (
        ("chosen", chosen, ring, {"hoverinfo": "skip"}),
        (UNSTEERED, unsteered, cross, {}),
    ):
        known = [row for row in rows if _known(row, cost)]
        panels.add(
            0,
            column,
            x=[row[cost] for row in known],
            y=[row[_HEADLINE] for row in known],
            mode="markers",
            name=name,
            marker=marker,
            showlegend=column == 0,
            **hover,
        )


def _hover(row: Mapping[str, Any], cost: str) -> str:
    way = "along" if row["sign"] > 0 else "against"
    values = [f"{metric(m).label} {number(m, row[m])}" for m in (_HEADLINE, cost)]
    setting = f"{plain_label(short_sites(row['sites']))}, {way} the vector"
    strength = ", ".join(filter(None, (f"strength {row['rho']:.3g}", how_applied(row))))
    return f"{setting}, {strength}<br>" + "<br>".join(values)


def _known(row: Mapping[str, Any], cost: str) -> bool:
    return math.isfinite(row.get(cost, math.nan)) and math.isfinite(row.get(_HEADLINE, math.nan))
