"""What a run works with: its prompts in folds, its model, its judge and its decoding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from workbench.engines.beside import Beside
from workbench.engines.opening import open_engine
from workbench.evaluation.metrics import HARD_SAFE
from workbench.evaluation.result import Evaluation
from workbench.evaluation.scoring import Perplexities, score_completions
from workbench.generation.answers import Completion
from workbench.judges.cache import cached
from workbench.judges.opening import JudgeSettings, check_judge, open_judge
from workbench.judges.text_quality import RememberedTexts, load_encoder
from workbench.models.load import default_name, load_model, load_notes, model_info
from workbench.models.packing import is_packed
from workbench.models.tokens import encode, template_text
from workbench.models.trusted_paths import untrusted_paths
from workbench.prompts.benchmarks import prompts_from
from workbench.prompts.choices import choice_prompts
from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import (
    Folds,
    Prompt,
    categories_of,
    in_turn,
    prompts_key,
    select_prompts,
    split_prompts,
    text_key,
)
from workbench.safesteer.calibration import NEUTRAL_TOKENS, Limits
from workbench.safesteer.config import settings_of_engine
from workbench.safesteer.constructions import GUIDED_BOTH, OWN, reads_of, wanted_names
from workbench.safesteer.own_answers import ALTERNATIVES, INSTRUCTION, instructed
from workbench.safesteer.paper import check_contrast_of, places_of
from workbench.safesteer.positive_control import refusals_of

if TYPE_CHECKING:
    from workbench.engines.base import Engine
    from workbench.files.store import PathLike
    from workbench.generation.decoding import Decoding
    from workbench.judges.base import Judge
    from workbench.models.hooked_model import HookedModel
    from workbench.safesteer.config import RunConfig

PHRASES = "phrases"
"""Names the list of safety phrases in place of a judge that tunes."""
TEST_NEUTRAL, TEST_SAFE, TUNE_NEUTRAL = 24, 30, 16
"""Neutral prompts, and safe ones that look risky, answered under every test condition: they show
what steering costs where there is no risk. The last is the number of neutral prompts on which the
calibration measures KL."""


@dataclass(frozen=True, eq=False)
class Job:
    """Hold what all stages of a run share.

    Attributes:
        config: Settings of the run.
        model: A hooked model.
        folds: Fit, tune and test prompts, disjoint.
        judges: One or two judges of safety that report; the first decides.
        tuning_judge: Judge of safety that picks the model's own answers and tunes the strength;
            None where a list of phrases does.
        refusal_judge: Judge of refusals.
        decoding: How answers are decoded.
        progress: Whether progress bars are shown.
        encoder: Sentence encoder that relevance is measured with.
        measured: Perplexities of the answers that were scored already.
        source: Another model that vectors are measured on, while they are; None for ``model``.
    """

    config: RunConfig
    model: HookedModel
    folds: Folds
    judges: tuple[Judge, ...]
    tuning_judge: Judge | None
    refusal_judge: Judge
    decoding: Decoding
    progress: bool
    encoder: RememberedTexts = field(default_factory=RememberedTexts)
    measured: Perplexities = field(default_factory=dict)
    source: HookedModel | None = None

    @property
    def categories(self) -> list[str]:
        """Risk categories of the test fold."""
        return categories_of(self.folds.test)

    @property
    def how(self) -> dict[str, Any]:
        """Keyword arguments of every function that answers prompts."""
        return {"decoding": self.decoding, "progress": self.progress}

    @property
    def how_steered(self) -> dict[str, Any]:
        """Keyword arguments of every function that answers prompts under steering."""
        return {**self.how, "transfer": self.config.vectors_from is not None}

    @property
    def of_vectors(self) -> Job:
        """The same job with the model that vectors are measured on."""
        return self if self.source is None else replace(self, model=self.source)

    def score(self, completions: Sequence[Completion]) -> Evaluation:
        """Score answers with the judges that report."""
        first, second = (*self.judges, None)[:2]
        return self._score(completions, safety_judge=first, second_judge=second)

    def score_for_tuning(self, completions: Sequence[Completion]) -> Evaluation:
        """Score answers to tune-fold questions, with the judge that tunes."""
        return self._score(completions, safety_judge=self.tuning_judge)

    def _score(self, completions: Sequence[Completion], **judges: Any) -> Evaluation:
        """Score answers; nothing is measured twice of an answer that comes again."""
        remembered: dict[str, Any] = {"encoder": self.encoder, "measured": self.measured}
        judges["judge"] = self.refusal_judge
        asked_by = self.decoding.asked_by
        return score_completions(self.model, completions, **judges, **remembered, **asked_by)

    def facts(self) -> dict[str, Any]:
        """Say what the run works with, for its notes."""
        of_source = {} if self.source is None else model_info(self.source).to_dict()
        return {
            "model": model_info(self.model).to_dict(),
            **({"vectors_from": of_source} if of_source else {}),
            "packed": is_packed(self.model),
            "loading": None if (notes := load_notes(self.model)) is None else notes.to_dict(),
            "slow_ways": dict(untrusted_paths(self.model)),
            "categories": self.categories,
            "folds": {
                name: dict(Counter(p.label for p in fold))
                for name, fold in self.folds._asdict().items()
            },
            "prompts": {
                "source": self.config.prompts or "data/prompts.jsonl",
                "sha256": prompts_key(chain(*self.folds)),
            },
        }


def load_job(
    config: RunConfig,
    *,
    verdicts: PathLike,
    model: HookedModel | None = None,
    fits: bool = True,
    progress: bool = False,
) -> Job:
    """Load and check what a run works with.

    Args:
        config: Settings of the run.
        verdicts: A jsonl file that keeps what judges said.
        model: A loaded model, instead of loading ``config.model``.
        fits: Whether vectors will be fitted; then the model that they come from is loaded too.
        progress: Show progress bars.

    Raises:
        ValueError: If prompts or model cannot be had as the settings say, or a prompt does not fit
            the model's context.
        OSError: If there is no sentence encoder to measure relevance with.
    """
    folds = folds_of(config)
    check_contrast_of(config, folds.fit)
    for name in {*config.judge, config.tuning_judge} - {PHRASES}:
        check_judge(name)
    model = model if model is not None else load_run_model(config)
    load_encoder()  # scoring needs it, after hours
    decoding = config.decoding()
    source = load_source(config, model) if fits else None
    places_of(config, model)  # says which layers the model lacks, before anything
    for each in (model, *([] if source is None else [source])):
        template_text(each, **decoding.asked_by)  # says what the template cannot do
        check_lengths(each, folds, config)
    judges = {
        name: open_for_run(name, config, model, verdicts, progress)
        for name in dict.fromkeys([*config.judge, config.tuning_judge])
        if name != PHRASES
    }
    reporting = tuple(judges[name] for name in config.judge)
    refusals = open_judge(config.refusal_judge)
    folds = without_questions_of([*reporting, refusals], folds)
    tuning = judges.get(config.tuning_judge)
    return Job(config, model, folds, reporting, tuning, refusals, decoding, progress, source=source)


def without_questions_of(judges: Sequence[Judge], folds: Folds) -> Folds:
    """Leave out of the test fold the questions whose answers a reporting judge was fitted on.

    Raises:
        ValueError: If no risky question would be left.
    """
    test = not_known_to(judges, folds.test)
    if len(test) < len(folds.test) and not any(p.label == "unsafe" for p in test):
        raise ValueError(
            "the judge was fitted on answers to every risky test question; take another judge, "
            "seed or set of prompts."
        )
    return folds._replace(test=test)


def not_known_to(judges: Sequence[Judge], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Leave out the questions whose answers a judge was fitted on."""
    known = frozenset().union(*(getattr(judge, "fitted_on", ()) for judge in judges))
    return [p for p in prompts if text_key(p.text, p.history) not in known]


def open_for_run(
    name: str, config: RunConfig, model: HookedModel, verdicts: PathLike, progress: bool
) -> Judge:
    """Open a judge that keeps its verdicts on disk, and its own model in memory only while asked.

    Raises:
        ValueError: If there is no such judge, or it cannot be loaded.
    """
    settings = JudgeSettings(
        config.judge_device, config.judge_dtype, config.judge_url, config.judge_key_env or None
    )
    judge = open_judge(name, settings=settings, model=model, keep=False)
    return cached(judge, verdicts, batch=64, progress=progress)


def check_lengths(model: HookedModel, folds: Folds, config: RunConfig) -> None:
    """Check before the first pass that every text a run will read or answer fits the context.

    These are the prompts of all folds, those that are answered with room for the answer, and fit
    questions with openings, under the instruction of the self-contrast and with two choices.

    Raises:
        ValueError: If some do not fit, with how many and the ids of the first ones.
    """
    risky = select_prompts(folds.fit, label="unsafe")
    tuned = select_prompts(folds.tune, label="unsafe", limit=config.tune_prompts)
    neutral = select_prompts(folds.tune, label="neutral", limit=TUNE_NEUTRAL)
    answered = [*risky, *tuned, *neutral, *questions_of_test(folds.test, config)]
    room = max(config.max_new_tokens, NEUTRAL_TOKENS)
    texts: list[tuple[list[Prompt], dict[str, Any]]] = [
        ([*folds.fit, *folds.tune, *folds.test], {}),
        (answered, {"max_new_tokens": room}),
        (answer_prompts(folds.fit), {"with_response": True}),
        (refusals_of(folds.fit), {"with_response": True}),
    ]
    reads = reads_of(config.constructions)
    if reads & set(OWN):
        asked = [instructed(risky, words) for words in (INSTRUCTION, ALTERNATIVES)]
        texts += [(prompts, {"max_new_tokens": room}) for prompts in asked]
    if "choices" in reads:
        texts.append((choice_prompts(folds.fit, seed=config.seed), {"with_response": True}))
    if GUIDED_BOTH in wanted_names(config.constructions):
        texts.append((select_prompts(folds.fit, label="neutral"), {"max_new_tokens": room}))
    problems: dict[str, str] = {}
    for prompts, how in texts:
        problems |= _misfits(model, prompts, {**config.decoding().asked_by, **how})
    if problems:
        first, others = next(iter(problems.values())), list(problems)[1:]
        names = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        more = f" So for {len(others)} more: {names}." if others else ""
        raise ValueError(f"{first}{more}")


def _misfits(
    model: HookedModel, prompts: Sequence[Prompt], how: Mapping[str, Any]
) -> dict[str, str]:
    """Map the ids of prompts that cannot be encoded to the reason."""
    try:
        encode(model, prompts, **how)
    except ValueError:
        pass
    else:
        return {}
    problems = {}
    for prompt in prompts:
        try:
            encode(model, [prompt], **how)
        except ValueError as error:
            problems[prompt.id] = str(error)
    return problems


def folds_of(config: RunConfig) -> Folds:
    """Split the prompts of a run into its folds.

    Raises:
        ValueError: If the data set cannot be read, a category is unknown, or nothing in it is
            unsafe.
    """
    prompts = prompts_from(config.prompts)
    project_prompts = prompts_from(None)
    if not any(p.label == "neutral" for p in prompts):  # the generic safe pool of the paper
        prompts += select_prompts(project_prompts, label="neutral")
    if not any(p.label == "safe" for p in prompts):  # what a gate must not open for
        prompts += select_prompts(project_prompts, category=HARD_SAFE)
    risk = categories_of(prompts)
    if config.categories is not None:
        risky = select_prompts(prompts, category=config.categories)
        beside = [p for p in prompts if p.label == "neutral" or p.category == HARD_SAFE]
        prompts = [_only(prompt, config.categories) for prompt in risky]
        prompts += [p for p in beside if not set(p.categories) & set(config.categories)]
    if not categories_of(prompts):
        asked = f" in {', '.join(map(repr, config.categories))}" if config.categories else ""
        known = f"; risk categories: {', '.join(risk)}" if risk else ""
        raise ValueError(
            f"no unsafe prompts{asked}: a run needs at least one risk category{known}."
        )
    return split_prompts(prompts, seed=config.seed)


def _only(prompt: Prompt, categories: Sequence[str]) -> Prompt:
    """Leave those of a prompt's categories that a run is about."""
    main, *others = (name for name in prompt.categories if name in categories)
    return replace(prompt, category=main, more_categories=tuple(others))


def load_run_model(config: RunConfig) -> HookedModel:
    """Load the model of a run."""
    shares = dict(share.split("=", 1) for share in config.max_memory or ())
    how: dict[str, Any] = {"packing": config.packing, "quantize": config.quantize}
    return load_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        device_map=config.device_map,
        max_memory={int(k) if k.isdecimal() else k: v for k, v in shares.items()} or None,
        **how,
    )


def engine_of(job: Job) -> Engine | None:
    """Open the engine that carries out what a run asks of its model; None where the model does.

    Raises:
        ImportError: If what it needs is not installed.
    """
    name_or_path = default_name() if job.config.model is None else job.config.model
    settings = settings_of_engine(job.config)
    return open_engine(job.config.engine, name_or_path, job.model, settings)


def engine_facts(name: str, engine: Engine | None) -> dict[str, Any]:
    """Say for a run's notes which engine it used, and what the model itself had to do."""
    done_here = list(engine.done_here) if isinstance(engine, Beside) else []
    return {"name": name, "done_by_the_model_here": done_here}


def load_source(config: RunConfig, model: HookedModel) -> HookedModel | None:
    """Load the model that vectors are measured on, where it is another one.

    Raises:
        ValueError: If it is the same model, or of another architecture.
    """
    if config.vectors_from is None:
        return None
    source = load_run_model(replace(config, model=config.vectors_from, vectors_from=None))
    there, here = model_info(source), model_info(model)
    if there.fingerprint == here.fingerprint:
        raise ValueError(
            f"vectors_from {config.vectors_from!r} is the model that is steered; leave it out."
        )
    if there.architecture != here.architecture:
        raise ValueError(
            f"no vectors from {there.name!r} for {here.name!r}: layers, width, neurons and heads "
            f"are {there.architecture} and {here.architecture}; take a model of the same "
            "architecture."
        )
    return source


def questions_of_test(test: Sequence[Prompt], config: RunConfig) -> list[Prompt]:
    """Choose the test fold's questions: risky, safe but risky-looking, and neutral ones."""
    risky = select_prompts(test, label="unsafe", limit=config.test_prompts)
    safe = in_turn([p for p in test if p.label == "safe"])[:TEST_SAFE]
    return risky + safe + select_prompts(test, label="neutral", limit=TEST_NEUTRAL)


def limits_of(config: RunConfig) -> Limits:
    """Say what steering may cost, as a run's settings have it."""
    most = math.inf if config.neutral_kl is None else config.neutral_kl
    shares = (config.relevance_loss, config.refusal_rise, config.degenerate_rise)
    return Limits(*shares, neutral_kl=most, log_perplexity=config.perplexity_rise)
