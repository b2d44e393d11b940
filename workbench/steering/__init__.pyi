from .apply import GateState, Steering, intervene
from .combine import own_part, pooled, summed, without
from .edits import AblateDirection, AddVector, ClampNeurons, RaiseTo, ScaleNeurons
from .estimators import (
    mean_difference,
    principal_direction,
    probe_direction,
    pruned_mean_difference,
)
from .foreign_vectors import import_vectors
from .from_texts import steering_vector
from .gates import Gate, fit_gate, load_gate, save_gate
from .interventions import (
    Intervention,
    ablate_direction,
    activate,
    add_vector,
    clamp_neurons,
    decayed,
    gated,
    raise_to,
    scale_neurons,
    suppress,
)
from .separability import layer_separability
from .stepwise import calibrate_over_answers, highest_scores
from .vectors import (
    SteeringVector,
    fit_steering_vectors,
    load_vector,
    random_vector,
    save_vector,
    scaled_to,
    shuffled_vector,
    with_safe_projection,
)

__all__ = [
    "AblateDirection",
    "AddVector",
    "ClampNeurons",
    "Gate",
    "GateState",
    "Intervention",
    "RaiseTo",
    "ScaleNeurons",
    "Steering",
    "SteeringVector",
    "ablate_direction",
    "activate",
    "add_vector",
    "calibrate_over_answers",
    "clamp_neurons",
    "decayed",
    "fit_gate",
    "fit_steering_vectors",
    "gated",
    "highest_scores",
    "import_vectors",
    "intervene",
    "layer_separability",
    "load_gate",
    "load_vector",
    "mean_difference",
    "own_part",
    "pooled",
    "principal_direction",
    "probe_direction",
    "pruned_mean_difference",
    "raise_to",
    "random_vector",
    "save_gate",
    "save_vector",
    "scale_neurons",
    "scaled_to",
    "shuffled_vector",
    "steering_vector",
    "summed",
    "suppress",
    "with_safe_projection",
    "without",
]
