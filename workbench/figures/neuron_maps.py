"""Draw where in a model the neurons of a category sit and write.

The table of scores is neurons.csv of a run folder or the result of ``attribute_neurons``. Names in
it are shown as plain text, since Plotly would read tags in them as markup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.figures.style import (
    COLORS,
    MUTED,
    check_table,
    name_in_words,
    of_category,
    plain_label,
    styled,
)
from workbench.figures.wording import AGAINST

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

_SIDES = ("middle left", "middle right", "top center", "bottom center")


def neuron_map(frame: pd.DataFrame, category: str, top: int = 60) -> Figure:
    """Draw where the neurons of a category sit: layer against contribution.

    The color is how well each neuron alone tells the category's prompts from others (AUROC),
    against the hardest comparison that the table has.

    Args:
        frame: Columns category, layer, neuron and contribution; auroc_* if the table has them.
        category: The category to draw.
        top: How many neurons, largest absolute contribution first.

    Raises:
        ValueError: If a column is missing or the category has no rows.
    """
    import plotly.graph_objects as go

    check_table("neurons", frame, ("category", "layer", "neuron", "contribution"))
    rows = of_category(frame, "neurons", "category", category)
    rows = rows.sort_values("contribution", key=abs, ascending=False)[:top]
    aurocs = [f"auroc_{side}" for side in AGAINST if f"auroc_{side}" in rows]
    names = [f"L{row['layer']} N{row['neuron']}" for row in rows.to_dict("records")]
    hover = [
        f"{name}<br>contribution {row['contribution']:+.3g}"
        + "".join(f"<br>AUROC {plain_label(column[6:])} {row[column]:.2f}" for column in aurocs)
        for name, row in zip(names, rows.to_dict("records"), strict=True)
    ]
    points = go.Scatter(
        x=rows["layer"].tolist(),
        y=rows["contribution"].tolist(),
        mode="markers+text",
        text=[name if place < 5 else "" for place, name in enumerate(names)],
        textposition=[_SIDES[place % len(_SIDES)] for place in range(len(names))],
        textfont={"size": 11},
        marker=_marker(rows, aurocs),
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure = go.Figure(points)
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    figure.update_xaxes(title="layer", dtick=5)
    figure.update_yaxes(title="contribution")
    return styled(figure, height=380)


def _marker(rows: pd.DataFrame, aurocs: list[str]) -> dict[str, Any]:
    """Return the marks' size and color: by the first AUROC with values, if there is one."""
    marker: dict[str, Any] = {"size": 11, "line": {"width": 1, "color": MUTED}, "color": COLORS[0]}
    shade = next((name for name in aurocs if rows[name].notna().any()), None)
    if shade is None:
        return marker
    title = "AUROC<br>" + AGAINST[shade.removeprefix("auroc_")].replace(" ", "<br>", 1)
    return marker | {
        "color": rows[shade].tolist(),
        "colorscale": "RdBu",
        "reversescale": True,
        "cmin": 0,
        "cmax": 1,
        "colorbar": {"title": {"text": title}, "thickness": 12},
    }


def layer_scores(frame: pd.DataFrame, score: str = "contribution", by: str = "category") -> Figure:
    """Draw a score summed by layer and group as a heat map.

    By default it shows in which layers a category's neurons (or heads) write.

    Args:
        frame: One row per part of the model: columns layer, ``by`` and ``score``.
        score: Column that is summed.
        by: Column whose values are the rows of the map.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    import plotly.graph_objects as go

    check_table("layer_scores", frame, ("layer", score, by))
    table = frame.pivot_table(index=by, columns="layer", values=score, aggfunc="sum", sort=False)
    table = table.reindex(
        columns=range(int(frame["layer"].min()), int(frame["layer"].max()) + 1)
    ).fillna(0.0)
    largest = float(table.abs().to_numpy().max()) or 1.0
    tiles = go.Heatmap(
        z=table.to_numpy().tolist(),
        x=table.columns.tolist(),
        y=[name_in_words(str(name)) for name in table.index],
        colorscale="RdBu",
        reversescale=True,
        zmin=-largest,
        zmax=largest,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": name_in_words(score)}, "thickness": 12},
        hovertemplate="%{y}, layer %{x}: %{z:.3g}<extra></extra>",
    )
    figure = go.Figure(tiles)
    figure.update_xaxes(title="layer", showgrid=False, dtick=5)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return styled(figure, height=max(210, 110 + 26 * len(table)), left=130)
