"""Describe changes of a model's computation, as interventions.

An ``Intervention`` says where and when an edit (``edits``) is made, how its strength falls, and
which steering gate must let it through. ``apply.intervene`` carries interventions out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from workbench.files.store import tensor_digest
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import Site, check_sites
from workbench.steering.edits import (
    AblateDirection,
    AddVector,
    ClampNeurons,
    Edit,
    RaiseTo,
    ScaleNeurons,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.steering.gates import Gate
    from workbench.steering.vectors import SteeringVector


Positions = Literal["all", "prompt", "generated"]
"""Which tokens an intervention means. Padding is never touched."""


Decay = Literal["none", "linear", "sqrt", "altsteer"]
"""How the strength of steering falls while an answer is written, see ``decayed``."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Describe one change of the model's computation.

    Attributes:
        site: Where.
        edit: What: a function of the activation that returns a new one of the same shape.
        positions: "all" tokens, those of the "prompt", or only "generated" ones. Padding is never
            touched.
        until: Generated tokens after which it ends: an answer's opening decides where it goes, and
            what follows keeps its quality. None never ends.
        decay: How its strength falls until then, see ``decayed``. What is no addition goes that
            share of its way.
        rows: Rows of the batch it applies to; None means every row.
        label: Name in results.
        model: What its vector was measured on; None where nothing was measured.
        gate: What lets it through, row by row; None lets it always through. Set by ``gated``.
        gate_category: Whose score of the gate counts.
        fitted_on: ``prompts.text_key`` of the prompts its vector was fitted on.
    """

    site: Site
    edit: Edit
    positions: Positions = "all"
    rows: tuple[int, ...] | None = None
    label: str = ""
    model: ModelInfo | None = None
    until: int | None = None
    gate: Gate | None = None
    gate_category: str = ""
    fitted_on: frozenset[str] = frozenset()
    decay: Decay = "none"

    def __post_init__(self) -> None:
        allowed = get_args(Positions)
        if self.positions not in allowed:
            raise ValueError(
                f"unknown positions {self.positions!r}; allowed: {', '.join(allowed)}."
            )
        if self.until is not None and self.until < 0:
            raise ValueError(
                f"until must be a number of generated tokens from 0, or None, got {self.until}."
            )
        _check_decay(self.decay, self.until)

    def for_rows(self, rows: Iterable[int]) -> Intervention:
        """Restrict the change to some rows of a batch."""
        return replace(self, rows=tuple(rows))

    def reaches(self, n_generated: int) -> bool:
        """Tell whether it changes anything where so many generated tokens are read.

        The last token of an answer is written and not read. A gate that stays closed is no
        failure, and not looked at here.
        """
        return self.positions != "generated" or (n_generated > 0 and self.until != 0)


def decayed(
    decay: Decay, until: int | None, steps: Float[Tensor, " step"]
) -> Float[Tensor, " step"]:
    """Compute which share of its strength steering has at generated tokens.

    "none" keeps it at 1, "linear" is ``1 - i/until``, "sqrt" is ``1/sqrt(1 + i)``, and "altsteer"
    is ``1 - sqrt(i/until)``. From ``until`` on the share is 0.

    Args:
        decay: The form.
        until: Generated tokens after which steering ends; None never ends ("none" and "sqrt").
        steps: Generated tokens before each token, i, from 0; tokens of a prompt count as 0.

    Raises:
        ValueError: If the decay is unknown, or needs ``until`` and has none.

    Source: "altsteer" is the fall of the refusal vector in AltSteer (Kwon et al. 2026,
    arXiv:2608.30197), where ``until`` is the longest answer, 512 tokens. The other two are ours.
    """
    _check_decay(decay, until)
    share = torch.ones_like(steps)
    if decay == "sqrt":
        share = (1 + steps).rsqrt()
    elif until is not None and decay == "linear":
        share = 1 - steps / until
    elif until is not None and decay == "altsteer":
        share = 1 - (steps / until).sqrt()
    return share if until is None else share.masked_fill(steps >= until, 0.0)


def _check_decay(decay: Decay, until: int | None) -> None:
    """Raise where a decay is unknown, or lacks the number of tokens over which it falls."""
    if decay not in get_args(Decay):
        raise ValueError(f"unknown decay {decay!r}; allowed: {', '.join(get_args(Decay))}.")
    if decay in ("linear", "altsteer") and not until:
        raise ValueError(
            f"decay {decay!r} needs until=, the number of generated tokens from 1 over which "
            f"strength falls to 0, got {until}."
        )


def add_vector(
    vector: SteeringVector,
    multiplier: float | None = None,
    *,
    rho: float | None = None,
    positions: Positions = "all",
    until: int | None = None,
    decay: Decay = "none",
    keep_norm: bool = False,
) -> Intervention:
    """Steer: add a multiple of a steering vector at its site.

    A vector points from unsafe to safe, so a multiplier above 0 pushes towards safe.

    Args:
        vector: A steering vector.
        multiplier: How much of it; 1 is the measured difference.
        rho: Strength relative to the residual stream instead; its sign is the multiplier's. A run
            tries 0.09 and 0.17; ``calibrate`` finds what a model's text bears.
        positions: Which tokens: "all", those of the "prompt", or the "generated" ones.
        until: Generated tokens after which it ends; None never ends.
        decay: How its strength falls while an answer is written, see ``decayed``; prompts get all
            of it.
        keep_norm: Scale each token's activation back to the L2 norm it had, so that its direction
            changes alone.

    Raises:
        ValueError: If not exactly one of multiplier and rho is given, it is no finite number, or
            the decay is unknown or needs ``until``.
    """
    if (multiplier is None) == (rho is None):
        raise ValueError(
            "give either multiplier or rho: multiplier=1.0 adds the measured difference once."
        )
    for name, value in (("multiplier", multiplier), ("rho", rho)):
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}.")
    if not hasattr(vector, "multiplier_for"):
        raise TypeError(
            f"vector must be a SteeringVector, got {type(vector).__name__}; fit_steering_vectors "
            "gives one a category, load_vector reads one from a file."
        )
    if multiplier is None:
        multiplier = vector.multiplier_for(float(rho))  # type: ignore[arg-type]
    edit = AddVector(vector.vector, float(multiplier), keep_norm)
    return Intervention(
        vector.site,
        edit,
        positions,
        label=f"{multiplier:+.3g} {vector.category}",
        model=vector.model,
        until=until,
        decay=decay,
        fitted_on=vector.fitted_on,
    )


def suppress(vector: SteeringVector, rho: float, **extent: Any) -> Intervention:
    """Steer a category's risk down: add its vector at relative strength ``rho``.

    Args:
        vector: A steering vector; it points from unsafe to safe.
        rho: Strength relative to the residual stream, above 0.
        extent: ``positions``, ``until``, ``decay`` and ``keep_norm`` of ``add_vector``.

    Raises:
        ValueError: If ``rho`` is not above 0.
    """
    return add_vector(vector, rho=_above_zero(rho), **extent)


def activate(vector: SteeringVector, rho: float, **extent: Any) -> Intervention:
    """Steer a category's risk up: the opposite of ``suppress``, with the same arguments.

    It shows what a vector stands for, and tests what comes after it.

    Raises:
        ValueError: If ``rho`` is not above 0.
    """
    return add_vector(vector, rho=-_above_zero(rho), **extent)


def raise_to(
    vector: SteeringVector,
    target: float,
    *,
    positions: Positions = "all",
    until: int | None = None,
) -> Intervention:
    """Steer up to a target: move along a steering vector until the projection is ``target``.

    An activation that is there already stays as it is, so that repeated or strong steering cannot
    overshoot.

    Args:
        vector: Its site and direction are used.
        target: Projection on the unit direction, in residual-stream units; for instance the safe
            class's mean there, ``vector.safe_projection``.
        positions: Which tokens.
        until: Generated tokens after which it ends; None never ends.

    Raises:
        ValueError: If the target is no finite number.
    """
    if not (isinstance(target, Real) and math.isfinite(target)):
        raise ValueError(f"target must be a finite number, got {target!r}.")
    return Intervention(
        vector.site,
        RaiseTo(vector.direction, float(target)),
        positions,
        label=f"to {target:.3g} {vector.category}",
        model=vector.model,
        until=until,
        fitted_on=vector.fitted_on,
    )


def gated(steering: Mapping[str, Sequence[Intervention]], gate: Gate) -> list[Intervention]:
    """Put interventions behind a gate: each category's act where it opens for that category.

    They act from the user's words on: the template before them stays as it is.

    Args:
        steering: Risk category to its interventions.
        gate: A steering gate that was fitted on each of these categories.

    Raises:
        ValueError: If the gate does not know a category.
    """
    behind_gate = []
    for category, interventions in steering.items():
        gate.index(category)
        behind_gate += [replace(one, gate=gate, gate_category=category) for one in interventions]
    return behind_gate


def ablate_direction(
    vector: SteeringVector,
    *,
    sites: Sequence[Site] | None = None,
    target: float = 0.0,
    positions: Positions = "all",
) -> list[Intervention]:
    """Remove a steering vector's direction, at its own site or at several.

    Args:
        vector: Its direction is used.
        sites: Where; the vector's own site by default. All writing sites give the directional
            ablation of Arditi et al. (2024, arXiv:2406.11717).
        target: Projection left behind, in residual-stream units.
        positions: Which tokens.
    """
    edit = AblateDirection(vector.direction, target)
    label = f"ablate {vector.category}"
    common: dict[str, Any] = {"label": label, "model": vector.model, "fitted_on": vector.fitted_on}
    return [Intervention(site, edit, positions, **common) for site in sites or [vector.site]]


def scale_neurons(
    neurons: Iterable[tuple[int, int]], factor: float, *, positions: Positions = "all"
) -> list[Intervention]:
    """Multiply neurons' activations; factor 0 silences them.

    Args:
        neurons: Pairs (layer, neuron).
        factor: What to multiply by.
        positions: Which tokens.
    """
    return [
        Intervention(
            Site(layer, "mlp_post"),
            ScaleNeurons(layer_neurons, factor),
            positions,
            label=f"neurons x {factor:g}",
        )
        for layer, layer_neurons in _by_layer(neurons).items()
    ]


def clamp_neurons(
    neurons: Sequence[tuple[int, int]],
    values: Sequence[float] | Float[Tensor, " neuron"],
    *,
    positions: Positions = "all",
) -> list[Intervention]:
    """Set neurons to given activations, for instance their mean on safe prompts.

    Args:
        neurons: Pairs (layer, neuron).
        values: One value per neuron, in their order.
        positions: Which tokens.

    Raises:
        ValueError: If there is not one value per neuron.
    """
    neurons = list(neurons)
    if len(neurons) != len(values):
        raise ValueError(
            f"clamping needs one value per neuron, got {len(values)} for {len(neurons)} neurons."
        )
    value_of = {neuron: float(value) for neuron, value in zip(neurons, values, strict=True)}
    return [
        Intervention(
            Site(layer, "mlp_post"),
            ClampNeurons(layer_neurons, torch.tensor([value_of[layer, n] for n in layer_neurons])),
            positions,
            label="clamped neurons",
        )
        for layer, layer_neurons in _by_layer(neurons).items()
    ]


def check_interventions(
    model: HookedModel, interventions: Sequence[Intervention], *, transfer: bool = False
) -> None:
    """Raise where an intervention does not fit the model, before anything runs.

    Raises:
        ValueError: If a site does not exist or cannot be edited, a width is wrong, or a vector
            belongs to another model.
    """
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise ValueError(
                "interventions must be a flat list of Intervention, got a "
                f"{type(intervention).__name__} in it; "
                "write [add_vector(...), *ablate_direction(...)]."
            )
    check_sites(model, [intervention.site for intervention in interventions])
    check_sites(model, [i.gate.site for i in interventions if i.gate is not None])
    is_measured = any(i.model is not None or i.gate is not None for i in interventions)
    info = model_info(model) if is_measured else None
    for intervention in interventions:
        _check_edit(intervention, model)
        if info is not None and intervention.gate is not None:
            _check_gate(intervention, intervention.gate, info)
        if info is not None and intervention.model is not None:
            _check_source(intervention.model, info, transfer=transfer)


def description(intervention: Intervention) -> list[Any]:
    """Describe an intervention as JSON, for keys: tensors by their hash.

    Raises:
        ValueError: If the edit's values do not tell it from another one.
    """
    edit = intervention.edit
    values = {f.name: getattr(edit, f.name) for f in fields(edit)} if is_dataclass(edit) else {}
    if isinstance(edit, AddVector) and not edit.keep_norm:
        del values["keep_norm"]  # so that keys are what they were before there was this option
    what = {k: tensor_digest(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    if not what or not all(map(_is_json, what.values())):
        raise ValueError(
            f"answers under the edit at {intervention.site} ({type(edit).__name__}) cannot be kept "
            "in a file: nothing tells it from another one when they are read back; make it a "
            "frozen dataclass of numbers and tensors, or leave out output."
        )
    extent: Any = intervention.positions
    if intervention.decay != "none":
        extent = [intervention.positions, intervention.until, intervention.decay]
    elif intervention.until is not None:
        extent = [intervention.positions, intervention.until]
    gate = [] if intervention.gate is None else [intervention.gate.key, intervention.gate_category]
    return [str(intervention.site), type(edit).__name__, what, extent, intervention.label, *gate]


def _is_json(value: object) -> bool:
    """Tell whether JSON can hold a value, down to what is in a list."""
    if isinstance(value, tuple | list):
        return all(map(_is_json, value))
    return isinstance(value, str | int | float | None)


def _check_edit(intervention: Intervention, model: HookedModel) -> None:
    """Raise where an edit cannot be made at its site, or has another width."""
    site, edit = intervention.site, intervention.edit
    if site.kind == "resid_mid" and hasattr(model, "original_model"):
        raise ValueError(
            f"{site} can be read but not edited: in a TransformerBridge an edit there reaches the "
            f"MLP only, not the residual stream; add at {Site(site.layer, 'attn_out')} instead "
            "(the same operation in pre-norm models)."
        )
    widths = {"mlp_post": model.cfg.d_mlp, "z": model.cfg.n_heads * model.cfg.d_head}
    site_width = widths.get(site.kind, model.cfg.d_model)
    edit_width = getattr(edit, "width", site_width)
    is_exact = isinstance(edit, AddVector | AblateDirection | RaiseTo)
    if (is_exact and edit_width != site_width) or edit_width > site_width:
        raise ValueError(
            f"an edit of width {edit_width} does not fit {site}, which has width {site_width}."
        )


def _check_gate(intervention: Intervention, gate: Gate, info: ModelInfo) -> None:
    """Raise where a gate reads too late, was fitted on another model or on other categories."""
    layer = intervention.site.layer
    is_below = gate.site.layer < layer
    if not is_below and not (gate.site.layer == layer and gate.site.kind == "resid_pre"):
        raise ValueError(
            f"the gate reads at {gate.site}, which is not below {intervention.site} that it lets "
            "be steered; fit it at a lower layer."
        )
    if gate.model.fingerprint != info.fingerprint:
        raise ValueError(
            f"the gate was fitted on {gate.model.name!r}, not on {info.name!r}; fit it again."
        )
    gate.index(intervention.gate_category)


def _check_source(source: ModelInfo, info: ModelInfo, *, transfer: bool) -> None:
    """Raise where a vector of one model may not steer another."""
    if source.fingerprint == info.fingerprint:
        return
    if not transfer:
        there, here = (f"{i.name!r} ({i.weights}, {i.dtype})" for i in (source, info))
        others = "other weights or another chat template; " if there == here else ""
        raise ValueError(
            f"steering vector was fitted on {there} but the model is {here}; {others}refit it, or "
            "pass transfer=True."
        )
    if source.architecture != info.architecture:
        raise ValueError(
            f"no transfer from {source.name!r} to {info.name!r}: layers, width, neurons and heads "
            f"are {source.architecture} and {info.architecture}; only models of one architecture "
            "share a residual stream."
        )


def _by_layer(neurons: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Group neurons by layer, each once."""
    layers: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        if neuron < 0:
            raise ValueError(f"neuron must be a whole number from 0, got {neuron}.")
        layers.setdefault(int(layer), []).append(int(neuron))
    return {layer: tuple(dict.fromkeys(in_layer)) for layer, in_layer in sorted(layers.items())}


def _above_zero(rho: float) -> float:
    if not rho > 0:
        raise ValueError(
            f"rho must be above 0, got {rho}; suppress and activate differ in the sign."
        )
    return rho
