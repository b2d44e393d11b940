"""Say what an engine is: what caches activations and writes steered answers, wherever it runs.

The local engine runs the model in this process, through hooks, and can do everything. The others
run it elsewhere and give the same results; what they cannot do they refuse before anything starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from workbench.engines.names import EngineCannot
from workbench.generation.answers import sweep
from workbench.generation.decoding import GREEDY
from workbench.models.activations import cache_activations, class_moments

__all__ = ["Engine", "EngineCannot", "LocalEngine"]

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.files.store import PathLike
    from workbench.generation.answers import Completion, Condition
    from workbench.generation.decoding import Decoding
    from workbench.models.activations import ActivationSet, ClassMoments
    from workbench.models.hooked_model import HookedModel
    from workbench.models.sites import Site
    from workbench.models.templates import Keywords
    from workbench.prompts.forms import PromptsLike


class Engine(Protocol):
    """Cache activations and write answers, with the inputs and results of the local functions.

    Attributes:
        name: As run settings and the command line have it.
        model: What has the tokenizer, the sizes, the hook points and the identity of the model that
            runs; ``encode``, ``check_sites`` and ``model_info`` take it.
    """

    @property
    def name(self) -> str:
        """As run settings and the command line have it."""

    @property
    def model(self) -> HookedModel:
        """What tells the tokens, sites and identity of the model that runs."""

    def cache_activations(
        self,
        prompts: PromptsLike,
        sites: Sequence[Site] | Site,
        *,
        span: str = "content",
        system_prompt: str | None = None,
        template_keywords: Keywords = None,
        batch_size: int = 32,
        max_tokens: int = 4096,
        store: PathLike | None = None,
        progress: bool = False,
    ) -> dict[Site, ActivationSet]:
        """Do what ``models.activations.cache_activations`` does.

        Raises:
            EngineCannot: If a site cannot be read by this engine.
        """

    def class_moments(
        self,
        prompts: PromptsLike,
        sites: Sequence[Site] | Site,
        *,
        span: str = "content",
        system_prompt: str | None = None,
        template_keywords: Keywords = None,
        batch_size: int = 32,
        max_tokens: int = 4096,
        progress: bool = False,
    ) -> dict[Site, ClassMoments]:
        """Do what ``models.activations.class_moments`` does.

        Raises:
            EngineCannot: If a site cannot be read by this engine.
        """

    def sweep(
        self,
        prompts: PromptsLike,
        conditions: Mapping[str, Condition],
        decoding: Decoding = GREEDY,
        *,
        output: PathLike | None = None,
        progress: bool = False,
        transfer: bool = False,
        continue_response: bool = False,
    ) -> list[Completion]:
        """Do what ``generation.answers.sweep`` does.

        Raises:
            EngineCannot: If an intervention or a way of decoding is not known to this engine.
        """

    def close(self) -> None:
        """End what the engine started; it answers no further calls."""


class LocalEngine:
    """Run the model in this process: what every other engine is compared with."""

    name = "local"

    def __init__(self, model: HookedModel) -> None:
        self.model = model

    def cache_activations(
        self, prompts: PromptsLike, sites: Sequence[Site] | Site, **how: Any
    ) -> dict[Site, ActivationSet]:
        """Run ``models.activations.cache_activations`` on the model."""
        return cache_activations(self.model, prompts, sites, **how)

    def class_moments(
        self, prompts: PromptsLike, sites: Sequence[Site] | Site, **how: Any
    ) -> dict[Site, ClassMoments]:
        """Run ``models.activations.class_moments`` on the model."""
        return class_moments(self.model, prompts, sites, **how)

    def sweep(
        self,
        prompts: PromptsLike,
        conditions: Mapping[str, Condition],
        decoding: Decoding = GREEDY,
        **how: Any,
    ) -> list[Completion]:
        """Run ``generation.answers.sweep`` on the model."""
        return sweep(self.model, prompts, conditions, decoding, **how)

    def close(self) -> None:
        """Do nothing: the model was given, and belongs to whoever loaded it."""
