"""Interventions: what is changed at a site while the model runs. Row by row, right under padding and KV cache, checked, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.edits import AblateDirection, AddVector, ClampNeurons, Edit, ScaleNeurons
from workbench.models import ModelInfo, model_info
from workbench.positions import Steering
from workbench.sites import Site, check_sites
from workbench.vectors import SteeringVector

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from workbench.models import HookedModel

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
    """

    site: Site
    edit: Edit
    positions: Positions = "all"
    rows: tuple[int, ...] | None = None
    label: str = ""
    model: ModelInfo | None = None
    until: int | None = None

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"unknown positions {self.positions!r}; allowed: {', '.join(POSITIONS)}.")
        if self.until is not None and self.until < 0:
            raise ValueError(f"until must be a number of generated tokens from 0, or None, got {self.until}.")

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
        raise ValueError("give either multiplier or rho: multiplier=1.0 adds the measured difference once.")
    if multiplier is None:
        multiplier = vector.multiplier_for(rho)  # type: ignore[arg-type]
    edit = AddVector(vector.vector, float(multiplier))
    label = f"{multiplier:+.3g} {vector.category}"
    return Intervention(vector.site, edit, positions, label=label, model=vector.model, until=until)


def ablate_direction(
    vector: SteeringVector, *, sites: Sequence[Site] | None = None, target: float = 0.0, positions: Positions = "all"
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
    return [Intervention(site, edit, positions, label=label, model=vector.model) for site in sites or [vector.site]]


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
        Intervention(Site(layer, "mlp_post"), ScaleNeurons(own, factor), positions, label=f"neurons x {factor:g}")
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
        raise ValueError(f"clamping needs one value a neuron, got {len(values)} for {len(neurons)} neurons.")
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


@contextmanager
def intervene(
    model: HookedModel,
    interventions: Iterable[Intervention],
    *,
    prompt_length: int | None = None,
    transfer: bool = False,
) -> Iterator[Steering]:
    """Change the model's computation inside the block, and nowhere else.

    Works under any way of running the model: the call itself, its own generate, a KV cache, left or right padding (told by the
    attention mask). Several interventions at one site are applied in their order.

    Args:
        model: A hooked model.
        interventions: What to change; several rows of a batch may have their own (``Intervention.for_rows``).
        prompt_length: Columns of the batch that belong to the prompt. By default the first pass is the prompt (and those of several
            columns that continue it) and what comes after it, token by token, is generated.
        transfer: Allow vectors that were measured on another model of the same architecture.

    Yields:
        A ``Steering`` that counts.

    Raises:
        ValueError: If a site does not exist, a width is wrong, or a vector belongs to another model.
        RuntimeError: At the end, if a site was never reached, or none of the positions (without ``prompt_length``): then nothing was
            steered.
    """
    interventions = list(interventions)
    check_interventions(model, interventions, transfer=transfer)
    by_site: dict[Site, list[Intervention]] = {}
    for intervention in interventions:
        by_site.setdefault(intervention.site, []).append(intervention)
    steering = Steering(fired=dict.fromkeys(by_site, 0), prompt_length=prompt_length)
    fixed = prompt_length is not None

    def before_forward(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tokens = next(x for x in (keywords.get("input_ids"), keywords.get("inputs_embeds"), *args) if x is not None)
        cache = keywords.get("past_key_values", keywords.get("past_kv_cache"))
        past = (
            0
            if cache is None
            else int(cache.get_seq_length())
            if hasattr(cache, "get_seq_length")
            else int(cache[0].past_keys.shape[1])
        )
        steering.see(tokens, past, keywords.get("attention_mask"), fixed=fixed)

    def hook_of(site: Site, apply: Callable[[Tensor, Steering], Tensor]) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - TransformerLens passes it by name
            steering.fired[site] += 1
            return apply(activation.flatten(2), steering).view_as(activation)

        return hook

    hooks = [(site.hook_name, hook_of(site, _compile(own))) for site, own in by_site.items()]
    with ExitStack() as stack:
        if hooks:
            runner: Any = getattr(model, "original_model", model)
            handle = runner.register_forward_pre_hook(before_forward, with_kwargs=True)
            stack.callback(handle.remove)
            stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield steering
    silent = [site for site, count in steering.fired.items() if count == 0]
    if silent:
        raise RuntimeError(
            f"intervention at {silent[0].hook_name} never fired: the model was not run inside intervene()."
        )
    for intervention in interventions:
        if not fixed and (intervention.site, intervention.positions) not in steering.reached:
            raise RuntimeError(
                f"intervention at {intervention.site.hook_name} changed nothing: inside intervene() there were no positions "
                f"{intervention.positions!r}; generate more tokens, or say where the prompt ends with prompt_length."
            )


def check_interventions(model: HookedModel, interventions: Sequence[Intervention], *, transfer: bool = False) -> None:
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
        exact = isinstance(edit, AddVector | AblateDirection)
        if (exact and given != width) or given > width:
            raise ValueError(f"an edit of width {given} does not fit {site}, which has width {width}.")
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


def _compile(interventions: Sequence[Intervention]) -> Callable[[Tensor, Steering], Tensor]:
    """One function for all interventions at a site. Vectors added at the same positions become one addition of a row-wise matrix."""
    groups: list[list[Intervention]] = []
    for intervention in interventions:
        last = groups[-1][-1] if groups else None
        if (
            last
            and isinstance(last.edit, AddVector)
            and isinstance(intervention.edit, AddVector)
            and (last.positions, last.until) == (intervention.positions, intervention.until)
        ):
            groups[-1].append(intervention)
        else:
            groups.append([intervention])
    appliers = [
        (
            group[0].positions,
            group[0].until,
            _adder(group) if isinstance(group[0].edit, AddVector) else _editor(group[0]),
        )
        for group in groups
    ]

    site = interventions[0].site

    def apply(activation: Tensor, steering: Steering) -> Tensor:
        for positions, until, edit in appliers:
            chosen = steering.selected(positions, activation, until)
            if chosen is False:
                continue
            steering.reached.add((site, positions))
            edited = edit(activation)
            activation = edited if chosen is True else torch.where(chosen[..., None], edited, activation)
        return activation

    return apply


def _adder(group: Sequence[Intervention]) -> Callable[[Tensor], Tensor]:
    """Sum of the group's vectors, row by row; made once for a batch size, device and dtype."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def add(activation: Tensor) -> Tensor:
        n_rows = activation.shape[0]
        everyone = all(intervention.rows is None for intervention in group)
        key = (1 if everyone else n_rows, activation.device, activation.dtype)
        if key not in made:
            total = torch.zeros(key[0], activation.shape[-1], dtype=torch.float32)
            for intervention in group:
                edit = intervention.edit
                rows = slice(None) if intervention.rows is None else _checked_rows(intervention.rows, n_rows)
                total[rows] += edit.multiplier * edit.vector.float().cpu()  # type: ignore[union-attr]
            made[key] = total[:, None].to(activation)
        return activation + made[key]

    return add


def _editor(intervention: Intervention) -> Callable[[Tensor], Tensor]:
    def edit(activation: Tensor) -> Tensor:
        edited = intervention.edit(activation)
        if edited.shape != activation.shape:
            raise RuntimeError(
                f"the edit at {intervention.site} returned shape {tuple(edited.shape)} for {tuple(activation.shape)}."
            )
        edited = edited.to(activation.dtype)
        if intervention.rows is None:
            return edited
        member = torch.zeros(activation.shape[0], dtype=torch.bool, device=activation.device)
        member[_checked_rows(intervention.rows, activation.shape[0])] = True
        return torch.where(member[:, None, None], edited, activation)

    return edit


def _checked_rows(rows: tuple[int, ...], n_rows: int) -> list[int]:
    outside = [row for row in rows if not 0 <= row < n_rows]
    if outside:
        raise ValueError(f"an intervention names row {outside[0]} of a batch of {n_rows} rows (0-{n_rows - 1}).")
    return list(rows)


def _by_layer(neurons: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    layers: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        if neuron < 0:
            raise ValueError(f"neuron must be a whole number from 0, got {neuron}.")
        layers.setdefault(int(layer), []).append(int(neuron))
    return {layer: tuple(dict.fromkeys(own)) for layer, own in sorted(layers.items())}
