from .capability import multiple_choice, text_perplexity
from .comparisons import compare, judge_agreement, leakage_conditions, leakage_matrix
from .gating import (
    activation_rates,
    beside_a_gate,
    cells,
    confusion,
    opened_for,
    refusing,
    roc,
)
from .questions import Question, read_questions
from .scoring import Evaluation, evaluate, safety_wording, score_completions

__all__ = [
    "Evaluation",
    "Question",
    "activation_rates",
    "beside_a_gate",
    "cells",
    "compare",
    "confusion",
    "evaluate",
    "judge_agreement",
    "leakage_conditions",
    "leakage_matrix",
    "multiple_choice",
    "opened_for",
    "read_questions",
    "refusing",
    "roc",
    "safety_wording",
    "score_completions",
    "text_perplexity",
]
