from .calibration import Calibration, Limits, Round, calibrate, cost, in_words, plan_rounds
from .conditions import behind_gate, condition_of, controls, for_everyone, gate_site, main_setting
from .config import RunConfig, config_from
from .constructions import Measured, attributed_site, constructions_of, fit_all, fitted_on, measure
from .inputs import folds_of, limits_of, load_run_model
from .own_answers import answer_pairs, instructed, kept_by, self_contrast, went_along
from .recalibration import recalibrate, saved_vectors
from .recipe import describe, run
from .run_folder import RunFolder, read_run
from .saved_run import (
    GateReading,
    chosen_settings,
    gate_from,
    gate_reading,
    gated_steering_from,
    side_by_side,
    steering_from,
)
from .settings import Setting, grid, placements, steering

__all__ = [
    "Calibration",
    "GateReading",
    "Limits",
    "Measured",
    "Round",
    "RunConfig",
    "RunFolder",
    "Setting",
    "answer_pairs",
    "attributed_site",
    "behind_gate",
    "calibrate",
    "chosen_settings",
    "condition_of",
    "config_from",
    "constructions_of",
    "controls",
    "cost",
    "describe",
    "fit_all",
    "fitted_on",
    "folds_of",
    "for_everyone",
    "gate_from",
    "gate_reading",
    "gate_site",
    "gated_steering_from",
    "grid",
    "in_words",
    "instructed",
    "kept_by",
    "limits_of",
    "load_run_model",
    "main_setting",
    "measure",
    "placements",
    "plan_rounds",
    "read_run",
    "recalibrate",
    "run",
    "saved_vectors",
    "self_contrast",
    "side_by_side",
    "steering",
    "steering_from",
    "went_along",
]
