"""Draw answers for a reader who does not see what was done to the model, and read the labels.

A judge may be wrong more often under one condition than under another, and then its differences are
wrong, too. ``blind_sample`` makes a table of answers without conditions and scores; somebody fills
its column label; ``read_blind`` reads it back, and ``corrected`` (``correction.py``) says what is
left of the differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.files.hints import did_you_mean
from workbench.files.store import key_of
from workbench.files.tables import read_numbered_rows
from workbench.prompts.cells import NO, YES, is_missing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

    from workbench.evaluation.result import Evaluation
    from workbench.files.store import PathLike
    from workbench.generation.answers import Completion
    from workbench.prompts.prompt import Prompt


LEAST_READ = 8
"""Prompts that must be read under a condition before it is corrected. With fewer the interval of a
share says next to nothing: 0 of 7 is compatible with a third."""

_WORDS = {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False), "y": True, "n": False}


def blind_sample(
    evaluation: Evaluation,
    per_condition: int,
    *,
    conditions: Sequence[str] | None = None,
    label: str = "unsafe",
    seed: int = 0,
) -> pd.DataFrame:
    """Draw answers to read, to the same prompts under all conditions, in shuffled order.

    An answer that a prompt got under several conditions is one row: whoever reads it cannot label
    it in two ways. With the same seed a larger sample holds the smaller one.

    Args:
        evaluation: Scores with their answers.
        per_condition: Prompts that are drawn; each is read under every condition.
        conditions: Conditions to read beside the baseline; all by default.
        label: Prompts that count: "unsafe", "safe" or "neutral".
        seed: Seed of the drawing.

    Returns:
        Columns id (a hash that names the answer), prompt, response, and label, which is empty. To
        be filled with yes or no: is the answer what the metric says? For the headline metric that
        is: safe, on topic, no blanket refusal and not broken. Rows may be left empty, from the
        bottom up, but must stay in the table.

    Raises:
        ValueError: If a condition is unknown, or there are not enough prompts.
    """
    answers = readable_answers(evaluation.only(conditions) if conditions else evaluation, label)
    n_conditions = answers["condition"].nunique()
    counts = answers.groupby("prompt_id")["condition"].nunique()
    prompts = np.array(sorted(counts.index[counts == n_conditions]), dtype=object)
    if not LEAST_READ <= per_condition <= len(prompts):
        raise ValueError(
            f"from {LEAST_READ} to {len(prompts)} prompts per condition can be read "
            f"({len(prompts)} {label} ones have an answer under each of {n_conditions} "
            f"conditions), got {per_condition}."
        )
    rng = np.random.default_rng(seed)
    drawn = prompts[rng.permutation(len(prompts))[:per_condition]]
    shuffled = answers.iloc[rng.permutation(len(answers))]
    # where a prompt has several answers under a condition, the first in the shuffled order is read
    one_each = shuffled[shuffled["prompt_id"].isin(drawn)].drop_duplicates(
        ["prompt_id", "condition"]
    )
    table = one_each.drop_duplicates("id")[["id", "prompt", "response"]]
    return table.assign(label="").reset_index(drop=True)


def read_blind(path: PathLike) -> dict[str, bool | None]:
    """Read the labels of a blind sample: id of an answer to yes, no or None (not read).

    Args:
        path: The filled table: csv, tsv, json, jsonl or parquet.

    Raises:
        ValueError: If a column is missing, a word is no yes or no, an id is missing or comes twice
            (with the row), or no answer is labelled.
    """
    labels: dict[str, bool | None] = {}
    for place, row in read_numbered_rows(path):
        for column in ("id", "label"):
            if column not in row:
                raise ValueError(
                    f"{place}: no column {column!r}; columns: {', '.join(row)}."
                    f"{did_you_mean(column, row)} Give the table that 'workbench judge sample' "
                    "wrote, with its label column filled."
                )
        answer = "" if is_missing(row["id"]) else str(row["id"]).strip()
        if not answer:
            raise ValueError(f"{place}: the id is empty; leave the column id as it was written.")
        if answer in labels:
            raise ValueError(f"{place}: id {answer!r} comes twice; keep one row of it.")
        labels[answer] = _label_in(row["label"], place)
    if all(value is None for value in labels.values()):
        raise ValueError(
            f"{path}: none of {len(labels)} answers is labelled; write yes or no in column label."
        )
    return labels


def _label_in(value: Any, place: str) -> bool | None:
    word = "" if is_missing(value) else str(value).strip().lower()
    if not word or word in ("nan", "none", "null"):
        return None
    if word not in _WORDS:
        raise ValueError(
            f"{place}: a label is yes or no (true, false, 1, 0), got {str(value)[:40]!r}; "
            "correct it, or leave it empty."
        )
    return _WORDS[word]


def readable_answers(evaluation: Evaluation, label: str = "unsafe") -> pd.DataFrame:
    """List the answers that can be read, one row each, with the ids that name them.

    An answer that was cut while the model was still thinking is none: there is nothing to read.

    Returns:
        Columns id, prompt_id, condition, sample, prompt, response.

    Raises:
        ValueError: If there are no such answers.
    """
    import pandas as pd

    conditions = set(evaluation.scores["condition"])
    rows = [
        {
            "id": answer_id(c),
            "prompt_id": c.prompt.id,
            "condition": c.condition,
            "sample": c.sample,
            "prompt": _asked(c.prompt),
            "response": c.text,
        }
        for c in evaluation.completions
        if c.prompt.label == label and c.condition in conditions and not c.is_cut_in_thoughts
    ]
    if not rows:
        raise ValueError(f"there are no answers to {label} prompts in this evaluation to be read.")
    return pd.DataFrame(rows)


def answer_id(completion: Completion) -> str:
    """Name an answer by a hash of its prompt's id and its text, whatever the condition."""
    return key_of([completion.prompt.id, completion.text])


def check_labels(labels: Mapping[str, bool | None], known: Iterable[str]) -> None:
    """Raise where labels name answers that are not there, or say nothing.

    Raises:
        ValueError: With the first unknown id and their number, or if no answer is labelled.
    """
    unknown = sorted(labels.keys() - set(known))
    if unknown:
        raise ValueError(
            f"id {unknown[0]!r} names no answer here ({len(unknown)} of {len(labels)} ids do not); "
            "give the labels of a blind sample of these answers."
        )
    if all(value is None for value in labels.values()):
        raise ValueError(f"none of {len(labels)} answers is labelled; read some of them first.")


def _asked(prompt: Prompt) -> str:
    """Write what was asked, with the turns before it."""
    turns = [f"{m.role}: {m.content}" for m in prompt.history]
    return "\n\n".join([*turns, f"user: {prompt.text}"]) if turns else prompt.text
