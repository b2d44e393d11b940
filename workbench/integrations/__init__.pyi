from .inspect_ai import SteeredModel
from .lm_eval import SteeredLM

__all__ = [
    "SteeredLM",
    "SteeredModel",
]
