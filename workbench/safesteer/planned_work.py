"""Say how much work each stage of a run has, before it is done, for the time that is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import select_prompts
from workbench.safesteer.calibration import cost, plan_rounds
from workbench.safesteer.constructions import CONSTRUCTIONS, signs_of, wanted_names
from workbench.safesteer.inputs import TUNE_NEUTRAL, questions_of_test
from workbench.safesteer.positive_control import asked, refusals_of
from workbench.safesteer.settings import grid, placements

if TYPE_CHECKING:
    from workbench.safesteer.inputs import Job
    from workbench.safesteer.run_progress import Work

BESIDE = 5
"""Conditions of the test beside the chosen constructions: the unsteered one, two of the gate and
two controls at least."""


def planned_work(job: Job) -> dict[str, Work]:
    """Count answers, prompts, readings and verdicts of the stages of a run.

    What turns out otherwise (no gate, fewer answers of the model's own) is corrected as the stages
    end; the counts are for the time that is left and decide nothing.

    Args:
        job: What the run works with.
    """
    config, folds = job.config, job.folds
    wanted = wanted_names(config.constructions)
    risky_fit = select_prompts(folds.fit, label="unsafe")
    reads_own = any(CONSTRUCTIONS[name].reads == "own answers" for name in wanted)
    own_answers = 2 * len(risky_fit) if reads_own else 0
    settings = grid(wanted, placements(job.model), config.rhos, signs=signs_of(wanted))
    tune_questions = select_prompts(folds.tune, label="unsafe", limit=config.tune_prompts)
    samples = job.decoding.n_samples
    tuned = cost(plan_rounds(len(settings), len(tune_questions))) * samples
    # KL: each neutral prompt is read under every setting.
    readings = tuned + TUNE_NEUTRAL * len(settings) / 4
    questions = questions_of_test(folds.test, config)
    n_test = len(questions) * (len(wanted) + BESIDE) * samples
    prompts = len(folds.fit) + len(folds.tune) + len(answer_prompts(folds.fit)) + own_answers
    return {
        "own answers": {"answer": own_answers, "verdict": own_answers},
        "activations": {"prompt": prompts},
        "vectors": {"seconds": 1.0},
        "separability": {"seconds": 1.0},
        "neurons": {"seconds": 5.0},
        "tune": {"answer": tuned, "reading": readings, "verdict": tuned},
        "gate": {"prompt": len(folds.test)},
        "test": {"answer": n_test},
        "positive control": {
            "answer": len(asked(questions)),
            "prompt": len(refusals_of(folds.fit)),
        },
        "evaluate": {"reading": n_test, "verdict": n_test, "seconds": 5.0},
    }
