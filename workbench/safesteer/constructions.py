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
from workbench.prompts.contrasts import paired_rows, unsafe_rows
from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import Folds, Prompt, categories_of, text_key
from workbench.safesteer.own_answers import ALONG
from workbench.safesteer.settings import Setting, Vectors, grid, placements
from workbench.steering.combine import own_part, pooled, summed, without
from workbench.steering.spectral import Fitted, SpectralEdit, fit_spectral_edits
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

Reads = Literal[
    "prompts", "openings", "own answers", "plain answers", "alternatives", "against both", "choices"
]
"""What a construction is fitted on: prompts; written openings of answers behind questions; the
model's own answers behind questions (kept by a judge on both sides, on the safe side alone, or
those that explain or offer another way against blanket refusals, or against these and against
answers that go along); letters behind two choices."""
OWN: tuple[Reads, ...] = ("own answers", "plain answers", "alternatives", "against both")
"""Those for which the model answers the fit questions, plainly and under the instruction."""
ByCategory = Mapping[str, SteeringVector]
CATEGORY_PAIRS = 3
"""Pairs of own answers of a category, below which it has no vector of its own."""


class SiteRows(NamedTuple):
    """Pooled activations of the fit fold at one site: what a construction can be fitted on."""

    prompts: ActivationSet
    """As their contrast reads them, see ``Measured.contrasted``."""
    residual: ActivationSet
    """All prompts of the fold at the layer's residual stream, to which strength is relative: the
    user's words, however a contrast reads them."""
    answers: Mapping[Reads, ActivationSet]
    """Openings, and what else was read; own answers are missing where there were too few pairs."""
    went_along: frozenset[str]
    """Ids of the questions that the model goes along with; empty where no judge was asked."""
    harmless: frozenset[str]
    """Ids of the neutral prompts that it answers harmlessly; empty where no judge was asked."""
    how: Mapping[str, Any] = {}
    """How prompts are contrasted: arguments of ``fit_steering_vectors``."""

    @property
    def categories(self) -> list[str]:
        """Risk categories of the fit fold."""
        return categories_of(self.prompts.prompts)

    @property
    def openings(self) -> ActivationSet:
        """Written openings behind the questions."""
        return self.answers["openings"]

    @property
    def toward_harmless(self) -> SteeringVector:
        """Harmless minus harmful prompts: Arditi et al.'s refusal direction, turned."""
        return next(iter(pooled(_prompt_contrast(self)).values()))

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
        rhos: Strengths that the calibration tries, where they are not those of the run.
        kinds: Kinds of sites at which it is fitted and tried.
        is_edit: Whether it makes spectral edits, which decay, kept norms and targets are not for.
    """

    summary: str
    source: str
    fit: Callable[[SiteRows], Mapping[str, Fitted]]
    reads: Reads
    pooled: bool = False
    signs: tuple[int, ...] = (1,)
    default: bool = False
    rhos: tuple[float, ...] | None = None
    kinds: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out")
    is_edit: bool = False


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


def _prompt_guided_both(rows: SiteRows) -> ByCategory:
    # Neutral prompts are judged, twins are not.
    if not rows.went_along or not rows.harmless or rows.how.get("safe_side") == "paired":
        return {}
    ids_of = {"unsafe": rows.went_along, "neutral": rows.harmless}
    kept = [p for p in rows.prompts.prompts if p.id in ids_of.get(p.label, ())]
    return fit_steering_vectors(
        rows.prompts.of(kept), residual=rows.residual.of(kept), method=GUIDED_BOTH, **rows.how
    )


def _prompt_own_part(rows: SiteRows) -> ByCategory:
    vectors = _prompt_contrast(rows)
    return own_part(vectors) if len(vectors) > 1 else {}


def _openings(rows: SiteRows) -> ByCategory:
    return rows.contrast(rows.openings, "answer_contrast")


def _openings_pooled(rows: SiteRows) -> ByCategory:
    return rows.everyone(pooled(_openings(rows)))


def _self_pooled(rows: SiteRows) -> ByCategory:
    if "own answers" not in rows.answers:
        return {}
    return rows.everyone(pooled(rows.contrast(rows.answers["own answers"], "self_contrast")))


def _self_plain(rows: SiteRows) -> ByCategory:
    if "plain answers" not in rows.answers:
        return {}
    vectors = rows.contrast(rows.answers["plain answers"], "self_contrast_plain")
    return rows.everyone(pooled(vectors))


def _self_plain_by_category(rows: SiteRows) -> ByCategory:
    if "plain answers" not in rows.answers:
        return {}
    answers = rows.answers["plain answers"]
    n_pairs = {c: len(paired_rows(answers.prompts, c)[0]) for c in categories_of(answers.prompts)}
    enough = [c for c, n in n_pairs.items() if n >= CATEGORY_PAIRS]
    if not enough:
        return {}
    return rows.contrast(answers, "self_contrast_plain", categories=enough)


def _alternatives(rows: SiteRows) -> ByCategory:
    if "alternatives" not in rows.answers:
        return {}
    vectors = pooled(rows.contrast(rows.answers["alternatives"], "alternative_contrast"))
    harmless = rows.toward_harmless
    return rows.everyone({c: without(v, [harmless]) for c, v in vectors.items()})


def _against_both(rows: SiteRows) -> ByCategory:
    if "against both" not in rows.answers:
        return {}
    answers, parts = rows.answers["against both"], []
    for is_along in (True, False):
        kept = [p for p in answers.prompts if str(p.pair_id).endswith(ALONG) == is_along]
        parts.append(rows.everyone(pooled(rows.contrast(answers.of(kept), BOTH))))
    parts.append(_openings_pooled(rows))
    return {c: summed([part[c] for part in parts], BOTH_WEIGHTS) for c in rows.categories}


def _caa(rows: SiteRows) -> ByCategory:
    if "choices" not in rows.answers:
        return {}
    prompts = rows.residual.prompts
    # The texts it reads hold the questions, and count as having been fitted on them.
    questions = {
        c: {text_key(prompts[i].text, prompts[i].history) for i in unsafe_rows(prompts, c)}
        for c in rows.categories
    }
    vectors = rows.contrast(rows.answers["choices"], "caa")
    return {c: replace(v, fitted_on=v.fitted_on | questions[c]) for c, v in vectors.items()}


def _sea(rows: SiteRows) -> Mapping[str, SpectralEdit]:
    # The neutral side is the question itself, whatever the contrast of prompts reads.
    return fit_spectral_edits(rows.openings, rows.residual, pooled=True)


def _openings_and_self_pooled(rows: SiteRows) -> ByCategory:
    by_self = _self_pooled(rows)
    if not by_self:
        return {}
    by_openings = _openings_pooled(rows)
    return {c: summed([by_self[c], by_openings[c]]) for c in rows.categories}


def _openings_without_refusal(rows: SiteRows) -> ByCategory:
    harmless = rows.toward_harmless
    return {c: without(v, [harmless]) for c, v in _openings(rows).items()}


PROMPT, GUIDED, GUIDED_BOTH = "prompt_contrast", "prompt_guided", "prompt_guided_both"
OPENINGS, BOTH = "answer_contrast", "safe_against_both"
BOTH_WEIGHTS = (2.0, 1.5, 2.0)
"""Weights of the three directions of ``safe_against_both``: own answers that offer another way
against those that go along, the same against blanket refusals, and openings. They were picked by
hand on the tune fold of a Qwen model of .5B, and no claim is made that others do worse."""
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
    "self_contrast_plain": Construction(
        "the model's own answers under an instruction minus its plain ones, whatever they are",
        "ours; on an aligned model most plain answers are refusals",
        _self_plain,
        reads="plain answers",
        pooled=True,
    ),
    "self_contrast_plain_by_category": Construction(
        "the same, each category's own",
        "ours",
        _self_plain_by_category,
        reads="plain answers",
    ),
    "alternative_contrast": Construction(
        "own answers that explain or offer another way minus own blanket refusals, orthogonal to "
        "the refusal direction",
        "alternative vector of AltSteer (Kwon et al. 2026, arXiv:2608.30197); its refusal "
        "direction is refused minus answered harmful prompts, here that of arXiv:2406.11717",
        _alternatives,
        reads="alternatives",
        pooled=True,
    ),
    BOTH: Construction(
        "own answers that offer another way, against own going along and own blanket refusals, and "
        "openings: three directions, weighed 2, 1.5 and 2",
        "ours",
        _against_both,
        reads="against both",
        pooled=True,
        default=True,
        rhos=(0.2, 0.3, 0.42),
    ),
    GUIDED_BOTH: Construction(
        "the guided one, from those neutral prompts too whose plain answer is judged harmless",
        "guided variant of category-wise steering (arXiv:2410.01174)",
        _prompt_guided_both,
        reads="prompts",
        signs=(1, -1),
    ),
    "caa": Construction(
        "two written openings to choose from: the safe one's letter minus the other's",
        "CAA (Rimsky et al. 2023, arXiv:2312.06681); openings are ours",
        _caa,
        reads="choices",
    ),
    "sea": Construction(
        "an edit that keeps what covaries with safe openings and removes what does with others",
        "spectral editing of activations (Qiu et al. 2024, arXiv:2405.09719), pooled",
        _sea,
        reads="openings",
        pooled=True,
        rhos=(0.25, 0.5, 1.0),
        kinds=("resid_post",),
        is_edit=True,
    ),
}
"""Every construction by name, in the order in which a run compares them."""


class Measured(NamedTuple):
    """Pooled activations that the rest of a run is made from."""

    prompts: dict[Site, ActivationSet]
    """Fit and tune prompts, span content."""
    answers: dict[Reads, dict[Site, ActivationSet]]
    """Openings, and what else constructions read where there is enough of it, behind questions of
    the fit fold, span response."""
    went_along: frozenset[str] = frozenset()
    """Ids of the fit questions that the model's plain answers go along with, where a judge was
    asked."""
    harmless: frozenset[str] = frozenset()
    """Ids of the neutral fit prompts that the model answers harmlessly, where judges were asked."""
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
            answers={reads: at_sites[site] for reads, at_sites in self.answers.items()},
            went_along=self.went_along,
            harmless=self.harmless,
            how=self.how,
        )


def measure(
    model: HookedModel,
    folds: Folds,
    store: PathLike,
    *,
    answers: Mapping[Reads, Sequence[Prompt]] | None = None,
    went_along: Sequence[Prompt] = (),
    harmless: Sequence[Prompt] = (),
    places: Sequence[tuple[Site, ...]] | None = None,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    progress: bool = False,
) -> Measured:
    """Run prompts, and fit questions with answers behind them, once for all sites there are.

    Args:
        model: A hooked model.
        folds: Prompts; those of the fit and the tune fold are run.
        store: Folder that keeps the activations.
        answers: Rows with answers beside the written openings, by what reads them.
        went_along: Fit questions that the model goes along with.
        harmless: Neutral fit prompts that it answers harmlessly.
        places: Sites where vectors are wanted; by default those of ``placements``.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads.
        progress: Show progress bars.
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
    rows |= {reads: list(of_kind) for reads, of_kind in (answers or {}).items() if of_kind}
    behind = {
        reads: cache_activations(model, of_kind, placed, span="response", **how)
        for reads, of_kind in rows.items()
    }
    along, harmless_ids = (
        frozenset(prompt.id for prompt in chosen) for chosen in (went_along, harmless)
    )
    return Measured(prompts, behind, went_along=along, harmless=harmless_ids)


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
    vectors: dict[tuple[str, Site], dict[str, Fitted]] = {}
    categories = set(categories_of(fit))
    for site in measured.answers["openings"]:
        rows = measured.at(site, fit)
        for name in wanted_names(names):
            if site.kind not in CONSTRUCTIONS[name].kinds:
                continue
            by_category = CONSTRUCTIONS[name].fit(rows)
            if set(by_category) == categories:
                vectors[name, site] = _with_targets(by_category, name, rows)
    return vectors


def _with_targets(
    by_category: Mapping[str, Fitted], name: str, rows: SiteRows
) -> dict[str, Fitted]:
    """Measure where the safe side lies along vectors that were combined from others."""
    reads = CONSTRUCTIONS[name].reads
    behind = rows.prompts if reads == "prompts" else rows.answers[reads]
    side = safe_side_of(name, rows.how.get("safe_side", "generic"))
    return {
        category: with_safe_projection(fitted, behind, safe_side=side)
        if isinstance(fitted, SteeringVector) and math.isnan(fitted.safe_projection)
        else fitted
        for category, fitted in by_category.items()
    }


def safe_side_of(construction: str, of_prompts: SafeSide = "generic") -> SafeSide:
    """Say what the safe side of a construction is: that of prompts, or answers in pairs."""
    return of_prompts if CONSTRUCTIONS[construction].reads == "prompts" else "paired"


def wanted_names(names: Sequence[str] | None) -> list[str]:
    """Name the constructions of a run: those given, or those that are no mere baselines."""
    return list(names or (name for name, what in CONSTRUCTIONS.items() if what.default))


def reads_of(names: Sequence[str] | None) -> set[Reads]:
    """Collect what the constructions of a run are fitted on."""
    return {CONSTRUCTIONS[name].reads for name in wanted_names(names)}


def constructions_of(vectors: Vectors) -> list[str]:
    """Name the constructions that have vectors."""
    return list(dict.fromkeys(construction for construction, _ in vectors))


def places_for(name: str, places: Sequence[tuple[Site, ...]]) -> list[tuple[Site, ...]]:
    """Choose the places at whose kinds of sites a construction is fitted."""
    kinds = CONSTRUCTIONS[name].kinds
    return [place for place in places if all(site.kind in kinds for site in place)]


def settings_to_try(
    names: Sequence[str],
    places: Sequence[tuple[Site, ...]],
    rhos: Sequence[float],
    *,
    own_rhos: bool = True,
    **how: Any,
) -> list[Setting]:
    """Combine each construction with the places, signs and strengths that it is tried at.

    Args:
        names: Names of constructions that have vectors.
        places: Each a site or several.
        rhos: Relative strengths at one layer.
        own_rhos: Whether a construction that names strengths of its own is tried at these instead.
        how: Further arguments of ``grid``. A spectral edit neither decays nor has a target, and
            keeps norms anyway: it is tried in those variants that it can be applied in, or plainly
            where there is none.
    """
    settings = []
    for name in names:
        what = CONSTRUCTIONS.get(name)
        if what is None:  # of a run of another version
            settings += grid([name], places, rhos, **how)
            continue
        here = places_for(name, places)
        strengths = what.rhos if own_rhos and what.rhos else rhos
        how_here: dict[str, Any] = {"signs": {name: what.signs}, **how}
        tried = grid([name], here, strengths, **how_here)
        if what.is_edit:
            plain = [one for one in tried if one.is_plain]
            tried = plain or grid([name], here, strengths, **{**how_here, "variants": ({},)})
        settings += tried
    return settings


def activations_behind(construction: str, measured: Measured) -> Mapping[Site, ActivationSet]:
    """Return the activations that a construction was fitted on."""
    reads = CONSTRUCTIONS[construction].reads
    if reads != "prompts":
        return measured.answers[reads]
    return measured.prompts if measured.contrasted is None else measured.contrasted
