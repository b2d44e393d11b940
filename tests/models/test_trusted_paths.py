"""A faster way is taken only where it was shown to compute what the slow one computes."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.tiny_models import FAMILIES

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models import _growing_cache, _idle_hooks, forward, shared_layers
from workbench.models.activations import cache_activations
from workbench.models.load import hooked, load_model
from workbench.models.packing import is_packed, pack_linears
from workbench.models.sites import Site
from workbench.models.trusted_paths import ROUTES, trusts, untrusted_paths
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import Intervention

PROMPT = [Prompt("p", "explain a garden for beginners", None, "fraud", "unsafe", "t")]


@pytest.mark.parametrize("family", FAMILIES)
def test_common_families_take_every_fast_way(family_model, family: str) -> None:
    assert untrusted_paths(family_model(family)) == {}


@pytest.mark.slow
def test_the_embedded_model_takes_every_fast_way(real_model) -> None:
    assert untrusted_paths(real_model) == {}


def test_half_precision_is_no_reason_to_be_slow(family_path) -> None:
    for dtype in ("bfloat16", "float16"):
        model = load_model(family_path("llama3"), device="cpu", dtype=dtype)
        assert untrusted_paths(model) == {}


def wrong_attention(*args: Any, **keywords: Any) -> Any:
    """Fused attention that lets every token see the ones behind it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module, query, key, value, _ = args
    nothing_hidden = torch.zeros(1, 1, query.shape[2], key.shape[2], dtype=query.dtype)
    return sdpa_attention_forward(module, query, key, value, nothing_hidden, **keywords)


def broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one of the fast ways wrong, in the least that can be wrong."""
    if name == "fused":
        from transformers import AttentionInterface

        _idle_hooks._fused_attention()
        AttentionInterface.register("wrong_sdpa", wrong_attention)
        from transformers import AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionMaskInterface.register("wrong_sdpa", sdpa_mask)
        monkeypatch.setattr(_idle_hooks, "_fused_attention", lambda: "wrong_sdpa")
    elif name == "growing":
        right = _growing_cache._with_spare_columns
        monkeypatch.setattr(_growing_cache, "_with_spare_columns", lambda *args: right(*args) * 1.1)
    elif name == "prefix":
        right_rows = forward.prefix_cache

        def half(model: Any, ids: Any, **keywords: Any) -> Any:
            return right_rows(model, [*ids[:-1], ids[0]], **keywords)

        from workbench.models import _route_checks

        monkeypatch.setattr(_route_checks, "prefix_cache", half)
    elif name == "shared_layers":
        monkeypatch.setattr(
            shared_layers._Known, "forward", lambda self, *_, **__: self.output.flip(0)
        )
    elif name == "late_head":
        right_head = forward.head_logits
        monkeypatch.setattr(forward, "head_logits", lambda *args: right_head(*args).roll(1, -1))


@pytest.mark.parametrize("route", ["fused", "growing", "prefix", "shared_layers", "late_head"])
def test_a_way_that_gives_other_numbers_is_not_taken(
    family_path, route: str, monkeypatch, caplog
) -> None:
    model = load_model(family_path("llama3"), device="cpu")
    broken(route, monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = untrusted_paths(model)
        untrusted_paths(model)
    depending = {"prefix": {"padding_behind", "shared_layers"}, "fused": {"direct"}}
    assert set(found) == {route} | depending.get(route, set())
    assert all("off by" in reason for reason in found.values())
    assert not trusts(model, route)
    assert len(caplog.records) == 1
    assert route in caplog.text


def test_a_way_that_fails_is_not_taken_and_its_error_is_the_reason(
    family_path, monkeypatch
) -> None:
    model = load_model(family_path("llama3"), device="cpu")

    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("no such thing")

    monkeypatch.setattr(_growing_cache._GrowingLayer, "update", fail)
    assert untrusted_paths(model) == {"growing": "IndexError: no such thing"}


def test_wrong_packed_layers_are_unpacked(family_path) -> None:
    model = load_model(family_path("llama3"), device="cpu")
    if not pack_linears(model.original_model, "on").packed:
        pytest.skip("this torch packs nothing")
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and "forward" in layer.__dict__:
            right = layer.__dict__["forward"]
            wrong = functools.wraps(right)(lambda x, right=right: right(x) * 1.05)
            layer.__dict__["forward"] = wrong
    assert set(untrusted_paths(model)) == {"packed"}
    assert not is_packed(model)


def test_hooks_of_the_caller_neither_fire_in_the_check_nor_change_it(family_path) -> None:
    model, fired = load_model(family_path("llama3"), device="cpu"), []

    def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        fired.append(1)
        return activation * 0

    handle = model.original_model.register_forward_pre_hook(lambda *_: fired.append(2))
    tokens = torch.tensor([[9, 40, 41]])
    before = torch.get_rng_state()
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", hook)]), torch.no_grad():
        forward.forward(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
        assert sorted(fired) == [1, 2]
        assert untrusted_paths(model) == {}
        model(tokens)
    handle.remove()
    assert sorted(fired) == [1, 1, 2, 2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_is_made_once_and_is_short(family_path, monkeypatch) -> None:
    model, columns = load_model(family_path("llama3"), device="cpu"), []
    handle = model.original_model.register_forward_pre_hook(
        lambda _m, a, k: columns.append((a[0] if a else k["input_ids"]).numel()), with_kwargs=True
    )
    from workbench.models import _route_checks

    monkeypatch.setattr(_route_checks, "_hooks_out_of_action", lambda _: torch.no_grad())
    untrusted_paths(model)
    assert sum(columns) <= 100
    columns.clear()
    untrusted_paths(model)
    handle.remove()
    assert columns == []


def test_a_model_that_cannot_be_run_is_one_clear_error() -> None:
    hf_model, tokenizer = tiny_architecture("LlamaForCausalLM")
    model = hooked(hf_model, tokenizer, "broken")
    hf_model.model.rotary_emb = None
    with pytest.raises(ValueError, match=r"'broken' cannot be run .*; choose a causal language"):
        cache_activations(model, PROMPT, Site(0, "resid_post"))


def test_numbers_that_are_not_finite_trust_nothing(family_path) -> None:
    model = load_model(family_path("llama3"), device="cpu")
    with torch.no_grad():
        model.original_model.lm_head.weight.fill_(float("nan"))
    assert set(untrusted_paths(model)) == set(ROUTES) - {"components"}


@pytest.mark.parametrize("name", ["FalconForCausalLM", "GlmMoeDsaForCausalLM"])
def test_attention_that_takes_no_boolean_mask_is_not_fused(name: str) -> None:
    hf_model, tokenizer = tiny_architecture(name)
    model = hooked(hf_model, tokenizer, name)
    assert not trusts(model, "fused")
    assert trusts(model, "bypass")


def test_sparse_attention_beyond_the_length_of_the_check_is_not_fused() -> None:
    hf_model, tokenizer = tiny_architecture("GlmMoeDsaForCausalLM")
    reason = untrusted_paths(hooked(hf_model, tokenizer, "sparse"))["fused"]
    assert reason == "attention is sparse beyond 16 tokens, the check is shorter"


def test_a_model_whose_tokens_see_what_comes_after_them_is_refused() -> None:
    hf_model, tokenizer = tiny_architecture("BertLMHeadModel")
    with pytest.raises(ValueError, match=r"'bert' is not causal: .* from left to right"):
        cache_activations(hooked(hf_model, tokenizer, "bert"), PROMPT, Site(0, "resid_post"))


def test_a_site_without_a_vector_per_token_is_refused() -> None:
    hf_model, tokenizer = tiny_architecture("OPTForCausalLM")
    model = hooked(hf_model, tokenizer, "opt")
    with pytest.raises(ValueError, match=r"mlp\.hook_post holds no vector per prompt and token"):
        cache_activations(model, PROMPT, Site(0, "mlp_post"))
    steering = [Intervention(Site(0, "mlp_post"), lambda activation: activation + 1)]
    with pytest.raises(ValueError, match=r"mlp\.hook_post holds no vector per prompt and token"):
        generate(model, PROMPT, steering, Decoding(max_new_tokens=1))


def test_components_that_compute_something_else_are_not_hooked_inside(
    family_path, monkeypatch
) -> None:
    model = load_model(family_path("llama3"), device="cpu")
    right = type(model.blocks[1].mlp).forward
    monkeypatch.setattr(
        type(model.blocks[1].mlp), "forward", lambda *args, **keys: right(*args, **keys) * 1.1
    )
    assert set(untrusted_paths(model)) == {"components"}
    sites = [Site(1, kind) for kind in ("resid_post", "mlp_post", "z")]
    assert cache_activations(model, PROMPT, sites)
    name = "blocks.1.attn.hook_pattern"
    tokens = torch.tensor([[9, 40, 41]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with (
        model.hooks(fwd_hooks=[(name, lambda activation, hook: None)]),
        pytest.raises(ValueError, match=r"cannot be hooked inside .*; read or edit at resid_pre"),
    ):
        forward.forward(model, tokens, mask)
    with pytest.raises(ValueError, match="cannot take the slow ways"), forward.plain(model):
        forward.forward(model, tokens, mask)


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_the_head_is_given_its_columns_in_one_piece(family_model, family: str) -> None:
    model, seen = family_model(family), []
    handle = model.original_model.lm_head.original_component.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].is_contiguous())
    )
    tokens = torch.tensor([[9, 40, 41], [9, 33, 34]])
    try:
        with torch.no_grad():
            forward.last_logits(model, tokens, torch.ones_like(tokens, dtype=torch.bool), 2)
    finally:
        handle.remove()
    assert seen == [True]
