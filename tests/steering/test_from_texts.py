"""Two lists of texts make a steering vector."""

from __future__ import annotations

import pytest
import torch

from workbench.evaluation.scoring import evaluate
from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.from_texts import steering_vector
from workbench.steering.interventions import add_vector

UNSAFE = ["Write a scam letter.", "Show a stolen card.", "Plan an insult."]
SAFE = ["Write a poem.", "Show a bicycle."]
SHORT = Decoding(max_new_tokens=4)


@pytest.mark.parametrize("name", ["tiny", "chatless"])
def test_the_vector_is_the_difference_of_means_from_unsafe_to_safe(name, request):
    model = request.getfixturevalue(name)
    vector = steering_vector(model, UNSAFE, SAFE)
    site = Site(2, "resid_post")  # four layers
    unsafe, safe = (cache_activations(model, texts, site)[site].values for texts in (UNSAFE, SAFE))
    assert torch.allclose(vector.vector, safe.mean(dim=0) - unsafe.mean(dim=0), atol=1e-4)
    assert vector.site == site
    assert (vector.n_unsafe, vector.n_safe, vector.category) == (3, 2, "other")
    norms = torch.cat([unsafe, safe]).norm(dim=1)
    assert vector.site_norm == pytest.approx(float(norms.mean()), rel=1e-4)


def test_layer_span_and_name_can_be_said(tiny):
    vector = steering_vector(tiny, UNSAFE, SAFE, layer=1, span="last", category="fraud")
    assert (vector.site, vector.span, vector.category) == (Site(1, "resid_post"), "last", "fraud")
    with pytest.raises(ValueError, match="no hook point"):
        steering_vector(tiny, UNSAFE, SAFE, layer=9)


def test_categories_and_labels_of_what_is_given_do_not_matter(tiny):
    prompts = [
        Prompt(f"p{i}", text, None, "fraud", "safe", "s", None, (), ("malware",))
        for i, text in enumerate(UNSAFE)
    ]
    plain = steering_vector(tiny, UNSAFE, SAFE)
    assert torch.equal(steering_vector(tiny, prompts, SAFE).vector, plain.vector)


def test_one_text_on_each_side_will_do_and_none_will_not(tiny):
    assert steering_vector(tiny, UNSAFE[0], SAFE[0]).n_unsafe == 1
    with pytest.raises(ValueError, match="no safe texts"):
        steering_vector(tiny, UNSAFE, [])
    with pytest.raises(
        ValueError, match=r"'Write a poem\.' is among the unsafe and the safe texts"
    ):
        steering_vector(tiny, [*UNSAFE, SAFE[0]], SAFE)


def test_it_steers_answers_and_its_texts_are_no_test_questions(tiny):
    vector = steering_vector(tiny, UNSAFE, SAFE)
    change = [add_vector(vector, rho=2.0)]
    [plain] = generate(tiny, "Explain a garden.", decoding=SHORT)
    [steered] = generate(tiny, "Explain a garden.", change, SHORT)
    assert plain.tokens != steered.tokens
    assert (plain.condition, steered.condition) == ("unsteered", "steered")
    with pytest.raises(ValueError, match="1 of 1 prompts were used to fit the vector"):
        evaluate(tiny, UNSAFE[0], {"steered": change}, SHORT)


def test_it_is_fitted_under_the_words_that_are_asked_for(tiny, monkeypatch):
    template = "{% if tone is defined %}{{ tone }}{% endif %}" + tiny.tokenizer.chat_template
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    plain = steering_vector(tiny, UNSAFE, SAFE)
    toned = steering_vector(tiny, UNSAFE, SAFE, template_keywords={"tone": "and list the words"})
    assert "and list the words" in toned.asked_as
    assert not torch.allclose(plain.vector, toned.vector, rtol=1e-3)
