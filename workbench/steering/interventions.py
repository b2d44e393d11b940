"""Edits: what is done to an activation, as frozen functions of a tensor. They know nothing of models, rows or positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from workbench.files.store import tensor_digest
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import Site, check_sites

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import Float

    from workbench.models.load import HookedModel
    from workbench.steering.gates import Gate
    from workbench.steering.vectors import SteeringVector


@dataclass(frozen=True, eq=False)
class AddVector:
    """Add ``multiplier * vector``."""

    vector: Float[Tensor, " d"]
    multiplier: float = 1.0

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation moved by the vector."""
        return activation + (self.multiplier * self.vector).to(activation)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.vector)


@dataclass(frozen=True, eq=False)
class AblateDirection:
    """Set the projection on a unit direction to ``target`` (0: the activation no longer says anything along it)."""

    direction: Float[Tensor, " d"]
    target: float = 0.0

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation with the projection replaced."""
        u = self.direction.to(activation)
        return activation + (self.target - activation @ u)[..., None] * u

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.direction)


@dataclass(frozen=True, eq=False)
class RaiseTo:
    """Raise the projection on a unit direction to ``target``; an activation that is there already or beyond stays as it is."""

    direction: Float[Tensor, " d"]
    target: float

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation with the missing part of the projection added."""
        u = self.direction.to(activation)
        return activation + (self.target - activation @ u).clamp(min=0)[..., None] * u

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.direction)


@dataclass(frozen=True, eq=False)
class ScaleNeurons:
    """Multiply the activations of some neurons; factor 0 silences them."""

    neurons: tuple[int, ...]
    factor: float

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation with these neurons scaled."""
        factors = torch.ones(activation.shape[-1], device=activation.device, dtype=activation.dtype)
        factors[list(self.neurons)] = self.factor
        return activation * factors

    @property
    def width(self) -> int:
        """Least width of the activations it fits."""
        return max(self.neurons, default=-1) + 1


@dataclass(frozen=True, eq=False)
class ClampNeurons:
    """Set some neurons to given values, for instance to their mean on safe prompts."""

    neurons: tuple[int, ...]
    values: Float[Tensor, " neuron"]

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation with these neurons set."""
        index = torch.tensor(self.neurons, device=activation.device, dtype=torch.long)
        return activation.index_copy(
            -1, index, self.values.to(activation).expand(*activation.shape[:-1], -1)
        )

    @property
    def width(self) -> int:
        """Least width of the activations it fits."""
        return max(self.neurons, default=-1) + 1


Edit = (
    AddVector | AblateDirection | RaiseTo | ScaleNeurons | ClampNeurons | Callable[[Tensor], Tensor]
)


Positions = Literal["all", "prompt", "generated"]


POSITIONS = ("all", "prompt", "generated")


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change of the model's computation.

    Attributes:
        site: Where.
        edit: What: a function of the activation that returns a new one of the same shape.
        positions: "all" tokens, those of the "prompt", or only "generated" ones. Padding is never touched.
        until: Generated tokens after which it ends: an answer's opening decides where it goes, and what follows keeps its quality. None
            never ends.
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

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(
                f"unknown positions {self.positions!r}; allowed: {', '.join(POSITIONS)}."
            )
        if self.until is not None and self.until < 0:
            raise ValueError(
                f"until must be a number of generated tokens from 0, or None, got {self.until}."
            )

    def for_rows(self, rows: Iterable[int]) -> Intervention:
        """The same change for some rows of a batch only."""
        return replace(self, rows=tuple(rows))


def add_vector(
    vector: SteeringVector,
    multiplier: float | None = None,
    *,
    rho: float | None = None,
    positions: Positions = "all",
    until: int | None = None,
) -> Intervention:
    """Steer: add a multiple of a steering vector at its site. A multiplier above 0 goes from unsafe to safe.

    Args:
        vector: A steering vector.
        multiplier: How much of it; 1 is the measured difference.
        rho: Strength relative to the residual stream instead; its sign is the multiplier's.
        positions: Which tokens.
        until: Generated tokens after which it ends; None never ends.

    Raises:
        ValueError: If not exactly one of multiplier and rho is given.
    """
    if (multiplier is None) == (rho is None):
        raise ValueError(
            "give either multiplier or rho: multiplier=1.0 adds the measured difference once."
        )
    if multiplier is None:
        multiplier = vector.multiplier_for(rho)  # type: ignore[arg-type]
    edit = AddVector(vector.vector, float(multiplier))
    return Intervention(
        vector.site,
        edit,
        positions,
        label=f"{multiplier:+.3g} {vector.category}",
        model=vector.model,
        until=until,
        fitted_on=vector.fitted_on,
    )


def suppress(vector: SteeringVector, rho: float, **extent: Any) -> Intervention:
    """Steer a category's risk down: its vector at relative strength ``rho``, from unsafe to safe; see ``add_vector``.

    Raises:
        ValueError: If ``rho`` is not above 0.
    """
    return add_vector(vector, rho=_above_zero(rho), **extent)


def activate(vector: SteeringVector, rho: float, **extent: Any) -> Intervention:
    """Steer a category's risk up, to see what its vector stands for or to test what comes after: the opposite of ``suppress``.

    Raises:
        ValueError: If ``rho`` is not above 0.
    """
    return add_vector(vector, rho=-_above_zero(rho), **extent)


def raise_to(
    vector: SteeringVector, target: float, *, positions: Positions = "all"
) -> Intervention:
    """Steer up to a target: move an activation along a steering vector until its projection there is ``target``, and never beyond.

    An activation that is there already stays as it is, so that repeated or strong steering cannot overshoot.

    Args:
        vector: Its site and direction are used.
        target: Projection on the unit direction, in residual-stream units; for instance the safe class's mean there.
        positions: Which tokens.
    """
    edit = RaiseTo(vector.direction, float(target))
    label = f"to {target:.3g} {vector.category}"
    return Intervention(
        vector.site, edit, positions, label=label, model=vector.model, fitted_on=vector.fitted_on
    )


def gated(steering: Mapping[str, Sequence[Intervention]], gate: Gate) -> list[Intervention]:
    """Interventions that a gate lets through: each category's own ones where the gate opens for that category.

    They act from the user's words on: the template before them stays as it is.

    Args:
        steering: Risk category to its interventions.
        gate: Knows each of these categories.

    Raises:
        ValueError: If the gate does not know a category.
    """
    made = []
    for category, interventions in steering.items():
        gate.index(category)
        made += [replace(one, gate=gate, gate_category=category) for one in interventions]
    return made


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
        sites: Where; the vector's own site by default. All writing sites give the directional ablation of Arditi et al. (2406.11717).
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
            ScaleNeurons(own, factor),
            positions,
            label=f"neurons x {factor:g}",
        )
        for layer, own in _by_layer(neurons).items()
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
        values: One value a neuron, in their order.
        positions: Which tokens.

    Raises:
        ValueError: If there is not one value a neuron.
    """
    neurons = list(neurons)
    if len(neurons) != len(values):
        raise ValueError(
            f"clamping needs one value a neuron, got {len(values)} for {len(neurons)} neurons."
        )
    value_of = {neuron: float(value) for neuron, value in zip(neurons, values, strict=True)}
    return [
        Intervention(
            Site(layer, "mlp_post"),
            ClampNeurons(own, torch.tensor([value_of[layer, n] for n in own])),
            positions,
            label="clamped neurons",
        )
        for layer, own in _by_layer(neurons).items()
    ]


def check_interventions(
    model: HookedModel, interventions: Sequence[Intervention], *, transfer: bool = False
) -> None:
    """Raise where an intervention does not fit the model: before anything runs, in one line.

    Raises:
        ValueError: If a site does not exist or cannot be edited, a width is wrong, or a vector belongs to another model.
    """
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise ValueError(
                f"interventions must be a flat list of Intervention, got a {type(intervention).__name__} in it; "
                "write [add_vector(...), *ablate_direction(...)]."
            )
    check_sites(model, [intervention.site for intervention in interventions])
    check_sites(model, [i.gate.site for i in interventions if i.gate is not None])
    info = model_info(model) if any(i.model is not None for i in interventions) else None
    widths = {"mlp_post": model.cfg.d_mlp, "z": model.cfg.n_heads * model.cfg.d_head}
    for intervention in interventions:
        site, edit, source = intervention.site, intervention.edit, intervention.model
        if site.kind == "resid_mid" and hasattr(model, "original_model"):
            raise ValueError(
                f"{site} can be read but not edited: in a TransformerBridge an edit there reaches the MLP only, not the residual stream; "
                f"add at {Site(site.layer, 'attn_out')} instead (the same operation in pre-norm models)."
            )
        width = widths.get(site.kind, model.cfg.d_model)
        given = getattr(edit, "width", width)
        exact = isinstance(edit, AddVector | AblateDirection | RaiseTo)
        if (exact and given != width) or given > width:
            raise ValueError(
                f"an edit of width {given} does not fit {site}, which has width {width}."
            )
        if intervention.gate is not None:
            _check_gate(intervention, intervention.gate, model)
        if info is None or source is None or source.fingerprint == info.fingerprint:
            continue
        if not transfer:
            raise ValueError(
                f"steering vector was fitted on {source.name!r} ({source.weights}) but the model is {info.name!r} ({info.weights}); "
                "refit it, or pass transfer=True."
            )
        if source.architecture != info.architecture:
            raise ValueError(
                f"no transfer from {source.name!r} to {info.name!r}: layers, width, neurons and heads are {source.architecture} and "
                f"{info.architecture}; only models of one architecture share a residual stream."
            )


def description(intervention: Intervention) -> list[Any]:
    """An intervention as JSON, for keys: tensors by their hash. An edit that its values do not tell from another has no key."""
    edit = intervention.edit
    values = {f.name: getattr(edit, f.name) for f in fields(edit)} if is_dataclass(edit) else {}
    what = {k: tensor_digest(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    allowed = str | int | float | tuple | list | None
    if not what or not all(isinstance(value, allowed) for value in what.values()):
        raise ValueError(
            f"answers under the edit at {intervention.site} ({type(edit).__name__}) cannot be kept in a file: nothing tells it from "
            "another one when they are read back; make it a frozen dataclass of numbers and tensors, or leave out output."
        )
    extent = (
        intervention.positions
        if intervention.until is None
        else [intervention.positions, intervention.until]
    )
    gate = [] if intervention.gate is None else [intervention.gate.key, intervention.gate_category]
    return [str(intervention.site), type(edit).__name__, what, extent, intervention.label, *gate]


def _by_layer(neurons: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    layers: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        if neuron < 0:
            raise ValueError(f"neuron must be a whole number from 0, got {neuron}.")
        layers.setdefault(int(layer), []).append(int(neuron))
    return {layer: tuple(dict.fromkeys(own)) for layer, own in sorted(layers.items())}


def _check_gate(intervention: Intervention, gate: Gate, model: HookedModel) -> None:
    before = gate.site.layer < intervention.site.layer
    if not before and not (
        gate.site.layer == intervention.site.layer and gate.site.kind == "resid_pre"
    ):
        raise ValueError(
            f"the gate reads at {gate.site}, which is not below {intervention.site} that it lets be steered; fit it at a lower layer."
        )
    if gate.model.fingerprint != model_info(model).fingerprint:
        raise ValueError(
            f"the gate was fitted on {gate.model.name!r}, not on {model_info(model).name!r}; fit it again."
        )
    gate.index(intervention.gate_category)


def _above_zero(rho: float) -> float:
    if not rho > 0:
        raise ValueError(
            f"rho must be above 0, got {rho}; suppress and activate differ in the sign."
        )
    return rho
