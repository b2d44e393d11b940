"""Sites are found by TransformerLens's names of hook points, as its names_filter takes them."""

from __future__ import annotations

import pytest

from workbench.models.activations import cache_activations, class_moments, token_activations
from workbench.models.site_names import as_sites
from workbench.models.sites import KINDS, Site, present_sites, sites_of_kind

POSTS = [Site(0, "resid_post"), Site(1, "resid_post")]


def test_a_name_a_list_and_a_function_name_the_same_sites(tiny) -> None:
    names = [site.hook_name for site in POSTS]
    assert as_sites(tiny, POSTS) == tuple(POSTS)
    assert as_sites(tiny, names) == tuple(POSTS)
    assert as_sites(tiny, names[0]) == as_sites(tiny, POSTS[0]) == (POSTS[0],)
    assert as_sites(tiny, ["L0.resid_post", POSTS[0]]) == (POSTS[0],)
    assert set(POSTS) <= set(as_sites(tiny, lambda name: name.endswith("hook_resid_post")))


def test_a_function_takes_the_sites_it_names_and_passes_over_what_is_none(tiny) -> None:
    everything = as_sites(tiny, lambda name: True)
    assert set(everything) == set(present_sites(tiny, KINDS))
    heads = as_sites(tiny, lambda name: name.endswith("attn.hook_z"))
    assert set(heads) == set(sites_of_kind(tiny, "z"))


def test_the_other_name_of_a_hook_point_is_its_site_too(tiny) -> None:
    points = tiny.hook_dict
    site = Site(1, "mlp_out")
    others = [n for n, p in points.items() if p is points[site.hook_name] and n != site.hook_name]
    for name in others:
        assert as_sites(tiny, name)[0].hook_name in points
        assert points[as_sites(tiny, name)[0].hook_name] is points[name]
    assert others or not hasattr(tiny, "original_model")


def test_activations_by_name_are_those_by_site(tiny) -> None:
    by_site = cache_activations(tiny, ["Hello there", "And you"], POSTS)
    by_name = cache_activations(
        tiny, ["Hello there", "And you"], lambda name: name in {site.hook_name for site in POSTS}
    )
    assert list(by_name) == POSTS
    assert all((by_name[site].values == by_site[site].values).all() for site in POSTS)
    moments = class_moments(tiny, ["Hello there", "And you"], POSTS[0].hook_name)
    assert list(moments) == POSTS[:1]
    one, other = (token_activations(tiny, "Hi", at)[1] for at in (POSTS[0], POSTS[0].hook_name))
    assert (one == other).all()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("blocks.0.attn.hook_q", ValueError, "is no site of this model"),
        ("blocks.0.hook_resid_pots", ValueError, "Did you mean 'blocks.0.hook_resid_post'"),
        ("L0.resid", ValueError, "unknown site kind"),
        (lambda name: "nowhere" in name, ValueError, "is true for none of the"),
        ([Site(99, "resid_post")], ValueError, "has . layers"),
        ([3], TypeError, "sites are given as"),
        (3, TypeError, "sites are given as"),
    ],
)
def test_what_names_no_site_is_refused(tiny, given, error, said) -> None:
    with pytest.raises(error, match=said):
        as_sites(tiny, given)
