"""Calibrate a saved run again, with its vectors and on its tune fold.

Other strengths, positions or lengths of steering are tried; nothing is fitted anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.files.hints import did_you_mean
from workbench.files.locks import locked_folder
from workbench.files.store import PathLike, local_path, write_json
from workbench.prompts.prompt import select_prompts
from workbench.safesteer.calibration import Calibration, calibrate, describe
from workbench.safesteer.config import config_from
from workbench.safesteer.constructions import constructions_of
from workbench.safesteer.inputs import TUNE_NEUTRAL, limits_of, load_job, load_run_model
from workbench.safesteer.paper import places_of, settings_of
from workbench.safesteer.run_folder import (
    check_model_of,
    read_run,
    saved_vectors,
    write_table,
)
from workbench.safesteer.saved_run import CALIBRATION

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.models.hooked_model import HookedModel
    from workbench.safesteer.config import RunConfig
    from workbench.safesteer.inputs import Job
    from workbench.safesteer.settings import Vectors
    from workbench.steering.interventions import Positions


def recalibrate(
    folder: PathLike,
    *,
    constructions: Sequence[str] | None = None,
    rhos: Sequence[float] | None = None,
    applied: Sequence[str] | None = None,
    applied_tokens: int | None = None,
    positions: Sequence[Positions] = ("all",),
    until: Sequence[int | None] = (None,),
    tune_prompts: int | None = None,
    search: str | None = None,
    budget: int | None = None,
    progress: bool = False,
    model: HookedModel | None = None,
) -> Calibration:
    """Search settings for a run's vectors on its tune fold; its test fold is not touched.

    Leaves tuning.csv, chosen.json and tune.jsonl in the folder's "calibration", and goes on from
    what was answered there. The settings that the run's report rests on stay as they are.

    Args:
        folder: Folder of a run.
        constructions: Constructions of the run; all by default.
        rhos: Relative strengths at one layer; by default a construction's own, or the run's.
        applied: Names of ``WAYS``, each of which is tried; those of the run by default.
        applied_tokens: Tokens over which those that are counted last; the run's by default.
        positions: Which tokens are steered where a way does not say so; each is tried.
        until: Generated tokens after which steering then ends; each is tried, None never ends.
        tune_prompts: Unsafe prompts per category; as many as the run took by default.
        search: See ``calibrate``; the run's by default.
        budget: Answers, at most.
        progress: Show what it will take, and progress bars.
        model: A loaded model, instead of loading the run's.

    Raises:
        ValueError: If the folder holds no run with vectors of this model, a name is unknown, the
            budget is too small, or another process calibrates it.
    """
    run = read_run(folder)
    given: Any = {"rhos": rhos, "applied": applied, "tune_prompts": tune_prompts, "search": search}
    config = _changed(run.notes["config"], **given, applied_tokens=applied_tokens)
    vectors = saved_vectors(folder)
    names = _checked(constructions, constructions_of(vectors), folder)
    check_model_of(run, model := load_run_model(config) if model is None else model)
    out = local_path(folder) / CALIBRATION
    loaded: Any = {"verdicts": out / "verdicts.jsonl", "model": model, "progress": progress}
    job = load_job(config, fits=False, **loaded)
    questions = select_prompts(job.folds.tune, label="unsafe", limit=config.tune_prompts)
    places = places_of(config, job.model, {site for _, site in vectors})
    tried: Any = {"own_rhos": rhos is None, "extents": [*itertools.product(positions, until)]}
    settings = settings_of(config, vectors, names, places, **tried)
    how = {**_how(job, out), "budget": budget}
    with locked_folder(out):
        return _kept(calibrate(job.model, vectors, questions, settings, **how), vectors, out)


def _how(job: Job, out: Path) -> dict[str, Any]:
    """Say how a run calibrates, as arguments of ``calibrate``."""
    return {
        "score": job.score_for_tuning,
        "output": out / "tune.jsonl",
        "neutral": select_prompts(job.folds.tune, label="neutral", limit=TUNE_NEUTRAL),
        "limits": limits_of(job.config),
        "search": job.config.search,
        **job.how_steered,
    }


def _kept(tuned: Calibration, vectors: Vectors, out: Path) -> Calibration:
    """Write what was tried and chosen into the folder of the calibration, and give it back."""
    write_table(out / "tuning.csv", tuned.table)
    chosen = {s.construction: describe(s, vectors, tuned.table) for s in tuned.chosen.values()}
    write_json(out / "chosen.json", chosen)
    return tuned


def _changed(noted: Mapping[str, Any], **given: Any) -> RunConfig:
    """Change what a search is told in another way than its run; strengths replace multiples."""
    changes: dict[str, Any] = {
        name: tuple(value) if name in ("rhos", "applied") else value
        for name, value in given.items()
        if value is not None
    }
    if "rhos" in changes:
        changes["multipliers"] = None
    return replace(config_from({"search": "exhaustive", **noted}), **changes)


def _checked(names: Sequence[str] | None, known: list[str], folder: PathLike) -> list[str]:
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"no construction {name!r} in {str(folder)!r}; constructions: {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
    return list(names or known)
