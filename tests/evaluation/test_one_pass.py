"""Scoring reads each answer once: for its perplexity and for a judge that reads its states."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.encoders import WordEncoder
from helpers.tiny_models import sentences

from workbench.evaluation import scoring
from workbench.evaluation.scoring import score_completions
from workbench.generation.answers import UNSTEERED, Completion, LogProbs, sweep
from workbench.generation.decoding import Decoding
from workbench.judges import framing
from workbench.judges.base import FRAMINGS, is_empty
from workbench.judges.cache import cached
from workbench.judges.framing import FramingJudge
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.text_quality import RememberedTexts
from workbench.models.sites import Site
from workbench.prompts.prompt import Message, Prompt
from workbench.safesteer.config import RunConfig
from workbench.safesteer.inputs import Job
from workbench.steering.interventions import AddVector, Intervention


@pytest.fixture(scope="module")
def judge(tiny) -> FramingJudge:
    weights = torch.randn(
        len(FRAMINGS), tiny.cfg.d_model, generator=torch.Generator().manual_seed(0)
    )
    return FramingJudge(
        tiny, Site(1, "resid_post"), weights, torch.zeros(len(FRAMINGS)), {"reader": "t"}
    )


@pytest.fixture(scope="module")
def answers(tiny) -> list[Completion]:
    prompts = [
        Prompt(f"p{i}", text, None, "fraud", "unsafe", "test")
        for i, text in enumerate(sentences(4))
    ]
    vector = 2 * torch.randn(tiny.cfg.d_model, generator=torch.Generator().manual_seed(1))
    conditions = {
        UNSTEERED: (),
        "closed": (),
        "steered": [Intervention(Site(2, "resid_post"), AddVector(vector))],
    }
    return sweep(tiny, prompts, conditions, Decoding(max_new_tokens=9))


class Read:
    """What was read: rows by the one pass, and answers by the judge itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[Any] = []
        self.by_judge: list[str] = []
        read_rows, hidden_states = scoring.read_rows, framing.hidden_states

        def spy_on_rows(model: Any, rows: Any, **keywords: Any) -> Any:
            self.rows += list(rows)
            return read_rows(model, rows, **keywords)

        def spy_on_judge(reader: Any, prompts: Any, texts: Any, *args: Any, **keywords: Any) -> Any:
            self.by_judge += [text for text in texts if not is_empty(text)]
            return hidden_states(reader, prompts, texts, *args, **keywords)

        monkeypatch.setattr(scoring, "read_rows", spy_on_rows)
        monkeypatch.setattr(framing, "hidden_states", spy_on_judge)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    return Read(monkeypatch)


def without_log_probs(completions: list[Completion]) -> list[Completion]:
    return [dataclasses.replace(c, log_probs=None) for c in completions]


def n_readable(completions: list[Completion]) -> int:
    """Count the answers that a judge reads, each once."""
    return len({(c.prompt.id, c.text) for c in completions if not is_empty(c.text)})


def check_same(one: Any, other: Any) -> None:
    pd.testing.assert_frame_equal(one.scores, other.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_framing_judge_of_the_same_model_reads_nothing_itself(
    is_cached: bool, tiny, judge, answers, read, tmp_path
) -> None:
    def ask(judge: Any, completions: list[Completion]) -> Any:
        return score_completions(tiny, completions, safety_judge=judge, encoder=WordEncoder())

    class Opaque:
        """The same judge, of which nobody can tell what it reads."""

        name = judge.name

        def __call__(self, prompts: Any, responses: Any) -> Any:
            return judge(prompts, responses)

    expected = ask(Opaque(), without_log_probs(answers))
    assert len(read.by_judge) == n_readable(answers)
    read.by_judge.clear()
    path = tmp_path / "verdicts.jsonl"
    check_same(ask(cached(judge, path) if is_cached else judge, answers), expected)
    assert read.by_judge == []
    if is_cached:
        kept = len(path.read_text().splitlines())
        assert kept == len({(c.prompt.id, c.text) for c in answers})


def test_what_the_judge_reads_in_other_tokens_is_read_in_these(tiny, judge, answers, read) -> None:
    """The text of some tokens may be written in others, which the judge reads."""
    prompt = answers[0].prompt
    [dog] = tiny.tokenizer("dog", add_special_tokens=False).input_ids[:1]
    eos = tiny.tokenizer.eos_token_id
    odd = Completion(prompt, tiny.tokenizer.decode([dog]), (dog, eos, eos), "length", UNSTEERED)
    found = score_completions(tiny, [odd], safety_judge=judge, encoder=WordEncoder())
    assert [len(row.ids) - row.response[0] for row in read.rows] == [3, 1]
    assert read.by_judge == []
    verdict = judge([prompt.text], [odd.text])[0]
    safe = found.scores.set_index("metric").loc["safe", "value"]
    assert safe == float(verdict.label == "safe")


@pytest.mark.parametrize("other", ["system prompt", "earlier turn", "another model"])
def test_a_judge_reads_for_itself_what_it_reads_behind_other_tokens(
    other: str, tiny, family_model, judge, answers, read
) -> None:
    how: dict[str, str] = {}
    completions = answers
    if other == "system prompt":
        how = {"system_prompt": "Be kind."}
    elif other == "earlier turn":
        history = (Message("user", "Hello."), Message("assistant", "Hello."))
        completions = [
            dataclasses.replace(c, prompt=dataclasses.replace(c.prompt, history=history))
            for c in answers
        ]
    else:
        judge = dataclasses.replace(judge, reader=family_model("qwen2"))
    found = score_completions(tiny, completions, safety_judge=judge, encoder=WordEncoder(), **how)
    assert len(read.by_judge) == n_readable(answers)
    verdicts = judge([c.prompt.text for c in completions], [c.text for c in completions])
    safe = found.scores[found.scores["metric"] == "safe"]["value"].tolist()
    scored = {"safe": 1.0, "unscored": math.nan}
    assert safe == pytest.approx([scored.get(v.label, 0.0) for v in verdicts], nan_ok=True)


def test_answers_that_came_with_log_probs_are_not_read_again(tiny, answers, read) -> None:
    expected = score_completions(tiny, without_log_probs(answers), encoder=WordEncoder())
    steered = {c.tokens for c in answers if c.log_probs is None}
    # Even where the same answer came first from a condition that does not know them.
    unknown = [dataclasses.replace(c, log_probs=None) for c in answers if c.condition == "closed"]
    read.rows.clear()
    others = [c for c in answers if c.condition != "closed"]
    found = score_completions(tiny, [*unknown, *others], encoder=WordEncoder())
    assert {row.ids[row.response[0] :] for row in read.rows} == steered
    order = ["condition", "prompt_id", "metric"]
    for one in (found, expected):
        one.scores.sort_values(order, inplace=True, ignore_index=True)
    check_same(found, expected)


def test_log_probs_of_another_model_or_system_prompt_are_measured_anew(tiny, answers, read) -> None:
    wrong = [
        dataclasses.replace(c, log_probs=LogProbs((-1.0,) * len(c.tokens), "another"))
        for c in answers
    ]
    expected = score_completions(tiny, without_log_probs(answers), encoder=WordEncoder())
    check_same(score_completions(tiny, wrong, encoder=WordEncoder()), expected)
    kind = {"encoder": WordEncoder(), "system_prompt": "Be kind."}
    expected = score_completions(tiny, without_log_probs(answers), **kind)
    check_same(score_completions(tiny, answers, **kind), expected)


def test_a_run_reads_and_encodes_each_answer_once(tiny, judge, answers, read, tmp_path) -> None:
    """Later rounds of the calibration score the answers of earlier ones again."""
    encoded: list[str] = []

    class Encoder(WordEncoder):
        def encode(self, texts: Any, **keywords: Any) -> Any:
            encoded.extend(texts)
            return super().encode(texts, **keywords)

    config = RunConfig()
    remembered = RememberedTexts(Encoder())
    kept = cached(judge, tmp_path / "verdicts.jsonl")
    folds: Any = ((), (), ())
    judges = (kept,), kept, RefusalPatterns()
    job = Job(config, tiny, folds, *judges, Decoding(max_new_tokens=9), False, remembered)
    first = [c for c in answers if c.prompt.id in ("p0", "p1")]
    job.score_for_tuning(first)
    n_rows = len(read.rows)
    job.score_for_tuning(first)
    assert len(read.rows) == n_rows
    found = job.score(answers)
    assert {row.prompt.id for row in read.rows[n_rows:]} & {"p0", "p1"} == set()
    assert len(encoded) == len(set(encoded))
    alone = score_completions(tiny, answers, safety_judge=judge, encoder=WordEncoder())
    check_same(found, alone)
