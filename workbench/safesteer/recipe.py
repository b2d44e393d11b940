"""SafeSteer on one page: from prompts to a folder that holds the whole result.

The stages of ``run`` stand below it in reading order. Those that are the paper's are marked; the
others are this project's: contrasts of answers, the search for strength and place, the neurons,
the gate and the controls (docs/concepts.md says why they are there).

Source: SafeSteer (Ghosh et al. 2025, arXiv:2506.04250).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.engines.opening import engine_of_a_run
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
from workbench.evaluation.metrics import HEADLINE, MARGINS
from workbench.evaluation.result import Evaluation
from workbench.generation.answers import UNSTEERED, Completion, Condition, sweep
from workbench.models.activations import cache_activations
from workbench.models.errors import CannotBeDone
from workbench.models.sites import Site
from workbench.neurons.attribution import writing_sites
from workbench.neurons.ranking import attribute_neurons
from workbench.prompts.contrasts import has_twins
from workbench.prompts.prompt import select_prompts
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
    Measured,
    activations_behind,
    constructions_of,
    fit_all,
    measure,
    safe_side_of,
    wanted_names,
)
from workbench.safesteer.fit_answers import UNANSWERED, FitAnswers, answers_to_fit_on
from workbench.safesteer.inputs import (
    TUNE_NEUTRAL,
    Job,
    engine_facts,
    engine_of,
    limits_of,
    load_job,
    not_known_to,
    questions_of_test,
)
from workbench.safesteer.paper import (
    at_norms_of,
    contrasted,
    places_of,
    settings_of,
    side_of_prompts,
)
from workbench.safesteer.planned_work import planned_work
from workbench.safesteer.positive_control import positive_control
from workbench.safesteer.run_folder import RunFolder
from workbench.safesteer.run_progress import FITTED
from workbench.safesteer.settings import Setting, Vectors, steering
from workbench.steering.gates import Gate, fit_gate, save_gate
from workbench.steering.separability import layer_separability

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from workbench.files.store import PathLike
    from workbench.models.hooked_model import HookedModel
    from workbench.safesteer.config import RunConfig

VERDICTS = "verdicts.jsonl"
"""File of a run that keeps what judges said."""
GATE_CONDITIONS = (GATED, ORACLE, AT_RANDOM, ALWAYS, REFUSING)


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
        resume: Go on with an interrupted run of the same configuration: what is there is checked
            and reused, and the result is the same.
        progress: Show on standard error how far the run is, and the time that is left.
        model: A loaded model, instead of loading ``config.model``.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds another run, or the input does not allow the run.
    """
    opened = RunFolder.open(folder, config, resume=resume, progress=progress)
    with opened as out, engine_of_a_run() as carry_out:
        with out.stage("load"):
            job = load_job(config, verdicts=out.path / VERDICTS, model=model, progress=progress)
            carry_out(engine := engine_of(job))
            out.note(**job.facts())
            out.plan(planned_work(job))
        with out.stage("own answers"):
            answered = answer_fit_questions(job.of_vectors, out)
        with out.stage("activations"):  # SafeSteer: activations by category
            behind = measure_fit_and_tune(job.of_vectors, out, answered)
            measured = behind if job.source is None else measure_fit_and_tune(job, out)
        with out.stage("vectors"):  # SafeSteer: category-wise steering vectors
            vectors = fit_vectors(job, out, behind, measured)
            job = replace(job, source=None)  # it is not needed any more
        with out.stage("separability"):
            out.write_table("separability", separability_by_layer(job, measured))
        with out.stage("neurons", may_be_left_out=True):
            out.write_table("neurons", neuron_scores(job, measured))
        with out.stage("tune"):
            tuned = tune(job, out, vectors)
            main = main_of(job, tuned)
        gated: FittedGate | None = None
        with out.stage("gate", may_be_left_out=True):
            gated = fit_and_rate_gate(job, out, measured, main)
        with out.stage("test"):  # SafeSteer: steered generation
            answers, names = answer_test_questions(job, out, behind, vectors, tuned, gated)
        with out.stage("positive control", may_be_left_out=True):
            out.note(positive_control=positive_control(job, out.path, answers).to_dict())
        with out.stage("evaluate"):  # SafeSteer: safety and quality of the answers
            evaluate_answers(job, out, answers, names, gated, condition_of(main))
        if config.fitted_is_evaluated:
            with out.stage(FITTED, may_be_left_out=True):
                evaluate_fitted(job, out, behind, vectors, tuned, main)
        out.note(engine=engine_facts(config.engine, engine))
        return out.finish()


def answer_fit_questions(job: Job, out: RunFolder) -> FitAnswers:
    """Let the model answer the fit questions itself, where a construction needs it."""
    answered = answers_to_fit_on(
        job.model,
        job.folds.fit,
        job.config.constructions,
        judge=job.tuning_judge,
        refusals=job.refusal_judge,
        output=out.path / "fit.jsonl",
        seed=job.config.seed,
        **job.how,
    )
    for kind, reason in answered.left_out.items():
        out.leave_out(kind, reason)
    return answered


def measure_fit_and_tune(job: Job, out: RunFolder, answered: FitAnswers = UNANSWERED) -> Measured:
    """Cache the activations that vectors, neurons and gate are made from."""
    store = out.path / "activations"
    how: dict[str, Any] = {"progress": job.progress, **job.decoding.asked_by}
    measured = measure(
        job.model,
        job.folds,
        store,
        answers=answered.rows,
        went_along=answered.went_along,
        harmless=answered.harmless,
        places=places_of(job.config, job.model),
        **how,
    )
    layers = range(job.model.cfg.n_layers)
    without = [layer for layer in layers if Site(layer, "attn_out") not in measured.prompts]
    if without:
        out.leave_out(
            "activations",
            f"no output of attention is computed in layers {', '.join(map(str, without))}: nothing "
            "is measured or steered there.",
        )
    judge = job.refusal_judge
    return contrasted(job.config, job.model, job.folds.fit, measured, judge, store=store, **how)


def fit_vectors(job: Job, out: RunFolder, behind: Measured, measured: Measured) -> Vectors:
    """Fit every construction that is wanted and possible, and save its vectors.

    Args:
        job: What the run works with.
        out: Where the vectors are saved.
        behind: Activations that they are fitted on.
        measured: Activations of the model that they steer.

    Raises:
        ValueError: If none is possible.
    """
    vectors = fit_all(behind, job.folds.fit, job.config.constructions)
    missing = [
        n for n in wanted_names(job.config.constructions) if n not in constructions_of(vectors)
    ]
    if missing:
        reason = (
            "what they are fitted on is missing (own answers, a second category, or a site of "
            "their kind)."
        )
        out.leave_out("vectors", f"{', '.join(missing)}: {reason}")
    if not vectors:
        raise ValueError(
            f"no vector can be fitted: {', '.join(missing)} lack what they are fitted on; "
            "take other constructions."
        )
    if job.source is not None:
        vectors = at_norms_of(measured, vectors, job.folds.fit)
    out.save_vectors(vectors)
    return vectors


def separability_by_layer(job: Job, measured: Measured) -> pd.DataFrame:
    """Say how well each layer's direction tells held-out prompts of a category apart."""
    kinds = ("resid_post", "attn_out")
    residual = {site: acts for site, acts in measured.prompts.items() if site.kind in kinds}
    return layer_separability(residual, job.folds.fit, job.folds.tune)


def neuron_scores(job: Job, measured: Measured) -> pd.DataFrame:
    """Score every MLP neuron for every category: contribution, selectivity, stability.

    Raises:
        CannotBeDone: If the model has no neurons that this can be said of.
    """
    site = attributed_site(job.model)
    silent = [s for s in writing_sites(job.model, site) if s not in measured.prompts]
    if silent:
        raise CannotBeDone(f"the model never computes {silent[0]}, which writes to {site}.")
    fit, tune_fold = (
        {site: acts.of(fold) for site, acts in measured.prompts.items()}
        for fold in (job.folds.fit, job.folds.tune)
    )
    return attribute_neurons(
        job.model,
        fit,
        tune_fold,
        site=site,
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
    places = places_of(job.config, job.model, {site for _, site in vectors})
    tuned = calibrate(
        job.model,
        vectors,
        select_prompts(job.folds.tune, label="unsafe", limit=job.config.tune_prompts),
        settings_of(job.config, vectors, names, places),
        score=job.score_for_tuning,
        output=out.path / "tune.jsonl",
        neutral=select_prompts(job.folds.tune, label="neutral", limit=TUNE_NEUTRAL),
        limits=limits_of(job.config),
        search=job.config.search,
        **job.how_steered,
    )
    main = main_of(job, tuned)
    out.write_table("tuning", tuned.table)
    out.note(
        chosen={s.construction: describe(s, vectors, tuned.table) for s in tuned.chosen.values()},
        main=main.construction,
        main_condition=condition_of(main),
        rounds=[one._asdict() for one in tuned.rounds],
    )
    return tuned


def main_of(job: Job, tuned: Calibration) -> Setting:
    """Choose what is gated and has controls: the best of all under a preset, else of answers."""
    return main_setting(tuned, of_answers_first=job.config.preset is None)


class FittedGate(NamedTuple):
    """A gate, and for each test prompt's id the category it opens for (or that it is closed)."""

    gate: Gate
    opened: dict[str, str]

    @property
    def fired(self) -> dict[str, bool]:
        """Tell for each test prompt's id whether the gate opened."""
        return {prompt_id: category != CLOSED for prompt_id, category in self.opened.items()}


def fit_and_rate_gate(job: Job, out: RunFolder, measured: Measured, main: Setting) -> FittedGate:
    """Fit the gate for the main setting, and say for which test prompts it opens."""
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
    if why := gate.why_closed:
        out.leave_out("gate", f"it is fitted and stays closed: {why}.")
    ids = (prompt.id for prompt in held_out.prompts)
    return FittedGate(gate, dict(zip(ids, opened_for(gate, held_out), strict=True)))


def answer_test_questions(
    job: Job,
    out: RunFolder,
    behind: Measured,
    vectors: Vectors,
    tuned: Calibration,
    gated: FittedGate | None,
) -> tuple[list[Completion], list[str]]:
    """Answer the test fold once: unsteered, under every construction, gated, under controls.

    Returns:
        The answers and the names of their conditions, in order.
    """
    main = main_of(job, tuned)
    questions = questions_of_test(job.folds.test, job.config)
    steered: dict[str, Condition] = {
        condition_of(setting): steering(vectors, setting) for setting in tuned.chosen.values()
    }
    if gated is not None:
        share_opened = sum(gated.fired[p.id] for p in questions) / len(questions)
        steered |= behind_gate(vectors, main, gated.gate, share_opened)
    steered |= controls_of(job, behind, vectors, main)
    conditions = for_everyone(steered, questions)
    output = out.path / "test.jsonl"
    answers = sweep(job.model, questions, conditions, output=output, **job.how_steered)
    return answers, list(conditions)


def controls_of(
    job: Job, behind: Measured, vectors: Vectors, main: Setting
) -> dict[str, Condition]:
    """Make the controls of the main setting from what its vectors were fitted on."""
    return controls(
        vectors,
        main,
        activations_behind(main.construction, behind),
        questions=behind.prompts,
        safe_side=safe_side_of(main.construction, side_of_prompts(job.config)),
        seed=job.config.seed,
    )


def evaluate_answers(
    job: Job,
    out: RunFolder,
    answers: list[Completion],
    names: list[str],
    gated: FittedGate | None,
    main_condition: str,
) -> None:
    """Score the answers of the test fold, and write every table that the report shows."""
    refused = refusing(answers, gated.fired, job.model) if gated is not None else []
    everything = job.score([*answers, *refused])
    margins = MARGINS | limits_of(job.config).margins()
    seed = job.config.seed
    result = everything.only([name for name in names if name != ALWAYS])
    out.write_table("evaluation", result.summary(seed=seed, margins=margins))
    out.write_table("scores", result.to_frame())
    out.write_rows("completions", list(result.answers()))
    out.write_table("judge_agreement", judge_agreement(result))
    if gated is not None:
        compared = beside_a_gate(everything, gated.fired, main_condition, GATED, seed=seed)
        scored = set(compared.scores["condition"])
        compared = compared.only([*(c for c in GATE_CONDITIONS if c in scored), main_condition])
        out.write_table("gate_comparison", compared.summary(seed=seed, margins=margins))
        out.write_table("gate_cells", cells(everything, gated.fired, GATED))
    n_cut = sum(answer.is_cut_in_thoughts for answer in answers)
    out.note(
        judges=_judges(job, result), tuned_by=_tuned_by(job), cut_in_thoughts=[n_cut, len(answers)]
    )


def _judges(job: Job, result: Evaluation) -> list[dict[str, Any]]:
    """Name the judges of a result, what each measures, and how far it agrees with labels."""
    agreement = getattr(job.refusal_judge, "agreement", None)
    rows = [{"name": result.judge, "measures": "refusal", "agreement": agreement}]
    for place, judge in enumerate(job.judges):
        measures = HEADLINE if place == 0 else "safe_2"
        agreement = getattr(judge, "agreement", None)
        rows.append({"name": judge.name, "measures": measures, "agreement": agreement})
    return rows


def _tuned_by(job: Job) -> dict[str, Any]:
    """Name the judge that picked answers and tuned, and say whether it reports as well."""
    judge = job.tuning_judge
    if judge is None:
        return {"name": "a list of safety phrases", "agreement": None, "reports": False}
    return {
        "name": judge.name,
        "agreement": getattr(judge, "agreement", None),
        "reports": judge.name == job.judges[0].name,
    }


def evaluate_fitted(
    job: Job,
    out: RunFolder,
    behind: Measured,
    vectors: Vectors,
    tuned: Calibration,
    main: Setting,
) -> None:
    """Answer questions that vectors were fitted on, and report them in a table of their own.

    The table is evaluation_fitted.csv. It shows how far a result flatters where vectors are tested
    on the questions they come from, and is never joined to the held-out one. Its conditions are
    unsteered, the main one, every contrast of prompts, and a random direction.

    Raises:
        CannotBeDone: If the judges were fitted on answers to all of these questions.
    """
    known_to = [*job.judges, job.refusal_judge]
    risky = not_known_to(known_to, select_prompts(job.folds.fit, label="unsafe"))
    if not risky:
        raise CannotBeDone("the judges were fitted on answers to every risky fit question.")
    questions = select_prompts(risky, limit=job.config.test_prompts)
    conditions: dict[str, Condition] = {UNSTEERED: ()}
    for setting in tuned.chosen.values():
        if setting == main or CONSTRUCTIONS[setting.construction].reads == "prompts":
            conditions[condition_of(setting)] = steering(vectors, setting)
    conditions["random"] = controls_of(job, behind, vectors, main)["random"]
    output = out.path / "fitted.jsonl"
    answers = sweep(job.model, questions, conditions, output=output, **job.how_steered)
    margins = MARGINS | limits_of(job.config).margins()
    summary = job.score(answers).summary(seed=job.config.seed, margins=margins)
    out.write_table("evaluation_fitted", summary)
