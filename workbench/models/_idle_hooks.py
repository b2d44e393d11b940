"""Hugging Face's own modules wherever no hook is set: TransformerLens computes around its hook points, also around those nobody uses.

Each component of a TransformerBridge stands in the place of a Hugging Face module, which it holds. Where none of its hook points has a hook, that module
can take its place back; where only its input or output has one, the module runs between the two. What is computed is the same, to rounding.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.models.load import HookedModel


@dataclass(frozen=True, eq=False)
class _Slot:
    """A place in the Hugging Face model where a component of TransformerLens stands."""

    siblings: dict[str, Any]
    name: str
    component: Any
    outer: _OuterHooks
    ends: tuple[Any, ...]
    inner: tuple[Any, ...]
    within: frozenset[int]
    is_block: bool

    def lightest(self) -> Any:
        """What computes the same with the hooks that are set now."""
        if any(map(_is_used, self.inner)):
            return self.component
        ends_are_used = any(map(_is_used, self.ends)) or _is_watched(self.component)
        return self.outer if ends_are_used else self.component.original_component


class _OuterHooks(nn.Module):
    """A Hugging Face module between the input and the output hook point of the component that holds it."""

    def __init__(self, component: Any) -> None:
        super().__init__()
        self.__dict__["component"] = component  # not as a submodule: it is in the model already
        # torch's own hooks on the component fire here in its stead.
        self.__dict__.update(
            {name: own for name, own in component.__dict__.items() if "_hooks" in name}
        )

    def forward(self, *args: Any, **keywords: Any) -> Any:
        own = self.component
        if args:
            args = (own.hook_in(args[0]), *args[1:])
        else:
            keywords["hidden_states"] = own.hook_in(keywords["hidden_states"])
        out = own.original_component(*args, **keywords)
        return (own.hook_out(out[0]), *out[1:]) if isinstance(out, tuple) else own.hook_out(out)

    def __getattr__(self, name: str) -> Any:
        return getattr(
            self.__dict__["component"].original_component, name
        )  # what a caller asks a Hugging Face module


_OPTIONAL = ("use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_attn_result")


_SLOTS: weakref.WeakKeyDictionary[Any, list[_Slot]] = weakref.WeakKeyDictionary()


_INSIDE: weakref.WeakSet[Any] = weakref.WeakSet()


@cache
def _fused_attention() -> str:
    """Name under which transformers finds torch's fused attention with the mask always written out.

    To find out whether the mask could be left out, the host would wait for the device at every step.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **keywords: Any) -> Any:
        return sdpa_mask(*args, **keywords | {"allow_is_causal_skip": False})

    AttentionInterface.register("workbench_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("workbench_sdpa", mask)
    return "workbench_sdpa"


@contextmanager
def idle_hooks_bypassed(model: HookedModel) -> Iterator[None]:
    """Run without TransformerLens's components where their hooks are idle. Hooks must be set before, not inside; a block within another does nothing.

    Attention also goes by torch's fused kernel instead of the eager one, unless a hook reads its scores or pattern. A model whose weights
    TransformerLens has processed, whose optional hook points are switched on, or that is none of its bridges, runs as it is.
    """
    if model in _INSIDE or not hasattr(model, "original_model") or _computes_its_own_way(model):
        yield
        return
    slots = _slots_of(model)
    lightest = [slot.lightest() for slot in slots]
    kept = {id(own) for slot, own in zip(slots, lightest, strict=True) if own is slot.component}
    if kept:  # a component with hooks inside may look into those it holds
        lightest = [
            s.component if s.within & kept else own for s, own in zip(slots, lightest, strict=True)
        ]
    config = model.original_model.config
    fused = _takes_fused_attention(model.original_model) and not any(map(_is_attention, lightest))
    before = config._attn_implementation
    try:
        _INSIDE.add(model)
        for slot, own in zip(slots, lightest, strict=True):
            slot.siblings[slot.name] = own
        if fused:
            config._attn_implementation = _fused_attention()
        yield
    finally:
        _INSIDE.discard(model)
        config._attn_implementation = before
        for slot in slots:
            slot.siblings[slot.name] = slot.component


def block_slots(model: HookedModel) -> list[_Slot]:
    """Where the blocks stand, in order."""
    return [slot for slot in _slots_of(model) if slot.is_block]


def blocks_are_idle(model: HookedModel, n: int) -> bool:
    """Whether no hook is set in the first ``n`` blocks."""
    modules = [module for slot in block_slots(model)[:n] for module in slot.component.modules()]
    used = any(
        _is_used(m) if hasattr(m, "fwd_hooks") else _is_component(m) and _is_watched(m)
        for m in modules
    )
    return not used and not _computes_its_own_way(model)


def _slots_of(model: HookedModel) -> list[_Slot]:
    if model not in _SLOTS:
        _SLOTS[model] = _slots(model)
    return _SLOTS[model]


def _slots(model: HookedModel) -> list[_Slot]:
    """The slots of the blocks and of what is in them; embeddings and head run once a pass and may stay."""
    modules = dict(model.original_model.named_modules(remove_duplicate=False))
    blocks = {id(block) for block in model.blocks}
    in_blocks = {id(module) for block in model.blocks for module in block.modules()}
    places: dict[tuple[int, str], str] = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if (
            id(module) not in in_blocks
            or not _is_component(module)
            or module.original_component is None
        ):
            continue
        if not _is_component(modules[parent]):
            places.setdefault((id(modules[parent]), name), path)
    standing = [modules[path] for path in places.values()]
    slots = []
    for path in places.values():
        parent, _, name = path.rpartition(".")
        component = modules[path]
        # What stands in a slot of its own fires its hooks there. Inside attention that is so for the projections alone: the Hugging Face
        # module norms queries and keys in another layout.
        apart = [
            m
            for m in standing
            if m is not component and (_is_projection(m) or not _is_attention(component))
        ]
        # What turns positions into angles has no weights, and hook points other than its input and output.
        ends = (
            (component.hook_in, component.hook_out)
            if next(component.parameters(), None) is not None
            else ()
        )
        points = _hook_points(component, {id(m) for m in apart})
        inner = tuple(point for point in points if not any(point is end for end in ends))
        holders = path.split(".")[:-1]
        within = frozenset(
            id(modules[".".join(holders[:n])])
            for n in range(1, len(holders) + 1)
            if _is_component(modules[".".join(holders[:n])])
        )
        outer, siblings = _OuterHooks(component), modules[parent]._modules
        slots.append(
            _Slot(siblings, name, component, outer, ends, inner, within, id(component) in blocks)
        )
    return slots


def _hook_points(module: nn.Module, apart: set[int]) -> Iterator[Any]:
    """Hook points of a component and of what it holds, down to the components whose hooks fire by themselves."""
    for child in module._modules.values():
        if child is None or id(child) in apart:
            continue
        if hasattr(child, "fwd_hooks"):
            yield child
        else:
            yield from _hook_points(child, apart)


def _is_component(module: Any) -> bool:
    return (
        hasattr(module, "hook_in")
        and hasattr(module, "hook_out")
        and "_original_component" in module._modules
    )


def _is_attention(module: Any) -> bool:
    return hasattr(module, "hook_pattern") and _is_component(module)


def _is_projection(component: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(component.original_component, nn.Linear | Conv1D)


def _is_watched(component: Any) -> bool:
    """Whether anyone but TransformerLens has put a torch hook on a component."""
    hooks = [*component._forward_hooks.values(), *component._forward_pre_hooks.values()]
    return any(
        not str(getattr(hook, "__module__", "")).startswith("transformer_lens.") for hook in hooks
    )


def _is_used(point: Any) -> bool:
    return bool(
        point.fwd_hooks or point.bwd_hooks or point._forward_hooks or point._forward_pre_hooks
    )


def _computes_its_own_way(model: HookedModel) -> bool:
    return getattr(model, "compatibility_mode", False) or any(
        getattr(model.cfg, flag, False) for flag in _OPTIONAL
    )


def _takes_fused_attention(hf_model: Any) -> bool:
    """Whether Hugging Face itself would take it for this architecture (soft-capped scores are what it cannot compute)."""
    config = hf_model.config
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    nested = hasattr(config, "text_config")
    return bool(getattr(hf_model, "_supports_sdpa", False)) and not capped and not nested
