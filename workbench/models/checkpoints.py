"""Find a checkpoint and read it with transformers; what cannot be read is one clear line.

Only safetensors and JSON are opened: never a pickle, never a checkpoint's own code.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.files.hints import did_you_mean, one_line
from workbench.models.gguf import converted_folder
from workbench.models.hooked_model import quantization
from workbench.models.packaged import EMBEDDED, PACKAGED, packaged_folder
from workbench.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


INT8 = "int8"
"""The way to quantise that needs the processor and torch alone, see ``int8``."""


QUANTIZE = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True}, INT8: {}}
"""Ways to quantise while loading, with bitsandbytes's own words for those that are its own."""


_ALLOWED = "give a hub name, a local folder, a .gguf file, or nothing for the embedded model"


_NEEDED = "a causal language model with safetensors weights, config.json and a tokenizer is needed"


_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Placement:
    """Say in which precision weights are read, and onto which devices.

    Attributes:
        dtype: Data type; None for the checkpoint's own.
        device: Where everything goes, unless ``device_map`` says otherwise.
        device_map: How layers are spread over devices, in the words of accelerate.
        max_memory: Largest share of each device.
        quantize: One of ``QUANTIZE``, or None.
    """

    dtype: torch.dtype | None
    device: torch.device
    device_map: str | Mapping[str, Any] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    quantize: str | None = None

    def keywords(self, config: Any) -> dict[str, Any]:
        """Give the arguments of transformers that read a checkpoint of this configuration."""
        keywords: dict[str, Any] = {"dtype": "auto" if self.dtype is None else self.dtype}
        if self.device_map is not None:
            whole = isinstance(self.device_map, str)
            keywords["device_map"] = self.device_map if whole else dict(self.device_map)  # type: ignore[arg-type]
            if self.max_memory is not None:
                keywords["max_memory"] = dict(self.max_memory)
        elif self.by_bitsandbytes or getattr(config, "quantization_config", None) is not None:
            keywords["device_map"] = {"": self.device}  # packed weights cannot be moved afterwards
        if self.by_bitsandbytes:
            from transformers import BitsAndBytesConfig

            compute: dict[str, Any] = {}
            if self.quantize == "4bit":
                compute = {
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_compute_dtype": self.dtype or getattr(config, "dtype", None),
                }
            keywords["quantization_config"] = BitsAndBytesConfig(
                **QUANTIZE[str(self.quantize)], **compute
            )
        return keywords

    @property
    def by_bitsandbytes(self) -> bool:
        """Tell whether bitsandbytes quantises the weights."""
        return self.quantize not in (None, INT8)

    @property
    def on_processor(self) -> bool:
        """Tell whether all weights go to the processor."""
        return self.device.type == "cpu" and self.device_map is None


def find_checkpoint(name_or_path: str | Path, revision: str | None) -> tuple[str | Path, str]:
    """Find the checkpoint of a model: where transformers reads it, and its name in results.

    Raises:
        ValueError: If there is none, or what is there cannot be a checkpoint.
    """
    if not str(name_or_path).strip():
        raise ValueError(f"no model {str(name_or_path)!r}; {_ALLOWED}.")
    path = _expanded(name_or_path)
    is_gguf, is_folder = path.suffix.lower() == ".gguf", path.is_dir()
    packaged = PACKAGED.get(str(name_or_path))
    if is_folder and name_or_path != EMBEDDED:  # a folder of the same name is what was meant
        packaged = None
    if revision is not None and (packaged or is_gguf or is_folder):
        raise ValueError(
            f"revision {revision!r} of a model that is not on the hub ({str(name_or_path)!r}); "
            "leave it out."
        )
    if packaged is not None:
        return packaged_folder(str(name_or_path)), packaged.name
    if is_gguf:
        if not path.is_file():
            raise ValueError(
                f"no model file {str(name_or_path)!r}; give a .gguf file, a folder, or a hub name."
            )
        return converted_folder(path), path.name
    if is_folder:
        check_folder(path)
        return path, path.resolve().name
    if path.is_file():
        raise ValueError(
            f"{str(name_or_path)!r} is a file that is no .gguf; give the folder it lies in, with "
            "its config.json and tokenizer."
        )
    name = str(name_or_path)
    on_hub_or_cached(name, revision, explain=True)
    return name, name


def _expanded(name_or_path: str | Path) -> Path:
    """Put the user's home folder for a ``~`` at the beginning."""
    try:
        return Path(name_or_path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no model {str(name_or_path)!r}: {one_line(error)}.") from error


def check_folder(folder: Path) -> None:
    """Raise where a folder cannot be a checkpoint that is read here, with what to do.

    Raises:
        ValueError: If it holds no config.json, an adapter, only pickles, or not all its weights.
    """
    shown, names = folder.resolve().name, sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        raise ValueError(
            f"cannot load {shown!r}: it is an adapter{_base_of(folder)}, not a whole model; merge "
            "it into its model with PEFT (merge_and_unload), save that, and load its folder."
        )
    if "config.json" not in names:
        ggufs = [name for name in names if name.lower().endswith(".gguf")]
        found = f"give one of its files: {', '.join(ggufs[:3])}" if ggufs else _NEEDED
        raise ValueError(f"cannot load {shown!r} (it has no config.json); {found}.")
    config = _json_object(folder / "config.json", shown)
    if not any(isinstance(config.get(key), str) for key in ("model_type", "_name_or_path")):
        raise ValueError(f"cannot load {shown!r} (its config.json has no model_type); {_NEEDED}.")
    if any(name.endswith(".safetensors") for name in names):
        if "model.safetensors" not in names and "model.safetensors.index.json" in names:
            _check_shards(folder, shown)
        return
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise ValueError(
            f"cannot load {shown!r}: its weights are pickles ({pickles[0]}), which can run code "
            "when they are opened and never are here; save it as safetensors with transformers "
            "where you trust it (from_pretrained, then save_pretrained), or take another copy."
        )
    raise ValueError(f"cannot load {shown!r} (there are no weights in it); {_NEEDED}.")


def _base_of(folder: Path) -> str:
    """Name the model that an adapter belongs to, in words; nothing where it does not say."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        name = base["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of {Path(name).name!r}" if isinstance(name, str) and name else ""


def _json_object(path: Path, shown: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint that holds an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot load {shown!r} ({path.name} is not valid JSON: {one_line(error)}); {_NEEDED}."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"cannot load {shown!r} ({path.name} holds no JSON object); {_NEEDED}.")
    return value


def _check_shards(folder: Path, shown: str) -> None:
    """Raise where the index of a checkpoint names files that are not there."""
    index = _json_object(folder / "model.safetensors.index.json", shown).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(
            f"cannot load {shown!r} (model.safetensors.index.json has no weight_map); {_NEEDED}."
        )
    missing = sorted({name for name in index.values() if not (folder / name).is_file()})
    if missing:
        raise ValueError(
            f"cannot load {shown!r}: {len(missing)} of its weight files are missing "
            f"({missing[0]}); download it again."
        )


def read_config(source: str | Path, revision: str | None) -> Any:
    """Read the configuration of a checkpoint with transformers.

    Raises:
        ValueError: If it cannot be read, in one line.
    """
    from transformers import AutoConfig

    with _in_one_line(_shown(source)), quiet_transformers():
        return AutoConfig.from_pretrained(source, **_safely(revision))


def _shown(source: str | Path) -> str:
    return Path(source).name if Path(source).is_dir() else str(source)


def _safely(revision: str | None) -> dict[str, Any]:
    """Give the arguments of every call that reads from a checkpoint.

    That its own code is not run is said outright: left out, transformers would ask on the terminal.
    """
    return {"revision": revision or "main", "trust_remote_code": False}


def read_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint with transformers.

    Raises:
        ValueError: If it cannot be read, in one line.
    """
    from transformers import AutoTokenizer

    with _in_one_line(_shown(source)), quiet_transformers():
        return AutoTokenizer.from_pretrained(source, **_safely(revision))


def read_checkpoint(
    source: str | Path, config: Any, placement: Placement, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read model and tokenizer: safetensors only, never remote code, no weight left at random.

    Args:
        source: A hub name or a folder.
        config: Its configuration (``read_config``).
        placement: In which precision, and where to.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        ValueError: If it cannot be read, in one line, whatever the libraries below raise.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown, packed = _shown(source), quantization(config)
    if packed is not None and placement.quantize is not None:
        raise ValueError(f"{shown!r} is quantised already ({packed}); leave out quantize.")
    with _in_one_line(shown), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, **_safely(revision))
        # Eager attention is the one whose scores and patterns TransformerLens can hook.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **placement.keywords(config),
            **_safely(revision),
        )
    hf_model, loading = loaded
    for name, stored, wanted in sorted(loading["mismatched_keys"]):
        raise ValueError(
            f"cannot load {shown!r}: {name} has shape {tuple(stored)}, its config.json wants "
            f"{tuple(wanted)}; the two belong to different models."
        )
    if loading["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"cannot load {shown!r}: {len(missing)} weights are missing ({missing[0]} ...); its "
            "files are incomplete, or its config.json belongs to another model."
        )
    if unused := sorted(loading["unexpected_keys"]):
        warnings.warn(
            f"{shown!r}: {len(unused)} weights of the checkpoint are not used ({unused[0]} ...), "
            "so the model may not be the one that was trained; compare its config.json.",
            stacklevel=4,
        )
    if (packed := quantization(hf_model.config)) and getattr(
        hf_model, "hf_quantizer", None
    ) is None:
        raise ValueError(
            f"cannot load {shown!r} (its config.json says that weights are packed by {packed}, "
            "which this transformers does not read); give the unquantised checkpoint."
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made up where its files are missing
        raise ValueError(f"cannot load {shown!r} (its tokenizer has no words); {_NEEDED}.")
    return hf_model, tokenizer


@contextmanager
def _in_one_line(shown: str) -> Iterator[None]:
    """Turn what a library raises inside the block into one line that says what to do.

    Every kind of damage has an error of its own, from five libraries.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"cannot load {shown!r} ({one_line(error)}); {_what_to_do(error, shown)}."
        ) from error


def _what_to_do(error: Exception, shown: str) -> str:
    """Say what helps against an error that a library raised."""
    if isinstance(error, ImportError):
        return (
            "install what it names, or give the unquantised checkpoint or a .gguf file of the "
            "same model"
        )
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "give dtype='bfloat16', quantize='4bit' or device_map='auto', or a smaller model"
    if "gguf" in shown.lower():
        return "of a repository of GGUF files download one, and give its path"
    return _NEEDED


def check_quantize(quantize: str | None) -> None:
    """Raise where weights cannot be quantised as asked, before anything is read.

    Raises:
        ValueError: If the way is unknown, or bitsandbytes is not installed.
    """
    if quantize is None:
        return
    if quantize not in QUANTIZE:
        raise ValueError(
            f"unknown way to quantize {quantize!r}; allowed: {', '.join(QUANTIZE)}, or nothing."
            f"{did_you_mean(str(quantize), QUANTIZE)}"
        )
    if quantize != INT8 and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantize={quantize!r} needs the package bitsandbytes; run "
            "'pip install \"workbench[quantized]\"', or leave it out."
        )


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

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return True
        HfApi().model_info(name, revision=revision, timeout=5)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        if explain:
            at = f" at revision {revision!r}" if revision else ""
            raise ValueError(
                f"no model {name!r}{at}: no such folder here and none on the hub; {_ALLOWED}."
            ) from error
        return False
    except Exception as error:  # every network library has its own family of connection errors
        if explain:
            raise ValueError(
                f"no model {name!r}: no such folder here, and the hub cannot be reached "
                f"({type(error).__name__}); {_ALLOWED}."
            ) from error
        return False
    return True
