"""Draw the results of a run: separability by layer, the tuning grid, and the evaluation.

Figures are pure functions of tables: none sees a model, reads a file or needs the network. The
tables are those of a run folder (separability.csv, tuning.csv, evaluation.csv). Every name that
comes from one is shown as plain text, since Plotly would read tags in it as markup.
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
    of_category,
    plain_label,
    styled,
)
from workbench.figures.wording import (
    AGAINST,
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

_DASHES = ("solid", "dash", "dot")

_SYMBOLS = ("circle", "diamond", "square")

_RING = {"size": 18, "symbol": "circle-open", "color": MUTED, "line": {"width": 2.5}}
"""Mark of a chosen setting."""

_VALUE, _CHANGE = ("value", "low", "high"), ("difference", "difference_low", "difference_high")
"""Columns of an estimate and the ends of its interval."""


def separability(frame: pd.DataFrame) -> Figure:
    """Draw how well a category's direction tells its prompts from others, layer by layer.

    The values belong to prompts that the direction was not fitted on.

    Args:
        frame: Columns layer, category, against (twins, other, neutral) and auroc; low, high, n and
            kind if the table has them.

    Returns:
        One column of panels per comparison, one row per kind of site, one line per category; .5 is
        chance.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    check_table("separability", frame, ("layer", "category", "against", "auroc"))
    frame = frame if "kind" in frame else frame.assign(kind="")
    kinds, categories = list(dict.fromkeys(frame["kind"])), list(dict.fromkeys(frame["category"]))
    sides = in_order(frame["against"], tuple(AGAINST))
    titles = [plain_label(AGAINST.get(side, side)) for side in sides]
    panels = Panels(len(kinds), len(sides), titles=titles, gap=0.14 / len(kinds), shared_xaxes=True)
    lowest = min(0.38, float(frame["auroc"].min()) - 0.04)
    for (i, kind), (j, side), (k, category) in _places(kinds, sides, categories):
        rows = frame[
            (frame["category"] == category) & (frame["against"] == side) & (frame["kind"] == kind)
        ].sort_values("layer")
        name, color = name_in_words(category), COLORS[k % len(COLORS)]
        lap = k // len(COLORS) % 3  # categories beyond the colors get another dash and symbol
        panels.add(
            i,
            j,
            x=rows["layer"].tolist(),
            y=rows["auroc"].tolist(),
            customdata=[
                _hover("auroc", row, ("auroc", "low", "high")) for row in rows.to_dict("records")
            ],
            mode="lines+markers",
            name=name,
            legendgroup=str(k),
            showlegend=i == j == 0,
            line={"color": color, "width": 1.8, "dash": _DASHES[lap]},
            marker={"size": 4.5, "symbol": _SYMBOLS[lap]},
            hovertemplate=f"layer %{{x}}: %{{customdata}}<extra>{name}</extra>",
        )
        if k == 0:
            panels.line(i, j, y=0.5)
        panels.axis("x", i, j, title={"text": "layer" if i == len(kinds) - 1 else ""})
        panels.axis("y", i, j, range=[lowest, 1.03], dtick=0.1, tickformat=".1f")
        if j == 0:
            panels.axis("y", i, j, title={"text": f"AUROC<br>{plain_label(kind)}"})
    return styled(panels.figure(), height=130 + 230 * len(kinds), legend=True)


def tuning(frame: pd.DataFrame, metrics: Sequence[str] | None = None) -> Figure:
    """Draw what each sign, place and strength did on the tune fold, and what was chosen.

    Args:
        frame: Columns construction, sites, sign, rho, metric and value; low, high, n, feasible and
            chosen if the table has them. Rows of construction "unsteered" are the reference.
        metrics: Metrics to draw; the most telling four by default.

    Returns:
        One column of panels per construction, one row per metric. Strength runs from left (against
        the vector) to right (along it). Chosen settings have a ring; crosses break too much text.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    check_table("tuning", frame, ("construction", "sites", "sign", "rho", "metric", "value"))
    names = in_order(frame["metric"], tuple(METRICS))
    names = names[:4] if metrics is None else [name for name in metrics if name in names]
    unsteered = frame[frame["construction"] == UNSTEERED]
    if "dropped" in frame and "n" in frame:  # settings that were never answered have no values
        frame = frame[frame["n"] > 0]
    frame = _with_strength_zero(frame, unsteered, names)
    constructions, places = sorted(set(frame["construction"])), sorted(set(frame["sites"]))
    titles = [name_in_words(construction) for construction in constructions]
    panels = Panels(
        len(names), len(titles), titles=titles, gap=0.16 / len(names), shared_xaxes=True
    )
    for (i, name), (j, construction), (k, place) in _places(names, constructions, places):
        settings = frame[
            (frame["metric"] == name)
            & (frame["construction"] == construction)
            & (frame["sites"] == place)
        ]
        _add_strengths(panels, (i, j, k), settings, name, place)
        for value in unsteered.loc[(unsteered["metric"] == name) & (k == 0), "value"].dropna():
            panels.line(i, j, y=value, dash="dot")
        if metric(name).share:
            panels.axis("y", i, j, range=[-0.06, 1.06], tickformat=".0%", nticks=4)
        if j == 0:
            panels.axis("y", i, j, title={"text": _two_lines(metric(name).label)})
        if i == len(names) - 1:
            panels.axis("x", i, j, title={"text": "strength: against the vector ← 0 → along it"})
    _add_tuning_legend(panels, places)
    return styled(panels.figure(), height=140 + 140 * len(names), legend=True, left=95)


def _with_strength_zero(
    frame: pd.DataFrame, unsteered: pd.DataFrame, names: Sequence[str]
) -> pd.DataFrame:
    """Return the steered rows with the unsteered model added to each line, at strength 0."""
    import pandas as pd

    frame = frame[(frame["construction"] != UNSTEERED) & frame["metric"].isin(names)]
    check_table("tuning", frame, ())
    lines = frame[["construction", "sites"]].drop_duplicates().to_dict("records")
    zero = unsteered[unsteered["metric"].isin(names)]
    frame = pd.concat([frame, *(zero.assign(**line) for line in lines)])
    return frame.assign(strength=frame["sign"] * frame["rho"]).sort_values(
        "strength", kind="stable"
    )


def _add_strengths(
    panels: Panels, where: tuple[int, int, int], settings: pd.DataFrame, name: str, place: str
) -> None:
    """Add the settings of one place to a panel as a line, and rings around the chosen ones.

    Args:
        panels: The figure that is being filled.
        where: The panel's row and column, and the place's number.
        settings: The place's rows, in the order of their strength.
        name: The metric.
        place: The sites.
    """
    i, j, k = where
    rows, color, line = settings.to_dict("records"), COLORS[k % len(COLORS)], _place_style(k)
    symbols = [_SYMBOLS[k % 3] if row.get("feasible", True) else "x" for row in rows]
    panels.add(
        i,
        j,
        x=settings["strength"].tolist(),
        y=settings["value"].tolist(),
        error_y=_bars(rows, _VALUE, color),
        customdata=[_hover(name, row, _VALUE) for row in rows],
        mode="lines+markers",
        legendgroup=f"place {k}",
        showlegend=False,
        line=line,
        marker={"size": 8, "symbol": symbols},
        hovertemplate="strength %{x}: %{customdata}<extra>"
        + plain_label(short_sites(place))
        + "</extra>",
    )
    has_choice = "chosen" in settings
    chosen = settings[settings["chosen"].astype(bool)] if has_choice else settings[:0]
    panels.add(
        i,
        j,
        x=chosen["strength"].tolist(),
        y=chosen["value"].tolist(),
        mode="markers",
        marker=_RING,
        showlegend=False,
        hoverinfo="skip",
        cliponaxis=False,
    )


def _add_tuning_legend(panels: Panels, places: Sequence[str]) -> None:
    """Add traces without points, for the legend only."""
    nothing = {"x": [None], "y": [None]}
    for k, place in enumerate(places):
        panels.add(
            0,
            0,
            name=plain_label(short_sites(place)),
            legendgroup=f"place {k}",
            line=_place_style(k),
            marker={"size": 8, "symbol": _SYMBOLS[k % 3]},
            **nothing,
        )
    cross = {"size": 8, "symbol": "x", "color": MUTED}
    for marker, label in ((_RING, "chosen"), (cross, "breaks too much text")):
        panels.add(0, 0, name=label, marker=marker, mode="markers", **nothing)


def _place_style(k: int) -> dict[str, Any]:
    return {"color": COLORS[k % len(COLORS)], "width": 1, "dash": _DASHES[k % 3]}


def evaluation(
    frame: pd.DataFrame, category: str = ALL_CATEGORIES, metrics: Sequence[str] | None = None
) -> Figure:
    """Draw conditions and metrics as small multiples, with intervals.

    Above are the values, below the paired differences to the unsteered model. In the lower rows a
    mark is filled where the interval leaves out zero. Diamonds are controls, the square is the
    unsteered model.

    Args:
        frame: Columns condition, category, metric, value; low, high, n, n_unscored, difference,
            difference_low and difference_high if the table has them: evaluation.csv or
            ``Evaluation.summary()``.
        category: A risk category, or "all" for the pooled rows.
        metrics: Metrics to draw; the main ones by default.

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
    blocks = math.ceil(len(names) / columns)  # a block is a row of values above a row of changes
    titles = [""] * (2 * blocks * columns)
    for place, name in enumerate(names):
        panel = place // columns * 2 * columns + place % columns
        titles[panel] = f"<b>{_two_lines(metric(name).label)}</b>"
    panels = Panels(2 * blocks, columns, titles=titles, gap=0.2 / blocks)
    for (place, name), is_change in itertools.product(enumerate(names), (False, True)):
        where = place // columns * 2 + is_change, place % columns
        metric_rows = [row for row in records if row["metric"] == name]
        _add_conditions(panels, where, name, metric_rows, conditions, is_change=is_change)
    return styled(panels.figure(), height=blocks * (170 + 52 * len(conditions)), left=120)


def headline(frame: pd.DataFrame, name: str, category: str = ALL_CATEGORIES) -> Figure:
    """Draw one metric under every condition as marks with intervals; diamonds are controls.

    Args:
        frame: The table of ``evaluation``.
        name: The metric.
        category: A risk category, or "all" for the pooled rows.

    Raises:
        ValueError: If a column is missing, or there are no rows of the category or the metric.
    """
    check_table("headline", frame, ("condition", "category", "metric", "value"))
    rows = of_category(frame, "headline", "category", category)
    rows = of_category(rows, "headline", "metric", name)
    conditions = in_order(rows["condition"], (UNSTEERED,))
    panels = Panels(1, 1, titles=[f"<b>{plain_label(metric(name).label)}</b>"], gap=0)
    records = rows.to_dict("records")
    _add_conditions(panels, (0, 0), name, records, conditions, is_change=False)
    panels.axis("x", 0, 0, title={"text": ""})
    figure = styled(panels.figure(), height=80 + 30 * len(conditions), left=120)
    return figure.update_layout(margin_b=35)


def _add_conditions(
    panels: Panels,
    where: tuple[int, int],
    name: str,
    metric_rows: Sequence[dict[str, Any]],
    conditions: Sequence[str],
    *,
    is_change: bool,
) -> None:
    """Fill the panel of one metric: its value, or its change, under each condition."""
    i, j = where
    keys = _CHANGE if is_change else _VALUE
    scale = 100 if metric(name).share else 1
    for k, condition in enumerate(conditions):
        rows = [
            row
            for row in metric_rows
            if row["condition"] == condition and math.isfinite(row.get(keys[0], math.nan))
        ]
        color, symbol = _condition_style(condition, conditions)
        filled = [
            not is_change or row.get(keys[1], 0) > 0 or row.get(keys[2], 0) < 0 for row in rows
        ]
        panels.add(
            i,
            j,
            x=[scale * row[keys[0]] for row in rows],
            y=[k] * len(rows),
            error_x=_bars(rows, keys, color, scale),
            mode="markers",
            marker={
                "color": color,
                "size": 9,
                "line": {"width": 1.6, "color": color},
                "symbol": [symbol if full else f"{symbol}-open" for full in filled],
            },
            customdata=[_hover(name, row, keys) for row in rows],
            hovertemplate="%{customdata}<extra>" + plain_label(condition) + "</extra>",
        )
        if condition == UNSTEERED and rows:
            panels.line(i, j, x=scale * rows[0]["value"])
    if is_change:
        panels.line(i, j, x=0.0, dash="solid")
    title = ("change, points" if metric(name).share else "change") if is_change else "value"
    numbers = {
        "tickformat": "+~g" if is_change else "~g",
        "ticksuffix": "%" if metric(name).share and not is_change else "",
    }
    text = {"text": title, "standoff": 4}
    panels.axis("x", i, j, nticks=5, tickangle=0, title=text, **numbers)
    ticks = {
        "tickvals": list(range(len(conditions))),
        "ticktext": [plain_label(condition) for condition in conditions],
    }
    bottom_up = {"range": [len(conditions) - 0.4, -0.6]}
    panels.axis("y", i, j, showgrid=False, zeroline=False, **bottom_up, **ticks)


def _places(*axes: Sequence[str]) -> Iterable[tuple[tuple[int, str], ...]]:
    """Return every combination of names with their places, for panels by row, column and line."""
    return itertools.product(*(list(enumerate(axis)) for axis in axes))


def _bars(
    rows: Sequence[dict[str, Any]], keys: tuple[str, str, str], color: str, scale: float = 1
) -> dict[str, Any]:
    """Return the error bars of intervals; of length 0 where an end is missing or infinite."""
    value, low, high = keys
    ends = [(row[value], row.get(low, math.nan), row.get(high, math.nan)) for row in rows]
    known = [
        (v, lo, hi) if math.isfinite(lo) and math.isfinite(hi) else (v, v, v) for v, lo, hi in ends
    ]
    return {
        "type": "data",
        "symmetric": False,
        "array": [scale * (hi - v) for v, _, hi in known],
        "arrayminus": [scale * (v - lo) for v, lo, _ in known],
        "color": color,
        "thickness": 1.6,
        "width": 0,
    }


def _hover(name: str, row: dict[str, Any], keys: tuple[str, str, str]) -> str:
    value, low, high = keys
    signed = value == "difference"
    ends = interval(name, row.get(low, math.nan), row.get(high, math.nan), signed=signed)
    text = f"{number(name, row[value], signed=signed)} {ends}"
    text += f", n = {int(row['n'])}" if math.isfinite(row.get("n", math.nan)) else ""
    return text + (f", {int(row['n_unscored'])} unscored" if row.get("n_unscored", 0) > 0 else "")


def _condition_style(condition: str, conditions: Sequence[str]) -> tuple[str, str]:
    """Return a condition's color and symbol: grey for the unsteered model and for controls."""
    if condition == UNSTEERED:
        return MUTED, "square"
    if is_control(condition):
        return MUTED, "diamond"
    steered = [c for c in conditions if c != UNSTEERED and not is_control(c)]
    return COLORS[steered.index(condition) % len(COLORS)], "circle"


def _two_lines(label: str) -> str:
    return plain_label(label).replace(" (", "<br>(", 1)
