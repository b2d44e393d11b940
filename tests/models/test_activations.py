"""Activations: means over a span that depend on nothing but prompt, model and site."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.activation_sets import CLOSE, PROMPTS, SITES, close, few, relative
from helpers.hugging_face import activations as hugging_face_activations
from helpers.hugging_face import calls_of, plain_model
from helpers.tiny_models import D_MLP, D_MODEL, FAMILIES, LAYERS
from hypothesis import given
from hypothesis import strategies as st

from workbench.models import activations as activations_module
from workbench.models import batches as batches_module
from workbench.models.activations import (
    ActivationSet,
    cache_activations,
    class_moments,
    token_activations,
)
from workbench.models.load import load_model, model_info
from workbench.models.packaged import EMBEDDED, packaged_folder
from workbench.models.sites import KINDS, Site, sites_of_kind
from workbench.models.tokens import encode
from workbench.prompts.prompt import Prompt, load_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence


def all_sites(model: Any) -> list[Site]:
    return [
        Site(layer, kind)
        for layer in range(model.cfg.n_layers)
        for kind in KINDS
        if Site(layer, kind).hook_name in model.hook_dict
    ]


@pytest.fixture(scope="module")
def plainly(tiny) -> dict[Site, ActivationSet]:
    return cache_activations(tiny, PROMPTS, SITES)


# What is measured


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family_equals_hugging_face(
    family_model, family_path, family: str
) -> None:
    model, plain = family_model(family), plain_model(family_path(family))
    prompts, sites = PROMPTS[:5], all_sites(model)
    for span in ("content", "response", "last", "all"):
        found = cache_activations(model, prompts, sites, span=span)
        for i, row in enumerate(encode(model, prompts, with_response=span == "response")):
            expected = hugging_face_activations(plain, row.ids)
            first, stop = row.span(span)
            for site in sites:
                mean = expected[site][first:stop].double().mean(dim=0)
                assert relative(found[site].values[i], mean) < 1e-5, (site, span)


def test_what_attention_and_mlp_add_is_the_difference_of_the_stream(family_model) -> None:
    for family in ("llama3", "gemma2", "gemma3", "olmo2", "gpt2"):
        model = family_model(family)
        found = {
            site: acts.values
            for site, acts in cache_activations(model, PROMPTS, all_sites(model)).items()
        }
        for layer in range(LAYERS):
            at = {kind: found[Site(layer, kind)] for kind in KINDS}
            torch.testing.assert_close(
                at["resid_pre"] + at["attn_out"], at["resid_mid"], rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(
                at["resid_mid"] + at["mlp_out"], at["resid_post"], rtol=1e-4, atol=1e-4
            )
            if layer:
                assert torch.equal(at["resid_pre"], found[Site(layer - 1, "resid_post")])


def test_rows_equal_run_with_cache_of_each_prompt_alone(tiny, plainly) -> None:
    for i, row in enumerate(encode(tiny, PROMPTS)):
        with torch.no_grad():
            _, cache = tiny.run_with_cache(torch.tensor([row.ids]))
        for site in SITES:
            mean = cache[site.hook_name].flatten(2)[0, slice(*row.content)].double().mean(dim=0)
            assert relative(plainly[site].values[i], mean) < 1e-5


def test_a_set_says_what_it_holds(tiny, plainly) -> None:
    widths = {"resid_post": D_MODEL, "attn_out": D_MODEL, "mlp_post": D_MLP, "z": D_MODEL}
    assert list(plainly) == SITES
    for site, acts in plainly.items():
        assert acts.values.shape == (len(PROMPTS), widths[site.kind])
        assert (acts.values.dtype, acts.values.device.type) == (torch.float32, "cpu")
        assert acts.values.is_contiguous()
        assert not acts.values.requires_grad
        assert (acts.site, acts.prompts, acts.span, len(acts)) == (
            site,
            tuple(PROMPTS),
            "content",
            len(PROMPTS),
        )
        assert acts.model == model_info(tiny)
    assert (
        repr(plainly[SITES[0]])
        == "ActivationSet(L3.resid_post, 12 prompts x 32, span='content', model='tiny-llama3')"
    )


def test_sites_share_no_memory(tiny) -> None:
    sites = [Site(1, "resid_post"), Site(2, "resid_pre")]  # one tensor inside the model
    acts = cache_activations(tiny, PROMPTS[:3], sites)
    before = acts[sites[1]].values.clone()
    acts[sites[0]].values.zero_()
    assert torch.equal(acts[sites[1]].values, before)


def test_one_site_and_repeated_sites_are_fine(tiny, plainly) -> None:
    alone = cache_activations(tiny, PROMPTS, SITES[1])
    assert list(alone) == [SITES[1]]
    torch.testing.assert_close(alone[SITES[1]].values, plainly[SITES[1]].values, **CLOSE)
    assert list(cache_activations(tiny, PROMPTS[:2], [SITES[1], SITES[1]])) == [SITES[1]]


# What it does not depend on


@few
@given(
    st.integers(1, 13),
    st.sampled_from([1, 40, 64, 200, 5000]),
    st.permutations(range(len(PROMPTS))),
)
def test_means_do_not_depend_on_batch_size_padding_or_order(
    tiny, plainly, batch_size, max_tokens, order
) -> None:
    found = cache_activations(
        tiny, [PROMPTS[i] for i in order], SITES, batch_size=batch_size, max_tokens=max_tokens
    )
    for site in SITES:
        torch.testing.assert_close(found[site].values, plainly[site].values[list(order)], **CLOSE)


@few
@given(
    st.sets(st.integers(0, len(PROMPTS) - 1), min_size=1),
    st.sampled_from(["content", "last", "all", "response"]),
)
def test_means_do_not_depend_on_the_company(tiny, chosen, span) -> None:
    whole = cache_activations(tiny, PROMPTS, SITES, span=span)
    part = cache_activations(tiny, [PROMPTS[i] for i in sorted(chosen)], SITES, span=span)
    for site in SITES:
        torch.testing.assert_close(part[site].values, whole[site].values[sorted(chosen)], **CLOSE)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("span", ["content", "last", "response"])
def test_sharing_the_prefix_changes_nothing(
    family_model, monkeypatch, family: str, span: str
) -> None:
    model = family_model(family)
    # They have more in common than Gemma's window of 32.
    start = (
        "Tell me in great detail, for beginners and with a poem, how a friend may plan a party at "
        "home in the city "
    )
    prompts = [replace(p, text=f"{start}{p.text}") for p in PROMPTS[:5]]
    prefixes: list[int] = []
    length = batches_module.shared_prefix_length
    monkeypatch.setattr(
        batches_module,
        "shared_prefix_length",
        lambda *a, **k: prefixes.append(length(*a, **k)) or prefixes[-1],
    )
    shared = cache_activations(model, prompts, SITES, span=span)
    assert prefixes[0] > (0 if span == "content" else 32)
    monkeypatch.setattr(batches_module, "shared_prefix_length", lambda *_, **__: 0)
    close(cache_activations(model, prompts, SITES, span=span), shared)


def test_a_model_without_that_cache_gives_the_same(tiny, plainly, monkeypatch) -> None:
    monkeypatch.setattr("workbench.models.forward.has_key_value_cache", lambda model: False)
    monkeypatch.setattr(batches_module, "has_key_value_cache", lambda model: False)
    close(cache_activations(tiny, PROMPTS, SITES), plainly)


def test_bos_and_template_are_in_the_span_all_only(tiny) -> None:
    told = {
        span: cache_activations(tiny, PROMPTS[:3], SITES[0], span=span)[SITES[0]].values
        for span in ("content", "all", "last")
    }
    assert not torch.allclose(told["content"], told["all"], atol=1e-2)
    assert not torch.allclose(told["content"], told["last"], atol=1e-2)


def test_the_response_is_read_behind_the_plain_chat_prompt(tiny) -> None:
    acts = cache_activations(tiny, PROMPTS[:4], SITES[0], span="response")[SITES[0]]
    for i, row in enumerate(encode(tiny, PROMPTS[:4], with_response=True)):
        with torch.no_grad():
            _, cache = tiny.run_with_cache(torch.tensor([row.ids]))
        mean = cache[SITES[0].hook_name][0, slice(*row.response)].mean(dim=0)
        assert relative(acts.values[i], mean) < 1e-5
    other = cache_activations(
        tiny, [replace(p, response="No.") for p in PROMPTS[:4]], SITES[0], span="response"
    )[SITES[0]]
    assert not torch.allclose(acts.values, other.values, atol=1e-2)


def test_a_system_prompt_changes_what_is_measured(tiny, plainly) -> None:
    told = cache_activations(tiny, PROMPTS, SITES[0], system_prompt="Be very kind.")[
        SITES[0]
    ].values
    assert not torch.allclose(told, plainly[SITES[0]].values, atol=1e-2)


def test_half_precision_is_summed_in_full(tiny_path) -> None:
    model = load_model(tiny_path, device="cpu", dtype="bfloat16")
    long = [Prompt("long", "plan a garden for a friend " * 14, None, "c", "safe", "s")]
    acts = cache_activations(model, long, Site(2, "resid_post"))[Site(2, "resid_post")].values
    assert acts.dtype == torch.float32
    _, tokens = token_activations(model, long[0], Site(2, "resid_post"))
    row = encode(model, long)[0]
    mean = tokens[slice(*row.content)].double().mean(dim=0)
    # bfloat16 differs a little between a whole pass and one behind a prefix.
    assert relative(acts[0], mean) < 0.02
    # Embeddings: no arithmetic before.
    embedding = Site(0, "resid_pre")
    exact = cache_activations(model, long, embedding)[embedding].values
    embedded = (
        model.original_model.model.embed_tokens(torch.tensor(row.ids[slice(*row.content)]))
        .double()
        .mean(dim=0)
    )
    torch.testing.assert_close(exact[0], embedded.float(), rtol=0, atol=1e-6)


# What is computed


def test_no_logits_and_no_layer_above_the_last_site(tiny) -> None:
    core = tiny.original_model.model
    with (
        calls_of(core.layers[1]) as last,
        calls_of(core.layers[2]) as above,
        calls_of(tiny.original_model.lm_head) as head,
    ):
        cache_activations(tiny, PROMPTS, [Site(1, "resid_post"), Site(0, "z")], batch_size=5)
    prefix = (1, encode(tiny, PROMPTS[:1])[0].content[0])
    assert [rows for rows, _ in last] == [1, 5, 5, 2]
    assert last[0] == prefix  # the template once, alone
    assert set(above) <= {prefix}
    assert len(head) <= 1


def test_one_pass_serves_all_sites_and_runs_the_users_words_alone(tiny) -> None:
    rows = encode(tiny, PROMPTS)
    assert all(row.content[1] < len(row.ids) for row in rows)
    with calls_of(tiny.original_model.model.layers[0]) as calls:
        cache_activations(tiny, PROMPTS, all_sites(tiny))
    # The template before the words is run once, what comes behind them never.
    begin = rows[0].content[0]
    assert [width for _, width in calls] == [begin, max(row.content[1] for row in rows) - begin]


def test_progress_counts_prompts(tiny, capsys) -> None:
    cache_activations(tiny, PROMPTS, SITES[0], progress=True)
    shown = capsys.readouterr()
    assert "12/12" in shown.err
    assert shown.out == ""
    cache_activations(tiny, PROMPTS, SITES[0])
    assert capsys.readouterr() == ("", "")


# Bad input


@pytest.mark.parametrize(("prompts", "sites", "keywords", "message"), [
    ([], SITES, {}, "nothing to run: give at least one prompt and one site."),
    (PROMPTS, [], {}, "nothing to run: give at least one prompt and one site."),
    (
        PROMPTS,
        SITES,
        {"span": "answer"},
        "unknown span 'answer'; spans: content, response, last, all.",
    ),
    ([*PROMPTS, PROMPTS[3]], SITES, {}, "prompt 'p3' comes twice; ids must be unique in a set."),
    (
        PROMPTS,
        [Site(9, "z")],
        {},
        "no hook point for Site(layer=9, kind='z'): 'tiny-llama3' has 4 layers (0-3).",
    ),
    (
        PROMPTS,
        SITES,
        {"batch_size": 0},
        "batch_size and max_tokens must be at least 1, got 0 and 4096.",
    ),
    (
        PROMPTS,
        SITES,
        {"max_tokens": 0},
        "batch_size and max_tokens must be at least 1, got 32 and 0.",
    ),
])  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_written(
    tiny, tmp_path, prompts, sites, keywords, message
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        cache_activations(tiny, prompts, sites, store=tmp_path / "store", **keywords)
    assert str(caught.value) == message
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_missing_response_and_a_long_prompt_are_named(tiny) -> None:
    with pytest.raises(ValueError, match="prompt 'p0' has no response"):
        cache_activations(tiny, [replace(PROMPTS[0], response=None)], SITES, span="response")
    with pytest.raises(ValueError, match="prompt 'p0' does not fit"):
        cache_activations(tiny, [replace(PROMPTS[0], text="y" * 600)], SITES)


# Rows of a set


def test_selecting_rows_goes_by_prompt(plainly) -> None:
    acts = plainly[SITES[0]]
    chosen = acts.select(category="fraud", label="unsafe")
    assert [p.id for p in chosen.prompts] == ["p2", "p4", "p8", "p10"]
    assert torch.equal(chosen.values, acts.values[[2, 4, 8, 10]])
    turned = acts.of([PROMPTS[7], PROMPTS[1]])
    assert torch.equal(turned.values, acts.values[[7, 1]])
    assert (turned.site, turned.span, turned.model) == (acts.site, acts.span, acts.model)
    relabelled = replace(PROMPTS[7], label="neutral", category="other", response=None)
    assert acts.of([relabelled]).prompts == (relabelled,)


def test_rows_of_prompts_that_were_not_run_are_never_given(tiny, plainly) -> None:
    acts = plainly[SITES[0]]
    with pytest.raises(
        ValueError, match=r"no activations of prompt 'new' at L3\.resid_post; cache it first\.$"
    ):
        acts.of([replace(PROMPTS[0], id="new")])
    with pytest.raises(
        ValueError,
        match=r"prompt 'p0' was run at L3\.resid_post with another text; cache it again\.$",
    ):
        acts.of([replace(PROMPTS[0], text="Something else.")])
    answers = cache_activations(tiny, PROMPTS[:2], SITES[0], span="response")[SITES[0]]
    with pytest.raises(ValueError, match="with another text"):
        answers.of([replace(PROMPTS[0], response="Something else.")])
    with pytest.raises(ValueError, match=r"no prompts of category 'frau'.*Did you mean 'fraud'"):
        acts.select(category="frau")


# Moments


@few
@given(st.integers(1, 12), st.sampled_from([30, 64, 4096]), st.permutations(range(len(PROMPTS))))
def test_class_moments_equal_two_passes_of_numpy(tiny, batch_size, max_tokens, order) -> None:
    prompts = [PROMPTS[i] for i in order]
    acts = cache_activations(tiny, PROMPTS, SITES)
    moments = class_moments(tiny, prompts, SITES, batch_size=batch_size, max_tokens=max_tokens)
    classes = sorted({(p.category, p.label) for p in prompts})
    for site in SITES:
        found = moments[site]
        assert found.classes == tuple(classes)
        assert found.mean.dtype == found.variance.dtype == torch.float64
        for row, (category, label) in enumerate(classes):
            values = acts[site].select(category=category, label=label).values.double().numpy()
            assert int(found.n[row]) == len(values)
            np.testing.assert_allclose(found.mean[row], values.mean(axis=0), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(
                found.variance[row], values.var(axis=0, ddof=1), rtol=1e-4, atol=1e-5
            )
        assert (found.site, found.span, found.model) == (site, "content", model_info(tiny))


def test_moments_of_far_away_values_do_not_cancel(tiny, monkeypatch) -> None:
    # Sums of squares would lose a variance of 1 beside a mean of 1e8 altogether.
    drawn = (
        torch.randn(
            len(PROMPTS), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        + 1e8
    )

    def batches(model: Any, encoded: Sequence, sites: Sequence[Site], *_: object) -> Any:
        for i in range(0, len(encoded), 5):
            yield encoded[i : i + 5], {sites[0]: drawn[i : i + 5]}

    monkeypatch.setattr(activations_module, "pooled_batches", batches)
    one_class = [replace(p, category="c", label="safe") for p in PROMPTS]
    found = class_moments(tiny, one_class, SITES[0])[SITES[0]]
    np.testing.assert_allclose(found.variance[0], drawn.numpy().var(axis=0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(found.mean[0], drawn.numpy().mean(axis=0), rtol=1e-14)


def test_a_class_of_one_has_no_variance(tiny) -> None:
    found = class_moments(tiny, [replace(PROMPTS[0], category="lonely"), *PROMPTS[1:]], SITES[0])[
        SITES[0]
    ]
    row = found.classes.index(("lonely", PROMPTS[0].label))
    assert int(found.n[row]) == 1
    assert not found.variance[row].any()
    assert not found.mean.isnan().any()


def test_moments_hold_one_batch_at_a_time(tiny, monkeypatch) -> None:
    given_out: list[weakref.ref] = []
    batches = activations_module.pooled_batches

    def watched(*args: Any) -> Any:
        for rows, pooled in batches(*args):
            given_out.extend(weakref.ref(values) for values in pooled.values())
            yield rows, pooled
            del pooled
            assert sum(values() is not None for values in given_out) <= 2 * len(SITES)

    monkeypatch.setattr(activations_module, "pooled_batches", watched)
    class_moments(tiny, PROMPTS, SITES, batch_size=1)
    assert len(given_out) == len(PROMPTS) * len(SITES)


# Token by token


def test_activations_of_tokens_average_to_those_of_the_prompt(tiny, plainly) -> None:
    for site in SITES:
        row, values = token_activations(tiny, replace(PROMPTS[4], response=None), site)
        assert values.shape[0] == len(row.ids)
        assert relative(plainly[site].values[4], values[slice(*row.content)].mean(dim=0)) < 1e-5
    row, values = token_activations(tiny, PROMPTS[4], SITES[0])
    assert values.shape[0] == row.response[1] > row.response[0]


# The real model


@pytest.mark.slow
def test_the_real_model_equals_hugging_face(real_model) -> None:
    plain = plain_model(packaged_folder(EMBEDDED))
    prompts = load_prompts()[:40:8]
    sites = [Site(layer, kind) for layer in (0, 15, 29) for kind in KINDS]
    acts = cache_activations(real_model, prompts, sites)
    for i, row in enumerate(encode(real_model, prompts)):
        expected = hugging_face_activations(plain, row.ids)
        for site in sites:
            mean = expected[site][slice(*row.content)].double().mean(dim=0)
            assert relative(acts[site].values[i], mean) < 1e-5, site


@pytest.mark.slow
def test_the_real_models_first_token_is_not_pooled(real_model) -> None:
    # Its norm is a hundred times that of the others: pooling it would bury every difference between
    # prompts.
    prompts, site = load_prompts()[:12], Site(15, "resid_post")
    norms = {
        span: cache_activations(real_model, prompts, site, span=span)[site].values.norm(dim=1)
        for span in ("content", "all")
    }
    assert float(norms["content"].max()) < 1000
    assert float(norms["all"].min()) > 3 * float(norms["content"].max())
    assert len(sites_of_kind(real_model, "mlp_post")) == 30
