from .answers import Completion, generate, sweep
from .likelihood import answer_kl, answer_log_probs, steered_log_probs

__all__ = [
    "Completion",
    "answer_kl",
    "answer_log_probs",
    "generate",
    "steered_log_probs",
    "sweep",
]
