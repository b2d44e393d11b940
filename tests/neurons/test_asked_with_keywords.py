"""Neurons are measured on prompts asked as the vectors and answers were: same template keywords."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_models import sentences

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.load import load_model
from workbench.models.sites import Site, sites_of_kind
from workbench.neurons.effects import neuron_effect
from workbench.neurons.patching import contrast_activations, patching_effect
from workbench.neurons.silencing import neuron_reference
from workbench.neurons.splits import head_sources, split_mlp_gate
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import fit_steering_vectors

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords

EARLY, END = Site(1, "resid_post"), Site(3, "resid_post")
NEURONS = {"few": [(0, 3), (1, 17), (2, 2), (3, 60)]}
TONE = "and list the words of"
TEMPLATE = "{{ bos_token }}{% if tone is defined %}{{ tone }}{% endif %}"


def prompts(label: str, first: int, n: int) -> list[Prompt]:
    texts = sentences(100)[first : first + n]
    return [
        Prompt(f"{label}-{first + i}", text, None, "fraud", label, "test", f"pair-{i}")
        for i, text in enumerate(texts)
    ]


UNSAFE, SAFE = prompts("unsafe", 0, 6), prompts("safe", 10, 6)
HELD_OUT, NEUTRAL = prompts("unsafe", 20, 4), prompts("neutral", 30, 3)


def length(questions: list[str], answers: list[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


@pytest.fixture
def model(tiny_path: Any) -> HookedModel:
    return load_model(tiny_path, device="cpu")


def measured(model: HookedModel, keywords: Keywords) -> dict[str, torch.Tensor]:
    asked: Any = {"template_keywords": keywords}
    sites = [END, EARLY, *sites_of_kind(model, "mlp_post")]
    fitted = cache_activations(model, UNSAFE + SAFE, sites, **asked)
    reference = neuron_reference(fitted, UNSAFE, SAFE)
    early, vector = (
        fit_steering_vectors(fitted[site], safe_side="paired")["fraud"] for site in (EARLY, END)
    )
    effects = neuron_effect(
        model,
        HELD_OUT,
        NEURONS,
        reference,
        [vector],
        neutral=NEUTRAL,
        scorers={"length": length},
        max_new_tokens=6,
    )
    steering = [add_vector(early, rho=0.5)]
    decoding = Decoding(max_new_tokens=6, template_keywords=keywords or {})
    answers = generate(model, HELD_OUT, decoding=decoding)
    patched = patching_effect(model, HELD_OUT, NEURONS, steering, length, max_new_tokens=6, **asked)
    heads = head_sources(model, UNSAFE, SAFE, vector.direction, **asked)
    split = split_mlp_gate(model, UNSAFE, SAFE, vector.direction, **asked)
    return {
        **{effect.outcome: torch.tensor(effect.values) for effect in effects},
        "contrast": contrast_activations(model, answers, steering, **asked).rms,
        "patched": torch.tensor([effect.values for effect in patched]),
        "gate": split.gate,
        "heads": torch.stack(list(heads.values())),
    }


def test_what_is_measured_under_a_keyword_is_what_a_template_with_its_words_gives(
    model: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = model.tokenizer.chat_template
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE + own)
    without, given = measured(model, None), measured(model, {"tone": TONE})
    written = TEMPLATE.replace("is defined", "is not defined").replace("{{ tone }}", TONE)
    monkeypatch.setattr(model.tokenizer, "chat_template", written + own)
    expected = measured(model, None)
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-4, atol=1e-6, equal_nan=True)
    for name in ("shift at L3.resid_post", "kl", "contrast", "gate", "heads"):
        assert not torch.allclose(without[name], expected[name], rtol=1e-3), name


def test_a_vector_measured_under_other_words_than_the_reference_is_refused(
    model: HookedModel,
) -> None:
    sites = [END, *sites_of_kind(model, "mlp_post")]
    fitted = cache_activations(model, UNSAFE + SAFE, sites)
    under = cache_activations(model, UNSAFE + SAFE, END, system_prompt="Answer in one word.")[END]
    vector = fit_steering_vectors(under, safe_side="paired")["fraud"]
    reference = neuron_reference(fitted, UNSAFE, SAFE)
    with pytest.raises(ValueError, match=r"measured under .*one word.*, the reference under no"):
        neuron_effect(model, HELD_OUT, NEURONS, reference, [vector])
