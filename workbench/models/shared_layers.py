"""Run the layers below all steering once per prompt instead of once per row.

They give every condition of a sweep the same, so the conditions of one prompt can share them.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.models._idle_hooks import block_slots, blocks_are_idle
from workbench.models.forward import (
    InPlaceOf,
    KeyValueCache,
    fast,
    forward,
    is_fast,
    rows_of_cache,
)
from workbench.models.hooked_model import hugging_face_model
from workbench.models.trusted_paths import trusts

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from jaxtyping import Bool, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel


@dataclass(frozen=True, eq=False)
class Below:
    """What the blocks below a layer computed for a batch's distinct prompts.

    Attributes:
        layer: The first block that is left to run.
        output: What the block below it returned.
        cache: Keys and values of the blocks below; those of the others hold the prefix only.
        prompt_rows: For each row of the batch, its prompt's row in these.
    """

    layer: int
    output: Any
    cache: KeyValueCache
    prompt_rows: Int[Tensor, " batch"]

    @contextmanager
    def known(self, model: HookedModel, cache: KeyValueCache) -> Iterator[None]:
        """Begin the one pass inside the block at the layer.

        Afterwards the cache holds what a whole pass would have left in it.
        """
        first, *others = self.output if isinstance(self.output, tuple) else (self.output,)
        hidden = first[self.prompt_rows.to(first.device)]
        output = (hidden, *others) if isinstance(self.output, tuple) else hidden
        slots = block_slots(model)[: self.layer]
        with (
            fast(model),
            _replaced({slot: _Known(slot.siblings[slot.name], output) for slot in slots}),
        ):
            yield
        rows = rows_of_cache(self.cache, self.prompt_rows)
        cache.layers[: self.layer] = rows.layers[: self.layer]


def run_below(
    model: HookedModel,
    layer: int,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"],
    cache: KeyValueCache | None,
    prompts: Sequence[Hashable],
) -> Below | None:
    """Run the blocks below a layer for a batch's distinct prompts, before any steering is set.

    Args:
        model: A hooked model.
        layer: The lowest layer at which anything is steered or read.
        tokens: The batch's tokens behind the cached prefix.
        mask: True at real tokens, prefix included.
        cache: The prefix. It is left as it is.
        prompts: What tells the rows' prompts apart.

    Returns:
        None where nothing would be saved (fewer than half of the rows repeat a prompt) or it cannot
        be done: there is no cache, the model is no TransformerBridge, the caller has hooks below
        the layer, or the fast routes are switched off.
    """
    first: dict[Hashable, int] = {}
    prompt_rows = [first.setdefault(prompt, len(first)) for prompt in prompts]
    in_bridge = hugging_face_model(model) is not None
    possible = cache is not None and in_bridge and is_fast() and 0 < layer < model.cfg.n_layers
    if (
        2 * len(first) > len(prompts)
        or not possible
        or not trusts(model, "shared_layers")
        or not blocks_are_idle(model, layer)
    ):
        return None
    rows = torch.tensor([prompt_rows.index(i) for i in range(len(first))], device=tokens.device)
    prompts_cache = rows_of_cache(cache, rows)
    with fast(model):
        last = block_slots(model)[layer - 1]
        stop = _StopBehind(last.siblings[last.name])
        with _replaced({last: stop}), suppress(_Reached):
            forward(model, tokens[rows], mask[rows], cache=prompts_cache, use_cache=True)
    return Below(layer, stop.output, prompts_cache, torch.tensor(prompt_rows, device=tokens.device))


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Raised behind the last block that has to be run."""


class _StopBehind(InPlaceOf):
    """Runs the block, keeps what it returned and ends the pass."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        self.__dict__["output"] = self.module(*args, **keywords)
        raise _Reached


class _Known(InPlaceOf):
    """Returns what the last block below is known to return, whatever comes in."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__(block)
        self.__dict__["output"] = output

    def forward(self, *args: Any, **keywords: Any) -> Any:  # noqa: ARG002 - as blocks are called
        return self.output


@contextmanager
def _replaced(modules: dict[Any, nn.Module]) -> Iterator[None]:
    """Put modules into slots of the Hugging Face model for the length of a block."""
    before = {slot: slot.siblings[slot.name] for slot in modules}
    try:
        for slot, module in modules.items():
            slot.siblings[slot.name] = module
        yield
    finally:
        for slot, module in before.items():
            slot.siblings[slot.name] = module
