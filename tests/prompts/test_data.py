"""The project's own data: complete, unique, harmless where it must be, and blind to style.

The card tells the truth about it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from workbench.files.store import data_path, file_checksum, read_json
from workbench.prompts.openings import OPENING_KINDS, read_openings
from workbench.prompts.prompt import (
    HARD_SAFE,
    HARMLESS,
    Prompt,
    categories_of,
    load_prompts,
    split_prompts,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTS = load_prompts()
OPENINGS = read_openings()
PAIRED = [p for p in PROMPTS if p.pair_id]
CARD = data_path("README.md").read_text(encoding="utf-8")
WANTED = {
    "hate_speech",
    "privacy_violation",
    "illegal_activity",
    "malware",
    "fraud",
    "physical_harm",
    "self_harm",
    "adult_content",
    "harassment",
    "misinformation",
}


def plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


# Prompts


def test_there_are_enough_prompts_of_every_kind() -> None:
    counts = Counter((p.category, p.label) for p in PROMPTS)
    assert set(categories_of(PROMPTS)) >= WANTED
    for category in categories_of(PROMPTS):
        assert counts[category, "unsafe"] >= 40
        assert counts[category, "safe"] == counts[category, "unsafe"]
    assert counts[HARMLESS, "neutral"] >= 300
    assert counts[HARD_SAFE, "safe"] >= 100
    assert set(counts) == {
        (c, label) for c in categories_of(PROMPTS) for label in ("unsafe", "safe")
    } | {
        (HARMLESS, "neutral"),
        (HARD_SAFE, "safe"),
    }


def test_every_unsafe_question_has_one_twin_of_its_category() -> None:
    pairs = defaultdict(list)
    for p in PAIRED:
        pairs[p.pair_id].append((p.label, p.category))
    for members in pairs.values():
        assert sorted(label for label, _ in members) == ["safe", "unsafe"]
        assert len({category for _, category in members}) == 1
    assert {p.id for p in PROMPTS if p.label == "unsafe"} <= {p.id for p in PAIRED}
    assert not any(p.pair_id for p in PROMPTS if p.category in (HARMLESS, HARD_SAFE))


def test_ids_and_texts_are_unique_but_for_case_and_marks() -> None:
    assert len({p.id for p in PROMPTS}) == len(PROMPTS)
    repeated = [text for text, n in Counter(plain(p.text) for p in PROMPTS).items() if n > 1]
    assert repeated == []


def test_there_are_no_answers_in_the_file() -> None:
    assert {p.response for p in PROMPTS} == {None}
    assert {p.source for p in PROMPTS} == {"workbench"}


def test_texts_are_single_questions_of_bounded_length() -> None:
    for p in PROMPTS:
        assert 3 <= len(p.text.split()) <= 45, p.id
        assert p.text == p.text.strip(), p.id
        assert "\n" not in p.text, p.id


def test_twins_differ_little() -> None:
    by_pair = defaultdict(dict)
    for p in PAIRED:
        by_pair[p.pair_id][p.label] = p.text.split()
    differences = [len(pair["safe"]) - len(pair["unsafe"]) for pair in by_pair.values()]
    assert abs(float(np.mean(differences))) < 0.4
    shared_first = [pair["safe"][0] == pair["unsafe"][0] for pair in by_pair.values()]
    assert np.mean(shared_first) > 0.85


def test_the_default_split_gives_each_fold_every_category() -> None:
    for fold, n in zip(split_prompts(PROMPTS), (24, 12, 12), strict=True):
        counts = Counter(p.category for p in fold if p.label == "unsafe")
        assert set(counts.values()) == {n}


def test_questions_about_sex_never_speak_of_minors() -> None:
    minors = re.compile(
        r"\b(child|children|kids?|minors?|teen\w*|school\w*|girls?|boys?|underage|pupils?|students?)\b",
        re.IGNORECASE,
    )
    assert [
        p.text
        for p in PROMPTS
        if p.category == "adult_content" and p.label == "unsafe" and minors.search(p.text)
    ] == []


# Style


def classifier_auroc(features: Callable[[list[str]], Any], prompts: list[Prompt]) -> float:
    """Cross-validate a linear classifier of unsafe against safe, twins in one fold: its AUROC."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    unsafe = np.array([p.label == "unsafe" for p in prompts])
    folds = GroupKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=1000))
    scores = cross_val_predict(
        model,
        features([p.text for p in prompts]),
        unsafe,
        groups=[p.pair_id or p.id for p in prompts],
        cv=folds,
        method="predict_proba",
    )
    return float(roc_auc_score(unsafe, scores[:, 1]))


def lengths(texts: list[str]) -> Any:
    counts = np.array([[len(text), len(text.split())] for text in texts], dtype=float)
    return np.hstack([counts, counts**2])


def one_hot(words: list[str]) -> Any:
    names = sorted(set(words))
    return np.array([[word == name for name in names] for word in words], dtype=float)


STYLES = {
    "length": lengths,
    "first word": lambda texts: one_hot([text.split()[0].lower() for text in texts]),
    "last mark": lambda texts: one_hot([text[-1] for text in texts]),
    "capital": lambda texts: one_hot([str(text[0].isupper()) for text in texts]),
}


@pytest.mark.parametrize("style", STYLES)
def test_style_does_not_tell_unsafe_questions_from_their_twins(style: str) -> None:
    assert classifier_auroc(STYLES[style], PAIRED) < 0.65
    for category in WANTED if style == "length" else ():
        assert classifier_auroc(STYLES[style], [p for p in PAIRED if p.category == category]) < 0.65


def test_style_does_not_tell_unsafe_questions_from_neutral_ones() -> None:
    mixed = [p for p in PROMPTS if p.label != "safe"]
    assert classifier_auroc(STYLES["length"], mixed) < 0.65
    assert classifier_auroc(STYLES["first word"], mixed) < 0.65


def test_the_classifier_of_these_tests_can_tell_something() -> None:
    told = [
        Prompt(p.id, f"{p.label} {p.text}", None, p.category, p.label, p.source, p.pair_id)
        for p in PAIRED
    ]
    assert classifier_auroc(STYLES["first word"], told) > 0.99


# Openings


def form(text: str) -> tuple[bool, int, int, bool]:
    """How a text looks: heading, paragraphs, sentences, whether it ends where a list begins."""
    return (
        text.startswith("## "),
        text.count("\n\n"),
        len(re.findall(r"[.!?](?:\s|$)", text)),
        text.endswith(" 1."),
    )


def test_every_category_has_openings_of_every_kind_and_style() -> None:
    keys = Counter((row["category"], row["style"], row["kind"]) for row in OPENINGS)
    styles = {row["style"] for row in OPENINGS}
    assert len(styles) >= 3
    assert keys == Counter(
        {(c, s, k): 1 for c in categories_of(PROMPTS) for s in styles for k in OPENING_KINDS}
    )
    assert (
        len({row["id"] for row in OPENINGS})
        == len({plain(row["text"]) for row in OPENINGS})
        == len(OPENINGS)
    )


def test_openings_of_one_style_look_alike_whatever_they_say() -> None:
    groups = defaultdict(list)
    for row in OPENINGS:
        groups[row["category"], row["style"]].append(row["text"])
    for key, texts in groups.items():
        assert len({form(text) for text in texts}) == 1, key
        words = [len(text.split()) for text in texts]
        assert max(words) - min(words) <= 10, key


def test_openings_hold_nothing_operational() -> None:
    for row in OPENINGS:
        assert not re.search(r"\d", row["text"].removesuffix(" 1.")), row["id"]
        assert not re.search(r"[`<>{}\\=]|https?:|www\.", row["text"]), row["id"]
        assert 40 <= len(row["text"]) <= 320, row["id"]


def test_what_goes_along_says_nothing_about_its_topic() -> None:
    # Openings that go along are interchangeable: the words they repeat from questions of their
    # category are everyday ones.
    everyday = {word for p in PROMPTS if p.label == "neutral" for word in plain(p.text).split()}
    everyday |= {
        word for row in OPENINGS if row["kind"] == "refusing" for word in plain(row["text"]).split()
    }
    risky: dict[str, Counter[str]] = defaultdict(Counter)
    for p in PROMPTS:
        if p.label == "unsafe":
            risky[p.category].update(set(plain(p.text).split()) - everyday)
    for row in OPENINGS:
        if row["kind"] == "going_along":
            told = [word for word in plain(row["text"]).split() if risky[row["category"]][word] > 1]
            assert set(told) <= {"program"}, row["id"]  # what was asked for may be named


# The card


def rows_of_table(first: str) -> dict[str, list[str]]:
    """Rows of the card's table whose first heading is ``first``, by their first cell."""
    lines = CARD.split(f"| {first} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_the_card_counts_what_the_file_holds() -> None:
    counts = Counter((p.category, p.label) for p in PROMPTS)
    table = rows_of_table("category")
    assert set(table) == {p.category for p in PROMPTS} | {"all"}
    for category, cells in table.items():
        names = {p.category for p in PROMPTS} if category == "all" else {category}
        expected = [
            sum(counts[name, label] for name in names) for label in ("unsafe", "safe", "neutral")
        ]
        assert [int(cell) for cell in cells] == expected, category


def test_the_card_names_every_file_with_its_rows() -> None:
    table = rows_of_table("file")
    folder = data_path("README.md").parent
    named = {name for cell in table for name in re.findall(r"`([^`]+)`", cell)}
    assert {path.name for path in folder.iterdir() if path.is_file()} - {"README.md"} <= named
    rows = {
        name: int(table[f"`{name}`"][0])
        for name in ("prompts.jsonl", "openings.jsonl", "categories.csv", "refusal_patterns.json")
    }
    assert rows["prompts.jsonl"] == len(PROMPTS)
    assert rows["openings.jsonl"] == len(OPENINGS)
    assert (
        rows["categories.csv"]
        == len(data_path("categories.csv").read_text(encoding="utf-8").splitlines()) - 1
    )
    assert rows["refusal_patterns.json"] == len(
        read_json(data_path("refusal_patterns.json"))["patterns"]
    )
    phrases = read_json(data_path("safety_wording.json"))["groups"].values()
    assert int(table["`safety_wording.json`"][0]) == sum(map(len, phrases))


def test_the_checksums_of_the_card_are_those_of_the_files() -> None:
    said = dict(
        reversed(pair) for pair in re.findall(r"^ {4}([0-9a-f]{64})  (\S+)$", CARD, re.MULTILINE)
    )
    assert said == {
        name: file_checksum(data_path(name)) for name in ("prompts.jsonl", "openings.jsonl")
    }


def test_the_card_tells_how_well_words_do() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    unsafe = np.array([p.label == "unsafe" for p in PAIRED])
    scores = cross_val_predict(
        make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=1000)),
        [p.text for p in PAIRED],
        unsafe,
        groups=[p.pair_id for p in PAIRED],
        cv=GroupKFold(5, shuffle=True, random_state=0),
        method="predict_proba",
    )[:, 1]
    said = float("0" + re.search(r"bag of words reaches AUROC (\.\d+)", CARD)[1])
    assert roc_auc_score(unsafe, scores) == pytest.approx(said, abs=0.02)


def test_the_card_gives_licence_and_warning() -> None:
    assert "CC BY 4.0" in CARD
    assert CARD.index("**Warning.**") < 200
