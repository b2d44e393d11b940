"""Sites: names of hook points, how they are written and read, and what a model has."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from helpers.tiny_models import D_MLP, D_MODEL, FAMILIES, LAYERS
from hypothesis import given
from hypothesis import strategies as st

from workbench.files.hints import did_you_mean
from workbench.models.sites import (
    HOOK_NAMES,
    KINDS,
    RESIDUAL_KINDS,
    Site,
    check_sites,
    sites_of_kind,
)

sites = st.builds(Site, st.integers(0, 200), st.sampled_from(KINDS))


@given(sites)
def test_a_site_reads_back_as_it_prints(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert Site.parse(f"  {site.layer}:{site.kind} ") == site


@given(st.text(max_size=30))
def test_any_text_is_a_site_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert Site.parse(text).kind in KINDS


@pytest.mark.parametrize(
    "text", ["", "L15", "resid_post", "L15.resid_post.x", "L-1.z", "L1 5.z", "x\nL1.z"]
)
def test_a_text_that_is_no_site_says_how_one_is_written(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it like 'L15\.resid_post'"):
        Site.parse(text)


def test_an_unknown_kind_names_the_kinds_and_the_closest() -> None:
    with pytest.raises(
        ValueError, match=r"'resid_pots'; kinds: resid_pre, .*, z\. Did you mean 'resid_post'\?$"
    ):
        Site(0, "resid_pots")
    assert did_you_mean("xyzzy", KINDS) == ""


@pytest.mark.parametrize("layer", [-1, 1.0, True, "3", None])
def test_a_layer_is_a_whole_number_from_zero(layer: object) -> None:
    with pytest.raises(ValueError, match="layer must be a whole number from 0"):
        Site(layer, "z")  # type: ignore[arg-type]


def test_a_numpy_layer_is_the_same_site() -> None:
    site = Site(np.int64(3), "mlp_post")  # type: ignore[arg-type]
    assert site == Site(3, "mlp_post")
    assert hash(site) == hash(Site(3, "mlp_post"))
    assert (repr(site), site.hook_name) == (
        "Site(layer=3, kind='mlp_post')",
        "blocks.3.mlp.hook_post",
    )


def test_sites_sort_by_layer_and_never_change() -> None:
    assert sorted([Site(10, "z"), Site(2, "z"), Site(2, "attn_out")]) == [
        Site(2, "attn_out"),
        Site(2, "z"),
        Site(10, "z"),
    ]
    with pytest.raises(AttributeError):
        Site(0, "z").layer = 1  # type: ignore[misc]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_fires_with_its_width_in_every_family(family_model, family: str) -> None:
    model = family_model(family)
    kinds = [kind for kind in KINDS if not (family == "pythia" and kind == "resid_mid")]
    _, cache = model.run_with_cache(torch.tensor([[5, 6, 7]]))
    for kind in kinds:
        width = {"mlp_post": D_MLP, "z": model.cfg.n_heads * model.cfg.d_head}.get(kind, D_MODEL)
        for site in sites_of_kind(model, kind):
            assert cache[site.hook_name].flatten(2).shape == (1, 3, width), site
    assert set(RESIDUAL_KINDS) < set(HOOK_NAMES)


def test_one_site_a_layer_or_only_the_layers_asked_for(tiny) -> None:
    assert sites_of_kind(tiny, "z") == [Site(layer, "z") for layer in range(LAYERS)]
    assert sites_of_kind(tiny, "z", [3, 1]) == [Site(3, "z"), Site(1, "z")]


def test_a_layer_beyond_the_model_says_how_many_there_are(tiny) -> None:
    with pytest.raises(
        ValueError, match=r"Site\(layer=4, kind='z'\): 'tiny-llama3' has 4 layers \(0-3\)\.$"
    ):
        check_sites(tiny, [Site(0, "z"), Site(4, "z")])


def test_a_kind_that_the_architecture_does_not_compute_is_refused(family_model) -> None:
    # Pythia's attention and MLP read the same input: there is no residual stream between them.
    with pytest.raises(
        ValueError,
        match=r"'tiny-pythia' does not compute blocks\.1\.hook_resid_mid; choose another kind",
    ):
        sites_of_kind(family_model("pythia"), "resid_mid", [1])
