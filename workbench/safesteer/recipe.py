"""SafeSteer on one page: from prompts to a folder that holds the whole result.

The stages of ``run`` stand below it in reading order. Those that are the paper's are marked; the
others are this project's: contrasts of answers, the search for strength and place, the neurons,
the gate and the controls (docs/concepts.md says why they are there).

Source: SafeSteer (Ghosh et al. 2025, arXiv:2506.04250).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.evaluation.comparisons import judge_agreement
from workbench.evaluation.gating import (
    AT_RANDOM,
    CLOSED,
    ORACLE,
    REFUSING,
    activation_rates,
    beside_a_gate,
    cells,
    confusion,
    opened_for,
    refusing,
    roc,
)
from workbench.evaluation.scoring import HEADLINE, MARGINS, Evaluation
from workbench.generation.answers import Completion, Condition, sweep
from workbench.models.activations import cache_activations
from workbench.models.sites import Site
from workbench.neurons.ranking import attribute_neurons
from workbench.prompts.contrasts import has_twins
from workbench.prompts.prompt import Prompt, select_prompts
from workbench.safesteer.calibration import Calibration, calibrate, describe
from workbench.safesteer.conditions import (
    ALWAYS,
    GATED,
    behind_gate,
    condition_of,
    controls,
    for_everyone,
    gate_site,
    main_setting,
)
from workbench.safesteer.constructions import (
    CONSTRUCTIONS,
    GUIDED,
    Measured,
    activations_behind,
    constructions_of,
    fit_all,
    measure,
    signs_of,
)
from workbench.safesteer.inputs import TUNE_NEUTRAL, Job, limits_of, load_job, questions_of_test
from workbench.safesteer.own_answers import kept_by, self_contrast, went_along
from workbench.safesteer.run_folder import RunFolder
from workbench.safesteer.settings import Setting, Vectors, grid, placements, steering
from workbench.steering.gates import Gate, fit_gate, save_gate
from workbench.steering.separability import layer_separability

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from workbench.files.store import PathLike
    from workbench.models.hooked_model import HookedModel
    from workbench.safesteer.config import RunConfig

GATE_CONDITIONS = (GATED, ORACLE, AT_RANDOM, ALWAYS, REFUSING)
LEAST_PAIRS = 8
"""Pairs of own answers over all categories, below which there is no self-contrast."""


def run(
    config: RunConfig,
    folder: PathLike,
    *,
    resume: bool = False,
    progress: bool = False,
    model: HookedModel | None = None,
) -> Path:
    """Do the whole job and leave everything in a folder; docs/run_folder.md lists the files.

    Args:
        config: What to do.
        folder: Where to; it must be new, unless ``resume``.
        resume: Go on with an interrupted run of the same configuration. What is there is checked
            and reused, so the result is the same as without the interruption.
        progress: Show progress bars.
        model: A loaded model, instead of loading ``config.model``.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds another run, or the input does not allow the run.
    """
    out = RunFolder.open(folder, config, resume=resume)
    with out.stage("load"):
        job = load_job(config, model=model, progress=progress)
        out.note(**job.facts())
    with out.stage("own answers"):
        own_answers, questions_went_along = answer_fit_questions(job, out)
    with out.stage("activations"):  # SafeSteer: activations by category
        measured = measure_fit_and_tune(job, out, own_answers, questions_went_along)
    with out.stage("vectors"):  # SafeSteer: category-wise steering vectors
        vectors = fit_all(measured, job.folds.fit, config.constructions)
        out.save_vectors(vectors)
    with out.stage("separability"):
        out.write_table("separability", separability_by_layer(job, measured))
    with out.stage("neurons"):
        out.write_table("neurons", neuron_scores(job, measured))
    with out.stage("tune"):
        tuned = tune(job, out, vectors)
    with out.stage("gate"):
        gate, opened = fit_and_rate_gate(job, out, measured, main_setting(tuned))
    with out.stage("test"):  # SafeSteer: steered generation
        answers, names = answer_test_questions(job, out, measured, vectors, tuned, gate, opened)
    with out.stage("evaluate"):  # SafeSteer: safety and quality of the answers
        evaluate_answers(job, out, answers, names, opened, condition_of(main_setting(tuned)))
    return out.finish()


def answer_fit_questions(job: Job, out: RunFolder) -> tuple[list[Prompt], list[Prompt]]:
    """Let the model answer the fit questions itself, where a construction needs it.

    Returns:
        Rows of the self-contrast, none where the model gives too few pairs of answers; and the
        questions that the model goes along with, for the guided variant of the paper's vector.
    """
    wanted = job.config.constructions
    keep_safe, keep_unsafe = kept_by(job.judge)
    keywords: dict[str, Any] = {"output": out.path / "fit.jsonl", **job.how}
    own_answers, questions_went_along = [], []
    if wanted is None or any(CONSTRUCTIONS[name].reads == "own answers" for name in wanted):
        own_answers = self_contrast(
            job.model, job.folds.fit, keep_safe=keep_safe, keep_unsafe=keep_unsafe, **keywords
        )
        if len(own_answers) < 2 * LEAST_PAIRS:
            own_answers = []
    if GUIDED in (wanted or ()):
        questions_went_along = went_along(job.model, job.folds.fit, keep_unsafe, **keywords)
    return own_answers, questions_went_along


def measure_fit_and_tune(
    job: Job, out: RunFolder, own_answers: list[Prompt], questions_went_along: list[Prompt]
) -> Measured:
    """Cache the activations that vectors, neurons and gate are made from."""
    return measure(
        job.model,
        job.folds,
        out.path / "activations",
        own_answers=own_answers,
        went_along=questions_went_along,
        progress=job.progress,
        **job.decoding.asked_by,
    )


def separability_by_layer(job: Job, measured: Measured) -> pd.DataFrame:
    """Say how well each layer's direction tells held-out prompts of a category apart."""
    kinds = ("resid_post", "attn_out")
    residual = {site: acts for site, acts in measured.prompts.items() if site.kind in kinds}
    return layer_separability(residual, job.folds.fit, job.folds.tune)


def neuron_scores(job: Job, measured: Measured) -> pd.DataFrame:
    """Score every MLP neuron for every category: contribution, selectivity, stability."""
    fit, tune_fold = (
        {site: acts.of(fold) for site, acts in measured.prompts.items()}
        for fold in (job.folds.fit, job.folds.tune)
    )
    return attribute_neurons(
        job.model,
        fit,
        tune_fold,
        site=attributed_site(job.model),
        categories=job.categories,
        reference="twins" if has_twins(job.folds.fit, job.categories) else "neutral",
        seed=job.config.seed,
    )


def attributed_site(model: HookedModel) -> Site:
    """Name the site whose direction neurons are scored by: after the last block but one."""
    return Site(max(0, model.cfg.n_layers - 2), "resid_post")


def tune(job: Job, out: RunFolder, vectors: Vectors) -> Calibration:
    """Choose place, sign and strength of every construction on the tune fold."""
    names = constructions_of(vectors)
    tuned = calibrate(
        job.model,
        vectors,
        select_prompts(job.folds.tune, label="unsafe", limit=job.config.tune_prompts),
        grid(names, placements(job.model), job.config.rhos, signs=signs_of(names)),
        score=job.score,
        output=out.path / "tune.jsonl",
        neutral=select_prompts(job.folds.tune, label="neutral", limit=TUNE_NEUTRAL),
        limits=limits_of(job.config),
        **job.how,
    )
    out.write_table("tuning", tuned.table)
    out.note(
        chosen={s.construction: describe(s, vectors, tuned.table) for s in tuned.chosen.values()},
        rounds=[one._asdict() for one in tuned.rounds],
    )
    return tuned


def fit_and_rate_gate(
    job: Job, out: RunFolder, measured: Measured, main: Setting
) -> tuple[Gate, dict[str, str]]:
    """Fit the gate for the main setting, and say for which test prompts it opens.

    Returns:
        The gate, and for each test prompt's id the category it opens for (or that it is closed).
    """
    site = gate_site(main)
    gate = fit_gate(
        measured.prompts[site].of(job.folds.fit),
        measured.prompts[site].of(job.folds.tune),
        neutral_rate=job.config.neutral_rate,
        hard_rate=job.config.hard_safe_rate,
    )
    save_gate(out.path / "gate.safetensors", gate)
    held_out = cache_activations(
        job.model,
        job.folds.test,
        [site],
        store=out.path / "activations",
        progress=job.progress,
        **job.decoding.asked_by,
    )[site]
    out.write_table("gate_rates", activation_rates(gate, held_out))
    out.write_table("gate_confusion", confusion(gate, held_out))
    out.write_table("gate_roc", roc(gate, held_out))
    out.note(
        gate={
            "site": str(site),
            "construction": main.construction,
            "condition": condition_of(main),
            "threshold": str(round(gate.threshold, 4)),
            "asked": {name: threshold.rate for name, threshold in gate.thresholds.items()},
        }
    )
    ids = (prompt.id for prompt in held_out.prompts)
    return gate, dict(zip(ids, opened_for(gate, held_out), strict=True))


def answer_test_questions(
    job: Job,
    out: RunFolder,
    measured: Measured,
    vectors: Vectors,
    tuned: Calibration,
    gate: Gate,
    opened: Mapping[str, str],
) -> tuple[list[Completion], list[str]]:
    """Answer the test fold once: unsteered, under every construction, gated, under controls.

    Returns:
        The answers and the names of their conditions, in order.
    """
    main = main_setting(tuned)
    questions = questions_of_test(job.folds.test, job.config)
    share_opened = sum(opened[p.id] != CLOSED for p in questions) / len(questions)
    behind = activations_behind(main.construction, measured)
    steered: dict[str, Condition] = {
        condition_of(setting): steering(vectors, setting) for setting in tuned.chosen.values()
    }
    steered |= behind_gate(vectors, main, gate, share_opened)
    steered |= controls(vectors, main, behind, seed=job.config.seed)
    conditions = for_everyone(steered, questions)
    output = out.path / "test.jsonl"
    return sweep(job.model, questions, conditions, output=output, **job.how), list(conditions)


def evaluate_answers(
    job: Job,
    out: RunFolder,
    answers: list[Completion],
    names: list[str],
    opened: Mapping[str, str],
    main_condition: str,
) -> None:
    """Score the answers of the test fold, and write every table that the report shows."""
    fired = {prompt_id: category != CLOSED for prompt_id, category in opened.items()}
    everything = job.score([*answers, *refusing(answers, fired, job.model)])
    margins = MARGINS | limits_of(job.config).margins()
    seed = job.config.seed
    result = everything.only([name for name in names if name != ALWAYS])
    out.write_table("evaluation", result.summary(seed=seed, margins=margins))
    out.write_table("scores", result.to_frame())
    out.write_rows("completions", list(result.answers()))
    if job.judge is not None:
        out.write_table("judge_agreement", judge_agreement(result))
    compared = beside_a_gate(everything, fired, main_condition, GATED, seed=seed)
    scored = set(compared.scores["condition"])
    compared = compared.only([*(c for c in GATE_CONDITIONS if c in scored), main_condition])
    out.write_table("gate_comparison", compared.summary(seed=seed, margins=margins))
    out.write_table("gate_cells", cells(everything, fired, GATED))
    n_cut = sum(answer.is_cut_in_thoughts for answer in answers)
    out.note(judges=_judges(job, result), cut_in_thoughts=[n_cut, len(answers)])


def _judges(job: Job, result: Evaluation) -> list[dict[str, Any]]:
    """Name the judges of a result, what each measures, and how far it agrees with labels."""
    agreement = job.judge.agreement if job.judge is not None else None
    return [
        {"name": result.judge, "measures": "refusal", "agreement": None},
        {"name": result.safety_judge, "measures": HEADLINE, "agreement": agreement},
    ]
