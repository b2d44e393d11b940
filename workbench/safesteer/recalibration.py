"""Calibrate a saved run again, on its tune fold and with its vectors: other strengths, positions or lengths, without fitting anything anew."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.evaluation.scoring import score_completions
from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, write_json, write_text
from workbench.generation.decoding import Decoding
from workbench.judges.framing import framing_judge_for
from workbench.models.sites import Site
from workbench.prompts.prompt import select_prompts
from workbench.safesteer.calibration import Calibration, calibrate, plan_rounds
from workbench.safesteer.config import config_from
from workbench.safesteer.constructions import PROMPT, constructions_of
from workbench.safesteer.inputs import TUNE_NEUTRAL, folds_of, limits_of, load_run_model
from workbench.safesteer.recipe import describe
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import CALIBRATION
from workbench.safesteer.settings import grid, placements
from workbench.steering.vectors import SteeringVector, load_vector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.models.load import HookedModel
    from workbench.steering.interventions import Positions


def saved_vectors(folder: PathLike) -> dict[tuple[str, Site], dict[str, SteeringVector]]:
    """The vectors of a run: (construction, site) to category to vector.

    Raises:
        ValueError: If the run has none.
    """
    run = read_run(folder)
    vectors: dict[tuple[str, Site], dict[str, SteeringVector]] = {}
    for name in run.notes["vectors"]:
        construction, layer, kind, category = str(name).removesuffix(".safetensors").split(".", 3)
        vectors.setdefault((construction, Site.parse(f"{layer}.{kind}")), {})[category] = (
            load_vector(run.path / "vectors" / str(name))
        )
    if not vectors:
        raise ValueError(
            f"{str(folder)!r} has no vectors yet; finish it with 'workbench run --out {folder} --resume'."
        )
    return vectors


def recalibrate(
    folder: PathLike,
    *,
    constructions: Sequence[str] | None = None,
    rhos: Sequence[float] | None = None,
    positions: Sequence[Positions] = ("all",),
    until: Sequence[int | None] = (None,),
    tune_prompts: int | None = None,
    budget: int | None = None,
    progress: bool = False,
    model: HookedModel | None = None,
) -> Calibration:
    """Search settings for a run's vectors on its tune fold; its test fold is not touched.

    Leaves tuning.csv, chosen.json and tune.jsonl in the folder's "calibration"; what was answered there before is not answered again. The
    settings that the run's report rests on stay as they are.

    Args:
        folder: Folder of a run.
        constructions: Which; all by default.
        rhos: Relative strengths at one layer; those of the run by default.
        positions: Which tokens are steered; each is tried.
        until: Generated tokens after which steering ends; each is tried, None never ends.
        tune_prompts: Unsafe prompts a category; as many as the run took by default.
        budget: Answers, at most.
        progress: Show what it will take, and progress bars.
        model: A loaded model, instead of loading the run's.

    Raises:
        ValueError: If the folder holds no run with vectors, a construction is unknown, or the budget is too small.
    """
    given: dict[str, Any] = {
        "rhos": None if rhos is None else tuple(rhos),
        "tune_prompts": tune_prompts,
    }
    config = replace(
        config_from(read_run(folder).notes["config"]),
        **{k: v for k, v in given.items() if v is not None},
    )
    vectors = saved_vectors(folder)
    known = constructions_of(vectors)
    for name in constructions or ():
        if name not in known:
            raise ValueError(
                f"no construction {name!r} in {str(folder)!r}; constructions: {', '.join(known)}.{did_you_mean(name, known)}"
            )
    model = model if model is not None else load_run_model(config)
    tune = folds_of(config).tune
    questions = select_prompts(tune, label="unsafe", limit=config.tune_prompts)
    settings = grid(
        list(constructions or known),
        placements(model),
        config.rhos,
        signs={PROMPT: (1, -1)},
        extents=list(itertools.product(positions, until)),
    )
    out = Path(folder) / CALIBRATION
    tuned = calibrate(
        model,
        vectors,
        questions,
        settings,
        score=partial(score_completions, model, safety_judge=framing_judge_for(model)),
        output=out / "tune.jsonl",
        neutral=select_prompts(tune, label="neutral", limit=TUNE_NEUTRAL),
        limits=limits_of(config),
        rounds=plan_rounds(len(settings), len(questions), budget=budget),
        decoding=Decoding(max_new_tokens=config.max_new_tokens, seed=config.seed),
        progress=progress,
    )
    write_text(out / "tuning.csv", tuned.table.to_csv(index=False, float_format="%.5g"))
    write_json(
        out / "chosen.json",
        {s.construction: describe(s, vectors, tuned.table) for s in tuned.chosen.values()},
    )
    return tuned
