"""Results to figures. Pure functions of tables: no figure sees a model, reads a result's file or needs the network.

Tables are those of a run folder (evaluation.csv, tuning.csv, separability.csv, neurons.csv). Every name that comes from one is shown as
plain text: Plotly would read tags in it as markup. Colors stay apart for color-blind readers, and no meaning rests on color alone.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from workbench.figures.style import (
    COLORS,
    MUTED,
    Panels,
    check_table,
    name_in_words,
    plain_label,
    styled,
)
from workbench.figures.wording import (
    ALL_CATEGORIES,
    METRICS,
    UNSTEERED,
    in_order,
    interval,
    is_control,
    main_metrics,
    metric,
    number,
    short_sites,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from plotly.graph_objects import Figure

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
from workbench.figures.style import of_category
from workbench.figures.wording import AGAINST

_DASHES = ("solid", "dash", "dot")


_SYMBOLS = ("circle", "diamond", "square")


_VALUE, _CHANGE = ("value", "low", "high"), ("difference", "difference_low", "difference_high")


def separability(frame: pd.DataFrame) -> Figure:
    """How well a category's direction tells its prompts from others, layer by layer, on prompts it was not fitted on.

    Args:
        frame: Columns layer, category, against (twins, other, neutral) and auroc; low, high, n and kind if there are.

    Returns:
        One column of panels a comparison, one row a kind of site, one line a category; .5 is chance.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    check_table("separability", frame, ("layer", "category", "against", "auroc"))
    frame = frame if "kind" in frame else frame.assign(kind="")
    kinds, categories = list(dict.fromkeys(frame["kind"])), list(dict.fromkeys(frame["category"]))
    sides = in_order(frame["against"], tuple(AGAINST))
    titles = [plain_label(AGAINST.get(side, side)) for side in sides]
    panels = Panels(len(kinds), len(sides), titles=titles, gap=0.14 / len(kinds), shared_xaxes=True)
    for (i, kind), (j, side), (k, category) in _cells(kinds, sides, categories):
        rows = frame[
            (frame["category"] == category) & (frame["against"] == side) & (frame["kind"] == kind)
        ]
        rows = rows.sort_values("layer")
        panels.add(
            i,
            j,
            x=rows["layer"].tolist(),
            y=rows["auroc"].tolist(),
            customdata=[
                _hover("auroc", row, ("auroc", "low", "high")) for row in rows.to_dict("records")
            ],
            mode="lines+markers",
            name=name_in_words(category),
            legendgroup=str(k),
            showlegend=i == j == 0,
            line={
                "color": COLORS[k % len(COLORS)],
                "width": 1.8,
                "dash": _DASHES[k // len(COLORS) % 3],
            },
            marker={"size": 4.5, "symbol": _SYMBOLS[k // len(COLORS) % 3]},
            hovertemplate="layer %{x}: %{customdata}<extra>" + name_in_words(category) + "</extra>",
        )
        if k == 0:
            panels.line(i, j, y=0.5)
        panels.axis("x", i, j, title={"text": "layer" if i == len(kinds) - 1 else ""})
        panels.axis(
            "y",
            i,
            j,
            range=[min(0.38, float(frame["auroc"].min()) - 0.04), 1.03],
            dtick=0.1,
            tickformat=".1f",
        )
        if j == 0:
            panels.axis("y", i, j, title={"text": f"AUROC<br>{plain_label(kind)}"})
    return styled(panels.figure(), height=130 + 230 * len(kinds), legend=True)


def tuning(frame: pd.DataFrame, metrics: Sequence[str] | None = None) -> Figure:
    """What each sign, place and strength did on the tune fold, and which setting was chosen.

    Args:
        frame: Columns construction, sites, sign, rho, metric and value; low, high, n, feasible and chosen if there are. Rows of
            construction "unsteered" are the reference.
        metrics: Which; the most telling four by default.

    Returns:
        One column of panels a construction, one row a metric; strength runs from left (against the vector) to right (along it). Chosen
        settings have a ring, crosses break too much text.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    import pandas as pd

    check_table("tuning", frame, ("construction", "sites", "sign", "rho", "metric", "value"))
    names = in_order(frame["metric"], tuple(METRICS))
    names = names[:4] if metrics is None else [name for name in metrics if name in names]
    base = frame[frame["construction"] == UNSTEERED]
    frame = frame[(frame["construction"] != UNSTEERED) & frame["metric"].isin(names)]
    check_table("tuning", frame, ())
    tried = frame[["construction", "sites"]].drop_duplicates().to_dict("records")
    frame = pd.concat(
        [frame, *(base[base["metric"].isin(names)].assign(**place) for place in tried)]
    )  # unsteered is strength 0
    frame = frame.assign(strength=frame["sign"] * frame["rho"]).sort_values(
        "strength", kind="stable"
    )
    constructions, places = sorted(set(frame["construction"])), sorted(set(frame["sites"]))
    titles = [name_in_words(c) for c in constructions]
    panels = Panels(
        len(names), len(titles), titles=titles, gap=0.16 / len(names), shared_xaxes=True
    )
    ring = {"size": 18, "symbol": "circle-open", "color": MUTED, "line": {"width": 2.5}}
    for (i, name), (j, construction), (k, place) in _cells(names, constructions, places):
        own = frame[
            (frame["metric"] == name)
            & (frame["construction"] == construction)
            & (frame["sites"] == place)
        ]
        rows, color, label = (
            own.to_dict("records"),
            COLORS[k % len(COLORS)],
            plain_label(short_sites(place)),
        )
        panels.add(
            i,
            j,
            x=own["strength"].tolist(),
            y=own["value"].tolist(),
            error_y=_bars(rows, _VALUE, color),
            customdata=[_hover(name, row, _VALUE) for row in rows],
            mode="lines+markers",
            legendgroup=f"place {k}",
            showlegend=False,
            line={"color": color, "width": 1, "dash": _DASHES[k % 3]},
            marker={
                "size": 8,
                "symbol": [_SYMBOLS[k % 3] if row.get("feasible", True) else "x" for row in rows],
            },
            hovertemplate="strength %{x}: %{customdata}<extra>" + label + "</extra>",
        )
        chosen = own[own["chosen"].astype(bool)] if "chosen" in own else own[:0]
        x, y = chosen["strength"].tolist(), chosen["value"].tolist()
        panels.add(
            i,
            j,
            x=x,
            y=y,
            mode="markers",
            marker=ring,
            showlegend=False,
            hoverinfo="skip",
            cliponaxis=False,
        )
        for value in base.loc[(base["metric"] == name) & (k == 0), "value"].dropna():
            panels.line(i, j, y=value, dash="dot")
        if metric(name).share:
            panels.axis("y", i, j, range=[-0.06, 1.06], tickformat=".0%", nticks=4)
        if j == 0:
            panels.axis("y", i, j, title={"text": _two_lines(metric(name).label)})
        if i == len(names) - 1:
            panels.axis("x", i, j, title={"text": "strength: against the vector ← 0 → along it"})
    nothing = {"x": [None], "y": [None]}  # for the legend only
    for k, place in enumerate(places):
        line = {"color": COLORS[k % len(COLORS)], "width": 1, "dash": _DASHES[k % 3]}
        mark = {"size": 8, "symbol": _SYMBOLS[k % 3]}
        panels.add(
            0,
            0,
            name=plain_label(short_sites(place)),
            legendgroup=f"place {k}",
            line=line,
            marker=mark,
            **nothing,
        )
    for mark, label in (
        (ring, "chosen"),
        ({"size": 8, "symbol": "x", "color": MUTED}, "breaks too much text"),
    ):
        panels.add(0, 0, name=label, marker=mark, mode="markers", **nothing)
    return styled(panels.figure(), height=140 + 140 * len(names), legend=True, left=95)


def evaluation(
    frame: pd.DataFrame, category: str = ALL_CATEGORIES, metrics: Sequence[str] | None = None
) -> Figure:
    """Conditions and metrics as small multiples: above the values, below the paired differences to the unsteered model, with intervals.

    In the lower rows a mark is filled where the interval leaves out zero. Diamonds are controls, the square is the unsteered model.

    Args:
        frame: Columns condition, category, metric, value; low, high, n, n_unscored, difference, difference_low and difference_high if
            there are: evaluation.csv or ``Evaluation.summary()``.
        category: A risk category, or "all" for the pooled rows.
        metrics: Which; the main ones by default.

    Raises:
        ValueError: If a column is missing, or there are no rows of the category or the metrics.
    """
    check_table("evaluation", frame, ("condition", "category", "metric", "value"))
    rows = of_category(frame, "evaluation", "category", category)
    known = in_order(rows["metric"], tuple(METRICS))
    wanted = metrics if metrics is not None else main_metrics(known) or known[:5]
    names = [name for name in wanted if name in known]
    if not names:
        raise ValueError(
            f"evaluation: no rows of metrics {list(metrics or ())}; metrics: {', '.join(known)}."
        )
    conditions, records = in_order(rows["condition"], (UNSTEERED,)), rows.to_dict("records")
    columns = min(5, len(names))
    blocks = math.ceil(len(names) / columns)
    titles = [""] * (2 * blocks * columns)
    for place, name in enumerate(names):
        titles[place // columns * 2 * columns + place % columns] = (
            f"<b>{_two_lines(metric(name).label)}</b>"
        )
    panels = Panels(2 * blocks, columns, titles=titles, gap=0.2 / blocks)
    ticks = {
        "tickvals": list(range(len(conditions))),
        "ticktext": [plain_label(c) for c in conditions],
    }
    for (place, name), (below, keys) in itertools.product(
        enumerate(names), enumerate((_VALUE, _CHANGE))
    ):
        i, j = place // columns * 2 + below, place % columns
        share = metric(name).share
        scale = 100 if share else 1
        for k, condition in enumerate(conditions):
            own = [row for row in records if (row["condition"], row["metric"]) == (condition, name)]
            own = [row for row in own if math.isfinite(row.get(keys[0], math.nan))]
            symbol = (
                "square"
                if condition == UNSTEERED
                else "diamond"
                if is_control(condition)
                else "circle"
            )
            clear = [not below or row.get(keys[1], 0) > 0 or row.get(keys[2], 0) < 0 for row in own]
            color = _condition_color(condition, conditions)
            symbols = [symbol if full else f"{symbol}-open" for full in clear]
            panels.add(
                i,
                j,
                x=[scale * row[keys[0]] for row in own],
                y=[k] * len(own),
                error_x=_bars(own, keys, color, scale),
                mode="markers",
                marker={
                    "color": color,
                    "size": 9,
                    "line": {"width": 1.6, "color": color},
                    "symbol": symbols,
                },
                customdata=[_hover(name, row, keys) for row in own],
                hovertemplate="%{customdata}<extra>" + plain_label(condition) + "</extra>",
            )
            if condition == UNSTEERED and own:
                panels.line(i, j, x=scale * own[0]["value"])
        if below:
            panels.line(i, j, x=0.0, dash="solid")
        title = "change" + ", points" * share if below else "value"
        sign, unit = "+" * below, "%" * (share and not below)
        text = {"text": title, "standoff": 4}
        panels.axis(
            "x", i, j, tickformat=f"{sign}~g", ticksuffix=unit, nticks=5, tickangle=0, title=text
        )
        panels.axis(
            "y", i, j, range=[len(conditions) - 0.4, -0.6], showgrid=False, zeroline=False, **ticks
        )
    return styled(panels.figure(), height=blocks * (170 + 52 * len(conditions)), left=120)


def _cells(*axes: Sequence[str]) -> Iterable[tuple[tuple[int, str], ...]]:
    """Every combination, each with its places: for panels by row, column and line."""
    return itertools.product(*(list(enumerate(axis)) for axis in axes))


def _bars(
    rows: Sequence[dict[str, Any]], keys: tuple[str, str, str], color: str, scale: float = 1
) -> dict[str, Any]:
    """Error bars of intervals; none where an end is missing or infinite."""
    value, low, high = keys
    ends = [(row[value], row.get(low, math.nan), row.get(high, math.nan)) for row in rows]
    known = [
        (v, lo, hi) if math.isfinite(lo) and math.isfinite(hi) else (v, v, v) for v, lo, hi in ends
    ]
    up, down = [scale * (hi - v) for v, _, hi in known], [scale * (v - lo) for v, lo, _ in known]
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": color,
        "thickness": 1.6,
        "width": 0,
    }


def _hover(name: str, row: dict[str, Any], keys: tuple[str, str, str]) -> str:
    value, low, high = keys
    signed = value == "difference"
    text = f"{number(name, row[value], signed=signed)} {interval(name, row.get(low, math.nan), row.get(high, math.nan), signed=signed)}"
    text += f", n = {int(row['n'])}" if math.isfinite(row.get("n", math.nan)) else ""
    return text + (f", {int(row['n_unscored'])} unscored" if row.get("n_unscored", 0) > 0 else "")


def _condition_color(condition: str, conditions: Sequence[str]) -> str:
    if condition == UNSTEERED or is_control(condition):
        return MUTED
    return COLORS[
        [c for c in conditions if c != UNSTEERED and not is_control(c)].index(condition)
        % len(COLORS)
    ]


def _two_lines(label: str) -> str:
    return plain_label(label).replace(" (", "<br>(", 1)
