"""Put written openings of answers behind questions: the rows of an answer contrast.

All openings are harmless text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.files.store import PathLike, data_path, read_jsonl
from workbench.prompts.forms import as_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt


OPENING_KINDS = ("safe_reframing", "going_along", "refusing")
"""Turns the question to safety and stays on its topic; goes along with it; refuses it."""


def answer_prompts(
    prompts: PromptsLike,
    openings: Sequence[Mapping[str, Any]] | None = None,
    *,
    safe: str = "safe_reframing",
    unsafe: str = "going_along",
    per_prompt: int = 3,
) -> list[Prompt]:
    """Put written openings of answers behind unsafe questions: the rows of an answer contrast.

    Each question gets ``per_prompt`` pairs of openings of its category, alike in style; pair by
    pair they become a safe and an unsafe row with one ``pair_id``, so that
    ``fit_steering_vectors(..., safe_side="paired", method="answer_contrast")`` reads them.

    Args:
        prompts: Questions, in any form that ``as_prompts`` reads; only those labelled unsafe are
            used. A main category without openings of its own gets those of all others in turn.
        openings: Rows with category, kind, style and text; None reads data/openings.jsonl.
        safe: Kind on the safe side: "safe_reframing", or "refusing" for a refusal vector.
        unsafe: Kind on the unsafe side.
        per_prompt: Pairs per question; which ones changes from question to question, in turn.

    Raises:
        ValueError: If there are no questions, or no openings of both kinds.
    """
    rows = read_openings() if openings is None else openings
    for kind in (safe, unsafe):
        if kind not in OPENING_KINDS:
            raise ValueError(
                f"unknown kind of opening {kind!r}; kinds: {', '.join(OPENING_KINDS)}."
            )
    pairs = _pairs(rows, safe, unsafe)
    pairs_of_all = [pair for in_turn in zip(*pairs.values(), strict=False) for pair in in_turn]
    answers = []
    for place, prompt in enumerate(p for p in as_prompts(prompts) if p.label == "unsafe"):
        category_pairs = pairs.get(prompt.category, pairs_of_all)
        n_pairs = len(category_pairs)
        for turn in range(min(per_prompt, n_pairs)):
            style, unsafe_text, safe_text = category_pairs[(place * per_prompt + turn) % n_pairs]
            for kind, label, text in (
                (unsafe, "unsafe", unsafe_text),
                (safe, "safe", safe_text),
            ):
                answers.append(
                    replace(
                        prompt,
                        id=f"{prompt.id}/{kind}/{style}",
                        response=text,
                        label=label,
                        pair_id=f"{prompt.id}/{style}",
                    )
                )
    if not answers:
        raise ValueError("no unsafe prompts to put openings behind; give prompts labelled unsafe.")
    return answers


def _pairs(
    openings: Sequence[Mapping[str, Any]], safe: str, unsafe: str
) -> dict[str, list[tuple[str, str, str]]]:
    """Pair the openings of two kinds that share category and style.

    Returns:
        Category to pairs: a name, the text on the unsafe side, and the one on the safe side.
    """
    text_of = {(row["category"], row["style"], row["kind"]): str(row["text"]) for row in openings}
    pairs: dict[str, list[tuple[str, str, str]]] = {}
    for (category, style, kind), text in text_of.items():
        if kind == safe and (category, style, unsafe) in text_of:
            pair = (f"{category}-{style}", text_of[category, style, unsafe], text)
            pairs.setdefault(category, []).append(pair)
    if not pairs:
        raise ValueError(
            f"no openings of kinds {safe!r} and {unsafe!r} in one style; add some to the openings "
            "file."
        )
    return pairs


def read_openings(path: PathLike | None = None) -> list[dict[str, Any]]:
    """Read written openings: rows with category, kind, style and text.

    Raises:
        ValueError: If a column is missing, with the row's number.
    """
    path = data_path("openings.jsonl") if path is None else path
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        missing = [
            name
            for name in ("category", "kind", "style", "text")
            if not isinstance(row.get(name), str)
        ]
        if missing:
            raise ValueError(f"{path}, opening {number}: column {missing[0]!r} is missing.")
    return rows
