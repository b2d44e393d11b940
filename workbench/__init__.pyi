from .evaluation import gating as gate_report
from .evaluation.capability import multiple_choice, read_questions, text_perplexity
from .evaluation.comparisons import compare, judge_agreement, leakage_conditions, leakage_matrix
from .evaluation.scoring import Evaluation, evaluate, score_completions
from .figures import gates as steering_pictures
from .figures import results as visuals
from .figures.notebook import show, token_scores
from .generation.answers import Completion, generate, sweep
from .generation.likelihood import answer_kl, answer_log_probs, steered_log_probs
from .judges import text_quality
from .judges.base import Verdict
from .judges.framing import FramingJudge, load_framing_judge
from .judges.patterns import RefusalPatterns
from .models.activations import ActivationSet, ClassMoments, cache_activations, class_moments, token_activations
from .models.forward import plain
from .models.load import ModelInfo, load_model, model_info
from .models.sites import Site, sites_of_kind
from .models.tokens import encode, token_strings
from .neurons import effects as neuron_effects
from .neurons import patching
from .neurons import profiles as neuron_profiles
from .neurons import summaries as neuron_tables
from .neurons.ranking import attribute_heads, attribute_neurons
from .prompts.benchmarks import list_datasets, prompts_from, read_dataset
from .prompts.openings import answer_prompts
from .prompts.prompt import Folds, Prompt, categories_of, load_prompts, save_prompts, select_prompts, split_prompts
from .report.page import write_report
from .safesteer.calibration import Limits, calibrate, plan_rounds
from .safesteer.config import RunConfig
from .safesteer.own_answers import answer_pairs, instructed, self_contrast, went_along
from .safesteer.recalibration import recalibrate
from .safesteer.recipe import run
from .safesteer.saved_run import gate_from, gated_steering_from, read_gate, side_by_side, steering_from
from .safesteer.settings import Setting, grid
from .stats import estimates as statistics
from .stats import selectivity
from .steering import combine as directions
from .steering import estimators
from .steering.apply import intervene
from .steering.estimators import mean_difference, pruned_mean_difference
from .steering.gates import Gate, fit_gate, load_gate, save_gate
from .steering.interventions import (
    Intervention,
    ablate_direction,
    activate,
    add_vector,
    clamp_neurons,
    gated,
    raise_to,
    scale_neurons,
    suppress,
)
from .steering.separability import layer_separability
from .steering.vectors import (
    SteeringVector,
    fit_steering_vectors,
    load_vector,
    random_vector,
    save_vector,
    scaled_to,
    shuffled_vector,
)

__version__: str
__all__: list[str]
