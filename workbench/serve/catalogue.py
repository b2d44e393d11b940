"""Look up what a request asks for by name: the vectors, the strengths and the gate of a run.

All of it is read from the run folder at once, and names are looked up in what was read: no name of
a request ever becomes a path.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, local_path
from workbench.models.load import ModelInfo
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import chosen_settings, gate_from, steering_of
from workbench.steering.edits import AddVector
from workbench.steering.interventions import Intervention, check_interventions, gated
from workbench.steering.spectral import Fitted, load_fitted, steer_by

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workbench.models.hooked_model import HookedModel
    from workbench.steering.gates import Gate


REMEMBERED = 256
"""Choices whose interventions are kept, so that requests with the same one are steered together."""

LARGEST = 100.0
"""Largest strength that a request may ask for, either way."""

SHOWN = 12
"""Names that an error lists."""


@dataclass(frozen=True)
class Choice:
    """Hold how one request wants to be steered; the default is what the run chose.

    Attributes:
        vector: A construction that the run chose settings for, or one of its vector files by name
            (``answer_contrast.L15.resid_post.fraud``); None is the construction its gate is for.
        category: Whose vectors; None leaves that to the gate.
        rho: Relative strength at each site, in place of the chosen one; 0 steers nothing.
        scale: What the chosen strength is multiplied by (the measured difference, for a file); 0
            steers nothing.
        gate: Whether the run's gate has to open first; None is yes where no category and no file
            is named.
        off: Steer nothing at all.
    """

    vector: str | None = None
    category: str | None = None
    rho: float | None = None
    scale: float | None = None
    gate: bool | None = None
    off: bool = False

    def __post_init__(self) -> None:
        if self.rho is not None and self.scale is not None:
            raise ValueError("give either rho or scale, not both.")
        for name, value in (("rho", self.rho), ("scale", self.scale)):
            if value is not None and not (math.isfinite(value) and abs(value) <= LARGEST):
                raise ValueError(
                    f"{name} must be a number from -{LARGEST:g} to {LARGEST:g}, got {value!r}."
                )


class Catalogue:
    """The steering of one run, as it was when it was read.

    Attributes:
        main: Construction that is taken where none is named.
        categories: Risk categories of the run.
        gate: The run's gate; None where it has none.
    """

    def __init__(
        self,
        chosen: Mapping[str, Mapping[str, tuple[Intervention, ...]]],
        rhos: Mapping[str, float | None],
        files: Mapping[str, Fitted],
        gate: Gate | None,
        main: str,
        steered: ModelInfo | None,
    ) -> None:
        self._chosen, self._rhos, self._files = chosen, rhos, files
        self._steered = steered
        self.gate, self.main = gate, main
        self.categories = sorted({name for of_one in chosen.values() for name in of_one})
        self._made: OrderedDict[Choice, tuple[Intervention, ...]] = OrderedDict()

    @classmethod
    def read(cls, folder: PathLike, *, calibrated: bool = False) -> Catalogue:
        """Read the vectors, the chosen settings and the gate of a run.

        Args:
            folder: Folder of a run.
            calibrated: Take the settings of a later ``workbench calibrate``.

        Raises:
            ValueError: If the folder holds no run, one that chose nothing yet, or a damaged vector.
        """
        settings = chosen_settings(folder, calibrated=calibrated)
        notes = read_run(folder).notes
        chosen: dict[str, dict[str, tuple[Intervention, ...]]] = {}
        for name, setting in settings.items():
            strengths = setting["target" if setting.get("form") == "target" else "multiplier"]
            for category in strengths:
                made = steering_of(folder, name, setting, category, notes)
                own = tuple(replace(one, edit=_in_memory(one.edit)) for one in made)
                chosen.setdefault(name, {})[category] = own
        suffix = ".safetensors"
        paths = sorted((local_path(folder) / "vectors").glob(f"*{suffix}"))
        files = {path.name.removesuffix(suffix): _in_memory(load_fitted(path)) for path in paths}
        try:
            gate = _in_memory(gate_from(folder))
        except (ValueError, FileNotFoundError):
            gate = None
        main = notes.get("main") or (notes.get("gate") or {}).get("construction")
        return cls(
            chosen,
            {name: setting.get("rho") for name, setting in settings.items()},
            files,
            gate,
            main if main in chosen else list(chosen)[-1],
            ModelInfo(**notes["model"]) if "vectors_from" in notes else None,
        )

    def check(self, model: HookedModel) -> None:
        """Raise where something of the run does not fit a model; the model must have no hooks.

        Raises:
            ValueError: If a vector or the gate belongs to another model.
        """
        made = [x for of_one in self._chosen.values() for one in of_one.values() for x in one]
        made += [self._of_file(fitted, Choice())[0] for fitted in self._files.values()]
        check_interventions(model, made)
        if self.gate is not None:
            check_interventions(model, self.interventions(Choice()))

    @property
    def names(self) -> list[str]:
        """Every name that a request may give as its vector."""
        return [*self._chosen, *self._files]

    def interventions(self, choice: Choice) -> tuple[Intervention, ...]:
        """Make the interventions of a choice; equal choices get one and the same tuple.

        Raises:
            ValueError: If a name is unknown, or the run has no gate and none is possible.
        """
        if choice not in self._made:
            self._made[choice] = self._make(choice)
            while len(self._made) > REMEMBERED:
                self._made.popitem(last=False)
        self._made.move_to_end(choice)
        return self._made[choice]

    def _make(self, choice: Choice) -> tuple[Intervention, ...]:
        name = choice.vector or self.main
        _check_name("vector", name, self.names)
        if choice.category is not None:
            _check_name("category", choice.category, self.categories)
        if choice.off or choice.rho == 0 or choice.scale == 0:
            return ()
        is_file = name not in self._chosen
        by_default = choice.category is None and not is_file
        wants_gate = by_default if choice.gate is None else choice.gate
        if wants_gate and self.gate is None:
            raise ValueError("this run has no gate; name a category, whose vectors are always on.")
        if is_file:
            fitted = self._files[name]
            if choice.category not in (None, fitted.category):
                raise ValueError(
                    f"vector {name!r} is of category {fitted.category!r}, got category "
                    f"{choice.category!r}; leave it out."
                )
            steering = {fitted.category: self._of_file(fitted, choice)}
        else:
            steering = self._of_construction(name, choice, wants_gate=wants_gate)
        if wants_gate and self.gate is not None:
            return tuple(gated(steering, self.gate))
        return next(iter(steering.values()))

    def _of_file(self, fitted: Fitted, choice: Choice) -> tuple[Intervention, ...]:
        scale = 1.0 if choice.rho is None and choice.scale is None else choice.scale
        one = steer_by(fitted, scale, rho=choice.rho)
        return (one if self._steered is None else replace(one, model=self._steered),)

    def _of_construction(
        self, name: str, choice: Choice, *, wants_gate: bool
    ) -> dict[str, tuple[Intervention, ...]]:
        """Make the interventions of one category, or of all that the gate knows."""
        of_one = self._chosen[name]
        if choice.category is not None:
            _check_name("category", choice.category, of_one)
            wanted = [choice.category]
        elif wants_gate and self.gate is not None:
            wanted = [c for c in self.gate.categories if c in of_one]
        else:
            raise ValueError(
                "without the gate a category has to be named; categories: "
                f"{_listed(self.categories)}."
            )
        factor = 1.0 if choice.scale is None else choice.scale
        if choice.rho is not None:
            rho = self._rhos[name]
            if not rho:
                raise ValueError(f"no rho is known of {name!r}; give scale instead.")
            factor = choice.rho / rho
        return {c: tuple(_scaled(one, factor, name) for one in of_one[c]) for c in wanted}


def _in_memory(held: Any) -> Any:
    """Copy the tensors of a vector, an edit or a gate.

    As they are loaded they lie in the file itself, and would change with it under the server.
    """
    if not is_dataclass(held) or isinstance(held, type):
        return held
    values = {one.name: getattr(held, one.name) for one in fields(held)}
    copies = {k: v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(held, **copies)


def _scaled(intervention: Intervention, factor: float, name: str) -> Intervention:
    """Multiply the strength of an addition; what is no addition has one strength only."""
    edit = intervention.edit
    if factor == 1.0:
        return intervention
    if not isinstance(edit, AddVector):
        raise ValueError(
            f"the strength of {name!r} is fixed, for it adds no vector; leave out rho and scale."
        )
    return replace(intervention, edit=replace(edit, multiplier=factor * edit.multiplier))


def _check_name(kind: str, given: str, allowed: Iterable[str]) -> None:
    """Raise where a name is none of the run's."""
    names = list(allowed)
    if given not in names:
        hint = did_you_mean(given[:200], names)
        raise ValueError(f"no {kind} {given!r:.100} in this run; it has {_listed(names)}.{hint}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
