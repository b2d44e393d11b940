from .attribution import (
    Attribution,
    class_difference,
    completeness_tolerance,
    direct_attribution,
    write_matrix,
    write_weights,
    writing_sites,
)
from .effects import NeuronEffect, effects_table, neuron_effect, rank_curve
from .heads import (
    HeadReference,
    head_interventions,
    head_reference,
    head_statistics,
)
from .outcomes import compare_with_controls
from .patching import (
    ActivationContrast,
    PatchingEffect,
    contrast_activations,
    patched_answers,
    patching_effect,
)
from .profiles import Example, Histogram, NeuronProfile, profile_neurons, random_neurons
from .ranking import NEURON_COLUMNS, attribute_heads, attribute_neurons
from .silencing import (
    Controls,
    NeuronReference,
    matched_controls,
    matching_statistics,
    neuron_interventions,
    neuron_reference,
)
from .splits import MlpGateSplit, head_sources, split_mlp_gate, writing_activations
from .summaries import (
    notable_neurons,
    overlap,
    overlap_against_chance,
    shared_neurons,
    stability,
    survivors,
)
from .weights import Vocabulary, WeightCosine, reading_site, vocabulary_of, weight_cosines

__all__ = [
    "NEURON_COLUMNS",
    "ActivationContrast",
    "Attribution",
    "Controls",
    "Example",
    "HeadReference",
    "Histogram",
    "MlpGateSplit",
    "NeuronEffect",
    "NeuronProfile",
    "NeuronReference",
    "PatchingEffect",
    "Vocabulary",
    "WeightCosine",
    "attribute_heads",
    "attribute_neurons",
    "class_difference",
    "compare_with_controls",
    "completeness_tolerance",
    "contrast_activations",
    "direct_attribution",
    "effects_table",
    "head_interventions",
    "head_reference",
    "head_sources",
    "head_statistics",
    "matched_controls",
    "matching_statistics",
    "neuron_effect",
    "neuron_interventions",
    "neuron_reference",
    "notable_neurons",
    "overlap",
    "overlap_against_chance",
    "patched_answers",
    "patching_effect",
    "profile_neurons",
    "random_neurons",
    "rank_curve",
    "reading_site",
    "shared_neurons",
    "split_mlp_gate",
    "stability",
    "survivors",
    "vocabulary_of",
    "weight_cosines",
    "write_matrix",
    "write_weights",
    "writing_activations",
    "writing_sites",
]
