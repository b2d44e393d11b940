"""Prompts: reading with line numbers, selecting with hints, splits that keep promises."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.prompts.prompt import (
    LABELS,
    Prompt,
    categories_of,
    load_prompts,
    prompts_key,
    save_prompts,
    select_prompts,
    split_prompts,
)

if TYPE_CHECKING:
    from pathlib import Path

ROW = {
    "id": "a",
    "text": "How?",
    "response": None,
    "category": "fraud",
    "label": "unsafe",
    "source": "s",
    "pair_id": None,
}


def prompt(
    id: str, category: str = "fraud", label: str = "unsafe", pair_id: str | None = None
) -> Prompt:
    return Prompt(id, f"Text of {id}?", None, category, label, "test", pair_id)


def pairs(n: int, category: str = "fraud") -> list[Prompt]:
    return [
        prompt(f"{category}-{i}-{label}", category, label, f"{category}-{i}")
        for i in range(n)
        for label in ("unsafe", "safe")
    ]


SETS = [
    *pairs(12),
    *pairs(7, "malware"),
    *(prompt(f"n{i}", "harmless", "neutral") for i in range(20)),
]


def write(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


# Reading


def test_prompts_read_back_as_they_were_saved(tmp_path: Path) -> None:
    odd = Prompt("x", "Line\u2028one\n\ttwo \U0001f327", "An answer", "fraud", "safe", "s", None)
    save_prompts(tmp_path / "p.jsonl", [*SETS, odd])
    assert load_prompts(tmp_path / "p.jsonl") == [*SETS, odd]


@pytest.mark.parametrize("text", ["\0", "\0\0", "a\0b"])
def test_a_text_of_null_bytes_is_kept_and_not_taken_for_none(text: str) -> None:
    prompt = Prompt("an id", text)
    assert (prompt.id, prompt.text) == ("an id", text)
    assert Prompt("only words").text == "only words"


def test_response_and_pair_id_may_be_left_out(tmp_path: Path) -> None:
    row = {key: value for key, value in ROW.items() if key not in ("response", "pair_id")}
    [read] = load_prompts(write(tmp_path / "p.jsonl", row))
    assert (read.response, read.pair_id) == (None, None)


@pytest.mark.parametrize(("line", "message"), [
    ('{"id": "b", "text": ', "not valid JSON"),
    ("[1, 2]", "a JSON object is needed, got list"),
    (
        {key: value for key, value in ROW.items() if key != "text"},
        "column 'text' is missing; columns: category, id, label,",
    ),
    (
        {**ROW, "id": "b", "labels": "x"},
        r"unknown column 'labels'; columns: .*\. ?Did you mean 'label'\?",
    ),
    (
        {**ROW, "id": "b", "label": "harmful"},
        "label must be one of unsafe, safe, neutral, got 'harmful'",
    ),
    ({**ROW, "id": "b", "label": None}, "label must be one of unsafe, safe, neutral, got None"),
    ({**ROW, "id": "b", "text": " \t\n"}, "text must be a text that is not empty"),
    (
        {**ROW, "id": "b", "text": ["How?"]},
        r"text must be a text that is not empty, got \['How\?'\]",
    ),
    ({**ROW, "id": 7}, "id must be a text that is not empty, got 7"),
    ({**ROW, "id": "b", "category": ""}, "category must be a text that is not empty"),
    ({**ROW, "id": "b", "response": 3}, "response must be a text or null, got 3"),
    ({**ROW, "id": "b", "text": "half a character \ud83d"}, "half a character"),
    ({**ROW, "id": "b", "response": "\udc00"}, "half a character"),
    (ROW, "id 'a' comes twice"),
])  # fmt: skip
def test_a_bad_line_is_named_by_its_number_in_the_file(
    tmp_path: Path, line: object, message: str
) -> None:
    path = write(
        tmp_path / "p.jsonl", ROW, "", line, {**ROW, "id": "z"}
    )  # a blank line counts as a line
    with pytest.raises(
        ValueError, match=rf"p\.jsonl, line 3: {message}|p\.jsonl, line 3: .*{message}"
    ) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_prompts_is_not_an_empty_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.jsonl holds no prompts"):
        load_prompts(write(tmp_path / "p.jsonl", "", ""))
    with pytest.raises(FileNotFoundError, match=r"no file '.*nowhere\.jsonl'"):
        load_prompts(tmp_path / "nowhere.jsonl")


# Selecting


def test_selecting_keeps_order_and_takes_one_or_several() -> None:
    assert select_prompts(SETS, category="malware", label="safe") == [
        p for p in SETS if p.id.startswith("malware") and p.label == "safe"
    ]
    assert select_prompts(SETS, category=["malware", "harmless"]) == [
        p for p in SETS if p.category != "fraud"
    ]
    assert select_prompts(SETS) == SETS
    assert categories_of(SETS) == ["fraud", "malware"]


def test_a_limit_counts_each_category_and_label() -> None:
    few = select_prompts(SETS, limit=3)
    assert set(Counter((p.category, p.label) for p in few).values()) == {3}
    assert {p.pair_id for p in few if p.label == "unsafe"} == {
        p.pair_id for p in few if p.label == "safe"
    }


def test_an_unknown_category_names_those_there_are_and_the_closest() -> None:
    expected = (
        r"^no prompts of category 'malwar'; categories: 'fraud', 'harmless', 'malware'\. "
        r"Did you mean 'malware'\?$"
    )
    with pytest.raises(ValueError, match=expected):
        select_prompts(SETS, category=["fraud", "malwar"])


def test_an_unknown_label_names_the_labels() -> None:
    with pytest.raises(
        ValueError, match=r"unknown label 'harmful'; labels: unsafe, safe, neutral\.$"
    ):
        select_prompts(SETS, label="harmful")


def test_an_empty_selection_says_what_was_asked_for() -> None:
    with pytest.raises(ValueError, match=r"no prompts of category harmless with label unsafe\.$"):
        select_prompts(SETS, category=(name for name in ["harmless"]), label="unsafe")
    with pytest.raises(ValueError, match=r"with label safe, limit 0\.$"):
        select_prompts(SETS, category="fraud", label="safe", limit=0)


# Splitting

shares = (
    st.tuples(*[st.one_of(st.just(0.0), st.floats(0.01, 1))] * 3)
    .filter(any)
    .map(lambda w: tuple(x / sum(w) for x in w))
)


def pairs_and_harmless_in_turn(sizes):
    prompts = []
    for i, n in enumerate(sizes):
        harmless = [prompt(f"n{j}", "harmless", "neutral") for j in range(n)]
        prompts += pairs(n, f"c{i}") if i % 2 == 0 else harmless
    return prompts


sets = st.lists(st.integers(3, 30), min_size=1, max_size=3).map(pairs_and_harmless_in_turn)


@settings(max_examples=150, deadline=None)
@given(sets, shares, st.integers(0, 5), st.randoms(use_true_random=False))
def test_folds_are_disjoint_complete_stratified_and_keep_twins_together(
    prompts, fractions, seed, order
) -> None:
    folds = split_prompts(prompts, seed=seed, fractions=fractions)
    ids = [{p.id for p in fold} for fold in folds]
    assert sum(map(len, ids)) == len(prompts)
    assert set.union(*ids) == {p.id for p in prompts}
    fold_of_pair = {
        (p.pair_id, number) for number, fold in enumerate(folds) for p in fold if p.pair_id
    }
    assert len(fold_of_pair) == len({p.pair_id for p in prompts if p.pair_id})
    for (category, label), n in Counter((p.category, p.label) for p in prompts).items():
        for fold, fraction in zip(folds, fractions, strict=True):
            here = sum((p.category, p.label) == (category, label) for p in fold)
            assert (here > 0) == (
                fraction > 0
            )  # a fold with a share has all classes, one without has none
            assert abs(here - n * fraction) <= 2
    shuffled = order.sample(prompts, len(prompts))
    assert [
        {p.id for p in fold} for fold in split_prompts(shuffled, seed=seed, fractions=fractions)
    ] == ids


def test_each_fold_keeps_the_order_of_the_prompts() -> None:
    place = {p.id: i for i, p in enumerate(SETS)}
    for fold in split_prompts(SETS):
        assert [place[p.id] for p in fold] == sorted(place[p.id] for p in fold)


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    random.seed(1)
    state = random.getstate()
    first = split_prompts(SETS, seed=3)
    assert random.getstate() == state
    random.seed(2)
    assert split_prompts(SETS, seed=3) == first
    assert split_prompts(SETS, seed=4) != first


def test_a_split_is_the_same_in_every_session() -> None:
    test = split_prompts(pairs(8), seed=0).test
    assert [p.id for p in test if p.label == "unsafe"] == ["fraud-0-unsafe", "fraud-4-unsafe"]


def test_a_category_more_or_less_does_not_move_the_others() -> None:
    whole, part = split_prompts(SETS), split_prompts([p for p in SETS if p.category != "malware"])
    for fold, smaller in zip(whole, part, strict=True):
        assert [p for p in fold if p.category != "malware"] == smaller


def test_the_shares_of_the_default_split() -> None:
    sizes = [len([p for p in fold if p.category == "fraud"]) for fold in split_prompts(pairs(48))]
    assert sizes == [48, 24, 24]


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.5, 0.3, 0.3), (1.2, -0.1, -0.1), (float("nan"),) * 3]
)
def test_fractions_that_are_no_shares_are_refused(fractions: tuple) -> None:
    with pytest.raises(ValueError, match="fractions must be three shares that add up to 1"):
        split_prompts(SETS, fractions=fractions)


def test_a_category_too_small_for_the_folds_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"category 'malware' has 2 prompts or pairs, too few to be in every fold\.$",
    ):
        split_prompts([*pairs(6), *pairs(2, "malware")])
    assert all(split_prompts(pairs(2), fractions=(0.5, 0.5, 0))[:2])


# Keys


def test_the_key_of_prompts_depends_on_ids_texts_responses_and_order() -> None:
    one, two = prompt("a"), prompt("b")
    same = [
        Prompt("a", one.text, None, "other", "safe", "elsewhere", "pair"),
        two,
    ]  # what a model never sees
    assert prompts_key([one, two]) == prompts_key(same)
    others = [
        [two, one],
        [one],
        [one, prompt("c")],
        [one, Prompt("b", "x", None, "c", "safe", "s")],
    ]
    others += [[one, Prompt("b", two.text, "r", "fraud", "unsafe", "test")]]
    assert len({prompts_key(rows) for rows in [[one, two], *others]}) == 6


def test_labels_are_the_three_of_the_data_card() -> None:
    assert LABELS == ("unsafe", "safe", "neutral")
