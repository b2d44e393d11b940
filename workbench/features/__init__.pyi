from .activations import FeatureSet, cache_features
from .attribution import FEATURE_COLUMNS, attribute_features
from .sae import SparseAutoencoder, load_sae
from .silencing import (
    FeatureEdit,
    feature_effect,
    feature_interventions,
    feature_vector,
    matched_features,
)

__all__ = [
    "FEATURE_COLUMNS",
    "FeatureEdit",
    "FeatureSet",
    "SparseAutoencoder",
    "attribute_features",
    "cache_features",
    "feature_effect",
    "feature_interventions",
    "feature_vector",
    "load_sae",
    "matched_features",
]
