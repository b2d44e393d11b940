from .calibration import front
from .gates import gate_confusion, gate_rates, gate_roc, heat_map
from .neuron_maps import layer_scores, neuron_map
from .notebook import Html, show, token_scores
from .results import evaluation, headline, separability, tuning

__all__ = [
    "Html",
    "evaluation",
    "front",
    "gate_confusion",
    "gate_rates",
    "gate_roc",
    "headline",
    "heat_map",
    "layer_scores",
    "neuron_map",
    "separability",
    "show",
    "token_scores",
    "tuning",
]
