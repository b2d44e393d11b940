"""Conditions under which the test fold is answered.

Each construction as it was chosen on the tune fold, steering behind a gate, and controls: vectors
of equal norm that should do nothing in particular.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.evaluation.metrics import HEADLINE
from workbench.generation.answers import UNSTEERED, Condition
from workbench.models.sites import Site
from workbench.prompts.contrasts import SafeSide
from workbench.prompts.prompt import Prompt, categories_of
from workbench.safesteer.constructions import CONSTRUCTIONS, safe_side_of
from workbench.safesteer.settings import Setting, Vectors, applied, multiplier_of, steering
from workbench.steering.combine import pooled
from workbench.steering.interventions import Intervention, gated
from workbench.steering.spectral import (
    Fitted,
    SpectralEdit,
    random_edit,
    shuffled_edits,
)
from workbench.steering.vectors import (
    SteeringVector,
    random_vector,
    scaled_to,
    shuffled_vector,
    with_safe_projection,
)

if TYPE_CHECKING:
    from workbench.models.activations import ActivationSet
    from workbench.safesteer.calibration import Calibration
    from workbench.steering.gates import Gate


GATED, ALWAYS = "gated", "always on, same mean strength"


def main_setting(tuned: Calibration, *, of_answers_first: bool = True) -> Setting:
    """Choose the best contrast of answers on the tune fold, or the best of all.

    It is what is gated, and what the controls have the strength of.

    Args:
        tuned: What was chosen for each construction.
        of_answers_first: Take a contrast of prompts only where there is no other.
    """
    chosen = list(tuned.chosen.values())
    of_answers = [s for s in chosen if CONSTRUCTIONS[s.construction].reads != "prompts"]
    of_answers = of_answers if of_answers_first else []
    return max(of_answers or chosen, key=lambda setting: _standing(tuned, setting))


def condition_of(setting: Setting) -> str:
    """Name the condition of a chosen setting."""
    return setting.construction.replace("_", " ")


def gate_site(setting: Setting) -> Site:
    """Name where a gate for a setting reads: the residual stream just below its lowest layer."""
    lowest = min(site.layer for site in setting.sites)
    return Site(lowest - 1, "resid_post") if lowest else Site(0, "resid_pre")


def controls(
    vectors: Vectors,
    setting: Setting,
    answers: Mapping[Site, ActivationSet],
    *,
    questions: Mapping[Site, ActivationSet] | None = None,
    safe_side: SafeSide | None = None,
    seed: int = 0,
) -> dict[str, Condition]:
    """Make vectors of equal norm, at the same places and strength, that should do nothing.

    A control is applied as the setting says. Its target is set by where the category's safe rows
    lie along the control's own direction. The controls of a spectral edit are edits of equal rank.

    Args:
        vectors: Vectors of every construction.
        setting: What they are controls for.
        answers: Activations that its vectors were fitted on.
        questions: Activations of the questions alone, which a spectral edit is fitted on too.
        safe_side: Which of the answers were the safe side; that of the construction by default.
        seed: Seed of the random draws.

    Returns:
        "random", "shuffled labels" and, for vectors by category, "other category".
    """
    at_site = {site: vectors[setting.construction, site] for site in setting.sites}
    side = safe_side or safe_side_of(setting.construction)
    categories = list(at_site[setting.sites[0]])
    next_category = dict(zip(categories, [*categories[1:], categories[0]], strict=True))
    behind = {site: (answers[site], (questions or {}).get(site)) for site in setting.sites}
    shuffled = {
        site: _shuffled(vectors, setting, site, *behind[site], side, seed) for site in behind
    }

    def random(fitted: Fitted, site: Site) -> Fitted:
        place = seed + site.layer + 1000 * categories.index(fitted.category)
        return _random(fitted, place)

    def of_shuffled_labels(fitted: Fitted, site: Site) -> Fitted:
        return _as_strong_as(fitted, shuffled[site][fitted.category])

    def of_other_category(fitted: Fitted, site: Site) -> Fitted:
        return _as_strong_as(fitted, at_site[site][next_category[fitted.category]])

    def control(make: Callable[[Fitted, Site], Fitted]) -> dict[str, list[Intervention]]:
        steered: dict[str, list[Intervention]] = {c: [] for c in categories}
        for category, site in itertools.product(categories, setting.sites):
            vector = at_site[site][category]
            made = make(vector, site)
            steered[category].append(_control(made, vector, setting, answers[site], side))
        return steered

    conditions: dict[str, Condition] = {"random": control(random)}
    conditions["shuffled labels"] = control(of_shuffled_labels)
    # A pooled vector is the same for all categories.
    if len(categories) > 1 and not CONSTRUCTIONS[setting.construction].pooled:
        conditions["other category"] = control(of_other_category)
    return conditions


def behind_gate(
    vectors: Vectors, setting: Setting, gate: Gate, opening: float
) -> dict[str, Condition]:
    """Make the steering that a gate lets through, and the same always on at its mean strength.

    A target has no mean strength, so that the second one is left out there.

    Args:
        vectors: Vectors of every construction.
        setting: What is gated.
        gate: A gate that reads below it.
        opening: Share of the questions that the gate opens for.
    """
    by_category = steering(vectors, setting)
    known = {c: by_category[c] for c in by_category if c in gate.categories}
    conditions: dict[str, Condition] = {GATED: gated(known, gate)}
    if opening > 0 and setting.form == "add":
        conditions[ALWAYS] = steering(vectors, setting.times(opening))
    return conditions


def for_everyone(
    conditions: Mapping[str, Condition], questions: Sequence[Prompt]
) -> dict[str, Condition]:
    """Add the unsteered condition, and vectors for prompts that have none of their own.

    Those prompts (safe and neutral ones) get the vectors of each category in turn.
    """
    complete: dict[str, Any] = {UNSTEERED: {}}
    for name, condition in conditions.items():
        if not isinstance(condition, Mapping):
            complete[name] = condition
            continue
        others = [prompt for prompt in questions if not set(prompt.categories) & set(condition)]
        turns = zip(others, itertools.cycle(condition), strict=False)
        complete[name] = {**condition, **{p.id: condition[c] for p, c in turns}}
    return complete


def _standing(tuned: Calibration, setting: Setting) -> tuple[int, float]:
    """Read from the tune fold: round in which it was answered last, headline less excess.

    What left a search early was beaten there, and its headline is of fewer prompts.
    """
    rows = tuned.table[tuned.table["construction"] == setting.construction]
    headline = rows[rows["chosen"]].set_index("metric").loc[HEADLINE]
    return int(headline["round"]), float(headline["value"] - headline["excess"])


def _shuffled(
    vectors: Vectors,
    setting: Setting,
    site: Site,
    answers: ActivationSet,
    questions: ActivationSet | None,
    safe_side: SafeSide,
    seed: int,
) -> Mapping[str, Fitted]:
    """Fit what the construction finds where labels are shuffled; pooled where it pools."""
    real = vectors[setting.construction, site]
    is_pooled = CONSTRUCTIONS[setting.construction].pooled
    vectors_here: dict[str, SteeringVector] = {}
    for category, fitted in real.items():
        if isinstance(fitted, SpectralEdit):
            if questions is None:
                raise ValueError(
                    f"the controls of {setting.construction!r} are fitted again, on the questions "
                    "too: give questions=activations of the prompts."
                )
            how: Any = {"share": fitted.share, "pooled": is_pooled}
            return shuffled_edits(answers, questions, seed=seed, **how)
        vectors_here[category] = fitted
    shuffled = {
        category: shuffled_vector(
            vectors_here[category], answers, seed=seed + i, safe_side=safe_side
        )
        for i, category in enumerate(categories_of(answers.prompts))
    }
    if is_pooled:
        shuffled = pooled(shuffled)
    any_one = next(iter(shuffled.values()))
    return {category: shuffled.get(category, any_one) for category in real}


def _control(
    made: Fitted, fitted: Fitted, setting: Setting, answers: ActivationSet, safe_side: SafeSide
) -> Intervention:
    """Apply a control as strongly as what it is a control for, and in the same way."""
    if setting.form == "target" and not isinstance(made, SpectralEdit):
        category = fitted.category
        made = with_safe_projection(made, answers, category=category, safe_side=safe_side)
    return applied(made, setting, multiplier=multiplier_of(fitted, setting))


def _random(fitted: Fitted, seed: int) -> Fitted:
    if isinstance(fitted, SpectralEdit):
        return random_edit(fitted, seed=seed)
    return random_vector(fitted, seed=seed)


def _as_strong_as(like: Fitted, other: Fitted) -> Fitted:
    """Give a vector the norm of another one; an edit's strength is its share alone."""
    if isinstance(like, SpectralEdit) or isinstance(other, SpectralEdit):
        return other
    return scaled_to(other, like.norm)
