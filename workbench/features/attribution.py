"""Attribute a risk category's direction to features, and test how each tells prompts apart.

A difference of activations is the sum of what features write and of what the autoencoder misses,
so its projection on a direction is one too. The direction comes from one fold and everything else
from another, as for neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.files.hints import did_you_mean
from workbench.models.errors import CannotBeDone
from workbench.prompts.contrasts import Sides, sides_of
from workbench.prompts.prompt import categories_of, text_key
from workbench.stats.selectivity import auroc, hedges_g, max_statistic_permutation

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    import pandas as pd
    from jaxtyping import Float

    from workbench.features.activations import FeatureSet
    from workbench.neurons.folds import Reference


LEVEL = 0.05
"""Level of the tests in the table."""


FEATURE_COLUMNS = {
    "category": "risk category",
    "feature": "index in the autoencoder",
    "rank": "1 writes most along u, the last one writes most against it",
    "contribution": "<what one unit writes, u> times (mean unsafe - mean reference feature), in "
    "units of the site; those of a category and what the autoencoder misses (attrs) add up to "
    "<u, mean unsafe - mean reference>",
    "contribution_share": "contribution, as a share of the sum of the absolute values of all parts",
    "mean_unsafe": "mean pooled feature on unsafe prompts",
    "mean_reference": "mean pooled feature on reference prompts",
    "active_unsafe": "share of unsafe prompts in whose span the feature is active",
    "active_reference": "share of reference prompts in whose span it is active",
    "hedges_g": "standardised mean difference, unsafe against reference",
    "auroc": "chance that an unsafe prompt has more of the feature than a reference one",
    "auroc_fit": "the same on the fit fold",
    "p_fwer": "max-statistic permutation p of the mean difference over all features of the "
    "category (labels are swapped inside pairs of twins); 1 for a feature that is never active",
    "survives": "p_fwer <= .05, and on the same side of one half as on the fit fold",
}
"""Columns of the table of ``attribute_features``, and what each holds. The direction u is of the
fit fold; everything is of the held-out fold where nothing else is said."""


def attribute_features(
    fit: FeatureSet,
    held_out: FeatureSet,
    *,
    categories: Iterable[str] | None = None,
    reference: Reference = "twins",
    n_permutations: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank features by what they write along each category's direction.

    The direction u is mean unsafe - mean reference activation at the autoencoder's site on the fit
    fold, at unit norm.

    Args:
        fit: First fold, from ``cache_features``.
        held_out: The same of a disjoint fold.
        categories: Which; by default all that both folds have unsafe prompts of.
        reference: What the differences are against: safe "twins" or "neutral" prompts.
        n_permutations: Permutations for p_fwer.
        seed: Seed of the permutations.

    Returns:
        One row per feature and category, by rank; ``FEATURE_COLUMNS`` says what the columns hold.
        ``table.attrs["parts"]`` keeps each category's total, the sum of its features, what the
        autoencoder misses of it, and the sum of absolute values.

    Raises:
        ValueError: If the folds overlap or are of different autoencoders, models or spans, or a
            category is unknown.
        CannotBeDone: If a category has fewer than two prompts on a side.
    """
    import pandas as pd

    _check_folds(fit, held_out)
    tables, parts = [], {}
    for category in _shared_categories(fit, held_out, categories):
        sides = {
            name: _sides(fold, category, reference, name)
            for name, fold in (("fit", fit), ("held-out", held_out))
        }
        columns, parts[category] = _contributions(fit, held_out, sides)
        x, x_fit = held_out.values.numpy(), fit.values.numpy()
        columns |= _class_columns(x, sides["held-out"], n_permutations, seed)
        columns["auroc_fit"] = _auroc(x_fit, sides["fit"])
        same_side = np.sign(columns["auroc"] - 0.5) == np.sign(columns["auroc_fit"] - 0.5)
        columns["survives"] = same_side & (columns["p_fwer"] <= LEVEL)
        table = pd.DataFrame({"category": category, **columns})[list(FEATURE_COLUMNS)]
        tables.append(table.sort_values("rank", ignore_index=True))
    table = pd.concat(tables, ignore_index=True)
    table.attrs = {"site": str(fit.sae.site), "reference": reference, "parts": parts}
    return table


def _check_folds(fit: FeatureSet, held_out: FeatureSet) -> None:
    """Raise unless two folds are measured alike and disjoint."""
    one, other = fit.stream, held_out.stream
    if fit.sae is not held_out.sae or one.model.fingerprint != other.model.fingerprint:
        raise ValueError(f"both folds must be of one SAE and model, got {fit!r} and {held_out!r}.")
    if (one.span, one.asked_as) != (other.span, other.asked_as):
        raise ValueError(
            f"both folds must have one span and system prompt, got {fit!r} and {held_out!r}."
        )
    keys = [{text_key(p.text, p.history) for p in fold.prompts} for fold in (one, other)]
    if keys[0] & keys[1]:
        raise ValueError(
            f"{len(keys[0] & keys[1])} prompts are in both folds; take disjoint ones, see "
            "split_prompts."
        )


def _shared_categories(
    fit: FeatureSet, held_out: FeatureSet, categories: Iterable[str] | None
) -> list[str]:
    """List the categories to attribute."""
    names = set(categories_of(held_out.prompts))
    known = [name for name in categories_of(fit.prompts) if name in names]
    chosen = known if categories is None else list(categories)
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"no unsafe prompts of category {name!r} in both folds; categories: "
                f"{', '.join(known)}.{did_you_mean(name, known)}"
            )
    if not chosen:
        raise ValueError("no category has unsafe prompts in both folds.")
    return chosen


def _sides(fold: FeatureSet, category: str, reference: Reference, name: str) -> Sides:
    """Find both sides of a contrast, with two prompts each at least."""
    sides = sides_of(fold.prompts, category, reference)
    n_unsafe, n_reference = len(sides.unsafe), len(sides.reference)
    if min(n_unsafe, n_reference) < 2:
        raise CannotBeDone(
            f"{category!r} has {n_unsafe} unsafe and {n_reference} reference ({reference}) prompts "
            f"in the {name} fold; two of each are needed."
        )
    return sides


def _contributions(
    fit: FeatureSet, held_out: FeatureSet, sides: dict[str, Sides]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Split the projected difference of the held-out fold into features and the rest."""
    at = sides["fit"]
    u = fit.stream.mean(at.unsafe.tolist()) - fit.stream.mean(at.reference.tolist())
    if not u.norm() > 0:
        raise CannotBeDone("the difference of the fit fold is zero: it has no direction.")
    u = u / u.norm()
    at = sides["held-out"]
    difference, total = (
        values[at.unsafe].double().mean(dim=0) - values[at.reference].double().mean(dim=0)
        for values in (held_out.values, held_out.stream.values)
    )
    contribution = ((fit.sae.written.cpu() @ u.float()).double() * difference).numpy()
    whole = float(u @ total)
    missed = whole - float(contribution.sum())
    absolute = float(np.abs(contribution).sum()) + abs(missed)
    rank = np.empty(len(contribution), dtype=int)
    rank[np.argsort(-contribution, kind="stable")] = np.arange(1, len(rank) + 1)
    columns = {
        "feature": np.arange(len(rank)),
        "rank": rank,
        "contribution": contribution,
        "contribution_share": contribution / (absolute or 1.0),
    }
    features = float(contribution.sum())
    parts = {"total": whole, "features": features, "missed": missed, "absolute": absolute}
    return columns, parts


def _class_columns(
    x: Float[np.ndarray, "prompt feature"], sides: Sides, n_permutations: int, seed: int
) -> dict[str, Float[np.ndarray, " feature"]]:
    """Compare the features of both sides of a contrast; most are never active."""
    rows, is_unsafe, pairs = sides.labels()
    of_sides = x[rows]
    ever = (of_sides != 0).any(axis=0)
    g, p = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if ever.any():
        g[ever] = hedges_g(of_sides[:, ever], is_unsafe)
        p[ever] = max_statistic_permutation(
            of_sides[:, ever], is_unsafe, groups=pairs, n_permutations=n_permutations, seed=seed
        )
    unsafe, safe = of_sides[is_unsafe], of_sides[~is_unsafe]
    return {
        "mean_unsafe": unsafe.mean(axis=0, dtype=float),
        "mean_reference": safe.mean(axis=0, dtype=float),
        "active_unsafe": (unsafe != 0).mean(axis=0),
        "active_reference": (safe != 0).mean(axis=0),
        "hedges_g": g,
        "auroc": _auroc(x, sides),
        "p_fwer": p,
    }


def _auroc(x: Float[np.ndarray, "prompt feature"], sides: Sides) -> Float[np.ndarray, " feature"]:
    """Compute each feature's AUROC between both sides."""
    rows, is_unsafe, _ = sides.labels()
    return auroc(x[rows], is_unsafe)
