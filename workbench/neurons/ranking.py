"""Rank the neurons and heads of a risk category, and say how sure that ranking is.

The tables hold what each neuron or head writes along the category's direction and how well it tells
prompts apart, one row per neuron and category. The direction comes from one fold and everything
else from another, so nothing in it is positive by construction. Contributing and decodable are
separate columns, as neurons of the one kind are rarely of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import einops
import numpy as np
import torch

from workbench.models.sites import Site
from workbench.neurons.attribution import write_weights, writing_sites
from workbench.neurons.folds import (
    AttributedFolds,
    Reference,
    Weights,
    attribute_folds,
    halves,
    resamples,
)
from workbench.prompts.contrasts import Sides, neutral_rows, sides_of, unsafe_rows
from workbench.stats.estimates import benjamini_hochberg
from workbench.stats.selectivity import auroc, hedges_g, max_statistic_permutation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.prompt import Prompt


CONTRASTS = ("twins", "neutral", "other")
"""What unsafe prompts of a category are told apart from: their safe twins, neutral prompts, the
unsafe prompts of other categories."""


LEVEL = 0.05
"""Level of every test in the tables."""


NEURON_COLUMNS = {
    "category": "risk category",
    "layer": "all layers cached in both folds; those above the site write nothing to it",
    "neuron": "index at mlp_post",
    "rank": "1 writes most along u, the last one writes most against it",
    "contribution": "<W_out[n], u> times (mean unsafe - mean reference activation), in units of "
    "the residual stream; with heads and embedding the contributions of a category add up to "
    "<u, mean unsafe - mean reference>, which is checked; 0 above the site",
    "contribution_share": "contribution, as a share of the sum of the absolute values of all parts",
    "contribution_half_1": "contribution from one half of the prompts of both folds",
    "contribution_half_2": "contribution from the other half",
    "inclusion": "share of bootstrap samples of both folds with the neuron among the first `top`",
    "mean_unsafe": "mean pooled activation on unsafe prompts",
    "mean_reference": "mean pooled activation on reference prompts",
    "hedges_g": "standardised mean difference, unsafe against reference",
    "p_fwer": "max-statistic permutation p of the mean difference, unsafe against reference, over "
    "all neurons of the category (labels are swapped inside pairs of twins)",
    **{
        f"auroc_{contrast}": "chance that an unsafe prompt activates the neuron more than a "
        f"prompt of {contrast!r} does (see CONTRASTS); nan where the fold holds none"
        for contrast in CONTRASTS
    },
    **{
        f"q_{contrast}": "Benjamini-Hochberg q over all neurons of the category, of the "
        + (
            "signed-rank test over pairs, which sees more than the AUROC does"
            if contrast == "twins"
            else "Mann-Whitney test behind the AUROC"
        )
        for contrast in CONTRASTS
    },
    **{
        f"{score}_{contrast}_fit": f"{score}_{contrast} on the fit fold"
        for score in ("auroc", "q")
        for contrast in CONTRASTS
    },
    **{
        f"survives_{contrast}": f"selected on the fit fold (q_{contrast}_fit <= .05) and confirmed "
        "on the held-out one: on the same side, and q <= .05 among the selected ones; that family "
        "is small, so a neuron can survive whose q over all neurons is above .05"
        for contrast in CONTRASTS
    },
    "survives_fwer": "p_fwer <= .05, and on the same side as on the fit fold",
}
"""Columns of the table of ``attribute_neurons``, and what each holds. The direction u is of the fit
fold; contributions, means and tests are of the held-out fold where nothing else is said."""


def attribute_neurons(
    model: HookedModel,
    fit: Mapping[Site, ActivationSet],
    held_out: Mapping[Site, ActivationSet],
    *,
    site: Site,
    categories: Iterable[str] | None = None,
    reference: Reference = "twins",
    top: int = 100,
    n_permutations: int = 500,
    n_resamples: int = 200,
    seed: int = 0,
    system_prompt: str | None = None,
) -> pd.DataFrame:
    """Attribute a category's direction to neurons, and test how each tells the category apart.

    The direction u is mean unsafe - mean reference at ``site`` on the fit fold, at unit norm.

    Args:
        model: What the activations are of.
        fit: First fold, from ``cache_activations``: the site and mlp_post of all layers.
        held_out: The same of a disjoint fold, and all ``writing_sites(model, site)``.
        site: A residual site: resid_pre, resid_mid or resid_post.
        categories: Which; by default all that both folds have unsafe prompts of.
        reference: What u and the contributions are against: safe "twins" or "neutral" prompts.
        top: How many count as the first ones, for inclusion.
        n_permutations: Permutations for p_fwer.
        n_resamples: Bootstrap samples for inclusion.
        seed: Seed of permutations, halves and bootstrap.
        system_prompt: That of the activations (used where an output norm needs a pass of its own).

    Returns:
        One row per neuron and category; ``NEURON_COLUMNS`` says what the columns hold.
        ``table.attrs`` keeps site, reference, top and the parts of each category's total.

    Raises:
        ValueError: If the folds overlap or do not fit together, or a category or site is missing.
        CannotBeDone: If the model has no neurons that all tokens share, the parts do not add up,
            or a category has fewer than two prompts on a side.
    """
    folds = attribute_folds(model, fit, held_out, site, categories, reference, system_prompt)
    again = _Resampling(top, n_resamples, np.random.default_rng(seed))
    mlp_sites = [s for s in sorted(held_out) if s.kind == "mlp_post" and s in fit]
    writers = _writing(model, site, "mlp_post", mlp_sites)
    x_fit, x = (_columns(fold, mlp_sites) for fold in (fit, held_out))
    names = _names("neuron", mlp_sites, x.shape[1])
    separation = _separation((x_fit, x), (folds.residual.prompts, folds.prompts), folds.categories)
    tables = []
    for place, category in enumerate(folds.categories):
        columns = {"category": category, **names}
        columns |= _contribution_columns(model, folds, category, writers, x.shape[1], again)
        columns |= _class_columns(x, folds.held_out[category], n_permutations, seed)
        columns |= {name: values[place] for name, values in separation.items()}
        same_side = _same_side(columns[f"auroc_{reference}_fit"], columns[f"auroc_{reference}"])
        columns["survives_fwer"] = same_side & (columns["p_fwer"] <= LEVEL)
        tables.append(columns)
    return _finished(tables, folds, reference, top)


def attribute_heads(
    model: HookedModel,
    fit: Mapping[Site, ActivationSet],
    held_out: Mapping[Site, ActivationSet],
    *,
    site: Site,
    categories: Iterable[str] | None = None,
    reference: Reference = "twins",
    top: int = 10,
    n_resamples: int = 200,
    seed: int = 0,
    system_prompt: str | None = None,
) -> pd.DataFrame:
    """Attribute a category's direction at a residual site to attention heads.

    Arguments and errors are those of ``attribute_neurons``.

    Returns:
        One row per head below the site and category. Columns from category to inclusion are those
        of ``NEURON_COLUMNS``, with head in place of neuron. What a head writes along u is one
        number per prompt; of it are mean_unsafe and mean_reference (residual-stream units),
        auroc_twins, auroc_neutral, auroc_other and their q over all heads, on the held-out fold.
    """
    folds = attribute_folds(model, fit, held_out, site, categories, reference, system_prompt)
    sites = [s for s in writing_sites(model, site) if s.kind == "z"]
    if not sites:
        raise ValueError(f"no head writes to {site}: choose a later site.")
    n_columns = len(sites) * model.cfg.n_heads
    names = _names("head", sites, n_columns)
    writers = _writing(model, site, "z", sites)
    again = _Resampling(top, n_resamples, np.random.default_rng(seed))
    tables = []
    for category in folds.categories:
        x = _written_by_heads(model, folds, category, sites)
        sides = folds.held_out[category]
        columns = {"category": category, **names}
        columns |= _contribution_columns(model, folds, category, writers, n_columns, again)
        columns |= {
            "mean_unsafe": x[sides.unsafe].mean(axis=0),
            "mean_reference": x[sides.reference].mean(axis=0),
        }
        for against, (area, p) in _auroc_and_p(x, folds.prompts, [category]).items():
            columns |= {f"auroc_{against}": area[0], f"q_{against}": benjamini_hochberg(p[0])}
        tables.append(columns)
    return _finished(tables, folds, reference, top)


@dataclass(frozen=True)
class _Resampling:
    """How contributions are computed again: samples, and how many neurons count as the first."""

    top: int
    n_samples: int
    rng: np.random.Generator

    def __post_init__(self) -> None:
        if self.top < 1 or self.n_samples < 1:
            raise ValueError(
                f"top and n_resamples must be at least 1, got {self.top} and {self.n_samples}."
            )


@dataclass(frozen=True, eq=False)
class _Writers:
    """Sites that write to the attributed one, and which columns of the table are theirs."""

    sites: Sequence[Site]
    columns: Int[np.ndarray, " written"]


def _writing(model: HookedModel, site: Site, kind: str, cached: Sequence[Site]) -> _Writers:
    """Find the sites of a kind that write to a site, and their columns among those cached."""
    sites = [s for s in writing_sites(model, site) if s.kind == kind]
    missing = [s for s in sites if s not in cached]
    if missing:
        raise ValueError(
            f"no activations at {missing[0]} in the fit fold; "
            "cache mlp_post of all layers in both folds."
        )
    width = model.cfg.n_heads if kind == "z" else model.cfg.d_mlp
    return _Writers(sites, np.flatnonzero(np.repeat([s in sites for s in cached], width)))


def _names(unit: str, sites: Sequence[Site], n_columns: int) -> dict[str, Any]:
    """Name the layer and the place of each column of activations at sites side by side."""
    width = n_columns // max(1, len(sites))
    return {
        "layer": np.repeat([site.layer for site in sites], width),
        unit: np.tile(np.arange(width), len(sites)),
    }


def _columns(
    fold: Mapping[Site, ActivationSet], sites: Sequence[Site]
) -> Float[np.ndarray, "prompt neuron"]:
    """Lay the activations at sites side by side."""
    return np.concatenate([fold[site].values.float().numpy() for site in sites], axis=1)


def _written_by_heads(
    model: HookedModel, folds: AttributedFolds, category: str, sites: Sequence[Site]
) -> Float[np.ndarray, "prompt head"]:
    """Compute what each head writes along a category's direction, per held-out prompt."""
    u = folds.attributions[category].direction
    return np.concatenate(
        [
            einops.reduce(
                write_weights(model, site, u) * folds.written[site].values,
                "prompt (head d) -> prompt head",
                "sum",
                head=model.cfg.n_heads,
            ).numpy()
            for site in sites
        ],
        axis=1,
    )


def _class_columns(
    x: Float[np.ndarray, "prompt neuron"], sides: Sides, n_permutations: int, seed: int
) -> dict[str, Float[np.ndarray, " neuron"]]:
    """Compare the mean activations of both sides of a contrast."""
    rows, is_unsafe, pairs = sides.labels()
    category_rows = x[rows]
    return {
        "mean_unsafe": category_rows[is_unsafe].mean(axis=0, dtype=float),
        "mean_reference": category_rows[~is_unsafe].mean(axis=0, dtype=float),
        "hedges_g": hedges_g(category_rows, is_unsafe),
        "p_fwer": max_statistic_permutation(
            category_rows, is_unsafe, groups=pairs, n_permutations=n_permutations, seed=seed
        ),
    }


def _contribution_columns(
    model: HookedModel,
    folds: AttributedFolds,
    category: str,
    writers: _Writers,
    n_columns: int,
    resampling: _Resampling,
) -> dict[str, Any]:
    """Rank contributions, and see how they come out on halves and on bootstrap samples."""
    attribution = folds.attributions[category]
    is_head = bool(writers.sites) and writers.sites[0].kind == "z"
    exact = attribution.heads if is_head else attribution.neurons
    contribution = np.zeros(n_columns)
    contribution[writers.columns] = exact.flatten().numpy()
    rank = np.empty(n_columns, dtype=int)
    rank[np.argsort(-contribution, kind="stable")] = np.arange(1, n_columns + 1)

    # both folds are halved and resampled; row by row the contributions are computed again
    weights = [
        _halves_and_resamples(side, resampling.n_samples, resampling.rng)
        for side in (folds.fit[category], folds.held_out[category])
    ]
    half, sampled = np.split(
        _reweighted_contributions(model, folds, category, writers.sites, weights), [2]
    )
    k = min(resampling.top, sampled.shape[1])
    first = np.argpartition(-sampled, k - 1, axis=1)[:, :k] if k else np.zeros((1, 0), dtype=int)
    inclusion = np.bincount(first.ravel(), minlength=sampled.shape[1]) / resampling.n_samples

    columns = {
        "rank": rank,
        "contribution": contribution,
        "contribution_share": contribution / (attribution.absolute or 1.0),
    }
    for name, values in (
        ("contribution_half_1", half[0]),
        ("contribution_half_2", half[1]),
        ("inclusion", inclusion),
    ):
        columns[name] = np.zeros(n_columns)
        columns[name][writers.columns] = values
    return columns


def _halves_and_resamples(sides: Sides, n_resamples: int, rng: np.random.Generator) -> Weights:
    """Weight a contrast's rows for two halves (first two rows) and for bootstrap samples."""
    (half_unsafe, half_reference) = halves(sides, rng)
    (sampled_unsafe, sampled_reference) = resamples(sides, n_resamples, rng)
    return torch.cat([half_unsafe, sampled_unsafe]), torch.cat([half_reference, sampled_reference])


def _reweighted_contributions(
    model: HookedModel,
    folds: AttributedFolds,
    category: str,
    sites: Sequence[Site],
    weights: Sequence[Weights],
) -> Float[np.ndarray, "draw column"]:
    """Compute contributions, direction included, with prompts weighted otherwise.

    ``weights`` are those of the fit fold and of the held-out one; each row of them gives one row.
    """

    def difference(values: Tensor, sides: Sides, row_weights: Weights) -> Tensor:
        return row_weights[0] @ values[sides.unsafe] - row_weights[1] @ values[sides.reference]

    u = difference(folds.residual.values, folds.fit[category], weights[0])
    u = torch.nn.functional.normalize(u, dim=1)
    parts = [torch.zeros(len(u), 0)]
    for site in sites:
        part = write_weights(model, site, u) * difference(
            folds.written[site].values, folds.held_out[category], weights[1]
        )
        if site.kind == "z":
            part = einops.reduce(part, "draw (head d) -> draw head", "sum", head=model.cfg.n_heads)
        parts.append(part)
    return torch.cat(parts, dim=1).numpy()


def _separation(
    x: tuple[Float[np.ndarray, "prompt neuron"], Float[np.ndarray, "prompt neuron"]],
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    categories: Sequence[str],
) -> dict[str, Float[np.ndarray, "category neuron"]]:
    """Compute AUROC, q and survival of every neuron against each contrast.

    ``x`` and ``prompts`` are those of the fit fold and of the held-out one.
    """
    columns: dict[str, Any] = {}
    fit, held_out = (
        _auroc_and_p(values, rows, categories) for values, rows in zip(x, prompts, strict=True)
    )
    for against in CONTRASTS:
        (area_fit, p_fit), (area, p) = fit[against], held_out[against]
        q_fit, q = benjamini_hochberg(p_fit, axis=1), benjamini_hochberg(p, axis=1)
        # the family of the confirmation is what was selected on the fit fold
        confirmed = benjamini_hochberg(np.where(q_fit <= LEVEL, p, np.nan), axis=1)
        columns |= {
            f"auroc_{against}": area,
            f"auroc_{against}_fit": area_fit,
            f"q_{against}": q,
            f"q_{against}_fit": q_fit,
        }
        columns[f"survives_{against}"] = (confirmed <= LEVEL) & _same_side(area_fit, area)
    return columns


_AurocAndP = tuple["Float[np.ndarray, 'category column']", "Float[np.ndarray, 'category column']"]


def _auroc_and_p(
    x: Float[np.ndarray, "prompt column"], prompts: Sequence[Prompt], categories: Sequence[str]
) -> dict[str, _AurocAndP]:
    """Compute AUROC and p of each column per contrast, one row per category.

    They are nan where the fold has nothing to compare with. All unsafe prompts are ranked once
    alone and once with the neutral ones, for all categories together: the pairs a category wins
    against the neutral prompts are those it wins against all, less those against the other
    categories.
    """
    unsafe = np.array(unsafe_rows(prompts), dtype=int)
    neutral = np.array(neutral_rows(prompts), dtype=int)
    labels = np.array(
        [[category in prompts[i].categories for category in categories] for i in unsafe]
    )
    n_category, n_others = labels.sum(axis=0)[:, None], (~labels).sum(axis=0)[:, None]
    wins_others = np.zeros((len(categories), x.shape[1]))
    if n_others.all():
        wins_others = auroc(x[unsafe], labels) * n_category * n_others
    wins_all = wins_others
    if len(neutral):
        with_neutral = np.concatenate(
            [labels, np.zeros((len(neutral), len(categories)), dtype=bool)]
        )
        wins_all = (
            auroc(x[np.concatenate([unsafe, neutral])], with_neutral)
            * n_category
            * (n_others + len(neutral))
        )
    twins = [_auroc_and_p_of_twins(x, sides_of(prompts, name, "twins")) for name in categories]
    return {
        "twins": (np.array([area for area, _ in twins]), np.array([p for _, p in twins])),
        "neutral": _mann_whitney(wins_all - wins_others, n_category, len(neutral)),
        "other": _mann_whitney(wins_others, n_category, n_others),
    }


def _auroc_and_p_of_twins(x: Float[np.ndarray, "prompt column"], sides: Sides) -> _AurocAndP:
    """Compute AUROC and signed-rank p of each column over pairs; nan without any."""
    if not len(sides.unsafe):
        return np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    rows, is_unsafe, _ = sides.labels()
    return auroc(x[rows], is_unsafe), _signed_rank_p(x[sides.unsafe] - x[sides.reference])


def _mann_whitney(
    wins: Float[np.ndarray, "category column"], n: Int[np.ndarray, "category 1"], m: Any
) -> _AurocAndP:
    """Turn won pairs into AUROC and p: the normal approximation with continuity correction.

    There is no correction for ties, so p is too large where there are any. scipy's mannwhitneyu
    would correct for them and give other p, and takes four times as long (0.84 s against 0.21 s for
    64 prompts, 46,080 neurons and four categories), as it ranks anew for each category.
    """
    from scipy.special import ndtr

    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.maximum(np.abs(wins - n * m / 2) - 0.5, 0)
        return wins / (n * m), np.minimum(
            1, 2 * ndtr(-distance / np.sqrt(n * m * (n + m + 1) / 12))
        )


def _signed_rank_p(differences: Float[np.ndarray, "pair column"]) -> Float[np.ndarray, " column"]:
    """Compute the two-sided p of Wilcoxon's signed-rank test, per column.

    It is exact up to 50 pairs, as the normal approximation never gets below 1e-5 for 24 pairs;
    columns with ties or zeros get the approximation. The exact distribution of the rank sum is made
    once for all columns: scipy's wilcoxon(method="exact") gives the same p in eight times the time
    (0.34 s against 0.04 s for 32 pairs and 46,080 neurons), and has one method for all columns.
    """
    from scipy.stats import wilcoxon

    n, size = len(differences), np.abs(differences)
    p = np.ones(differences.shape[1])
    exact: Any = p == 0
    if n <= 50:
        order = np.argsort(size, axis=0)
        exact = (np.diff(np.take_along_axis(size, order, axis=0), axis=0, prepend=0) > 0).all(
            axis=0
        )
        ways = np.ones(1)  # of signs that give each rank sum
        for rank in range(1, n + 1):
            ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
        tails = np.minimum(np.cumsum(ways), np.cumsum(ways[::-1])[::-1]) / 2.0**n
        sums = np.arange(1, n + 1) @ np.take_along_axis(differences > 0, order, axis=0)
        p[exact] = np.minimum(1, 2 * tails[sums[exact]])
    rough = ~exact & differences.any(axis=0)
    if rough.any():
        p[rough] = wilcoxon(differences[:, rough].astype(float), axis=0, method="asymptotic").pvalue
    return p


def _same_side(a: Float[np.ndarray, ...], b: Float[np.ndarray, ...]) -> Bool[np.ndarray, ...]:
    """Tell where two AUROCs lie on the same side of one half."""
    return np.sign(a - 0.5) == np.sign(b - 0.5)


def _finished(
    tables: Sequence[Mapping[str, Any]], folds: AttributedFolds, reference: str, top: int
) -> pd.DataFrame:
    """Put the categories' columns below each other, and what they were made of into ``attrs``."""
    import pandas as pd

    table = pd.concat([pd.DataFrame(columns) for columns in tables], ignore_index=True)
    parts = {
        category: {
            "total": attribution.total,
            "embedding": attribution.embedding,
            "heads": float(attribution.heads.sum()),
            "neurons": float(attribution.neurons.sum()),
            "absolute": attribution.absolute,
            "error": attribution.error,
        }
        for category, attribution in folds.attributions.items()
    }
    table.attrs = {"site": str(folds.site), "reference": reference, "top": top, "parts": parts}
    return table
