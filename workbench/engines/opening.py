"""Open an engine by its name, for a run."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from workbench.engines.beside import Beside
from workbench.engines.names import ENGINES
from workbench.files.hints import did_you_mean
from workbench.models.elsewhere import carried_out_by

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from workbench.engines.base import Engine
    from workbench.models.hooked_model import HookedModel


def open_engine(
    name: str, name_or_path: str | Path, model: HookedModel, settings: Mapping[str, Any]
) -> Engine | None:
    """Open the engine of a run, beside its model; None where the model itself is the engine.

    Args:
        name: One of ``ENGINES``.
        name_or_path: What the model was loaded from.
        model: The model of the run.
        settings: Of the engine, such as ``tensor_parallel_size`` for vLLM.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If what it needs is not installed, with what to do.
    """
    if name not in ENGINES:
        raise ValueError(
            f"unknown engine {name!r}; engines: {', '.join(ENGINES)}.{did_you_mean(name, ENGINES)}"
        )
    if name == "local":
        return None
    if name == "ray":
        from workbench.engines.ray_data import open_ray

        return open_ray(name_or_path, model, **settings)
    from workbench.engines.vllm import open_vllm

    return Beside(open_vllm(name_or_path, model, **settings))


@contextmanager
def engine_of_a_run() -> Iterator[Callable[[Engine | None], None]]:
    """Let an engine carry out what a run asks of its model, from when it is given to the end.

    Yields:
        A function that takes the engine, or None; the engine is closed where the block ends.
    """
    with ExitStack() as stack:

        def take(engine: Engine | None) -> None:
            if engine is not None:
                stack.callback(engine.close)
                stack.enter_context(carried_out_by(engine))

        yield take
