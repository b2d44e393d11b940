"""Llama-like blocks are computed directly, with the numbers and the hooks of before."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.gates import gate, through
from helpers.interventions import padded, steering_vector
from helpers.tiny_models import FAMILIES, sentences, tiny_model
from torch import nn

from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models import _direct_blocks
from workbench.models._direct_blocks import DirectBlock
from workbench.models._idle_hooks import block_slots, has_direct_blocks
from workbench.models.activations import cache_activations
from workbench.models.forward import fast, forward, last_logits, plain, prefix_cache, rows_of_cache
from workbench.models.load import hooked, load_model
from workbench.models.packing import pack_linears
from workbench.models.sites import KINDS, Site
from workbench.models.trusted_paths import ROUTES, assumed, trusts, untrusted_paths
from workbench.neurons.attribution import class_difference, direct_attribution, writing_sites
from workbench.neurons.splits import writing_activations
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import add_vector

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LLAMA_LIKE = ("llama2", "llama3", "qwen2", "qwen3", "mistral")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
QUESTIONS = [
    Prompt(str(i), text, None, "fraud", "unsafe", "t")
    for i, text in enumerate([*sentences(3), "explain " * 9])
]


def standing_directly(model: Any) -> list[int]:
    """Layers whose blocks are computed directly with the hooks that are set now."""
    with fast(model):
        blocks = [slot.siblings[slot.name] for slot in block_slots(model)]
    return [layer for layer, block in enumerate(blocks) if isinstance(block, DirectBlock)]


@contextmanager
def without_direct_blocks() -> Iterator[None]:
    with assumed(frozenset(ROUTES) - {"direct"}):
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers whose direct block has computed something, one entry for each time."""
    layers: list[int] = []
    right = DirectBlock._heads

    def heads(self: Any, *args: Any) -> Any:
        layers.append(self.layer)
        return right(self, *args)

    monkeypatch.setattr(DirectBlock, "_heads", heads)
    return layers


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_like_families_are_computed_directly_and_no_others(family_model, family: str) -> None:
    model = family_model(family)
    assert standing_directly(model) == ([0, 1, 2, 3] if family in LLAMA_LIKE else [])
    with plain(model):
        assert standing_directly(model) == []
    assert standing_directly(model) == standing_directly(model)


def test_blocks_are_computed_directly_after_run_with_cache_too(tmp_path: Path) -> None:
    model = load_model(tiny_model("llama3", tmp_path))
    model.run_with_cache("some words")
    assert standing_directly(model) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", LLAMA_LIKE)
@torch.no_grad()
def test_padded_rows_behind_a_prefix_and_new_tokens_get_the_logits_of_the_slow_way(
    family_model, family: str, ran: list[int]
) -> None:
    model = family_model(family)
    assert standing_directly(model)  # the check of the routes has run
    ran.clear()
    tokens, mask = padded([4, 9, 6], "left")
    mask = torch.cat([torch.ones(3, 5, dtype=torch.bool), mask.bool()], dim=1)
    steps = torch.randint(20, 200, (3, 6), generator=torch.Generator().manual_seed(3))

    def logits() -> list[torch.Tensor]:
        prefix = prefix_cache(model, [9, 40, 41, 60, 7])
        cache, seen = rows_of_cache(prefix, torch.zeros(3, dtype=torch.long)), mask
        one, cache = last_logits(model, tokens, seen, 4, cache=cache, use_cache=True)
        found = [one]
        for n in range(steps.shape[1]):
            seen = torch.cat([seen, seen.new_ones(3, 1)], dim=1)
            one, cache = forward(model, steps[:, n : n + 1], seen, cache=cache, use_cache=True)
            found.append(one)
        return found

    found = logits()
    assert len(ran) == 4 * 8
    with plain(model):
        expected = logits()
    assert len(ran) == 4 * 8
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", LLAMA_LIKE)
@torch.no_grad()
def test_padding_is_left_out_of_the_products_and_nothing_else_changes(
    family_model, family: str, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(family)
    assert standing_directly(model)
    tokens, mask = padded([2, 9, 6, 3], side)
    multiplied: list[int] = []

    def counted(layer: Any, x: torch.Tensor) -> torch.Tensor:
        multiplied.append(x.numel() // x.shape[-1])
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    found, _ = last_logits(model, tokens, mask.bool(), 9)
    of_blocks = multiplied[: 7 * model.cfg.n_layers]
    assert set(of_blocks) == {2 + 9 + 6 + 3}
    with plain(model):
        expected, _ = last_logits(model, tokens, mask.bool(), 9)
    assert max(multiplied) == 4 * 9
    is_real = mask.bool()
    assert (found - expected)[is_real].norm() < 1e-5 * expected[is_real].norm()
    assert found.isfinite().all()


@torch.no_grad()
def test_an_edit_that_divides_by_the_norm_leaves_real_tokens_real(tiny) -> None:
    tokens, mask = padded([2, 9, 6], "right")
    name = "blocks.1.hook_out"

    def to_unit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation / activation.norm(dim=-1, keepdim=True)

    def logits() -> torch.Tensor:
        with tiny.hooks(fwd_hooks=[(name, to_unit)]):
            return last_logits(tiny, tokens, mask.bool(), 9)[0]

    found = logits()
    with plain(tiny):
        expected = logits()
    real = mask.bool()
    assert (found - expected)[real].norm() < 1e-5 * expected[real].norm()


def in_place(activation: torch.Tensor, hook: Any) -> None:
    activation.mul_(1.5)


def one_for_all_rows(activation: torch.Tensor, hook: Any) -> torch.Tensor:
    return torch.linspace(-1, 1, activation[0, 0].numel()).view(1, 1, *activation.shape[2:])


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        *((kind, in_place) for kind in KINDS),
        *(
            (kind, one_for_all_rows)
            for kind in ("attn_out", "mlp_out", "mlp_post", "z", "resid_mid")
        ),
    ],
)
@torch.no_grad()
def test_what_a_hook_does_with_a_tensor_is_the_same_where_padding_is_left_out(
    tiny, kind: str, edit: Any
) -> None:
    tokens, mask = padded([9, 2, 3, 9], "left")

    def logits() -> torch.Tensor:
        with tiny.hooks(fwd_hooks=[(Site(1, kind).hook_name, edit)]):
            return last_logits(tiny, tokens, mask.bool(), 9)[0][mask.bool()]

    found = logits()
    with plain(tiny):
        expected = logits()
    assert (found - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_a_mask_that_stands_for_all_rows_is_no_list_of_places(tiny) -> None:
    tokens, mask = padded([3, 3, 3], "left", width=9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    keywords = {
        "attention_mask": (causal & mask[0].bool())[None, None],
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    with fast(tiny):
        found = tiny.original_model(tokens, **keywords).logits[:, -3:]
    expected = tiny.original_model(tokens, **keywords).logits[:, -3:]
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_site_is_read_and_steered_as_before(
    family_model, family: str, kind: str, ran: list[int]
) -> None:
    model = family_model(family)
    assert standing_directly(model)  # the check of the routes has run
    ran.clear()
    tokens, mask = padded([7, 5], "left")
    order: list[str] = []

    def run() -> tuple[torch.Tensor, ...]:
        seen: dict[str, torch.Tensor] = {}

        def reader(name: str) -> Any:
            def read(activation: torch.Tensor, hook: Any) -> None:
                order.append(name)
                seen[name] = activation.clone()

            return read

        def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            order.append("edited")
            return activation + torch.linspace(-1, 1, activation.shape[-1])

        sites = Site(1, kind), Site(2, kind), Site(3, "resid_post")
        names = [site.hook_name for site in sites]
        hooks = [(names[0], edit), *((name, reader(name)) for name in names)]
        with model.hooks(fwd_hooks=hooks):
            logits, _ = last_logits(model, tokens, mask.bool(), 7)
        return logits[mask.bool()], *(seen[name].flatten(2)[mask.bool()] for name in names)

    found, order_found = run(), list(order)
    assert ran == [0, 1, 2, 3]
    order.clear()
    with without_direct_blocks():
        expected = run()
    assert ran == [0, 1, 2, 3]
    assert order == order_found
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("name", ["attn.hook_q", "mlp.hook_pre", "ln2.hook_scale", "ln1.hook_out"])
@torch.no_grad()
def test_a_hook_that_is_no_site_fires_and_its_block_alone_falls_back(
    tiny, name: str, ran: list[int]
) -> None:
    seen: list[torch.Tensor] = []
    tokens, mask = padded([7, 7], "left")

    def hook(activation: torch.Tensor, hook: Any) -> None:
        seen.append(activation.clone())

    with tiny.hooks(fwd_hooks=[(f"blocks.1.{name}", hook)]):
        forward(tiny, tokens, mask.bool())
        assert ran == [0, 2, 3]
        with plain(tiny):
            forward(tiny, tokens, mask.bool())
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def torch_hook_on_a_component(model: Any) -> Any:
    return model.blocks[1].mlp.register_forward_hook(lambda *_: None).remove


def torch_hook_on_a_module(model: Any) -> Any:
    norm = model.blocks[1].ln1.original_component
    return norm.register_forward_pre_hook(lambda *_: None).remove


def training(model: Any) -> Any:
    attention = model.blocks[1].attn.original_component
    attention.training = True
    return lambda: setattr(attention, "training", False)


def another_forward(model: Any) -> Any:
    layer = model.blocks[1].attn.q.original_component
    right = layer.forward
    layer.forward = lambda x: right(x)
    return lambda: layer.__dict__.pop("forward")


def an_adapter(model: Any) -> Any:
    class Adapter(nn.Linear):
        pass

    layer = model.blocks[1].attn.q.original_component
    layer.__class__ = Adapter
    return lambda: setattr(layer, "__class__", nn.Linear)


@pytest.mark.parametrize(
    "change",
    [torch_hook_on_a_component, torch_hook_on_a_module, training, another_forward, an_adapter],
)
def test_a_block_in_which_something_else_would_run_falls_back(tiny, change: Any) -> None:
    undo = change(tiny)
    try:
        assert standing_directly(tiny) == [0, 2, 3]
    finally:
        undo()
    assert standing_directly(tiny) == [0, 1, 2, 3]


def test_packed_layers_stay_packed(family_path, ran: list[int]) -> None:
    model = load_model(family_path("llama3"), device="cpu")
    if not pack_linears(model.original_model, "on").packed:
        pytest.skip("this torch packs nothing")
    calls: list[int] = []
    assert untrusted_paths(model) == {}
    layer = model.blocks[1].mlp.out.original_component
    packed = layer.__dict__["forward"]

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return packed(x)

    counted.__dict__.update(packed.__dict__)
    layer.__dict__["forward"] = counted
    ran.clear()
    with torch.no_grad():
        forward(model, torch.tensor([[9, 40]]), torch.ones(1, 2, dtype=torch.bool))
    assert ran == [0, 1, 2, 3]
    assert calls == [1]


def test_gradients_flow_through_the_block_itself(tiny, ran: list[int]) -> None:
    tokens, mask = padded([7, 7], "left")

    def slope() -> torch.Tensor:
        shift = torch.zeros(tiny.cfg.d_model, requires_grad=True)
        with tiny.hooks(
            fwd_hooks=[("blocks.1.hook_mlp_out", lambda activation, hook: activation + shift)]
        ):
            logits, _ = forward(tiny, tokens, mask.bool())
        return torch.autograd.grad(logits[:, 3].sum(), shift)[0]

    found = slope()
    assert ran == []
    with plain(tiny):
        torch.testing.assert_close(found, slope(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared layers", "gates"])
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_answers_of_several_conditions_are_those_without_direct_blocks(
    family_model, family: str, kind: str, ran: list[int]
) -> None:
    model = family_model(family)
    vector = steering_vector(model, Site(2, "resid_post"), scale=9.0)
    conditions = {"plain": [], "steered": [add_vector(vector, rho=0.3)]}
    if kind == "gates":  # which read below all steering, so that no layers are shared
        conditions["gated"] = through(model, gate(model))
        conditions["stepwise"] = through(model, gate(model, form="stepwise"))

    def tokens() -> dict[str, list[tuple[int, ...]]]:
        answers = sweep(model, QUESTIONS, conditions, Decoding(max_new_tokens=12))
        return {
            name: [one.tokens for one in answers if one.condition == name] for name in conditions
        }

    found, n_ran = tokens(), len(ran)
    assert n_ran >= 4 * 12
    with without_direct_blocks():
        assert tokens() == found
    assert len(ran) == n_ran
    assert len({str(answers) for answers in found.values()}) >= len(conditions) - 1


def test_attribution_is_that_of_before(tiny) -> None:
    site = Site(2, "resid_post")
    prompts = [
        Prompt(str(i), text, None, "fraud", ("safe", "unsafe")[i % 2], "t")
        for i, text in enumerate(sentences(6))
    ]

    def error_and_shares() -> tuple[float, Any]:
        cached = cache_activations(tiny, prompts, [site, *writing_sites(tiny, site)])
        written = writing_activations(tiny, cached, site)
        difference = class_difference(written, prompts[1::2], prompts[::2])
        found = direct_attribution(tiny, site, difference[site], difference)
        return found.error, difference[site]

    found, difference = error_and_shares()
    with without_direct_blocks():
        _, expected = error_and_shares()
    assert found < 1e-4
    torch.testing.assert_close(difference, expected, **CLOSE)


def with_residual_multiplier() -> Any:
    hf_model, tokenizer = tiny_architecture("GraniteForCausalLM")
    for layer in hf_model.model.layers:
        layer.residual_multiplier = 0.5
    return hooked(hf_model, tokenizer, "granite")


def with_norms_around_one() -> Any:
    hf_model, tokenizer = tiny_architecture("GemmaForCausalLM")
    with torch.no_grad():
        for layer in hf_model.model.layers:
            layer.input_layernorm.weight.fill_(0.3)
    return hooked(hf_model, tokenizer, "gemma")


def with_queries_scaled_far_away() -> Any:
    hf_model, tokenizer = tiny_architecture("Ministral3ForCausalLM")
    hf_model.config.rope_parameters |= {
        "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 1.0,
    }
    return hooked(hf_model, tokenizer, "ministral")


@pytest.mark.parametrize(
    "made", [with_residual_multiplier, with_norms_around_one, with_queries_scaled_far_away]
)
def test_blocks_that_only_look_alike_are_refused_by_the_check(made: Any) -> None:
    model = made()
    assert has_direct_blocks(model)
    assert set(untrusted_paths(model)) == {"direct"}
    assert untrusted_paths(model)["direct"].startswith("off by")
    assert standing_directly(model) == []


def test_a_direct_block_that_is_wrong_is_refused(family_path, monkeypatch) -> None:
    model = load_model(family_path("llama3"), device="cpu")
    right = _direct_blocks.Pass.turned
    monkeypatch.setattr(_direct_blocks.Pass, "turned", lambda *args: right(*args) * 1.05)
    assert set(untrusted_paths(model)) == {"direct"}
    assert trusts(model, "fused")


def large_scores(family_path: Any, dtype: str) -> Any:
    """A model in 16 bit whose scores are so large that rounding them changes what is attended."""
    model = load_model(family_path("llama3"), device="cpu", dtype=dtype)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.original_component.weight.mul_(30)
            block.attn.k.original_component.weight.mul_(30)
    return model


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_large_scores_in_16_bit_are_no_reason_to_be_slow(family_path, dtype: str) -> None:
    assert untrusted_paths(large_scores(family_path, dtype)) == {}


def test_attention_that_is_wrong_is_refused_in_16_bit(family_path, monkeypatch) -> None:
    model = load_model(family_path("llama3"), device="cpu", dtype="bfloat16")
    right = _direct_blocks._attention

    def sees_what_is_behind(query: Any, key: Any, value: Any, mask: Any, scaling: float) -> Any:
        return right(query, key, value, torch.zeros_like(mask), scaling)

    monkeypatch.setattr(_direct_blocks, "_attention", sees_what_is_behind)
    assert set(untrusted_paths(model)) == {"direct"}
    assert untrusted_paths(model)["direct"].startswith("off by")
