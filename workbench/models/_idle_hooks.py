"""Run Hugging Face's own modules wherever no hook is set.

TransformerLens computes around its hook points, also around those nobody uses. Each component of a
TransformerBridge stands in the place of a Hugging Face module, which it holds. Where none of its
hook points has a hook, that module can take its place back; where only its input or output has one,
the module runs between the two. What is computed is the same, to rounding.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from workbench.models._direct_blocks import Pass, direct_block, is_direct, is_used, is_watched
from workbench.models.hooked_model import HookedModel, hugging_face_model
from workbench.models.trusted_paths import trusts

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, eq=False)
class _Slot:
    """A place in the Hugging Face model where a component of TransformerLens stands.

    Attributes:
        siblings: The submodules of the module that holds the place, by name.
        name: The place's name among them.
        component: The component of TransformerLens.
        outer: The Hugging Face module between the component's input and output hook points.
        ends: These two hook points.
        inner: The other hook points that fire only while the component itself runs.
        within: Ids of the components around the place.
        is_block: Whether the component is a whole block.
    """

    siblings: dict[str, Any]
    name: str
    component: Any
    outer: _OuterHooks
    ends: tuple[Any, ...]
    inner: tuple[Any, ...]
    within: frozenset[int]
    is_block: bool

    def lightest(self) -> Any:
        """Choose the module that computes the same with the hooks that are set now."""
        if any(map(is_used, self.inner)):
            return self.component
        ends_are_used = any(map(is_used, self.ends)) or is_watched(self.component)
        return self.outer if ends_are_used else self.component.original_component


class _OuterHooks(nn.Module):
    """A Hugging Face module between the input and output hook points of its component."""

    def __init__(self, component: Any) -> None:
        super().__init__()
        self.__dict__["component"] = component  # not as a submodule: it is in the model already
        # torch's own hooks on the component fire here in its stead.
        self.__dict__.update(
            {name: hooks for name, hooks in component.__dict__.items() if "_hooks" in name}
        )

    def forward(self, *args: Any, **keywords: Any) -> Any:
        component = self.component
        if args:
            args = (component.hook_in(args[0]), *args[1:])
        else:
            keywords["hidden_states"] = component.hook_in(keywords["hidden_states"])
        out = component.original_component(*args, **keywords)
        if isinstance(out, tuple):
            return (component.hook_out(out[0]), *out[1:])
        return component.hook_out(out)

    def __getattr__(self, name: str) -> Any:
        # What a caller asks a Hugging Face module.
        return getattr(self.__dict__["component"].original_component, name)


_OPTIONAL = ("use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_attn_result")
"""Settings of TransformerLens that switch on hook points Hugging Face's modules do not have."""


_SLOTS: weakref.WeakKeyDictionary[Any, list[_Slot]] = weakref.WeakKeyDictionary()
"""Slots of each model, found once."""


_INSIDE: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models whose idle hooks are bypassed right now."""


@cache
def _fused_attention() -> str:
    """Register torch's fused attention with the mask always written out, and return its name.

    To find out whether the mask could be left out, the host would wait for the device at every
    step.
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
    """Run without TransformerLens's components where their hooks are idle.

    Hooks must be set before the block, not inside it; a block within another does nothing.

    Attention also goes by torch's fused kernel instead of the eager one, unless a hook reads its
    scores or pattern; then Llama-like blocks are computed directly (``_direct_blocks``) where
    nothing but sites is hooked in them. A model runs as it is if TransformerLens has processed its
    weights, if its optional hook points are switched on, if it is no TransformerBridge, or if
    Hugging Face's modules were found to compute something else in their places.
    """
    hf_model = hugging_face_model(model)
    if (
        model in _INSIDE
        or hf_model is None
        or computes_its_own_way(model)
        or not trusts(model, "bypass")
    ):
        yield
        return
    slots = _slots_of(model)
    modules = _lightest_modules(slots)
    if not trusts(model, "components"):
        _refuse_components(model, slots, modules)
    config = hf_model.config
    fused = (
        may_fuse_attention(hf_model)
        and not any(map(_is_attention, modules))
        and trusts(model, "fused")
    )
    if fused and trusts(model, "direct"):
        modules = _with_direct_blocks(slots, modules)
    attention_before = config._attn_implementation
    try:
        _INSIDE.add(model)
        for slot, module in zip(slots, modules, strict=True):
            slot.siblings[slot.name] = module
        if fused:
            config._attn_implementation = _fused_attention()
        yield
    finally:
        _INSIDE.discard(model)
        config._attn_implementation = attention_before
        for slot in slots:
            slot.siblings[slot.name] = slot.component


@contextmanager
def hugging_face_alone(model: HookedModel) -> Iterator[None]:
    """Run Hugging Face's model inside the block as if TransformerLens had not taken it over."""
    hf_model: Any = hugging_face_model(model)
    modules = dict(hf_model.named_modules(remove_duplicate=False))
    places: list[tuple[dict[str, Any], str, Any]] = []
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if _stands_in_a_slot(module, modules[parent]):
            places.append((modules[parent]._modules, name, module))
    try:
        for siblings, name, component in places:
            siblings[name] = component.original_component
        yield
    finally:
        for siblings, name, component in places:
            siblings[name] = component


def _refuse_components(model: HookedModel, slots: list[_Slot], modules: list[Any]) -> None:
    """Raise where a component has to run and computes something else than the model.

    Raises:
        ValueError: If there is one.
    """
    for slot, module in zip(slots, modules, strict=True):
        if module is slot.component:
            raise ValueError(
                f"{model.cfg.model_name!r} cannot be hooked inside {slot.name!r}: there "
                "TransformerLens computes something else than Hugging Face's model; read or edit "
                "at resid_pre, resid_post, attn_out, mlp_out, mlp_post or z instead."
            )


def _lightest_modules(slots: list[_Slot]) -> list[Any]:
    """Choose for each slot the module that computes the same with the hooks that are set now."""
    lightest = [slot.lightest() for slot in slots]
    whole = {
        id(module) for slot, module in zip(slots, lightest, strict=True) if module is slot.component
    }
    if not whole:
        return lightest
    # A component with hooks inside may look into those it holds.
    return [
        slot.component if slot.within & whole else module
        for slot, module in zip(slots, lightest, strict=True)
    ]


def _with_direct_blocks(slots: list[_Slot], modules: list[Any]) -> list[Any]:
    """Put direct blocks in the place of those that have one with the hooks that are set now."""
    shared = Pass()
    direct = [
        direct_block(slot.component, module, shared) if slot.is_block else None
        for slot, module in zip(slots, modules, strict=True)
    ]
    return [
        module if block is None else block for block, module in zip(direct, modules, strict=True)
    ]


def has_direct_blocks(model: HookedModel) -> bool:
    """Tell whether any block of a model may be computed directly, as far as its modules tell.

    Only where attention may be fused are any.
    """
    return any(is_direct(slot.component) for slot in block_slots(model))


def block_slots(model: HookedModel) -> list[_Slot]:
    """List the slots where the blocks stand, in order."""
    return [slot for slot in _slots_of(model) if slot.is_block]


def blocks_are_idle(model: HookedModel, n: int) -> bool:
    """Tell whether no hook is set in the first ``n`` blocks."""
    modules = [module for slot in block_slots(model)[:n] for module in slot.component.modules()]
    used = any(
        is_used(m) if hasattr(m, "fwd_hooks") else _is_component(m) and is_watched(m)
        for m in modules
    )
    return not used and not computes_its_own_way(model)


def _slots_of(model: HookedModel) -> list[_Slot]:
    """List the slots of the blocks and of what is in them.

    Embeddings and head run once per pass and may stay.
    """
    if model not in _SLOTS:
        hf_model: Any = hugging_face_model(model)
        modules = dict(hf_model.named_modules(remove_duplicate=False))
        blocks = {id(block) for block in model.blocks}
        paths = _component_paths(model, modules)
        components = [modules[path] for path in paths]
        _SLOTS[model] = [_slot(path, modules, components, blocks) for path in paths]
    return _SLOTS[model]


def _component_paths(model: HookedModel, modules: dict[str, Any]) -> list[str]:
    """List one path for each component in a block that stands in a Hugging Face module."""
    in_blocks = {id(module) for block in model.blocks for module in block.modules()}
    paths: dict[tuple[int, str], str] = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if id(module) in in_blocks and _stands_in_a_slot(module, modules[parent]):
            paths.setdefault((id(modules[parent]), name), path)
    return list(paths.values())


def _slot(path: str, modules: dict[str, Any], components: list[Any], blocks: set[int]) -> _Slot:
    """Describe the place of one component: its hook points and what is around it."""
    parent, _, name = path.rpartition(".")
    component = modules[path]
    # What stands in a slot of its own fires its hooks there. Inside attention that is so for the
    # projections alone: the Hugging Face module norms queries and keys in another layout.
    apart = {
        id(other)
        for other in components
        if other is not component and (_is_projection(other) or not _is_attention(component))
    }
    # What turns positions into angles has no weights, and hook points other than these two.
    has_weights = next(component.parameters(), None) is not None
    ends = (component.hook_in, component.hook_out) if has_weights else ()
    inner = tuple(
        point for point in _hook_points(component, apart) if not any(point is end for end in ends)
    )
    steps = path.split(".")[:-1]
    holders = [modules[".".join(steps[:n])] for n in range(1, len(steps) + 1)]
    within = frozenset(id(holder) for holder in holders if _is_component(holder))
    return _Slot(
        modules[parent]._modules,
        name,
        component,
        _OuterHooks(component),
        ends,
        inner,
        within,
        id(component) in blocks,
    )


def _hook_points(module: nn.Module, apart: set[int]) -> Iterator[Any]:
    """Give the hook points of a component and of what it holds.

    It goes down to the components in ``apart``, whose hooks fire by themselves.
    """
    for child in module._modules.values():
        if child is None or id(child) in apart:
            continue
        if hasattr(child, "fwd_hooks"):
            yield child
        else:
            yield from _hook_points(child, apart)


def _stands_in_a_slot(module: Any, holder: Any) -> bool:
    """Tell whether a component stands in the place of the module it holds."""
    return (
        _is_component(module)
        and module.original_component is not None
        and not _is_component(holder)
    )


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


def computes_its_own_way(model: HookedModel) -> bool:
    """Tell whether TransformerLens has changed the weights, or what is computed around hooks."""
    return getattr(model, "compatibility_mode", False) or any(
        getattr(model.cfg, flag, False) for flag in _OPTIONAL
    )


def may_fuse_attention(hf_model: Any) -> bool:
    """Tell whether Hugging Face itself would take fused attention for this architecture.

    Soft-capped scores are what it cannot compute. Whether it computes the same where it may is
    another question (``trusted_paths``).
    """
    config = hf_model.config
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    nested = hasattr(config, "text_config")
    return bool(getattr(hf_model, "_supports_sdpa", False)) and not capped and not nested
