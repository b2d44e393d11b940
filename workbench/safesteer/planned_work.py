"""Say how much work each stage of a run has, before it is done, for the time that is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import select_prompts
from workbench.safesteer.constructions import (
    CONSTRUCTIONS,
    GUIDED,
    GUIDED_BOTH,
    OWN,
    places_for,
    reads_of,
    settings_to_try,
    wanted_names,
)
from workbench.safesteer.economical import half_of, n_tried
from workbench.safesteer.inputs import TUNE_NEUTRAL, questions_of_test
from workbench.safesteer.paper import places_of, ways_of
from workbench.safesteer.positive_control import asked, refusals_of
from workbench.safesteer.run_progress import FITTED
from workbench.safesteer.search import cost, plan_rounds
from workbench.safesteer.settings import Setting, grid

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel
    from workbench.safesteer.config import RunConfig
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
    own_answers = n_own_answers(job)
    tune_questions = select_prompts(folds.tune, label="unsafe", limit=config.tune_prompts)
    samples = job.decoding.n_samples
    tuned, tried = n_tuning(config, job.model, len(tune_questions))
    tuned *= samples
    # KL: each neutral prompt is read under every setting that is tried.
    readings = tuned + TUNE_NEUTRAL * tried / 4
    questions = questions_of_test(folds.test, config)
    n_test = len(questions) * (len(wanted) + BESIDE) * samples
    prompts = len(folds.fit) + len(folds.tune) + len(answer_prompts(folds.fit))
    prompts = prompts * (1 if job.source is None else 2) + own_answers
    more: dict[str, Work] = {}
    if config.fitted_is_evaluated:
        n = n_fitted(job) * samples
        more[FITTED] = {"answer": n, "reading": n, "verdict": n}
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
        **more,
    }


def n_own_answers(job: Job) -> int:
    """Count the answers that the model gives to prompts of the fit fold, to fit vectors on."""
    wanted = wanted_names(job.config.constructions)
    reads = reads_of(wanted)
    plainly = bool(reads & set(OWN) or {GUIDED, GUIDED_BOTH} & set(wanted))
    told = [{"own answers", "plain answers"}, {"alternatives", "against both"}]
    turns = plainly + sum(bool(reads & kinds) for kinds in told)
    harmless = select_prompts(job.folds.fit, label="neutral") if GUIDED_BOTH in wanted else []
    return turns * len(select_prompts(job.folds.fit, label="unsafe")) + len(harmless)


def n_tuning(config: RunConfig, model: HookedModel, n_prompts: int) -> tuple[int, int]:
    """Count the answers of the search, and the settings that it tries."""
    settings = settings_if_all_fit(config, model)
    if config.search == "economical":
        return half_of(settings, n_prompts), n_tried(settings)
    n_constructions = len({s.construction for s in settings})
    rounds = plan_rounds(len(settings), n_prompts)
    return cost(rounds, n_kept=n_constructions), len(settings)


def settings_if_all_fit(config: RunConfig, model: HookedModel) -> list[Setting]:
    """List the settings of the search, as if every construction could be fitted.

    The relative strength of raw multiples is not known before.
    """
    names, places = wanted_names(config.constructions), places_of(config, model)
    ways: Any = {"variants": ways_of(config)}
    if config.multipliers is None:
        return settings_to_try(names, places, config.rhos or (), **ways)
    edits = [name for name in names if CONSTRUCTIONS[name].is_edit]
    raw = [
        one._replace(sign=1 if multiplier > 0 else -1, multiplier=abs(multiplier))
        for name in names
        if name not in edits
        for multiplier in config.multipliers
        for one in grid([name], places_for(name, places), [abs(multiplier)], **ways)
    ]
    return raw + settings_to_try(edits, places, (), **ways)


def n_fitted(job: Job) -> int:
    """Count answers to fitted questions: unsteered, random, and by every contrast of prompts."""
    wanted = wanted_names(job.config.constructions)
    of_prompts = sum(CONSTRUCTIONS[name].reads == "prompts" for name in wanted)
    risky = select_prompts(job.folds.fit, label="unsafe", limit=job.config.test_prompts)
    return len(risky) * (2 + max(1, of_prompts))
