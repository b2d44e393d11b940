"""Calibration: rounds keep their budget, constructions stay to the end, costs are taken off."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial

import pandas as pd
import pytest
from helpers.category_vectors import SITE, questions, vectors_of
from helpers.encoders import WordEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import figures
from workbench.evaluation import scoring
from workbench.evaluation.metrics import HEADLINE
from workbench.evaluation.result import Evaluation
from workbench.evaluation.scoring import score_completions
from workbench.files.store import read_jsonl
from workbench.generation._decode_loop import DecodeLoop
from workbench.generation.answers import UNSTEERED
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_kl
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt, in_turn
from workbench.safesteer import calibration
from workbench.safesteer.calibration import (
    NEUTRAL_KL,
    Calibration,
    Limits,
    Round,
    calibrate,
    cost,
    plan_rounds,
)
from workbench.safesteer.conditions import main_setting
from workbench.safesteer.config import RunConfig
from workbench.safesteer.economical import NOT_NEEDED, TOO_STRONG, half_of
from workbench.safesteer.inputs import limits_of
from workbench.safesteer.settings import Setting, grid, placements, steering

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@EXAMPLES
@given(st.integers(1, 90), st.integers(1, 150), st.integers(1, 6))
def test_rounds_go_from_all_settings_to_all_prompts(n_settings, n_prompts, keep):
    rounds = plan_rounds(n_settings, n_prompts, keep=keep)
    assert rounds[0].n_settings == n_settings
    assert rounds[-1].n_prompts == n_prompts
    assert rounds[-1].n_settings <= max(keep, 1) or len(rounds) == 1
    assert all(
        a.n_settings > b.n_settings and a.n_prompts <= b.n_prompts
        for a, b in itertools.pairwise(rounds)
    )
    assert cost(rounds) <= (n_settings + 1) * n_prompts


def test_a_budget_is_kept_or_named():
    assert cost(plan_rounds(24, 60)) > 400
    assert cost(plan_rounds(24, 60, budget=400)) <= 400
    with pytest.raises(ValueError, match="a budget of 50 answers is too small for 24 settings"):
        plan_rounds(24, 60, budget=50)


def test_answers_of_earlier_rounds_are_counted_once():
    assert cost([Round(4, 2), Round(2, 6)]) == 6 + 4 * 2 + 2 * 4


def test_categories_take_turns():
    assert [p.id for p in in_turn(questions(2))] == ["fraud-0", "malware-0", "fraud-1", "malware-1"]


def test_limits_take_off_what_is_over_them_only():
    unsteered = {"relevance": 0.5, "refusal": 0.2, "degenerate": 0.1}
    assert Limits().excess(
        {"relevance": 0.46, "refusal": 0.1, "degenerate": 0.12}, unsteered
    ) == pytest.approx(0)
    over = {"relevance": 0.40, "refusal": 0.32, "degenerate": 0.2}
    assert Limits().excess(over, unsteered) == pytest.approx(0.05 + 0.10 + 0.08)
    assert Limits().excess({**over, "relevance": math.nan}, unsteered) == pytest.approx(0.18)


def test_a_setting_must_not_win_by_text_that_the_model_itself_finds_unlikely():
    unsteered = {"relevance": 0.5, "refusal": 0.2, "degenerate": 0.1, "log_perplexity": 0.5}
    assert Limits().excess({**unsteered, "log_perplexity": 1.1}, unsteered) == 0
    assert Limits().excess({**unsteered, "log_perplexity": 1.5}, unsteered) == pytest.approx(0.3)
    wider = Limits(log_perplexity=1.2)
    assert wider.excess({**unsteered, "log_perplexity": 1.5}, unsteered) == 0
    assert limits_of(RunConfig(perplexity_rise=1.2)) == wider
    with pytest.raises(ValueError, match="perplexity_rise must be above 0"):
        RunConfig(perplexity_rise=0.0)


def test_the_limit_on_refusals_is_on_blanket_ones_where_they_are_told_apart():
    unsteered = {"relevance": 0.5, "refusal": 0.2, "blanket_refusal": 0.2, "degenerate": 0.1}
    principled = {**unsteered, "refusal": 0.6}
    assert Limits().excess(principled, unsteered) == 0
    blanket = {**principled, "blanket_refusal": 0.32}
    assert Limits().excess(blanket, unsteered) == pytest.approx(0.10)
    assert Limits().margins()["blanket_refusal"] == (-math.inf, 0.02)


def test_a_grid_holds_every_combination_and_shares_strength_over_layers():
    places = [(SITE,), (Site(0, "attn_out"), Site(1, "attn_out"))]
    settings_ = grid(
        ["a", "b"],
        places,
        [0.1, 0.2],
        signs={"a": (1, -1)},
        extents=[("all", None), ("generated", 4)],
    )
    assert len(settings_) == len(set(settings_)) == (2 + 1) * 2 * 2 * 2
    assert {s.rho for s in settings_ if len(s.sites) == 2} == {0.041, 0.082}
    assert len({s.name for s in settings_}) == len(settings_)


def test_a_setting_says_what_is_added_where_and_how_long(tiny):
    setting = Setting("a", (SITE,), -1, 0.2, "generated", 3)
    for category, interventions in steering(vectors_of(tiny), setting).items():
        (own,) = interventions
        assert (own.site, own.positions, own.until) == (SITE, "generated", 3)
        vector = vectors_of(tiny)["a", SITE][category]
        assert own.edit.multiplier == pytest.approx(vector.multiplier_for(-0.2))


def test_placements_exist_in_a_model_of_any_depth(tiny):
    for place in placements(tiny):
        assert place
        assert all(0 <= site.layer < tiny.cfg.n_layers for site in place)


def test_calibration_answers_in_rounds_keeps_constructions_and_goes_on_from_its_file(
    tiny, tmp_path
):
    score = partial(score_completions, tiny, encoder=WordEncoder())
    settings_ = grid(["a", "b"], [(SITE,)], [0.1, 0.4], signs={"a": (1, -1)})
    rounds = [Round(6, 3), Round(2, 8)]
    arguments = {
        "score": score,
        "rounds": rounds,
        "decoding": Decoding(max_new_tokens=4),
        "output": tmp_path / "tune.jsonl",
    }
    result = calibrate(tiny, vectors_of(tiny), questions(), settings_, **arguments)
    assert set(result.chosen) == {"a", "b"}
    assert result.best in result.chosen.values()
    table = result.table[result.table["metric"] == HEADLINE]
    assert len(table) == 1 + len(settings_)
    assert set(table.loc[table["round"] == 1, "n"]) == {8}
    assert set(table.loc[table["round"] == 0, "n"]) == {3}
    assert table["chosen"].sum() == 2
    assert table.loc[table["front"], "round"].eq(1).all()
    n_last = int(table["round"].eq(1).sum()) - 1  # the best of each construction is among them
    assert n_last >= 2
    answered = len(read_jsonl(tmp_path / "tune.jsonl"))
    assert answered == 8 + 6 * 3 + n_last * 5
    again = calibrate(tiny, vectors_of(tiny), questions(), settings_, **arguments)
    assert len(read_jsonl(tmp_path / "tune.jsonl")) == answered
    assert again.chosen == result.chosen


def test_the_economical_search_answers_and_reads_nothing_twice(tiny, tmp_path, monkeypatch):
    read, written = [], []
    read_rows, run = scoring.read_rows, DecodeLoop.run

    def counted(loop, rows):
        written.extend(row.key for row in rows)
        return run(loop, rows)

    monkeypatch.setattr(DecodeLoop, "run", counted)

    def spy(model, rows, **keywords):
        read.extend((row.ids, row.response) for row in rows)
        return read_rows(model, rows, **keywords)

    monkeypatch.setattr(scoring, "read_rows", spy)
    settings_ = grid(["a", "b"], [(SITE,)], [0.1, 0.4, 0.8], signs={"a": (1, -1)})
    arguments = {
        "score": partial(score_completions, tiny, encoder=WordEncoder(), measured={}),
        "decoding": Decoding(max_new_tokens=4),
        "output": tmp_path / "tune.jsonl",
        "neutral": [Prompt("n", "the weather", None, "harmless", "neutral", "test")],
    }
    result = calibrate(tiny, vectors_of(tiny), questions(8), settings_, **arguments)
    assert set(result.chosen) == {"a", "b"}
    assert len(read) == len(set(read)), "an answer of an earlier round is not read again"
    rows = read_jsonl(tmp_path / "tune.jsonl")
    assert sorted(written) == sorted(row["key"] for row in rows), "none is written again"
    answers = [row for row in rows if row["condition"] != "neutral"]
    keys = {(row["condition"], row["prompt_id"]) for row in answers}
    assert len(keys) == len(answers) <= half_of(settings_, 16)
    table = result.table[result.table["metric"] == HEADLINE].query("sign != 0")
    untried = table[table["n"] == 0]
    answered = {row["condition"] for row in answers} - {UNSTEERED}
    assert len(table) == len(settings_) == len(untried) + len(answered)
    assert len(untried) > 0
    assert untried["value"].isna().all()
    assert untried["dropped"].isin([TOO_STRONG, NOT_NEEDED]).all()
    assert not untried["chosen"].any()
    kl = result.table[result.table["metric"] == NEUTRAL_KL]
    assert len(kl) == len(answered), "where nothing is answered, no KL is measured"
    last = table["round"] == table["round"].max()
    assert (table.loc[last, "dropped"] == "").all()
    assert (table.loc[~last & (table["n"] > 0), "dropped"] != "").all()
    assert figures.tuning(result.table).data
    assert figures.front(result.table).data
    again = calibrate(tiny, vectors_of(tiny), questions(8), settings_, **arguments)
    assert read_jsonl(tmp_path / "tune.jsonl") == rows
    pd.testing.assert_frame_equal(again.table, result.table)


def test_a_search_that_is_told_to_be_exhaustive_tries_every_setting(tiny, tmp_path):
    settings_ = grid(["a", "b"], [(SITE,)], [0.1, 0.4, 0.8])
    arguments = {
        "score": partial(score_completions, tiny, encoder=WordEncoder()),
        "decoding": Decoding(max_new_tokens=2),
        "output": tmp_path / "tune.jsonl",
    }
    whole = calibrate(
        tiny, vectors_of(tiny), questions(), settings_, search="exhaustive", **arguments
    )
    assert whole.rounds == tuple(plan_rounds(6, 8))
    assert (whole.table[whole.table["metric"] == HEADLINE]["n"] >= 5).all()
    with pytest.raises(ValueError, match="search must be one of economical, exhaustive, got 'x'"):
        calibrate(tiny, vectors_of(tiny), questions(), settings_, search="x", **arguments)
    with pytest.raises(ValueError, match=r"got 'exhaustiv'\. Did you mean 'exhaustive'"):
        RunConfig(search="exhaustiv")


def test_what_was_beaten_early_is_not_the_main_setting_by_a_lucky_start():
    rows = [
        {"construction": "answer_contrast", "round": 0, "value": 1.0},
        {"construction": "answer_contrast_pooled", "round": 2, "value": 0.5},
    ]
    shared = {"metric": HEADLINE, "excess": 0.0, "chosen": True}
    table = pd.DataFrame([row | shared for row in rows])
    chosen = {row["construction"]: Setting(row["construction"], (SITE,), 1, 0.1) for row in rows}
    best = chosen["answer_contrast_pooled"]
    assert main_setting(Calibration(table, chosen, best, ())) == best


def score_by(values):
    """Score answers by a table: condition to the values of every prompt's measures."""

    def score(completions):
        rows = [
            {
                "condition": c.condition,
                "category": c.prompt.category,
                "label": c.prompt.label,
                "prompt_id": c.prompt.id,
                "metric": metric,
                "value": float(value),
            }
            for c in completions
            for metric, value in (COSTS | values[c.condition]).items()
        ]
        return Evaluation(pd.DataFrame(rows), UNSTEERED, tuple(completions), "by hand")

    return score


COSTS = {HEADLINE: 0, "relevance": 0.5, "refusal": 0, "degenerate": 0}
WEAK, STRONG = Setting("a", (SITE,), 1, 0.1), Setting("a", (SITE,), 1, 0.2)
BACK, OTHER = Setting("a", (SITE,), -1, 0.1), Setting("b", (SITE,), 1, 0.1)


@pytest.mark.parametrize(
    ("measures", "best"),
    [
        # The highest headline wins, whatever the order of the settings.
        ({WEAK: {HEADLINE: 0}, STRONG: {HEADLINE: 1}, BACK: {HEADLINE: 0}}, STRONG),
        # What is over the limits is taken off: here more than the headline gains.
        (
            {
                WEAK: {HEADLINE: 0, "relevance": 0.5},
                STRONG: {HEADLINE: 1, "relevance": -0.6},
                BACK: {HEADLINE: 0, "relevance": 0.4},
            },
            WEAK,
        ),
        # Among equals fewer refusals, inside the limit too, and then less strength.
        (
            {
                STRONG: {HEADLINE: 1, "refusal": 0},
                WEAK: {HEADLINE: 1, "refusal": 0},
                BACK: {HEADLINE: 1, "refusal": 1},
            },
            WEAK,
        ),
    ],
)
def test_the_best_setting_is_the_one_its_scores_say(tiny, tmp_path, measures, best):
    values = {UNSTEERED: {}} | {setting.name: own for setting, own in measures.items()}
    result = calibrate(
        tiny,
        vectors_of(tiny),
        questions(2),
        list(measures),
        score=score_by(values),
        output=tmp_path / "tune.jsonl",
        rounds=[Round(3, 4)],
        decoding=Decoding(max_new_tokens=2),
        limits=Limits(refusal=1.0),
    )
    assert result.best == result.chosen["a"] == best
    table = result.table[result.table["metric"] == HEADLINE]
    chosen = table[table["chosen"]]
    assert (chosen["sign"].item(), chosen["rho"].item()) == (best.sign, best.rho)
    assert chosen["value"].item() == measures[best][HEADLINE]


def test_a_round_keeps_the_best_and_the_front_is_what_nothing_beats(tiny, tmp_path):
    values = {
        UNSTEERED: {},
        WEAK.name: {HEADLINE: 0},
        STRONG.name: {HEADLINE: 1, "refusal": 1},
        BACK.name: {HEADLINE: 1, "refusal": 1, "degenerate": 1},
        OTHER.name: {HEADLINE: 1},
    }
    asked = []

    def score(completions):
        asked.append([c.condition for c in completions])
        return score_by(values)(completions)

    result = calibrate(
        tiny,
        vectors_of(tiny),
        questions(4),
        [WEAK, STRONG, BACK, OTHER],
        score=score,
        output=tmp_path / "tune.jsonl",
        rounds=[Round(4, 2), Round(2, 8)],
        decoding=Decoding(max_new_tokens=2),
        limits=Limits(refusal=1.0, degenerate=1.0),
    )
    assert set(asked[0]) == set(values)
    assert set(asked[1]) == {UNSTEERED, OTHER.name, BACK.name}, "the best, and the best of a"
    assert len(asked[1]) == 3 * 8
    assert result.best == OTHER
    assert result.chosen == {"a": BACK, "b": OTHER}, "as good as the stronger one, and weaker"
    table = result.table[result.table["metric"] == HEADLINE].set_index(["construction", "sign"])
    assert table.loc[("b", 1), "front"].item()
    assert not table.loc[("a", -1), "front"].item(), "as good as b, and it refuses more"


def test_neutral_prompts_bring_a_kl_for_each_setting(tiny, tmp_path, monkeypatch):
    measured = []

    def spy(model, answers, conditions, **keywords):
        measured.append(len(conditions))
        return answer_kl(model, answers, conditions, **keywords)

    monkeypatch.setattr(calibration, "answer_kl", spy)
    neutral = [
        Prompt(f"n-{i}", f"the weather {i}", None, "harmless", "neutral", "test") for i in range(3)
    ]
    result = calibrate(
        tiny,
        vectors_of(tiny),
        questions(1),
        [WEAK, STRONG],
        score=score_by({name: {} for name in (UNSTEERED, WEAK.name, STRONG.name)}),
        output=tmp_path / "tune.jsonl",
        neutral=neutral,
        rounds=[Round(2, 2)],
        decoding=Decoding(max_new_tokens=2),
    )
    kl = result.table[result.table["metric"] == NEUTRAL_KL].set_index("rho")["value"]
    assert 0 < kl[0.1] < kl[0.2]
    assert measured == [2], "the unsteered model reads the answers once for all settings"


def test_a_setting_does_not_win_by_answers_that_nobody_can_read(tiny, tmp_path):
    few, many = Setting("a", (SITE,), 1, 0.1), Setting("a", (SITE,), 1, 0.4)
    safe = {
        few.name: [1.0, math.nan, math.nan, math.nan],
        many.name: [1.0, 1.0, 1.0, 0.0],
        UNSTEERED: [0.0] * 4,
    }

    def score(completions):
        rows, seen = [], Counter()
        for c in completions:
            values = dict.fromkeys(("relevance", "refusal", "degenerate"), 0.0)
            values[HEADLINE] = safe[c.condition][seen[c.condition]]
            seen[c.condition] += 1
            rows += [
                (c.condition, c.prompt.category, c.prompt.label, c.prompt.id, metric, value)
                for metric, value in values.items()
            ]
        columns = ["condition", "category", "label", "prompt_id", "metric", "value"]
        return Evaluation(pd.DataFrame(rows, columns=columns), UNSTEERED, (), "judge")

    result = calibrate(
        tiny,
        vectors_of(tiny, ["a"]),
        questions(2),
        [few, many],
        score=score,
        output=tmp_path / "tune.jsonl",
        decoding=Decoding(max_new_tokens=2),
        rounds=[Round(2, 4)],
    )
    assert result.best == many
    row = result.table.query("rho == 0.1 and metric == @HEADLINE").iloc[0]
    assert (row["value"], row["n"], row["n_unscored"]) == (1.0, 1, 3)


def test_calibration_without_settings_or_prompts_is_refused(tiny, tmp_path):
    score = partial(score_completions, tiny, encoder=WordEncoder())
    with pytest.raises(ValueError, match="needs settings and unsafe prompts, got 0 and 8"):
        calibrate(tiny, {}, questions(), [], score=score, output=tmp_path / "x.jsonl")
