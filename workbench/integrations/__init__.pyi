from .inspect_ai import SteeredModel, workbench
from .lm_eval import SteeredLM

__all__ = [
    "SteeredLM",
    "SteeredModel",
    "workbench",
]
