"""Answer prompts with a model, steered or not: one condition at a time or a sweep of many."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, append_jsonl, key_of, local_path, read_jsonl
from workbench.generation._conditions import check_condition, check_gates, check_reached
from workbench.generation._decode_loop import Decoded, DecodeLoop, Row
from workbench.generation._elsewhere import Writer, answer_elsewhere
from workbench.generation._endings import Endings, Finish
from workbench.generation._memory import rows_that_fit, weight_bytes
from workbench.generation.decoding import GREEDY, Decoding
from workbench.models.batches import batches_by_length, widths_to_keep_apart
from workbench.models.elsewhere import carried
from workbench.models.load import model_info
from workbench.models.progress import progress_bar, say
from workbench.models.tokens import Encoded, encode, template_text
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import Intervention, description

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike


UNSTEERED = "unsteered"
"""Name of the condition in which nothing is done to the model."""


Condition = Sequence[Intervention] | Mapping[str, Sequence[Intervention]]
"""What is done to the model: interventions for every prompt, or a mapping that names them by
prompt id or by category (prompts with neither stay unsteered). A prompt of several categories gets
those of the first one that is named, the main one before the others."""


@dataclass(frozen=True)
class LogProbs:
    """Hold log-probabilities of an answer's tokens, and whose they are.

    Attributes:
        values: Natural logarithms, at temperature 1 and among all tokens.
        of: Key of the model and of the template behind which it answered (``asked_key``).
    """

    values: tuple[float, ...]
    of: str


def asked_key(model: HookedModel, asked_by: Mapping[str, Any]) -> str:
    """Make the key of a model and of the words around what it is asked."""
    return key_of([model_info(model).fingerprint, template_text(model, **asked_by)])


@dataclass(frozen=True)
class Completion:
    """Hold one answer and how it ended.

    Attributes:
        prompt: What was asked.
        text: The answer, without special tokens and without thoughts.
        tokens: Token ids of all that the model wrote, its thoughts too, without the one that ended
            it.
        finish: "eos" if the model ended it, "length" if max_new_tokens did, "stop" if a stop text
            did.
        condition: Name of what was done to the model.
        thinking: What the model thought before it answered; empty for most models.
        sample: Number of the answer among those to the same prompt, from 0.
        log_probs: Log-probability of each token as the unsteered model chose it; None where it was
            steered, or where nobody knows.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    finish: Finish
    condition: str
    thinking: str = ""
    sample: int = 0
    log_probs: LogProbs | None = field(default=None, compare=False, repr=False)

    @property
    def is_cut_in_thoughts(self) -> bool:
        """Whether max_new_tokens ended it before the answer began: there is nothing to judge."""
        return self.finish == "length" and bool(self.thinking) and not self.text.strip()


def generate(
    model: HookedModel,
    prompts: PromptsLike,
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
        prompts: What to answer, in any form that ``as_prompts`` reads: a text, messages, ...
        interventions: What is done to the model meanwhile; nothing by default.
        decoding: Length, sampling, stops, batch size, system prompt and template keywords.
        condition: Name of the interventions in the results; "steered" if there are some and no
            name is given.
        output: As in ``sweep``, like the arguments that follow.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Go on from each prompt's ``response``.

    Returns:
        One completion per prompt, in order; with several samples those of a prompt come together.
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


@carried
def sweep(
    model: HookedModel,
    prompts: PromptsLike,
    conditions: Mapping[str, Condition],
    decoding: Decoding = GREEDY,
    *,
    output: PathLike | None = None,
    progress: bool = False,
    transfer: bool = False,
    continue_response: bool = False,
    writer: Writer | None = None,
) -> list[Completion]:
    """Answer prompts under several conditions, as rows of common batches.

    What all prompts begin with is computed once per condition (where they have two beginnings, such
    as two system prompts, each of them), rows that have ended are dropped, and all conditions draw
    the same random numbers for a prompt, so that comparisons are paired.

    Args:
        model: A hooked model.
        prompts: What to answer, in any form that ``as_prompts`` reads: a text, messages, ...
        conditions: Name to interventions, for every prompt or by category (or prompt id).
        decoding: Length, sampling, stops, batch size, system prompt and template keywords.
        output: A jsonl file that keeps every answer as soon as it is there. A second call with the
            same model, prompts, conditions and settings goes on from it, whatever else it holds.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Take each prompt's ``response`` as the answer's beginning; the
            completion is what follows it.
        writer: What writes the answers, where that is another engine than this process.

    Returns:
        Completions, condition by condition, prompts in order, sample by sample.

    Raises:
        ValueError: If there is nothing to answer, or an intervention does not fit.
        RuntimeError: If interventions reached no position (a closed gate is no error).
    """
    return sweep_further(
        model,
        prompts,
        conditions,
        decoding,
        settled=lambda _condition, _prompt_id: False,
        output=output,
        progress=progress,
        transfer=transfer,
        continue_response=continue_response,
        writer=writer,
    )


def sweep_further(
    model: HookedModel,
    prompts: PromptsLike,
    conditions: Mapping[str, Condition],
    decoding: Decoding,
    *,
    settled: Callable[[str, str], bool],
    output: PathLike | None,
    progress: bool = False,
    transfer: bool = False,
    continue_response: bool = False,
    writer: Writer | None = None,
) -> list[Completion]:
    """Answer as ``sweep`` does what earlier calls with the same file left open.

    An interrupted ``sweep`` writes whole batches again, so that rounding is as it was. What an
    earlier call has settled is in no batch of this one.

    Args:
        model: A hooked model, like the arguments that follow as in ``sweep``.
        prompts: What to answer.
        conditions: Name to interventions.
        decoding: Length, sampling, stops, batch size, system prompt and template keywords.
        settled: Whether an earlier call answered a prompt, by its id, under a condition, by its
            name. An answer that the file does not have is written nevertheless.
        output: The jsonl file of all calls.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        continue_response: Go on from each prompt's ``response``.
        writer: What writes the answers, where that is another engine than this process.

    Returns:
        Completions of all prompts under all conditions, as ``sweep`` gives them.
    """
    if not isinstance(decoding, Decoding):
        raise TypeError(f"decoding must be a wb.Decoding, got {decoding!r:.60}.")
    prompts = _checked_prompts(prompts, conditions)
    room: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, **decoding.asked_by}
    encoded = encode(model, prompts, with_response=continue_response, **room)
    keyed: dict[str, Any] = {"with_keys": output is not None, "engine": writer and writer.name}
    rows, groups = _rows(model, encoded, conditions, decoding, transfer, **keyed)
    endings = Endings.of(model, decoding, continue_response=continue_response)
    answers = _read_output(output, {row.key for row in rows})
    if writer is None:
        loop = DecodeLoop(model, groups, decoding, transfer, endings)
        earlier = {row.key for row in rows if settled(row.condition, row.encoded.prompt.id)}
        _answer_missing(loop, rows, answers, output, earlier & answers.keys(), progress=progress)
    else:
        make = partial(_answer, endings=endings), _give
        asked = groups, _rows_alike(rows), answers, decoding
        answer_elsewhere(writer, *asked, *make, output, progress=progress)
    check_reached(rows, groups, answers)
    of = asked_key(model, decoding.asked_by)
    completions = [_completion(row, answers[row.key], of) for row in rows]
    _warn_of_cut_thoughts(completions, decoding)
    return completions


def _completion(row: Row, answer: Mapping[str, Any], asked: str) -> Completion:
    log_probs = answer.get("log_probs")  # files of earlier versions have none
    return Completion(
        row.encoded.prompt,
        answer["text"],
        tuple(answer["tokens"]),
        answer["finish"],
        row.condition,
        answer.get("thinking", ""),
        row.sample,
        None if log_probs is None else LogProbs(tuple(log_probs), asked),
    )


def _warn_of_cut_thoughts(completions: Sequence[Completion], decoding: Decoding) -> None:
    n_cut = sum(completion.is_cut_in_thoughts for completion in completions)
    if n_cut:
        warnings.warn(
            f"{n_cut} of {len(completions)} answers were cut at {decoding.max_new_tokens} tokens "
            "while the model was still thinking: they are empty and cannot be scored; raise "
            "max_new_tokens, or switch thinking off with template_keywords where the template can.",
            stacklevel=3,
        )


def _checked_prompts(given: PromptsLike, conditions: Mapping[str, Condition]) -> list[Prompt]:
    prompts = as_prompts(given)
    if not isinstance(conditions, Mapping):
        raise TypeError(
            f"conditions must be a mapping from names to interventions, got {conditions!r:.60}."
        )
    if not prompts or not conditions:
        raise ValueError("nothing to answer: give at least one prompt and one condition.")
    prompt_id, times = Counter(prompt.id for prompt in prompts).most_common(1)[0]
    if times > 1:
        raise ValueError(f"prompt {prompt_id!r} comes {times} times; ids must be unique in a set.")
    return prompts


def check_conditions(given: PromptsLike, conditions: Mapping[str, Condition]) -> list[Prompt]:
    """Check of prompts and conditions what needs no model, as ``sweep`` does; return the prompts.

    Raises:
        ValueError: If there is nothing to answer, or a condition names no prompt.
    """
    prompts = _checked_prompts(given, conditions)
    known_owners = {prompt.id for prompt in prompts}
    known_owners |= {name for prompt in prompts for name in prompt.categories}
    for name, condition in conditions.items():
        _lists_by_owner(name, condition, known_owners)
    return prompts


def _answer_missing(
    loop: DecodeLoop,
    rows: Sequence[Row],
    answers: dict[str, dict[str, Any]],
    output: PathLike | None,
    settled: Set[str],
    *,
    progress: bool,
) -> None:
    """Answer the rows that have no answer yet, batch by batch, and keep each batch at once.

    The batches are those of an uninterrupted run, so that a resumed run has the same rounding,
    and so the same text. Rows whose keys are ``settled`` were in batches of an earlier call.
    """
    alike = _rows_alike(rows)
    copies = []
    for members in alike:
        known = next((answers[row.key] for row in members if row.key in answers), None)
        copies += _give(known, members, answers) if known else []
    if output is not None and copies:
        append_jsonl(output, copies)
    alike = [members for members in alike if settled.isdisjoint(row.key for row in members)]
    members_of = {members[0].key: members for members in alike}
    distinct = [members[0] for members in alike]
    parts = _parts(loop, distinct, answers)
    n_waiting = sum(len(batch) for part in parts for batch in part.batches)
    if not n_waiting:
        return
    _announce(loop, parts, show=progress)
    n_done = len(distinct) - n_waiting
    with (
        progress_bar(len(distinct), "answers", "answer", show=progress, done=n_done) as bar,
        torch.no_grad(),
    ):
        for part in parts:
            loop.share_prefix(part.encoded, max(map(len, part.batches)))
            for batch in part.batches:
                lines = []
                for row, decoded in zip(batch, loop.run(batch), strict=True):
                    if row.key not in answers:
                        record = _answer(decoded, loop.endings)
                        lines += _give(record, members_of[row.key], answers)
                if output is not None:
                    append_jsonl(output, lines)
                bar.update(len(batch))


class _Part(NamedTuple):
    """Hold rows that share a beginning.

    Attributes:
        encoded: All of them, those that are answered too: so a resumed run shares the same.
        batches: Those that wait for answers, with the rest of their batches.
        n_bytes: Keys, values and logits of the largest batch.
    """

    encoded: list[Encoded]
    batches: list[list[Row]]
    n_bytes: int


def _parts(loop: DecodeLoop, rows: Sequence[Row], answers: Mapping[str, Any]) -> list[_Part]:
    """Cut the rows into parts that share a beginning, and these into batches."""
    parts = []
    for places in loop.parts([row.encoded for row in rows]):
        of_part = [rows[place] for place in places]
        encoded = [row.encoded for row in of_part]
        n_prefixes = loop.plan_prefix(encoded)
        waiting, n_bytes = [], 0
        for batch in _batches(loop, of_part, n_prefixes):
            if any(row.key not in answers for row in batch):
                waiting.append(batch)
                n_bytes = max(n_bytes, len(batch) * loop.row_bytes(batch[0].encoded).kept)
        if waiting:
            parts.append(_Part(encoded, waiting, n_bytes))
    return parts


def _announce(loop: DecodeLoop, parts: Sequence[_Part], *, show: bool) -> None:
    """Say how many answers there will be, in which batches, and what memory these take."""
    batches = [batch for part in parts for batch in part.batches]
    taken, budget, weights = (
        n_bytes // 2**20
        for n_bytes in (
            max(part.n_bytes for part in parts),
            loop.memory,
            weight_bytes(loop.model),
        )
    )
    allowed = "" if loop.decoding.batch_size else f" of {budget} MiB allowed"
    say(
        f"{sum(map(len, batches))} answers of at most {loop.max_new_tokens} tokens in "
        f"{len(batches)} batches of up to {max(map(len, batches))} rows; keys, values and logits "
        f"take up to {taken} MiB{allowed}, beside {weights} MiB of weights.",
        show=show,
    )


def _rows_alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Put together the rows that ask for one and the same answer.

    They are the same sample of one prompt under lists of interventions that do the same, such as
    none behind a closed gate. In 16 bit a row of another batch may be written otherwise, so one
    answer is written for all of them.
    """
    alike: dict[Hashable, list[Row]] = {}
    for row in rows:
        asked = row.encoded.prompt.id, row.encoded.ids, row.group, row.sample
        alike.setdefault(asked, []).append(row)
    return list(alike.values())


def _give(
    record: dict[str, Any], members: Sequence[Row], answers: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Give a record to the rows that have none; return the lines that keep it for them."""
    lines = []
    for row in members:
        if row.key not in answers:
            answers[row.key] = record
            of_row = {
                "key": row.key,
                "prompt_id": row.encoded.prompt.id,
                "condition": row.condition,
                "sample": row.sample,
            }
            lines.append(of_row | {k: v for k, v in record.items() if k not in of_row})
    return lines


def _answer(decoded: Decoded, endings: Endings) -> dict[str, Any]:
    """Make the record of an answer: cut where it ends, with the log-probabilities that are left."""
    answer = endings.written(decoded.tokens, decoded.finish)._asdict()
    if decoded.log_probs is not None:
        left = decoded.log_probs[: len(answer["tokens"])]
        answer["log_probs"] = [round(value, 6) for value in left]
    return answer


def _batches(loop: DecodeLoop, rows: Sequence[Row], n_prefixes: int) -> Iterator[list[Row]]:
    """Cut the rows into batches of similar length, longest first, as large as memory allows."""
    lengths = [len(row.encoded.ids) for row in rows]
    ids = [row.encoded.prompt.id for row in rows]
    alike = widths_to_keep_apart(loop.model, lengths)
    for group in batches_by_length(lengths, len(rows), ties=ids, alike=alike):
        while group:
            size = loop.decoding.batch_size or rows_that_fit(
                loop.model,
                loop.memory,
                loop.row_bytes(rows[group[0]].encoded),
                n_prefixes=n_prefixes,
            )
            yield [rows[i] for i in group[:size]]
            group = group[size:]


def _rows(
    model: HookedModel,
    encoded: Sequence[Encoded],
    conditions: Mapping[str, Condition],
    decoding: Decoding,
    transfer: bool,
    *,
    with_keys: bool,
    engine: str | None,
) -> tuple[list[Row], list[list[Intervention]]]:
    """Make a row per condition and prompt, and the lists of interventions the rows point to.

    A row's key says everything that decides its answer; without ``with_keys`` (no file keeps
    the answers) the interventions are left out of it.
    """
    settings = _settings(model, decoding) | ({} if engine is None else {"engine": engine})
    known_owners = {row.prompt.id for row in encoded}
    known_owners |= {name for row in encoded for name in row.prompt.categories}
    groups: list[list[Intervention]] = [[]]  # group 0: nothing is done
    group_of_list: dict[Any, int] = {(): 0}  # lists that do the same share a group
    rows = []
    for name, condition in conditions.items():
        lists = _lists_by_owner(name, condition, known_owners)
        group_of, description_of = {}, {}
        for owner, interventions in lists.items():
            check_condition(model, name, interventions, decoding, transfer)
            check_gates(name, interventions, decoding)
            description_of[owner] = [description(one) for one in interventions] if with_keys else []
            does = _what_is_done(interventions)
            group_of[owner] = group_of_list.setdefault(does, len(groups))
            if group_of[owner] == len(groups):
                groups.append(interventions)
        for row in encoded:
            # A prompt's own list comes before its main category's, and that before the others'.
            candidates = (row.prompt.id, *row.prompt.categories)
            owner = next((candidate for candidate in candidates if candidate in group_of), None)
            begun: list[Any] = [row.prompt.response] if row.response[1] > row.response[0] else []
            before = [[message.role, message.content] for message in row.prompt.history]
            begun += [before] if before else []
            what_is_done = description_of.get(owner, [])
            what = [settings, row.prompt.id, row.prompt.text, name, what_is_done, *begun]
            for sample in range(decoding.n_samples):
                key = key_of([*what, {"sample": sample}] if sample else what)
                rows.append(Row(row, name, group_of.get(owner, 0), key, sample))
    return rows, groups


def _what_is_done(interventions: Sequence[Intervention]) -> Hashable:
    """Return what tells a list of interventions from one that does something else."""
    described: list[Hashable] = []
    for one in interventions:
        try:
            # Two classes may have one name, and the same numbers in them.
            described.append((type(one.edit), key_of(description(one))))
        except ValueError:  # an edit that nothing tells from another but itself
            described.append(id(one.edit))
            extent = (one.positions, one.until, one.decay)
            described.append((one.site, *extent, id(one.gate), one.gate_category))
    return tuple(described)


def _settings(model: HookedModel, decoding: Decoding) -> dict[str, Any]:
    """Collect everything beside prompt and interventions that decides an answer."""
    sampled = decoding.temperature > 0
    # Only where they are given, so that a file of answers stays good for settings without them.
    further = {"top_k": decoding.top_k if sampled else None, "stop": list(decoding.stop) or None}
    return {name: value for name, value in further.items() if value is not None} | {
        "model": model_info(model).fingerprint,
        "template": template_text(model, **decoding.asked_by),
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


def _read_output(output: PathLike | None, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Read the answers of earlier calls, by key."""
    if output is None or not local_path(output).exists():
        return {}
    return {
        row["key"]: row for row in read_jsonl(output, cut_last=True) if row.get("key") in wanted
    }
