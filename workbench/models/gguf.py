"""Convert GGUF files to safetensors checkpoints, once, into the user's cache folder.

The weights are dequantised tensor by tensor, so that the whole model is never in memory. Names and
layouts are transformers' own, and so are the numbers, bit by bit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.files.hints import one_line
from workbench.files.store import file_checksum, write_json
from workbench.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


SHARD_BYTES = 512 * 2**20
"""Weights that are gathered before they are written to a file of their own."""


def converted_folder(gguf_file: Path) -> Path:
    """Return the folder with the safetensors conversion of a GGUF file.

    The first call converts it, which takes tens of seconds.

    Raises:
        ValueError: If the file is damaged or of an architecture that cannot be read.
    """
    return cached_checkpoint(
        gguf_file.stem, file_checksum(gguf_file), lambda folder: convert(gguf_file, folder)
    )


def cached_checkpoint(name: str, checksum: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of a converted checkpoint in the user's cache folder.

    It is named after the checksum of what it was made from, and appears only when it is complete.

    Args:
        name: The beginning of the folder's name.
        checksum: SHA-256 of the file that is converted.
        write: Writes the checkpoint into the folder it is given, if there is none yet.
    """
    import platformdirs

    cache = Path(platformdirs.user_cache_dir("workbench")) / "models"
    folder = cache / f"{name}-{checksum[:16]}"
    if (folder / "complete").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=cache, prefix=".part-"))
    try:
        write(part)
        (part / "complete").touch()
        try:
            part.rename(folder)
        except OSError:
            # Unless another process was first, with the same content.
            if not (folder / "complete").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a safetensors checkpoint, in float32.

    Raises:
        ValueError: If the file is damaged or cannot be read, in one line.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(), _read_once():
            AutoTokenizer.from_pretrained(**_as_transformers_reads(gguf_file)).save_pretrained(
                folder
            )
            if not _convert_by_tensor(gguf_file, folder):
                _convert_at_once(gguf_file, folder)
    except Exception as error:  # cut or damaged files raise whatever their bytes lead to
        raise ValueError(
            f"cannot convert {gguf_file.name!r}: {one_line(error)}; where that is not about its "
            "architecture the file is damaged: download it again."
        ) from error


@contextmanager
def _read_once() -> Iterator[None]:
    """Share one reader of a file inside the block.

    A header with a large vocabulary takes seconds to read, and transformers makes a new reader for
    the tokenizer, for the configuration and for the weights.
    """
    import gguf

    library: Any = gguf
    reader_class, readers = library.GGUFReader, {}

    def shared(path: str, *mode: Any) -> Any:
        key = (os.path.realpath(path), *mode)
        if key not in readers:
            readers[key] = reader_class(path, *mode)
        return readers[key]

    library.GGUFReader = shared
    try:
        yield
    finally:
        library.GGUFReader = reader_class


def _as_transformers_reads(gguf_file: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
        "trust_remote_code": False,
    }


def _convert_by_tensor(gguf_file: Path, folder: Path) -> bool:
    """Dequantise tensor by tensor, by transformers' own tables of names and layouts.

    Returns:
        Whether it was done: not where this version of transformers keeps its tables elsewhere, or
        reads this architecture in another way.
    """
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            load_gguf_checkpoint,
        )
    except ImportError:
        return False
    reader = gguf.GGUFReader(str(gguf_file))
    architecture = _field(reader, "general.architecture")
    if (_field(reader, "split.count") or 1) > 1:
        raise ValueError("it is one part of several; merge them with llama-gguf-split")
    if _has_a_newer_reader(architecture):
        return False
    parsed = load_gguf_checkpoint(str(gguf_file))
    config = AutoConfig.for_model(**parsed["config"])
    with torch.device("meta"):
        shell: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
    names = get_gguf_hf_weights_map(shell, processor)
    fused: dict[str, Any] = {**parsed, "tensors": {}}  # what transformers makes of several tensors
    reader.fields.clear()  # hundreds of thousands of small arrays
    shards, unread = _Shards(folder), []
    for tensor in reader.tensors:
        weights, name, _ = processor.process(
            weights=gguf.dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=fused,
        )
        if name in names:
            shards.add(names[name], _own(weights))
        elif name is not None:
            unread.append(tensor.name)
        del weights  # two large tensors at a time would be one too many
    for name, values in fused["tensors"].items():
        shards.add(name, values.float())
    shards.close()
    if unread:
        warnings.warn(
            f"{gguf_file.name} holds {len(unread)} tensors that transformers does not read "
            f"({unread[0]} ...): answers may differ from llama.cpp's.",
            stacklevel=2,
        )
    config.architectures, config.dtype = [type(shell).__name__], torch.float32
    config.save_pretrained(folder)
    if shell.can_generate():
        shell.generation_config.save_pretrained(folder)
    return True


def _own(weights: np.ndarray) -> Tensor:
    """Make a tensor of an array, by a copy only where it is a view into the file."""
    values = np.ascontiguousarray(weights)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _field(reader: Any, name: str) -> Any:
    """Read one entry of a GGUF file's header; None where it is not there."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _has_a_newer_reader(architecture: str) -> bool:
    """Tell whether transformers reads this architecture without the tables used here."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return False
    return bool(is_gguf_arch_supported(architecture))


def _convert_at_once(gguf_file: Path, folder: Path) -> None:
    """Let transformers read the whole model, in float32, and save it."""
    import transformers

    source = _as_transformers_reads(gguf_file)
    if hasattr(transformers, "GgufConfig"):  # where packed weights could be kept as they are
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(StringIO()):  # its progress bar cannot be switched off
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True
        )
    hf_model, loading = loaded
    if loading["missing_keys"]:  # they would be random numbers
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"{len(missing)} weights are missing ({missing[0]} ...)")
    # The weights are plain float32 now; what still says "quantised" would make saving and loading
    # fail.
    hf_model.hf_quantizer = None
    hf_model.is_quantized = False
    if hasattr(hf_model.config, "quantization_config"):
        del hf_model.config.quantization_config
    hf_model.save_pretrained(folder)


class _Shards:
    """Write tensors into safetensors files of a limited size, and the index of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gathered: dict[str, Tensor] = {}
        self.file_of: dict[str, str] = {}
        self.total = self.n_files = self.size = 0

    def add(self, name: str, values: Tensor) -> None:
        """Take a tensor, and write a file when there are enough."""
        size = values.numel() * values.element_size()
        if self.gathered and self.size + size > SHARD_BYTES:
            self._write()
        self.gathered[name] = values
        self.size, self.total = self.size + size, self.total + size
        if self.size >= SHARD_BYTES:
            self._write()

    def close(self) -> None:
        """Write what is left, and the index."""
        if self.gathered:
            self._write()
        index = {"metadata": {"total_size": self.total}, "weight_map": self.file_of}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        from safetensors.torch import save_file

        self.n_files += 1
        file = f"model-{self.n_files:05d}.safetensors"
        save_file(self.gathered, self.folder / file, metadata={"format": "pt"})
        self.file_of |= dict.fromkeys(self.gathered, file)
        self.gathered, self.size = {}, 0
