"""Generation: answers of the model, steered or not. One decode loop for one condition or for a sweep of many."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, append_jsonl, key_of, read_jsonl
from workbench.generation._decode_loop import DecodeLoop, Row, rows_that_fit
from workbench.models.load import model_info
from workbench.models.tokens import Encoded, decode, encode, template_text
from workbench.steering.interventions import Intervention, check_interventions, description

if TYPE_CHECKING:
    from workbench.models.load import HookedModel
    from workbench.prompts.prompt import Prompt


UNSTEERED = "unsteered"


Condition = Sequence[Intervention] | Mapping[str, Sequence[Intervention]]
"""What is done to the model: interventions for every prompt, or a mapping that names them by prompt id or by category (prompts
with neither stay unsteered)."""


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        prompt: What was asked.
        text: The answer, without special tokens.
        tokens: Its token ids, without the one that ended it.
        finish: "eos" if the model ended it, "length" if max_new_tokens did.
        condition: Name of what was done to the model.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    finish: Literal["eos", "length"]
    condition: str


def generate(
    model: HookedModel,
    prompts: Sequence[Prompt],
    interventions: Condition = (),
    *,
    condition: str = UNSTEERED,
    max_new_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.0,
    batch_size: int | None = None,
    system_prompt: str | None = None,
    output: PathLike | None = None,
    progress: bool = False,
    transfer: bool = False,
    continue_response: bool = False,
) -> list[Completion]:
    """Answer prompts under one condition; see ``sweep`` for several at once, and for the arguments.

    Args:
        model: A hooked model.
        prompts: What to answer.
        interventions: What is done meanwhile; nothing by default.
        condition: Name of it in the results.
        max_new_tokens: Length limit of an answer; this and the following are the arguments of ``sweep``.
        seed: For sampling.
        temperature: 0 takes the most likely token.
        batch_size: Rows a batch, at most.
        system_prompt: Words for the system turn.
        output: A jsonl file that keeps every answer as soon as it is there.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Go on from each prompt's ``response``.

    Returns:
        One completion a prompt, in order.
    """
    if condition == UNSTEERED and interventions:
        condition = "steered"
    return sweep(
        model,
        prompts,
        {condition: interventions},
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        batch_size=batch_size,
        system_prompt=system_prompt,
        output=output,
        progress=progress,
        transfer=transfer,
        continue_response=continue_response,
    )


def sweep(
    model: HookedModel,
    prompts: Sequence[Prompt],
    conditions: Mapping[str, Condition],
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.0,
    batch_size: int | None = None,
    system_prompt: str | None = None,
    output: PathLike | None = None,
    progress: bool = False,
    transfer: bool = False,
    continue_response: bool = False,
) -> list[Completion]:
    """Answer prompts under several conditions, as rows of common batches.

    The template prefix is computed once a condition, rows that have ended are dropped, and every condition draws the same random numbers
    for a prompt, so that comparisons are paired.

    Args:
        model: A hooked model.
        prompts: What to answer.
        conditions: Name to interventions: a list for every prompt, or a mapping from category (or prompt id) to such a list.
        max_new_tokens: Length limit of an answer.
        seed: For sampling: the same seed, prompt and step give the same random number in any batch.
        temperature: 0 takes the most likely token, else the distribution is sampled at this temperature.
        batch_size: Rows (prompts x conditions) a batch, at most; by default as many as have room for their keys and values in 1 GiB, up to 96.
        system_prompt: Words for the system turn.
        output: A jsonl file that keeps every answer as soon as it is there; a second call with the same model, prompts, conditions and
            settings goes on from it, whatever else is in the file.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Go on from each prompt's ``response`` as the words the answer has begun with; the completion is what follows.

    Returns:
        Completions, condition by condition, prompts in order.

    Raises:
        ValueError: If an argument is out of range or an intervention does not fit the model.
    """
    if max_new_tokens < 1 or (batch_size is not None and batch_size < 1) or temperature < 0:
        given = f"{max_new_tokens}, {batch_size}, {temperature}"
        raise ValueError(
            f"max_new_tokens and batch_size must be at least 1 and temperature at least 0, got {given}."
        )
    if not prompts or not conditions:
        raise ValueError("nothing to answer: give at least one prompt and one condition.")
    most_common, times = Counter(prompt.id for prompt in prompts).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"prompt {most_common!r} comes {times} times; ids must be unique in a set."
        )
    encoded = encode(
        model,
        prompts,
        with_response=continue_response,
        system_prompt=system_prompt,
        max_new_tokens=max_new_tokens,
    )
    settings = {
        "model": model_info(model).fingerprint,
        "template": template_text(model, system_prompt),
        "max_new_tokens": max_new_tokens,
        "seed": seed if temperature else None,
        "temperature": temperature,
    }
    rows, groups = _rows(model, encoded, conditions, settings, transfer, kept=output is not None)
    done = _read_output(output, {row.key for row in rows})
    fitting, each = rows_that_fit(model, max(len(row.encoded.ids) for row in rows) + max_new_tokens)
    batch_size = batch_size or fitting
    # The batches are those of an uninterrupted run, so that a resumed run has the same rounding, and so the same text.
    order = sorted(
        range(len(rows)), key=lambda i: (-len(rows[i].encoded.ids), rows[i].encoded.prompt.id)
    )
    batches = [
        [rows[i] for i in order[start : start + batch_size]]
        for start in range(0, len(order), batch_size)
    ]
    waiting = [batch for batch in batches if any(row.key not in done for row in batch)]

    from tqdm.auto import tqdm

    if progress and waiting:
        most, mebibytes = sum(map(len, waiting)), max(map(len, waiting)) * each // 2**20
        tqdm.write(
            f"{most} answers of at most {max_new_tokens} tokens in {len(waiting)} batches; keys and values take up to {mebibytes} MiB.",
            file=sys.stderr,
        )
    loop = DecodeLoop(model, groups, max_new_tokens, temperature, seed, transfer)
    with (
        tqdm(total=len(rows), desc="answers", unit="answer", disable=not progress) as bar,
        torch.no_grad(),
    ):
        bar.update(len(rows) - sum(len(batch) for batch in waiting))
        if waiting:
            loop.share_prefix([row.encoded for row in rows], batch_size)
        for batch in waiting:
            new = []
            for row, (tokens, finish) in zip(batch, loop.run(batch), strict=True):
                if row.key not in done:
                    done[row.key] = {
                        "text": decode(model, tokens),
                        "tokens": tokens,
                        "finish": finish,
                    }
                    names = {
                        "key": row.key,
                        "prompt_id": row.encoded.prompt.id,
                        "condition": row.condition,
                    }
                    new.append(names | done[row.key])
            if output is not None:
                append_jsonl(output, new)
            bar.update(len(batch))
    answers = ((row, done[row.key]) for row in rows)
    return [
        Completion(
            row.encoded.prompt, own["text"], tuple(own["tokens"]), own["finish"], row.condition
        )
        for row, own in answers
    ]


def _rows(
    model: HookedModel,
    encoded: Sequence[Encoded],
    conditions: Mapping[str, Condition],
    settings: dict[str, Any],
    transfer: bool,
    *,
    kept: bool,
) -> tuple[list[Row], list[list[Intervention]]]:
    """One row a condition and prompt, and the distinct lists of interventions that they point to."""
    groups: list[list[Intervention]] = [[]]
    rows = []
    for name, condition in conditions.items():
        by_owner = condition if isinstance(condition, Mapping) else {None: condition}
        lists = {owner: list(interventions) for owner, interventions in by_owner.items()}
        group_of, description_of = {}, {}
        known = {row.prompt.id for row in encoded} | {row.prompt.category for row in encoded}
        if isinstance(condition, Mapping) and any(lists.values()) and known.isdisjoint(lists):
            given = str(next(iter(lists)))
            raise ValueError(
                f"condition {name!r} would steer nothing: no prompt has id or category {given!r}.{did_you_mean(given, known)}"
            )
        for owner, interventions in lists.items():
            check_interventions(model, interventions, transfer=transfer)
            if any(intervention.rows is not None for intervention in interventions):
                raise ValueError(
                    f"condition {name!r} names rows of a batch, but generation makes its own batches; "
                    "give a mapping from prompt id (or category) to interventions."
                )
            description_of[owner] = (
                [description(intervention) for intervention in interventions] if kept else []
            )
            group_of[owner] = len(groups) if interventions else 0
            if interventions:
                groups.append(interventions)
        for row in encoded:
            own = next(
                (name for name in (row.prompt.id, row.prompt.category) if name in group_of), None
            )
            begun = [row.prompt.response] if row.response[1] > row.response[0] else []
            key = key_of(
                [
                    settings,
                    row.prompt.id,
                    row.prompt.text,
                    name,
                    description_of.get(own, []),
                    *begun,
                ]
            )
            rows.append(Row(row, name, group_of.get(own, 0), key))
    return rows, groups


def _read_output(output: PathLike | None, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Answers of earlier calls, by key."""
    if output is None or not Path(output).exists():
        return {}
    return {
        row["key"]: row for row in read_jsonl(output, cut_last=True) if row.get("key") in wanted
    }
