"""Neurons and heads of a risk category: what each writes along its direction, how well it tells prompts apart, how sure that is.

One table, one row a neuron and category. The direction comes from one fold and everything else from another, so nothing in it is positive by
construction; decodable and contributing are separate columns, as neurons of the one kind are rarely of the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    from workbench.models.load import HookedModel
    from workbench.prompts.prompt import Prompt


CONTRASTS = ("twins", "neutral", "other")
"""What unsafe prompts of a category are told apart from: their safe twins, neutral prompts, the unsafe prompts of other categories."""


LEVEL = 0.05


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
    """Attribute a category's direction at a residual site to single neurons, and test how each tells the category apart.

    The direction u is mean unsafe - mean reference at ``site`` on the fit fold, at unit norm; contributions, means and tests are of the
    held-out fold. Columns:

    - category, layer, neuron: which. All layers cached in both folds; neurons above the site write nothing to it and have contribution 0.
    - rank: 1 is the neuron that writes most along u; the last one writes most against it.
    - contribution: <W_out[n], u> times (mean unsafe - mean reference activation), in units of the residual stream. With the heads and the
      embedding the contributions of a category add up to <u, mean unsafe - mean reference>, which is checked.
    - contribution_share: the same as a share of the sum of the absolute values of all parts.
    - contribution_half_1, contribution_half_2: from one half of the prompts of both folds and from the other.
    - inclusion: share of bootstrap samples of both folds in which the neuron is among the first ``top``.
    - mean_unsafe, mean_reference: mean pooled activation.
    - hedges_g: standardised mean difference, unsafe against reference.
    - p_fwer: max-statistic permutation p of the mean difference, unsafe against reference, over all neurons of the category (labels are swapped
      inside pairs of twins).
    - auroc_twins, auroc_neutral, auroc_other: chance that an unsafe prompt activates the neuron more than its safe twins, neutral prompts, or
      unsafe prompts of other categories do; nan where the folds hold none. auroc_..._fit: the same on the fit fold.
    - q_twins, q_neutral, q_other: Benjamini-Hochberg q over all neurons of the category, of the Mann-Whitney test behind that AUROC, and for
      twins of the signed-rank test over pairs, which sees more than the AUROC does. q_..._fit: the same on the fit fold.
    - survives_twins, survives_neutral, survives_other: selected on the fit fold (q_..._fit <= .05) and confirmed on the held-out one: on the same
      side, and q <= .05 among the selected ones. That family is small, so a neuron can survive whose q over all neurons is above .05.
    - survives_fwer: p_fwer <= .05, and on the same side as on the fit fold.

    ``table.attrs`` keeps site, reference, top and the parts of each category's total: embedding, heads, neurons, error.

    Args:
        model: What the activations are of.
        fit: Activations of the first fold from ``cache_activations``: the site and mlp_post of all layers.
        held_out: The same of a disjoint fold, and all ``writing_sites(model, site)``.
        site: A residual site: resid_pre, resid_mid or resid_post.
        categories: Which; all that both folds have unsafe prompts of by default.
        reference: What the direction and the contributions are measured against: safe "twins", or "neutral" prompts.
        top: How many count as the first ones, for inclusion.
        n_permutations: For p_fwer.
        n_resamples: Bootstrap samples, for inclusion.
        seed: Of permutations, halves and bootstrap.
        system_prompt: The one the activations were cached with (used where an output norm needs a pass of its own).

    Raises:
        ValueError: If the folds overlap or do not fit together, a category or site is missing, or the attribution is not complete.
    """
    import pandas as pd

    folds = attribute_folds(model, fit, held_out, site, categories, reference, system_prompt)
    layers = sorted(own.layer for own in held_out if own.kind == "mlp_post" and own in fit)
    written = [own for own in writing_sites(model, site) if own.kind == "mlp_post"]
    missing = [own for own in written if own.layer not in layers]
    if missing:
        raise ValueError(
            f"no activations at {missing[0]} in the fit fold; cache mlp_post of all layers in both folds."
        )
    x_fit, x = (
        _columns(fold, [Site(layer, "mlp_post") for layer in layers]) for fold in (fit, held_out)
    )
    n = x.shape[1] // max(1, len(layers))
    below = np.concatenate(
        [np.arange(n) + layers.index(own.layer) * n for own in written] or [np.array([], dtype=int)]
    )
    prompts = (folds.residual.prompts, folds.written[site].prompts)
    separation = _separation((x_fit, x), prompts, folds.categories)
    rng = np.random.default_rng(seed)
    tables = []
    for place, category in enumerate(folds.categories):
        rows, labels, pairs = folds.held_out[category].labels()
        own = x[rows]
        columns: dict[str, Any] = {
            "category": category,
            "layer": np.repeat(layers, n),
            "neuron": np.tile(np.arange(n), len(layers)),
        }
        columns |= _contribution_columns(
            model, folds, category, written, below, x.shape[1], top, n_resamples, rng
        )
        columns |= {
            "mean_unsafe": own[labels].mean(axis=0, dtype=float),
            "mean_reference": own[~labels].mean(axis=0, dtype=float),
            "hedges_g": hedges_g(own, labels),
            "p_fwer": max_statistic_permutation(
                own, labels, groups=pairs, n_permutations=n_permutations, seed=seed
            ),
        }
        columns |= {name: values[place] for name, values in separation.items()}
        same_side = _same_side(columns[f"auroc_{reference}_fit"], columns[f"auroc_{reference}"])
        columns["survives_fwer"] = same_side & (columns["p_fwer"] <= LEVEL)
        tables.append(pd.DataFrame(columns))
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

    Arguments and the columns category, layer, rank, contribution, contribution_share, contribution_half_1, contribution_half_2 and inclusion are
    those of ``attribute_neurons``, with head in place of neuron and the heads below the site only. What a head writes along u is one number a
    prompt; of it are mean_unsafe and mean_reference (residual-stream units), auroc_twins, auroc_neutral, auroc_other and their q over all heads, on
    the held-out fold.
    """
    import pandas as pd

    folds = attribute_folds(model, fit, held_out, site, categories, reference, system_prompt)
    written = [own for own in writing_sites(model, site) if own.kind == "z"]
    if not written:
        raise ValueError(f"no head writes to {site}: choose a later site.")
    n, prompts = model.cfg.n_heads, folds.written[site].prompts
    rng = np.random.default_rng(seed)
    tables = []
    for category in folds.categories:
        u = folds.attributions[category].direction
        x = np.concatenate(
            [
                (write_weights(model, own, u) * folds.written[own].values)
                .view(len(prompts), n, -1)
                .sum(dim=2)
                .numpy()
                for own in written
            ],
            axis=1,
        )
        sides = folds.held_out[category]
        columns: dict[str, Any] = {
            "category": category,
            "layer": np.repeat([own.layer for own in written], n),
            "head": np.tile(np.arange(n), len(written)),
        }
        columns |= _contribution_columns(
            model,
            folds,
            category,
            written,
            np.arange(x.shape[1]),
            x.shape[1],
            top,
            n_resamples,
            rng,
        )
        columns |= {
            "mean_unsafe": x[sides.unsafe].mean(axis=0),
            "mean_reference": x[sides.reference].mean(axis=0),
        }
        for against, (area, p) in _auroc_and_p(x, prompts, [category]).items():
            columns |= {f"auroc_{against}": area[0], f"q_{against}": benjamini_hochberg(p[0])}
        tables.append(pd.DataFrame(columns))
    return _finished(tables, folds, reference, top)


def _columns(
    fold: Mapping[Site, ActivationSet], sites: Sequence[Site]
) -> Float[np.ndarray, "prompt neuron"]:
    return np.concatenate([fold[site].values.float().numpy() for site in sites], axis=1)


def _contribution_columns(
    model: HookedModel,
    folds: AttributedFolds,
    category: str,
    written: Sequence[Site],
    places: Int[np.ndarray, " written"],
    width: int,
    top: int,
    n_resamples: int,
    rng: np.random.Generator,
) -> dict[str, Float[np.ndarray, " column"]]:
    """Contributions, their rank, and how they come out on halves and bootstrap samples; ``places`` are the columns that write to the site."""
    if top < 1 or n_resamples < 1:
        raise ValueError(f"top and n_resamples must be at least 1, got {top} and {n_resamples}.")
    attribution = folds.attributions[category]
    exact = attribution.heads if written and written[0].kind == "z" else attribution.neurons
    contribution = np.zeros(width)
    contribution[places] = exact.flatten().numpy()
    rank = np.empty(width, dtype=int)
    rank[np.argsort(-contribution, kind="stable")] = np.arange(1, width + 1)
    sides = (folds.fit[category], folds.held_out[category])
    half, again = np.split(
        _again(
            model,
            folds,
            category,
            written,
            [_halves_and_resamples(side, n_resamples, rng) for side in sides],
        ),
        [2],
    )
    k = min(top, again.shape[1])
    first = np.argpartition(-again, k - 1, axis=1)[:, :k] if k else np.zeros((1, 0), dtype=int)
    columns = {
        "rank": rank,
        "contribution": contribution,
        "contribution_share": contribution / (attribution.absolute or 1.0),
    }
    for name, values in (
        ("contribution_half_1", half[0]),
        ("contribution_half_2", half[1]),
        ("inclusion", np.bincount(first.ravel(), minlength=again.shape[1]) / n_resamples),
    ):
        columns[name] = np.zeros(width)
        columns[name][places] = values
    return columns


def _halves_and_resamples(sides: Sides, n_resamples: int, rng: np.random.Generator) -> Weights:
    """Weights of two halves of a contrast (the first two rows) and of bootstrap samples of it."""
    (a, b), (c, d) = halves(sides, rng), resamples(sides, n_resamples, rng)
    return torch.cat([a, c]), torch.cat([b, d])


def _again(
    model: HookedModel,
    folds: AttributedFolds,
    category: str,
    written: Sequence[Site],
    weights: Sequence[Weights],
) -> Float[np.ndarray, "draw column"]:
    """Contributions, direction included, with prompts weighted otherwise: one row a weighting of both folds."""

    def difference(values: Tensor, sides: Sides, own: Weights) -> Tensor:
        return own[0] @ values[sides.unsafe] - own[1] @ values[sides.reference]

    u = difference(folds.residual.values, folds.fit[category], weights[0])
    u = torch.nn.functional.normalize(u, dim=1)
    parts = [torch.zeros(len(u), 0)]
    for site in written:
        part = write_weights(model, site, u) * difference(
            folds.written[site].values, folds.held_out[category], weights[1]
        )
        parts.append(
            part if site.kind == "mlp_post" else part.view(len(u), model.cfg.n_heads, -1).sum(dim=2)
        )
    return torch.cat(parts, dim=1).numpy()


def _separation(
    x: tuple[Float[np.ndarray, "prompt neuron"], ...],
    prompts: tuple[Sequence[Prompt], ...],
    categories: Sequence[str],
) -> dict[str, Float[np.ndarray, "category neuron"]]:
    """AUROC, q and survival of every neuron against each contrast, from the fit fold (first) and the held-out one (second)."""
    columns: dict[str, Any] = {}
    fit, held_out = (
        _auroc_and_p(own, rows, categories) for own, rows in zip(x, prompts, strict=True)
    )
    for against in CONTRASTS:
        (area_fit, p_fit), (area, p) = fit[against], held_out[against]
        q_fit, q = benjamini_hochberg(p_fit, axis=1), benjamini_hochberg(p, axis=1)
        confirmed = benjamini_hochberg(
            np.where(q_fit <= LEVEL, p, np.nan), axis=1
        )  # the family is what was selected
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
    """AUROC of each column and its p, by contrast, a row a category; nan where the fold has nothing to compare with.

    All unsafe prompts are ranked once alone and once with the neutral ones, for all categories together: the pairs a category wins against the
    neutral prompts are those it wins against all, less those against the other categories.
    """
    unsafe = np.array(unsafe_rows(prompts), dtype=int)
    neutral = np.array(neutral_rows(prompts), dtype=int)
    labels = np.array(
        [[prompts[i].category == category for category in categories] for i in unsafe]
    )
    own, n_others = labels.sum(axis=0)[:, None], (~labels).sum(axis=0)[:, None]
    wins_others = np.zeros((len(categories), x.shape[1]))
    if n_others.all():
        wins_others = auroc(x[unsafe], labels) * own * n_others
    wins_all = wins_others
    if len(neutral):
        rest = np.concatenate([labels, np.zeros((len(neutral), len(categories)), dtype=bool)])
        wins_all = (
            auroc(x[np.concatenate([unsafe, neutral])], rest) * own * (n_others + len(neutral))
        )
    twins: tuple[list[Any], list[Any]] = ([], [])
    for category in categories:
        sides = sides_of(prompts, category, "twins")
        rows, is_unsafe, _ = sides.labels()
        known = len(sides.unsafe) > 0
        twins[0].append(auroc(x[rows], is_unsafe) if known else np.full(x.shape[1], np.nan))
        twins[1].append(
            _signed_rank_p(x[sides.unsafe] - x[sides.reference])
            if known
            else np.full(x.shape[1], np.nan)
        )
    return {
        "twins": (np.array(twins[0]), np.array(twins[1])),
        "neutral": _mann_whitney(wins_all - wins_others, own, len(neutral)),
        "other": _mann_whitney(wins_others, own, n_others),
    }


def _mann_whitney(
    wins: Float[np.ndarray, "category column"], n: Int[np.ndarray, "category 1"], m: Any
) -> _AurocAndP:
    """AUROC and p from won pairs: the normal approximation with continuity correction, without one for ties (too careful where there are any)."""
    from scipy.special import ndtr

    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.maximum(np.abs(wins - n * m / 2) - 0.5, 0)
        return wins / (n * m), np.minimum(
            1, 2 * ndtr(-distance / np.sqrt(n * m * (n + m + 1) / 12))
        )


def _signed_rank_p(differences: Float[np.ndarray, "pair column"]) -> Float[np.ndarray, " column"]:
    """Two-sided p of Wilcoxon's signed-rank test, exact up to 50 pairs: the normal approximation never gets below 1e-5 for 24 pairs.

    The exact distribution of the rank sum is made once for all columns; those with ties or zeros get the approximation.
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
    return np.sign(a - 0.5) == np.sign(b - 0.5)


def _finished(
    tables: Sequence[pd.DataFrame], folds: AttributedFolds, reference: str, top: int
) -> pd.DataFrame:
    """One table, with what it was made of in its attributes."""
    import pandas as pd

    table = pd.concat(tables, ignore_index=True)
    parts = {
        category: {
            "total": own.total,
            "embedding": own.embedding,
            "heads": float(own.heads.sum()),
            "neurons": float(own.neurons.sum()),
            "absolute": own.absolute,
            "error": own.error,
        }
        for category, own in folds.attributions.items()
    }
    table.attrs = {"site": str(folds.site), "reference": reference, "top": top, "parts": parts}
    return table
