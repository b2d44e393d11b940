"""Causal checks of neurons: planted truth, passes done by hand, and the real model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import sentences, tiny_model

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import ActivationSet, cache_activations
from workbench.models.hooked_model import HookedModel
from workbench.models.load import load_model
from workbench.models.sites import Site, sites_of_kind
from workbench.models.tokens import encode
from workbench.neurons.effects import effects_table, neuron_effect, rank_curve
from workbench.neurons.silencing import (
    METHODS,
    NeuronReference,
    matched_controls,
    matching_statistics,
    neuron_interventions,
    neuron_reference,
)
from workbench.prompts.prompt import Prompt, load_prompts, select_prompts, split_prompts
from workbench.steering.vectors import SteeringVector, fit_steering_vectors

PLANTED = (1, 17)
END = Site(3, "resid_post")
LATE = Site(28, "resid_post")
MARK = "#"


def prompts_of(label: str, first: int, n: int) -> list[Prompt]:
    """Requests that are unsafe when every word of them is marked."""
    texts = sentences(100)[first : first + n]
    if label == "unsafe":
        texts = [text.replace(" ", f" {MARK}") for text in texts]
    return [
        Prompt(f"{label}-{first + i}", t, None, "fraud", label, "test", f"pair-{first + i}")
        for i, t in enumerate(texts)
    ]


UNSAFE, SAFE = prompts_of("unsafe", 0, 12), prompts_of("safe", 0, 12)
HELD_OUT, HELD_OUT_SAFE = prompts_of("unsafe", 20, 7), prompts_of("safe", 30, 6)
NEUTRAL = [
    Prompt(f"n{i}", text, None, "harmless", "neutral", "test")
    for i, text in enumerate(sentences(60)[50:55])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    """A random Llama with one neuron that fires at the mark and writes a fixed vector."""
    model = load_model(tiny_model("llama3", Path(tmp_path_factory.mktemp("llama"))), device="cpu")
    hf_model, (layer, neuron) = model.original_model, PLANTED
    mlp = model.original_model.model.layers[layer].mlp
    weights = [
        getattr(part, "original_component", part).weight
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ]
    written = torch.randn(32, generator=torch.Generator().manual_seed(3))
    read = direction_of_the_mark(model, hf_model, layer)
    with torch.no_grad():
        weights[0][neuron] = 3 * read
        weights[1][neuron] = 3 * read
        weights[2][:, neuron] = 1.5 * written / written.norm()
    return model


def direction_of_the_mark(model: HookedModel, hf_model: object, layer: int) -> torch.Tensor:
    """Direction in which the MLP's input at marked tokens differs from that at all others."""
    [mark] = model.tokenizer(MARK, add_special_tokens=False).input_ids
    seen: list[torch.Tensor] = []
    marked: list[torch.Tensor] = []

    def hook(activation: torch.Tensor, hook: object) -> None:
        seen.append(activation[0].clone())

    for row in encode(model, UNSAFE):
        marked.append(torch.tensor(row.ids) == mark)
        with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_in", hook)]):
            model(torch.tensor([row.ids]))
    inputs, is_mark = torch.cat(seen), torch.cat(marked)
    direction = inputs[is_mark].mean(dim=0) - inputs[~is_mark].mean(dim=0)
    return direction / direction.norm()


@pytest.fixture(scope="module")
def fitted(model: HookedModel) -> dict[Site, ActivationSet]:
    return cache_activations(
        model, UNSAFE + SAFE, [END, Site(1, "resid_post"), *sites_of_kind(model, "mlp_post")]
    )


@pytest.fixture(scope="module")
def reference(fitted: dict[Site, ActivationSet]) -> NeuronReference:
    return neuron_reference(fitted, UNSAFE, SAFE)


@pytest.fixture(scope="module")
def vector(fitted: dict[Site, ActivationSet]) -> SteeringVector:
    return fit_steering_vectors(fitted[END], safe_side="paired")["fraud"]


def w_out(model: HookedModel, layer: int) -> torch.Tensor:
    return model.blocks[layer].mlp.W_out.detach().double()


# --- planted truth


@pytest.mark.parametrize("method", ["clamp", "mean", "zero", "steer"])
def test_the_planted_neuron_ranks_first_by_ablation(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector, method: str
) -> None:
    every = {str((layer, n)): [(layer, n)] for layer in range(4) for n in range(64)}
    effects = neuron_effect(
        model, HELD_OUT, every, reference, [vector], method=method, batch_size=256
    )
    best = max(effects, key=lambda effect: effect.estimate.value)
    assert best.name == str(PLANTED)
    values = sorted(effect.estimate.value for effect in effects)
    assert values[-1] > 2 * values[-2]
    assert best.estimate.low > 0
    assert all(math.isnan(effect.p) for effect in effects)


def test_the_planted_neuron_beats_all_its_controls(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    statistics = matching_statistics(model, reference, vector)
    controls = matched_controls(statistics, [PLANTED], n_sets=20).sets
    [effect] = neuron_effect(
        model, HELD_OUT, {"it": [PLANTED]}, reference, [vector], controls={"it": controls}
    )
    assert effect.p == 1 / 21
    assert len(effect.controls) == 20
    assert effect.estimate.value > max(effect.controls)


def test_a_rank_curve_falls_from_the_slice_with_the_planted_neuron(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    ranked = [
        PLANTED,
        *((layer, n) for layer in (3, 0, 2, 1) for n in range(64) if (layer, n) != PLANTED),
    ]
    statistics = matching_statistics(model, reference, vector)
    curve = rank_curve(
        model,
        HELD_OUT,
        ranked,
        reference,
        [vector],
        statistics=statistics,
        fraction=0.02,
        n_slices=3,
        n_sets=5,
        safe=HELD_OUT_SAFE,
    )
    assert [effect.name for effect in curve] == ["0-2 %", "2-4 %", "4-6 %"]
    assert [effect.n_neurons for effect in curve] == [5, 5, 5]
    assert curve[0].estimate.value > max(effect.estimate.value for effect in curve[1:])
    assert all(len(effect.controls) == 5 for effect in curve)
    with pytest.raises(ValueError, match="do not fit into 256 neurons"):
        rank_curve(model, HELD_OUT, ranked, reference, [vector], fraction=0.4)


# --- the numbers, against passes done by hand


def by_hand(
    model: HookedModel,
    prompt: Prompt,
    edits: dict[int, tuple[list[int], torch.Tensor]],
    site: Site,
    whole: bool = False,
) -> torch.Tensor:
    """Mean residual stream and last logits of one prompt, without cache and padding.

    Its neurons are set from the first content token on.
    """
    [row] = encode(model, [prompt])
    residuals: list[torch.Tensor] = []

    def setting(neurons: list[int], values: torch.Tensor) -> object:
        def hook(activation: torch.Tensor, hook: object) -> torch.Tensor:
            activation = activation.clone()
            activation[:, row.content[0] :, neurons] = values
            return activation

        return hook

    def keep(activation: torch.Tensor, hook: object) -> None:
        residuals.append(
            activation[0, slice(None) if whole else slice(*row.content)].double().mean(dim=0)
        )

    hooks = [(f"blocks.{layer}.mlp.hook_post", setting(*edit)) for layer, edit in edits.items()]
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, (site.hook_name, keep)]):
        logits = model(torch.tensor([row.ids]))[0, -1].double()
    return torch.cat([residuals[0], logits])


def test_shift_and_divergence_equal_passes_done_by_hand(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    neurons = [(0, 3), (1, 17), (1, 2), (3, 60)]
    by_layer = {0: [3], 1: [17, 2], 3: [60]}
    u = vector.direction.double()
    for method, values in (("clamp", reference.safe.mean(dim=0)), ("zero", torch.zeros(4, 64))):
        edits = {layer: (places, values[layer, places]) for layer, places in by_layer.items()}
        shift, kl = neuron_effect(
            model,
            HELD_OUT,
            {"few": neurons},
            reference,
            [vector],
            method=method,
            neutral=NEUTRAL,
            batch_size=6,
        )
        plain = [by_hand(model, prompt, {}, END)[:32] @ u for prompt in HELD_OUT]
        edited = [by_hand(model, prompt, edits, END)[:32] @ u for prompt in HELD_OUT]
        expected = [float(b - a) / vector.norm for a, b in zip(plain, edited, strict=True)]
        assert shift.values == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert shift.estimate.value == pytest.approx(np.mean(expected), rel=1e-3)
        for i, prompt in enumerate(NEUTRAL):
            p = by_hand(model, prompt, {}, END)[32:].log_softmax(dim=0)
            q = by_hand(model, prompt, edits, END)[32:].log_softmax(dim=0)
            assert kl.values[i] == pytest.approx(
                float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6
            )


def test_template_tokens_are_left_alone_where_no_prefix_can_be_shared(
    model: HookedModel, reference: NeuronReference
) -> None:
    everywhere = cache_activations(model, UNSAFE + SAFE, END, span="all")[END]
    vector = fit_steering_vectors(everywhere, safe_side="paired")["fraud"]
    neurons = [(0, n) for n in range(0, 64, 2)]
    edits = {0: (list(range(0, 64, 2)), reference.means[1][0, ::2].float())}
    [effect] = neuron_effect(model, HELD_OUT, {"half": neurons}, reference, [vector])
    u = vector.direction.double()
    plain, edited = (
        [by_hand(model, p, edit, END, whole=True)[:32] @ u for p in HELD_OUT]
        for edit in ({}, edits)
    )
    expected = [float(b - a) / vector.norm for a, b in zip(plain, edited, strict=True)]
    assert effect.values == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_padding_does_not_push_the_prefix_out_of_a_sliding_window(family_model) -> None:
    gemma = family_model("gemma3")  # its window is 32 columns
    sites = [END, *sites_of_kind(gemma, "mlp_post")]
    cached = cache_activations(gemma, UNSAFE + SAFE, sites)
    reference = neuron_reference(cached, UNSAFE, SAFE)
    vector = fit_steering_vectors(cached[END], safe_side="paired")["fraud"]
    long = replace(HELD_OUT[1], text=f"{HELD_OUT[1].text} " * 4)
    together, singly = (
        neuron_effect(
            gemma,
            [HELD_OUT[0], long],
            {"few": [(0, n) for n in range(20)]},
            reference,
            [vector],
            method="zero",
            batch_size=size,
        )[0].values
        for size in (64, 1)
    )
    assert together == pytest.approx(singly, rel=1e-3, abs=1e-5)


def test_predicted_effects_of_single_neurons_at_the_last_layer_have_slope_one(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    held_out = cache_activations(model, HELD_OUT, Site(3, "mlp_post"))[
        Site(3, "mlp_post")
    ].values.double()
    targets = {str(n): [(3, n)] for n in range(64)}
    effects = neuron_effect(model, HELD_OUT, targets, reference, [vector], method="mean")
    middle = (reference.safe.double().mean(dim=0) + reference.unsafe.double().mean(dim=0))[3] / 2
    predicted = (
        (w_out(model, 3) @ vector.direction.double())
        * (middle - held_out.mean(dim=0))
        / vector.norm
    )
    measured = np.array([effect.estimate.value for effect in effects])
    slope, offset = np.polyfit(predicted.numpy(), measured, 1)
    assert slope == pytest.approx(1, abs=1e-3)
    assert offset == pytest.approx(0, abs=1e-5)


def test_restricted_steering_adds_what_the_neurons_write_of_the_difference(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    places = list(range(0, 64, 3))
    unsafe, safe = reference.means
    written = (
        ((safe - unsafe)[3, places] @ w_out(model, 3)[places])
        @ vector.direction.double()
        / vector.norm
    )
    [effect] = neuron_effect(
        model,
        HELD_OUT,
        {"some": [(3, n) for n in places]},
        reference,
        [vector],
        method="steer",
        factor=0.5,
    )
    assert effect.values == pytest.approx([0.5 * float(written)] * len(HELD_OUT), rel=1e-3)


def test_factor_zero_changes_nothing_at_all(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    for method in METHODS:
        effects = neuron_effect(
            model,
            HELD_OUT,
            {"it": [PLANTED]},
            reference,
            [vector],
            method=method,
            factor=0.0,
            neutral=NEUTRAL,
        )
        assert all(
            value == pytest.approx(0, abs=1e-6) for effect in effects for value in effect.values
        )


def test_effects_do_not_depend_on_the_batch_or_on_the_other_sets(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    targets = {str(n): [(layer, n) for layer in range(4)] for n in (1, 2, 3)}
    for method in ("clamp", "resample"):
        options = {"method": method, "neutral": NEUTRAL, "safe": HELD_OUT_SAFE}
        together = neuron_effect(model, HELD_OUT, targets, reference, [vector], **options)
        alone = [
            effect
            for name, neurons in targets.items()
            for effect in neuron_effect(
                model, HELD_OUT, {name: neurons}, reference, [vector], **options, batch_size=3
            )
        ]
        for a, b in zip(together, alone, strict=True):
            assert (a.name, a.outcome) == (b.name, b.outcome)
            assert a.values == pytest.approx(b.values, rel=1e-3, abs=1e-5)


def test_resampling_takes_the_values_of_one_safe_prompt(
    model: HookedModel, reference: NeuronReference
) -> None:
    [edit] = neuron_interventions(reference, [(2, 4), (2, 9)], "resample", donor=5)
    edited = edit.edit(torch.ones(1, 2, 64))
    assert torch.equal(edited[0, 0, [4, 9]], reference.safe[5, 2, [4, 9]])
    assert int((edited[0, 1] != 1).sum()) == 2
    with pytest.raises(ValueError, match="'resample' needs a donor"):
        neuron_interventions(reference, [(2, 4)], "resample")


def test_the_gap_is_that_of_the_held_out_prompts_when_safe_ones_are_given(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    [fit_gap] = neuron_effect(model, HELD_OUT, {"it": [PLANTED]}, reference, [vector])
    [own_gap] = neuron_effect(
        model, HELD_OUT, {"it": [PLANTED]}, reference, [vector], safe=HELD_OUT_SAFE
    )
    values = cache_activations(model, HELD_OUT + HELD_OUT_SAFE, END)[END]
    projected = values.values.double() @ vector.direction.double()
    gap = float(projected[len(HELD_OUT) :].mean() - projected[: len(HELD_OUT)].mean())
    assert own_gap.estimate.value == pytest.approx(
        fit_gap.estimate.value * vector.norm / gap, rel=1e-3
    )


def test_several_read_sites_each_give_an_outcome(
    model: HookedModel,
    fitted: dict[Site, ActivationSet],
    reference: NeuronReference,
    vector: SteeringVector,
) -> None:
    early = fit_steering_vectors(fitted[Site(1, "resid_post")], safe_side="paired")["fraud"]
    effects = neuron_effect(
        model, HELD_OUT, {"late": [(3, 5)], "it": [PLANTED]}, reference, [early, vector]
    )
    assert [(effect.name, effect.outcome) for effect in effects] == [
        ("late", "shift at L1.resid_post"),
        ("late", "shift at L3.resid_post"),
        ("it", "shift at L1.resid_post"),
        ("it", "shift at L3.resid_post"),
    ]
    assert effects[0].values == pytest.approx([0] * len(HELD_OUT), abs=1e-6)


def test_answers_are_scored_against_the_unedited_model(
    model: HookedModel, reference: NeuronReference
) -> None:
    everything = [(layer, n) for layer in range(4) for n in range(64)]

    def length(prompts: list[str], texts: list[str]) -> list[float]:
        return [float(len(text)) for text in texts]

    def long_only(prompts: list[str], texts: list[str]) -> list[float | None]:
        return [
            None if prompt == HELD_OUT[0].text else float(len(text))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    for method in ("zero", "resample"):
        changed, partly = neuron_effect(
            model,
            HELD_OUT,
            {"all": everything},
            reference,
            controls={"all": [[(0, 0)], [(0, 1)]]},
            method=method,
            scorers={"length": length, "partly": long_only},
            max_new_tokens=8,
        )
        assert (changed.outcome, changed.estimate.n) == ("length", len(HELD_OUT))
        assert (partly.estimate.n, partly.estimate.n_unscored) == (len(HELD_OUT) - 1, 1)
        assert math.isnan(partly.values[0])
        assert len(changed.controls) == 2
    plain = generate(model, HELD_OUT, decoding=Decoding(max_new_tokens=8))
    edited = generate(
        model,
        HELD_OUT,
        neuron_interventions(reference, everything, "zero"),
        decoding=Decoding(max_new_tokens=8),
    )
    [effect] = neuron_effect(
        model,
        HELD_OUT,
        {"all": everything},
        reference,
        method="zero",
        scorers={"length": length},
        max_new_tokens=8,
    )
    assert effect.values == tuple(
        float(len(b.text) - len(a.text)) for a, b in zip(plain, edited, strict=True)
    )


def test_the_table_has_a_row_an_effect(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    effects = neuron_effect(
        model,
        HELD_OUT,
        {"it": [PLANTED]},
        reference,
        [vector],
        controls={"it": [[(1, 3)]]},
        neutral=NEUTRAL,
    )
    table = effects_table(effects)
    assert list(table["outcome"]) == ["shift at L3.resid_post", "kl"]
    assert table["value"][0] == effects[0].estimate.value
    assert list(table["n_controls"]) == [1, 1]
    assert set(table["p"]) <= {0.5, 1.0}


def test_wrong_arguments_say_what_is_allowed(
    model: HookedModel,
    fitted: dict[Site, ActivationSet],
    reference: NeuronReference,
    vector: SteeringVector,
) -> None:
    def effect(
        prompts: list[Prompt] = HELD_OUT, neuron: tuple[int, int] = PLANTED, **options: object
    ) -> object:
        return neuron_effect(model, prompts, {"it": [neuron]}, reference, [vector], **options)

    with pytest.raises(ValueError, match="measure effects on held-out prompts"):
        effect(UNSAFE)
    with pytest.raises(ValueError, match=r"no neuron \(1, 64\): the model has 4 layers of 64"):
        effect(neuron=(1, 64))
    with pytest.raises(ValueError, match="unknown method 'kill'; methods: clamp, mean"):
        effect(method="kill")
    with pytest.raises(ValueError, match="controls of 'other' have no target"):
        effect(controls={"other": [[(0, 0)]]})
    with pytest.raises(ValueError, match="'it' has no neurons"):
        neuron_effect(model, HELD_OUT, {"it": []}, reference, [vector])
    early = fit_steering_vectors(fitted[Site(1, "resid_post")], safe_side="paired")["fraud"]
    with pytest.raises(ValueError, match=r"neuron \(3, 5\) comes after L1.resid_post"):
        neuron_effect(model, HELD_OUT, {"it": [(3, 5)]}, reference, [early])
    with pytest.raises(ValueError, match="no gap to measure"):
        effect(prompts=prompts_of("safe", 40, 5), safe=HELD_OUT)
    with pytest.raises(ValueError, match="no neurons of layer 2"):
        neuron_reference(
            {site: cached for site, cached in fitted.items() if site != Site(2, "mlp_post")},
            UNSAFE,
            SAFE,
        )
    with pytest.raises(ValueError, match="needs unsafe and safe prompts, got 12 and 0"):
        neuron_reference(fitted, UNSAFE, [])


# --- what controls are matched by


def test_matching_statistics_are_those_of_the_activations(
    model: HookedModel, reference: NeuronReference, vector: SteeringVector
) -> None:
    table = matching_statistics(model, reference, vector).set_index(["layer", "neuron"])
    values = torch.cat([reference.unsafe, reference.safe])[:, 2, 7]
    row = table.loc[(2, 7)]
    assert row["mean_abs"] == pytest.approx(float(values.abs().mean()), rel=1e-5)
    assert row["sd"] == pytest.approx(float(values.std(correction=0)), rel=1e-5)
    assert row["write"] == pytest.approx(
        abs(float(w_out(model, 2)[7] @ vector.direction.double())), rel=1e-5
    )


# --- the real model


@pytest.fixture(scope="module")
def real_model() -> HookedModel:
    return load_model("embedded", device="cpu")


@pytest.fixture(scope="module")
def harmless(real_model: HookedModel) -> dict[Site, ActivationSet]:
    prompts = select_prompts(split_prompts(load_prompts(), seed=0).fit, category="harmless")
    return cache_activations(real_model, prompts, [LATE, *sites_of_kind(real_model, "mlp_post")])


@pytest.mark.slow
@pytest.mark.parametrize("category", ["privacy_violation", "illegal_activity"])
def test_on_the_real_model_the_top_neurons_move_the_prompt_and_matched_ones_do_not(
    real_model: HookedModel, harmless: dict[Site, ActivationSet], category: str
) -> None:
    fit, _, test = split_prompts(load_prompts(), seed=0)
    unsafe = select_prompts(fit, category=category, label="unsafe")
    safe = list(harmless[LATE].prompts)
    activations = {
        site: replace(
            cached,
            values=torch.cat([cached.values, harmless[site].values]),
            prompts=cached.prompts + tuple(safe),
        )
        for site, cached in cache_activations(real_model, unsafe, list(harmless)).items()
    }
    vector = fit_steering_vectors(activations[LATE])[category]
    reference = neuron_reference(activations, unsafe, safe)
    w = torch.stack([w_out(real_model, layer) for layer in range(LATE.layer + 1)])
    difference = (reference.means[0] - reference.means[1])[: LATE.layer + 1]
    contribution = (w @ -vector.direction.double()) * difference
    top = [
        divmod(int(i), w.shape[1]) for i in contribution.flatten().argsort(descending=True)[:100]
    ]
    controls = matched_controls(
        matching_statistics(real_model, reference, vector), top, n_sets=20
    ).sets
    held_out = select_prompts(test, category=category, label="unsafe", limit=12)
    [effect] = neuron_effect(
        real_model, held_out, {"top 100": top}, reference, [vector], controls={"top 100": controls}
    )
    assert effect.estimate.value >= 0.15
    assert max(effect.controls) < 0.03
    assert effect.p == 1 / 21
