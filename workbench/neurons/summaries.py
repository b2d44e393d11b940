"""Sum up a table of neurons or heads: how stable its ranking is, what categories share.

These read the tables of ``attribute_neurons`` and ``attribute_heads``, also from a csv file; they
need no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.neurons.ranking import CONTRASTS, LEVEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from jaxtyping import Float


def stability(table: pd.DataFrame, k: int = 100) -> pd.DataFrame:
    """Measure how far a category's ranking would come out again on other prompts.

    Args:
        table: From ``attribute_neurons`` or ``attribute_heads``.
        k: How many of the first are compared.

    Returns:
        One row per category: split_half_correlation (Spearman's, between the contributions from two
        halves of the prompts), split_half_overlap (share of the first k that both halves have),
        chance_overlap (what random rankings would share), inclusion (mean bootstrap inclusion of
        the first k) and n_always (how many neurons are in at least 95 % of the samples).
    """
    import pandas as pd
    from scipy.stats import spearmanr

    rows = []
    for category, category_rows in _by_category(table):
        halves = category_rows[["contribution_half_1", "contribution_half_2"]].to_numpy()
        first, second = (_first(halves[:, half], k) for half in (0, 1))
        # neurons above the site are 0 in both halves: they would only make ties
        written = halves.any(axis=1)
        rows.append(
            {
                "category": category,
                "split_half_correlation": float(spearmanr(halves[written]).statistic)
                if written.sum() > 2
                else np.nan,
                "split_half_overlap": len(first & second) / len(first),
                "chance_overlap": len(first) / max(1, int(written.sum())),
                "inclusion": float(category_rows.nsmallest(k, "rank")["inclusion"].mean()),
                "n_always": int((category_rows["inclusion"] >= 0.95).sum()),
            }
        )
    return pd.DataFrame(rows)


def overlap(table: pd.DataFrame, k: int = 100) -> pd.DataFrame:
    """Measure which share of their first k neurons two categories have in common.

    Every number compares a ranking from one half of the prompts with one from the other half,
    averaged over both ways round. So the diagonal, a category with itself, is what two categories
    that were the same would share, and prompts common to both sides cannot make them alike.

    Args:
        table: From ``attribute_neurons`` or ``attribute_heads``.
        k: How many of the first are compared.

    Returns:
        Categories x categories.
    """
    import pandas as pd

    halves = {
        category: [
            _first(category_rows[f"contribution_half_{half}"].to_numpy(), k) for half in (1, 2)
        ]
        for category, category_rows in _by_category(table)
    }
    names = list(halves)
    shares = [
        [
            (len(halves[a][0] & halves[b][1]) + len(halves[a][1] & halves[b][0]))
            / (2 * len(halves[a][0]))
            for b in names
        ]
        for a in names
    ]
    return pd.DataFrame(shares, index=names, columns=names)


def overlap_against_chance(
    table: pd.DataFrame, k: int = 100, *, level: float = 0.95
) -> pd.DataFrame:
    """Count the first k neurons that two rankings share, against what random rankings share.

    Random rankings of the same units share a hypergeometric number. Neurons that are loud for
    any prompt come near an end of every ranking, so more than that number says little by itself:
    ``n_opposite`` counts those at the top of one ranking and at the bottom of the other, which
    loudness makes as likely.

    Args:
        table: From ``attribute_neurons`` or ``attribute_heads``; tables of several contrasts at one
            site may be put below each other, if their categories have different names.
        k: How many of the first are compared.
        level: Share of random rankings inside the interval.

    Returns:
        One row per pair of categories: category, other, k, n_units (those below the site), n_shared
        (both have them among their first k), chance (expected of random rankings), chance_low and
        chance_high (interval of random rankings), p (chance of sharing at least as many) and
        n_opposite (mean of both ways round).
    """
    import pandas as pd
    from scipy.stats import hypergeom

    ends, n_units = {}, {}
    for category, category_rows in _by_category(table):
        units = _units_of(category_rows)
        first, last = (
            {units[i] for i in _first(sign * category_rows["contribution"].to_numpy(), k)}
            for sign in (1, -1)
        )
        ends[category] = (first, last)
        # units above the site write nothing to it
        n_units[category] = max(k, int((category_rows["contribution"] != 0).sum()))
    rows = []
    for place, category in enumerate(ends):
        for other in list(ends)[place + 1 :]:
            (first, last), (other_first, other_last) = ends[category], ends[other]
            n, size = max(n_units[category], n_units[other]), len(first)
            chance = hypergeom(n, len(first), len(other_first))
            low, high = chance.interval(level)
            n_shared = len(first & other_first)
            rows.append(
                {
                    "category": category,
                    "other": other,
                    "k": size,
                    "n_units": n,
                    "n_shared": n_shared,
                    "chance": float(chance.mean()),
                    "chance_low": int(low),
                    "chance_high": int(high),
                    "p": float(chance.sf(n_shared - 1)),
                    "n_opposite": (len(first & other_last) + len(last & other_first)) / 2,
                }
            )
    return pd.DataFrame(rows)


def shared_neurons(table: pd.DataFrame, k: int = 100) -> pd.DataFrame:
    """List neurons (or heads) among any category's first k, and how many categories have each.

    Args:
        table: From ``attribute_neurons`` or ``attribute_heads``.
        k: How many of each category's first count.

    Returns:
        layer, neuron (or head), n_categories, categories (a tuple) and mean_contribution over all
        categories; those common to most categories first. A neuron of one category alone has
        ``n_categories`` 1.
    """
    unit = "neuron" if "neuron" in table.columns else "head"
    first = table[table["rank"] <= k].groupby(["layer", unit])["category"].agg(["size", tuple])
    mean = table.groupby(["layer", unit])["contribution"].mean()
    shared = (
        first.rename(columns={"size": "n_categories", "tuple": "categories"})
        .join(mean.rename("mean_contribution"))
        .reset_index()
    )
    return shared.sort_values(
        ["n_categories", "mean_contribution"], ascending=False, ignore_index=True
    )


def survivors(table: pd.DataFrame) -> pd.DataFrame:
    """Count the neurons that pass each test, per category.

    Args:
        table: From ``attribute_neurons``.

    Returns:
        One row per category and test ("twins", "neutral", "other", "fwer", and "all": the first
        three at once): n_neurons, n_selected on the fit fold (all, for "fwer", which needs no
        selection), n_held_out (q, or p_fwer, <= .05 over all neurons of the held-out fold) and
        n_survived.
    """
    import pandas as pd

    contrasts_of = {name: (name,) for name in CONTRASTS} | {"fwer": (), "all": CONTRASTS}
    rows = []
    for category, category_rows in _by_category(table):
        for test, contrasts in contrasts_of.items():
            if test == "fwer":
                selected = np.ones(len(category_rows), dtype=bool)
                significant = category_rows["p_fwer"] <= LEVEL
                survived = category_rows["survives_fwer"]
            else:
                selected, significant = (
                    (category_rows[[f"q_{name}{fold}" for name in contrasts]] <= LEVEL).all(axis=1)
                    for fold in ("_fit", "")
                )
                survived = category_rows[[f"survives_{name}" for name in contrasts]].all(axis=1)
            counts = {
                "n_selected": int(selected.sum()),
                "n_held_out": int(significant.sum()),
                "n_survived": int(survived.sum()),
            }
            rows.append(
                {"category": category, "test": test, "n_neurons": len(category_rows), **counts}
            )
    return pd.DataFrame(rows)


def notable_neurons(table: pd.DataFrame, k: int = 100) -> pd.DataFrame:
    """Select the rows worth a file or a page.

    These are the first k and the last k of each category, and what survives the twins or the
    permutation test. A table of every neuron and category has hundreds of thousands of rows; take
    ``stability``, ``overlap`` and ``survivors`` of the whole one.
    """
    notable = table["rank"] <= k
    notable |= table["rank"] > table.groupby("category", observed=True)["rank"].transform("max") - k
    for test in ("twins", "fwer"):
        if f"survives_{test}" in table.columns:
            notable |= table[f"survives_{test}"]
    return table[notable].reset_index(drop=True)


def _by_category(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each category with its rows, in the order of the table.

    Raises:
        ValueError: If the table has no such rows.
    """
    needed = (
        "category",
        "layer",
        "contribution",
        "contribution_half_1",
        "contribution_half_2",
        "rank",
        "inclusion",
    )
    missing = [name for name in needed if name not in table.columns]
    if missing or table.empty:
        raise ValueError(
            "this is no table of attribute_neurons or attribute_heads: "
            f"{missing[0] if missing else 'every row'} is missing."
        )
    for category, category_rows in table.groupby("category", sort=False, observed=True):
        yield str(category), category_rows


def _units_of(category_rows: pd.DataFrame) -> list[tuple[int, int]]:
    """Name each row's neuron or head by its layer and index."""
    unit = "neuron" if "neuron" in category_rows.columns else "head"
    return list(zip(category_rows["layer"], category_rows[unit], strict=True))


def _first(contributions: Float[np.ndarray, " n"], k: int) -> set[int]:
    """Return the places of the k largest."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return set(np.argsort(-contributions, kind="stable")[:k].tolist())
