"""Causal checks of neurons: what happens when they are silenced or moved, against matched random sets of neurons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.forward import (
    forward,
    has_key_value_cache,
    prefix_cache,
    reading,
    rows_of_cache,
    shared_prefix_length,
)
from workbench.models.tokens import Batch, Encoded, encode, pad, pad_id, span_mask
from workbench.neurons.silencing import (
    Method,
    Neuron,
    NeuronReference,
    by_row,
    matched_controls,
    neuron_interventions,
)
from workbench.stats.estimates import Estimate, mean, paired_difference, to_floats
from workbench.stats.selectivity import permutation_p
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.load import HookedModel
    from workbench.prompts.prompt import Prompt
    from workbench.steering.interventions import Intervention
    from workbench.steering.vectors import SteeringVector


Scorer = Callable[[Sequence[str], Sequence[str]], Sequence[float | bool | None]]
"""Numbers of answers: called with prompts and answers, as ``text_quality.relevance`` is; None where unscored."""


PROMPTS_A_PASS = 16


@dataclass(frozen=True)
class NeuronEffect:
    """What changing one set of neurons did to one outcome.

    Attributes:
        name: Name of the set.
        outcome: "shift at <site>": way of the prompts' projection from the unsafe to the safe mean, 1 is all of it. "kl": nats between
            the next-token distributions on neutral prompts. Else a scorer's name: change of its mean to the unedited model.
        method: How the neurons were changed.
        n_neurons: Size of the set.
        estimate: Mean over prompts, with its bootstrap interval.
        controls: The same mean for each control set.
        p: (1 + #{control >= observed}) / (1 + number of controls), for scorers by absolute value; nan without controls.
        values: The outcome prompt by prompt (nan where unscored), in the order of the prompts.
    """

    name: str
    outcome: str
    method: str
    n_neurons: int
    estimate: Estimate
    controls: tuple[float, ...]
    p: float
    values: tuple[float, ...]


def neuron_effect(
    model: HookedModel,
    prompts: Sequence[Prompt],
    targets: Mapping[str, Sequence[Neuron]],
    reference: NeuronReference,
    vectors: Sequence[SteeringVector] = (),
    *,
    controls: Mapping[str, Sequence[Sequence[Neuron]]] | None = None,
    method: Method = "clamp",
    factor: float = 1.0,
    safe: Sequence[Prompt] = (),
    neutral: Sequence[Prompt] = (),
    scorers: Mapping[str, Scorer] | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 128,
    seed: int = 0,
) -> list[NeuronEffect]:
    """Change sets of neurons and measure what follows, on held-out prompts and beside control sets.

    All sets share batches (rows = sets x prompts), and the unedited model is one of them. In the measured passes neurons are changed
    from the user's first word on, never in the template before it; in generated answers at all positions.

    Args:
        model: What the reference was measured on.
        prompts: Held-out unsafe prompts.
        targets: Name to neurons (layer, neuron).
        reference: Values to put in, see ``neuron_reference``.
        vectors: Where the shift is read: along each vector, at its site, pooled over its span.
        controls: For a target's name its control sets, see ``matched_controls``.
        method: See ``neuron_interventions``; "resample" draws one safe prompt for each prompt, the same for all sets.
        factor: See ``neuron_interventions``.
        safe: Held-out safe prompts: the gap is then the one between their projections and those of ``prompts``; without them it is the
            vector's norm, the gap of the fold it was fitted on.
        neutral: Prompts for the KL divergence of the first answer token's distribution.
        scorers: Name to scorer of generated answers, for instance refusal, relevance, degeneration.
        max_new_tokens: Length limit of the answers.
        batch_size: Rows a pass.
        seed: Of resampling and bootstrap.

    Returns:
        One effect a target and outcome, target by target.

    Raises:
        ValueError: If a set, vector or prompt does not fit, or prompts were part of the reference.
    """
    controls = controls or {}
    plan = _Plan.of(targets, controls)
    _check(plan, vectors, reference, [*prompts, *safe, *neutral], controls)
    run = _Run(model, reference, plan.sets, method, factor, batch_size, seed)
    outcomes: dict[str, Float[np.ndarray, "set prompt"]] = {}
    with torch.no_grad():
        if vectors:
            projections = run.projections(prompts, vectors)
            gaps = np.array([vector.norm for vector in vectors])
            if safe:
                plain = _Run(model, reference, [()], "clamp", 1.0, batch_size, seed).projections(
                    safe, vectors
                )
                gaps = plain[0].mean(axis=0) - projections[0].mean(axis=0)
                if gaps.min() <= 0:
                    site = vectors[int(gaps.argmin())].site
                    raise ValueError(
                        f"held-out safe prompts project no further than the unsafe ones at {site}: no gap to measure."
                    )
            shifts = (projections - projections[:1]) / gaps
            outcomes |= {
                f"shift at {vector.site}": shifts[..., i] for i, vector in enumerate(vectors)
            }
        if neutral:
            outcomes["kl"] = run.divergences(neutral)
    if scorers:
        outcomes |= run.scores(prompts, scorers, max_new_tokens)
    effects = []
    for name, number in plan.targets.items():
        for outcome, values in outcomes.items():
            paired = scorers is not None and outcome in scorers
            estimates = [
                paired_difference(values[0], values[i], seed=seed)
                if paired
                else mean(values[i], seed=seed)
                for i in (number, *plan.controls[name])
            ]
            observed, others = (
                estimates[0].value,
                tuple(estimate.value for estimate in estimates[1:]),
            )
            known = [value for value in others if not math.isnan(value)]
            p = math.nan
            if known and not math.isnan(observed):
                p = (
                    permutation_p(abs(observed), np.abs(known))
                    if paired
                    else permutation_p(observed, np.array(known))
                )
            own = values[number] - values[0] if paired else values[number]
            effects.append(
                NeuronEffect(
                    name,
                    outcome,
                    method,
                    len(plan.sets[number]),
                    estimates[0],
                    others,
                    p,
                    tuple(own.tolist()),
                )
            )
    return effects


def rank_curve(
    model: HookedModel,
    prompts: Sequence[Prompt],
    ranked: Sequence[Neuron],
    reference: NeuronReference,
    vectors: Sequence[SteeringVector],
    *,
    statistics: pd.DataFrame | None = None,
    fraction: float = 0.01,
    n_slices: int = 5,
    n_sets: int = 20,
    method: Method = "clamp",
    safe: Sequence[Prompt] = (),
    seed: int = 0,
) -> list[NeuronEffect]:
    """The effect of the top 1 % of neurons, of the next 1 %, and so on: does the ranking order neurons by what they do?

    Args:
        model: What the reference was measured on.
        prompts: Held-out unsafe prompts.
        ranked: All neurons, first the one that matters most.
        reference: See ``neuron_effect``.
        vectors: See ``neuron_effect``.
        statistics: From ``matching_statistics``: each slice then gets matched controls, free of the neurons of all slices.
        fraction: Share of ``ranked`` in a slice.
        n_slices: How many slices.
        n_sets: Controls a slice.
        method: See ``neuron_interventions``.
        safe: See ``neuron_effect``.
        seed: Of controls and bootstrap.

    Returns:
        Effects slice by slice, named "0-1 %", "1-2 %" and so on.

    Raises:
        ValueError: If the slices are empty or more than there are neurons.
    """
    size = round(fraction * len(ranked))
    if n_slices < 1 or size < 1 or size * n_slices > len(ranked):
        raise ValueError(
            f"{n_slices} slices of {fraction:g} do not fit into {len(ranked)} neurons; take fewer or larger ones."
        )
    slices = {
        f"{100 * fraction * i:g}-{100 * fraction * (i + 1):g} %": ranked[i * size : (i + 1) * size]
        for i in range(n_slices)
    }
    controls = {}
    if statistics is not None:
        taken = ranked[: n_slices * size]
        controls = {
            name: matched_controls(statistics, own, n_sets=n_sets, seed=seed, exclude=taken).sets
            for name, own in slices.items()
        }
    return neuron_effect(
        model,
        prompts,
        slices,
        reference,
        vectors,
        controls=controls,
        method=method,
        safe=safe,
        seed=seed,
    )


def effects_table(effects: Iterable[NeuronEffect]) -> pd.DataFrame:
    """A row an effect: name, outcome, method, n_neurons, value, low, high, n, n_unscored, control_mean, control_max, n_controls, p."""
    import pandas as pd

    return pd.DataFrame(
        {
            "name": effect.name,
            "outcome": effect.outcome,
            "method": effect.method,
            "n_neurons": effect.n_neurons,
            **{
                field: getattr(effect.estimate, field)
                for field in ("value", "low", "high", "n", "n_unscored")
            },
            "control_mean": float(np.mean(effect.controls)) if effect.controls else math.nan,
            "control_max": max(effect.controls, default=math.nan),
            "n_controls": len(effect.controls),
            "p": effect.p,
        }
        for effect in effects
    )


@dataclass(frozen=True)
class _Plan:
    """All sets in one list, the unedited model first, and which of them are whose controls."""

    sets: list[tuple[Neuron, ...]]
    targets: dict[str, int]
    controls: dict[str, list[int]]

    @classmethod
    def of(
        cls,
        targets: Mapping[str, Sequence[Neuron]],
        controls: Mapping[str, Sequence[Sequence[Neuron]]],
    ) -> _Plan:
        sets: list[tuple[Neuron, ...]] = [()]
        plan = cls(sets, {}, {})
        for name, target in targets.items():
            plan.targets[name] = len(sets)
            sets.append(tuple(target))
            plan.controls[name] = list(range(len(sets), len(sets) + len(controls.get(name, ()))))
            sets.extend(tuple(control) for control in controls.get(name, ()))
        return plan


class _Pass(NamedTuple):
    sets: Int[np.ndarray, " set"]
    prompts: Int[np.ndarray, " prompt"]
    rows: list[Encoded]
    batch: Batch
    mask: Bool[Tensor, "row past_and_pos"]
    cache: Any
    interventions: list[Intervention]


@dataclass(frozen=True, eq=False)
class _Run:
    """Passes over sets x prompts."""

    model: HookedModel
    reference: NeuronReference
    sets: Sequence[Sequence[Neuron]]
    method: Method
    factor: float
    batch_size: int
    seed: int

    def projections(
        self, prompts: Sequence[Prompt], vectors: Sequence[SteeringVector]
    ) -> Float[np.ndarray, "set prompt vector"]:
        """Span means of the projection on each vector's direction, at its site."""
        read: list[Tensor] = [torch.empty(0)] * len(vectors)

        def reader(place: int, u: Tensor) -> Callable[[Tensor], None]:
            def hook(activation: Tensor) -> None:
                read[place] = activation.double() @ u

            return hook

        device = next(iter(self.model.parameters())).device
        readers = [
            (v.site.hook_name, reader(i, v.direction.double().to(device)))
            for i, v in enumerate(vectors)
        ]
        spans = {vector.span for vector in vectors}
        # What comes after the last token that is read cannot change it.
        encoded = [
            dataclasses.replace(row, ids=row.ids[: max(row.span(span)[1] for span in spans)])
            for row in encode(self.model, prompts)
        ]
        out = np.empty((len(self.sets), len(prompts), len(vectors)))
        for one in self._passes(
            encoded, lambda row: min(row.content[0], *(row.span(span)[0] for span in spans))
        ):
            with intervene(self.model, one.interventions), reading(self.model, readers) as run:
                run(one.batch.tokens, one.mask, one.cache)
            for place, vector in enumerate(vectors):
                inside = span_mask(one.rows, one.batch, vector.span)
                pooled = (read[place] * inside).sum(dim=1) / inside.sum(dim=1)
                out[one.sets[:, None], one.prompts, place] = (
                    pooled.view(len(one.sets), -1).cpu().numpy()
                )
        return out

    def divergences(self, prompts: Sequence[Prompt]) -> Float[np.ndarray, "set prompt"]:
        """KL divergence of the next-token distribution behind each prompt, unedited to edited, in nats."""
        out = np.empty((len(self.sets), len(prompts)))
        plain: Tensor
        for one in self._passes(encode(self.model, prompts), lambda row: row.content[0]):
            with intervene(self.model, one.interventions):
                logits, _ = forward(self.model, one.batch.tokens, one.mask, cache=one.cache)
            log_probs = (
                logits.double().log_softmax(dim=-1).view(len(one.sets), len(one.prompts), -1)
            )
            if one.sets[0] == 0:  # the unedited model comes first for each block of prompts
                plain = log_probs[0]
            out[one.sets[:, None], one.prompts] = (
                (plain.exp() * (plain - log_probs)).sum(dim=-1).clamp(min=0).cpu().numpy()
            )
        return out

    def scores(
        self, prompts: Sequence[Prompt], scorers: Mapping[str, Scorer], max_new_tokens: int
    ) -> dict[str, Float[np.ndarray, "set prompt"]]:
        """Scores of generated answers."""
        donors = self._donors(len(prompts))
        conditions: dict[str, Any] = {}
        for i in range(len(self.sets)):
            own = {
                prompt.id: self._edits(i, donor)
                for prompt, donor in zip(prompts, donors, strict=True)
            }
            conditions[str(i)] = own if self.method == "resample" else own[prompts[0].id]
        answers = sweep(
            self.model,
            prompts,
            conditions,
            decoding=Decoding(max_new_tokens=max_new_tokens, batch_size=self.batch_size),
        )
        questions, texts = (
            [answer.prompt.text for answer in answers],
            [answer.text for answer in answers],
        )
        scored = {name: to_floats(score(questions, texts), name) for name, score in scorers.items()}
        return {
            name: values.reshape(len(self.sets), len(prompts)) for name, values in scored.items()
        }

    def _passes(
        self, encoded: Sequence[Encoded], keep: Callable[[Encoded], int]
    ) -> Iterator[_Pass]:
        """Blocks of prompts, longest first, each with all sets in blocks; the shared template prefix is computed once, unedited."""
        device = next(iter(self.model.parameters())).device
        n_prefix = shared_prefix_length(encoded, keep) if has_key_value_cache(self.model) else 0
        prefix = prefix_cache(self.model, encoded[0].ids[:n_prefix]) if n_prefix else None
        order = np.array(sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids)))
        donors = self._donors(len(encoded))
        n_prompts = min(PROMPTS_A_PASS, self.batch_size)
        for prompts in np.split(order, range(n_prompts, len(order), n_prompts)):
            block = [_without_prefix(encoded[i], n_prefix) for i in prompts]
            n_sets = self.batch_size // len(block)
            for sets in np.split(np.arange(len(self.sets)), range(n_sets, len(self.sets), n_sets)):
                rows = block * len(sets)
                batch = pad(rows, pad_id=pad_id(self.model), side="left", device=device)
                columns = torch.arange(batch.tokens.shape[1], device=device)
                first = batch.starts + torch.tensor([row.content[0] for row in rows], device=device)
                where = columns >= first[:, None]
                zeros = torch.zeros(len(rows), dtype=torch.long, device=device)
                cache = rows_of_cache(prefix, zeros) if prefix is not None else None
                edits = {
                    pair: self._edits(*pair)
                    for pair in {(i, donors[p]) for i in sets for p in prompts}
                }
                lists = [edits[i, donors[p]] for i in sets for p in prompts]
                interventions = by_row(
                    lists, None if bool((where == batch.mask).all()) else where[..., None]
                )
                mask = torch.cat([batch.mask.new_ones(len(rows), n_prefix), batch.mask], dim=1)
                yield _Pass(sets, prompts, rows, batch, mask, cache, interventions)

    def _edits(self, number: int, donor: int | None) -> list[Intervention]:
        return neuron_interventions(
            self.reference, self.sets[number], self.method, factor=self.factor, donor=donor
        )

    def _donors(self, n: int) -> list[int | None]:
        if self.method != "resample":
            return [None] * n
        return np.random.default_rng(self.seed).integers(len(self.reference.safe), size=n).tolist()


def _without_prefix(row: Encoded, n: int) -> Encoded:
    content, response = ((a - n, b - n) for a, b in (row.content, row.response))
    return dataclasses.replace(row, ids=row.ids[n:], content=content, response=response)


def _check(
    plan: _Plan,
    vectors: Sequence[SteeringVector],
    reference: NeuronReference,
    prompts: Sequence[Prompt],
    controls: Mapping[str, Any],
) -> None:
    seen = next((prompt.id for prompt in prompts if prompt.id in reference.prompt_ids), None)
    if seen is not None:
        raise ValueError(
            f"prompt {seen!r} is one the reference was measured on: measure effects on held-out prompts."
        )
    strangers = sorted(set(controls) - set(plan.targets))
    if strangers:
        raise ValueError(
            f"controls of {strangers[0]!r} have no target of that name; targets: {', '.join(plan.targets)}."
        )
    empty = next((name for name, number in plan.targets.items() if not plan.sets[number]), None)
    if empty is not None or not plan.targets:
        raise ValueError(
            f"target {empty!r} has no neurons." if plan.targets else "give at least one target."
        )
    ends = [
        v.site.layer + (v.site.kind in ("mlp_out", "resid_post")) for v in vectors
    ]  # layers whose neurons are read
    beyond = [
        neuron for neurons in plan.sets for neuron in neurons if ends and neuron[0] >= max(ends)
    ]
    if beyond:
        raise ValueError(
            f"neuron {beyond[0]} comes after {vectors[ends.index(max(ends))].site}, where effects are read: leave it out."
        )
