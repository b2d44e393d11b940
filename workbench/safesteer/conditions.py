"""What the test fold is answered under: each construction as it was chosen, steering behind a gate, and what should do nothing in particular."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench.evaluation.scoring import HEADLINE
from workbench.generation.answers import UNSTEERED, Condition
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt, categories_of
from workbench.safesteer.constructions import POOLED
from workbench.safesteer.settings import Setting, Vectors, steering
from workbench.steering.combine import pooled
from workbench.steering.interventions import Intervention, add_vector, gated
from workbench.steering.vectors import SteeringVector, random_vector, scaled_to, shuffled_vector

if TYPE_CHECKING:
    from workbench.models.activations import ActivationSet
    from workbench.safesteer.calibration import Calibration
    from workbench.steering.gates import Gate


GATED, ALWAYS = "gated", "always on, same mean strength"


def main_setting(tuned: Calibration) -> Setting:
    """The best contrast of answers on the tune fold: what is gated, and what the controls have the strength of."""
    answers = [
        setting
        for setting in tuned.chosen.values()
        if not setting.construction.startswith("prompt")
    ]
    return max(answers or tuned.chosen.values(), key=partial(_headline, tuned))


def condition_of(setting: Setting) -> str:
    """Name of a chosen setting's condition."""
    return setting.construction.replace("_", " ")


def gate_site(setting: Setting) -> Site:
    """Where a gate for a setting reads: the residual stream just below its lowest layer."""
    lowest = min(site.layer for site in setting.sites)
    return Site(lowest - 1, "resid_post") if lowest else Site(0, "resid_pre")


def controls(
    vectors: Vectors, setting: Setting, answers: Mapping[Site, ActivationSet], *, seed: int = 0
) -> dict[str, Condition]:
    """Vectors of equal norm, at the same places and strength, that should do nothing in particular.

    Args:
        vectors: Every construction's.
        setting: What they are controls for.
        answers: Activations that its vectors were fitted on.
        seed: Of the draws.

    Returns:
        "random", "shuffled labels" and, where categories have vectors of their own, "other category".
    """
    own_of = {site: vectors[setting.construction, site] for site in setting.sites}
    categories = list(own_of[setting.sites[0]])
    other = dict(zip(categories, [*categories[1:], categories[0]], strict=True))

    def control(
        make: Callable[[SteeringVector, Site], SteeringVector],
    ) -> dict[str, list[Intervention]]:
        conditions: dict[str, list[Intervention]] = {c: [] for c in categories}
        for category, site in itertools.product(categories, setting.sites):
            own = own_of[site][category]
            conditions[category].append(
                add_vector(make(own, site), setting.sign * own.multiplier_for(setting.rho))
            )
        return conditions

    made: dict[str, Condition] = {
        "random": control(
            lambda own, site: random_vector(
                own, seed=seed + site.layer + 1000 * categories.index(own.category)
            )
        )
    }
    shuffled = {
        site: _shuffled(vectors, setting, site, answers[site], seed) for site in setting.sites
    }
    made["shuffled labels"] = control(
        lambda own, site: scaled_to(shuffled[site][own.category], own.norm)
    )
    if len(categories) > 1 and not setting.construction.endswith(
        POOLED
    ):  # a pooled vector is the same for all
        made["other category"] = control(
            lambda own, site: scaled_to(own_of[site][other[own.category]], own.norm)
        )
    return made


def behind_gate(
    vectors: Vectors, setting: Setting, gate: Gate, opening: float
) -> dict[str, Condition]:
    """Steering that the gate lets through, and the same always on at its mean strength.

    Args:
        vectors: Every construction's.
        setting: What is gated.
        gate: Reads below it.
        opening: Share of the questions that the gate opens for.
    """
    strong = {c: own for c, own in steering(vectors, setting).items() if c in gate.categories}
    made: dict[str, Condition] = {GATED: gated(strong, gate)}
    if opening > 0:
        made[ALWAYS] = steering(vectors, setting._replace(rho=setting.rho * opening))
    return made


def for_everyone(
    conditions: Mapping[str, Condition], questions: Sequence[Prompt]
) -> dict[str, Condition]:
    """The conditions, with the vectors of some category for prompts that have no vectors of their own: of each category in turn."""
    found: dict[str, Any] = {UNSTEERED: {}}
    for name, condition in conditions.items():
        if not isinstance(condition, Mapping):
            found[name] = condition
            continue
        others = [prompt for prompt in questions if prompt.category not in condition]
        found[name] = {
            **condition,
            **{
                p.id: condition[c] for p, c in zip(others, itertools.cycle(condition), strict=False)
            },
        }
    return found


def _headline(tuned: Calibration, setting: Setting) -> float:
    """What the tune fold says of a chosen setting: headline less excess over the limits."""
    own = tuned.table[tuned.table["chosen"] & (tuned.table["construction"] == setting.construction)]
    row = own.set_index("metric").loc[HEADLINE]
    return float(row["value"] - row["excess"])


def _shuffled(
    vectors: Vectors, setting: Setting, site: Site, answers: ActivationSet, seed: int
) -> dict[str, SteeringVector]:
    """What the construction finds where labels are shuffled; pooled where it pools."""
    have = categories_of(answers.prompts)
    own = vectors[setting.construction, site]
    made = {
        c: shuffled_vector(own[c], answers, seed=seed + i, safe_side="paired")
        for i, c in enumerate(have)
    }
    if setting.construction.endswith(POOLED):
        made = pooled(made)
    return {c: made.get(c, next(iter(made.values()))) for c in own}
