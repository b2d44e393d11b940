"""Run one forward pass without work that nobody asked for.

A prefix that rows share is computed once, decoding keeps keys and values, logits are computed for
the columns that are read, and a pass that only reads activations stops behind the last of them.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
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
    attention_windows,
    is_hooked_transformer,
    last_logits_and_cache,
    takes_cache,
)
from workbench.models.packing import unpacked
from workbench.models.sites import check_per_token
from workbench.models.trusted_paths import trusts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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

    To the latter it is shown under the names that its own kind of cache has. The cache of a model
    that does not go on from it as from the tokens themselves is not used.
    """
    if hugging_face_model(model) is None:
        return takes_cache(model)
    return trusts(model, "cache")


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
    if hugging_face_model(model) is None:
        return model(tokens, attention_mask=mask.long())[:, -n:], None
    keeps_cache = has_key_value_cache(model)
    # TransformerLens counts each row's positions from this mask, cached columns included. Where a
    # model takes them they are given, the same ones: to find out whether it needs any,
    # TransformerLens waits for the device at every step.
    keywords: dict[str, Any] = {"attention_mask": mask.long(), "logits_to_keep": n}
    keywords["use_cache"] = keeps_cache and (use_cache or cache is not None)
    if getattr(model, "_accepts_derived_position_ids", bool)():
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        keywords["position_ids"] = positions[:, mask.shape[1] - tokens.shape[1] :]
    if cache is not None:
        keywords["past_key_values"] = cache
        if use_cache and trusts(model, "growing"):
            from workbench.models._growing_cache import grow_in_place

            grow_in_place(cache)
    all_columns = n >= tokens.shape[1]  # as where one token is written: they lie in one piece
    with fast(model), nullcontext() if all_columns else _contiguous_before_the_head(model):
        logits, cache = model(
            tokens, return_type="logits_and_cache", **_that_are_taken(model, keywords)
        )
    # Models that do not know logits_to_keep return those of all columns.
    return logits[:, -n:], cache if keeps_cache else None


def late_logits(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"],
    n: int,
    *,
    cache: KeyValueCache | None = None,
    use_cache: bool = False,
) -> tuple[Callable[[slice], Float[Tensor, "batch some d_vocab"]], KeyValueCache | None]:
    """Run a pass up to its last hidden states; return what gives logits of columns, and the cache.

    A vocabulary of 262,144 words makes a gigabyte of 1,000 tokens' logits; hidden states are a
    hundredth of that. Where a model's head cannot be run by itself, all logits are computed at once
    and parts of them returned.

    Args:
        model: A hooked model; its hooks fire.
        tokens: New tokens.
        mask: True at real tokens, for the cached columns and the new ones.
        n: Columns from the end; slices count among these.
        cache: What the model saw before; it is extended.
        use_cache: See ``last_logits``.
    """
    if not _has_late_head(model):
        logits, cache = last_logits(model, tokens, mask, n, cache=cache, use_cache=use_cache)
        return lambda columns: logits[:, columns], cache
    with _recorded_body(model) as outputs:
        _, cache = last_logits(model, tokens, mask, 1, cache=cache, use_cache=use_cache)
    hidden = outputs[-1][0][:, -n:]
    kind = type(outputs[-1])
    return lambda columns: head_logits(model, hidden[:, columns], kind), cache


def late_logits_and_cache(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"],
    *,
    cache: KeyValueCache | None = None,
) -> tuple[Callable[[], Float[Tensor, "batch one d_vocab"]], KeyValueCache | None]:
    """Run a pass like ``forward``; return what gives the last column's logits, and the cache."""
    if not _has_late_head(model):
        logits, cache = last_logits(model, tokens, mask, 1, cache=cache, use_cache=True)
        return lambda: logits, cache
    with _recorded_body(model) as outputs:
        _, cache = last_logits(model, tokens, mask, 1, cache=cache, use_cache=True)
    hidden = outputs[-1][0][:, -1:].clone()
    kind = type(outputs[-1])
    return lambda: head_logits(model, hidden, kind), cache


def _has_late_head(model: HookedModel) -> bool:
    return hugging_face_model(model) is not None and trusts(model, "late_head")


@contextmanager
def _recorded_body(model: HookedModel) -> Iterator[list[Any]]:
    """Keep what the model below the head returns in each pass inside the block."""
    outputs: list[Any] = []
    body: Any = hugging_face_model(model).base_model  # type: ignore[union-attr]
    handle = body.register_forward_hook(lambda _module, _args, out: outputs.append(out))
    try:
        yield outputs
    finally:
        handle.remove()


def head_logits(
    model: HookedModel, hidden: Float[Tensor, "batch some d_model"], kind: Callable[..., Any]
) -> Float[Tensor, "batch some d_vocab"]:
    """Run the model's head, with whatever it does to the logits, on given hidden states.

    Args:
        model: A hooked model.
        hidden: What the body returned, or some columns of it.
        kind: Type of what the body returns, to return ``hidden`` in.
    """
    hf_model: Any = hugging_face_model(model)
    hidden = hidden.contiguous()
    output = (hidden,) if kind is tuple else kind(hidden)
    name = hf_model.base_model_prefix
    body = hf_model._modules[name]
    hf_model._modules[name] = _Known(body, output)
    unused = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    keywords = {"input_ids": unused, "use_cache": False, "return_dict": True}
    try:
        with torch.no_grad():
            return hf_model.forward(**_that_are_taken(model, keywords)).logits
    finally:
        hf_model._modules[name] = body


class InPlaceOf(torch.nn.Module):
    """Stands where a module stands, and answers what the module would about itself."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not as a submodule: it is in the model already

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


class _Known(InPlaceOf):
    """Returns what is known already, whatever comes in."""

    def __init__(self, module: torch.nn.Module, output: Any) -> None:
        super().__init__(module)
        self.__dict__["output"] = output

    def forward(self, *args: Any, **keywords: Any) -> Any:  # noqa: ARG002 - as modules are called
        return self.output


_PARAMETERS: weakref.WeakKeyDictionary[Any, frozenset[str] | None] = weakref.WeakKeyDictionary()
"""Names that each model's forward takes; None for any."""


def _that_are_taken(model: HookedModel, keywords: dict[str, Any]) -> dict[str, Any]:
    """Leave out the arguments that the Hugging Face model's forward does not know."""
    if model not in _PARAMETERS:
        called: Any = hugging_face_model(model).forward  # type: ignore[union-attr]
        parameters = inspect.signature(called).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        _PARAMETERS[model] = None if takes_any else frozenset(parameters)
    names = _PARAMETERS[model]
    return keywords if names is None else {k: v for k, v in keywords.items() if k in names}


@contextmanager
def _contiguous_before_the_head(model: HookedModel) -> Iterator[None]:
    """Copy the columns that logits are wanted of before the unembedding multiplies them.

    Of a slice, torch makes a batch of products, for which it writes the vocabulary's matrix out
    once per row: 45 GB for 96 rows of a model of 1.5 billion weights.
    """
    try:
        head = hugging_face_model(model).get_output_embeddings()  # type: ignore[union-attr]
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        yield
        return

    def copy_of(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0].contiguous(), *args[1:]) if args else None

    handle = head.register_forward_pre_hook(copy_of)
    try:
        yield
    finally:
        handle.remove()


def shares_prefixes() -> bool:
    """Tell whether what rows have in common is computed once, as it is by default."""
    return _fast.get() and _share_prefix.get()


def shared_prefix_length(encoded: Sequence[Encoded], keep: Callable[[Encoded], int]) -> int:
    """Count the leading tokens that all rows share and nobody reads.

    Usually they are the chat template up to the user's words.

    Args:
        encoded: The rows.
        keep: First position of a row whose activations or logits are needed; the prefix ends
            before it.
    """
    if not shares_prefixes():
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


def allows_padding_behind(model: HookedModel, columns: int) -> bool:
    """Tell whether padding may stand between a cached prefix and what follows it.

    Sliding-window layers (Gemma, Mistral) count columns, padding too: in rows of more columns than
    their window they would lose sight of the prefix too early. A window is whatever the model's
    configuration calls one, or a chunk of attention.
    """
    hf_model = hugging_face_model(model)
    if hf_model is None:
        return all(size >= columns for size in attention_windows(model))
    config = hf_model.config
    sizes = [
        value
        for name, value in vars(config.get_text_config(decoder=True)).items()
        if name.endswith(("window", "window_size", "attention_chunk_size"))
    ]
    windows = [size for size in sizes if isinstance(size, int) and size > 1]
    return min(windows, default=columns) >= columns and trusts(model, "padding_behind")


def rows_of_cache(cache: KeyValueCache, rows: Int[Tensor, " batch"]) -> KeyValueCache:
    """Copy rows of a cache, in the given order and as often as named; the original stays."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in selected.layers:
        # Recurrent layers keep one state per kernel in a dict each.
        of_states = {name: dict(v) for name, v in vars(layer).items() if isinstance(v, dict)}
        vars(layer).update(of_states)
    keep_rows(selected, rows)
    return selected


def keep_rows(cache: KeyValueCache, rows: Int[Tensor, " batch"]) -> None:
    """Go on with some rows of a cache, whatever its layers hold: keys and values, or states."""
    cache.reorder_cache(rows)


def joined_caches(caches: Sequence[KeyValueCache]) -> KeyValueCache:
    """Put the rows of several caches into one, in order; the first cache becomes it."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for name, value in vars(layers[0]).items():
            values = [getattr(layer, name) for layer in layers]
            if isinstance(value, torch.Tensor) and value.ndim:
                setattr(layers[0], name, torch.cat(values))
            elif isinstance(value, dict):
                joined = {
                    key: torch.cat([one[key] for one in values])
                    for key, state in value.items()
                    if isinstance(state, torch.Tensor)
                }
                value.update(joined)
    return caches[0]


def is_fast() -> bool:
    """Tell whether the fast routes are on, as they are outside ``plain``."""
    return _fast.get()


@contextmanager
def fast(model: HookedModel) -> Iterator[None]:
    """Bypass idle hooks for the passes inside the block, all of which have the same hooks set.

    Every pass does this for itself; around many of them, idle hooks are only looked for once.
    """
    if not _fast.get() and not trusts(model, "components"):
        raise ValueError(
            f"{model.cfg.model_name!r} cannot take the slow ways: TransformerLens's components "
            "compute something else than Hugging Face's model here; leave out plain()."
        )
    with model_lock(model), idle_hooks_bypassed(model) if _fast.get() else nullcontext():
        yield


@contextmanager
def as_by_default() -> Iterator[None]:
    """Be as outside ``plain`` and ``without_shared_prefix`` inside the block."""
    tokens = _fast.set(True), _share_prefix.set(True)
    try:
        yield
    finally:
        _fast.reset(tokens[0])
        _share_prefix.reset(tokens[1])


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
            check_per_token(activation, readers[reader][0])
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
