"""Run one forward pass without work that nobody asked for.

A prefix that rows share is computed once, decoding keeps keys and values, logits are computed for
the columns that are read, and a pass that only reads activations stops behind the last of them.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from workbench.models._idle_hooks import idle_hooks_bypassed
from workbench.models.hooked_model import (
    HookedModel,
    hugging_face_model,
    input_device,
    model_lock,
)
from workbench.models.hooked_transformer import (
    is_hooked_transformer,
    last_logits_and_cache,
    takes_cache,
)
from workbench.models.packing import unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.tokens import Encoded


KeyValueCache = Any
"""A transformers ``Cache``: keys and values of the tokens seen so far, one entry per layer."""


SPARE_COLUMNS = 64
"""Tokens that a growing key-value cache takes before its buffers are made anew."""


_share_prefix: ContextVar[bool] = ContextVar("share_prefix", default=True)


_fast: ContextVar[bool] = ContextVar("fast", default=True)


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Raised inside a hook when everything that was asked for has been seen."""


def has_key_value_cache(model: HookedModel) -> bool:
    """Tell whether the model takes a transformers cache: a TransformerBridge or HookedTransformer.

    To the latter it is shown under the names that its own kind of cache has.
    """
    return hugging_face_model(model) is not None or takes_cache(model)


def forward(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"],
    *,
    cache: KeyValueCache | None = None,
    use_cache: bool = False,
) -> tuple[Float[Tensor, "batch d_vocab"], KeyValueCache | None]:
    """Compute the logits after the last column, and the cache that now holds these tokens.

    Arguments are those of ``last_logits``.
    """
    logits, cache = last_logits(model, tokens, mask, 1, cache=cache, use_cache=use_cache)
    return logits[:, -1], cache


def last_logits(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"],
    n: int,
    *,
    cache: KeyValueCache | None = None,
    use_cache: bool = False,
) -> tuple[Float[Tensor, "batch n d_vocab"], KeyValueCache | None]:
    """Compute the logits after each of the last ``n`` columns, and the cache, in one pass.

    Args:
        model: A hooked model; its hooks fire.
        tokens: New tokens.
        mask: True at real tokens, for the cached columns and the new ones.
        n: Columns from the end.
        cache: What the model saw before; it is extended.
        use_cache: The cache is wanted afterwards: make one where none was given.
    """
    if is_hooked_transformer(model):
        return last_logits_and_cache(model, tokens, mask, n, cache=cache, use_cache=use_cache)
    if not has_key_value_cache(model):
        return model(tokens, attention_mask=mask.long())[:, -n:], None
    # TransformerLens counts each row's positions from this mask, cached columns included. Where a
    # model takes them they are given, the same ones: to find out whether it needs any,
    # TransformerLens waits for the device at every step.
    keywords: dict[str, Any] = {"attention_mask": mask.long(), "logits_to_keep": n}
    if getattr(model, "_accepts_derived_position_ids", bool)():
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        keywords["position_ids"] = positions[:, mask.shape[1] - tokens.shape[1] :]
    if cache is not None:
        keywords["past_key_values"] = cache
        if use_cache:
            from workbench.models._growing_cache import grow_in_place

            grow_in_place(cache)
    with fast(model):
        return model(
            tokens,
            return_type="logits_and_cache",
            use_cache=use_cache or cache is not None,
            **keywords,
        )


def shared_prefix_length(encoded: Sequence[Encoded], keep: Callable[[Encoded], int]) -> int:
    """Count the leading tokens that all rows share and nobody reads.

    Usually they are the chat template up to the user's words.

    Args:
        encoded: The rows.
        keep: First position of a row whose activations or logits are needed; the prefix ends
            before it.
    """
    if not (_fast.get() and _share_prefix.get()):
        return 0
    # In alphabetical order all other rows lie between these two.
    first, last = min(row.ids for row in encoded), max(row.ids for row in encoded)
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return max(0, min(shared, *(keep(row) for row in encoded)))


def prefix_cache(model: HookedModel, ids: Sequence[int], *, rows: int = 1) -> KeyValueCache:
    """Compute keys and values of a prefix for ``rows`` rows, with the hooks that are set."""
    device = input_device(model)
    tokens = torch.tensor([list(ids)] * rows, device=device)
    _, cache = forward(model, tokens, torch.ones_like(tokens, dtype=torch.bool), use_cache=True)
    return cache


def allows_padding_behind(cache: KeyValueCache, columns: int) -> bool:
    """Tell whether padding may stand between a cached prefix and what follows it.

    Sliding-window layers (Gemma, Mistral) count columns, padding too: in rows of more columns than
    their window they would lose sight of the prefix too early.
    """
    return all(
        layer.sliding_window >= columns
        for layer in cache.layers
        if getattr(layer, "is_sliding", False)
    )


def rows_of_cache(cache: KeyValueCache, rows: Int[Tensor, " batch"]) -> KeyValueCache:
    """Copy rows of a cache, in the given order and as often as named; the original stays."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in selected.layers:  # each may lie on a device of its own
        layer.batch_select_indices(rows.to(getattr(layer, "device", rows.device)))
    return selected


def is_fast() -> bool:
    """Tell whether the fast routes are on, as they are outside ``plain``."""
    return _fast.get()


@contextmanager
def fast(model: HookedModel) -> Iterator[None]:
    """Bypass idle hooks for the passes inside the block, all of which have the same hooks set.

    Every pass does this for itself; around many of them, idle hooks are only looked for once.
    """
    with model_lock(model), idle_hooks_bypassed(model) if _fast.get() else nullcontext():
        yield


@contextmanager
def without_shared_prefix() -> Iterator[None]:
    """Compute every row from its first token inside the block, for comparison."""
    token = _share_prefix.set(False)
    try:
        yield
    finally:
        _share_prefix.reset(token)


@contextmanager
def plain(model: HookedModel) -> Iterator[None]:
    """Take the slow routes inside the block, for comparison: the same numbers to rounding.

    No prefix is shared, no linear layer is packed, and every component of TransformerLens runs,
    whether its hooks are idle or not.
    """
    token = _fast.set(False)
    try:
        with model_lock(model), unpacked(model):
            yield
    finally:
        _fast.reset(token)


@contextmanager
def reading(
    model: HookedModel, readers: Sequence[tuple[str, Callable[[Tensor], None]]]
) -> Iterator[Callable[..., None]]:
    """Set hooks that only read; yield ``run(tokens, mask, cache)``.

    A run stops as soon as every reader has been called.

    Args:
        model: A hooked model.
        readers: Pairs of hook name and function of the activation there. The tensor shares storage
            with the model: copy what is kept.
    """
    waiting: set[int] = set()

    def hook_of(reader: int, read: Callable[[Tensor], None]) -> Callable[..., None]:
        def hook(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 - TransformerLens names it
            read(activation)
            waiting.discard(reader)
            if not waiting:
                raise _Stop

        return hook

    def run(tokens: Tensor, mask: Tensor, cache: KeyValueCache | None = None) -> None:
        waiting.update(range(len(readers)))
        try:
            forward(model, tokens, mask, cache=cache)
        except _Stop:
            return
        missing = ", ".join(readers[reader][0] for reader in sorted(waiting))
        raise RuntimeError(
            f"hook points never fired: {missing}; this architecture does not compute them, so "
            "choose another kind of site."
        )

    hooks = [(name, hook_of(reader, read)) for reader, (name, read) in enumerate(readers)]
    with model_lock(model), model.hooks(fwd_hooks=hooks):
        yield run
