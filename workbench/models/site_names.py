"""Find sites by TransformerLens's names of hook points, as its ``names_filter`` takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from workbench.files.hints import did_you_mean
from workbench.models.hooked_model import check_hooked, hook_points
from workbench.models.sites import KINDS, Site, check_sites, present_sites

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel


SitesLike = Site | str | Callable[[str], bool] | Iterable[Site | str]
"""Sites, names of hook points ("blocks.15.hook_resid_post"), names of sites ("L15.resid_post"), or
a function of a hook point's name that says whether it is wanted."""


def as_sites(model: HookedModel, given: SitesLike) -> tuple[Site, ...]:
    """Make sites of what was given, each once.

    TransformerLens has several names for some hook points ("blocks.3.hook_out" of a bridge is
    "blocks.3.hook_resid_post"); all of them will do.

    Args:
        model: A hooked model.
        given: Sites or names, one or several, which must all be sites of the model. Of a function
            those sites are taken for which it is true under one of their names, and hook points
            that are no sites are passed over.

    Raises:
        ValueError: If a name is no site, or the function is true for none.
        TypeError: If it is nothing of this.
        CannotBeDone: If the model does not compute a site.
    """
    check_hooked(model)
    if callable(given):
        return _wanted(model, given)
    several = [given] if isinstance(given, Site | str) or not isinstance(given, Iterable) else given
    sites = tuple(dict.fromkeys(_site(model, one) for one in several))
    check_sites(model, sites)
    return sites


def _site(model: HookedModel, given: Site | str) -> Site:
    """Make a site of a site or of a name."""
    if isinstance(given, Site):
        return given
    if not isinstance(given, str):
        raise TypeError(
            "sites are given as wb.Site(layer, kind), as names of hook points, or as a function of "
            f"such a name, got {given!r:.60}."
        )
    if "hook_" not in given:
        return Site.parse(given)
    names = _names_of_sites(model)
    if given not in names:
        raise ValueError(
            f"{given!r} is no site of this model; sites are {', '.join(KINDS)}, for instance "
            f"{Site(0, 'resid_post').hook_name!r}.{did_you_mean(given, list(names))}"
        )
    return names[given]


def _wanted(model: HookedModel, wants: Callable[[str], bool]) -> tuple[Site, ...]:
    """List the sites that a function wants by one of their names."""
    names = _names_of_sites(model)
    wanted = {site for name, site in names.items() if wants(name)}
    if not wanted:
        raise ValueError(
            f"the function of names is true for none of the {len(names)} names of sites; one of "
            f"them is {next(iter(names))!r}."
        )
    return tuple(sorted(wanted))


def _names_of_sites(model: HookedModel) -> dict[str, Site]:
    """Map every name of a hook point that is a site to it; the names here are first."""
    points = hook_points(model)
    by_point: dict[int, Site] = {}
    names: dict[str, Site] = {}
    for site in present_sites(model, KINDS):
        names[site.hook_name] = site
        # resid_pre of a layer may be resid_post of the one before: the first one has the name.
        by_point.setdefault(id(points[site.hook_name]), site)
    for name, point in points.items():
        if id(point) in by_point:
            names.setdefault(name, by_point[id(point)])
    return names
