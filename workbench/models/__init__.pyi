from .activation_caches import activations_from_cache, as_activation_cache
from .activations import (
    ActivationSet,
    ClassMoments,
    cache_activations,
    class_moments,
    token_activations,
)
from .batches import Batch, pad, span_mask
from .errors import CannotBeDone
from .forward import fast, last_logits, plain, reading, without_shared_prefix
from .hooked_model import HookedModel
from .load import LoadNotes, ModelInfo, hooked, load_model, load_notes, model_info
from .packaged import is_installed
from .packing import Packing, is_packed, pack_linears, unpacked
from .shell import load_shell
from .site_names import as_sites
from .sites import Site, check_sites, present_sites, sites_of_kind
from .templates import asked_as, asked_by
from .thoughts import ThoughtReader, answer_of
from .tokens import (
    Encoded,
    answer_ids,
    decode,
    encode,
    has_chat_template,
    pad_id,
    stop_ids,
    template_text,
    token_ids,
    token_strings,
)
from .trusted_paths import untrusted_paths

__all__ = [
    "ActivationSet",
    "Batch",
    "CannotBeDone",
    "ClassMoments",
    "Encoded",
    "HookedModel",
    "LoadNotes",
    "ModelInfo",
    "Packing",
    "Site",
    "ThoughtReader",
    "activations_from_cache",
    "answer_ids",
    "answer_of",
    "as_activation_cache",
    "as_sites",
    "asked_as",
    "asked_by",
    "cache_activations",
    "check_sites",
    "class_moments",
    "decode",
    "encode",
    "fast",
    "has_chat_template",
    "hooked",
    "is_installed",
    "is_packed",
    "last_logits",
    "load_model",
    "load_notes",
    "load_shell",
    "model_info",
    "pack_linears",
    "pad",
    "pad_id",
    "plain",
    "present_sites",
    "reading",
    "sites_of_kind",
    "span_mask",
    "stop_ids",
    "template_text",
    "token_activations",
    "token_ids",
    "token_strings",
    "unpacked",
    "untrusted_paths",
    "without_shared_prefix",
]
