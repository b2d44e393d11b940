"""Let the functions that run a model hand their work to an engine, inside a block.

A run calls ``cache_activations`` and ``sweep`` in twenty places. Inside ``carried_out_by`` these
calls go to an engine, and nothing else of the run has to know.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workbench.models.hooked_model import HookedModel


F = TypeVar("F", bound="Callable[..., Any]")


_CARRIER: ContextVar[Any] = ContextVar("carrier", default=None)


@contextmanager
def carried_out_by(engine: Any) -> Iterator[None]:
    """Let an engine carry out what is asked of its model inside the block; None for nobody.

    Args:
        engine: Something with ``model``, ``cache_activations``, ``class_moments`` and ``sweep``, as
            ``engines.Engine`` has them.
    """
    token = _CARRIER.set(engine)
    try:
        yield
    finally:
        _CARRIER.reset(token)


def carried(function: F) -> F:
    """Hand the calls of a function to the engine of its model, where there is one.

    An engine's own call names its ``reader`` or ``writer``, and is not handed over again.
    """

    @wraps(function)
    def call(model: HookedModel, prompts: Any, *args: Any, **keywords: Any) -> Any:
        is_an_engines = keywords.get("reader") is not None or keywords.get("writer") is not None
        engine = None if is_an_engines else carrier_of(model)
        if engine is None:
            return function(model, prompts, *args, **keywords)
        return getattr(engine, function.__name__)(prompts, *args, **keywords)

    return cast("F", call)


def carrier_of(model: HookedModel) -> Any:
    """Give the engine that carries out what is asked of a model; None where it runs here."""
    engine = _CARRIER.get()
    return engine if engine is not None and engine.model is model else None
