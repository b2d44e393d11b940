from .api import ApiJudge, CostEstimate, Prices
from .base import FRAMINGS, Judge, Verdict
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
from .local import LocalJudge, load_local_judge
from .opening import JudgeSettings, open_judge
from .overlap import bleu, bleu_counts, bleu_of_counts, rouge_l
from .patterns import (
    REFUSAL_LANGUAGES,
    RefusalPattern,
    RefusalPatterns,
    RefusalRules,
    load_refusal_rules,
)
from .probe import ProbeJudge, load_probe, save_probe, train_probe
from .refusal import (
    RefusalJudge,
    fit_refusal_judge,
    load_refusal_judge,
    save_refusal_judge,
)
from .rewards import RewardJudge, Rewards, load_reward_model
from .rubrics import Rubric, load_rubrics
from .text_quality import (
    distinct_n,
    garbage_share,
    is_degenerate,
    load_encoder,
    longest_loop,
    perplexity_from_log_probs,
    relevance,
    repetition,
    word_count,
)
from .validation import LabelledAnswers, known_answers, read_labelled, validate

__all__ = [
    "FRAMINGS",
    "REFUSAL_LANGUAGES",
    "ApiJudge",
    "CachedJudge",
    "CostEstimate",
    "FramingJudge",
    "GuardFamily",
    "GuardJudge",
    "Judge",
    "JudgeSettings",
    "LabelledAnswers",
    "LocalJudge",
    "Prices",
    "ProbeJudge",
    "RefusalJudge",
    "RefusalPattern",
    "RefusalPatterns",
    "RefusalRules",
    "RewardJudge",
    "Rewards",
    "Rubric",
    "Verdict",
    "bleu",
    "bleu_counts",
    "bleu_of_counts",
    "cached",
    "distinct_n",
    "fit_framing",
    "fit_refusal_judge",
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
    "load_local_judge",
    "load_probe",
    "load_refusal_judge",
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
    "save_refusal_judge",
    "train_probe",
    "validate",
    "word_count",
]
