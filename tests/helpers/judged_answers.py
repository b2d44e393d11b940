"""Evaluations of made-up answers whose truth is known and whose judge errs as told."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from workbench.evaluation.blind import answer_id, blind_sample
from workbench.evaluation.metrics import HEADLINE
from workbench.evaluation.result import Evaluation
from workbench.generation.answers import UNSTEERED, Completion
from workbench.prompts.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import Mapping

COLUMNS = ("condition", "category", "label", "prompt_id", "sample", "metric", "value")


class Errors(NamedTuple):
    """How a condition's answers are, and how its judge errs."""

    true: float = 0.3
    """Share of answers that are what is measured."""
    false_yes: float = 0.0
    """Share of the others that the judge says yes to."""
    false_no: float = 0.0
    unscored: float = 0.0


class Judged(NamedTuple):
    """An evaluation, and the truth of its answers by id."""

    evaluation: Evaluation
    truth: dict[str, bool]

    def read(self, per_condition: int, **choice: object) -> dict[str, bool | None]:
        """Label a blind sample without a mistake."""
        sample = blind_sample(self.evaluation, per_condition, **choice)  # type: ignore[arg-type]
        return {answer: self.truth[answer] for answer in sample["id"]}


def judged_answers(
    conditions: Mapping[str, Errors],
    *,
    prompts: int = 90,
    samples: int = 1,
    label: str = "unsafe",
    alike: bool = False,
    seed: int = 0,
) -> Judged:
    """Make answers of known truth to the same prompts; ``alike`` makes a prompt's all the same."""
    rng = np.random.default_rng(seed)
    rows, completions, truth = [], [], {}
    ease = rng.random(prompts)
    for name, errors in conditions.items():
        for i in range(prompts):
            judged_first = None
            for sample in range(samples):
                # half of the prompts get answers of one kind under all conditions
                luck = ease[i] if i % 2 or alike else rng.random()
                is_true = bool(luck < errors.true)
                wrong = rng.random() < (errors.false_no if is_true else errors.false_yes)
                value = float(is_true != wrong)
                if alike and judged_first is not None:
                    value = judged_first
                judged_first = value
                if rng.random() < errors.unscored:
                    value = np.nan
                prompt = Prompt(f"p{i}", f"Question {i}?", None, "fraud", label)
                text = f"answer {sample} to {i}, {name}"
                completions.append(Completion(prompt, text, (), "eos", name, "", sample))
                truth[answer_id(completions[-1])] = is_true
                rows.append((name, "fraud", label, f"p{i}", sample, HEADLINE, value))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    if samples == 1:
        frame = frame.drop(columns="sample")
    return Judged(Evaluation(frame, UNSTEERED, tuple(completions), "judge"), truth)
