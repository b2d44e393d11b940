"""Constructions of steering vectors that a run compares, in one table.

The paper's vector contrasts prompts. This project adds contrasts of answers, from written openings
and from the model's own answers; the field's other constructions are there as baselines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from workbench.models.activations import ActivationSet, cache_activations, computed_sites
from workbench.models.sites import Site, present_sites
from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import Folds, Prompt, categories_of
from workbench.safesteer.settings import Vectors, placements
from workbench.steering.combine import own_part, pooled, summed, without
from workbench.steering.vectors import (
    SteeringVector,
    fit_steering_vectors,
    with_safe_projection,
)

if TYPE_CHECKING:
    from workbench.files.store import PathLike
    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords
    from workbench.prompts.contrasts import SafeSide

Reads = Literal["prompts", "openings", "own answers"]
"""What a construction is fitted on: prompts, written openings of answers behind questions, or the
model's own answers behind questions."""
ByCategory = Mapping[str, SteeringVector]


class SiteRows(NamedTuple):
    """Pooled activations of the fit fold at one site: what a construction can be fitted on."""

    prompts: ActivationSet
    residual: ActivationSet
    """The same prompts at the layer's residual stream, to which strength is relative."""
    openings: ActivationSet
    own_answers: ActivationSet | None
    """None where the model gave too few pairs of answers."""
    went_along: frozenset[str]
    """Ids of the questions that the model goes along with; empty where no judge was asked."""
    how: Mapping[str, Any] = {}
    """How prompts are contrasted: arguments of ``fit_steering_vectors``."""

    @property
    def categories(self) -> list[str]:
        """Risk categories of the fit fold."""
        return categories_of(self.prompts.prompts)

    def contrast(self, answers: ActivationSet, method: str, **estimator: Any) -> ByCategory:
        """Fit safe minus unsafe answers to the same question, category by category."""
        return fit_steering_vectors(
            answers, residual=self.residual, safe_side="paired", method=method, **estimator
        )

    def everyone(self, vectors: ByCategory) -> ByCategory:
        """Give pooled vectors to all categories, those without pairs of their own too."""
        any_one = next(iter(vectors.values()))
        return {c: vectors.get(c, replace(any_one, category=c)) for c in self.categories}


@dataclass(frozen=True)
class Construction:
    """Describe one way to make a steering vector.

    Attributes:
        summary: What it is, in one line.
        source: Where it is from.
        fit: Vectors by category from the activations at one site; none where something it needs
            is missing.
        reads: What it is fitted on, and so what its shuffled control is made from.
        pooled: Whether all categories share one vector.
        signs: Signs that the calibration tries; +1 points from unsafe to safe.
        default: Whether a run takes it unless told otherwise.
    """

    summary: str
    source: str
    fit: Callable[[SiteRows], ByCategory]
    reads: Reads
    pooled: bool = False
    signs: tuple[int, ...] = (1,)
    default: bool = False


def _prompt_contrast(rows: SiteRows) -> ByCategory:
    return fit_steering_vectors(rows.prompts, residual=rows.residual, **rows.how)


def _prompt_guided(rows: SiteRows) -> ByCategory:
    if not rows.went_along:
        return {}
    ids = rows.went_along
    kept = [p for p in rows.prompts.prompts if p.label != "unsafe" or p.id in ids]
    return fit_steering_vectors(
        rows.prompts.of(kept), residual=rows.residual.of(kept), method=GUIDED, **rows.how
    )


def _prompt_own_part(rows: SiteRows) -> ByCategory:
    vectors = _prompt_contrast(rows)
    return own_part(vectors) if len(vectors) > 1 else {}


def _openings(rows: SiteRows) -> ByCategory:
    return rows.contrast(rows.openings, "answer_contrast")


def _openings_pooled(rows: SiteRows) -> ByCategory:
    return rows.everyone(pooled(_openings(rows)))


def _self_pooled(rows: SiteRows) -> ByCategory:
    if rows.own_answers is None:
        return {}
    return rows.everyone(pooled(rows.contrast(rows.own_answers, "self_contrast")))


def _openings_and_self_pooled(rows: SiteRows) -> ByCategory:
    by_self = _self_pooled(rows)
    if not by_self:
        return {}
    by_openings = _openings_pooled(rows)
    return {c: summed([by_self[c], by_openings[c]]) for c in rows.categories}


def _openings_without_refusal(rows: SiteRows) -> ByCategory:
    # Harmless minus harmful prompts: Arditi et al.'s refusal direction, turned.
    refusal = pooled(_prompt_contrast(rows))
    any_one = next(iter(refusal.values()))
    return {c: without(v, [refusal.get(c, any_one)]) for c, v in _openings(rows).items()}


PROMPT, GUIDED = "prompt_contrast", "prompt_guided"
OPENINGS = "answer_contrast"
CONSTRUCTIONS: dict[str, Construction] = {
    PROMPT: Construction(
        "the paper's: neutral prompts minus the category's unsafe ones",
        "SafeSteer (Ghosh et al. 2025, arXiv:2506.04250)",
        _prompt_contrast,
        reads="prompts",
        signs=(1, -1),
        default=True,
    ),
    OPENINGS: Construction(
        "written openings of answers: turning to safety minus going along",
        "paired differences as in CAA (Rimsky et al. 2023, arXiv:2312.06681); openings are ours",
        _openings,
        reads="openings",
        default=True,
    ),
    "answer_contrast_pooled": Construction(
        "the same, the mean direction of all categories",
        "ours",
        _openings_pooled,
        reads="openings",
        pooled=True,
        default=True,
    ),
    "self_contrast_pooled": Construction(
        "the model's own answers under an instruction minus its plain ones, all categories",
        "ours",
        _self_pooled,
        reads="own answers",
        pooled=True,
        default=True,
    ),
    "answer_and_self_pooled": Construction(
        "the sum of the two before, direction by direction",
        "ours",
        _openings_and_self_pooled,
        reads="own answers",
        pooled=True,
        default=True,
    ),
    GUIDED: Construction(
        "the paper's, from those unsafe prompts whose plain answer the judge calls unsafe",
        "guided variant of category-wise steering (arXiv:2410.01174)",
        _prompt_guided,
        reads="prompts",
        signs=(1, -1),
    ),
    "prompt_own_part": Construction(
        "the paper's vector minus the mean of the other categories'",
        "ours",
        _prompt_own_part,
        reads="prompts",
    ),
    "answer_principal": Construction(
        "openings, first principal component of the differences",
        "RepE (Zou et al. 2023, arXiv:2310.01405)",
        lambda rows: rows.contrast(rows.openings, "answer_principal", estimator="principal"),
        reads="openings",
    ),
    "answer_probe": Construction(
        "openings, normal of a logistic probe",
        "linear probing, as in RepE (arXiv:2310.01405)",
        lambda rows: rows.contrast(rows.openings, "answer_probe", estimator="probe"),
        reads="openings",
    ),
    "answer_without_refusal": Construction(
        "openings, orthogonal to the refusal direction",
        "refusal direction of Arditi et al. 2024 (arXiv:2406.11717)",
        _openings_without_refusal,
        reads="openings",
    ),
}
"""Every construction by name, in the order in which a run compares them."""


class Measured(NamedTuple):
    """Pooled activations that the rest of a run is made from."""

    prompts: dict[Site, ActivationSet]
    """Fit and tune prompts, span content."""
    answers: dict[Reads, dict[Site, ActivationSet]]
    """Openings and, where there are enough of them, the model's own answers, behind questions of
    the fit fold, span response."""
    went_along: frozenset[str] = frozenset()
    """Ids of the fit questions that the model's plain answers go along with, where a judge was
    asked."""
    contrasted: Mapping[Site, ActivationSet] | None = None
    """Prompts of the fit fold as their contrast reads them; None takes those above."""
    how: Mapping[str, Any] = {}
    """How prompts are contrasted: arguments of ``fit_steering_vectors``."""

    def at(self, site: Site, fit: Sequence[Prompt]) -> SiteRows:
        """Take what constructions are fitted on at one site."""
        return SiteRows(
            prompts=self.prompts[site].of(fit)
            if self.contrasted is None
            else self.contrasted[site],
            residual=self.prompts[Site(site.layer, "resid_post")].of(fit),
            openings=self.answers["openings"][site],
            own_answers=self.answers.get("own answers", {}).get(site),
            went_along=self.went_along,
            how=self.how,
        )


def measure(
    model: HookedModel,
    folds: Folds,
    store: PathLike,
    *,
    own_answers: Sequence[Prompt] = (),
    went_along: Sequence[Prompt] = (),
    places: Sequence[tuple[Site, ...]] | None = None,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    progress: bool = False,
) -> Measured:
    """Run prompts, and fit questions with answers behind them, once for all sites there are.

    Vectors are wanted at ``places``, by default those of ``placements``.
    """
    how: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    how |= {"store": store, "progress": progress}
    kinds = ("resid_post", "attn_out", "mlp_post", "z")
    asked = [site for place in places or () for site in place]
    named = dict.fromkeys([Site(0, "resid_pre"), *present_sites(model, kinds), *asked])
    everywhere = computed_sites(model, list(named), folds.fit[0])
    prompts = cache_activations(model, [*folds.fit, *folds.tune], everywhere, **how)
    wanted = placements(model) if places is None else places
    placed = sorted({site for place in wanted for site in place if site in prompts})
    rows: dict[Reads, list[Prompt]] = {"openings": answer_prompts(folds.fit)}
    if own_answers:
        rows["own answers"] = list(own_answers)
    answers = {
        kind: cache_activations(model, kind_rows, placed, span="response", **how)
        for kind, kind_rows in rows.items()
    }
    return Measured(prompts, answers, frozenset(prompt.id for prompt in went_along))


def fit_all(
    measured: Measured, fit: Sequence[Prompt], names: Sequence[str] | None = None
) -> Vectors:
    """Fit constructions at every site of the placements.

    Args:
        measured: From ``measure``.
        fit: Prompts of the fit fold.
        names: Names of ``CONSTRUCTIONS``; by default those that are no mere baselines. A
            construction that needs what is not there is left out: the self-contrast without enough
            answers of the model, openings for each category where a category has none (the pooled
            vector then stands for it).
    """
    vectors: dict[tuple[str, Site], dict[str, SteeringVector]] = {}
    categories = set(categories_of(fit))
    for site in measured.answers["openings"]:
        rows = measured.at(site, fit)
        for name in wanted_names(names):
            by_category = CONSTRUCTIONS[name].fit(rows)
            if set(by_category) == categories:
                vectors[name, site] = _with_targets(by_category, name, rows)
    return vectors


def _with_targets(by_category: ByCategory, name: str, rows: SiteRows) -> dict[str, SteeringVector]:
    """Measure where the safe side lies along vectors that were combined from others."""
    reads = CONSTRUCTIONS[name].reads
    behind = {
        "prompts": rows.prompts,
        "openings": rows.openings,
        "own answers": rows.own_answers or rows.openings,
    }[reads]
    side = safe_side_of(name, rows.how.get("safe_side", "generic"))
    return {
        category: with_safe_projection(vector, behind, safe_side=side)
        if math.isnan(vector.safe_projection)
        else vector
        for category, vector in by_category.items()
    }


def safe_side_of(construction: str, of_prompts: SafeSide = "generic") -> SafeSide:
    """Say what the safe side of a construction is: that of prompts, or answers in pairs."""
    return of_prompts if CONSTRUCTIONS[construction].reads == "prompts" else "paired"


def wanted_names(names: Sequence[str] | None) -> list[str]:
    """Name the constructions of a run: those given, or those that are no mere baselines."""
    return list(names or (name for name, what in CONSTRUCTIONS.items() if what.default))


def constructions_of(vectors: Vectors) -> list[str]:
    """Name the constructions that have vectors."""
    return list(dict.fromkeys(construction for construction, _ in vectors))


def signs_of(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Say which signs the calibration tries for each construction."""
    return {name: CONSTRUCTIONS[name].signs for name in names if name in CONSTRUCTIONS}


def activations_behind(construction: str, measured: Measured) -> Mapping[Site, ActivationSet]:
    """Return the activations that a construction was fitted on."""
    reads = CONSTRUCTIONS[construction].reads
    if reads != "prompts":
        return measured.answers[reads]
    return measured.prompts if measured.contrasted is None else measured.contrasted
