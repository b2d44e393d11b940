"""Measure what steering costs where nothing is risky.

Multiple-choice questions, and perplexity on a text of one's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files.store import PathLike, data_path
from workbench.files.tables import read_rows
from workbench.generation.answers import UNSTEERED, Completion, Condition
from workbench.generation.likelihood import steered_log_probs
from workbench.models.tokens import answer_ids
from workbench.prompts.prompt import HARMLESS, Prompt
from workbench.stats.estimates import mcnemar, mean, paired_difference, rate

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords
    from workbench.steering.interventions import Intervention


LETTERS = "ABCDEFGH"
"""Names of the columns of choices, and of the answers, in files of lettered choices."""


@dataclass(frozen=True)
class Question:
    """Hold a multiple-choice question.

    Attributes:
        id: Name of the question.
        text: What is asked.
        choices: The answers to choose from, two or more.
        answer: Place of the right choice, from 0.
    """

    id: str
    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: PathLike | None = None) -> list[Question]:
    """Read multiple-choice questions, one row each.

    Args:
        path: csv, tsv, json, jsonl or parquet with columns question, choices (a list, as MMLU has
            them on the hub) or A, B, C, ... and answer (a place from 0, a letter, or the right
            choice's words); None takes the few that come with the project.

    Raises:
        ValueError: If a row has no question, fewer than two choices, or an answer that is none of
            them, with its number.
    """
    path = data_path("capability.jsonl") if path is None else path
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        choices = _choices(row)
        text, answer = str(row.get("question") or "").strip(), row.get("answer")
        place = _place(answer, choices)
        if not text or len(choices) < 2 or place is None:
            raise ValueError(
                f"{path}, row {number}: a question, two choices or more (choices, or A, B, ...) "
                f"and an answer among them are needed, got question {text!r:.40}, {len(choices)} "
                f"choices, answer {answer!r:.20}."
            )
        name = str(row.get("id") or f"{Path(path).stem}-{number}")
        questions.append(Question(name, text, tuple(choices), place))
    return questions


def multiple_choice(
    model: HookedModel,
    questions: Sequence[Question],
    conditions: Mapping[str, Condition],
    *,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 32,
    transfer: bool = False,
) -> pd.DataFrame:
    """Measure the share of questions whose right choice is the likeliest.

    The mean log-probability per token counts, as in the evaluation harness's acc_norm.

    Args:
        model: A hooked model.
        questions: From ``read_questions``.
        conditions: Name to interventions, always for all questions or behind a gate; the unsteered
            model is added.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        batch_size: Rows per batch.
        transfer: Allow vectors of another model of the same architecture.

    Returns:
        Columns condition, accuracy, low, high (Wilson), chance, difference, difference_low,
        difference_high, p (McNemar) against unsteered, n.

    Raises:
        ValueError: If there are no questions, or a condition names single categories.
    """
    import pandas as pd

    if not questions:
        raise ValueError("no questions: there is no accuracy to measure.")
    answers = [
        _fixed(model, _asked(f"{q.id}/{k}", q.text), choice, template_keywords)
        for q in questions
        for k, choice in enumerate(q.choices)
    ]
    how = _scored_as(system_prompt, template_keywords, batch_size, transfer)
    right: dict[str, list[bool]] = {}
    for name, interventions in _for_all(conditions).items():
        log_probs = steered_log_probs(model, answers, [interventions] * len(answers), **how)
        right[name] = _answered_rightly(questions, log_probs)
    chance = sum(1 / len(q.choices) for q in questions) / len(questions)
    rows = []
    for name, is_right in right.items():
        estimate = rate(is_right)
        row: dict[str, Any] = {"condition": name, "accuracy": estimate.value, "low": estimate.low}
        row |= {
            "high": estimate.high,
            "chance": chance,
            **_against(right[UNSTEERED], is_right, name),
        }
        row["p"] = mcnemar(right[UNSTEERED], is_right).p if name != UNSTEERED else float("nan")
        rows.append(row | {"n": estimate.n})
    return pd.DataFrame(rows)


def _answered_rightly(
    questions: Sequence[Question], log_probs: Sequence[Float[Tensor, " token"]]
) -> list[bool]:
    """Say of each question whether its right choice is the likeliest, by the mean per token."""
    means = iter(float(choice.mean()) if len(choice) else float("-inf") for choice in log_probs)
    rightly = []
    for question in questions:
        by_choice = [next(means) for _ in question.choices]
        rightly.append(by_choice.index(max(by_choice)) == question.answer)
    return rightly


def text_perplexity(
    model: HookedModel,
    texts: Sequence[str],
    conditions: Mapping[str, Condition],
    *,
    max_tokens: int = 256,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 8,
    transfer: bool = False,
) -> pd.DataFrame:
    """Measure how much worse the steered model predicts ordinary text.

    Each text is taken as the answer to "Continue.".

    Args:
        model: A hooked model.
        texts: Passages of a user's own text; each is one unit of the intervals.
        conditions: Name to interventions; the unsteered model is added.
        max_tokens: Tokens of a passage that count.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        batch_size: Rows per batch.
        transfer: Allow vectors of another model of the same architecture.

    Returns:
        Columns condition, log_perplexity (nats per token, the mean of passages), low, high,
        difference, difference_low, difference_high, n.

    Raises:
        ValueError: If there is no text.
    """
    import pandas as pd

    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("no text: there is no perplexity to measure.")
    answers = [
        _fixed(model, _asked(f"text-{i}", "Continue."), text, template_keywords, max_tokens)
        for i, text in enumerate(texts)
    ]
    how = _scored_as(system_prompt, template_keywords, batch_size, transfer)
    log_perplexities: dict[str, list[float]] = {}
    for name, interventions in _for_all(conditions).items():
        scored = steered_log_probs(model, answers, [interventions] * len(answers), **how)
        log_perplexities[name] = [-float(log_probs.mean()) for log_probs in scored]
    rows = []
    for name, values in log_perplexities.items():
        estimate = mean(values)
        row = {
            "condition": name,
            "log_perplexity": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
        }
        rows.append(row | _against(log_perplexities[UNSTEERED], values, name) | {"n": estimate.n})
    return pd.DataFrame(rows)


def _scored_as(
    system_prompt: str | None, template_keywords: Keywords, batch_size: int, transfer: bool
) -> dict[str, Any]:
    """Say how given texts are scored, as arguments of ``steered_log_probs``."""
    return {
        "system_prompt": system_prompt,
        "template_keywords": template_keywords,
        "given": True,
        "batch_size": batch_size,
        "transfer": transfer,
    }


def _against(before: Sequence[float], after: Sequence[float], name: str) -> dict[str, float]:
    """Return the paired difference to the unsteered model, nan for the unsteered model itself."""
    if name == UNSTEERED:
        return dict.fromkeys(("difference", "difference_low", "difference_high"), float("nan"))
    estimate = paired_difference(before, after)
    return {
        "difference": estimate.value,
        "difference_low": estimate.low,
        "difference_high": estimate.high,
    }


def _for_all(conditions: Mapping[str, Condition]) -> dict[str, Sequence[Intervention]]:
    """Put the unsteered model first; check that each condition is one list of interventions."""
    lists: dict[str, Sequence[Intervention]] = {UNSTEERED: ()}
    for name, condition in conditions.items():
        if isinstance(condition, Mapping):
            raise ValueError(
                f"condition {name!r} names prompts or categories, which these questions do not "
                "have; give one list of interventions."
            )
        lists[name] = condition
    return lists


def _asked(name: str, text: str) -> Prompt:
    return Prompt(name, text, None, HARMLESS, "neutral", "capability")


def _fixed(
    model: HookedModel,
    prompt: Prompt,
    text: str,
    template_keywords: Keywords,
    max_tokens: int | None = None,
) -> Completion:
    """Make a text, cut to ``max_tokens``, the completion of a prompt."""
    tokens = answer_ids(model, text, template_keywords)[:max_tokens]
    return Completion(prompt, text, tokens, "eos", UNSTEERED)


def _choices(row: Mapping[str, Any]) -> list[str]:
    """Return the choices of a row: its list, or else its lettered columns up to an empty one."""
    listed = row.get("choices")
    if isinstance(listed, Sequence) and not isinstance(listed, str) and listed:
        return [str(choice) for choice in listed]
    lettered = [str(row.get(letter) or "").strip() for letter in LETTERS]
    return list(itertools.takewhile(bool, lettered))


def _place(answer: Any, choices: Sequence[str]) -> int | None:
    """Return the right choice's place from a place, a letter or its words; None if it is none."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    text = str(answer if answer is not None else "").strip()
    if text in choices:
        return choices.index(text)
    if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(text.upper())
    return int(text) if text.isdigit() and int(text) < len(choices) else None
