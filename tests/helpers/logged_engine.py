"""A local engine that writes down what it is asked, and can kill its process in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.engines.base import LocalEngine
from workbench.models.load import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping


class LoggedEngine(LocalEngine):
    """Append a line for each call to ``log``; die in the first call that finds ``dies_after``.

    Attributes:
        log: File with the number of prompts of each call that was finished.
        dies_after: Finished calls, of all workers together, after which one worker kills itself,
            once; None never.
    """

    def __init__(self, model: Any, log: str, dies_after: int | None) -> None:
        super().__init__(model)
        self.log, self.dies_after = Path(log), dies_after

    def _logged(self, call: Any, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        n_done = len(finished(self.log))
        if self.dies_after is not None and n_done >= self.dies_after and self._first_to_die():
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(prompts, *arguments, **settings)
        with self.log.open("a") as file:
            file.write(f"{len(prompts)}\n")
        return result

    def _first_to_die(self) -> bool:
        try:
            self.log.with_suffix(".killed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def cache_activations(self, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        return self._logged(super().cache_activations, prompts, *arguments, **settings)

    def class_moments(self, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        return self._logged(super().class_moments, prompts, *arguments, **settings)

    def sweep(self, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        return self._logged(super().sweep, prompts, *arguments, **settings)


def open_logged(model: str, load: Mapping[str, Any]) -> LoggedEngine:
    """Open the engine; ``load`` also says ``log`` and ``dies_after``."""
    load = dict(load)
    log, dies_after = load.pop("log"), load.pop("dies_after", None)
    return LoggedEngine(load_model(model, **load), log, dies_after)


def finished(log: Path) -> list[int]:
    """Give the number of prompts of each finished call."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def was_killed(log: Path) -> bool:
    """Tell whether a worker has killed itself."""
    return log.with_suffix(".killed").exists()
