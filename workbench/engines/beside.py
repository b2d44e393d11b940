"""Put an engine beside the model in this process: it takes what it can, the model does the rest.

A run needs things that no other engine has: neurons and heads, and answers behind a gate that reads
while the model writes. The model of a run is in this process anyway, for perplexity and neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from workbench.engines.base import Engine, EngineCannot, LocalEngine
from workbench.generation.decoding import GREEDY
from workbench.models.elsewhere import carried_out_by
from workbench.models.site_names import as_sites

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from workbench.generation.answers import Completion, Condition
    from workbench.generation.decoding import Decoding
    from workbench.models.activations import ActivationSet, ClassMoments
    from workbench.models.hooked_model import HookedModel
    from workbench.models.sites import Site
    from workbench.prompts.forms import PromptsLike


class PartEngine(Engine, Protocol):
    """An engine that says beforehand what it cannot do."""

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raise ``EngineCannot`` where it cannot read or steer at a site."""

    def check_conditions(self, conditions: Iterable[Condition], decoding: Decoding) -> None:
        """Raise ``EngineCannot`` where it cannot answer under a condition, or decode so."""


class Beside:
    """Do with an engine what it can do, and the rest with the model in this process.

    Attributes:
        name: That of the engine.
        engine: Who is asked first.
        local: Who does the rest.
        done_here: What the engine refused, in its words.
    """

    def __init__(self, engine: PartEngine) -> None:
        self.name, self.engine, self.local = engine.name, engine, LocalEngine(engine.model)
        self.done_here: dict[str, None] = {}

    @property
    def model(self) -> HookedModel:
        """The model of both."""
        return self.engine.model

    def cache_activations(
        self, prompts: PromptsLike, sites: Sequence[Site] | Site, **how: Any
    ) -> dict[Site, ActivationSet]:
        """Let each engine read the sites that it can."""
        return self._by_site("cache_activations", prompts, sites, how)

    def class_moments(
        self, prompts: PromptsLike, sites: Sequence[Site] | Site, **how: Any
    ) -> dict[Site, ClassMoments]:
        """Let each engine read the sites that it can."""
        return self._by_site("class_moments", prompts, sites, how)

    def sweep(
        self,
        prompts: PromptsLike,
        conditions: Mapping[str, Condition],
        decoding: Decoding = GREEDY,
        **how: Any,
    ) -> list[Completion]:
        """Let each engine answer under the conditions that it can, in their order."""
        here: dict[str, Condition] = {}
        there: dict[str, Condition] = {}
        for name, condition in conditions.items():
            can = self._can(lambda c=condition: self.engine.check_conditions([c], decoding))
            (there if can else here)[name] = condition
        answers: dict[str, list[Completion]] = {}
        with carried_out_by(None):
            for engine, part in ((self.engine, there), (self.local, here)):
                if part:
                    for answer in engine.sweep(prompts, part, decoding, **how):
                        answers.setdefault(answer.condition, []).append(answer)
        return [answer for name in conditions for answer in answers.get(name, [])]

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _by_site(self, what: str, prompts: Any, sites: Any, how: dict[str, Any]) -> dict[Site, Any]:
        several = as_sites(self.model, sites)
        there = [s for s in several if self._can(lambda s=s: self.engine.check_sites([s]))]
        here = [site for site in several if site not in there]
        results: dict[Site, Any] = {}
        with carried_out_by(None):
            for engine, part in ((self.engine, there), (self.local, here)):
                if part:
                    results |= getattr(engine, what)(prompts, part, **how)
        return {site: results[site] for site in several}

    def _can(self, check: Any) -> bool:
        try:
            check()
        except EngineCannot as why:
            self.done_here[str(why)] = None
            return False
        return True
