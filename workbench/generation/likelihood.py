"""Say how likely the model, as it is or as it is steered, finds given answers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from workbench.models.batches import batches_by_length, pad, pad_ids, share_prefix, span_mask
from workbench.models.forward import last_logits
from workbench.models.tokens import Encoded, encode, pad_id
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.generation.answers import Completion
    from workbench.models.hooked_model import HookedModel
    from workbench.steering.interventions import Intervention


def answer_log_probs(
    model: HookedModel,
    completions: Sequence[Completion],
    *,
    system_prompt: str | None = None,
    batch_size: int = 16,
) -> list[Float[Tensor, " token"]]:
    """Return the log-probability of each token of each answer behind its prompt (teacher forced).

    Args:
        model: A hooked model; without interventions this scores steered answers under the
            unsteered model. Inside ``intervene`` prompt and answer are one pass, all of it
            positions "prompt": use interventions at "all" positions, for every row.
        completions: Answers, by their token ids.
        system_prompt: Words for the system turn.
        batch_size: Rows per batch; logits are kept for the answers' tokens only.

    Returns:
        One float32 vector per answer, on the CPU, natural logarithms; empty for an empty answer.
    """
    scored: list[Tensor] = [torch.zeros(0) for _ in completions]
    rows = _with_answers(model, completions, system_prompt)
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
    model: HookedModel, completions: Sequence[Completion], system_prompt: str | None
) -> list[Encoded]:
    """Encode every prompt with the answer's own token ids behind it."""
    prompts = [completion.prompt for completion in completions]
    rows = []
    for encoded, completion in zip(
        encode(model, prompts, system_prompt=system_prompt), completions, strict=True
    ):
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
    batch_size: int = 24,
    transfer: bool = False,
) -> list[Float[Tensor, " token"]]:
    """Return the log-probability of each token of each answer while the model is steered.

    The answers' tokens count as generated ones, and gates work.

    Args:
        model: A hooked model.
        completions: Answers, by their token ids.
        interventions: Those of each completion, in order.
        batch_size: Rows per batch.
        transfer: Allow vectors of another model of the same architecture.

    Returns:
        One float32 vector per answer, on the CPU, natural logarithms; empty for an empty answer.

    Raises:
        ValueError: If there is not one entry per completion.
    """
    _check_one_each("interventions", interventions, completions)
    scored: list[Tensor] = [torch.zeros(0) for _ in completions]
    for places, real, tokens, run in _fixed_answers(model, completions, batch_size, transfer):
        log_probs = run(interventions).gather(2, tokens[..., None])[..., 0].cpu()
        for row, i in enumerate(places):
            scored[i] = log_probs[row, : int(real[row].sum())].clone()
    return scored


def answer_kl(
    model: HookedModel,
    completions: Sequence[Completion],
    conditions: Mapping[str, Sequence[Sequence[Intervention]]],
    *,
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
    sums, n_tokens = dict.fromkeys(conditions, 0.0), 0
    for _, real, _, run in _fixed_answers(model, completions, batch_size, transfer):
        base = run([() for _ in completions])
        for name, interventions in conditions.items():
            apart = (base.exp() * (base - run(interventions))).sum(dim=-1)
            sums[name] += float(apart[real].sum())
        n_tokens += int(real.sum())
    return {name: total / n_tokens for name, total in sums.items()}


def _fixed_answers(
    model: HookedModel, completions: Sequence[Completion], batch_size: int, transfer: bool
) -> Iterator[
    tuple[list[int], Tensor, Tensor, Callable[[Sequence[Sequence[Intervention]]], Tensor]]
]:
    """Yield batches of answers behind their prompts.

    Each has the places of its answers, which tokens are real, the tokens, and a function from the
    interventions of all completions to log-probabilities.
    """
    rows = encode(model, [completion.prompt for completion in completions])
    answered = [i for i, completion in enumerate(completions) if completion.tokens]
    lengths = [len(rows[i].ids) for i in answered]
    device = next(iter(model.parameters())).device
    for places in batches_by_length(lengths, batch_size, longest_first=False):
        batch_places = [answered[place] for place in places]
        asked = [rows[i] for i in batch_places]
        prompt = pad(asked, pad_id=pad_id(model), side="left", device=device)
        tokens, real = (
            tensor.to(device)
            for tensor in pad_ids(
                [completions[i].tokens for i in batch_places], pad_id=pad_id(model), side="right"
            )
        )
        both, mask = (
            torch.cat([prompt.tokens, tokens], dim=1),
            torch.cat([prompt.mask, real], dim=1),
        )
        content, n_prompt = span_mask(asked, prompt, "content"), prompt.tokens.shape[1]

        def run(
            interventions: Sequence[Sequence[Intervention]],
            batch_places: Sequence[int] = batch_places,
            both: Tensor = both,
            mask: Tensor = mask,
            content: Tensor = content,
            n_prompt: int = n_prompt,
        ) -> Tensor:
            changes = [
                one.for_rows([row])
                for row, i in enumerate(batch_places)
                for one in interventions[i]
            ]
            steered = intervene(
                model, changes, prompt_length=n_prompt, content=content, transfer=transfer
            )
            with torch.no_grad(), steered:
                logits, _ = last_logits(model, both, mask, both.shape[1] - n_prompt + 1)
            return logits[:, :-1].float().log_softmax(dim=-1)

        yield batch_places, real, tokens, run


def _check_one_each(what: str, given: Sequence[object], completions: Sequence[Completion]) -> None:
    if len(given) != len(completions):
        raise ValueError(
            f"{what} needs one entry for each of {len(completions)} answers, got {len(given)}."
        )
