"""Openings: every question gets pairs alike in style, of its category."""

from __future__ import annotations

import json

import pytest
from helpers.openings import CATEGORIES, OPENINGS, prompts_of

from workbench.prompts.openings import answer_prompts, read_openings
from workbench.prompts.prompt import Prompt, load_prompts, select_prompts, split_prompts


@pytest.mark.parametrize("safe", ["safe_reframing", "refusing"])
@pytest.mark.parametrize("per_prompt", [1, 2, 3, 7])
def test_questions_get_pairs_of_openings_alike_in_style(safe, per_prompt):
    questions = [p for p in prompts_of(6) if p.label == "unsafe"]
    rows = answer_prompts(prompts_of(6), OPENINGS, safe=safe, per_prompt=per_prompt)
    assert len(rows) == 2 * len(questions) * min(per_prompt, 3)
    assert len({row.id for row in rows}) == len(rows)
    pairs = {}
    for row in rows:
        pairs.setdefault(row.pair_id, []).append(row)
    style_of = {
        opening["text"]: (opening["category"], opening["kind"], opening["style"])
        for opening in OPENINGS
    }
    for pair in pairs.values():
        by_label = {row.label: row for row in pair}
        assert sorted(by_label) == ["safe", "unsafe"]
        assert by_label["safe"].text == by_label["unsafe"].text
        category, kind, style = style_of[by_label["safe"].response]
        assert style_of[by_label["unsafe"].response] == (category, "going_along", style)
        assert (category, kind) == (by_label["safe"].category, safe)
    used = [style_of[row.response] for row in rows]
    counts = {key: used.count(key) for key in set(used)}
    assert len(counts) == 2 * 2 * 3  # all go round
    assert max(counts.values()) == min(counts.values())


def test_a_category_without_openings_gets_those_of_the_others():
    question = [Prompt("q", "words", None, "new_category", "unsafe", "test")]
    rows = answer_prompts(question, OPENINGS, per_prompt=4)
    assert len(rows) == 8
    assert {row.category for row in rows} == {"new_category"}
    assert {row.response.split()[-2] for row in rows} == set(CATEGORIES)


def test_openings_that_make_no_pair_are_refused(tmp_path):
    questions = [p for p in prompts_of(2) if p.label == "unsafe"]
    with pytest.raises(
        ValueError,
        match="unknown kind of opening 'rude'; kinds: safe_reframing, going_along, refusing",
    ):
        answer_prompts(questions, OPENINGS, safe="rude")
    with pytest.raises(
        ValueError, match="no openings of kinds 'refusing' and 'going_along' in one style"
    ):
        answer_prompts(questions, [o for o in OPENINGS if o["kind"] != "refusing"], safe="refusing")
    with pytest.raises(ValueError, match="no unsafe prompts to put openings behind"):
        answer_prompts([p for p in prompts_of(2) if p.label == "neutral"], OPENINGS)
    path = tmp_path / "openings.jsonl"
    path.write_text(json.dumps({"category": "fraud", "kind": "refusing", "text": "No."}) + "\n")
    with pytest.raises(ValueError, match=r"openings\.jsonl, opening 1: column 'style' is missing"):
        read_openings(path)


def test_the_projects_own_openings_pair_up_in_every_category():
    fit = split_prompts(load_prompts()).fit
    unsafe = select_prompts(fit, label="unsafe")
    for safe in ("safe_reframing", "refusing"):
        rows = answer_prompts(fit, safe=safe)
        assert len(rows) == 6 * len(unsafe)
        assert {row.category for row in rows} == {p.category for p in unsafe}
        assert all(row.response for row in rows)
