"""Answer prompts with a model, steered or not: one condition at a time or a sweep of many."""

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
from workbench.generation.decoding import GREEDY, Decoding
from workbench.models.batches import batches_by_length
from workbench.models.load import model_info
from workbench.models.tokens import Encoded, decode, encode, template_text
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import Intervention, check_interventions, description

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel


UNSTEERED = "unsteered"
"""Name of the condition in which nothing is done to the model."""


Condition = Sequence[Intervention] | Mapping[str, Sequence[Intervention]]
"""What is done to the model: interventions for every prompt, or a mapping that names them by
prompt id or by category (prompts with neither stay unsteered)."""


@dataclass(frozen=True)
class Completion:
    """Hold one answer and how it ended.

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
    decoding: Decoding = GREEDY,
    *,
    condition: str = UNSTEERED,
    output: PathLike | None = None,
    progress: bool = False,
    transfer: bool = False,
    continue_response: bool = False,
) -> list[Completion]:
    """Answer prompts under one condition; ``sweep`` answers them under several at once.

    Args:
        model: A hooked model.
        prompts: Prompts to answer.
        interventions: What is done to the model meanwhile; nothing by default.
        decoding: Length, sampling, batch size and system prompt.
        condition: Name of the interventions in the results; "steered" if there are some and no
            name is given.
        output: As in ``sweep``, like the arguments that follow.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Go on from each prompt's ``response``.

    Returns:
        One completion per prompt, in order.
    """
    if condition == UNSTEERED and interventions:
        condition = "steered"
    return sweep(
        model,
        prompts,
        {condition: interventions},
        decoding,
        output=output,
        progress=progress,
        transfer=transfer,
        continue_response=continue_response,
    )


def sweep(
    model: HookedModel,
    prompts: Sequence[Prompt],
    conditions: Mapping[str, Condition],
    decoding: Decoding = GREEDY,
    *,
    output: PathLike | None = None,
    progress: bool = False,
    transfer: bool = False,
    continue_response: bool = False,
) -> list[Completion]:
    """Answer prompts under several conditions, as rows of common batches.

    The template prefix is computed once per condition, rows that have ended are dropped, and all
    conditions draw the same random numbers for a prompt, so that comparisons are paired.

    Args:
        model: A hooked model.
        prompts: Prompts to answer.
        conditions: Name to interventions, for every prompt or by category (or prompt id).
        decoding: Length, sampling, batch size and system prompt.
        output: A jsonl file that keeps every answer as soon as it is there. A second call with the
            same model, prompts, conditions and settings goes on from it, whatever else it holds.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Take each prompt's ``response`` as the answer's beginning; the
            completion is what follows it.

    Returns:
        Completions, condition by condition, prompts in order.

    Raises:
        ValueError: If there is nothing to answer, or an intervention does not fit.
        RuntimeError: If interventions reached no position (a closed gate is no error).
    """
    _check_prompts(prompts, conditions)
    encoded = encode(
        model,
        prompts,
        with_response=continue_response,
        system_prompt=decoding.system_prompt,
        max_new_tokens=decoding.max_new_tokens,
    )
    rows, groups = _rows(
        model, encoded, conditions, decoding, transfer, with_keys=output is not None
    )
    answers = _read_output(output, {row.key for row in rows})
    loop = DecodeLoop(model, groups, decoding, transfer)
    _answer_missing(loop, rows, answers, output, progress=progress)
    _check_reached(rows, groups, answers)
    return [
        Completion(
            row.encoded.prompt,
            answers[row.key]["text"],
            tuple(answers[row.key]["tokens"]),
            answers[row.key]["finish"],
            row.condition,
        )
        for row in rows
    ]


def _check_prompts(prompts: Sequence[Prompt], conditions: Mapping[str, Condition]) -> None:
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise TypeError(
                f"prompts must be wb.Prompt objects, got {prompt!r:.60}; ask a question of your "
                "own with wb.side_by_side(model, question, interventions), or make it a wb.Prompt."
            )
    if not isinstance(conditions, Mapping):
        raise TypeError(
            f"conditions must be a mapping from names to interventions, got {conditions!r:.60}."
        )
    if not prompts or not conditions:
        raise ValueError("nothing to answer: give at least one prompt and one condition.")
    prompt_id, times = Counter(prompt.id for prompt in prompts).most_common(1)[0]
    if times > 1:
        raise ValueError(f"prompt {prompt_id!r} comes {times} times; ids must be unique in a set.")


def _answer_missing(
    loop: DecodeLoop,
    rows: Sequence[Row],
    answers: dict[str, dict[str, Any]],
    output: PathLike | None,
    *,
    progress: bool,
) -> None:
    """Answer the rows that have no answer yet, batch by batch, and keep each batch at once.

    The batches are those of an uninterrupted run, so that a resumed run has the same rounding,
    and so the same text.
    """
    from tqdm.auto import tqdm

    longest = max(len(row.encoded.ids) for row in rows) + loop.decoding.max_new_tokens
    rows_in_memory, bytes_per_row = rows_that_fit(loop.model, longest)
    batch_size = loop.decoding.batch_size or rows_in_memory
    batches = _batches(rows, batch_size)
    waiting = [batch for batch in batches if any(row.key not in answers for row in batch)]
    if not waiting:
        return
    n_waiting = sum(map(len, waiting))
    if progress:
        mebibytes = max(map(len, waiting)) * bytes_per_row // 2**20
        tqdm.write(
            f"{n_waiting} answers of at most {loop.decoding.max_new_tokens} tokens in "
            f"{len(waiting)} batches; keys and values take up to {mebibytes} MiB.",
            file=sys.stderr,
        )
    with (
        tqdm(total=len(rows), desc="answers", unit="answer", disable=not progress) as bar,
        torch.no_grad(),
    ):
        bar.update(len(rows) - n_waiting)
        loop.share_prefix([row.encoded for row in rows], batch_size)
        for batch in waiting:
            lines = []
            for row, (tokens, finish) in zip(batch, loop.run(batch), strict=True):
                if row.key in answers:
                    continue
                text = decode(loop.model, tokens)
                answers[row.key] = {"text": text, "tokens": tokens, "finish": finish}
                line = {
                    "key": row.key,
                    "prompt_id": row.encoded.prompt.id,
                    "condition": row.condition,
                }
                lines.append(line | answers[row.key])
            if output is not None:
                append_jsonl(output, lines)
            bar.update(len(batch))


def _batches(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Cut the rows into batches of similar length, longest first."""
    lengths = [len(row.encoded.ids) for row in rows]
    ids = [row.encoded.prompt.id for row in rows]
    batches = batches_by_length(lengths, batch_size, ties=ids)
    return [[rows[i] for i in batch] for batch in batches]


def _rows(
    model: HookedModel,
    encoded: Sequence[Encoded],
    conditions: Mapping[str, Condition],
    decoding: Decoding,
    transfer: bool,
    *,
    with_keys: bool,
) -> tuple[list[Row], list[list[Intervention]]]:
    """Make a row per condition and prompt, and the lists of interventions the rows point to.

    A row's key says everything that decides its answer; without ``with_keys`` (no file keeps
    the answers) the interventions are left out of it.
    """
    settings = _settings(model, decoding)
    known_owners = {row.prompt.id for row in encoded} | {row.prompt.category for row in encoded}
    groups: list[list[Intervention]] = [[]]  # group 0: nothing is done
    rows = []
    for name, condition in conditions.items():
        lists = _lists_by_owner(name, condition, known_owners)
        group_of, description_of = {}, {}
        for owner, interventions in lists.items():
            _check_condition(model, name, interventions, decoding, transfer)
            description_of[owner] = [description(one) for one in interventions] if with_keys else []
            group_of[owner] = len(groups) if interventions else 0
            if interventions:
                groups.append(interventions)
        for row in encoded:
            # A prompt's own list comes before its category's.
            candidates = (row.prompt.id, row.prompt.category)
            owner = next((candidate for candidate in candidates if candidate in group_of), None)
            begun = [row.prompt.response] if row.response[1] > row.response[0] else []
            what_is_done = description_of.get(owner, [])
            key = key_of([settings, row.prompt.id, row.prompt.text, name, what_is_done, *begun])
            rows.append(Row(row, name, group_of.get(owner, 0), key))
    return rows, groups


def _settings(model: HookedModel, decoding: Decoding) -> dict[str, Any]:
    """Collect everything beside prompt and interventions that decides an answer."""
    sampled = decoding.temperature > 0
    return {
        "model": model_info(model).fingerprint,
        "template": template_text(model, decoding.system_prompt),
        "max_new_tokens": decoding.max_new_tokens,
        "seed": decoding.seed if sampled else None,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p if sampled else None,
    }


def _lists_by_owner(
    name: str, condition: Condition, known_owners: set[str]
) -> dict[str | None, list[Intervention]]:
    """Map prompt ids or categories to a condition's interventions; None means every prompt."""
    if not isinstance(condition, Mapping | Sequence):
        raise TypeError(
            f"condition {name!r} must be a list of interventions, or a mapping to such lists, "
            f"got {condition!r:.60}; decoding settings are given as decoding=..."
        )
    if not isinstance(condition, Mapping):
        return {None: list(condition)}
    lists: dict[str | None, list[Intervention]] = {k: list(v) for k, v in condition.items()}
    if any(lists.values()) and known_owners.isdisjoint(condition):
        given = str(next(iter(condition)))
        raise ValueError(
            f"condition {name!r} would steer nothing: no prompt has id or category {given!r}."
            f"{did_you_mean(given, known_owners)}"
        )
    return lists


def _check_condition(
    model: HookedModel,
    name: str,
    interventions: Sequence[Intervention],
    decoding: Decoding,
    transfer: bool,
) -> None:
    check_interventions(model, interventions, transfer=transfer)
    for one in interventions:
        if not one.reaches(decoding.max_new_tokens - 1):
            raise ValueError(
                f"condition {name!r} would steer nothing at {one.site}: positions "
                f"{one.positions!r} until {one.until} with max_new_tokens="
                f"{decoding.max_new_tokens} reach no token that is read again; generate more "
                "tokens, or steer positions 'all'."
            )
    if any(intervention.rows is not None for intervention in interventions):
        raise ValueError(
            f"condition {name!r} names rows of a batch, but generation makes its own batches; "
            "give a mapping from prompt id (or category) to interventions."
        )


def _check_reached(
    rows: Sequence[Row],
    groups: Sequence[Sequence[Intervention]],
    answers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raise where interventions of a condition reached no position of any of its answers."""
    reached: dict[str, bool] = {}
    for row in rows:
        if not groups[row.group]:
            continue
        answer = answers[row.key]
        n_read = len(answer["tokens"]) + (answer["finish"] == "eos") - 1
        reaches = all(one.reaches(n_read) for one in groups[row.group])
        reached[row.condition] = reached.get(row.condition, False) or reaches
    silent = [name for name, is_reached in reached.items() if not is_reached]
    if silent:
        raise RuntimeError(
            f"condition {silent[0]!r} steered nothing: it means generated tokens alone, and every "
            "answer ended with its first one; steer positions 'all', or ask other prompts."
        )


def _read_output(output: PathLike | None, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Read the answers of earlier calls, by key."""
    if output is None or not Path(output).exists():
        return {}
    return {
        row["key"]: row for row in read_jsonl(output, cut_last=True) if row.get("key") in wanted
    }
