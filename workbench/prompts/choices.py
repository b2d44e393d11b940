"""Ask two-choice questions about written openings of answers: the rows of CAA.

One letter stands for an opening that turns the question to safety, the other for one that goes
along with it. Both rows of a pair have one text and differ in the letter that answers it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.prompts.openings import answer_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt


LETTERS = ("A", "B")
_TEXT = "{question}\n\nChoices:\n(A) {a}\n(B) {b}\n\nAnswer with one letter, A or B."


def choice_prompts(
    prompts: PromptsLike,
    openings: Sequence[Mapping[str, Any]] | None = None,
    *,
    per_prompt: int = 3,
    seed: int = 0,
) -> list[Prompt]:
    """Turn unsafe questions into two-choice questions, each answered with either letter.

    The answer is the letter alone, so that activations read over the response are those at its one
    token. (Where a tokenizer splits a space from it, the space is the same on both sides, and their
    difference has the letter's direction.) In each category the safe opening is choice A in half of
    the pairs, up to one.

    Args:
        prompts: Questions, in any form that ``as_prompts`` reads; only those labelled unsafe are
            used.
        openings: Rows with category, kind, style and text; None reads data/openings.jsonl.
        per_prompt: Pairs of openings per question.
        seed: Seed of the order of the choices.

    Returns:
        Two rows a pair, the unsafe letter and the safe one, of one ``pair_id``.

    Raises:
        ValueError: If there are no questions, or no openings of both kinds.

    Source: CAA (Rimsky et al. 2023, arXiv:2312.06681).
    """
    answers = answer_prompts(prompts, openings, per_prompt=per_prompt)
    pairs = list(zip(answers[::2], answers[1::2], strict=True))
    rng = random.Random(seed)
    rows = []
    for category in dict.fromkeys(unsafe.category for unsafe, _ in pairs):
        own = [pair for pair in pairs if pair[0].category == category]
        begin = rng.randrange(2)
        safe_places = [(begin + i) % 2 for i in range(len(own))]
        rng.shuffle(safe_places)
        for (unsafe, safe), place in zip(own, safe_places, strict=True):
            texts = [unsafe.response, safe.response] if place else [safe.response, unsafe.response]
            asked = _TEXT.format(question=unsafe.text, a=texts[0], b=texts[1])
            for row, at in ((unsafe, 1 - place), (safe, place)):
                letter = LETTERS[at]
                rows.append(replace(row, id=f"{row.id}/{letter}", text=asked, response=letter))
    return rows
