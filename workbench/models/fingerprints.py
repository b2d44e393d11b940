"""Hash a model's weights and chat template, to tell what was measured on it from the rest."""

from __future__ import annotations

import hashlib
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.hooked_model import (
    HookedModel,
    hugging_face_model,
    model_lock,
    quantization,
)
from workbench.models.memory import drop_pages
from workbench.models.packing import is_packed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers as wide as an element of so many bytes."""


PART = 2**22
"""Numbers that are summed at a time: torch makes a copy of them, of eight bytes each."""


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()
"""Fingerprint of each model, with the state of the weights that it was computed for."""


_TAKEN: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Fingerprints of models whose weights are elsewhere."""


def fingerprint(model: HookedModel) -> str:
    """Hash every weight's bits and the chat template, to 16 hexadecimal digits.

    Of the bits a wrapping sum counts, which is exact on any device, and sampled values. Quantised
    weights count as they are packed, with their scales; weights that were put off to disk or to
    another device count as if they were here. The hash is kept per model until a parameter is
    written to (torch counts writes in ``_version``, those through ``.data`` excepted).
    """
    with model_lock(model):  # a pass of another thread has parts of the model elsewhere
        return _fingerprint(model)


def take_fingerprint(model: HookedModel, digest: str) -> None:
    """Let a model have a fingerprint that was computed elsewhere: its weights are not here."""
    _TAKEN[model] = digest


def _fingerprint(model: HookedModel) -> str:
    if model in _TAKEN:
        return _TAKEN[model]
    source: Any = hugging_face_model(model) or model
    weights = sorted(
        (path.replace("._original_component", ""), path, tensor)
        for path, tensor in source.named_parameters()
        # TransformerLens 3 gives an unembedding that has no bias one of zeros.
        if not (path == "lm_head.bias" and tensor.device.type != "meta" and not bool(tensor.any()))
    )
    template = str(getattr(model.tokenizer, "chat_template", None))
    # Packed weights are laid out anew at the first pass on some processors, not quite exactly: of
    # these the hash is that of the time of loading.
    places = (t.data_ptr() if t.is_floating_point() else id(t) for *_, t in weights)
    state = (tuple(places), tuple(tensor._version for *_, tensor in weights), template)
    known = _KNOWN.get(model)
    if known is not None and known[0] == state:
        return known[1]
    digest, packed = hashlib.sha256(template.encode()), is_packed(source)
    for name, path, tensor in weights:
        with _brought_here(source, path, tensor) as real:
            digest.update(_summary(name, real))
        if packed:  # the plain weights are in memory for this alone
            drop_pages(tensor)
    for name, tensor in _scales(source):
        digest.update(_summary(name, tensor))
    _KNOWN[model] = (state, digest.hexdigest()[:16])
    return digest.hexdigest()[:16]


def _summary(name: str, tensor: Tensor) -> bytes:
    """Describe a tensor: name, shape, dtype, the sum of its bits and some of its values."""
    head = f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|"
    if tensor.device.type == "meta":  # it has no values
        return head.encode()
    bits = tensor.detach().contiguous().flatten().view(_BITS[tensor.element_size()])
    sample = bits[:: max(1, bits.numel() // 256)].cpu().numpy().tobytes()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(PART):
        total += part.sum(dtype=torch.int64)
    return f"{head}{int(total)}|".encode() + sample


@contextmanager
def _brought_here(source: Any, path: str, tensor: Tensor) -> Iterator[Tensor]:
    """Give a weight's values, also where accelerate keeps them elsewhere until they are needed."""
    if tensor.device.type != "meta":
        yield tensor
        return
    from accelerate.utils import align_module_device

    holder, _, name = path.rpartition(".")
    module = source.get_submodule(holder)
    with align_module_device(module):
        yield getattr(module, name)


def _scales(source: Any) -> list[tuple[str, Tensor]]:
    """List what a quantised model keeps beside its parameters, such as scales and packed words."""
    if quantization(getattr(source, "config", None)) is None:
        return []
    parameters = {name for name, _ in source.named_parameters(remove_duplicate=False)}
    return [
        (name.replace("._original_component", ""), value)
        for name, value in sorted(source.state_dict().items(), key=lambda item: item[0])
        if name not in parameters and isinstance(value, torch.Tensor)
    ]
