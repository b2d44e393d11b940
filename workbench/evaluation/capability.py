"""Measure what steering costs where nothing is risky.

Multiple-choice questions, and perplexity on a text of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.evaluation.questions import Question, read_questions
from workbench.generation.answers import UNSTEERED, Completion, Condition
from workbench.generation.likelihood import steered_log_probs
from workbench.models.tokens import answer_ids
from workbench.prompts.prompt import HARMLESS, Prompt
from workbench.stats.estimates import mcnemar, mean, paired_difference, rate

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from workbench.files.store import PathLike
    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords
    from workbench.steering.interventions import Intervention


def multiple_choice(
    model: HookedModel,
    questions: PathLike | pd.DataFrame | Sequence[Mapping[str, Any] | Question],
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
        questions: From ``read_questions``, or what it reads: a file, a data frame, dicts.
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

    questions = read_questions(questions)
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
    texts: str | Sequence[str],
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
        texts: Passages of a user's own text, or one; each is one unit of the intervals.
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

    texts = [text for text in ([texts] if isinstance(texts, str) else texts) if text.strip()]
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
