from .api import ApiJudge, CostEstimate, Prices
from .base import Judge, Verdict
from .cache import CachedJudge, cached
from .framing import (
    FramingJudge,
    fit_framing,
    framing_judge_for,
    load_framing_judge,
    save_framing_judge,
)
from .guards import GuardFamily, GuardJudge, guard_families, load_guard
from .languages import language_name, language_of, other_language
from .patterns import (
    REFUSAL_LANGUAGES,
    RefusalPattern,
    RefusalPatterns,
    RefusalRules,
    load_refusal_rules,
)
from .probe import ProbeJudge, load_probe, save_probe, train_probe
from .rewards import RewardJudge, Rewards, load_reward_model
from .rubrics import Rubric, load_rubrics
from .text_quality import (
    bleu,
    distinct_n,
    garbage_share,
    is_degenerate,
    load_encoder,
    longest_loop,
    perplexity_from_log_probs,
    relevance,
    repetition,
    rouge_l,
    word_count,
)
from .validation import LabelledAnswers, known_answers, open_judge, read_labelled, validate

__all__ = [
    "REFUSAL_LANGUAGES",
    "ApiJudge",
    "CachedJudge",
    "CostEstimate",
    "FramingJudge",
    "GuardFamily",
    "GuardJudge",
    "Judge",
    "LabelledAnswers",
    "Prices",
    "ProbeJudge",
    "RefusalPattern",
    "RefusalPatterns",
    "RefusalRules",
    "RewardJudge",
    "Rewards",
    "Rubric",
    "Verdict",
    "bleu",
    "cached",
    "distinct_n",
    "fit_framing",
    "framing_judge_for",
    "garbage_share",
    "guard_families",
    "is_degenerate",
    "known_answers",
    "language_name",
    "language_of",
    "load_encoder",
    "load_framing_judge",
    "load_guard",
    "load_probe",
    "load_refusal_rules",
    "load_reward_model",
    "load_rubrics",
    "longest_loop",
    "open_judge",
    "other_language",
    "perplexity_from_log_probs",
    "read_labelled",
    "relevance",
    "repetition",
    "rouge_l",
    "save_framing_judge",
    "save_probe",
    "train_probe",
    "validate",
    "word_count",
]
