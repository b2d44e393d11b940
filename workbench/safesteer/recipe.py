"""SafeSteer on one page: the recipe that strings the rooms together, from prompts to a folder that holds the whole result.

fit fold   activations -> vectors (prompt contrast, answer contrast), directions for the neurons
tune fold  separability, neuron scores, sign, place and strength of each construction, the gate's threshold
test fold  answered once: unsteered, every construction, behind a gate, controls

Source: SafeSteer (Ghosh et al. 2025, arXiv:2506.04250) for the vectors and where they are added; contrasts of answers, the
calibration, the gate and the controls are this project's (README.md says why).
"""

from __future__ import annotations

import datetime
import itertools
from collections import Counter
from functools import partial
from pathlib import Path
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
from workbench.evaluation.scoring import HEADLINE, MARGINS, score_completions
from workbench.files.store import PathLike, write_jsonl
from workbench.generation.answers import Condition, sweep
from workbench.generation.decoding import Decoding
from workbench.judges.framing import FramingJudge, framing_judge_for
from workbench.models.activations import cache_activations
from workbench.models.load import HookedModel, model_info
from workbench.models.packing import is_packed
from workbench.prompts.contrasts import has_twins
from workbench.prompts.prompt import Folds, Prompt, categories_of, prompts_key, select_prompts
from workbench.safesteer.calibration import calibrate
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
    GUIDED,
    PROMPT,
    Measured,
    attributed_site,
    constructions_of,
    fit_all,
    fitted_on,
    measure,
)
from workbench.safesteer.own_answers import kept_by, self_contrast, went_along
from workbench.safesteer.settings import Setting, Vectors, grid, placements, steering
from workbench.steering.gates import fit_gate, save_gate
from workbench.steering.separability import layer_separability

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from workbench.safesteer.config import RunConfig
from workbench.safesteer.inputs import (
    TUNE_NEUTRAL,
    _test_questions,
    folds_of,
    limits_of,
    load_run_model,
)
from workbench.safesteer.run_folder import _note, _open_run, _save_vectors, _timed, _write_csv

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
        "packed": is_packed(model),
        "categories": categories,
        "folds": {
            name: dict(Counter(p.label for p in fold)) for name, fold in folds._asdict().items()
        },
        "prompts": {
            "source": config.prompts or "data/prompts.jsonl",
            "sha256": prompts_key(itertools.chain(*folds)),
        },
    }
    _note(folder, notes)

    safety_judge = framing_judge_for(model)
    decoding = Decoding(max_new_tokens=config.max_new_tokens, seed=config.seed)
    answers: Any = {"decoding": decoding, "progress": progress}
    with _timed(notes, "own answers"):
        needs_own = config.constructions is None or any(
            "self" in name for name in config.constructions
        )
        kept: Any = {"output": folder / "fit.jsonl", **answers}
        own = _own_answers(model, folds.fit, safety_judge, **kept) if needs_own else []
        wants_guided = GUIDED in (config.constructions or ())
        guided = (
            went_along(model, folds.fit, kept_by(safety_judge)[1], **kept) if wants_guided else []
        )
    with _timed(notes, "activations"):
        measured = measure(
            model,
            folds,
            folder / "activations",
            own_answers=own,
            went_along=guided,
            progress=progress,
        )
    with _timed(notes, "vectors"):
        vectors = fit_all(measured, folds.fit, config.constructions)
        notes["vectors"] = _save_vectors(folder / "vectors", vectors)
    with _timed(notes, "separability"):
        residual = {
            site: acts
            for site, acts in measured.prompts.items()
            if site.kind in ("resid_post", "attn_out")
        }
        _write_csv(folder / "separability.csv", layer_separability(residual, folds.fit, folds.tune))
    with _timed(notes, "neurons"):
        _write_csv(
            folder / "neurons.csv", _neurons(model, measured, folds, categories, config.seed)
        )
    _note(folder, notes)

    score = partial(score_completions, model, safety_judge=safety_judge)
    with _timed(notes, "tune"):
        tuned = calibrate(
            model,
            vectors,
            select_prompts(folds.tune, label="unsafe", limit=config.tune_prompts),
            grid(
                constructions_of(vectors),
                placements(model),
                config.rhos,
                signs={PROMPT: (1, -1), GUIDED: (1, -1)},
            ),
            score=score,
            output=folder / "tune.jsonl",
            neutral=select_prompts(folds.tune, label="neutral", limit=TUNE_NEUTRAL),
            limits=limits_of(config),
            **answers,
        )
        _write_csv(folder / "tuning.csv", tuned.table)
        notes["chosen"] = {
            s.construction: describe(s, vectors, tuned.table) for s in tuned.chosen.values()
        }
        notes["rounds"] = [one._asdict() for one in tuned.rounds]
        _note(folder, notes)
    main = main_setting(tuned)
    steered = condition_of(main)
    with _timed(notes, "gate"):
        site = gate_site(main)
        gate = fit_gate(
            measured.prompts[site].of(folds.fit),
            measured.prompts[site].of(folds.tune),
            neutral_rate=config.neutral_rate,
            hard_rate=config.hard_safe_rate,
        )
        save_gate(folder / "gate.safetensors", gate)
        held_out = cache_activations(
            model, folds.test, [site], store=folder / "activations", progress=progress
        )[site]
        for name, table in (("rates", activation_rates), ("confusion", confusion), ("roc", roc)):
            _write_csv(folder / f"gate_{name}.csv", table(gate, held_out))
        opened = dict(
            zip((p.id for p in held_out.prompts), opened_for(gate, held_out), strict=True)
        )
        fired = {prompt_id: category != CLOSED for prompt_id, category in opened.items()}
        notes["gate"] = {
            "site": str(site),
            "construction": main.construction,
            "condition": steered,
            "threshold": str(round(gate.threshold, 4)),
            "asked": {name: own.rate for name, own in gate.thresholds.items()},
        }
    with _timed(notes, "test"):
        questions = _test_questions(folds.test, config)
        share = sum(fired[p.id] for p in questions) / len(questions)
        made: dict[str, Condition] = {
            condition_of(s): steering(vectors, s) for s in tuned.chosen.values()
        }
        made |= behind_gate(vectors, main, gate, share)
        made |= controls(vectors, main, fitted_on(main.construction, measured), seed=config.seed)
        conditions = for_everyone(made, questions)
        completions = sweep(model, questions, conditions, output=folder / "test.jsonl", **answers)
    with _timed(notes, "evaluate"):
        everything = score([*completions, *refusing(completions, fired, model)])
        margins = MARGINS | limits_of(config).margins()
        result = everything.only([name for name in conditions if name != ALWAYS])
        _write_csv(folder / "evaluation.csv", result.summary(seed=config.seed, margins=margins))
        _write_csv(folder / "scores.csv", result.to_frame())
        write_jsonl(folder / "completions.jsonl", result.answers())
        if safety_judge is not None:
            _write_csv(folder / "judge_agreement.csv", judge_agreement(result))
        beside = beside_a_gate(everything, fired, steered, GATED, seed=config.seed)
        beside = beside.only(
            [name for name in GATE_CONDITIONS if name in set(beside.scores["condition"])]
            + [steered]
        )
        _write_csv(
            folder / "gate_comparison.csv", beside.summary(seed=config.seed, margins=margins)
        )
        _write_csv(folder / "gate_cells.csv", cells(everything, fired, GATED))
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


def _own_answers(
    model: HookedModel, fit: Sequence[Prompt], judge: FramingJudge | None, **answers: Any
) -> list[Prompt]:
    """Rows of the self-contrast; none where the model has too few pairs of answers to give."""
    keep_safe, keep_unsafe = kept_by(judge)
    rows = self_contrast(model, fit, keep_safe=keep_safe, keep_unsafe=keep_unsafe, **answers)
    return rows if len(rows) >= 2 * LEAST_PAIRS else []


def _neurons(
    model: HookedModel, measured: Measured, folds: Folds, categories: Sequence[str], seed: int
) -> pd.DataFrame:
    from workbench.neurons.ranking import attribute_neurons

    fit, tune = (
        {site: acts.of(fold) for site, acts in measured.prompts.items()}
        for fold in (folds.fit, folds.tune)
    )
    return attribute_neurons(
        model,
        fit,
        tune,
        site=attributed_site(model),
        categories=categories,
        reference="twins" if has_twins(folds.fit, categories) else "neutral",
        seed=seed,
    )


def describe(setting: Setting, vectors: Vectors, table: pd.DataFrame) -> dict[str, Any]:
    """A chosen setting as a run's notes keep it: places, sign, strength, multipliers by category and site, and why."""
    own = table[table["chosen"] & (table["construction"] == setting.construction)]
    row = own[own["metric"] == HEADLINE].iloc[0]
    over = "" if row["feasible"] else f"; it is over the limits by {row['excess']:.2f}"
    multipliers = {
        category: {
            str(s): setting.sign
            * vectors[setting.construction, s][category].multiplier_for(setting.rho)
            for s in setting.sites
        }
        for category in vectors[setting.construction, setting.sites[0]]
    }
    return {
        "sites": [str(site) for site in setting.sites],
        "sign": setting.sign,
        "rho": setting.rho,
        "positions": setting.positions,
        "until": setting.until,
        "multiplier": multipliers,
        "reason": f"most safe and helpful answers (proxy) on the tune fold, less costs over the limits: {row['value']:.2f}, n={row['n']}{over}",
    }
