from .base import Engine, EngineCannot, LocalEngine

__all__ = [
    "Engine",
    "EngineCannot",
    "LocalEngine",
]
