from .base import Engine, LocalEngine
from .beside import Beside
from .names import ENGINES, EngineCannot
from .opening import open_engine
from .vllm import VLLMEngine, open_vllm

__all__ = [
    "ENGINES",
    "Beside",
    "Engine",
    "EngineCannot",
    "LocalEngine",
    "VLLMEngine",
    "open_engine",
    "open_vllm",
]
