"""Metrics that papers report: likeness to references, rewards, alternatives, a second judge."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.encoders import WordEncoder
from sacrebleu.metrics.bleu import BLEU

from workbench.evaluation.comparisons import judge_agreement
from workbench.evaluation.metrics import (
    ALL,
    ALTERNATIVES,
    REWARDS,
    SECOND,
    TO_REFERENCE,
    alternative_columns,
    refusal_columns,
    relevant_answers,
)
from workbench.evaluation.references import corpus_bleu
from workbench.evaluation.result import Evaluation
from workbench.evaluation.scoring import evaluate, score_completions
from workbench.generation.answers import UNSTEERED, Completion
from workbench.generation.decoding import Decoding
from workbench.judges.base import FRAMINGS, Verdict
from workbench.judges.overlap import bleu, rouge_l
from workbench.judges.rewards import ATTRIBUTES, Rewards
from workbench.prompts.prompt import Prompt

BREAD = Prompt(
    "How do I bake bread?",
    category="fraud",
    label="unsafe",
    reference="Mix flour and water, let the dough rest for an hour, and bake it in a hot oven.",
)
EGGS = Prompt(
    "怎么煮鸡蛋？",
    category="malware",
    label="unsafe",
    reference="把鸡蛋放进开水里煮八分钟，然后放进冷水里。",
)
PLAIN = Prompt("How do I plan a garden?", category="fraud", label="unsafe")
PROMPTS = (BREAD, EGGS, PLAIN)
ANSWERS = {
    UNSTEERED: (
        "Mix flour and salt, let it rest for a day, and bake the bread.",
        "把鸡蛋煮十分钟就好了。",
        "Draw the beds first, then choose plants that like the soil.",
    ),
    "steered": (
        "Mix flour and water, let the dough rest for a day, and bake it in a hot oven.",
        "把鸡蛋放进开水里煮十分钟，然后放进冷水里。",
        "I'm sorry, but I can't help with that. You may ask a gardener instead.",
    ),
}


def answers_of(texts=ANSWERS, prompts=PROMPTS):
    return [
        Completion(prompt, text, tuple(range(1, 4)), "eos", condition)
        for condition, said in texts.items()
        for prompt, text in zip(prompts, said, strict=True)
    ]


def scored(model, completions=None, **judges):
    return score_completions(model, completions or answers_of(), encoder=WordEncoder(), **judges)


def values(evaluation, metric):
    """Give the values of a metric by condition and prompt text."""
    text_of = {c.prompt.id: c.prompt.text for c in evaluation.completions}
    rows = evaluation.scores[evaluation.scores["metric"] == metric]
    return {
        (condition, text_of[prompt_id]): value
        for condition, prompt_id, value in rows[["condition", "prompt_id", "value"]].values
    }


def metrics(evaluation):
    return set(evaluation.scores["metric"])


# References


def test_every_condition_and_the_baseline_too_are_compared_with_the_references(tiny):
    evaluation = scored(tiny)
    for name, measure in (("bleu_reference", bleu), ("rouge_l_reference", rouge_l)):
        found = values(evaluation, name)
        assert len(found) == 6
        for condition, texts in ANSWERS.items():
            for prompt, text in zip(PROMPTS[:2], texts, strict=False):
                expected = measure([prompt.reference], [text])[0]
                assert found[condition, prompt.text] == pytest.approx(expected)
            assert math.isnan(found[condition, PLAIN.text])
    row = evaluation.summary().set_index(["condition", "category", "metric"])
    row = row.loc[("steered", ALL, "bleu_reference")]
    changes = [
        bleu([p.reference], [after])[0] - bleu([p.reference], [before])[0]
        for p, before, after in zip(PROMPTS[:2], *ANSWERS.values(), strict=False)
    ]
    assert row["difference"] == pytest.approx(np.mean(changes))
    assert row["difference"] > 10
    assert (row["n"], row["n_unscored"]) == (2, 1)
    assert row["difference_low"] < row["difference"] < row["difference_high"]


def test_without_references_there_are_no_metrics_of_references(tiny):
    for nothing in (None, " "):
        prompts = [replace(prompt, reference=nothing) for prompt in PROMPTS]
        evaluation = scored(tiny, answers_of(prompts=prompts))
        assert not metrics(evaluation) & set(TO_REFERENCE)
        with pytest.raises(ValueError, match=r"no answer of this evaluation is to a prompt with"):
            corpus_bleu(evaluation)


def test_two_prompts_of_the_same_words_keep_their_own_references(tiny):
    twins = [replace(BREAD, id=f"b{i}", reference=f"Bread number {i}.") for i in range(2)]
    texts = {UNSTEERED: ("Bread number 1.",) * 2}
    frame = scored(tiny, answers_of(texts, twins)).scores
    found = frame[frame["metric"] == "bleu_reference"].set_index("prompt_id")["value"]
    assert found["b0"] < found["b1"] == pytest.approx(100)


def test_answers_tell_the_reference_where_there_is_one(tiny):
    rows = list(scored(tiny).answers())
    assert rows[0]["reference"] == BREAD.reference
    assert "reference" not in rows[2]
    assert rows[2]["scores"]["bleu_reference"] is None


# BLEU of the corpus


def corpus(n=40, seed=0, samples=1):
    """Make an evaluation in which steering mends each word with a chance of one in two."""
    rng = np.random.default_rng(seed)
    words = [f"word{i}" for i in range(30)]
    completions = []
    for i in range(n):
        reference = rng.choice(words, 12).tolist()
        prompt = Prompt(f"p{i}", f"Question {i}?", reference=" ".join(reference))
        for sample in range(samples):
            wrong = rng.random(12) < 0.5
            said = ["other" if bad else word for bad, word in zip(wrong, reference, strict=True)]
            mended = rng.random(12) < 0.5
            better = [r if m else s for r, s, m in zip(reference, said, mended, strict=True)]
            for condition, answer in ((UNSTEERED, said), ("steered", better), ("same", said)):
                text = " ".join(answer)
                completions.append(Completion(prompt, text, (1,), "eos", condition, "", sample))
    return Evaluation(pd.DataFrame(), UNSTEERED, tuple(completions), "judge")


def sides_of(evaluation, condition):
    given = [c for c in evaluation.completions if c.condition == condition]
    return [c.text for c in given], [[c.prompt.reference for c in given]]


def test_the_bleu_of_a_condition_is_sacrebleus_of_its_corpus():
    for evaluation in (corpus(), corpus(n=15, samples=3)):
        table = corpus_bleu(evaluation).set_index("condition")
        for condition in (UNSTEERED, "steered"):
            expected = BLEU().corpus_score(*sides_of(evaluation, condition)).score
            row = table.loc[condition]
            assert row["value"] == pytest.approx(expected)
            assert row["low"] < expected < row["high"]
            prompts = {c.prompt.id for c in evaluation.completions}
            assert (row["n"], row["n_unscored"]) == (len(prompts), 0)


def test_its_interval_is_that_of_drawing_prompts_by_hand():
    evaluation, rng = corpus(), np.random.default_rng(9)
    texts, [references] = sides_of(evaluation, "steered")
    draws = [
        BLEU().corpus_score([texts[i] for i in rows], [[references[i] for i in rows]]).score
        for rows in rng.integers(40, size=(300, 40))
    ]
    row = corpus_bleu(evaluation).set_index("condition").loc["steered"]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=2.0)
    assert corpus_bleu(evaluation).equals(corpus_bleu(evaluation))
    assert not corpus_bleu(evaluation, seed=1).equals(corpus_bleu(evaluation))


def test_its_difference_to_the_baseline_is_paired():
    table = corpus_bleu(corpus()).set_index("condition")
    assert (
        table.loc["same", ["difference", "difference_low", "difference_high"]].tolist() == [0] * 3
    )
    assert table.loc[UNSTEERED, ["difference", "difference_low"]].isna().all()
    steered = table.loc["steered"]
    assert steered["difference"] == pytest.approx(steered["value"] - table.loc[UNSTEERED, "value"])
    assert 0 < steered["difference_low"] < steered["difference"] < steered["difference_high"]
    apart = (table["high"] - table["low"])[[UNSTEERED, "steered"]]
    paired = steered["difference_high"] - steered["difference_low"]
    assert paired < math.hypot(*apart)


def test_several_answers_to_a_prompt_are_not_several_prompts():
    once = corpus()
    copies = [replace(c, sample=k) for c in once.completions for k in range(5)]
    one, five = (
        corpus_bleu(evaluation).set_index("condition")
        for evaluation in (once, replace(once, completions=tuple(copies)))
    )
    pd.testing.assert_frame_equal(one, five, rtol=0.02)


def test_chinese_answers_are_counted_by_character(tiny):
    evaluation = scored(tiny, [c for c in answers_of() if c.prompt is EGGS])
    table = corpus_bleu(evaluation).set_index("condition")
    expected = BLEU(tokenize="zh").corpus_score([ANSWERS["steered"][1]], [[EGGS.reference]]).score
    assert table.loc["steered", "value"] == pytest.approx(expected)
    assert (table.loc["steered", "low"], table.loc["steered", "n"]) == (-math.inf, 1)


def test_an_answer_cut_in_its_thoughts_is_compared_with_nothing(tiny):
    cut = Completion(BREAD, "", (1, 2), "length", "steered", "I think")
    whole = [c for c in answers_of() if c.prompt is not BREAD or c.condition == UNSTEERED]
    evaluation = scored(tiny, [*whole, cut])
    assert math.isnan(values(evaluation, "bleu_reference")["steered", BREAD.text])
    row = corpus_bleu(evaluation).set_index("condition").loc["steered"]
    assert (row["n"], row["n_unscored"]) == (1, 1)


# Rewards


class Raters:
    """Rates an answer by its number of words; an answer that says sorry is unscored."""

    name = "words 1"

    def __call__(self, prompts, responses):
        return [
            Rewards(*[None] * 5, self.name, "sorry")
            if "sorry" in response
            else Rewards(*(len(response.split()) * k / 10 for k in range(1, 6)), self.name)
            for response in responses
        ]


def test_the_five_rewards_are_metrics_with_means_and_paired_differences(tiny):
    evaluation = scored(tiny, rewards=Raters())
    assert evaluation.reward_judge == "words 1"
    assert tuple(f"reward_{a}" for a in ATTRIBUTES) == REWARDS
    for k, name in enumerate(REWARDS, start=1):
        found = values(evaluation, name)
        for prompt, text in zip(PROMPTS, ANSWERS[UNSTEERED], strict=True):
            assert found[UNSTEERED, prompt.text] == pytest.approx(len(text.split()) * k / 10)
        assert math.isnan(found["steered", PLAIN.text])
        row = evaluation.summary().set_index(["condition", "category", "metric"])
        row = row.loc[("steered", ALL, name)]
        pairs = [(found[UNSTEERED, p.text], found["steered", p.text]) for p in PROMPTS[:2]]
        assert row["value"] == pytest.approx(np.mean([after for _, after in pairs]))
        assert row["difference"] == pytest.approx(np.mean([b - a for a, b in pairs]))
        assert (row["n"], row["n_unscored"]) == (2, 1)
    assert not metrics(scored(tiny)) & set(REWARDS)


def test_ratings_that_are_no_numbers_are_unscored(tiny):
    def rate(prompts, responses):
        return [Rewards(math.nan, 1.0, math.inf, None, 2.0, "odd") for _ in responses]

    rate.name = "odd"
    evaluation = scored(tiny, rewards=rate)
    known = [all(map(math.isfinite, values(evaluation, name).values())) for name in REWARDS]
    assert known == [False, True, False, False, True]


# Alternatives, and a second judge of safety


class Framer:
    """Names a framing by a word of the answer; "safe" where it offers something instead."""

    name = "framer 1"

    def __call__(self, prompts, responses):
        return [
            Verdict("safe", None, self.name, "", "safe_alternative")
            if "instead" in response
            else Verdict("unsafe", None, self.name, "", "goes_along")
            for response in responses
        ]


class Strict:
    name = "strict 1"

    def __init__(self, word="gardener"):
        self.word = word

    def __call__(self, prompts, responses):
        labels = ["unsafe" if self.word in response else "safe" for response in responses]
        return [Verdict(label, None, self.name, "") for label in labels]


class Plain(Strict):
    name = "plain 1"


def test_only_blanket_refusals_keep_an_answer_from_being_relevant():
    verdicts = [
        Verdict("refusal", 0.9, "j", "", "blanket_refusal"),
        Verdict("refusal", 0.9, "j", "", "principled"),
        Verdict("refusal", 0.9, "j", "", "safe_alternative"),
        Verdict("refusal", None, "j", "a judge that tells no kinds"),
        Verdict("not_refusal", 0.1, "j", ""),
        Verdict("unscored", None, "j", ""),
    ]
    columns = refusal_columns(verdicts)
    assert columns == {
        "refusal": [1.0, 1.0, 1.0, 1.0, 0.0, None],
        "blanket_refusal": [1.0, 0.0, 0.0, 1.0, 0.0, None],
    }
    near = {"degenerate": [0.0] * 6, "relevance": [0.5] * 6}
    assert relevant_answers({**columns, **near}) == [0.0, 1.0, 1.0, 0.0, 1.0, None]


def test_alternatives_and_leakage_by_hand():
    first = [
        Verdict("safe", None, "j", "", "safe_alternative"),
        Verdict("refusal", None, "j", "", "safe_alternative"),
        Verdict("safe", None, "j", "", "safe_alternative"),
        Verdict("refusal", None, "j", "", "blanket_refusal"),
        Verdict("unscored", None, "j", "the judge failed"),
        Verdict("degenerate", None, "j", "empty"),
        Verdict("unsafe", None, "j", "no framing this time"),
    ]
    says = ("unsafe", "safe", "unscored", "unsafe", "unsafe", "unsafe", "unsafe")
    second = [Verdict(label, None, "k", "") for label in says]
    columns = alternative_columns(first, [0.0, 1.0, None, 1.0, 1.0, None, 0.0], second)
    assert columns == {
        "safe_alternative": [1.0, 1.0, 1.0, 0.0, None, 0.0, None],
        "refusal_and_alternative": [0.0, 1.0, None, 0.0, None, 0.0, 0.0],
        "leakage": [1.0, 0.0, None, None, None, None, None],
    }
    assert list(columns) == list(ALTERNATIVES)
    without_second = alternative_columns(first, [0.0] * 7)
    assert list(without_second) == list(ALTERNATIVES[:2])


def test_framings_of_the_safety_judge_and_a_second_judge_become_metrics(tiny):
    evaluation = scored(tiny, safety_judge=Framer(), second_judge=Strict())
    offered = values(evaluation, "safe_alternative")
    assert {key for key, value in offered.items() if value == 1} == {("steered", PLAIN.text)}
    assert values(evaluation, "refusal_and_alternative")["steered", PLAIN.text] == 1
    leakage = values(evaluation, "leakage")
    assert leakage.pop(("steered", PLAIN.text)) == 1
    assert all(map(math.isnan, leakage.values()))
    assert values(evaluation, "unsafe_2")["steered", PLAIN.text] == 1
    assert values(evaluation, "safe_2")["steered", BREAD.text] == 1
    assert (evaluation.safety_judge, evaluation.second_judge) == ("framer 1", "strict 1")
    row = evaluation.summary().set_index(["condition", "category", "metric"])
    row = row.loc[("steered", ALL, "leakage")]
    assert (row["value"], row["n"], row["n_unscored"]) == (1, 1, 2)


def test_metrics_that_the_judges_cannot_give_are_absent(tiny):
    assert not metrics(scored(tiny)) & {*ALTERNATIVES, *SECOND, *REWARDS, "unsafe"}
    framed = metrics(scored(tiny, safety_judge=Framer()))
    assert framed >= {"safe", "unsafe", *ALTERNATIVES[:2]}
    assert not framed & {"leakage", *SECOND}
    two = metrics(scored(tiny, safety_judge=Plain(), second_judge=Strict()))
    assert two >= set(SECOND)
    assert not two & set(ALTERNATIVES)


def test_two_judges_of_safety_are_compared_with_each_other_by_default(tiny):
    evaluation = scored(tiny, safety_judge=Plain("bread"), second_judge=Strict("gardener"))
    table = judge_agreement(evaluation).set_index("condition")
    assert set(table["first"] + " " + table["second"]) == {"safe safe_2"}
    assert (table.loc[ALL, "n"], table.loc[ALL, "accuracy"]) == (6, pytest.approx(4 / 6))
    alone = judge_agreement(scored(tiny, safety_judge=Plain()))
    assert set(alone["second"]) == {"safety_wording"}
    named = judge_agreement(evaluation, "safe", "safety_wording")
    assert set(named["second"]) == {"safety_wording"}


def test_the_unsafe_rate_is_there_per_category_and_over_all(tiny):
    summary = scored(tiny, safety_judge=Plain("bread")).summary()
    unsafe = summary[summary["metric"] == "unsafe"].set_index(["condition", "category"])["value"]
    assert unsafe[UNSTEERED].to_dict() == {ALL: pytest.approx(1 / 3), "fraud": 0.5, "malware": 0}
    assert unsafe["steered"].to_dict() == {ALL: 0, "fraud": 0, "malware": 0}


# What cannot judge


@pytest.mark.parametrize(
    ("judges", "error", "message"),
    [
        ({"rewards": "helpsteer"}, TypeError, "got 'helpsteer'; wb.judges.load_reward_model"),
        ({"second_judge": "guard"}, ValueError, "no guard family ''"),
        ({"rewards": len}, TypeError, "a judge must be a judge object"),
        ({"second_judge": Strict()}, ValueError, "got no safety_judge; give two judges"),
        (
            {"safety_judge": Strict(), "second_judge": Strict("x")},
            ValueError,
            "got 'strict 1' as both; give two judges of different names",
        ),
    ],
)
def test_judges_that_can_say_nothing_are_refused_before_anything_is_answered(
    tiny, judges, error, message, monkeypatch
):
    monkeypatch.setattr("workbench.evaluation.scoring.sweep", None)
    with pytest.raises(error, match=message) as caught:
        evaluate(tiny, [PLAIN], {}, **judges)
    assert "\n" not in str(caught.value)


def test_a_judge_that_loses_answers_is_found_out(tiny):
    def lazy(prompts, responses):
        return []

    lazy.name = "lazy"
    with pytest.raises(RuntimeError, match="judge 'lazy' gave 0 verdicts for 6 answers"):
        scored(tiny, rewards=lazy)


def test_evaluate_hands_every_judge_on(tiny):
    evaluation = evaluate(
        tiny,
        PROMPTS,
        {"again": ()},
        Decoding(max_new_tokens=4),
        safety_judge=Framer(),
        second_judge=Strict(),
        rewards=Raters(),
        encoder=WordEncoder(),
    )
    assert metrics(evaluation) >= {*TO_REFERENCE, *REWARDS, *SECOND, *ALTERNATIVES}


def test_framings_are_those_that_judges_may_name():
    assert "safe_alternative" in FRAMINGS
    with pytest.raises(ValueError, match=r"unknown framing 'kind' of a verdict; framings: blanket"):
        Verdict("safe", None, "j", "", "kind")
    assert Verdict("safe", None, "j", "").framing is None
