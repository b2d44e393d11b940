"""Say in which shards ``cache_activations`` keeps prompts, for whoever fills them elsewhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.models.activations import _measurement, _prepare
from workbench.models.batches import order_by_length
from workbench.models.load import ModelInfo
from workbench.models.site_names import as_sites
from workbench.models.sites import Site
from workbench.models.templates import Keywords, asked_as
from workbench.prompts.forms import as_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike


@dataclass(frozen=True)
class ShardPlan:
    """Say how ``cache_activations`` keeps prompts in a store.

    Attributes:
        what: All that the values depend on; it names the measurement's folder.
        order: Place in the given prompts of each row of the shards, the longest first.
        size: Rows of every shard but the last.
        model: What runs.
    """

    what: dict[str, Any]
    order: tuple[int, ...]
    size: int
    model: ModelInfo

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return dataclasses.asdict(self) | {"model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardPlan:
        """Make a plan of what ``to_dict`` gave."""
        model, order = ModelInfo(**values["model"]), tuple(values["order"])
        return cls(values["what"], order, values["size"], model)

    def shards(self) -> list[tuple[int, ...]]:
        """Give the rows of each shard, as places in the given prompts."""
        starts = range(0, len(self.order), self.size)
        return [self.order[start : start + self.size] for start in starts]


def plan_shards(
    model: HookedModel,
    prompts: PromptsLike,
    sites: Sequence[Site] | Site,
    *,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
) -> ShardPlan:
    """Check a measurement and say in which shards it is kept, for whoever fills them elsewhere.

    Arguments and errors are those of ``cache_activations``. A shard holds what that function gives
    for the shard's prompts alone, in the plan's order.
    """
    prompts, sites = as_prompts(prompts), as_sites(model, sites)
    asked = asked_as(system_prompt, template_keywords)
    encoded, info = _prepare(model, prompts, sites, span, asked)
    order = order_by_length([len(row.ids) for row in encoded])
    what = _measurement(model, encoded, sites, span, asked, None)
    return ShardPlan(what, tuple(order), what["shard"], info)


def several_sites(sites: Sequence[Site] | Site) -> tuple[Site, ...]:
    """Make a tuple of one or several sites, each once, where there is no model to ask for names.

    Raises:
        TypeError: If something else is given.
    """
    several = (sites,) if isinstance(sites, str | Site) else tuple(dict.fromkeys(sites))
    wrong = next((site for site in several if not isinstance(site, Site)), None)
    if wrong is not None:
        raise TypeError(f"sites are given as wb.Site(layer, kind), got {wrong!r:.60}.")
    return several
