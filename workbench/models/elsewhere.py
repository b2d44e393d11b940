"""Let the functions that run a model hand their work to an engine, inside a block.

A run calls ``cache_activations`` and ``sweep`` in twenty places. Inside ``carried_out_by`` these
calls go to an engine, and nothing else of the run has to know.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.models.hooked_model import HookedModel


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


def carrier_of(model: HookedModel) -> Any:
    """Give the engine that carries out what is asked of a model; None where it runs here."""
    engine = _CARRIER.get()
    return engine if engine is not None and engine.model is model else None
