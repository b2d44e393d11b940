"""Contrasts: the rows of every comparison, in the order of the prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.prompts.contrasts import (
    CLOSED_FOR,
    KINDS,
    generic_rows,
    has_twins,
    kind_of,
    neutral_rows,
    other_unsafe_rows,
    paired_rows,
    rows_against,
    rows_that_must_not_open,
    safe_rows,
    sides_of,
    sides_to_fit,
    unsafe_rows,
)
from workbench.prompts.prompt import LABELS, Prompt

CATEGORIES = ("fraud", "malware", "harmless")


def prompt(category, label, pair=None):
    return Prompt("id", "text", None, category, label, "test", pair)


PROMPTS = [
    prompt("fraud", "safe", "b"),  # 0: the twin of 3
    prompt("fraud", "unsafe", "a"),  # 1
    prompt("malware", "unsafe", "c"),  # 2: its twin is not here
    prompt("fraud", "unsafe", "b"),  # 3
    prompt("harmless", "neutral"),  # 4
    prompt("fraud", "safe", "a"),  # 5: the twin of 1
    prompt("fraud", "unsafe"),  # 6: without a pair
    prompt("hard_safe", "safe"),  # 7: a look-alike
    prompt("harmless", "safe"),  # 8: everyday by its category
]


def test_rows_are_found_by_label_and_category():
    assert unsafe_rows(PROMPTS) == [1, 2, 3, 6]
    assert unsafe_rows(PROMPTS, "fraud") == [1, 3, 6]
    assert safe_rows(PROMPTS) == [0, 5, 7, 8]
    assert safe_rows(PROMPTS, "fraud") == [0, 5]
    assert neutral_rows(PROMPTS) == [4]
    assert other_unsafe_rows(PROMPTS, "fraud") == [2]


def test_pairs_go_by_pair_id_and_leave_out_who_has_none():
    assert paired_rows(PROMPTS, "fraud") == ([1, 3], [5, 0])
    assert paired_rows(PROMPTS, "malware") == ([], [])
    twice = [*PROMPTS, prompt("fraud", "safe", "a")]
    assert paired_rows(twice, "fraud") == ([1, 3], [9, 0])


def test_the_generic_side_is_everyday_prompts_or_else_all_safe_ones():
    assert generic_rows(PROMPTS) == [4, 8]
    assert generic_rows(PROMPTS[:4]) == [0]
    assert sides_to_fit(PROMPTS, "fraud", "generic") == ([1, 3, 6], [4, 8])
    assert sides_to_fit(PROMPTS, "fraud", "paired") == ([1, 3], [5, 0])
    with pytest.raises(ValueError, match="unknown safe_side 'twins'; allowed: paired, generic"):
        sides_to_fit(PROMPTS, "fraud", "twins")


def test_twins_as_a_group_need_no_pair():
    assert rows_against(PROMPTS[1:], "fraud", "twins") == [4]
    assert sides_of(PROMPTS[1:], "fraud", "twins").unsafe.tolist() == [0]
    assert has_twins(PROMPTS, ["fraud"])
    assert not has_twins(PROMPTS, ["fraud", "malware"])
    with pytest.raises(ValueError, match="unknown comparison 'safe'; allowed: twins, neutral, oth"):
        rows_against(PROMPTS, "fraud", "safe")
    with pytest.raises(ValueError, match="unknown comparison 'safe'"):
        sides_of(PROMPTS, "fraud", "safe")


def test_sides_know_rows_labels_and_pairs():
    rows, is_unsafe, pairs = sides_of(PROMPTS, "fraud", "twins").labels()
    assert rows.tolist() == [1, 3, 5, 0]
    assert is_unsafe.tolist() == [True, True, False, False]
    assert pairs.tolist() == [0, 1, 0, 1]
    rows, is_unsafe, pairs = sides_of(PROMPTS, "fraud", "neutral").labels()
    assert (rows.tolist(), pairs) == ([1, 3, 6, 4], None)
    nothing = sides_of(PROMPTS[:1], "malware", "other")
    assert nothing.unsafe.dtype == nothing.reference.dtype == np.dtype(int)
    assert len(nothing.labels()[0]) == 0


def test_kinds_beside_a_gate_follow_its_categories():
    kinds = [kind_of(p, ("fraud",)) for p in PROMPTS]
    assert set(kinds) == set(KINDS)
    assert [kinds[i] for i in (0, 1, 2, 4, 7)] == [
        "twins",
        "risky",
        "risky",
        "neutral",
        "look-alikes",
    ]
    assert kind_of(PROMPTS[0], ("malware",)) == "look-alikes"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(
            prompt,
            st.sampled_from(CATEGORIES),
            st.sampled_from(LABELS),
            st.sampled_from([None, "a", "b", "c"]),
        ),
        max_size=12,
    )
)
def test_every_prompt_is_on_one_side_and_order_is_that_of_the_prompts(prompts):
    everyone = unsafe_rows(prompts) + safe_rows(prompts) + neutral_rows(prompts)
    assert sorted(everyone) == list(range(len(prompts)))
    closed = rows_that_must_not_open(prompts)
    for kind, threshold in CLOSED_FOR.items():
        rows = [i for i, p in enumerate(prompts) if kind_of(p, ("fraud",)) == kind]
        assert set(rows) <= set(closed[threshold])
    for category in CATEGORIES:
        groups = [unsafe_rows(prompts, category)]
        groups += [rows_against(prompts, category, a) for a in ("twins", "neutral", "other")]
        assert all(rows == sorted(rows) for rows in groups)
        assert len({i for rows in groups for i in rows}) == sum(map(len, groups))
        for unsafe, safe in zip(*paired_rows(prompts, category), strict=True):
            assert prompts[unsafe].pair_id == prompts[safe].pair_id is not None
            assert (prompts[unsafe].label, prompts[safe].label) == ("unsafe", "safe")
