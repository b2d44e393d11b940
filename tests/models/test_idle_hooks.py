"""TransformerLens's components step aside where nobody listens.

Every hook fires as before, and what is computed stays the same.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES

from workbench.models._growing_cache import grow_in_place
from workbench.models._idle_hooks import idle_hooks_bypassed
from workbench.models.forward import (
    SPARE_COLUMNS,
    forward,
    last_logits,
    plain,
    prefix_cache,
    rows_of_cache,
)
from workbench.models.load import load_model

TOKENS = torch.tensor([[9, 40, 41, 60, 7, 88, 12], [9, 33, 33, 34, 50, 61, 72]])
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
OFF_BY_DEFAULT = ("mlp_in", "attn_in", "q_input", "k_input", "v_input", "hook_result")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def standing(model: Any) -> dict[str, int]:
    return {path: id(module) for path, module in model.original_model.named_modules()}


def fired(model: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """What each hook point sees in one pass, for those that fire."""
    seen: dict[str, torch.Tensor] = {}

    def reader(name: str) -> Any:
        def hook(activation: Any, hook: Any) -> None:
            if isinstance(activation, torch.Tensor):
                seen[name] = activation.detach().clone()

        return hook

    with model.hooks(fwd_hooks=[(name, reader(name)) for name in names]):
        forward(model, TOKENS, MASK)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_hook_point_fires_with_the_same_values_when_it_is_the_only_one_in_use(
    family_model, family: str
) -> None:
    model = family_model(family)
    names = [
        name
        for name in model.hook_dict
        if not name.startswith("blocks.") or name.startswith("blocks.1.")
    ]
    names = [name for name in names if not name.endswith(OFF_BY_DEFAULT)]
    with plain(model):
        expected = fired(model, names)
    assert len(expected) > 15
    for name, value in expected.items():
        alone = fired(model, [name])
        assert name in alone, name
        torch.testing.assert_close(alone[name], value, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_logits_stay_and_the_model_is_put_together_again(family_model, family: str) -> None:
    model = family_model(family)
    before, attention = standing(model), model.original_model.config._attn_implementation
    with plain(model):
        expected, _ = last_logits(model, TOKENS, MASK, 7)
    with idle_hooks_bypassed(model):
        assert standing(model) != before
        in_blocks = [
            m
            for path, m in model.original_model.named_modules()
            if re.search(r"\.(layers|h)\.", path)
        ]
        assert in_blocks
        assert not any(hasattr(m, "hook_in") for m in in_blocks)
        got, _ = last_logits(model, TOKENS, MASK, 7)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert standing(model) == before
    assert model.original_model.config._attn_implementation == attention


@torch.no_grad()
def test_the_model_is_put_together_again_after_an_error(tiny) -> None:
    before = standing(tiny)
    with pytest.raises(RuntimeError, match="inside"), idle_hooks_bypassed(tiny):
        raise RuntimeError("inside")
    assert standing(tiny) == before


@torch.no_grad()
def test_attention_is_fused_unless_a_hook_reads_its_pattern(tiny) -> None:
    used = []

    def look(activation: Any, hook: Any) -> None:
        used.append(tiny.original_model.config._attn_implementation)

    for name in (
        "blocks.1.hook_attn_out",
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_attn_scores",
    ):
        with tiny.hooks(fwd_hooks=[(name, look)]):
            forward(tiny, TOKENS, MASK)
    assert used == ["workbench_sdpa", "eager", "eager"]


@torch.no_grad()
def test_soft_capped_scores_are_never_fused(family_model) -> None:
    model = family_model("gemma2")
    with idle_hooks_bypassed(model):
        assert model.original_model.config._attn_implementation == "eager"


@torch.no_grad()
def test_a_torch_hook_on_a_component_still_fires(tiny) -> None:
    calls = []
    handle = tiny.blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    try:
        forward(tiny, TOKENS, MASK)
    finally:
        handle.remove()
    assert calls == [1]


@torch.no_grad()
def test_optional_hook_points_of_transformerlens_fire_once_switched_on(family_path) -> None:
    model = load_model(family_path("llama3"), device="cpu")
    model.set_use_hook_mlp_in(True)
    assert list(fired(model, ["blocks.1.hook_mlp_in"])) == ["blocks.1.hook_mlp_in"]


@torch.no_grad()
def test_processed_weights_run_as_they_are(family_path) -> None:
    model = load_model(family_path("llama3"), device="cpu")
    model.enable_compatibility_mode()
    before = standing(model)
    with idle_hooks_bypassed(model):
        assert standing(model) == before


def test_gradients_flow_to_a_hook(tiny) -> None:
    def slope() -> torch.Tensor:
        shift = torch.zeros(tiny.cfg.d_model, requires_grad=True)
        with tiny.hooks(
            fwd_hooks=[("blocks.1.hook_resid_post", lambda activation, hook: activation + shift)]
        ):
            logits, _ = forward(tiny, TOKENS, MASK)
        return torch.autograd.grad(logits[:, 3].sum(), shift)[0]

    got = slope()
    with plain(tiny):
        torch.testing.assert_close(got, slope(), **CLOSE)


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mistral"])
@torch.no_grad()
def test_a_cache_that_grows_in_place_holds_what_transformers_would(
    family_model, family: str
) -> None:
    model = family_model(family)
    steps = torch.randint(
        20, 200, (2, SPARE_COLUMNS + 10), generator=torch.Generator().manual_seed(0)
    )
    grown, copied = (
        rows_of_cache(prefix_cache(model, TOKENS[0].tolist()), torch.tensor([0, 0]))
        for _ in range(2)
    )
    grow_in_place(grown)
    mask = torch.ones(2, 7, dtype=torch.bool)
    for n in range(steps.shape[1]):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        a, grown = forward(model, steps[:, n : n + 1], mask, cache=grown, use_cache=True)
        b, copied = forward(model, steps[:, n : n + 1], mask, cache=copied)
        if n == 5:  # rows change places
            for cache in (grown, copied):
                cache.batch_select_indices(torch.tensor([1, 0]))
        assert torch.equal(a, b)
    for one, other in zip(grown.layers, copied.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@torch.no_grad()
def test_a_copy_of_a_growing_cache_is_a_cache_of_its_own(tiny) -> None:
    cache = prefix_cache(tiny, TOKENS[0].tolist())
    one, two = torch.tensor([[5]]), torch.tensor([[77]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    _, cache = forward(tiny, one, mask, cache=cache, use_cache=True)
    kept = [layer.keys.clone() for layer in cache.layers]
    other = rows_of_cache(cache, torch.tensor([0]))
    longer = torch.ones(1, 9, dtype=torch.bool)
    forward(tiny, two, longer, cache=other, use_cache=True)
    forward(tiny, one, longer, cache=cache, use_cache=True)
    for layer, before in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys[..., :8, :], before)
