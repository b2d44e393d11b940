"""Put the costs of a job's parts side by side: on one machine, on several, and from when on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.engines.architecture import Architecture, read_architecture
from workbench.engines.cost import (
    HARDWARE,
    Cost,
    Fit,
    Machine,
    Work,
    answering,
    caching,
    fit,
    judging,
    load_seconds,
    machines_for,
    pays_from,
)
from workbench.files.hints import did_you_mean
from workbench.models.sites import Site

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Plan:
    """Hold what a job costs and how many machines it takes.

    Attributes:
        model: The model that is read and answers.
        judge: The model that judges.
        machine: One machine.
        work: What is to be done.
        fit: How the model fits into the machine.
        costs: Caching, answers and judging.
        hours: Time in which all should be done.
        machines: How many machines do it in that time, each or each group with a copy.
        pays_from: Number of prompts from which a second machine saves four tenths of the time.
    """

    model: Architecture
    judge: Architecture
    machine: Machine
    work: Work
    fit: Fit
    costs: tuple[Cost, ...]
    hours: float
    machines: int
    pays_from: int

    @property
    def seconds(self) -> float:
        """Add up the time of all parts on one machine, and that of loading both models."""
        loading = sum(
            load_seconds(one, self.machine, self.work) for one in (self.model, self.judge)
        )
        return sum(cost.seconds for cost in self.costs) + loading

    @property
    def reason(self) -> str:
        """Say why one machine is not enough; empty where it is."""
        if self.fit.machines > 1:
            return f"does not fit into one: a copy takes {self.fit.machines}"
        if self.machines > 1:
            return f"takes {self.seconds / 3600:.3g} hours, not {self.hours:g}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Give the numbers as JSON values."""
        return {
            "model": self.model.name,
            "parameters": self.model.parameters,
            "active_parameters": self.model.active_parameters,
            "machine": dataclasses.asdict(self.machine),
            "fit": dataclasses.asdict(self.fit),
            "costs": [dataclasses.asdict(cost) for cost in self.costs],
            "seconds": self.seconds,
            "hours": self.hours,
            "machines": self.machines,
            "pays_from": self.pays_from,
            "reason": self.reason,
        }


def make_plan(
    model: str,
    hardware: str,
    *,
    measured: Mapping[str, float | int | None] | None = None,
    judge: str = "qwen2.5-1.5b",
    n_sites: int = 4,
    hours: float = 24,
    **work: Any,
) -> Plan:
    """Estimate caching, answers and judging of a model on a machine.

    Args:
        model: As ``read_architecture`` takes it.
        hardware: One of ``HARDWARE``.
        measured: Fields of ``Machine`` that take the place of the named one's; None leaves them.
        judge: As ``read_architecture`` takes it.
        n_sites: Layers whose residual stream is cached, the last ones.
        hours: Time in which all should be done.
        work: Fields of ``Work``, but for the sites.

    Raises:
        ValueError: If a name is not known or a number makes no sense.
    """
    if hardware not in HARDWARE:
        raise ValueError(
            f"unknown hardware {hardware!r}; known: {', '.join(HARDWARE)}; other machines are "
            f"given by product, bandwidth, memory and devices.{did_you_mean(hardware, HARDWARE)}"
        )
    given = {name: value for name, value in (measured or {}).items() if value is not None}
    for name, value in (given | {"hours": hours}).items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}.")
    machine = dataclasses.replace(HARDWARE[hardware], **given)  # type: ignore[arg-type]
    read, judged_by = read_architecture(model), read_architecture(judge)
    if not 0 < n_sites <= read.n_layers:
        raise ValueError(f"sites must be 1 to {read.n_layers}, the layers of {model}.")
    last = range(read.n_layers - n_sites, read.n_layers)
    to_do = Work(sites=tuple(Site(layer, "resid_post") for layer in last), **work)
    costs = (
        caching(read, machine, to_do),
        answering(read, machine, to_do),
        judging(judged_by, machine, to_do),
    )
    placed = fit(read, machine, to_do)
    alone = Plan(read, judged_by, machine, to_do, placed, costs, hours, 1, 0)
    groups = machines_for(alone.seconds, hours)
    return dataclasses.replace(
        alone,
        machines=groups * placed.machines,
        pays_from=pays_from(costs, read, machine, to_do),
    )


def in_words(plan: Plan) -> str:
    """Write a plan for the console."""
    model, placed, work = plan.model, plan.fit, plan.work
    lines = [
        f"{model.name}: {model.parameters / 1e9:.3g} billion parameters, of which a token passes "
        f"{model.active_parameters / 1e9:.3g}; {model.parameters * work.weight_bytes / 1e9:.3g} GB",
        f"{plan.machine.name}, {plan.machine.devices} to a machine: a copy takes {placed.devices} "
        f"of them ({placed.machines} machines), and writes {placed.rows} answers at a time",
        "",
        f"{'':10}{'tokens':>10}{'PFLOP':>10}{'hours':>10}{'disk GB':>10}{'network GB':>12}",
    ]
    lines += [
        f"{cost.job:10}{cost.tokens:>10.2e}{cost.flops / 1e15:>10.3g}{cost.seconds / 3600:>10.3g}"
        f"{cost.disk / 1e9:>10.3g}{cost.network / 1e9:>12.3g}"
        for cost in plan.costs
    ]
    enough = plan.reason or "is enough"
    lines += [
        "",
        f"one machine: {plan.seconds / 3600:.3g} hours with loading; it {enough}",
        f"in {plan.hours:g} hours: {plan.machines} machines",
        f"a second machine saves four tenths of the time from {plan.pays_from:.2g} prompts on",
    ]
    return "\n".join(lines)
