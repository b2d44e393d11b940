"""TransformerLens's ActivationCache comes in as pooled activations, and goes out again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from workbench.models.activation_caches import activations_from_cache, as_activation_cache
from workbench.models.activations import cache_activations
from workbench.models.batches import pad
from workbench.models.sites import Site, sites_of_kind
from workbench.models.tokens import encode, pad_id
from workbench.prompts.prompt import Prompt

PROMPTS = [
    Prompt("a", "How do I bake a cake?", category="fraud", label="unsafe"),
    Prompt("b", "Where is the dog?", category="fraud", label="safe"),
]
SITES = [Site(0, "resid_pre"), Site(1, "resid_post"), Site(1, "mlp_post"), Site(0, "z")]


def run(model, side="right"):
    """Run the prompts as TransformerLens's user does."""
    batch = pad(encode(model, PROMPTS), pad_id=pad_id(model), side=side, device="cpu")
    names = [site.hook_name for site in SITES]
    _, cache = model.run_with_cache(
        batch.tokens, attention_mask=batch.mask, names_filter=lambda name: name in names
    )
    return batch.tokens, cache


@pytest.mark.parametrize("span", ["content", "last", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_pools_to_what_is_cached_here(tiny, span, side) -> None:
    tokens, cache = run(tiny, side)
    pooled = activations_from_cache(cache, tiny, PROMPTS, span=span, tokens=tokens)
    direct = cache_activations(tiny, PROMPTS, SITES, span=span)
    assert set(SITES) <= set(pooled)
    for site in SITES:
        torch.testing.assert_close(pooled[site].values, direct[site].values, rtol=1e-4, atol=1e-5)
        for name in ("site", "prompts", "span", "model", "asked_as"):
            assert getattr(pooled[site], name) == getattr(direct[site], name)


def test_a_mask_says_which_tokens_are_pooled(tiny) -> None:
    tokens, cache = run(tiny)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[0, 2] = mask[1, 1] = mask[1, 3] = True
    site = SITES[1]
    pooled = activations_from_cache(cache, tiny, PROMPTS, span=mask, sites=site)
    held = cache[site.hook_name]
    by_hand = torch.stack([held[0, 2], (held[1, 1] + held[1, 3]) / 2])
    assert list(pooled) == [site]
    torch.testing.assert_close(pooled[site].values, by_hand)


def test_a_cache_without_batch_dimension_is_one_prompt(tiny) -> None:
    [row] = encode(tiny, PROMPTS[:1])
    tokens = torch.tensor([row.ids])
    site = SITES[1]
    _, cache = tiny.run_with_cache(tokens, names_filter=site.hook_name, remove_batch_dim=True)
    pooled = activations_from_cache(cache, tiny, PROMPTS[:1], span="last", tokens=tokens)
    torch.testing.assert_close(pooled[site].values[0], cache[site.hook_name][-1])


def test_what_does_not_fit_the_cache_is_refused(tiny) -> None:
    tokens, cache = run(tiny)
    with pytest.raises(ValueError, match="needs tokens="):
        activations_from_cache(cache, tiny, PROMPTS, span="content")
    with pytest.raises(ValueError, match="unknown span 'words'"):
        activations_from_cache(cache, tiny, PROMPTS, span="words", tokens=tokens)
    with pytest.raises(ValueError, match="row 0 of tokens is not prompt 'b'"):
        activations_from_cache(cache, tiny, PROMPTS[::-1], span="all", tokens=tokens)
    with pytest.raises(ValueError, match="for each of the 1 prompts"):
        activations_from_cache(cache, tiny, PROMPTS[:1], span="all", tokens=tokens[:1])
    with pytest.raises(ValueError, match=r"has no blocks\.1\.hook_attn_out"):
        activations_from_cache(
            cache, tiny, PROMPTS, span="all", tokens=tokens, sites=Site(1, "attn_out")
        )
    with pytest.raises(ValueError, match="a token in every row"):
        activations_from_cache(
            cache, tiny, PROMPTS, span=torch.zeros(tokens.shape, dtype=torch.bool)
        )


def test_pooled_activations_go_into_the_logit_lens_and_give_the_models_own_logits(tiny) -> None:
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    if not hasattr(analysis, "logit_lens"):
        pytest.skip("this TransformerLens has no logit lens of its own")
    sites = [*sites_of_kind(tiny, "resid_pre"), Site(tiny.cfg.n_layers - 1, "resid_post")]
    cache = as_activation_cache(cache_activations(tiny, PROMPTS, sites, span="last"), tiny)
    lens = analysis.logit_lens(cache)
    for row, encoded in enumerate(encode(tiny, PROMPTS)):
        with torch.no_grad():
            logits = tiny(torch.tensor([encoded.ids]))[0, -1]
        torch.testing.assert_close(lens.values[-1, row], logits, rtol=1e-4, atol=1e-4)


def test_a_cache_that_went_out_comes_back_as_it_was(tiny) -> None:
    activations = cache_activations(tiny, PROMPTS, SITES, span="content")
    cache = as_activation_cache(activations, tiny)
    assert cache[Site(0, "z").hook_name].shape == (2, 1, tiny.cfg.n_heads, tiny.cfg.d_head)
    back = activations_from_cache(
        cache, tiny, PROMPTS, span=torch.ones(2, 1, dtype=torch.bool), sites=SITES
    )
    assert all(torch.equal(back[site].values, activations[site].values) for site in SITES)


def test_sets_of_other_prompts_or_another_model_make_no_cache(tiny, chatless) -> None:
    activations = cache_activations(tiny, PROMPTS, SITES[:2])
    with pytest.raises(ValueError, match="is not of this model"):
        as_activation_cache(activations, chatless)
    mixed = {**activations, SITES[1]: activations[SITES[1]].of(PROMPTS[::-1])}
    with pytest.raises(ValueError, match="the same prompts"):
        as_activation_cache(mixed, tiny)
    other = dataclasses.replace(activations[SITES[1]], span="last")
    with pytest.raises(ValueError, match="the same prompts"):
        as_activation_cache({**activations, SITES[1]: other}, tiny)
    with pytest.raises(ValueError, match="one site at least"):
        as_activation_cache({}, tiny)
