"""Score answers under several conditions, prompt by prompt.

Every number has its interval, and every condition its paired difference to the baseline.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from workbench.evaluation.metrics import (
    HEADLINE,
    LIKENESS,
    METRICS,
    SECOND,
    Column,
    alternative_columns,
    both,
    likeness_columns,
    reference_columns,
    refusal_columns,
    relevant_answers,
    reward_columns,
    text_columns,
    verdict_columns,
)
from workbench.evaluation.result import Evaluation
from workbench.files.store import PathLike
from workbench.generation.answers import UNSTEERED, Completion, Condition, asked_key, sweep
from workbench.generation.decoding import GREEDY, Decoding
from workbench.generation.reading import read_rows, with_answers
from workbench.judges.cache import CachedJudge
from workbench.judges.framing import FramingJudge
from workbench.judges.opening import open_judge
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.refusal import RefusalJudge
from workbench.judges.text_quality import perplexity_from_log_probs, relevance
from workbench.models.thoughts import ThoughtReader
from workbench.models.tokens import template_text
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Prompt, text_key

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from workbench.judges.base import Judge
    from workbench.judges.cache import Asked
    from workbench.judges.rewards import Rewards
    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords
    from workbench.models.tokens import Encoded
    from workbench.prompts.forms import PromptsLike


Perplexities = MutableMapping[Hashable, "float | None"]
"""Perplexities by question and answer, of one model and one way to ask: what was measured is not
measured again."""


T = TypeVar("T")


def evaluate(
    model: HookedModel,
    prompts: PromptsLike,
    conditions: Mapping[str, Condition],
    decoding: Decoding = GREEDY,
    *,
    baseline: str = UNSTEERED,
    judge: Judge | str | None = None,
    safety_judge: Judge | str | None = None,
    second_judge: Judge | str | None = None,
    rewards: Asked[Rewards] | None = None,
    encoder: Any = None,
    output: PathLike | None = None,
    progress: bool = False,
    transfer: bool = False,
    allow_fitted: bool = False,
) -> Evaluation:
    """Answer prompts under several conditions and score the answers.

    Args:
        model: A hooked model.
        prompts: The test fold, in any form that ``as_prompts`` reads.
        conditions: Name to interventions, see ``sweep``; a missing baseline is added, unsteered.
        decoding: Length, sampling, stops, batch size, system prompt and template keywords of the
            answers.
        baseline: Condition the others are compared with.
        judge: Judge of refusals; the refusal patterns by default.
        safety_judge: Judge of safety, or its name for ``open_judge``, such as "framing" or
            "local:MODEL"; see ``score_completions``.
        second_judge: Second judge of safety, see ``score_completions``.
        rewards: Reward model, see ``score_completions``.
        encoder: Sentence encoder for relevance, see ``load_encoder``.
        output: A jsonl file that keeps every answer as soon as it is there.
        progress: Show a progress bar.
        transfer: Allow vectors of another model of the same architecture.
        allow_fitted: Allow prompts that a vector was fitted on; what comes out then says nothing
            about new prompts.

    Returns:
        Scores of every answer by metric, with the answers; ``Evaluation.summary`` makes the table
        with intervals and differences.

    Raises:
        TypeError: If a judge is no judge object.
        ValueError: If a prompt is one that a vector was fitted on.
    """
    judges = _Judges.of(judge, safety_judge, second_judge, rewards, model)
    prompts = as_prompts(prompts)
    if not allow_fitted:
        _check_unseen(prompts, conditions)
    if baseline not in conditions:
        conditions = {baseline: (), **conditions}
    completions = sweep(
        model, prompts, conditions, decoding, output=output, progress=progress, transfer=transfer
    )
    return _score(model, completions, baseline, judges, encoder, decoding.asked_by)


class _Judges(NamedTuple):
    """Hold who says what of the answers: refusal, safety, safety again, and five rewards."""

    refusal: Judge
    safety: Judge | None
    second: Judge | None
    rewards: Asked[Rewards] | None

    @classmethod
    def of(
        cls,
        refusal: Judge | str | None,
        safety: Judge | str | None,
        second: Judge | str | None,
        rewards: Asked[Rewards] | None,
        model: HookedModel,
    ) -> _Judges:
        """Open judges that are named, and check all; refusals are found by patterns by default.

        Raises:
            TypeError: If one is no judge object.
            ValueError: If the second judge of safety is the first, or there is no first.
        """
        refusal, safety, second = (
            open_judge(judge, model=model) if isinstance(judge, str) else judge
            for judge in (refusal, safety, second)
        )
        asked = (refusal, safety, second, rewards)
        for judge, maker in zip(asked, ("open_judge",) * 3 + ("load_reward_model",), strict=True):
            if judge is not None and not (callable(judge) and hasattr(judge, "name")):
                raise TypeError(
                    f"a judge must be a judge object, got {judge!r:.60}; wb.judges.{maker} makes "
                    "one from its name."
                )
        if second is not None and (safety is None or safety.name == second.name):
            given = "no safety_judge" if safety is None else f"{second.name!r} as both"
            raise ValueError(
                f"second_judge gives a second opinion on safety, got {given}; give two judges of "
                "different names."
            )
        for judge in (safety, second):
            if isinstance(judge, RefusalPatterns | RefusalJudge):
                raise ValueError(
                    f"{judge.name!r} judges refusals and says nothing of safety; give it as judge, "
                    "and a judge of safety as safety_judge."
                )
        return cls(refusal or RefusalPatterns(), safety, second, rewards)

    @property
    def names(self) -> dict[str, str]:
        """Name each judge as ``Evaluation`` does."""
        return {
            "judge": self.refusal.name,
            "safety_judge": "safety_wording" if self.safety is None else self.safety.name,
            "second_judge": "" if self.second is None else self.second.name,
            "reward_judge": "" if self.rewards is None else self.rewards.name,
        }

    def state_reader(self, model: HookedModel) -> FramingJudge | None:
        """Find the judge of safety that reads the hidden states of ``model`` itself."""
        for judge in (self.safety, self.second):
            inner = judge.judge if isinstance(judge, CachedJudge) else judge
            if isinstance(inner, FramingJudge) and inner.reader is model:
                return inner
        return None

    def knowing(
        self, reader: FramingJudge | None, states: Mapping[tuple[str, str], Float[Tensor, " d"]]
    ) -> _Judges:
        """Return the same judges, of which one takes hidden states that are known."""

        def told(judge: Any) -> Any:
            if isinstance(judge, CachedJudge):
                return replace(judge, judge=told(judge.judge))
            return reader.knowing(states) if reader is not None and judge is reader else judge

        if reader is None:
            return self
        return self._replace(safety=told(self.safety), second=told(self.second))

    def columns(self, distinct: _Distinct) -> dict[str, Column]:
        """Make the columns of what the judges say of each answer."""
        columns = refusal_columns(_one_each(self.refusal, distinct))
        if self.safety is not None:
            first = _one_each(self.safety, distinct)
            second = None if self.second is None else _one_each(self.second, distinct)
            columns |= verdict_columns(first)
            columns |= {} if second is None else verdict_columns(second, SECOND)
            columns |= alternative_columns(first, columns["refusal"], second)
        if self.rewards is not None:
            columns |= reward_columns(_one_each(self.rewards, distinct))
        return columns


def _one_each(judge: Asked[T], distinct: _Distinct) -> list[T]:
    """Ask a judge about each answer; check that it says something of each.

    Raises:
        RuntimeError: If it does not.
    """
    said = list(judge(*distinct.pairs))
    if len(said) != len(distinct.completions):
        raise RuntimeError(
            f"judge {judge.name!r} gave {len(said)} verdicts for {len(distinct.completions)} "
            "answers; a judge returns one per answer, in order."
        )
    return said


def _check_unseen(prompts: Sequence[Prompt], conditions: Mapping[str, Condition]) -> None:
    """Raise where a prompt is one that a vector of a condition was fitted on.

    Raises:
        ValueError: With the first such prompt and condition.
    """
    id_of = {text_key(prompt.text, prompt.history): prompt.id for prompt in prompts}
    for name, condition in conditions.items():
        groups = condition.values() if isinstance(condition, Mapping) else [condition]
        for intervention in itertools.chain.from_iterable(groups):
            known = intervention.fitted_on & id_of.keys()
            if known:
                raise ValueError(
                    f"{len(known)} of {len(prompts)} prompts were used to fit the vector of "
                    f"{name!r} (the first is {id_of[min(known)]!r}); evaluate on the test fold of "
                    "split_prompts, or pass allow_fitted=True."
                )


def score_completions(
    model: HookedModel,
    completions: Sequence[Completion],
    *,
    baseline: str = UNSTEERED,
    judge: Judge | str | None = None,
    safety_judge: Judge | str | None = None,
    second_judge: Judge | str | None = None,
    rewards: Asked[Rewards] | None = None,
    encoder: Any = None,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    measured: Perplexities | None = None,
) -> Evaluation:
    """Score answers that are there already.

    Thoughts are no part of an answer: no judge and no measure reads them. An answer that was cut
    while the model was still thinking is unscored in every metric.

    Args:
        model: The unsteered model, for perplexity.
        completions: Answers under one condition or several, each with the same prompts.
        baseline: Condition the others are compared with, in differences and in BLEU and ROUGE-L.
        judge: Judge of refusals; the refusal patterns by default.
        safety_judge: Judge of safety (``load_framing_judge``, a guard model, an endpoint); without
            one the headline counts safety wording. Where it names framings there are the metrics
            ``safe_alternative`` and ``refusal_and_alternative``.
        second_judge: Another judge of safety, for ``safe_2`` and ``unsafe_2``, for how far the two
            agree (``judge_agreement``), and for ``leakage``: the share of the answers with a safe
            alternative that this judge calls unsafe nevertheless.
        rewards: Reward model (``load_reward_model``, or anything that is called like it), for
            ``reward_helpfulness`` and HelpSteer's four other attributes.
        encoder: Sentence encoder for relevance.
        system_prompt: The one the answers were made with.
        template_keywords: Those the answers were made with.
        measured: Keeps perplexities, so that several calls measure each answer once. One such
            mapping, empty at first, is for one model, system prompt and template keywords.

    Returns:
        Scores of every answer by metric. What no judge or measure can read, an answer in another
        language first of all, has no score (nan), and is counted as unscored in the summary.

    Raises:
        TypeError: If a judge is no judge object.
        ValueError: If the baseline is not among the conditions, a prompt has two answers of one
            sample number under one, or the second judge is no second one.
    """
    judges = _Judges.of(judge, safety_judge, second_judge, rewards, model)
    asked = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    return _score(model, completions, baseline, judges, encoder, asked, measured)


def _score(
    model: HookedModel,
    completions: Sequence[Completion],
    baseline: str,
    judges: _Judges,
    encoder: Any,
    asked: Mapping[str, Any],
    measured: Perplexities | None = None,
) -> Evaluation:
    """Score answers; ``asked`` is how they were asked for, for their perplexity."""
    completions = list(completions)
    reference = _baseline_texts(completions, baseline)
    distinct = _Distinct.of(completions)
    # Measures of an answer by itself are taken once for answers that come several times.
    perplexities, judges = _perplexities(model, distinct, asked, judges, measured)
    columns = text_columns(distinct.completions, perplexities) | judges.columns(distinct)
    columns["relevance"] = list(relevance(*distinct.pairs, encoder))
    columns["relevant_answer"] = relevant_answers(columns)
    # A judge of safety takes the place of safety wording in the headline.
    safe = columns.get("safe", columns["safety_wording"])
    columns[HEADLINE] = list(map(both, columns["relevant_answer"], safe))
    cut = [completion.is_cut_in_thoughts for completion in distinct.completions]
    # From here on there is one row per completion; likeness to another text needs all of them.
    columns = {
        name: [None if cut[i] else column[i] for i in distinct.places]
        for name, column in columns.items()
    }
    columns |= likeness_columns(completions, reference, baseline) | reference_columns(completions)
    scores = _tidy(completions, columns, baseline)
    return Evaluation(scores, baseline, tuple(completions), **judges.names)


def _perplexities(
    model: HookedModel,
    distinct: _Distinct,
    asked: Mapping[str, Any],
    judges: _Judges,
    measured: Perplexities | None,
) -> tuple[list[float | None], _Judges]:
    """Measure the perplexity of each answer behind its prompt and its thoughts.

    Where a judge reads the same model's hidden states they come from the same pass: the judges that
    are returned know them.
    """
    known = {} if measured is None else measured
    pairs = zip(distinct.keys, distinct.completions, strict=True)
    new = {key: completion for key, completion in pairs if key not in known}
    rows = dict(zip(new, with_answers(model, list(new.values()), asked), strict=True))
    judge = judges.state_reader(model)
    of_judge = {} if judge is None else _rows_of_judge(judge, new, rows)
    # What the model said of its own answers while it wrote them need not be measured again, but
    # where hidden states are read the pass gives both.
    of = asked_key(model, asked)
    log_probs = {
        key: torch.tensor(c.log_probs.values)
        for key, c in new.items()
        if key not in of_judge and c.log_probs is not None and c.log_probs.of == of
    }
    unread = [key for key in new if key not in log_probs]
    site = None if judge is None else judge.site
    read = read_rows(model, [*(rows[key] for key in unread), *of_judge.values()], site=site)
    log_probs |= dict(zip(unread, read.log_probs, strict=False))
    thoughts = ThoughtReader.of(model, template_text(model, **asked)[1])
    for key, c in new.items():
        is_answer = list(thoughts.split(c.tokens).is_answer) if c.thinking else slice(None)
        known[key] = perplexity_from_log_probs(log_probs[key][is_answer])
    states = {
        (new[key].prompt.text, new[key].text): state
        for key, state in zip(of_judge, read.states[len(unread) :], strict=True)
        if state is not None and bool(state.isfinite().all())
    }
    return [known[key] for key in distinct.keys], judges.knowing(judge, states)


def _rows_of_judge(
    judge: FramingJudge, completions: Mapping[T, Completion], rows: Mapping[T, Encoded]
) -> dict[T, Encoded]:
    """Give what a judge reads of answers.

    Only where it reads the answer behind the same tokens as the model wrote it (not where there was
    a system prompt or an earlier turn, say): elsewhere its own, shorter pass is cheaper.
    """
    questions = [c.prompt.text for c in completions.values()]
    read = judge.rows(questions, [c.text for c in completions.values()])
    return {
        key: one
        for (key, row), one in zip(rows.items(), read, strict=True)
        if one is not None and one.ids[: one.response[0]] == row.ids[: row.response[0]]
    }


class _Distinct(NamedTuple):
    """Hold each answer once: behind a closed gate answers are those of the unsteered model."""

    completions: list[Completion]
    keys: list[Hashable]
    """What tells each of them from the others."""
    places: list[int]
    """For every answer, where it is among the distinct ones."""

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> _Distinct:
        """Keep one of the completions that have question, text and tokens in common.

        It is the first one that knows its log-probabilities, if there is one.
        """
        keys = [
            (c.prompt.text, c.prompt.history, c.text, c.tokens, c.is_cut_in_thoughts)
            for c in completions
        ]
        first: dict[Any, Completion] = {}
        for key, completion in zip(keys, completions, strict=True):
            knows = completion.log_probs is not None
            if key not in first or (knows and first[key].log_probs is None):
                first[key] = completion
        place_of = {key: place for place, key in enumerate(first)}
        return cls(list(first.values()), list(first), [place_of[key] for key in keys])

    @property
    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the questions and their answers."""
        return [c.prompt.text for c in self.completions], [c.text for c in self.completions]


def _baseline_texts(completions: Sequence[Completion], baseline: str) -> dict[tuple[str, int], str]:
    """Map prompt ids and samples to the baseline's answers; check that none is there twice."""
    reference = {(c.prompt.id, c.sample): c.text for c in completions if c.condition == baseline}
    if not reference:
        known = ", ".join(repr(name) for name in dict.fromkeys(c.condition for c in completions))
        raise ValueError(f"no answers of the baseline {baseline!r}; conditions: {known}.")
    counts = Counter((c.prompt.id, c.condition, c.sample) for c in completions)
    (prompt_id, condition, _), times = counts.most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"prompt {prompt_id!r} has {times} answers under {condition!r}; "
            "differences need one per condition."
        )
    return reference


def _tidy(
    completions: Sequence[Completion], columns: Mapping[str, Column], baseline: str
) -> pd.DataFrame:
    """Make one row per prompt, condition and metric; nan where it could not be scored."""
    import pandas as pd

    has_samples = any(c.sample for c in completions)
    rows = [
        {
            "condition": c.condition,
            "category": c.prompt.category,
            "label": c.prompt.label,
            "prompt_id": c.prompt.id,
            **({"sample": c.sample} if has_samples else {}),
            "metric": metric,
            "value": math.nan if columns[metric][i] is None else columns[metric][i],
        }
        for i, c in enumerate(completions)
        for metric in METRICS
        if metric in columns and not (metric in LIKENESS and c.condition == baseline)
    ]
    return pd.DataFrame(rows)
