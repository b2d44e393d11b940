"""Bake steering into a checkpoint: a constant vector becomes the bias of a projection.

What is added to the output of attention is the bias of its last projection, and in models without
a norm behind the MLP what is added to a block's output is the bias of the MLP's last projection.
The checkpoint then steers wherever transformers loads it, without any code.
"""

from __future__ import annotations

import copy
import gc
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.export.additions import Additions, Exported, constant_additions, strength_notes
from workbench.export.modules import module_of
from workbench.files.store import local_path, write_json
from workbench.models.checkpoints import Placement, find_checkpoint, read_checkpoint, read_config
from workbench.models.hooked_model import input_device
from workbench.models.load import DTYPES, hooked
from workbench.models.quiet import quiet_transformers
from workbench.models.sites import Site
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.files.store import PathLike
    from workbench.steering.interventions import Intervention


FLAGS = {"attn_out": "attention_bias", "mlp_out": "mlp_bias"}
"""Entries of a configuration that give a part of every block biases, in the families that have
them."""

PROJECTIONS = (
    "o_proj",
    "down_proj",
    "c_proj",
    "dense",
    "dense_4h_to_h",
    "out_proj",
    "fc2",
    "fc_out",
)
"""Names of the last projection of attention and of an MLP."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Difference to workbench's logits that rounding explains, relative to the largest logit."""

_PROBE = "Tell me how a garden, a bicycle and a locked door differ, in two short sentences."
_OTHERS = "export it as pytorch, gguf, easysteer or vllm-lens instead"


def bake_weights(
    folder: PathLike,
    interventions: Sequence[Intervention],
    name_or_path: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
) -> Exported:
    """Save a checkpoint that is steered by its own biases.

    Its logits on a text are compared with those of workbench's steering before it is kept; where
    they differ by more than rounding it is not written. Embedding and unembedding stay tied where
    they were, and no other weight is changed; biases that had to be made, because a configuration
    gives them to a part of all blocks or to none, are zero.

    Args:
        folder: A new folder for the checkpoint.
        interventions: Constant additions to every token, at attn_out, mlp_out, resid_post, or
            resid_pre but of block 0.
        name_or_path: The model they were measured on, as ``load_model`` takes it.
        dtype: Data type of the weights; by default that of the model the vectors are of.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        ValueError: If an intervention is no constant, the architecture has no such bias or a norm
            behind it, the model is quantised, the folder is there, or logits differ.
    """
    folder = local_path(folder)
    if folder.exists():
        raise ValueError(f"{str(folder)!r} is there already; give a new folder.")
    additions = constant_additions(interventions, "a checkpoint")
    dtype = dtype or additions.model.dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; dtypes: {', '.join(DTYPES)}.")
    source, name = find_checkpoint(name_or_path, revision)
    config = read_config(source, revision)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name!r} is quantised, and its projections have no plain biases.")
    placement = Placement(DTYPES[dtype], torch.device("cpu"))
    biases, tokens, expected = _reference(
        interventions, additions, (source, name), config, placement, revision
    )
    steered_config = _with_biases(config, biases)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        _write(part, source, steered_config, biases, placement, revision)
        _check_logits(part, tokens, expected, dtype)
        write_json(part / "steering.json", _record(additions, biases, name))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    use = (
        f"transformers loads it as any checkpoint; {len(biases)} biases hold the steering "
        "(steering.json lists them). There is no strength to set: it steers every token, always."
    )
    return Exported((folder,), (use, *strength_notes(additions)))


def _reference(
    interventions: Sequence[Intervention],
    additions: Additions,
    checkpoint: tuple[str | Path, str],
    config: Any,
    placement: Placement,
    revision: str | None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Steer the model as workbench does: the biases by name, the tokens of a text, its logits."""
    source, name = checkpoint
    hf_model, tokenizer = read_checkpoint(source, config, placement, revision)
    linears = {
        n for n, m in hf_model.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2
    }
    model = hooked(hf_model, tokenizer, name, packing="off")
    tokens = torch.tensor([tokenizer(_PROBE)["input_ids"]], device=input_device(model))
    with torch.no_grad(), intervene(model, interventions):  # checks that the vectors fit the model
        expected = model(tokens)[0].float().cpu()
    biases: dict[str, torch.Tensor] = {}
    for given, vector in additions.at.items():
        site = _projection_site(given)
        projection = _projection(module_of(model, site).module, linears, given, name)
        biases[projection] = biases.get(projection, torch.zeros_like(vector)) + vector
    del model, hf_model
    gc.collect()  # one model in memory at a time
    return biases, tokens.cpu(), expected


def _projection_site(site: Site) -> Site:
    """Give the part of a block whose last projection can hold what is added at a site.

    Raises:
        ValueError: If there is none.
    """
    if site.kind in FLAGS:
        return site
    layer = site.layer if site.kind == "resid_post" else site.layer - 1
    if layer < 0:
        raise ValueError(
            f"{site} is the embedding, which may be tied to the unembedding: a vector added to it "
            f"would change both; {_OTHERS}, or steer at a later block."
        )
    return Site(layer, "mlp_out")


def _projection(module: str, linears: set[str], site: Site, name: str) -> str:
    """Find the last projection of attention or of an MLP.

    Raises:
        ValueError: If a norm stands behind it, or it is not found.
    """
    found = [f"{module}.{last}" for last in PROJECTIONS if f"{module}.{last}" in linears]
    if len(found) != 1:
        raise ValueError(
            f"{name!r} has no projection whose bias would be added at {site} as it is (a norm or "
            f"something else stands behind {module}); {_OTHERS}."
        )
    return found[0]


def _with_biases(config: Any, biases: dict[str, torch.Tensor]) -> Any:
    """Change a configuration so that the projections have biases, where it can be changed.

    Raises:
        ValueError: If transformers builds this architecture without them.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    missing = list(biases)
    for flag in (None, *FLAGS.values()):  # as it is; then with biases of one part, of both
        if flag is not None:
            if not hasattr(config, flag) or getattr(config, flag):
                continue
            if not any(_is_of(flag, projection) for projection in missing):
                continue
            setattr(config, flag, True)
        with torch.device("meta"), quiet_transformers():
            shell: Any = AutoModelForCausalLM.from_config(config)
        missing = [p for p in biases if getattr(shell.get_submodule(p), "bias", None) is None]
    if missing:
        raise ValueError(
            f"transformers builds {config.model_type!r} without a bias at {missing[0]!r}, so that "
            f"its checkpoint cannot hold the vector; {_OTHERS}."
        )
    return config


def _is_of(flag: str, projection: str) -> bool:
    """Tell whether a projection belongs to the part of a block that a flag is for."""
    is_attention = any("attn" in part or "attention" in part for part in projection.split("."))
    return is_attention == (flag == FLAGS["attn_out"])


def _write(
    folder: Path,
    source: str | Path,
    config: Any,
    biases: dict[str, torch.Tensor],
    placement: Placement,
    revision: str | None,
) -> None:
    """Load the plain model with the new configuration, set its biases and save it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safely: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=placement.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **safely,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **safely)
    model, loading = loaded
    wrong = [key for key in loading["missing_keys"] if not key.endswith(".bias")]
    if wrong or loading["unexpected_keys"]:
        left = sorted({*wrong, *loading["unexpected_keys"]})
        raise ValueError(
            f"with biases the checkpoint does not fit its model ({left[0]}); {_OTHERS}."
        )
    with torch.no_grad():
        for key in loading["missing_keys"]:  # transformers may leave any numbers there
            model.get_parameter(key).zero_()
        for projection, vector in biases.items():
            bias = model.get_submodule(projection).bias
            bias.copy_((bias.float() + vector).to(bias.dtype))
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_logits(folder: Path, tokens: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    """Load what was written, and compare its logits with workbench's.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, attn_implementation="eager"
        ).eval()
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE[dtype]:
        raise ValueError(
            f"the baked checkpoint's logits differ from workbench's by {difference:.2g} of the "
            f"largest, more than rounding does, so that it is not kept; {_OTHERS}."
        )


def _record(additions: Additions, biases: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Describe what was baked, for steering.json."""
    return {
        "format": "workbench baked steering 1",
        "model": name,
        "fingerprint": additions.model.fingerprint,
        "sign": "from unsafe to safe",
        "labels": list(additions.labels),
        "sites": {str(site): float(vector.norm()) for site, vector in additions.at.items()},
        "biases": {key: float(vector.norm()) for key, vector in biases.items()},
    }
