"""Figures of a calibration: what each setting that was tried gains and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from workbench.figures.wording import UNSTEERED, metric, number, short_sites

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

COSTS = ("relevance", "degenerate", "refusal", "neutral_kl")
"""What steering may cost, set against the share of safe and helpful answers."""


_HEADLINE = "safe_helpful_proxy"


def front(frame: pd.DataFrame) -> Figure:
    """Every setting by what it gains and what it costs; those on the front are filled, the chosen ones have a ring.

    Args:
        frame: tuning.csv or ``Calibration.table``: columns construction, sites, sign, rho, metric, value, front and chosen.

    Returns:
        One panel a cost: share of safe and helpful answers against it. A small open mark left the search in an earlier round, on fewer prompts.

    Raises:
        ValueError: If a column is missing, or there is no headline in it.
    """
    check_table(
        "front",
        frame,
        ("construction", "sites", "sign", "rho", "metric", "value", "front", "chosen"),
    )
    names = [name for name in COSTS if name in set(frame["metric"])]
    if _HEADLINE not in set(frame["metric"]) or not names:
        raise ValueError(f"front: needs rows of {_HEADLINE!r} and of a cost ({', '.join(COSTS)}).")
    keys = ["construction", "sites", "sign", "rho"] + [
        k for k in ("positions", "until", "round") if k in frame
    ]
    wide = frame.fillna({"until": -1} if "until" in frame else {}).pivot_table(
        index=[*keys, "front", "chosen"],
        columns="metric",
        values="value",
        dropna=True,
        observed=True,
    )
    points = wide.reset_index().to_dict("records")
    base = [row for row in points if row["construction"] == UNSTEERED]
    points = [row for row in points if row["construction"] != UNSTEERED]
    last = max((row.get("round", 0) for row in points), default=0)
    constructions = list(dict.fromkeys(row["construction"] for row in points))
    panels = Panels(1, len(names), titles=["" for _ in names], gap=0)
    for j, name in enumerate(names):
        for k, construction in enumerate(constructions):
            own = [
                row for row in points if row["construction"] == construction and _known(row, name)
            ]
            symbol = SYMBOLS[k % len(SYMBOLS)]
            panels.add(
                0,
                j,
                x=[row[name] for row in own],
                y=[row[_HEADLINE] for row in own],
                mode="markers",
                name=name_in_words(construction),
                legendgroup=construction,
                showlegend=j == 0,
                marker={
                    "color": COLORS[k % len(COLORS)],
                    "symbol": [symbol if row["front"] else f"{symbol}-open" for row in own],
                    "size": [11 if row.get("round", 0) == last else 6 for row in own],
                },
                customdata=[_setting(row, name) for row in own],
                hovertemplate="%{customdata}<extra>" + name_in_words(construction) + "</extra>",
            )
        chosen = [row for row in points if row["chosen"] and _known(row, name)]
        ring = {"size": 19, "symbol": "circle-open", "color": MUTED, "line": {"width": 2}}
        x, y = [row[name] for row in chosen], [row[_HEADLINE] for row in chosen]
        panels.add(
            0,
            j,
            x=x,
            y=y,
            mode="markers",
            name="chosen",
            marker=ring,
            showlegend=j == 0,
            hoverinfo="skip",
        )
        known = [row for row in base if _known(row, name)]
        x, y = [row[name] for row in known], [row[_HEADLINE] for row in known]
        mark = {"size": 12, "symbol": "x", "color": MUTED}
        panels.add(0, j, x=x, y=y, mode="markers", name=UNSTEERED, marker=mark, showlegend=j == 0)
        share = {"tickformat": ".0%"} if metric(name).share else {}
        panels.axis("x", 0, j, title={"text": metric(name).label}, nticks=5, tickangle=0, **share)
        highest = max(
            (row[_HEADLINE] for row in [*points, *base] if _known(row, name)), default=1.0
        )
        panels.axis("y", 0, j, tickformat=".0%", range=[-0.04, highest + 0.06])
    panels.axis("y", 0, 0, title={"text": plain_label(metric(_HEADLINE).label)})
    return styled(panels.figure(), height=430, legend=True)


def _setting(row: Mapping[str, Any], name: str) -> str:
    way = "along" if row["sign"] > 0 else "against"
    shown = [f"{metric(m).label} {number(m, row[m])}" for m in (_HEADLINE, name)]
    return (
        f"{plain_label(short_sites(row['sites']))}, {way} the vector, strength {row['rho']:.3g}<br>"
        + "<br>".join(shown)
    )


def _known(row: Mapping[str, Any], name: str) -> bool:
    return math.isfinite(row.get(name, math.nan)) and math.isfinite(row.get(_HEADLINE, math.nan))
