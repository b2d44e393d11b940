"""Make a hooked model without weights, for where another engine has them.

It knows the tokenizer, the sizes, the hook points and the identity of a checkpoint: enough to
encode prompts, to check sites and interventions, and to name what a vector was measured on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.checkpoints import find_checkpoint, read_config, read_tokenizer
from workbench.models.fingerprints import take_fingerprint
from workbench.models.load import DTYPES, check_architecture, hooked

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel


SAMPLES, SAMPLE_BYTES = 64, 4096
"""Places of each weight file that its identity is read from, and bytes at each."""


def load_shell(
    name_or_path: str | Path, *, dtype: str = "bfloat16", revision: str | None = None
) -> HookedModel:
    """Load all of a checkpoint but its weights, as a hooked model that cannot run.

    Its fingerprint is that of the checkpoint's files: a vector that was fitted on the loaded model
    has another one, and needs ``transfer=True``.

    Args:
        name_or_path: What ``load_model`` takes.
        dtype: In which the engine shall hold the weights: float32, bfloat16 or float16.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        ValueError: If the checkpoint cannot be found or read, or the dtype is unknown.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; dtypes: {', '.join(DTYPES)}.")
    source, name = find_checkpoint(name_or_path, revision)
    config = read_config(source, revision)
    check_architecture(config, name)
    folder = _folder_of(source, revision)
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], attn_implementation="eager"
        )
    _read_generation_config(empty, folder)
    model = hooked(empty, read_tokenizer(source, revision), name, "meta")
    template = str(getattr(model.tokenizer, "chat_template", None))
    take_fingerprint(model, digest_of_files(folder, template))
    return model


def digest_of_files(folder: Path, template: str) -> str:
    """Hash the weight files of a checkpoint, by samples, and its chat template.

    Args:
        folder: The checkpoint.
        template: Its chat template.
    """
    digest = hashlib.sha256(template.encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"|{path.name}|{size}|".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _folder_of(source: str | Path, revision: str | None) -> Path:
    """Give the folder of a checkpoint; a hub repository's is downloaded, as vLLM would do it."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json"]
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))


def _read_generation_config(empty: Any, folder: Path) -> None:
    """Take over which tokens end an answer."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        empty.generation_config = GenerationConfig.from_pretrained(folder)
