from .answers import UNSTEERED, Completion, Condition, generate, sweep
from .decoding import GREEDY, Decoding
from .likelihood import answer_kl, answer_log_probs, steered_log_probs

__all__ = [
    "GREEDY",
    "UNSTEERED",
    "Completion",
    "Condition",
    "Decoding",
    "answer_kl",
    "answer_log_probs",
    "generate",
    "steered_log_probs",
    "sweep",
]
