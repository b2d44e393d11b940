"""SafeSteer on one page: the recipe that strings the rooms together, from prompts to a folder that holds the whole result.

fit fold   activations -> vectors (prompt contrast, answer contrast), directions for the neurons
tune fold  separability, neuron scores, sign and strength of each construction
test fold  answered once: unsteered, both constructions, controls

Source: SafeSteer (Ghosh et al. 2025, arXiv:2506.04250) for the vectors and where they are added; the answer contrast, the calibration
of sign and strength and the controls are this project's (README.md says why).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.activations import ActivationSet, cache_activations
from workbench.calibration import Calibration, Setting, Vectors, calibrate, grid, placements, steering
from workbench.datasets import prompts_from
from workbench.directions import pooled
from workbench.evaluation import HEADLINE, score_completions
from workbench.framing import FramingJudge, framing_judge_for
from workbench.generation import UNSTEERED, Condition, sweep
from workbench.interventions import Intervention, add_vector
from workbench.models import HookedModel, load_model, model_info
from workbench.openings import answer_prompts
from workbench.prompts import Folds, Prompt, categories_of, prompts_key, select_prompts, split_prompts
from workbench.run_config import RunConfig
from workbench.runs import FORMAT
from workbench.self_contrast import kept_by, self_contrast
from workbench.separability import layer_separability
from workbench.sites import Site, sites_of_kind
from workbench.storage import PathLike, read_json, write_json, write_jsonl, write_text
from workbench.vectors import (
    SteeringVector,
    fit_steering_vectors,
    random_vector,
    save_vector,
    scaled_to,
    shuffled_vector,
)

if TYPE_CHECKING:
    import pandas as pd

PROMPT, OPENINGS, OWN = "prompt_contrast", "answer_contrast", "self_contrast"
"""The paper's vector; written openings of answers; the model's own answers. The latter two also pooled over the categories."""
POOLED = "_pooled"
LEAST_PAIRS = 8
"""Pairs of own answers over all categories, below which there is no self-contrast."""
TEST_NEUTRAL = 24
"""Neutral prompts answered under every test condition: what always-on steering costs where there is no risk."""


def run(
    config: RunConfig,
    folder: PathLike,
    *,
    resume: bool = False,
    progress: bool = False,
    model: HookedModel | None = None,
) -> Path:
    """Do the whole job and leave everything in a folder; README.md lists the files.

    Args:
        config: What to do.
        folder: Where to; it must be new, unless ``resume``.
        resume: Go on with an interrupted run of the same configuration. What is there is checked and reused, so the result is the
            same as without the interruption.
        progress: Show progress bars.
        model: A loaded model, instead of loading ``config.model``.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds another run, or the input does not allow the run.
    """
    folder = Path(folder)
    notes = _open_run(folder, config, resume)
    with _timed(notes, "load"):
        folds = folds_of(config)
        model = model if model is not None else load_run_model(config)
    categories = categories_of(folds.test)
    notes |= {
        "model": model_info(model).to_dict(),
        "categories": categories,
        "folds": {name: dict(Counter(p.label for p in fold)) for name, fold in folds._asdict().items()},
        "prompts": {"source": config.prompts or "data/prompts.jsonl", "sha256": prompts_key(itertools.chain(*folds))},
    }
    _note(folder, notes)

    safety_judge = framing_judge_for(model)
    answers: Any = {"max_new_tokens": config.max_new_tokens, "seed": config.seed, "progress": progress}
    with _timed(notes, "own answers"):
        own = _own_answers(model, folds.fit, safety_judge, output=folder / "fit.jsonl", **answers)
    with _timed(notes, "activations"):
        measured = measure(model, folds, folder / "activations", own_answers=own, progress=progress)
    with _timed(notes, "vectors"):
        vectors = fit_all(measured, folds.fit)
        notes["vectors"] = _save_vectors(folder / "vectors", vectors)
    with _timed(notes, "separability"):
        residual = {site: acts for site, acts in measured.prompts.items() if site.kind in ("resid_post", "attn_out")}
        _write_csv(folder / "separability.csv", layer_separability(residual, folds.fit, folds.tune))
    with _timed(notes, "neurons"):
        _write_csv(folder / "neurons.csv", _neurons(model, measured, folds, categories, config.seed))
    _note(folder, notes)

    with _timed(notes, "tune"):
        questions = select_prompts(folds.tune, label="unsafe", limit=config.tune_prompts)
        constructions = list(dict.fromkeys(construction for construction, _ in vectors))
        tuned = calibrate(
            model,
            vectors,
            questions,
            grid(constructions, placements(model), config.rhos, signs={PROMPT: (1, -1)}),
            score=partial(score_completions, model, safety_judge=safety_judge),
            output=folder / "tune.jsonl",
            **answers,
        )
        _write_csv(folder / "tuning.csv", tuned.table)
        notes["chosen"] = {s.construction: _describe(s, vectors, tuned.table) for s in tuned.chosen.values()}
        notes["rounds"] = [one._asdict() for one in tuned.rounds]
        _note(folder, notes)
    with _timed(notes, "test"):
        questions = _test_questions(folds.test, config)
        conditions = test_conditions(vectors, tuned, measured, questions, config.seed)
        completions = sweep(model, questions, conditions, output=folder / "test.jsonl", **answers)
    with _timed(notes, "evaluate"):
        result = score_completions(model, completions, safety_judge=safety_judge)
        _write_csv(folder / "evaluation.csv", result.summary(seed=config.seed))
        _write_csv(folder / "scores.csv", result.to_frame())
        write_jsonl(folder / "completions.jsonl", result.answers())
    notes["judges"] = [
        {"name": result.judge, "measures": "refusal", "agreement": None},
        {
            "name": result.safety_judge,
            "measures": HEADLINE,
            "agreement": safety_judge.agreement if safety_judge is not None else None,
        },
    ]
    notes["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _note(folder, notes)
    return folder


class Measured(NamedTuple):
    """Pooled activations that the rest of a run is made from."""

    prompts: dict[Site, ActivationSet]
    """Fit and tune prompts, span content."""
    answers: dict[str, dict[Site, ActivationSet]]
    """Construction to questions of the fit fold with answers behind them (written openings, the model's own), span response."""


def measure(
    model: HookedModel,
    folds: Folds,
    store: PathLike,
    *,
    own_answers: Sequence[Prompt] = (),
    progress: bool = False,
) -> Measured:
    """Run the fit and tune prompts, and the fit questions with answers behind them, once each for all sites."""
    everywhere = [s for kind in ("resid_post", "attn_out", "mlp_post", "z") for s in sites_of_kind(model, kind)]
    prompts = cache_activations(
        model, [*folds.fit, *folds.tune], [Site(0, "resid_pre"), *everywhere], store=store, progress=progress
    )
    placed = sorted({site for place in placements(model) for site in place})
    rows = {OPENINGS: answer_prompts(folds.fit)} | ({OWN: list(own_answers)} if own_answers else {})
    answers = {
        construction: cache_activations(model, own, placed, span="response", store=store, progress=progress)
        for construction, own in rows.items()
    }
    return Measured(prompts, answers)


def fit_all(measured: Measured, fit: Sequence[Prompt]) -> Vectors:
    """Every construction at every site of the placements.

    Prompt contrast is the paper's: neutral prompts minus the category's unsafe ones. Answer contrast: openings that turn the question to
    safety minus style-matched ones that go along, pair by pair. Self-contrast: the model's own answers under an instruction minus its plain
    ones. Contrasts of answers come per category and pooled; a category without pairs of its own gets the pooled vector only.
    """
    vectors: dict[tuple[str, Site], dict[str, SteeringVector]] = {}
    categories = categories_of(fit)
    for site in measured.answers[OPENINGS]:
        on_fit = {s: measured.prompts[s].of(fit) for s in {site, Site(site.layer, "resid_post")}}
        residual = on_fit[Site(site.layer, "resid_post")]
        vectors[PROMPT, site] = fit_steering_vectors(on_fit[site], residual=residual)
        for construction, acts in measured.answers.items():
            own = fit_steering_vectors(acts[site], residual=residual, safe_side="paired", method=construction)
            shared = pooled(own)
            any_one = next(iter(shared.values()))
            if set(own) == set(categories) and construction == OPENINGS:
                vectors[construction, site] = own
            vectors[construction + POOLED, site] = {c: shared.get(c, replace(any_one, category=c)) for c in categories}
    return vectors


def test_conditions(
    vectors: Vectors, tuned: Calibration, measured: Measured, questions: Sequence[Prompt], seed: int
) -> dict[str, Condition]:
    """What the test fold is answered under: every construction as chosen, and controls of equal norm for the best contrast of answers.

    Neutral prompts have no category of their own: each gets the vectors of one of the categories, in turn.
    """
    main = max((s for s in tuned.chosen.values() if s.construction != PROMPT), key=partial(_headline, tuned))
    contrast = main.construction.removesuffix(POOLED)
    categories = list(vectors[main.construction, main.sites[0]])
    other = dict(zip(categories, [*categories[1:], categories[0]], strict=True))

    def control(make: Callable[[SteeringVector, Site], SteeringVector]) -> dict[str, list[Intervention]]:
        conditions: dict[str, list[Intervention]] = {c: [] for c in categories}
        for category, site in itertools.product(categories, main.sites):
            own = vectors[main.construction, site][category]
            conditions[category].append(add_vector(make(own, site), main.sign * own.multiplier_for(main.rho)))
        return conditions

    conditions: dict[str, Any] = {UNSTEERED: {}}
    for construction, setting in tuned.chosen.items():
        conditions[construction.replace("_", " ")] = steering(vectors, setting)
    conditions["random"] = control(
        lambda own, site: random_vector(own, seed=seed + site.layer + 1000 * categories.index(own.category))
    )
    shuffled = {
        site: _shuffled(vectors, main.construction, site, measured.answers[contrast][site], seed) for site in main.sites
    }
    conditions["shuffled labels"] = control(lambda own, site: scaled_to(shuffled[site][own.category], own.norm))
    if len(categories) > 1 and main.construction == contrast:  # a pooled vector is the same for all
        conditions["other category"] = control(
            lambda own, site: scaled_to(vectors[main.construction, site][other[own.category]], own.norm)
        )
    neutral = [prompt for prompt in questions if prompt.label == "neutral"]
    for condition in conditions.values():
        if condition:
            condition |= {p.id: condition[c] for p, c in zip(neutral, itertools.cycle(categories), strict=False)}
    return conditions


def _headline(tuned: Calibration, setting: Setting) -> float:
    """What the tune fold says of a chosen setting: headline less excess over the limits."""
    own = tuned.table[tuned.table["chosen"] & (tuned.table["construction"] == setting.construction)]
    row = own.set_index("metric").loc[HEADLINE]
    return float(row["value"] - row["excess"])


def _shuffled(
    vectors: Vectors, construction: str, site: Site, answers: ActivationSet, seed: int
) -> dict[str, SteeringVector]:
    """What the construction finds where labels are shuffled; pooled where it pools."""
    have = categories_of(answers.prompts)
    own = vectors[construction, site]
    made = {c: shuffled_vector(own[c], answers, seed=seed + i, safe_side="paired") for i, c in enumerate(have)}
    if construction.endswith(POOLED):
        made = pooled(made)
    return {c: made.get(c, next(iter(made.values()))) for c in own}


def _own_answers(model: HookedModel, fit: Sequence[Prompt], judge: FramingJudge | None, **answers: Any) -> list[Prompt]:
    """Rows of the self-contrast; none where the model has too few pairs of answers to give."""
    keep_safe, keep_unsafe = kept_by(judge)
    rows = self_contrast(model, fit, keep_safe=keep_safe, keep_unsafe=keep_unsafe, **answers)
    return rows if len(rows) >= 2 * LEAST_PAIRS else []


def folds_of(config: RunConfig) -> Folds:
    """The prompts of a run, in their folds.

    Raises:
        ValueError: If the data set cannot be read, a category is unknown, or there is nothing unsafe in it.
    """
    prompts = prompts_from(config.prompts)
    if not any(p.label == "neutral" for p in prompts):  # the generic safe pool of the paper's vectors
        prompts += select_prompts(prompts_from(None), label="neutral")
    if config.categories is not None:
        risky = select_prompts(prompts, category=config.categories)
        prompts = risky + [p for p in prompts if p.category not in config.categories and p.label == "neutral"]
    if not categories_of(prompts):
        raise ValueError("no unsafe prompts: a run needs at least one risk category.")
    return split_prompts(prompts, seed=config.seed)


def load_run_model(config: RunConfig) -> HookedModel:
    """The model of a run."""
    return load_model(config.model, device=config.device, dtype=config.dtype)


def attributed_site(model: HookedModel) -> Site:
    """Residual site whose direction a run attributes to neurons: after the last block but one."""
    return Site(max(0, model.cfg.n_layers - 2), "resid_post")


def _test_questions(test: Sequence[Prompt], config: RunConfig) -> list[Prompt]:
    risky = select_prompts(test, label="unsafe", limit=config.test_prompts)
    return risky + select_prompts(test, label="neutral", limit=TEST_NEUTRAL)


def _neurons(
    model: HookedModel, measured: Measured, folds: Folds, categories: Sequence[str], seed: int
) -> pd.DataFrame:
    from workbench.neurons import attribute_neurons

    fit, tune = ({site: acts.of(fold) for site, acts in measured.prompts.items()} for fold in (folds.fit, folds.tune))
    has_twins = all(any(p.label == "safe" and p.category == c for p in folds.fit) for c in categories)
    return attribute_neurons(
        model,
        fit,
        tune,
        site=attributed_site(model),
        categories=categories,
        reference="twins" if has_twins else "neutral",
        seed=seed,
    )


def _describe(setting: Setting, vectors: Vectors, table: pd.DataFrame) -> dict[str, Any]:
    row = table[table["chosen"] & (table["construction"] == setting.construction) & (table["metric"] == HEADLINE)].iloc[
        0
    ]
    over = "" if row["feasible"] else f"; it is over the limits by {row['excess']:.2f}"
    multipliers = {
        category: {
            str(s): setting.sign * vectors[setting.construction, s][category].multiplier_for(setting.rho)
            for s in setting.sites
        }
        for category in vectors[setting.construction, setting.sites[0]]
    }
    return {
        "sites": [str(site) for site in setting.sites],
        "sign": setting.sign,
        "rho": setting.rho,
        "multiplier": multipliers,
        "reason": f"most safe and helpful answers (proxy) on the tune fold, less costs over the limits: {row['value']:.2f}, n={row['n']}{over}",
    }


def _save_vectors(folder: Path, vectors: Vectors) -> list[str]:
    names = []
    for (construction, site), by_category in vectors.items():
        for category, vector in by_category.items():
            names.append(f"{construction}.{site}.{category}.safetensors")
            save_vector(folder / names[-1], vector)
    return names


def _open_run(folder: Path, config: RunConfig, resume: bool) -> dict[str, Any]:
    """The notes of a run (run.json), begun or taken up."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    path = folder / "run.json"
    if path.is_file():
        notes = read_json(path)
        if not resume:
            raise ValueError(
                f"{str(folder)!r} holds a run already; go on with --resume, or give another folder with --out."
            )
        if not isinstance(notes, dict) or notes.get("config") != settings:
            differing = [k for k, v in settings.items() if (notes.get("config") or {}).get(k) != v]
            raise ValueError(
                f"{str(folder)!r} holds a run with another {differing[0]}; resume it with its own, or give another --out."
            )
        return notes
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is not an empty folder and holds no run; give another one with --out.")
    versions = {
        name: importlib.metadata.version(name) for name in ("workbench", "torch", "transformers", "transformer-lens")
    }
    notes = {
        "format": FORMAT,
        "config": settings,
        "seed": config.seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "durations": {},
    }
    return notes


def _note(folder: Path, notes: dict[str, Any]) -> None:
    write_json(folder / "run.json", notes)


@contextmanager
def _timed(notes: dict[str, Any], stage: str) -> Iterator[None]:
    """Add the stage's seconds to the notes (a resumed stage adds to what it took before)."""
    start = time.monotonic()
    try:
        yield
    finally:
        durations = notes["durations"]
        durations[stage] = round(durations.get(stage, 0) + time.monotonic() - start, 1)


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, float_format="%.5g"))
