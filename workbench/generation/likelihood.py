"""Say how likely the model, as it is or as it is steered, finds given answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.batches import batches_by_length, pad, pad_ids, share_prefix, span_mask
from workbench.models.forward import last_logits
from workbench.models.tokens import Encoded, encode, pad_id
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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
            unsteered model. Inside ``intervene`` prompt and answer are one pass, all of it
            positions "prompt": use interventions at "all" positions, for every row.
        completions: Answers, by their token ids.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        batch_size: Rows per batch; logits are kept for the answers' tokens only.

    Returns:
        One float32 vector per answer, on the CPU, natural logarithms; empty for an empty answer.
    """
    scored: list[Tensor] = [torch.zeros(0) for _ in completions]
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    rows = _with_answers(model, completions, asked_by)
    answered = [i for i, completion in enumerate(completions) if completion.tokens]
    if not answered:
        return scored
    lengths = [len(rows[i].ids) for i in answered]
    device = next(iter(model.parameters())).device
    with torch.no_grad():
        prefix = share_prefix(
            model,
            [rows[i] for i in answered],
            keep=lambda row: row.response[0] - 1,
            padded_columns=max(lengths),
        )
        for batch_places in batches_by_length(lengths, batch_size):
            places = [answered[place] for place in batch_places]
            batch = pad(
                [dataclasses.replace(rows[i], ids=rows[i].ids[prefix.length :]) for i in places],
                pad_id=pad_id(model),
                side="left",
                device=device,
            )
            mask = torch.cat([batch.mask.new_ones(len(places), prefix.length), batch.mask], dim=1)
            longest = max(len(completions[i].tokens) for i in places)
            logits, _ = last_logits(
                model, batch.tokens, mask, longest + 1, cache=prefix.for_rows(len(places))
            )
            targets = batch.tokens[:, -longest:, None]
            logits = logits[:, :-1].float()
            log_probs = (logits.gather(2, targets)[..., 0] - logits.logsumexp(dim=-1)).cpu()
            for row, i in enumerate(places):
                scored[i] = log_probs[row, longest - len(completions[i].tokens) :].clone()
    return scored


def _with_answers(
    model: HookedModel, completions: Sequence[Completion], asked_by: Mapping[str, Any]
) -> list[Encoded]:
    """Encode every prompt with the answer's own token ids behind it."""
    prompts = [completion.prompt for completion in completions]
    rows = []
    for encoded, completion in zip(encode(model, prompts, **asked_by), completions, strict=True):
        n = len(encoded.ids)
        response = (n, n + len(completion.tokens))
        ids = encoded.ids + completion.tokens
        rows.append(dataclasses.replace(encoded, ids=ids, response=response))
    return rows


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

    The answers' tokens count as generated ones, and gates work.

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
        ValueError: If there is not one entry per completion.
    """
    _check_one_each("interventions", interventions, completions)
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    asked_by["behind_thoughts"] = given
    scored: list[Tensor] = [torch.zeros(0) for _ in completions]
    for batch in _answer_batches(model, completions, asked_by, batch_size):
        distributions = batch.log_probs(model, interventions, transfer)
        log_probs = distributions.gather(2, batch.tokens[..., None])[..., 0].cpu()
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
        ValueError: If no answer has a token, or a condition has not one entry per completion.
    """
    for name, interventions in conditions.items():
        _check_one_each(f"{name!r}", interventions, completions)
    if not any(completion.tokens for completion in completions):
        raise ValueError("no answer has a token: there is no distribution to compare.")
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    sums, n_tokens = dict.fromkeys(conditions, 0.0), 0
    for batch in _answer_batches(model, completions, asked_by, batch_size):
        unsteered = batch.log_probs(model, [() for _ in completions], transfer)
        for name, interventions in conditions.items():
            steered = batch.log_probs(model, interventions, transfer)
            divergence = (unsteered.exp() * (unsteered - steered)).sum(dim=-1)
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

    def log_probs(
        self,
        model: HookedModel,
        interventions: Sequence[Sequence[Intervention]],
        transfer: bool,
    ) -> Float[Tensor, "row token d_vocab"]:
        """Return log-probabilities at each answer token, under the interventions of all answers."""
        n_prompt = self.prompt.tokens.shape[1]
        steered = intervene(
            model,
            [one.for_rows([row]) for row, i in enumerate(self.places) for one in interventions[i]],
            prompt_length=n_prompt,
            content=span_mask(self.encoded, self.prompt, "content"),
            transfer=transfer,
        )
        tokens = torch.cat([self.prompt.tokens, self.tokens], dim=1)
        mask = torch.cat([self.prompt.mask, self.is_real], dim=1)
        with torch.no_grad(), steered:
            logits, _ = last_logits(model, tokens, mask, tokens.shape[1] - n_prompt + 1)
        return logits[:, :-1].float().log_softmax(dim=-1)


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
    device = next(iter(model.parameters())).device
    for batch_places in batches_by_length(lengths, batch_size, longest_first=False):
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
