"""The constructions of steering vectors that a run compares: the paper's, contrasts of answers, and the field's others as baselines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.models.activations import ActivationSet, cache_activations
from workbench.models.sites import Site, sites_of_kind
from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import Folds, Prompt, categories_of
from workbench.safesteer.config import CONSTRUCTIONS
from workbench.safesteer.settings import Vectors, placements
from workbench.steering.combine import own_part, pooled, summed, without
from workbench.steering.vectors import SteeringVector, fit_steering_vectors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.files.store import PathLike
    from workbench.models.load import HookedModel


PROMPT, GUIDED, OPENINGS, OWN = (
    "prompt_contrast",
    "prompt_guided",
    "answer_contrast",
    "self_contrast",
)
"""The paper's vector, and with a judge's choice of prompts; written openings of answers; the model's own answers. The latter two also pooled over the categories."""


POOLED, BOTH = "_pooled", "answer_and_self_pooled"


class Measured(NamedTuple):
    """Pooled activations that the rest of a run is made from."""

    prompts: dict[Site, ActivationSet]
    """Fit and tune prompts, span content."""
    answers: dict[str, dict[Site, ActivationSet]]
    """Openings and, where there are enough of them, the model's own answers behind questions of the fit fold, span response."""
    went_along: frozenset[str] = frozenset()
    """Ids of the fit questions that the model's plain answers go along with, where a judge was asked."""


def measure(
    model: HookedModel,
    folds: Folds,
    store: PathLike,
    *,
    own_answers: Sequence[Prompt] = (),
    went_along: Sequence[Prompt] = (),
    progress: bool = False,
) -> Measured:
    """Run the fit and tune prompts, and the fit questions with answers behind them, once each for all sites."""
    everywhere = [
        s
        for kind in ("resid_post", "attn_out", "mlp_post", "z")
        for s in sites_of_kind(model, kind)
    ]
    prompts = cache_activations(
        model,
        [*folds.fit, *folds.tune],
        [Site(0, "resid_pre"), *everywhere],
        store=store,
        progress=progress,
    )
    placed = sorted({site for place in placements(model) for site in place})
    rows = {OPENINGS: answer_prompts(folds.fit)} | ({OWN: list(own_answers)} if own_answers else {})
    answers = {
        contrast: cache_activations(
            model, own, placed, span="response", store=store, progress=progress
        )
        for contrast, own in rows.items()
    }
    return Measured(prompts, answers, frozenset(prompt.id for prompt in went_along))


def fit_all(
    measured: Measured, fit: Sequence[Prompt], names: Sequence[str] | None = None
) -> Vectors:
    """Constructions at every site of the placements.

    Args:
        measured: From ``measure``.
        fit: Prompts of the fit fold.
        names: Of ``run_config.CONSTRUCTIONS``; those without baselines by default. A construction that needs what is not there is left out: the
            self-contrast without enough answers of the model, openings for each category where a category has none (the pooled vector then
            stands for it).
    """
    wanted = list(names or (name for name, (_, default) in CONSTRUCTIONS.items() if default))
    made: dict[tuple[str, Site], dict[str, SteeringVector]] = {}
    categories = categories_of(fit)
    for site in measured.answers[OPENINGS]:
        on_fit = {s: measured.prompts[s].of(fit) for s in {site, Site(site.layer, "resid_post")}}
        residual = on_fit[Site(site.layer, "resid_post")]
        prompt = fit_steering_vectors(on_fit[site], residual=residual)
        openings = measured.answers[OPENINGS][site]
        own_answers = measured.answers.get(OWN, {}).get(site)
        for name in wanted:
            found: Mapping[str, SteeringVector] = {}
            if name == PROMPT:
                found = prompt
            elif name == "prompt_own_part" and len(prompt) > 1:
                found = own_part(prompt)
            elif name == GUIDED and measured.went_along:
                kept = [p for p in fit if p.label != "unsafe" or p.id in measured.went_along]
                guided = {s: acts.of(kept) for s, acts in on_fit.items()}
                found = fit_steering_vectors(
                    guided[site],
                    residual=guided[Site(site.layer, "resid_post")],
                    method="prompt_guided",
                )
            elif name == OWN + POOLED and own_answers is not None:
                found = pooled(_contrast(own_answers, residual, OWN))
            elif name == BOTH and own_answers is not None:
                by_self, by_openings = (
                    _everyone(pooled(_contrast(rows, residual, method)), categories)
                    for rows, method in ((own_answers, OWN), (openings, OPENINGS))
                )
                found = {c: summed([by_self[c], by_openings[c]]) for c in categories}
            elif name == OPENINGS + POOLED:
                found = pooled(_contrast(openings, residual, OPENINGS))
            elif name == "answer_without_refusal":
                refusal = pooled(
                    prompt
                )  # harmless minus harmful: Arditi et al.'s refusal direction, turned
                own = _contrast(openings, residual, OPENINGS)
                found = {
                    c: without(v, [refusal.get(c, next(iter(refusal.values())))])
                    for c, v in own.items()
                }
            elif name == "answer_principal":
                found = _contrast(openings, residual, name, estimator="principal")
            elif name == "answer_probe":
                found = _contrast(openings, residual, name, estimator="probe")
            elif name == OPENINGS:
                found = _contrast(openings, residual, OPENINGS)
            if found and name.endswith(POOLED):
                found = _everyone(found, categories)
            if set(found) == set(categories):
                made[name, site] = dict(found)
    return made


def constructions_of(vectors: Vectors) -> list[str]:
    """Names of the constructions there are."""
    return list(dict.fromkeys(construction for construction, _ in vectors))


def fitted_on(construction: str, measured: Measured) -> Mapping[Site, ActivationSet]:
    """Activations of the answers that a construction was fitted on; of prompts for constructions of prompts."""
    if construction.startswith("prompt"):
        return measured.prompts
    return measured.answers[
        OWN if construction.startswith(OWN) or construction == BOTH else OPENINGS
    ]


def attributed_site(model: HookedModel) -> Site:
    """Residual site whose direction a run attributes to neurons: after the last block but one."""
    return Site(max(0, model.cfg.n_layers - 2), "resid_post")


def _everyone(
    vectors: Mapping[str, SteeringVector], categories: Sequence[str]
) -> dict[str, SteeringVector]:
    """Pooled vectors for all categories, those without pairs of their own too."""
    any_one = next(iter(vectors.values()))
    return {c: vectors.get(c, replace(any_one, category=c)) for c in categories}


def _contrast(
    answers: ActivationSet, residual: ActivationSet, method: str, **keywords: Any
) -> dict[str, SteeringVector]:
    return fit_steering_vectors(
        answers, residual=residual, safe_side="paired", method=method, **keywords
    )
