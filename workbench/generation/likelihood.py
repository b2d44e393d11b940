"""Say how likely the model, as it is or as it is steered, finds given answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.generation._decode_loop import check_gates
from workbench.generation._logits import columns_at_a_time, some_or_all_logits
from workbench.generation.reading import read_rows, with_answers
from workbench.models.batches import (
    batches_by_length,
    pad,
    pad_ids,
    span_mask,
    widths_to_keep_apart,
)
from workbench.models.finite import check_finite
from workbench.models.forward import late_logits_and_cache
from workbench.models.hooked_model import input_device
from workbench.models.tokens import Encoded, encode, pad_id
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.generation.answers import Completion
    from workbench.models.batches import Batch
    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords
    from workbench.steering.interventions import Intervention


def answer_log_probs(
    model: HookedModel,
    completions: Sequence[Completion],
    *,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 16,
) -> list[Float[Tensor, " token"]]:
    """Return each answer's token log-probabilities, teacher-forced behind its prompt.

    Args:
        model: A hooked model; without interventions this scores steered answers under the
            unsteered model. Inside ``intervene`` answers may be read in parts, all of them
            positions "prompt": use interventions at "all" positions, for every row.
        completions: Answers, by their token ids.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        batch_size: Rows per batch; logits are kept for the answers' tokens only.

    Returns:
        One float32 vector per answer, on the CPU, natural logarithms; empty for an empty answer
        (``read_rows`` gives hidden states of the same pass, too).

    Raises:
        ValueError: If the model's numbers are infinite or undefined.
    """
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    rows = with_answers(model, completions, asked_by)
    return read_rows(model, rows, batch_size=batch_size).log_probs


def steered_log_probs(
    model: HookedModel,
    completions: Sequence[Completion],
    interventions: Sequence[Sequence[Intervention]],
    *,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    given: bool = False,
    batch_size: int = 24,
    transfer: bool = False,
) -> list[Float[Tensor, " token"]]:
    """Return the log-probability of each token of each answer while the model is steered.

    The answers' tokens count as generated ones, and gates work; where one is stepwise, the answer
    is read token by token, as it was written.

    Args:
        model: A hooked model.
        completions: Answers, by their token ids.
        interventions: Those of each completion, in order.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        given: The texts are given and not written by the model: where a template opens thoughts
            they stand behind their end.
        batch_size: Rows per batch.
        transfer: Allow vectors of another model of the same architecture.

    Returns:
        One float32 vector per answer, on the CPU, natural logarithms; empty for an empty answer.

    Raises:
        ValueError: If there is not one entry per completion, an intervention reaches no position of
            any answer it is for, or numbers are infinite or undefined.
    """
    _check_one_each("interventions", interventions, completions)
    check_gates(model, [one for of_answer in interventions for one in of_answer])
    _check_reaches(interventions, completions)
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    asked_by["behind_thoughts"] = given
    if not any(interventions):  # what answers have in common is then read once
        rows = with_answers(model, completions, asked_by)
        return read_rows(model, rows, batch_size=batch_size).log_probs
    scored: list[Tensor] = [torch.zeros(0) for _ in completions]
    for batch in _answer_batches(model, completions, asked_by, batch_size):
        logits_of = batch.logits(model, interventions, transfer)
        parts = [
            logits_of(columns)
            .float()
            .log_softmax(dim=-1)
            .gather(2, batch.tokens[:, columns, None])[..., 0]
            for columns in batch.parts(model)
        ]
        log_probs = torch.cat(parts, dim=1)
        batch.check_finite(model, log_probs, interventions, transfer)
        log_probs = log_probs.cpu()
        for row, i in enumerate(batch.places):
            scored[i] = log_probs[row, : len(completions[i].tokens)].clone()
    return scored


def answer_kl(
    model: HookedModel,
    completions: Sequence[Completion],
    conditions: Mapping[str, Sequence[Sequence[Intervention]]],
    *,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 24,
    transfer: bool = False,
) -> dict[str, float]:
    """Measure how far interventions move next-token distributions: KL(unsteered || steered).

    The answers along which it is measured are fixed.

    Args:
        model: A hooked model.
        completions: Unsteered answers, by their token ids; mostly those to neutral prompts.
        conditions: Name to the interventions of each completion, in order. The answers' tokens
            count as generated ones.
        system_prompt: The one the answers were made with.
        template_keywords: Those the answers were made with.
        batch_size: Rows per batch.
        transfer: Allow vectors of another model of the same architecture.

    Returns:
        Name to nats per token, the mean over all answer tokens.

    Raises:
        ValueError: If no answer has a token, a condition has not one entry per completion, an
            intervention reaches no position of any answer it is for, or numbers are infinite or
            undefined.
    """
    for name, interventions in conditions.items():
        _check_one_each(f"{name!r}", interventions, completions)
        check_gates(model, [one for of_answer in interventions for one in of_answer])
        _check_reaches(interventions, completions)
    if not any(completion.tokens for completion in completions):
        raise ValueError("no answer has a token: there is no distribution to compare.")
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    sums, n_tokens = dict.fromkeys(conditions, 0.0), 0
    for batch in _answer_batches(model, completions, asked_by, batch_size):
        unsteered_logits = batch.logits(model, [() for _ in completions], transfer)
        for name, interventions in conditions.items():
            steered_logits, parts = batch.logits(model, interventions, transfer), []
            for columns in batch.parts(model):
                unsteered = unsteered_logits(columns).float().log_softmax(dim=-1)
                steered = steered_logits(columns).float().log_softmax(dim=-1)
                difference = steered.neg_().add_(unsteered)
                parts.append(difference.mul_(unsteered.exp_()).sum(dim=-1))
            divergence = torch.cat(parts, dim=1)
            batch.check_finite(model, divergence, interventions, transfer)
            sums[name] += float(divergence[batch.is_real].sum())
        n_tokens += int(batch.is_real.sum())
    return {name: total / n_tokens for name, total in sums.items()}


@dataclass(frozen=True, eq=False)
class _AnswerBatch:
    """Hold some answers behind their prompts, ready for a pass under interventions."""

    places: list[int]
    """Places of the answers among all completions."""
    encoded: list[Encoded]
    prompt: Batch
    tokens: Int[Tensor, "row token"]
    """The answers' tokens, padded on the right."""
    is_real: Bool[Tensor, "row token"]

    def parts(self, model: HookedModel) -> Iterator[slice]:
        """Cut the answers' columns into pieces that are computed at a time."""
        return columns_at_a_time(model, len(self.places), self.tokens.shape[1])

    def logits(
        self,
        model: HookedModel,
        interventions: Sequence[Sequence[Intervention]],
        transfer: bool,
    ) -> Callable[[slice], Float[Tensor, "row some d_vocab"]]:
        """Run the batch under all answers' interventions; return what gives logits of columns.

        The logits at an answer token are those it was chosen by.
        """
        of_rows = [one for i in self.places for one in interventions[i]]
        is_stepwise = any(one.gate and one.gate.form == "stepwise" for one in of_rows)
        tokens, mask = self._whole()
        with torch.no_grad(), self._steered(model, interventions, transfer):
            if is_stepwise:
                return _logits_step_by_step(model, tokens, mask, self.tokens.shape[1])
            # The last column's logits would choose what comes after the answer.
            return some_or_all_logits(model, tokens, mask, self.tokens.shape[1] + 1)[0]

    def check_finite(
        self,
        model: HookedModel,
        values: Float[Tensor, "row token"],
        interventions: Sequence[Sequence[Intervention]],
        transfer: bool,
    ) -> None:
        """Raise where what was computed of an answer is infinite or undefined."""
        values = values.masked_fill(~self.is_real, 0.0)
        if bool(values.isfinite().all()):
            return
        ids = [row.prompt.id for row in self.encoded]
        is_steered = any(interventions[i] for i in self.places)
        with torch.no_grad(), self._steered(model, interventions, transfer):
            check_finite(model, values, ids, *self._whole(), is_steered=is_steered)

    def _whole(self) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
        """Return tokens and mask of the prompts and the answers behind them."""
        tokens = torch.cat([self.prompt.tokens, self.tokens], dim=1)
        return tokens, torch.cat([self.prompt.mask, self.is_real], dim=1)

    def _steered(
        self,
        model: HookedModel,
        interventions: Sequence[Sequence[Intervention]],
        transfer: bool,
    ) -> AbstractContextManager[Any]:
        """Return a context in which each row has its answer's interventions."""
        return intervene(
            model,
            [one.for_rows([row]) for row, i in enumerate(self.places) for one in interventions[i]],
            prompt_length=self.prompt.tokens.shape[1],
            content=span_mask(self.encoded, self.prompt, "content"),
            transfer=transfer,
        )


def _logits_step_by_step(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row pos"],
    n: int,
) -> Callable[[slice], Float[Tensor, "row some d_vocab"]]:
    """Read the last ``n`` columns one by one behind the others, as they are when written."""
    start = tokens.shape[1] - n
    with torch.no_grad():
        first, cache = late_logits_and_cache(model, tokens[:, :start], mask[:, :start])
        steps = [first]
        for place in range(start, tokens.shape[1] - 1):
            column, seen = tokens[:, place : place + 1], mask[:, : place + 1]
            step, cache = late_logits_and_cache(model, column, seen, cache=cache)
            steps.append(step)
    return lambda columns: torch.cat([step() for step in steps[columns]], dim=1)


def _answer_batches(
    model: HookedModel,
    completions: Sequence[Completion],
    asked_by: Mapping[str, Any],
    batch_size: int,
) -> Iterator[_AnswerBatch]:
    """Cut the answers that have tokens into batches, by the length of their prompts."""
    encoded = encode(model, [completion.prompt for completion in completions], **asked_by)
    answered = [i for i, completion in enumerate(completions) if completion.tokens]
    lengths = [len(encoded[i].ids) for i in answered]
    device = input_device(model)
    widths = [(len(encoded[i].ids), len(completions[i].tokens)) for i in answered]
    alike = widths_to_keep_apart(model, widths)
    for batch_places in batches_by_length(lengths, batch_size, longest_first=False, alike=alike):
        places = [answered[place] for place in batch_places]
        rows = [encoded[i] for i in places]
        tokens, is_real = pad_ids(
            [completions[i].tokens for i in places], pad_id=pad_id(model), side="right"
        )
        prompt = pad(rows, pad_id=pad_id(model), side="left", device=device)
        yield _AnswerBatch(places, rows, prompt, tokens.to(device), is_real.to(device))


def _check_one_each(what: str, given: Sequence[object], completions: Sequence[Completion]) -> None:
    if len(given) != len(completions):
        raise ValueError(
            f"{what} needs one entry for each of {len(completions)} answers, got {len(given)}."
        )


def _check_reaches(
    interventions: Sequence[Sequence[Intervention]], completions: Sequence[Completion]
) -> None:
    """Raise where an intervention reaches no position: the answers would score as unsteered."""
    reached: dict[int, bool] = {}
    named: dict[int, Intervention] = {}
    for each, completion in zip(interventions, completions, strict=True):
        for one in each if completion.tokens else ():
            named[id(one)] = one
            reaches = one.reaches(len(completion.tokens) - 1)
            reached[id(one)] = reached.get(id(one), False) or reaches
    for key, is_reached in reached.items():
        if not is_reached:
            one = named[key]
            raise ValueError(
                f"the intervention at {one.site} reaches nothing in these answers: positions "
                f"{one.positions!r} until {one.until}, and the last token of an answer is not read "
                "again; steer positions 'all', or score longer answers."
            )
