from .additions import Additions, Exported, constant_additions
from .baked_weights import bake_weights
from .control_vectors import export_gguf, export_svec
from .from_run import RunNumbers, Strength, run_numbers, run_strengths
from .hub import pull_vectors, push_vectors
from .python_libraries import export_lm_eval, export_steering_vectors
from .pytorch_hooks import export_pytorch
from .request_json import easysteer_request, vllm_lens_request

__all__ = [
    "Additions",
    "Exported",
    "RunNumbers",
    "Strength",
    "bake_weights",
    "constant_additions",
    "easysteer_request",
    "export_gguf",
    "export_lm_eval",
    "export_pytorch",
    "export_steering_vectors",
    "export_svec",
    "pull_vectors",
    "push_vectors",
    "run_numbers",
    "run_strengths",
    "vllm_lens_request",
]
