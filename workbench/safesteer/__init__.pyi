from .calibration import Calibration, Limits, Round, calibrate, in_words, plan_rounds
from .conditions import behind_gate, condition_of, controls, for_everyone, gate_site, main_setting
from .config import PRESETS, AnswerSettings, RunConfig, config_from
from .constructions import CONSTRUCTIONS, Construction, Measured, fit_all, measure, signs_of
from .inputs import Job, folds_of, limits_of, load_job, load_run_model
from .own_answers import answer_pairs, instructed, kept_by, self_contrast, went_along
from .paper import contrasted, places_of, settings_of
from .recalibration import recalibrate
from .recipe import run
from .run_folder import RunFolder, SavedRun, read_run, saved_vectors
from .saved_run import (
    GateReading,
    chosen_settings,
    decoding_from,
    evaluation_from,
    gate_from,
    gate_reading,
    gated_steering_from,
    side_by_side,
    steering_from,
)
from .settings import Setting, Vectors, grid, placements, steering

__all__ = [
    "CONSTRUCTIONS",
    "PRESETS",
    "AnswerSettings",
    "Calibration",
    "Construction",
    "GateReading",
    "Job",
    "Limits",
    "Measured",
    "Round",
    "RunConfig",
    "RunFolder",
    "SavedRun",
    "Setting",
    "Vectors",
    "answer_pairs",
    "behind_gate",
    "calibrate",
    "chosen_settings",
    "condition_of",
    "config_from",
    "contrasted",
    "controls",
    "decoding_from",
    "evaluation_from",
    "fit_all",
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
    "load_job",
    "load_run_model",
    "main_setting",
    "measure",
    "placements",
    "places_of",
    "plan_rounds",
    "read_run",
    "recalibrate",
    "run",
    "saved_vectors",
    "self_contrast",
    "settings_of",
    "side_by_side",
    "signs_of",
    "steering",
    "steering_from",
    "went_along",
]
