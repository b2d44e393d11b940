from .calibration import front
from .gates import gate_confusion, gate_rates, gate_roc, heat_map
from .neuron_maps import layer_scores, neuron_map
from .notebook import Html, Picture, script_safe, show, token_scores
from .results import evaluation, separability, tuning
from .style import Panels, check_table, name_in_words, of_category, plain_label, styled
from .wording import (
    Metric,
    gate_lines,
    in_order,
    interval,
    is_control,
    listed,
    main_metrics,
    metric,
    number,
    p_value,
    short_sites,
    visible,
)

__all__ = [
    "Html",
    "Metric",
    "Panels",
    "Picture",
    "check_table",
    "evaluation",
    "front",
    "gate_confusion",
    "gate_lines",
    "gate_rates",
    "gate_roc",
    "heat_map",
    "in_order",
    "interval",
    "is_control",
    "layer_scores",
    "listed",
    "main_metrics",
    "metric",
    "name_in_words",
    "neuron_map",
    "number",
    "of_category",
    "p_value",
    "plain_label",
    "script_safe",
    "separability",
    "short_sites",
    "show",
    "styled",
    "token_scores",
    "tuning",
    "visible",
]
