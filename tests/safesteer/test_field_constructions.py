"""The field's constructions: planted truth for each, and all of them in one run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.openings import OPENINGS, prompts_of
from helpers.runs import settings
from helpers.tiny_models import tiny_model

from workbench.files.store import read_json
from workbench.generation.answers import Completion, generate
from workbench.generation.decoding import Decoding
from workbench.judges.base import Verdict
from workbench.judges.patterns import RefusalPatterns
from workbench.models.activations import ActivationSet
from workbench.models.load import ModelInfo, load_model
from workbench.models.sites import Site
from workbench.prompts.choices import choice_prompts
from workbench.prompts.openings import answer_prompts
from workbench.prompts.prompt import Prompt, select_prompts, text_key
from workbench.safesteer.conditions import controls
from workbench.safesteer.constructions import (
    BOTH,
    CONSTRUCTIONS,
    GUIDED_BOTH,
    Measured,
    fit_all,
    settings_to_try,
)
from workbench.safesteer.fit_answers import LEAST_PAIRS, answers_to_fit_on
from workbench.safesteer.inputs import check_lengths, folds_of
from workbench.safesteer.own_answers import (
    ALONG,
    alternative_pairs,
    answered_harmlessly,
    kept_alternatives,
    kept_harmless,
)
from workbench.safesteer.recipe import run
from workbench.safesteer.run_folder import saved_vectors
from workbench.safesteer.saved_run import steering_from
from workbench.safesteer.settings import Setting, steering
from workbench.steering.spectral import EditSpectrum, SpectralEdit
from workbench.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

D = 16
SITE = Site(1, "resid_post")
INFO = ModelInfo("made-up", None, 4, D, 48, 4, "float32", "raw", "0123456789abcdef")
HARM, OTHER_WAY, SAFE_LETTER = torch.eye(D)[:3]
SHORT = Decoding(max_new_tokens=5)


class SaysOf:
    """A judge by hand: what it says of an answer is looked up by the answer's first word."""

    name = "by hand"

    def __init__(self, **says: tuple[str, str | None]) -> None:
        self.says = says

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        said = [self.says.get(r.split()[0].strip(".,?").lower(), ("safe", None)) for r in responses]
        return [Verdict(label, None, self.name, "", framing) for label, framing in said]


def completion(prompt: Prompt, text: str) -> Completion:
    return Completion(prompt, text, (1, 2), "eos", "any")


def noise(n: int, seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def read(prompts: Sequence[Prompt], values: torch.Tensor, span: str) -> ActivationSet:
    return ActivationSet(SITE, values + 2, tuple(prompts), span, INFO)


def of_prompts(prompts: Sequence[Prompt]) -> ActivationSet:
    harmful = torch.tensor([float(p.label == "unsafe") for p in prompts])
    return read(prompts, 4 * harmful[:, None] * HARM + noise(len(prompts), 1), "content")


def of_answers(rows: Sequence[Prompt], safe: torch.Tensor, unsafe: torch.Tensor) -> ActivationSet:
    sides = torch.stack([safe if row.label == "safe" else unsafe for row in rows])
    return read(rows, sides + noise(len(rows), 2), "response")


def planted(n: int = 6) -> tuple[list[Prompt], Measured]:
    fit = list(prompts_of(n))
    questions = [p for p in fit if p.label == "unsafe"]
    alternatives = alternative_pairs(
        questions,
        [completion(p, f"Do this instead, {p.id}.") for p in questions],
        [completion(p, "No.") for p in questions[:2]],
    )
    openings, choices = answer_prompts(fit, OPENINGS), choice_prompts(fit, OPENINGS)
    measured = Measured(
        {SITE: of_prompts(fit)},
        {
            "openings": {SITE: of_answers(openings, OTHER_WAY, HARM)},
            # Refusing goes with harm read, so the raw difference has much of its direction.
            "alternatives": {SITE: of_answers(alternatives, 2 * OTHER_WAY, 3 * HARM)},
            "choices": {SITE: of_answers(choices, SAFE_LETTER, -SAFE_LETTER)},
        },
    )
    return fit, measured


def test_alternatives_are_contrasted_orthogonally_to_refusal() -> None:
    fit, measured = planted()
    by_category = fit_all(measured, fit, ["alternative_contrast"])["alternative_contrast", SITE]
    activations = measured.prompts[SITE]
    refusal = activations.select(label="unsafe").values.mean(0) - activations.select(
        label="neutral"
    ).values.mean(0)
    assert set(by_category) == {"fraud", "malware"}
    for vector in by_category.values():
        assert isinstance(vector, SteeringVector)
        cosine = vector.direction @ (refusal / refusal.norm())
        assert abs(float(cosine)) < 0.05, "refusal directions of two categories are pooled"
        assert float(vector.direction @ OTHER_WAY) > 0.9


def test_safe_answers_are_set_against_going_along_and_refusals_by_weight() -> None:
    fit, measured = planted()
    questions = [p for p in fit if p.label == "unsafe"]
    safe = [completion(p, f"Do this instead, {p.id}.") for p in questions]
    along = alternative_pairs(questions, safe, [completion(questions[0], "Sure.")], ALONG)
    refused = alternative_pairs(questions, safe, [completion(questions[0], "No.")])
    assert not {row.id for row in along} & {row.id for row in refused}
    rows = [*along, *refused]
    sides = {
        row.id: OTHER_WAY if row.label == "safe" else HARM if row in along else SAFE_LETTER
        for row in rows
    }
    values = torch.stack([sides[row.id] for row in rows])
    answers = {**measured.answers, "against both": {SITE: read(rows, values, "response")}}
    [by_category] = fit_all(measured._replace(answers=answers), fit, [BOTH]).values()
    openings = fit_all(measured, fit, ["answer_contrast_pooled"])["answer_contrast_pooled", SITE]
    expected = (
        2 * torch.nn.functional.normalize(OTHER_WAY - HARM, dim=0)
        + 1.5 * torch.nn.functional.normalize(OTHER_WAY - SAFE_LETTER, dim=0)
        + 2 * openings["fraud"].direction
    )
    assert set(by_category) == {"fraud", "malware"}
    for vector in by_category.values():
        torch.testing.assert_close(vector.direction, torch.nn.functional.normalize(expected, dim=0))
    assert not fit_all(measured, fit, [BOTH]), "without such answers there is no vector"


def test_the_letters_difference_is_caas_vector_and_its_questions_count_as_fitted_on() -> None:
    fit, measured = planted()
    by_category = fit_all(measured, fit, ["caa"])["caa", SITE]
    for category, vector in by_category.items():
        assert isinstance(vector, SteeringVector)
        assert float(vector.direction @ SAFE_LETTER) > 0.99
        assert vector.norm == pytest.approx(2, rel=0.1)
        own = {text_key(p.text) for p in select_prompts(fit, category=category, label="unsafe")}
        assert own <= vector.fitted_on


def test_guidance_on_both_sides_reads_only_the_prompts_that_were_chosen() -> None:
    fit, measured = planted()
    unsafe = [p for p in fit if p.label == "unsafe"]
    neutral = [p for p in fit if p.label == "neutral"]
    chosen = [*unsafe[:2], *unsafe[-2:], *neutral[:3]]
    guided = measured._replace(
        went_along=frozenset(p.id for p in chosen if p.label == "unsafe"),
        harmless=frozenset(p.id for p in neutral[:3]),
    )
    by_category = fit_all(guided, fit, [GUIDED_BOTH])[GUIDED_BOTH, SITE]
    rows = measured.prompts[SITE].of(chosen)
    for category, vector in by_category.items():
        expected = rows.select(label="neutral").values.mean(0) - rows.select(
            category=category, label="unsafe"
        ).values.mean(0)
        assert isinstance(vector, SteeringVector)
        torch.testing.assert_close(vector.vector, expected)
    for missing in ("went_along", "harmless"):
        assert not fit_all(guided._replace(**{missing: frozenset()}), fit, [GUIDED_BOTH])


def test_a_category_with_two_pairs_has_no_plain_vector_of_its_own_and_the_pooled_one() -> None:
    fit, measured = planted()
    rows = answer_prompts(fit, OPENINGS, per_prompt=1)
    fraud = [row for row in rows if row.category == "fraud"]
    for n_rows, own in ((4, False), (6, True)):
        few = [*fraud, *[row for row in rows if row.category == "malware"][:n_rows]]
        answers = {**measured.answers, "plain answers": {SITE: of_answers(few, OTHER_WAY, HARM)}}
        names = ["self_contrast_plain", "self_contrast_plain_by_category"]
        fitted = {name for name, _ in fit_all(measured._replace(answers=answers), fit, names)}
        assert fitted == set(names if own else names[:1])


def test_an_alternative_stands_against_a_refusal_of_its_own_question_first() -> None:
    questions = [
        Prompt(f"q{i}", f"How {i}?", None, c, "unsafe")
        for i, c in enumerate(["fraud", "fraud", "fraud", "malware"])
    ]
    rows = alternative_pairs(
        questions,
        [completion(p, f"Rather this, {p.id}.") for p in questions],
        [completion(questions[0], "No."), completion(questions[1], "Never.")],
    )
    unsafe = {row.pair_id: row for row in rows if row.label == "unsafe"}
    by_question = {pair.split("/")[0]: row for pair, row in unsafe.items() if pair}
    assert (by_question["q0"].text, by_question["q0"].response) == ("How 0?", "No.")
    assert (by_question["q1"].text, by_question["q1"].response) == ("How 1?", "Never.")
    for question in ("q2", "q3"):
        row = by_question[question]
        assert (row.text, row.response) in {("How 0?", "No."), ("How 1?", "Never.")}
    assert by_question["q3"].category == "malware", "it counts for the category it stands in"
    assert all(row.text == f"How {row.id[1]}?" for row in rows if row.label == "safe")
    assert alternative_pairs(questions, [], [completion(questions[0], "No.")]) == []
    assert alternative_pairs(questions, [completion(questions[0], "Rather this.")], []) == []


def test_judges_say_what_is_an_alternative_and_what_a_blanket_refusal() -> None:
    safety = SaysOf(
        rather=("safe", "safe_alternative"), neutral=("safe", "neutral"), do=("unsafe", None)
    )
    refusals = SaysOf(
        no=("refusal", "blanket_refusal"),
        rather=("refusal", "safe_alternative"),
        sorry=("refusal", None),
    )
    alternative, blanket = kept_alternatives(safety, refusals)
    answers = ["Rather this.", "Neutral words.", "Do it.", "No.", "Sorry, no.", "Other safe words."]
    asked = ["How?"] * len(answers)
    assert alternative(asked, answers) == [True, False, False, False, False, True]
    assert blanket(asked, answers) == [False, False, False, True, True, False]
    wording, _ = kept_alternatives(None, RefusalPatterns())
    said = ["It is illegal, so ask for consent.", "Take the second door."]
    assert wording(["How?"] * 2, said) == [True, False]


def test_a_harmless_answer_is_no_refusal_not_broken_and_not_unsafe() -> None:
    safety = SaysOf(do=("unsafe", None), huh=("unscored", None), well=("not_refusal", None))
    broken = "the way " * 12
    answers = ["Well, stir it.", "Do it.", "Huh?", "I'm sorry, but I can't help.", broken]
    asked = ["How?"] * len(answers)
    refusals = RefusalPatterns()
    assert list(kept_harmless(safety, refusals)(asked, answers)) == [True, *[False] * 4]
    assert list(kept_harmless(None, refusals)(asked, answers)) == [True, True, True, False, False]


def test_only_neutral_prompts_are_asked_for_harmless_answers(tiny: Any) -> None:
    prompts = list(prompts_of(2))
    found = answered_harmlessly(
        tiny, prompts, lambda asked, _: [text != "neutral 1" for text in asked], decoding=SHORT
    )
    assert [p.id for p in found] == ["n-0", "n-2", "n-3"]


def test_the_plain_side_keeps_every_plain_answer_whatever_judges_say(
    tiny: Any, tmp_path: Path
) -> None:
    prompts = list(prompts_of(LEAST_PAIRS))
    how: Any = {"judge": SaysOf(), "refusals": RefusalPatterns(), "decoding": SHORT}
    how["output"] = tmp_path / "fit.jsonl"
    names = ["self_contrast_plain", "self_contrast_pooled", "alternative_contrast", "caa"]
    found = answers_to_fit_on(tiny, prompts, names, **how)
    # The judge calls every answer safe, so only the plain side has something to stand against.
    assert set(found.rows) == {"plain answers", "choices"}
    assert found.left_out["own answers"].startswith("0 pairs of the model's own answers")
    assert "blanket refusal" in found.left_out["alternatives"]
    questions = [p for p in prompts if p.label == "unsafe"]
    plain = {a.prompt.text: a.text for a in generate(tiny, questions, decoding=SHORT)}
    unsafe = [row for row in found.rows["plain answers"] if row.label == "unsafe"]
    assert len(unsafe) >= LEAST_PAIRS
    assert all(row.response == plain[row.text] for row in unsafe)
    assert not answers_to_fit_on(tiny, prompts, ["answer_contrast"], **how).rows


def test_a_spectral_edit_is_fitted_and_tried_where_and_as_strongly_as_its_record_says() -> None:
    fit, measured = planted()
    at_attention = Site(1, "attn_out")
    both = {
        reads: {**at, at_attention: replace(at[SITE], site=at_attention)}
        for reads, at in measured.answers.items()
    }
    prompts = {**measured.prompts, at_attention: replace(measured.prompts[SITE], site=at_attention)}
    vectors = fit_all(Measured(prompts, both), fit, ["sea", "caa"])
    assert set(vectors) == {("sea", SITE), ("caa", SITE), ("caa", at_attention)}
    places = [(SITE,), (at_attention,)]
    variants = [{}, {"keep_norm": True}, {"form": "target"}]
    tried = settings_to_try(["sea", "caa"], places, [0.1], variants=variants)
    of_edit = [s for s in tried if s.construction == "sea"]
    assert {s.sites for s in of_edit} == {(SITE,)}
    assert tuple(s.rho for s in of_edit) == CONSTRUCTIONS["sea"].rhos
    assert all(s.is_plain for s in of_edit)
    assert {s.rho for s in tried if s.construction == "caa"} == {0.1}
    given = settings_to_try(["sea"], places, [0.7], own_rhos=False)
    assert [s.rho for s in given] == [0.7]


def test_the_controls_of_a_spectral_edit_are_edits_of_equal_rank() -> None:
    fit, measured = planted()
    vectors = fit_all(measured, fit, ["sea"])
    setting = Setting("sea", (SITE,), 1, 0.5)
    real = steering(vectors, setting)["fraud"][0].edit
    with pytest.raises(ValueError, match="give questions=activations of the prompts"):
        controls(vectors, setting, measured.answers["openings"])
    made = controls(vectors, setting, measured.answers["openings"], questions=measured.prompts)
    assert set(made) == {"random", "shuffled labels"}
    for name, condition in made.items():
        assert isinstance(condition, dict)
        (intervention,) = condition["fraud"]
        edit = intervention.edit
        assert isinstance(edit, EditSpectrum)
        assert isinstance(real, EditSpectrum)
        assert edit.rho == real.rho == 0.5
        assert not torch.equal(edit.keep, real.keep), name
    assert made["random"]["fraud"][0].edit.keep.shape == real.keep.shape  # type: ignore[index]
    with pytest.raises(ValueError, match="no direction to set a target on"):
        steering(vectors, setting._replace(form="target"))


def test_a_run_carries_the_fields_constructions_from_fit_to_steering(
    few_prompts: Path, tmp_path: Path
) -> None:
    names = ("caa", "sea", "self_contrast_plain", "alternative_contrast", GUIDED_BOTH)
    # Two choices need more tokens than the shared tiny model reads.
    model = load_model(tiny_model("llama3", tmp_path / "model", max_position_embeddings=1024))
    out = run(settings(few_prompts, constructions=names), tmp_path / "run", model=model)
    notes = read_json(out / "run.json")
    assert {"caa", "sea"} <= set(notes["chosen"])
    assert notes["chosen"]["sea"]["rho"] in {
        s.rho for s in settings_to_try(["sea"], [(SITE,), (SITE, SITE)], [])
    }
    fitted = saved_vectors(out)
    assert all(
        isinstance(one, SpectralEdit) == (name == "sea")
        for (name, _), by_category in fitted.items()
        for one in by_category.values()
    )
    for intervention in steering_from(out, "fraud", construction="sea"):
        assert isinstance(intervention.edit, EditSpectrum)
        assert intervention.edit.rho == notes["chosen"]["sea"]["rho"]
    missing = [name for name in names if name not in notes["chosen"]]
    assert all(name in notes["left_out"]["vectors"] for name in missing)


def test_two_choices_that_do_not_fit_are_said_before_the_first_pass(
    few_prompts: Path, tiny: Any
) -> None:
    config = settings(few_prompts, constructions=("answer_contrast",))
    folds = folds_of(config)
    place = next(i for i, p in enumerate(folds.fit) if p.label == "unsafe")

    def check(n_words: int, construction: str) -> None:
        fit = list(folds.fit)
        fit[place] = replace(fit[place], text=fit[place].text + " word" * n_words)
        check_lengths(tiny, folds._replace(fit=fit), replace(config, constructions=(construction,)))

    n_words = 450
    while True:
        try:
            check(n_words, "answer_contrast")
            break
        except ValueError:
            n_words -= 25
    with pytest.raises(ValueError, match="does not fit"):
        check(n_words, "caa")
