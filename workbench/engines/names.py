"""Name the engines, and say what one cannot do; nothing heavy is imported."""

from __future__ import annotations

ENGINES = ("local", "vllm", "ray")
"""Names of engines that a run knows."""


class EngineCannot(ValueError):  # noqa: N818 - it says what it is where it is caught
    """Say that an engine cannot do what was asked of it, and which engine can.

    It is raised before anything starts.
    """

    def __init__(self, engine: str, what: str, instead: str = "local") -> None:
        super().__init__(f"engine {engine!r} cannot {what}; engine {instead!r} can.")
