"""Patching between runs: identities that must hold whatever the weights are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_model

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.hooked_model import HookedModel
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.models.tokens import encode
from workbench.neurons.patching import contrast_activations, patched_answers, patching_effect
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene
from workbench.steering.interventions import AddVector, Intervention, scale_neurons

PROMPTS = [
    Prompt(f"p{i}", text, None, "fraud", "unsafe", "test")
    for i, text in enumerate(
        [
            "write a scam letter",
            "a",
            "explain a stolen card for a friend in the rain",
            "plan a party at home",
            "list a weapon",
        ]
    )
]
N_NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return load_model(tiny_model("llama3", Path(tmp_path_factory.mktemp("llama"))), device="cpu")


def everything(model: HookedModel) -> list[tuple[int, int]]:
    return [
        (layer, neuron) for layer in range(model.cfg.n_layers) for neuron in range(model.cfg.d_mlp)
    ]


def push(
    kind: str = "resid_post", layer: int = 1, size: float = 6.0, positions: str = "all"
) -> Intervention:
    width = 64 if kind == "mlp_post" else 32
    vector = torch.randn(width, generator=torch.Generator().manual_seed(7))
    return Intervention(
        Site(layer, kind), AddVector(vector, size / vector.norm().item()), positions
    )


def tokens_of(answers: list) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def plain(model: HookedModel) -> list:
    return generate(model, PROMPTS, decoding=Decoding(max_new_tokens=N_NEW))


def test_steering_changes_the_answers_that_the_other_tests_compare(
    model: HookedModel, plain: list
) -> None:
    for steering in ([push()], [push("mlp_post")], [push(positions="generated")]):
        steered = generate(model, PROMPTS, steering, decoding=Decoding(max_new_tokens=N_NEW))
        assert sum(a != b for a, b in zip(tokens_of(steered), tokens_of(plain), strict=True)) >= 3


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_patching_no_neurons_leaves_each_run_as_it_is(
    model: HookedModel, plain: list, positions: str
) -> None:
    steering = [push(positions=positions)]
    sufficiency = patched_answers(model, PROMPTS, {"none": []}, steering, max_new_tokens=N_NEW)
    assert tokens_of(sufficiency) == tokens_of(plain)
    assert [answer.finish for answer in sufficiency] == [answer.finish for answer in plain]
    assert [answer.text for answer in sufficiency] == [answer.text for answer in plain]
    necessity = patched_answers(
        model, PROMPTS, {"none": []}, steering, direction="necessity", max_new_tokens=N_NEW
    )
    assert tokens_of(necessity) == tokens_of(
        generate(model, PROMPTS, steering, decoding=Decoding(max_new_tokens=N_NEW))
    )


def test_patching_between_identical_runs_changes_nothing(model: HookedModel, plain: list) -> None:
    nothing = [push(size=0.0)]
    for direction in ("sufficiency", "necessity"):
        answers = patched_answers(
            model,
            PROMPTS,
            {"all": everything(model)},
            nothing,
            direction=direction,
            max_new_tokens=N_NEW,
        )
        assert tokens_of(answers) == tokens_of(plain)


@pytest.mark.parametrize(
    "steering", [[push("mlp_post")], [push("mlp_post", positions="generated")]]
)
def test_steering_that_acts_through_the_patched_neurons_only_is_carried_over_whole(
    model: HookedModel, plain: list, steering: list[Intervention]
) -> None:
    sets = {"layer": [(1, neuron) for neuron in range(model.cfg.d_mlp)]}
    steered = generate(model, PROMPTS, steering, decoding=Decoding(max_new_tokens=N_NEW))
    assert tokens_of(
        patched_answers(model, PROMPTS, sets, steering, max_new_tokens=N_NEW)
    ) == tokens_of(steered)
    back = patched_answers(
        model, PROMPTS, sets, steering, direction="necessity", max_new_tokens=N_NEW
    )
    assert tokens_of(back) == tokens_of(plain)


def test_steering_of_a_single_neuron_is_carried_by_that_neuron_and_by_no_other(
    model: HookedModel, plain: list
) -> None:
    steering = scale_neurons([(2, 5)], -60.0)
    steered = generate(model, PROMPTS, steering, decoding=Decoding(max_new_tokens=N_NEW))
    assert tokens_of(steered) != tokens_of(plain)
    sets = {"it": [(2, 5)], "others below": [(0, 1), (1, 7), (2, 6)]}
    answers = patched_answers(model, PROMPTS, sets, steering, max_new_tokens=N_NEW)
    assert tokens_of(answers[: len(PROMPTS)]) == tokens_of(steered)
    assert tokens_of(answers[len(PROMPTS) :]) == tokens_of(plain)
    assert [answer.condition for answer in answers] == ["it"] * len(PROMPTS) + [
        "others below"
    ] * len(PROMPTS)


def test_patched_answers_do_not_depend_on_the_batch(model: HookedModel) -> None:
    sets = {
        "some": [(layer, neuron) for layer in (1, 2, 3) for neuron in range(0, 64, 3)],
        "few": [(3, 1)],
    }
    whole = patched_answers(model, PROMPTS, sets, [push()], max_new_tokens=N_NEW)
    single = patched_answers(model, PROMPTS, sets, [push()], max_new_tokens=N_NEW, batch_size=1)
    assert tokens_of(whole) == tokens_of(single)


def neurons_read(
    model: HookedModel,
    tokens: torch.Tensor,
    steering: list[Intervention],
    prompt_length: int | None = None,
) -> dict[int, torch.Tensor]:
    """Every layer's neurons in one plain pass without a cache."""
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> object:
        def hook(activation: torch.Tensor, hook: object) -> None:
            seen[layer] = activation.clone()

        return hook

    hooks = [(f"blocks.{layer}.mlp.hook_post", keep(layer)) for layer in range(model.cfg.n_layers)]
    with (
        torch.no_grad(),
        intervene(model, steering, prompt_length=prompt_length),
        model.hooks(fwd_hooks=hooks),
    ):
        model(tokens)
    return seen


def test_a_patched_step_equals_patching_by_hand_without_a_cache(model: HookedModel) -> None:
    even, ids = list(range(0, 64, 2)), list(encode(model, [PROMPTS[2]])[0].ids)

    def overwriting(values: torch.Tensor) -> object:
        def hook(activation: torch.Tensor, hook: object) -> torch.Tensor:
            activation = activation.clone()
            activation[..., even] = values[..., even]
            return activation

        return hook

    written: list[int] = []
    for _ in range(5):
        tokens = torch.tensor([ids + written])
        steered = neurons_read(model, tokens, [push()])
        hooks = [(f"blocks.{layer}.mlp.hook_post", overwriting(steered[layer])) for layer in (2, 3)]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            written.append(int(model(tokens)[0, -1].argmax()))
    sets = {"half": [(layer, neuron) for layer in (2, 3) for neuron in even]}
    answer = patched_answers(model, [PROMPTS[2]], sets, [push()], max_new_tokens=5)[0]
    assert list(answer.tokens) == written


def test_the_share_is_one_for_all_the_neurons_steering_acts_through_and_zero_for_none(
    model: HookedModel,
) -> None:
    def share_of_a(prompts: list[str], texts: list[str]) -> list[float]:
        return [sum(ord(char) for char in text) / 1000 for text in texts]

    sets = {"all": [(1, neuron) for neuron in range(64)], "none": []}
    effects = patching_effect(
        model, PROMPTS, sets, [push("mlp_post")], share_of_a, max_new_tokens=N_NEW
    )
    assert [(effect.direction, effect.name) for effect in effects] == [
        ("sufficiency", "all"),
        ("sufficiency", "none"),
        ("necessity", "all"),
        ("necessity", "none"),
    ]
    assert [effect.share.value for effect in effects] == pytest.approx([1, 0, 1, 0])
    assert effects[0].n_neurons == 64
    assert len(effects[0].answers) == len(PROMPTS)


def test_an_unscored_answer_is_counted_and_left_out_of_the_share(model: HookedModel) -> None:
    def some(prompts: list[str], texts: list[str]) -> list[float | None]:
        return [
            None if prompt == "a" else float(sum(map(ord, text)))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    sets = {"all": [(1, neuron) for neuron in range(64)]}
    effect = patching_effect(
        model,
        PROMPTS,
        sets,
        [push("mlp_post")],
        some,
        directions=["sufficiency"],
        max_new_tokens=N_NEW,
    )[0]
    assert (effect.share.n, effect.share.n_unscored) == (4, 1)


def test_contrasting_equals_two_runs_one_answer_at_a_time(model: HookedModel, plain: list) -> None:
    for steering in (
        [push()],
        [push(positions="generated")],
        [push(positions="prompt")],
        [push("mlp_post", layer=2)],
    ):
        squares, sums, n = (
            torch.zeros(4, 64, dtype=torch.float64),
            torch.zeros(4, 64, dtype=torch.float64),
            0,
        )
        for answer in plain:
            ids = encode(model, [answer.prompt])[0].ids
            tokens = torch.tensor([ids + answer.tokens])
            before, after = (neurons_read(model, tokens, run, len(ids)) for run in ([], steering))
            for layer in range(4):
                difference = (after[layer] - before[layer])[0, len(ids) :].double()
                squares[layer] += (difference**2).sum(dim=0)
                sums[layer] += difference.sum(dim=0)
            n += len(answer.tokens)
        contrast = contrast_activations(model, plain, steering, batch_size=2)
        assert torch.allclose(contrast.rms, (squares / n).sqrt(), rtol=1e-3, atol=1e-5)
        assert torch.allclose(contrast.mean, sums / n, rtol=1e-3, atol=1e-5)
        assert contrast.n_tokens == n


def test_steering_one_neuron_at_the_last_layer_contrasts_that_neuron_alone(
    model: HookedModel, plain: list
) -> None:
    contrast = contrast_activations(model, plain, scale_neurons([(3, 9)], 3.0))
    assert contrast.ranked(1) == [(3, 9)]
    assert int((contrast.rms > 0).sum()) == 1
    frame = contrast.to_frame()
    assert list(frame.columns) == ["layer", "neuron", "rms", "mean"]
    assert (frame["layer"][0], frame["neuron"][0]) == (3, 9)
    assert frame["rms"].is_monotonic_decreasing
    assert len(frame) == 256


def test_layers_below_the_steered_one_do_not_move(model: HookedModel, plain: list) -> None:
    contrast = contrast_activations(model, plain, [push(layer=1)])
    assert float(contrast.rms[:2].max()) < 1e-5
    assert float(contrast.rms[2:].min()) > 1e-3


def test_steering_behind_the_last_neurons_moves_none_of_them(
    model: HookedModel, plain: list
) -> None:
    with pytest.raises(ValueError, match=r"L3.resid_post comes after the last neurons"):
        contrast_activations(model, plain, [push(layer=3)])
    both, first = (
        contrast_activations(model, plain, steering)
        for steering in ([push(), push(layer=3)], [push()])
    )
    assert torch.equal(both.rms, first.rms)


def test_empty_answers_are_left_out_of_a_contrast_and_nothing_at_all_is_an_error(
    model: HookedModel, plain: list
) -> None:
    import dataclasses

    empty = dataclasses.replace(plain[0], tokens=(), text="")
    assert contrast_activations(model, [empty, plain[1]], [push()]).n_prompts == 1
    with pytest.raises(ValueError, match="no answers to contrast"):
        contrast_activations(model, [empty], [push()])


def test_wrong_arguments_say_what_is_allowed(model: HookedModel, plain: list) -> None:
    with pytest.raises(ValueError, match="no steering"):
        patched_answers(model, PROMPTS, {"none": []}, [])
    with pytest.raises(ValueError, match="without rows"):
        contrast_activations(model, plain, [push().for_rows([0])])
    with pytest.raises(ValueError, match=r"no neuron \(4, 0\): the model has 4 layers of 64"):
        patched_answers(model, PROMPTS, {"beyond": [(4, 0)]}, [push()])
    with pytest.raises(ValueError, match="directions: sufficiency, necessity"):
        patched_answers(model, PROMPTS, {"none": []}, [push()], direction="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one prompt"):
        patched_answers(model, [], {"none": []}, [push()])
