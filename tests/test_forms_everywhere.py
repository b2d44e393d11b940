"""Every public function that takes prompts takes texts, messages, rows and data frames too."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import workbench as wb
from workbench.prompts.prompt import Prompt

TEXTS = ["Explain a garden.", "Describe a party."]
SHORT = wb.Decoding(max_new_tokens=3)
SITE = wb.Site(1, "resid_post")
FORMS = {
    "texts": TEXTS,
    "data frame": pd.DataFrame({"prompt": TEXTS}),
    "dicts": [{"question": text} for text in TEXTS],
    "messages": [[{"role": "user", "content": text}] for text in TEXTS],
    "a mixture": [TEXTS[0], Prompt(TEXTS[1])],
}
PROMPTS = [Prompt(text) for text in TEXTS]


def steering(model):
    return [wb.add_vector(wb.steering_vector(model, "Write an insult.", "Write a poem."), rho=0.5)]


def answers(completions):
    return [(c.prompt, c.tokens, c.condition) for c in completions]


def profiles(model, prompts):
    return wb.neurons.profile_neurons(model, [(0, 1)], prompts)[0].to_dict()


DOORS = {
    "generate": lambda model, given: answers(wb.generate(model, given, decoding=SHORT)),
    "sweep": lambda model, given: answers(wb.sweep(model, given, {"a": ()}, SHORT)),
    "evaluate": lambda model, given: answers(
        wb.evaluate(model, given, {"steered": steering(model)}, SHORT, encoder=Words()).completions
    ),
    "encode": lambda model, given: wb.models.encode(model, given),
    "cache_activations": lambda model, given: wb.cache_activations(model, given, SITE)[
        SITE
    ].values.tolist(),
    "ActivationSet.of": lambda model, given: (
        wb.cache_activations(model, PROMPTS, SITE)[SITE].of(given).prompts
    ),
    "class_moments": lambda model, given: wb.models.class_moments(model, given, SITE)[
        SITE
    ].mean.tolist(),
    "patched_answers": lambda model, given: answers(
        wb.neurons.patched_answers(
            model, given, {"one": [(0, 1)]}, steering(model), max_new_tokens=3
        )
    ),
    "head_sources": lambda model, given: wb.neurons.head_sources(
        model, given, "Write a poem.", torch.ones(32)
    )["content"].tolist(),
    "split_prompts": lambda _, given: wb.split_prompts(given, fractions=(0.5, 0.5, 0)),
    "select_prompts": lambda _, given: wb.select_prompts(given, label="neutral"),
    "categories_of": lambda _, given: wb.categories_of(given),
    "prompts_key": lambda _, given: wb.prompts.prompts_key(given),
    "instructed": lambda _, given: wb.safesteer.instructed(given),
    "answer_prompts": lambda _, given: wb.answer_prompts(wb.as_prompts(given, label="unsafe")),
}


class Words:
    """Stands for the sentence encoder of relevance."""

    def encode(self, texts, **_):
        return (
            torch.nn.functional.one_hot(torch.tensor([len(text) % 7 for text in texts]), 7)
            .double()
            .numpy()
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("door", DOORS)
def test_every_form_gives_what_prompts_give(tiny, door, form):
    assert DOORS[door](tiny, FORMS[form]) == DOORS[door](tiny, PROMPTS)


def test_one_text_is_one_prompt_and_not_its_letters(tiny):
    assert len(wb.generate(tiny, TEXTS[0], decoding=SHORT)) == 1
    assert len(wb.cache_activations(tiny, TEXTS[0], SITE)[SITE].prompts) == 1
    row, _ = wb.token_activations(tiny, TEXTS[0], SITE)
    assert row.prompt.text == TEXTS[0]
    with pytest.raises(ValueError, match="one prompt is shown at a time, got 2"):
        wb.token_activations(tiny, TEXTS, SITE)
    table = wb.evaluation.text_perplexity(tiny, "A garden is full of dogs.", {})
    assert table["n"].tolist() == [1]


def test_equal_texts_are_answered_each(tiny):
    first, second = wb.generate(tiny, [TEXTS[0]] * 2, decoding=SHORT)
    assert first.tokens == second.tokens
    assert first.prompt.id != second.prompt.id


def test_one_question_side_by_side_is_a_text_a_conversation_or_a_prompt(tiny):
    chat = [
        {"role": "user", "content": TEXTS[0]},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": TEXTS[1]},
    ]
    for given in (TEXTS[1], chat, Prompt("p", TEXTS[1])):
        plain, steered = wb.side_by_side(tiny, given, steering(tiny), SHORT)
        assert (plain.prompt.text, steered.condition) == (TEXTS[1], "steered")
    with pytest.raises(ValueError, match="one question is answered at a time, got 2"):
        wb.side_by_side(tiny, TEXTS, steering(tiny), SHORT)


def test_what_is_no_prompt_is_refused_in_one_line(tiny):
    for given in (7, [7]):
        with pytest.raises(TypeError, match="prompts are given as a text") as caught:
            wb.generate(tiny, given)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nothing to answer"):
        wb.generate(tiny, [])


def test_rows_of_answers_hold_the_earlier_turns(tiny):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[0]}]
    with_turns, without = wb.evaluate(tiny, [chat, TEXTS[1]], {}, SHORT, encoder=Words()).answers()
    assert with_turns["history"] == [{"role": "system", "content": "Be brief."}]
    assert "history" not in without


# Several categories


BOTH = Prompt("b", "Write a scam letter.", None, "fraud", "unsafe", "t", None, (), ("malware",))
ONE = Prompt("o", "Show a stolen card.", None, "fraud", "unsafe", "t")


def test_a_prompt_of_two_categories_counts_in_both_rows_of_a_summary(tiny):
    result = wb.evaluate(tiny, [BOTH, ONE], {}, SHORT, encoder=Words())
    table = result.summary().query("metric == 'refusal'").set_index("category")["n"]
    assert table.to_dict() == {"all": 2, "fraud": 2, "malware": 1}
    assert len(result.scores.query("metric == 'refusal'")) == 2


def test_moments_count_it_in_each_class(tiny):
    moments = wb.models.class_moments(tiny, [BOTH, ONE], SITE)[SITE]
    values = wb.cache_activations(tiny, [BOTH, ONE], SITE)[SITE].values.double()
    assert moments.classes == (("fraud", "unsafe"), ("malware", "unsafe"))
    assert moments.n.tolist() == [2, 1]
    assert torch.allclose(moments.mean[0], values.mean(dim=0), atol=1e-4)
    assert torch.allclose(moments.mean[1], values[0], atol=1e-4)
    assert torch.allclose(moments.variance[0], values.var(dim=0), atol=1e-3)


def test_profiles_count_its_tokens_in_each_class(tiny):
    [profile] = wb.neurons.profile_neurons(tiny, [(0, 1)], [BOTH, ONE])
    [alone] = wb.neurons.profile_neurons(tiny, [(0, 1)], [BOTH])
    counts = dict(zip(profile.per_token.classes, map(sum, profile.per_token.counts), strict=True))
    lengths = {
        p.id: e.content[1] - e.content[0]
        for p, e in zip((BOTH, ONE), wb.models.encode(tiny, [BOTH, ONE]), strict=True)
    }
    assert counts == {
        ("fraud", "unsafe"): lengths["b"] + lengths["o"], ("malware", "unsafe"): lengths["b"]
    }  # fmt: skip
    assert {e.prompt_id for e in alone.highest} == {"b"}


def test_the_vectors_of_a_category_are_fitted_on_it_too(tiny):
    safe = Prompt("s", "Write a poem.", None, "fraud", "safe", "t")
    acts = wb.cache_activations(tiny, [BOTH, ONE, safe], SITE)[SITE]
    vectors = wb.fit_steering_vectors(acts)
    assert {name: vector.n_unsafe for name, vector in vectors.items()} == {"fraud": 2, "malware": 1}


def test_of_two_lists_of_interventions_the_main_category_decides(tiny):
    strong = steering(tiny)
    [plain] = wb.generate(tiny, BOTH, decoding=SHORT)

    def tokens(condition):
        [answer] = wb.generate(tiny, BOTH, condition, SHORT)
        return answer.tokens

    assert tokens({"malware": strong}) == tokens(strong) != plain.tokens
    assert tokens({"fraud": [], "malware": strong}) == plain.tokens
    assert tokens({"malware": [], "fraud": strong}) == tokens(strong)


def test_a_run_about_one_category_leaves_the_others_of_its_prompts_out(tmp_path):
    prompts = [
        Prompt(f"p{i}", f"Question {i}?", None, "malware", "unsafe", "t", None, (), ("fraud",))
        for i in range(8)
    ]
    wb.save_prompts(tmp_path / "p.jsonl", prompts)
    config = wb.RunConfig(prompts=str(tmp_path / "p.jsonl"), categories=("fraud",))
    for fold in wb.safesteer.folds_of(config):
        assert wb.categories_of(fold) == ["fraud"]
        assert {p.id[0] for p in wb.select_prompts(fold, category="fraud")} == {"p"}


def test_prompts_of_a_steered_category_are_not_steered_as_others(tiny):
    change = steering(tiny)
    conditions = {"steered": {"malware": change}}
    safe = Prompt("s", "Write a poem.", None, "fraud", "safe", "t")
    complete = wb.safesteer.for_everyone(conditions, [BOTH, safe])
    assert set(complete["steered"]) == {"malware", "s"}
