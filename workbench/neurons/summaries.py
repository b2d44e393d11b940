"""What a table of neurons or heads says as a whole: how stable its ranking is, what categories share, how many survive each test.

Reads the tables of neurons.py, also from a csv; no model is needed.
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
    """How far a category's ranking would come out again on other prompts.

    Args:
        table: From ``attribute_neurons`` or ``attribute_heads``.
        k: How many of the first are compared.

    Returns:
        A row a category: split_half_correlation (Spearman's, between the contributions from two halves of the prompts), split_half_overlap (share
        of the first k that both halves have), chance_overlap (what random rankings would share), inclusion (mean bootstrap inclusion of the first
        k) and n_always (how many neurons are included in at least 95 % of the samples).
    """
    import pandas as pd
    from scipy.stats import spearmanr

    rows = []
    for category, own in _by_category(table):
        halves = own[["contribution_half_1", "contribution_half_2"]].to_numpy()
        first, second = (_first(halves[:, half], k) for half in (0, 1))
        written = halves.any(
            axis=1
        )  # neurons above the site are 0 in both: they would only make ties
        rows.append(
            {
                "category": category,
                "split_half_correlation": float(spearmanr(halves[written]).statistic)
                if written.sum() > 2
                else np.nan,
                "split_half_overlap": len(first & second) / len(first),
                "chance_overlap": len(first) / max(1, int(written.sum())),
                "inclusion": float(own.nsmallest(k, "rank")["inclusion"].mean()),
                "n_always": int((own["inclusion"] >= 0.95).sum()),
            }
        )
    return pd.DataFrame(rows)


def overlap(table: pd.DataFrame, k: int = 100) -> pd.DataFrame:
    """Share of the first k neurons that two categories have in common, with its own ceiling on the diagonal.

    Every number compares a ranking from one half of the prompts with one from the other half, averaged over both ways round: so the diagonal, a
    category with itself, is what two categories that were the same would share, and prompts common to both sides cannot make them alike.

    Returns:
        Categories x categories.
    """
    import pandas as pd

    halves = {
        category: [_first(own[f"contribution_half_{half}"].to_numpy(), k) for half in (1, 2)]
        for category, own in _by_category(table)
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


def shared_neurons(table: pd.DataFrame, k: int = 100) -> pd.DataFrame:
    """The neurons (or heads) among the first k of any category, with how many categories have each.

    Returns:
        layer, neuron (or head), n_categories, categories (a tuple) and mean_contribution over all categories; those common to most categories first.
        Common to all: ``n_categories`` is the number of categories; of one alone: it is 1.
    """
    unit = _unit(table)
    first = table[table["rank"] <= k].groupby(["layer", unit])["category"].agg(["size", tuple])
    mean = table.groupby(["layer", unit])["contribution"].mean()
    found = (
        first.rename(columns={"size": "n_categories", "tuple": "categories"})
        .join(mean.rename("mean_contribution"))
        .reset_index()
    )
    return found.sort_values(
        ["n_categories", "mean_contribution"], ascending=False, ignore_index=True
    )


def survivors(table: pd.DataFrame) -> pd.DataFrame:
    """How many neurons pass each test, by category.

    Returns:
        A row a category and test ("twins", "neutral", "other", "fwer", and "all": the first three at once): n_neurons, n_selected on the fit fold (all,
        for "fwer", which needs no selection), n_held_out (q, or p_fwer, <= .05 over all neurons of the held-out fold) and n_survived.
    """
    import pandas as pd

    rows = []
    for category, own in _by_category(table):
        passed = {test: own[f"survives_{test}"] for test in (*CONTRASTS, "fwer")}
        passed["all"] = own[[f"survives_{test}" for test in CONTRASTS]].all(axis=1)
        for test, survived in passed.items():
            fit = [
                own[f"q_{name}_fit"] <= LEVEL
                for name in (CONTRASTS if test == "all" else [test] if test in CONTRASTS else [])
            ]
            held = [
                own[f"q_{name}"] <= LEVEL
                for name in (CONTRASTS if test == "all" else [test] if test in CONTRASTS else [])
            ]
            selected = np.logical_and.reduce(fit) if fit else np.ones(len(own), dtype=bool)
            found = np.logical_and.reduce(held) if held else own["p_fwer"] <= LEVEL
            counts = {
                "n_selected": int(selected.sum()),
                "n_held_out": int(found.sum()),
                "n_survived": int(survived.sum()),
            }
            rows.append({"category": category, "test": test, "n_neurons": len(own), **counts})
    return pd.DataFrame(rows)


def notable_neurons(table: pd.DataFrame, k: int = 100) -> pd.DataFrame:
    """The rows worth a file or a page: the first k and the last k of each category, and what survives the twins or the permutation test.

    A table of every neuron and category has hundreds of thousands of rows. Take ``stability``, ``overlap`` and ``survivors`` of the whole one.
    """
    kept = table["rank"] <= k
    kept |= table["rank"] > table.groupby("category", observed=True)["rank"].transform("max") - k
    for test in ("twins", "fwer"):
        if f"survives_{test}" in table.columns:
            kept |= table[f"survives_{test}"]
    return table[kept].reset_index(drop=True)


def _by_category(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each category's rows, in the order of the table.

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
            f"this is no table of attribute_neurons or attribute_heads: {missing[0] if missing else 'every row'} is missing."
        )
    for category, own in table.groupby("category", sort=False, observed=True):
        yield str(category), own


def _unit(table: pd.DataFrame) -> str:
    return "neuron" if "neuron" in table.columns else "head"


def _first(contributions: Float[np.ndarray, " n"], k: int) -> set[int]:
    """Places of the k largest."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return set(np.argsort(-contributions, kind="stable")[:k].tolist())
