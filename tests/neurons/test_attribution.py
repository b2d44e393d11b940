"""Direct attribution: parts add up, equal TransformerLens's own, and are causal."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import hooked_transformers
from helpers.tiny_models import (
    FAMILIES,
    PLAIN,
    planted_direction,
    sentences,
)
from helpers.unusual_models import layer_norm_behind_mlp, tiny_mixtral

from workbench.models.activations import cache_activations
from workbench.models.errors import CannotBeDone
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.models.tokens import encode
from workbench.neurons.attribution import (
    Attribution,
    class_difference,
    completeness_tolerance,
    direct_attribution,
    output_norm,
    write_matrix,
    write_weights,
    writing_sites,
)
from workbench.neurons.splits import (
    ROLES,
    head_sources,
    scaled_activations,
    split_mlp_gate,
    writing_activations,
)
from workbench.prompts.prompt import Prompt, load_prompts, select_prompts
from workbench.steering.apply import intervene
from workbench.steering.interventions import clamp_neurons

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POST_NORM = ("gemma2", "gemma3", "olmo2")
SITE = Site(3, "resid_post")

PROMPTS = [
    Prompt(
        f"p{i}", text + " please" * i, f"sure, {text}", "c", "unsafe" if i % 2 else "safe", "test"
    )
    for i, text in enumerate(sentences(12))
]
UNSAFE, SAFE = select_prompts(PROMPTS, label="unsafe"), select_prompts(PROMPTS, label="safe")
DIRECTION = planted_direction()


def attributed(model: Any, site: Site = SITE, span: str = "content", **options: Any) -> Attribution:
    cached = cache_activations(
        model, PROMPTS, [site, *writing_sites(model, site)], span=span, batch_size=4
    )
    difference = class_difference(writing_activations(model, cached, site), UNSAFE, SAFE)
    return direct_attribution(model, site, DIRECTION, difference, **options)


# --- completeness


@pytest.mark.parametrize("span", ["content", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_add_up_on_every_family(
    family_model: Callable[[str], Any], family: str, span: str
) -> None:
    attribution = attributed(family_model(family), span=span)
    assert attribution.error < 1e-5
    assert attribution.heads.shape == (4, 4)
    assert attribution.neurons.shape == (4, 64)
    assert attribution.absolute > abs(attribution.total) > 1e-4


@pytest.mark.parametrize("family", ["llama3", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("kind", "attention", "mlp"), [("resid_pre", 2, 2), ("resid_mid", 3, 2), ("resid_post", 3, 3)]
)
def test_only_what_is_below_the_site_counts(
    family_model: Callable[[str], Any], family: str, kind: str, attention: int, mlp: int
) -> None:
    attribution = attributed(family_model(family), Site(2, kind))
    assert (len(attribution.heads), len(attribution.neurons)) == (attention, mlp)


def test_the_embedding_alone_is_what_enters_the_first_block(
    family_model: Callable[[str], Any],
) -> None:
    attribution = attributed(family_model("gpt2"), Site(0, "resid_pre"))
    assert attribution.total == pytest.approx(attribution.embedding)
    assert attribution.heads.numel() == attribution.neurons.numel() == 0


@pytest.mark.parametrize("family", POST_NORM)
def test_behind_an_output_norm_unscaled_activations_do_not_add_up(
    family_model: Callable[[str], Any], family: str
) -> None:
    model = family_model(family)
    in_tl3 = family == "olmo2" and hooked_transformers.exists()
    name = "ln2" if in_tl3 else "ln2_post"
    assert output_norm(model, Site(0, "mlp_post")) == f"blocks.0.{name}.hook_scale"
    cached = cache_activations(model, PROMPTS, [SITE, *writing_sites(model, SITE)])
    with pytest.raises(ValueError, match="is not complete"):
        direct_attribution(model, SITE, DIRECTION, class_difference(cached, UNSAFE, SAFE))


def test_without_an_output_norm_nothing_is_scaled(family_model: Callable[[str], Any]) -> None:
    model, sites = family_model("llama3"), [Site(1, "z"), Site(2, "mlp_post")]
    assert output_norm(model, sites[0]) is None
    cached, scaled = (
        cache_activations(model, PROMPTS, sites),
        scaled_activations(model, PROMPTS, sites, batch_size=5),
    )
    for site in sites:
        torch.testing.assert_close(scaled[site].values, cached[site].values, rtol=1e-4, atol=1e-5)


def test_activations_of_other_prompts_are_noticed(family_model: Callable[[str], Any]) -> None:
    model = family_model("llama3")
    cached = cache_activations(model, PROMPTS, [SITE, *writing_sites(model, SITE)])
    difference = class_difference(cached, UNSAFE, SAFE)
    difference[Site(1, "mlp_post")] = class_difference(cached, UNSAFE[1:], SAFE)[
        Site(1, "mlp_post")
    ]
    with pytest.raises(ValueError, match="not all of the same prompts"):
        direct_attribution(model, SITE, DIRECTION, difference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2"])
def test_the_parts_add_up_in_16_bit_as_far_as_it_rounds(
    family_path: Callable[[str], Path], family_model: Callable[[str], Any], family: str, dtype: str
) -> None:
    model = load_model(family_path(family), dtype=dtype)
    attribution, exact = attributed(model), attributed(family_model(family))
    assert attribution.error < completeness_tolerance(model)
    scale = float(exact.neurons.abs().max())
    torch.testing.assert_close(attribution.neurons, exact.neurons, rtol=0, atol=0.1 * scale)


def test_half_precision_is_named_as_the_reason(family_path: Callable[[str], Path]) -> None:
    model = load_model(family_path("llama3"), dtype="bfloat16")
    with pytest.raises(CannotBeDone, match="runs in bfloat16"):
        attributed(model, tolerance=1e-5)


def test_a_mixture_of_experts_says_why_it_has_no_neurons(tmp_path: Path) -> None:
    model = load_model(tiny_mixtral(tmp_path))
    with pytest.raises(CannotBeDone, match="no single output matrix of its neurons"):
        write_matrix(model, Site(0, "mlp_post"))
    with pytest.raises(CannotBeDone, match="mixture of experts"):
        writing_sites(model, SITE)


def test_a_layer_norm_behind_a_sublayer_is_refused(tmp_path: Path) -> None:
    model = layer_norm_behind_mlp(tmp_path)
    with pytest.raises(CannotBeDone, match="is not an RMS norm; attribution through it is not lin"):
        write_matrix(model, Site(1, "mlp_post"))
    assert write_matrix(model, Site(1, "z")).isfinite().all()


# --- the parts are those of TransformerLens


def decomposed_by_transformer_lens(
    model: Any, site: Site, u: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Class difference of TransformerLens's components along u at a residual site, by kind."""
    inside_block = site.kind == "resid_mid"
    means = []
    for prompts in (UNSAFE, SAFE):
        pooled = []
        for row in encode(model, prompts):
            with torch.no_grad():
                _, cache = model.run_with_cache(torch.tensor([row.ids]))
            projected, labels = cache.get_full_resid_decomposition(
                layer=site.layer + (not inside_block),
                mlp_input=inside_block,
                expand_neurons=True,
                return_labels=True,
                project_output_onto=u.float(),
            )
            pooled.append(projected[:, 0, slice(*row.content)].double().mean(dim=1))
        means.append(torch.stack(pooled).mean(dim=0))
    difference = means[0] - means[1]
    kinds = {
        "heads": [i for i, label in enumerate(labels) if re.fullmatch(r"L\d+H\d+", label)],
        "neurons": [i for i, label in enumerate(labels) if re.fullmatch(r"L\d+N\d+", label)],
        "embedding": [i for i, label in enumerate(labels) if label in ("embed", "pos_embed")],
        "bias": [i for i, label in enumerate(labels) if label == "bias"],
    }
    assert sum(map(len, kinds.values())) == len(labels)
    return {kind: difference[places] for kind, places in kinds.items()}


@pytest.mark.parametrize(
    ("family", "site"),
    [
        (family, site)
        for family in FAMILIES
        for site in (Site(3, "resid_post"), Site(2, "resid_mid"))
        # behind an output norm TransformerLens 4.3 does not divide by its scale, and where
        # attention and MLP work side by side there is no residual stream between them
        if family not in POST_NORM and (family, site.kind) != ("pythia", "resid_mid")
    ],
)
def test_heads_neurons_and_embedding_are_the_components_of_transformer_lens(
    family_model: Callable[[str], Any], family: str, site: Site
) -> None:
    model = family_model(family)
    attribution = attributed(model, site)
    theirs = decomposed_by_transformer_lens(model, site, attribution.direction)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(attribution.heads.flatten(), theirs["heads"], **tolerance)
    torch.testing.assert_close(attribution.neurons.flatten(), theirs["neurons"], **tolerance)
    assert attribution.embedding == pytest.approx(float(theirs["embedding"].sum()), abs=1e-5)
    assert theirs["bias"].abs().max() < 1e-5  # what is added to every token differs in no class


# --- a part is what happens when it is taken away


def largest_shifts(
    model: Any, site: Site, prompts: list[Prompt], neurons: list[tuple[int, int]]
) -> torch.Tensor:
    """Shifts of <u, residual> at a site when each neuron is set to a value.

    Predicted and measured ones: [neuron, 2, prompt].
    """
    mlp = Site(site.layer, "mlp_post")
    u = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    plain = cache_activations(model, prompts, [site, mlp])
    rows = []
    for layer, neuron in neurons:
        value = float(plain[mlp].values[:, neuron].mean())
        with intervene(model, clamp_neurons([(layer, neuron)], [value])):
            moved = cache_activations(model, prompts, site)[site].values - plain[site].values
        predicted = write_weights(model, mlp, u)[neuron] * (value - plain[mlp].values[:, neuron])
        rows.append(torch.stack([predicted, moved @ u]))
    return torch.stack(rows).double()


def slope(shifts: torch.Tensor) -> float:
    predicted, measured = shifts[:, 0].flatten(), shifts[:, 1].flatten()
    return float((predicted * measured).sum() / (predicted * predicted).sum())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in POST_NORM])
def test_a_neuron_of_the_last_layer_shifts_the_residual_as_predicted(
    family_model: Callable[[str], Any], family: str
) -> None:
    shifts = largest_shifts(family_model(family), SITE, PROMPTS, [(3, n) for n in (0, 7, 31, 63)])
    assert slope(shifts) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(shifts[:, 0], shifts[:, 1], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_adds_its_row_of_the_output_matrix(
    family_model: Callable[[str], Any], family: str
) -> None:
    model = family_model(family)
    matrix = write_matrix(model, Site(1, "z"))
    assert matrix.shape == (model.cfg.n_heads * model.cfg.d_head, 32)
    direction = torch.eye(32)[5].double()
    torch.testing.assert_close(write_weights(model, Site(1, "z"), direction), matrix.double()[:, 5])


# --- gates of gated MLPs, and sources of heads


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PLAIN])
def test_gate_value_and_covariance_add_up_to_the_neuron(
    family_model: Callable[[str], Any], family: str
) -> None:
    model = family_model(family)
    split, neurons = (
        split_mlp_gate(model, UNSAFE, SAFE, DIRECTION, batch_size=5),
        attributed(model).neurons,
    )
    torch.testing.assert_close(
        split.gate + split.value + split.covariance, neurons, rtol=1e-4, atol=1e-6
    )
    assert (
        min(float(part.abs().max()) for part in (split.gate, split.value, split.covariance)) > 1e-3
    )


def test_gate_and_value_are_split_at_the_average_of_the_other(
    family_model: Callable[[str], Any],
) -> None:
    """By hand: means over each prompt's words of the two factors, then over the prompts."""
    model, layer = family_model("llama3"), 1
    names = [f"blocks.{layer}.mlp.{name}" for name in ("hook_pre", "hook_pre_linear")]
    means = []
    for prompts in (UNSAFE, SAFE):
        pooled = []
        for row in encode(model, prompts):
            with torch.no_grad():
                _, cache = model.run_with_cache(torch.tensor([row.ids]))
            words = slice(*row.content)
            gate, value = (cache[name][0, words].double() for name in names)
            pooled.append(torch.stack([torch.nn.functional.silu(gate), value]).mean(dim=1))
        means.append(torch.stack(pooled).mean(dim=0))
    (gate, value), (safe_gate, safe_value) = means
    written = write_weights(model, Site(layer, "mlp_post"), DIRECTION.double() / DIRECTION.norm())
    split = split_mlp_gate(model, UNSAFE, SAFE, DIRECTION, layers=[layer])
    close = {"rtol": 1e-3, "atol": 1e-6}
    by_gate = written * (gate - safe_gate) * (value + safe_value) / 2
    by_value = written * (value - safe_value) * (gate + safe_gate) / 2
    torch.testing.assert_close(split.gate[0], by_gate, **close)
    torch.testing.assert_close(split.value[0], by_value, **close)


@pytest.mark.parametrize("family", PLAIN)
def test_a_plain_mlp_has_no_gate(family_model: Callable[[str], Any], family: str) -> None:
    with pytest.raises(ValueError, match="no gate and value"):
        split_mlp_gate(family_model(family), UNSAFE, SAFE, DIRECTION)


@pytest.mark.parametrize("span", ["content", "last", "response"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sources_of_a_head_add_up_to_it(
    family_model: Callable[[str], Any], family: str, span: str
) -> None:
    model = family_model(family)
    sources = head_sources(model, UNSAFE, SAFE, DIRECTION, span=span, batch_size=5)
    assert tuple(sources) == ROLES
    torch.testing.assert_close(
        sum(sources.values()), attributed(model, span=span).heads, rtol=1e-4, atol=1e-6
    )
    ahead = {"content": ("after", "response"), "last": ("response",), "response": ()}[span]
    assert all(float(sources[role].abs().max()) == 0 for role in ahead)  # attention is causal
    assert float(sources["content"].abs().max()) > 0


def test_some_layers_alone_give_the_same_rows(family_model: Callable[[str], Any]) -> None:
    model = family_model("qwen3")
    one, every = (
        head_sources(model, UNSAFE, SAFE, DIRECTION, layers=[2]),
        head_sources(model, UNSAFE, SAFE, DIRECTION),
    )
    torch.testing.assert_close(one["content"][0], every["content"][2])
    assert split_mlp_gate(model, UNSAFE, SAFE, DIRECTION, layers=[1, 3]).gate.shape == (2, 64)


# --- errors


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out", "mlp_post", "z"])
def test_a_site_nothing_adds_up_at_is_refused(
    family_model: Callable[[str], Any], kind: str
) -> None:
    with pytest.raises(
        ValueError, match=r"no neuron writes there directly; measure it .* L2\.resid_post"
    ):
        writing_sites(family_model("llama3"), Site(2, kind))


def test_a_parallel_block_has_no_middle(family_model: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="does not compute"):
        writing_sites(family_model("pythia"), Site(2, "resid_mid"))


def test_what_is_missing_is_named(family_model: Callable[[str], Any]) -> None:
    model = family_model("llama3")
    cached = cache_activations(model, PROMPTS, [SITE, *writing_sites(model, SITE)])
    short = {site: values for site, values in cached.items() if site != Site(1, "z")}
    with pytest.raises(ValueError, match=r"no activations at L1\.z"):
        writing_activations(model, short, SITE)
    with pytest.raises(ValueError, match=r"no activations at L1\.z"):
        direct_attribution(model, SITE, DIRECTION, class_difference(short, UNSAFE, SAFE))
    with pytest.raises(ValueError, match="direction is zero"):
        direct_attribution(model, SITE, torch.zeros(32), class_difference(cached, UNSAFE, SAFE))
    with pytest.raises(ValueError, match="both classes need prompts"):
        split_mlp_gate(model, UNSAFE, [], DIRECTION)


def test_an_attribution_prints_its_parts(family_model: Callable[[str], Any]) -> None:
    attribution = replace(attributed(family_model("llama3")), total=1.0)
    assert repr(attribution).startswith("Attribution(L3.resid_post, total=1: embedding ")


# --- the real model


@pytest.fixture(scope="module")
def real(real_model: Any) -> tuple[Any, list[Prompt], list[Prompt]]:
    """The embedded model, with a few unsafe prompts of one category and their twins."""
    prompts = load_prompts()
    unsafe = select_prompts(prompts, category="privacy_violation", label="unsafe", limit=8)
    pairs = {prompt.pair_id for prompt in unsafe}
    return real_model, unsafe, [p for p in prompts if p.pair_id in pairs and p.label == "safe"]


@pytest.mark.slow
def test_the_real_model_adds_up(real: tuple[Any, list[Prompt], list[Prompt]]) -> None:
    model, unsafe, safe = real
    site = Site(28, "resid_post")
    cached = cache_activations(model, unsafe + safe, [site, *writing_sites(model, site)])
    difference = class_difference(cached, unsafe, safe)
    attribution = direct_attribution(model, site, difference[site], difference)
    assert attribution.error < 1e-5
    assert attribution.total == pytest.approx(float(difference[site].norm()))


@pytest.mark.slow
def test_ablating_real_neurons_shifts_the_residual_as_predicted(
    real: tuple[Any, list[Prompt], list[Prompt]],
) -> None:
    model, unsafe, _ = real
    shifts = largest_shifts(
        model, Site(20, "resid_post"), unsafe, [(20, n) for n in range(0, 1536, 128)]
    )
    assert slope(shifts) == pytest.approx(1, abs=1e-3)
