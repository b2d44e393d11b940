"""Numbers that leave what a dtype can hold are an error that names prompt and layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import D_MODEL, sentences

from workbench.generation.answers import generate, sweep
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_kl, answer_log_probs, steered_log_probs
from workbench.models.activations import cache_activations, token_activations
from workbench.models.finite import first_layer_not_finite
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.neurons.patching import patched_answers
from workbench.neurons.splits import scaled_activations
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import AddVector, Intervention

PROMPTS = [
    Prompt(f"p{i}", text, None, "fraud", "unsafe", "t") for i, text in enumerate(sentences(3))
]
SHORT = Decoding(max_new_tokens=4)


@pytest.fixture(scope="module")
def half(family_path) -> Any:
    return load_model(family_path("gemma3"), device="cpu", dtype="float16")


def too_strong(layer: int = 1) -> list[Intervention]:
    return [Intervention(Site(layer, "resid_post"), AddVector(torch.full((D_MODEL,), 7e4)))]


def overflowing(layer: int, size: float = float("inf")) -> dict[str, Any]:
    """A hook that makes the output of a block infinite at the last token of the second row."""

    def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation = activation.clone()
        activation[min(1, len(activation) - 1), -1, 0] = size
        return activation

    return {"fwd_hooks": [(f"blocks.{layer}.hook_resid_post", hook)]}


@pytest.mark.parametrize("decoding", [SHORT, Decoding(max_new_tokens=4, temperature=1.0)])
def test_an_answer_that_overflows_names_its_prompt_its_layer_and_what_to_do(half, decoding) -> None:
    conditions = {"unsteered": [], "steered": {"p1": too_strong()}}
    message = (
        r"prompt 'p1': numbers are infinite or undefined from layer 1 on \(in float16, which ends "
        r"at 6.55e\+04\); steer less strongly, or load the model in float32 or bfloat16"
    )
    with pytest.raises(ValueError, match=message):
        sweep(half, PROMPTS, conditions, decoding)


def test_overflow_while_the_answer_is_written_is_found_too(half) -> None:
    late = [
        Intervention(Site(2, "resid_post"), AddVector(torch.full((D_MODEL,), 7e4)), "generated")
    ]
    with pytest.raises(ValueError, match=r"prompt 'p.': numbers are .* from layer 2 on"):
        generate(half, PROMPTS, late, SHORT)


def test_likelihoods_that_overflow_are_errors(half) -> None:
    answers = generate(half, PROMPTS, decoding=SHORT)
    answers = [a for a in answers if a.tokens]
    assert answers
    steered = [too_strong()] * len(answers)
    with pytest.raises(ValueError, match=r"from layer 1 on .* steer less strongly"):
        steered_log_probs(half, answers, steered)
    with pytest.raises(ValueError, match=r"from layer 1 on .* steer less strongly"):
        answer_kl(half, answers, {"strong": steered})


def test_an_unsteered_model_that_overflows_is_told_to_change_its_dtype(family_path) -> None:
    model = load_model(family_path("llama3"), device="cpu", dtype="float16")
    answers = generate(model, PROMPTS, decoding=SHORT)
    with torch.no_grad():
        model.original_model.model.layers[2].mlp.down_proj.weight.mul_(3e4)
    message = r"from layer 2 on \(in float16, .*\); load the model in float32 or bfloat16"
    for run in (
        lambda: generate(model, PROMPTS, decoding=SHORT),
        lambda: answer_log_probs(model, answers),
        lambda: cache_activations(model, PROMPTS, Site(2, "resid_post")),
        lambda: token_activations(model, PROMPTS[0], Site(3, "resid_post")),
        lambda: scaled_activations(model, PROMPTS, [Site(3, "mlp_post")]),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_patching_with_steering_that_overflows_is_an_error(half) -> None:
    with pytest.raises(ValueError, match=r"prompt 'p.': numbers are infinite or undefined"):
        patched_answers(half, PROMPTS, {"one": [(0, 1)]}, too_strong(), max_new_tokens=3)


def test_the_layer_is_looked_for_in_the_row_and_at_real_tokens_alone(tiny) -> None:
    tokens = torch.tensor([[9, 40, 41], [9, 33, 34]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with tiny.hooks(**overflowing(2)):
        assert first_layer_not_finite(tiny, tokens, mask, 0) is None
        assert first_layer_not_finite(tiny, tokens, mask, 1) == 2
    mask[1, 2] = False
    with tiny.hooks(**overflowing(3)):
        assert first_layer_not_finite(tiny, tokens, mask, 1) is None
