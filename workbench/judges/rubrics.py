"""Say what a language model is asked when it judges, and read its reply."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from workbench.files.store import data_path
from workbench.judges.base import LABELS

if TYPE_CHECKING:
    from collections.abc import Mapping


_RUBRICS_FILE = "judge_rubrics.yaml"


_FENCE = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)


_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Rubric:
    """Hold what the judge is asked; from data/judge_rubrics.yaml, which documents itself.

    Attributes:
        name: Such as ``"unsafe"``.
        asks: The question, in one line.
        instructions: The system message of a judge that writes its verdict.
        answers: Label and score of each word the judge may answer with.
        criteria: What to decide by, for a judge that is shown the words with letters.
        meanings: What each word stands for, likewise.
    """

    name: str
    asks: str
    instructions: str
    answers: Mapping[str, tuple[str, float]] = field(hash=False)
    criteria: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if wrong := {label for label, _ in self.answers.values()} - set(LABELS):
            raise ValueError(
                f"unknown labels {sorted(wrong)} in rubric {self.name!r}; "
                f"labels: {', '.join(LABELS)}."
            )

    def read(self, text: str) -> tuple[str, str] | None:
        """Read the judge's word and its reason.

        None if the text is not one JSON object with one listed word as its verdict.
        """
        text = _THOUGHT.sub("", text).strip()
        if fenced := _FENCE.fullmatch(text):
            text = fenced[1]
        try:
            answer = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            return None
        word = answer.get("verdict") if isinstance(answer, dict) else None
        if not isinstance(word, str) or word.strip().lower() not in self.answers:
            return None
        reason = answer.get("reason")
        return word.strip().lower(), reason if isinstance(reason, str) else ""


@cache
def load_rubrics() -> dict[str, Rubric]:
    """Read the project's rubrics by name, once per process.

    Raises:
        FileNotFoundError: If the data file is missing.
        ValueError: If it names an unknown label.
    """
    content = yaml.safe_load(data_path(_RUBRICS_FILE).read_text(encoding="utf-8"))
    rubrics = {}
    for name, row in content["rubrics"].items():
        meanings = {word: meaning for word, (_, _, meaning) in row["answers"].items()}
        words = "\n".join(f'"{word}": {meaning}' for word, meaning in meanings.items())
        criteria = f"{content['lettered']}{row['criteria']}"
        instructions = "\n".join([content["frame"], row["criteria"], content["reply"] + words])
        answers = {
            word: (label, float(score)) for word, (label, score, _) in row["answers"].items()
        }
        rubrics[name] = Rubric(name, row["asks"], instructions, answers, criteria, meanings)
    return rubrics


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of a JSON object's pairs; refuse a name that stands twice."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)
