"""Change features while a model runs, with matched random features as controls."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from workbench.features.activations import FeatureSet, check_fits
from workbench.features.sae import SparseAutoencoder
from workbench.models.batches import batches_by_length, pad, span_mask
from workbench.models.forward import reading
from workbench.models.hooked_model import input_device
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import RESIDUAL_KINDS
from workbench.models.templates import asked_by
from workbench.models.tokens import encode, pad_id
from workbench.neurons.effects import NeuronEffect
from workbench.neurons.silencing import Controls, matched_controls
from workbench.prompts.forms import as_prompts
from workbench.stats.estimates import mean
from workbench.stats.selectivity import permutation_p
from workbench.steering.apply import intervene
from workbench.steering.edits import at_least_float32
from workbench.steering.foreign_vectors import Sign
from workbench.steering.interventions import Intervention, Positions
from workbench.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel
    from workbench.models.tokens import Encoded
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt


Method = Literal["zero", "clamp"]
"""What features become: nothing, or given values such as their means on safe prompts."""


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """Set some features of a sparse autoencoder, and leave what it misses as it is.

    The activation moves by what the changed features write. Where they have their new values
    already it stays as it is.

    Attributes:
        sae: Whose features.
        features: Which.
        values: Their new values, at every token.
        where: Positions it applies to; None means all of them.
    """

    sae: SparseAutoencoder
    features: tuple[int, ...]
    values: Float[Tensor, " feature"]
    where: Bool[Tensor, "row pos 1"] | None = None

    def __call__(self, activation: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        """Move the activation by what the changed features write."""
        wide = at_least_float32(activation)
        change = self.values.to(wide.device) - self.sae.encode(wide, self.features)
        written = self.sae.written[list(self.features)].to(wide)
        moved = (wide + change.to(wide) @ written).to(activation)
        is_moved = (change != 0).any(dim=-1, keepdim=True)
        where = is_moved if self.where is None else self.where.to(is_moved.device) & is_moved
        return torch.where(where, moved, activation)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.sae.decoder_bias)


def feature_interventions(
    sae: SparseAutoencoder,
    features: Sequence[int],
    method: Method = "zero",
    *,
    safe: FeatureSet | None = None,
    positions: Positions = "all",
    model: ModelInfo | None = None,
) -> list[Intervention]:
    """Silence or patch features, ready for ``generate`` and ``sweep``.

    Args:
        sae: Whose features.
        features: Which.
        method: "zero" silences them; "clamp" gives them their means on ``safe`` prompts.
        safe: Features of safe prompts, from ``cache_features``; "clamp" needs them.
        positions: Which tokens.
        model: What the SAE was measured on, so that it is not used on another one; that of
            ``safe`` by default.

    Raises:
        ValueError: If a feature does not exist or the method is unknown.
    """
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}; methods: {', '.join(get_args(Method))}.")
    if (method == "clamp") != (safe is not None):
        raise ValueError(
            "method 'clamp' needs safe=cache_features(...) of safe prompts, 'zero' takes none; got "
            f"{method!r} with {safe!r}."
        )
    chosen = _checked(sae, features)
    values = torch.zeros(len(chosen))
    if safe is not None:
        values = safe.values[:, list(chosen)].double().mean(dim=0).float()
        model = safe.stream.model if model is None else model
    edit = FeatureEdit(sae, chosen, values)
    label = f"{method} {len(chosen)} features"
    return [Intervention(sae.site, edit, positions, label=label, model=model)]


def matched_features(
    measured: FeatureSet,
    target: Sequence[int],
    direction: Float[Tensor, " d"],
    *,
    n_sets: int = 20,
    seed: int = 0,
    exclude: Sequence[int] = (),
) -> Controls:
    """Draw random sets of features like the target, from those that are active at all.

    They are matched by deciles of the mean and the spread of the pooled feature and of how much of
    the direction it writes, as neurons are (``wb.neurons.matched_controls``).

    Args:
        measured: Features of the fit fold.
        target: Features to stand in for.
        direction: Vector whose direction ``write`` is about.
        n_sets: How many sets.
        seed: Same seed, same sets.
        exclude: Features that no control may hold, besides the target's own.

    Returns:
        Controls; each member is a pair of the SAE's layer and a feature.

    Raises:
        ValueError: If too few other features are active.
    """
    import pandas as pd

    chosen, layer = _checked(measured.sae, target), measured.sae.site.layer
    values = measured.values.double()
    is_used = (values != 0).any(dim=0)
    is_used[list(chosen)] = True
    u = direction.double().cpu() / direction.double().norm()
    statistics = pd.DataFrame(
        {
            "layer": layer,
            "neuron": is_used.nonzero()[:, 0].numpy(),
            "mean_abs": values.abs().mean(dim=0)[is_used].numpy(),
            "sd": values.std(dim=0, correction=0)[is_used].numpy(),
            "write": (measured.sae.written.cpu().double() @ u).abs()[is_used].numpy(),
        }
    )
    pairs = [(layer, feature) for feature in chosen]
    without = [(layer, feature) for feature in exclude]
    return matched_controls(statistics, pairs, n_sets=n_sets, seed=seed, exclude=without)


@torch.no_grad()
def feature_effect(
    model: HookedModel,
    prompts: PromptsLike,
    targets: Mapping[str, Sequence[int]],
    measured: FeatureSet,
    vector: SteeringVector,
    *,
    controls: Mapping[str, Controls] | None = None,
    method: Method = "zero",
    safe: FeatureSet | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> list[NeuronEffect]:
    """Change sets of features and measure how far prompts move along a steering vector.

    Features are changed from the user's first word on, never in the template before it.

    Args:
        model: What the features were measured on.
        prompts: Held-out unsafe prompts.
        targets: Name to features.
        measured: Features of the fit fold: whose SAE, and how prompts are asked.
        vector: Where the shift is read: along it, at its site, over its span. The site is the SAE's
            or a later one.
        controls: For a target's name its control sets, see ``matched_features``.
        method: See ``feature_interventions``.
        safe: See ``feature_interventions``.
        batch_size: Rows per pass.
        seed: Seed of the bootstrap.

    Returns:
        One effect per target, as for neurons (``wb.neurons.effects_table``): mean change of the
        projection by the vector's norm, so that 1 is the way from unsafe to safe.

    Raises:
        ValueError: If a feature, the vector or a prompt does not fit.
    """
    sae, prompts = measured.sae, as_prompts(prompts)
    _check_effect(model, prompts, measured, vector)
    way = asked_by(measured.stream.asked_as)
    encoded = encode(model, prompts, with_response=vector.span == "response", **way)
    before = _projections(model, encoded, vector, [], batch_size)

    def shift(features: Sequence[int]) -> Float[Tensor, " prompt"]:
        changed = feature_interventions(
            sae, features, method, safe=safe, model=measured.stream.model
        )
        after = _projections(model, encoded, vector, changed, batch_size)
        return (after - before) / vector.norm

    effects = []
    for name, target in targets.items():
        values, sets = shift(target), controls[name].sets if controls and name in controls else ()
        others = tuple(float(shift([f for _, f in of_set]).mean()) for of_set in sets)
        estimate = mean(values.numpy(), seed=seed)
        p = permutation_p(estimate.value, np.array(others)) if others else math.nan
        outcome, each = f"shift at {vector.site}", tuple(values.tolist())
        effects.append(NeuronEffect(name, outcome, method, len(target), estimate, others, p, each))
    return effects


def _check_effect(
    model: HookedModel, prompts: Sequence[Prompt], measured: FeatureSet, vector: SteeringVector
) -> None:
    """Raise where an effect cannot be measured, before anything runs."""
    sae = measured.sae
    check_fits(model, sae)
    if vector.site.layer < sae.site.layer or not vector.norm > 0:
        raise ValueError(
            f"{vector!r} must not be zero and not lie below {sae.site}, where the features are."
        )
    ids = {prompt.id for prompt in measured.prompts}
    seen = [prompt.id for prompt in prompts if prompt.id in ids]
    if seen or not prompts:
        raise ValueError(
            f"give held-out prompts; {len(seen)} of {len(prompts)} were part of the measurement"
            + (f", {seen[0]!r} among them." if seen else ".")
        )


def feature_vector(
    sae: SparseAutoencoder,
    feature: int,
    model: HookedModel,
    *,
    sign: Sign,
    category: str = "feature",
    residual: ActivationSet | None = None,
) -> SteeringVector:
    """Make a steering vector of what a feature writes.

    Args:
        sae: Whose feature.
        feature: Which.
        model: What the SAE was trained on.
        sign: What the feature stands for: "unsafe_to_safe" where more of it is safer,
            "safe_to_unsafe" where less of it is, so that the vector is turned around.
        category: Category that the vector is used for.
        residual: Activations of the residual stream at the SAE's layer: their mean norm makes
            relative strength (rho) known. Without it the vector is used with a multiplier.

    Raises:
        ValueError: If there is no such feature, the sign is unknown, or the SAE does not read the
            residual stream or what is added to it.
    """
    if sign not in get_args(Sign):
        raise ValueError(f"sign must be {' or '.join(get_args(Sign))}, got {sign!r}.")
    if sae.site.kind not in RESIDUAL_KINDS:
        raise ValueError(
            f"a steering vector lives in the residual stream ({', '.join(RESIDUAL_KINDS)}), and "
            f"{sae!r} does not; change its features instead, see feature_interventions."
        )
    check_fits(model, sae)
    (chosen,) = _checked(sae, [feature])
    info, norm = model_info(model), math.nan
    if residual is not None:
        if residual.site.layer != sae.site.layer or residual.model.fingerprint != info.fingerprint:
            raise ValueError(f"residual must be of layer {sae.site.layer}, got {residual!r}.")
        norm = residual.mean_norm()
    return SteeringVector(
        site=sae.site,
        category=category,
        vector=sae.written[chosen].cpu().clone() * (1 if sign == "unsafe_to_safe" else -1),
        method=f"sae:{sae.name}/{chosen}",
        span="unknown",
        kept=1.0,
        n_unsafe=0,
        n_safe=0,
        site_norm=norm,
        model=info,
    )


def _checked(sae: SparseAutoencoder, features: Sequence[int]) -> tuple[int, ...]:
    """Raise unless the features exist, each once."""
    chosen = tuple(int(feature) for feature in features)
    wrong = [feature for feature in chosen if not 0 <= feature < sae.n_features]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"give distinct features from 0 to {sae.n_features - 1}, got "
            f"{wrong[0] if wrong else list(chosen)}."
        )
    return chosen


def _projections(
    model: HookedModel,
    encoded: Sequence[Encoded],
    vector: SteeringVector,
    changed: Sequence[Intervention],
    batch_size: int,
) -> Float[Tensor, " prompt"]:
    """Project pooled activations on a vector's direction, with features changed or not."""
    u, projections = vector.direction, torch.zeros(len(encoded))
    pooled: list[Tensor] = []

    for places in batches_by_length([len(row.ids) for row in encoded], batch_size):
        rows = [encoded[i] for i in places]
        batch = pad(rows, pad_id=pad_id(model), side="right", device=input_device(model))
        inside = span_mask(rows, batch, vector.span)
        begun = span_mask(rows, batch, "content").cumsum(dim=1)[..., None] > 0

        def read(activation: Tensor, inside: Tensor = inside) -> None:
            weights = inside.to(activation.device)[..., None]
            total = (activation.flatten(2).float() * weights).sum(dim=1)
            pooled.append((total / weights.sum(dim=1)).cpu())

        # Hooks that read come behind those that edit, where both are at one site.
        with (
            intervene(model, [_only(one, begun) for one in changed]),
            reading(model, [(vector.site.hook_name, read)]) as run,
        ):
            run(batch.tokens, batch.mask)
        projections[torch.tensor(places)] = pooled.pop() @ u
    return projections


def _only(intervention: Intervention, where: Bool[Tensor, "row pos 1"]) -> Intervention:
    """Restrict an edit of features to some positions."""
    edit = replace(intervention.edit, where=where)  # type: ignore[type-var]
    return replace(intervention, edit=edit)
