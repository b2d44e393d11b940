"""Check neurons causally: change them, and compare with matched random sets of neurons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.batches import (
    Batch,
    batches_by_length,
    pad,
    share_prefix,
    span_mask,
    widths_to_keep_apart,
)
from workbench.models.finite import check_finite
from workbench.models.forward import forward, reading
from workbench.models.hooked_model import input_device
from workbench.models.templates import asked_by
from workbench.models.tokens import Encoded, encode, pad_id
from workbench.neurons.silencing import (
    Method,
    Neuron,
    NeuronReference,
    by_row,
    matched_controls,
    neuron_interventions,
)
from workbench.prompts.forms import as_prompts
from workbench.stats.estimates import Estimate, mean, paired_difference, to_floats
from workbench.stats.selectivity import permutation_p
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt
    from workbench.steering.interventions import Intervention
    from workbench.steering.vectors import SteeringVector


Scorer = Callable[[Sequence[str], Sequence[str]], Sequence[float | bool | None]]
"""Gives a number to each answer: called with prompts and answers, as ``text_quality.relevance`` is;
None where unscored."""


_PROMPTS_PER_PASS = 16  # the other rows of a batch are sets of neurons


@dataclass(frozen=True)
class NeuronEffect:
    """Hold what changing one set of neurons did to one outcome.

    Attributes:
        name: Name of the set.
        outcome: "shift at <site>": how far the prompts' projection went from the unsafe to the safe
            mean, 1 is all the way. "kl": nats between the next-token distributions on neutral
            prompts. Else a scorer's name: change of its mean against the unedited model.
        method: How the neurons were changed.
        n_neurons: Size of the set.
        estimate: Mean over prompts, with its bootstrap interval.
        controls: The same mean for each control set.
        p: (1 + #{control >= observed}) / (1 + number of controls), for scorers by absolute value;
            nan without controls.
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
    prompts: PromptsLike,
    targets: Mapping[str, Sequence[Neuron]],
    reference: NeuronReference,
    vectors: Sequence[SteeringVector] = (),
    *,
    controls: Mapping[str, Sequence[Sequence[Neuron]]] | None = None,
    method: Method = "clamp",
    factor: float = 1.0,
    safe: PromptsLike = (),
    neutral: PromptsLike = (),
    scorers: Mapping[str, Scorer] | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 128,
    seed: int = 0,
) -> list[NeuronEffect]:
    """Change sets of neurons and measure what follows, beside control sets.

    All sets share batches (rows = sets x prompts), and the unedited model is one of them. In the
    measured passes neurons are changed from the user's first word on, never in the template before
    it; in generated answers they are changed at all positions. Prompts are asked with the system
    prompt and template keywords that the reference was measured under.

    Args:
        model: What the reference was measured on.
        prompts: Held-out unsafe prompts, in any form that ``as_prompts`` reads.
        targets: Name to neurons (layer, neuron).
        reference: Values to put in, see ``neuron_reference``.
        vectors: Where the shift is read: along each vector, at its site, pooled over its span.
        controls: For a target's name its control sets, see ``matched_controls``.
        method: See ``neuron_interventions``; "resample" draws one safe prompt for each prompt, the
            same for all sets.
        factor: See ``neuron_interventions``.
        safe: Held-out safe prompts: the gap is then between their projections and those of
            ``prompts``; without them it is the vector's norm, the gap of the fold it is fitted on.
        neutral: Prompts for the KL divergence of the first answer token's distribution.
        scorers: Name to scorer of generated answers: refusal, relevance, degeneration.
        max_new_tokens: Length limit of the answers.
        batch_size: Rows per pass.
        seed: Seed of resampling and bootstrap.

    Returns:
        One effect per target and outcome, target by target.

    Raises:
        ValueError: If a set, vector or prompt does not fit, or prompts were part of the reference.
    """
    prompts, safe, neutral = as_prompts(prompts), as_prompts(safe), as_prompts(neutral)
    plan = _Plan.of(targets, controls or {})
    _check(plan, vectors, reference, [*prompts, *safe, *neutral], controls or {})
    run = _Run(model, reference, plan.sets, method, factor, batch_size, seed)
    outcomes = _shifts(run, prompts, vectors, safe) if vectors else {}
    outcomes |= {"kl": _Outcome(run.divergences(neutral))} if neutral else {}
    outcomes |= run.scores(prompts, scorers, max_new_tokens) if scorers else {}
    return [
        plan.effect(target, name, outcome, method, seed)
        for target in plan.targets
        for name, outcome in outcomes.items()
    ]


def rank_curve(
    model: HookedModel,
    prompts: PromptsLike,
    ranked: Sequence[Neuron],
    reference: NeuronReference,
    vectors: Sequence[SteeringVector],
    *,
    statistics: pd.DataFrame | None = None,
    fraction: float = 0.01,
    n_slices: int = 5,
    n_sets: int = 20,
    method: Method = "clamp",
    safe: PromptsLike = (),
    seed: int = 0,
) -> list[NeuronEffect]:
    """Measure the effect of the top 1 % of neurons, of the next 1 %, and so on.

    It shows whether a ranking orders neurons by what they do.

    Args:
        model: What the reference was measured on.
        prompts: Held-out unsafe prompts.
        ranked: All neurons, first the one that matters most.
        reference: See ``neuron_effect``.
        vectors: See ``neuron_effect``.
        statistics: From ``matching_statistics``: each slice then gets matched controls, free of the
            neurons of all slices.
        fraction: Share of ``ranked`` in a slice.
        n_slices: How many slices.
        n_sets: Controls per slice.
        method: See ``neuron_interventions``.
        safe: See ``neuron_effect``.
        seed: Seed of controls and bootstrap.

    Returns:
        Effects slice by slice, named "0-1 %", "1-2 %" and so on.

    Raises:
        ValueError: If the slices are empty or more than there are neurons.
    """
    slices = _slices(ranked, fraction, n_slices)
    controls = _controls_of(slices, statistics, n_sets, seed) if statistics is not None else {}
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
    """Tabulate effects, one row each.

    Returns:
        name, outcome, method, n_neurons, value, low, high, n, n_unscored, control_mean,
        control_max, n_controls, p.
    """
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


class _Outcome(NamedTuple):
    """Values of one outcome; a score is compared with that of the unedited model (set 0)."""

    values: Float[np.ndarray, "set prompt"]
    is_score: bool = False


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
        """Put the unedited model, each target and its controls into one list."""
        sets: list[tuple[Neuron, ...]] = [()]
        plan = cls(sets, {}, {})
        for name, target in targets.items():
            plan.targets[name] = len(sets)
            sets.append(tuple(target))
            plan.controls[name] = list(range(len(sets), len(sets) + len(controls.get(name, ()))))
            sets.extend(tuple(control) for control in controls.get(name, ()))
        return plan

    def effect(
        self, target: str, name: str, outcome: _Outcome, method: str, seed: int
    ) -> NeuronEffect:
        """Estimate a target's effect on an outcome, and compare it with its controls."""
        values, number = outcome.values, self.targets[target]
        estimates = [
            paired_difference(values[0], values[i], seed=seed)
            if outcome.is_score
            else mean(values[i], seed=seed)
            for i in (number, *self.controls[target])
        ]
        observed, *others = (estimate.value for estimate in estimates)
        known = [value for value in others if not math.isnan(value)]
        p = math.nan
        if known and not math.isnan(observed):
            p = (
                permutation_p(abs(observed), np.abs(known))
                if outcome.is_score
                else permutation_p(observed, np.array(known))
            )
        return NeuronEffect(
            target,
            name,
            method,
            len(self.sets[number]),
            estimates[0],
            tuple(others),
            p,
            tuple((values[number] - values[0] if outcome.is_score else values[number]).tolist()),
        )


class _Pass(NamedTuple):
    """One forward pass: which sets and prompts its rows are (set by set), and what it needs."""

    sets: Int[np.ndarray, " set"]
    prompts: Int[np.ndarray, " prompt"]
    rows: list[Encoded]
    batch: Batch
    mask: Bool[Tensor, "row past_and_pos"]
    cache: Callable[[], Any]  # makes it: a pass extends it
    interventions: list[Intervention]

    def check_finite(self, model: HookedModel, values: Float[Tensor, "row ..."]) -> None:
        """Raise where a row's values are not finite."""
        ids = [row.prompt.id for row in self.rows]
        tokens, is_steered = self.batch.tokens, bool(self.interventions)
        check_finite(model, values, ids, tokens, self.mask, cache=self.cache, is_steered=is_steered)


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

    @torch.no_grad()
    def projections(
        self, prompts: Sequence[Prompt], vectors: Sequence[SteeringVector]
    ) -> Float[np.ndarray, "set prompt vector"]:
        """Average the projection on each vector's direction over its span, at its site."""
        read: list[Tensor] = [torch.empty(0)] * len(vectors)

        device = input_device(self.model)

        def reader(place: int, u: Tensor) -> Callable[[Tensor], None]:
            def hook(activation: Tensor) -> None:
                read[place] = (activation.double() @ u.to(activation.device)).to(device)

            return hook

        readers = [
            (v.site.hook_name, reader(i, v.direction.double())) for i, v in enumerate(vectors)
        ]
        spans = {vector.span for vector in vectors}
        # What comes after the last token that is read cannot change it.
        encoded = [
            dataclasses.replace(row, ids=row.ids[: max(row.span(span)[1] for span in spans)])
            for row in encode(self.model, prompts, **asked_by(self.reference.asked_as))
        ]
        projections = np.empty((len(self.sets), len(prompts), len(vectors)))
        for one in self._passes(
            encoded, lambda row: min(row.content[0], *(row.span(span)[0] for span in spans))
        ):
            with intervene(self.model, one.interventions):
                with reading(self.model, readers) as run:
                    run(one.batch.tokens, one.mask, one.cache())
                for values in read:
                    one.check_finite(self.model, values.masked_fill(~one.batch.mask, 0.0))
            for place, vector in enumerate(vectors):
                inside = span_mask(one.rows, one.batch, vector.span)
                pooled = (read[place] * inside).sum(dim=1) / inside.sum(dim=1)
                projections[one.sets[:, None], one.prompts, place] = (
                    pooled.view(len(one.sets), -1).cpu().numpy()
                )
        return projections

    @torch.no_grad()
    def divergences(self, prompts: Sequence[Prompt]) -> Float[np.ndarray, "set prompt"]:
        """Compute the KL divergence of next-token distributions, unedited to edited, in nats."""
        divergences = np.empty((len(self.sets), len(prompts)))
        plain: Tensor
        encoded = encode(self.model, prompts, **asked_by(self.reference.asked_as))
        for one in self._passes(encoded, lambda row: row.content[0]):
            with intervene(self.model, one.interventions):
                logits, _ = forward(self.model, one.batch.tokens, one.mask, cache=one.cache())
                one.check_finite(self.model, logits)
            log_probs = (
                logits.double().log_softmax(dim=-1).view(len(one.sets), len(one.prompts), -1)
            )
            if one.sets[0] == 0:  # the unedited model comes first for each block of prompts
                plain = log_probs[0]
            divergences[one.sets[:, None], one.prompts] = (
                (plain.exp() * (plain - log_probs)).sum(dim=-1).clamp(min=0).cpu().numpy()
            )
        return divergences

    def scores(
        self, prompts: Sequence[Prompt], scorers: Mapping[str, Scorer], max_new_tokens: int
    ) -> dict[str, _Outcome]:
        """Score generated answers."""
        donors = self._donors(len(prompts))
        conditions: dict[str, Any] = {}
        for i in range(len(self.sets)):
            by_prompt = {
                prompt.id: self._edits(i, donor)
                for prompt, donor in zip(prompts, donors, strict=True)
            }
            # without donors all prompts have the same edits
            conditions[str(i)] = (
                by_prompt if self.method == "resample" else by_prompt[prompts[0].id]
            )
        answers = sweep(
            self.model,
            prompts,
            conditions,
            decoding=Decoding(
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
                **asked_by(self.reference.asked_as),
            ),
        )
        questions = [answer.prompt.text for answer in answers]
        texts = [answer.text for answer in answers]
        shape = (len(self.sets), len(prompts))
        return {
            name: _Outcome(to_floats(score(questions, texts), name).reshape(shape), is_score=True)
            for name, score in scorers.items()
        }

    def _passes(
        self, encoded: Sequence[Encoded], keep: Callable[[Encoded], int]
    ) -> Iterator[_Pass]:
        """Yield blocks of prompts, longest first, each with all sets in blocks.

        The template prefix that all prompts share up to ``keep`` is computed once, unedited.
        """
        device = input_device(self.model)
        lengths = [len(row.ids) for row in encoded]
        prefix = share_prefix(self.model, encoded, keep, padded_columns=max(lengths))
        alike = widths_to_keep_apart(self.model, lengths)
        donors = self._donors(len(encoded))
        n_prompts = min(_PROMPTS_PER_PASS, self.batch_size)
        for prompts in map(np.array, batches_by_length(lengths, n_prompts, alike=alike)):
            block = [_without_prefix(encoded[i], prefix.length) for i in prompts]
            n_sets = self.batch_size // len(block)
            for sets in np.split(np.arange(len(self.sets)), range(n_sets, len(self.sets), n_sets)):
                rows = block * len(sets)
                batch = pad(rows, pad_id=pad_id(self.model), side="left", device=device)
                # edits begin at the user's first word
                columns = torch.arange(batch.tokens.shape[1], device=device)
                first = batch.starts + torch.tensor([row.content[0] for row in rows], device=device)
                where = columns >= first[:, None]
                edits = {
                    pair: self._edits(*pair)
                    for pair in {(i, donors[p]) for i in sets for p in prompts}
                }
                lists = [edits[i, donors[p]] for i in sets for p in prompts]
                interventions = by_row(
                    lists, None if bool((where == batch.mask).all()) else where[..., None]
                )
                # every row continues the same prefix
                cache = partial(prefix.for_rows, len(rows))
                prefix_mask = batch.mask.new_ones(len(rows), prefix.length)
                mask = torch.cat([prefix_mask, batch.mask], dim=1)
                yield _Pass(sets, prompts, rows, batch, mask, cache, interventions)

    def _edits(self, number: int, donor: int | None) -> list[Intervention]:
        """Make the interventions of one set."""
        return neuron_interventions(
            self.reference, self.sets[number], self.method, factor=self.factor, donor=donor
        )

    def _donors(self, n: int) -> list[int | None]:
        """Draw the safe prompt whose values each prompt gets; None for methods without one."""
        if self.method != "resample":
            return [None] * n
        return np.random.default_rng(self.seed).integers(len(self.reference.safe), size=n).tolist()


def _shifts(
    run: _Run,
    prompts: Sequence[Prompt],
    vectors: Sequence[SteeringVector],
    safe: Sequence[Prompt],
) -> dict[str, _Outcome]:
    """Measure how far each set moves the projections, in units of the gap to the safe side."""
    projections = run.projections(prompts, vectors)
    gaps = np.array([vector.norm for vector in vectors])
    if safe:
        unedited = dataclasses.replace(run, sets=[()], method="clamp", factor=1.0)
        of_safe = unedited.projections(safe, vectors)
        gaps = of_safe[0].mean(axis=0) - projections[0].mean(axis=0)
        if gaps.min() <= 0:
            raise ValueError(
                "held-out safe prompts project no further than the unsafe ones at "
                f"{vectors[int(gaps.argmin())].site}: no gap to measure."
            )
    shifts = (projections - projections[:1]) / gaps
    return {f"shift at {v.site}": _Outcome(shifts[..., i]) for i, v in enumerate(vectors)}


def _slices(
    ranked: Sequence[Neuron], fraction: float, n_slices: int
) -> dict[str, Sequence[Neuron]]:
    """Cut the head of a ranking into slices named by their percentages."""
    size = round(fraction * len(ranked))
    if n_slices < 1 or size < 1 or size * n_slices > len(ranked):
        raise ValueError(
            f"{n_slices} slices of {fraction:g} do not fit into {len(ranked)} neurons; "
            "take fewer or larger ones."
        )
    return {
        f"{100 * fraction * i:g}-{100 * fraction * (i + 1):g} %": ranked[i * size : (i + 1) * size]
        for i in range(n_slices)
    }


def _controls_of(
    slices: Mapping[str, Sequence[Neuron]], statistics: pd.DataFrame, n_sets: int, seed: int
) -> dict[str, tuple[tuple[Neuron, ...], ...]]:
    """Draw matched controls for each slice, free of the neurons of all slices."""
    taken = [neuron for neurons in slices.values() for neuron in neurons]
    return {
        name: matched_controls(statistics, neurons, n_sets=n_sets, seed=seed, exclude=taken).sets
        for name, neurons in slices.items()
    }


def _without_prefix(row: Encoded, n: int) -> Encoded:
    """Cut the first tokens off a row."""
    content, response = ((a - n, b - n) for a, b in (row.content, row.response))
    return dataclasses.replace(row, ids=row.ids[n:], content=content, response=response)


def _check(
    plan: _Plan,
    vectors: Sequence[SteeringVector],
    reference: NeuronReference,
    prompts: Sequence[Prompt],
    controls: Mapping[str, Any],
) -> None:
    """Raise unless prompts are held out, and sets, controls and vectors fit together."""
    seen = next((prompt.id for prompt in prompts if prompt.id in reference.prompt_ids), None)
    if seen is not None:
        raise ValueError(
            f"prompt {seen!r} is one the reference was measured on: measure effects on held-out "
            "prompts."
        )
    strangers = sorted(set(controls) - set(plan.targets))
    if strangers:
        raise ValueError(
            f"controls of {strangers[0]!r} have no target of that name; "
            f"targets: {', '.join(plan.targets)}."
        )
    if not plan.targets:
        raise ValueError("give at least one target.")
    for name, number in plan.targets.items():
        if not plan.sets[number]:
            raise ValueError(f"target {name!r} has no neurons.")
    nothing = "no system prompt"
    for vector in vectors:
        if vector.asked_as != reference.asked_as:
            raise ValueError(
                f"the vector at {vector.site} was measured under {vector.asked_as or nothing}, the "
                f"reference under {reference.asked_as or nothing}: measure both alike."
            )
    # number of layers whose neurons come before each place where effects are read
    ends = [v.site.layer + (v.site.kind in ("mlp_out", "resid_post")) for v in vectors]
    for neuron in (neuron for neurons in plan.sets for neuron in neurons):
        if ends and neuron[0] >= max(ends):
            raise ValueError(
                f"neuron {neuron} comes after {vectors[ends.index(max(ends))].site}, "
                "where effects are read: leave it out."
            )
