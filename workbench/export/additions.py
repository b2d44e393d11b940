"""Say what steering adds, as one constant vector per site: what other programs can hold.

Every format holds less than an ``Intervention`` does. What it cannot hold is refused with a line
that names what can; nothing is left out in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from workbench.models.sites import Site
from workbench.steering.edits import AddVector
from workbench.steering.interventions import Intervention

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.load import ModelInfo


ONLY_WORKBENCH = "only workbench itself applies it (wb.generate, 'workbench steer')"


class Exported(NamedTuple):
    """Hold what an export wrote.

    Attributes:
        files: What was written.
        notes: What a reader of the files must know that they do not say, a sentence each.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Additions:
    """Hold a constant vector for each site, with the strength in it.

    Attributes:
        at: Site to what is added to every token's activation there, float32, in units of the
            residual stream. It points from unsafe to safe where the multiplier was above 0.
        model: What the vectors were measured on.
        labels: Names of the interventions.
    """

    at: dict[Site, Float[Tensor, " d_model"]]
    model: ModelInfo
    labels: tuple[str, ...]

    def at_block_outputs(self, format_name: str) -> dict[int, Float[Tensor, " d_model"]]:
        """Give the additions by block, for formats that add to a block's output and nowhere else.

        What enters block L is what block L - 1 puts out.

        Args:
            format_name: The format, for the error.

        Raises:
            ValueError: If a vector acts inside a block, or on the embedding.
        """
        layers: dict[int, Tensor] = {}
        for site, vector in self.at.items():
            layer = site.layer if site.kind == "resid_post" else site.layer - 1
            if site.kind not in ("resid_post", "resid_pre") or layer < 0:
                raise ValueError(
                    f"{format_name} adds to the output of a block, and {site} is "
                    f"{'the embedding' if layer < 0 else 'inside one'}: export it as pytorch, "
                    "lm-eval or steering-vectors, or fit the vector at resid_post."
                )
            layers[layer] = layers[layer] + vector if layer in layers else vector
        return dict(sorted(layers.items()))


def constant_additions(
    interventions: Sequence[Intervention], format_name: str, *, extent_held: bool = False
) -> Additions:
    """Reduce interventions to one constant vector per site.

    A relative strength (rho) is one too: it was measured against the mean norm of the residual
    stream where the vector was fitted, and does not follow the norm of each token.

    Args:
        interventions: For instance of ``add_vector``, ``steering_from``.
        format_name: The format they go to, for the errors.
        extent_held: Whether the format holds which tokens are steered (``positions``, ``until``).

    Raises:
        ValueError: If there are none, they are of several models or of none, or one is no constant
            addition to every token: it is behind a gate, decays, keeps norms, moves to a target.
    """
    check_flat(interventions)
    total: dict[Site, Tensor] = {}
    for one in interventions:
        refuse_conditions(one, format_name, extent_held=extent_held)
        if not isinstance(one.edit, AddVector) or one.edit.keep_norm:
            name = "keeps norms" if isinstance(one.edit, AddVector) else type(one.edit).__name__
            raise ValueError(
                f"{format_name} holds constant vectors, and the edit at {one.site} ({name}) depends"
                " on the activation: export it as pytorch, which holds kept norms, raise_to and "
                f"ablate_direction; otherwise {ONLY_WORKBENCH}."
            )
        # in float32, as ``apply`` sums them, so that nothing differs by a rounding
        vector = one.edit.multiplier * one.edit.vector.detach().float().cpu()
        total[one.site] = total.get(one.site, torch.zeros_like(vector)) + vector
    labels = tuple(one.label for one in interventions)
    at = {site: total[site] for site in sorted(total)}
    for site, vector in at.items():
        if not (torch.isfinite(vector).all() and vector.any()):
            what = "is zero" if not vector.any() else "has values that are no finite numbers"
            raise ValueError(f"what is added at {site} {what}: there is nothing to steer with.")
    return Additions(at, one_model(interventions), labels)


def check_flat(interventions: Sequence[Intervention]) -> None:
    """Raise unless something is a list of at least one intervention.

    Raises:
        ValueError: If it is empty, or holds something else.
    """
    if not interventions:
        raise ValueError("nothing to export: give at least one intervention of wb.add_vector.")
    for one in interventions:
        if not isinstance(one, Intervention):
            raise ValueError(
                f"interventions are exported, got a {type(one).__name__}; a vector becomes one "
                "with a strength: [wb.add_vector(vector, rho=0.1)]."
            )


def one_model(interventions: Sequence[Intervention]) -> ModelInfo:
    """Give the model that all interventions belong to.

    Raises:
        ValueError: If there are several, or none was measured on any.
    """
    models = {one.model.fingerprint: one.model for one in interventions if one.model is not None}
    if len(models) != 1:
        names = ", ".join(repr(model.name) for model in models.values()) or "none"
        raise ValueError(
            f"an export is for one model, the interventions belong to {len(models)} ({names}); "
            "give vectors that were measured on one."
        )
    return next(iter(models.values()))


def refuse_conditions(one: Intervention, format_name: str, *, extent_held: bool) -> None:
    """Raise where an intervention acts on some rows, questions or tokens only.

    Raises:
        ValueError: If the format cannot hold on which.
    """
    if one.gate is not None:
        raise ValueError(
            f"{format_name} cannot hold the gate in front of {one.site}, which decides for each "
            f"question: {ONLY_WORKBENCH}; to steer always, give steering_from(run, category)."
        )
    if one.rows is not None:
        raise ValueError(f"{format_name} cannot hold rows of a batch; leave out for_rows.")
    if one.decay != "none":
        raise ValueError(
            f"{format_name} cannot hold a strength that falls (decay={one.decay!r}): "
            f"{ONLY_WORKBENCH}; EasySteer holds until= without a decay."
        )
    if not extent_held and (one.positions != "all" or one.until is not None):
        raise ValueError(
            f"{format_name} steers every token, and the intervention at {one.site} has positions="
            f"{one.positions!r}, until={one.until}: export it as easysteer, which holds both."
        )


def strength_notes(additions: Additions) -> tuple[str, ...]:
    """Say what holds of every export: direction, strength, and what it is for."""
    norms = ", ".join(f"{site} {float(v.norm()):.4g}" for site, v in additions.at.items())
    return (
        "The strength is in the vectors: apply them with scale 1. "
        f"Norms in units of the residual stream: {norms}.",
        "They point from unsafe to safe where their multiplier is above 0; a negative scale turns "
        "them.",
        "A relative strength (rho) has become a constant vector, by the mean norm of the residual "
        "stream where it was fitted: it does not follow the norm of each token.",
        f"They were measured on {additions.model.name!r} ({additions.model.weights}, "
        f"{additions.model.dtype}, fingerprint {additions.model.fingerprint}) and mean nothing on "
        "a model with other weights.",
    )


def described(additions: Additions) -> dict[str, str]:
    """Describe additions as short texts, for the metadata of a file."""
    return {
        "sites": ", ".join(map(str, additions.at)),
        "sign": "from unsafe to safe",
        "strength": "included: apply with scale 1",
        "model": additions.model.name,
        "fingerprint": additions.model.fingerprint,
        "labels": "; ".join(label for label in additions.labels if label),
    }
