from .blind import blind_sample, read_blind
from .capability import multiple_choice, text_perplexity
from .comparisons import compare, judge_agreement, leakage_conditions, leakage_matrix
from .correction import bounded, corrected
from .gating import (
    activation_rates,
    beside_a_gate,
    cells,
    confusion,
    opened_for,
    refusing,
    roc,
    wrapping_rates,
)
from .metrics import safety_wording
from .questions import Question, read_questions
from .references import corpus_bleu
from .result import Evaluation
from .scoring import evaluate, score_completions

__all__ = [
    "Evaluation",
    "Question",
    "activation_rates",
    "beside_a_gate",
    "blind_sample",
    "bounded",
    "cells",
    "compare",
    "confusion",
    "corpus_bleu",
    "corrected",
    "evaluate",
    "judge_agreement",
    "leakage_conditions",
    "leakage_matrix",
    "multiple_choice",
    "opened_for",
    "read_blind",
    "read_questions",
    "refusing",
    "roc",
    "safety_wording",
    "score_completions",
    "text_perplexity",
    "wrapping_rates",
]
