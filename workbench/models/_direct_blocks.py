"""Compute a whole Llama-like block with a dozen torch functions, and on real tokens alone.

Beside its seven products, a block of Hugging Face's costs some two hundred Python calls for every
token that is written. The same block is computed here without calling a submodule, and the hook
points that sites stand for are called where they lie. Which blocks it fits is read off the modules
they hold; whether it computes the same is for the route check to say (``_route_checks``).

Where rows of unlike length are padded to one, products, norms and neurons are computed of the real
tokens, lying in one row behind each other; only attention, and hook points that are in use, see the
padded shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from workbench.models.packing import is_packed_layer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    Hook = Callable[[Tensor], Tensor] | None
    """A hook point where one is in use."""

    Angles = tuple[Float[Tensor, "batch pos d_head"], Float[Tensor, "batch pos d_head"]]
    """Cosines and sines of the rotary position embedding."""


_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


_HEAD_NORMS = {"q_norm", "k_norm"}


_MLP = ("gate_proj", "up_proj", "down_proj")


PADDING = 0.2
"""Share of a batch's places that must be padding for it to be left out: to gather the real tokens
takes about as long as this share of their products."""


_INSIDE: weakref.WeakKeyDictionary[Any, tuple[list[Any], list[Any]]] = weakref.WeakKeyDictionary()
"""Hook points and components of each block, found once."""


@dataclass(frozen=True, eq=False)
class _Norm:
    """An RMS norm over the last dimension: its weight, and what is added to the variance."""

    weight: Float[Tensor, " d"]
    eps: float

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(eq=False)
class Pass:
    """Hold what all blocks need of one pass, made by the first block that asks for it.

    Attributes:
        angles: The cosines and sines that Hugging Face's model gives to each block of a pass.
        cos: The cosines, with a dimension for heads.
        sin: The sines, with the sign of the half of a head that they multiply.
        masks: Attention masks of this pass, each as given and as it is added to the scores.
        real: Places of the real tokens, rows behind each other; None where all are computed.
    """

    angles: Angles | None = None
    cos: Any = None
    sin: Any = None
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    real: Int[Tensor, " token"] | None = None

    def begin(self, angles: Angles, mask: Tensor, shape: torch.Size) -> None:
        """Forget the pass before, if these angles are of another one.

        Args:
            angles: Cosines and sines.
            mask: Attention mask of this block.
            shape: Rows of this pass, and tokens of each.
        """
        if angles is self.angles:
            return
        self.angles, self.masks, self.real = angles, {}, _real_places(mask, *shape)
        cos, sin = angles
        half = sin.shape[-1] // 2
        self.cos = cos.unsqueeze(1)
        self.sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).unsqueeze(1)

    def added(
        self, mask: Bool[Tensor, "batch one pos past_and_pos"], dtype: torch.dtype
    ) -> Float[Tensor, "batch one pos past_and_pos"]:
        """Give a mask as numbers that are added to scores; torch would do so in every block."""
        if mask.dtype != torch.bool:
            return mask
        if id(mask) not in self.masks:
            zero = torch.zeros((), dtype=dtype, device=mask.device)
            # The mask itself is kept, too, so that no other one can get its id.
            self.masks[id(mask)] = mask, torch.where(mask, zero, float("-inf"))
        return self.masks[id(mask)][1]

    def gathered(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "*token d"]:
        """Take the real tokens, or all as they are."""
        return x if self.real is None else x.flatten(0, 1).index_select(0, self.real)

    def spread(
        self, x: Float[Tensor, "*token d"], over: Float[Tensor, "batch pos any"], *, keep: bool
    ) -> Float[Tensor, "batch pos d"]:
        """Put real tokens back where they were.

        Args:
            x: What ``gathered`` took, or was computed of it.
            over: A tensor of the padded shape.
            keep: Padding keeps what ``over`` has there; it is 0 otherwise.
        """
        if self.real is None:
            return x
        batch, n = over.shape[:2]
        padded = over.flatten(0, 1).clone() if keep else x.new_zeros(batch * n, x.shape[-1])
        return padded.index_copy_(0, self.real, x).view(batch, n, -1)

    def hooked(self, point: Hook, x: Tensor, over: Float[Tensor, "batch pos any"]) -> Tensor:
        """Let a hook point that is in use see, and change, tokens in the padded shape."""
        return self.shown(point, x, over)[0]

    def shown(
        self, point: Hook, x: Tensor, over: Float[Tensor, "batch pos any"]
    ) -> tuple[Tensor, Tensor]:
        """Return what a hook point makes of ``x``, and ``x`` with what it wrote into it."""
        if point is None or self.real is None:
            return _hooked(point, x), x
        padded = self.spread(x, over, keep=False)
        return self.gathered(point(padded).expand_as(padded)), self.gathered(padded)

    def turned(self, x: Float[Tensor, "batch head pos d_head"]) -> Tensor:
        """Turn queries or keys by their positions."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


class DirectBlock(nn.Module):
    """Stands where a block stands, and computes the same, without calling a submodule.

    Where gradients are wanted, the block itself runs.
    """

    def __init__(self, component: Any, instead: nn.Module, shared: Pass) -> None:
        super().__init__()
        self.__dict__.update(  # not as submodules: they are in the model already
            component=component, instead=instead, shared=shared, **_parts(component)
        )
        used = {name: point if is_used(point) else None for name, point in _served(component)}
        self.__dict__.update(used)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.forward(*args, **keywords)  # nobody sets torch's hooks here

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        position_embeddings: Angles | None = None,
        past_key_values: Any = None,
        **keywords: Any,
    ) -> Any:
        if torch.is_grad_enabled() or attention_mask is None or position_embeddings is None:
            return self.instead(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **keywords,
            )
        shared = self.shared
        shared.begin(position_embeddings, attention_mask, hidden_states.shape[:2])
        whole = _hooked(self.resid_pre, hidden_states)
        before = shared.gathered(whole)
        mixed = self._heads(self.norm_1(before), whole, attention_mask, past_key_values)
        heads = _hooked(self.z, mixed).expand_as(mixed)
        attended = self.o_proj.forward(shared.gathered(heads))
        between = before + shared.hooked(self.attn_out, attended, whole)
        # As in Hugging Face's block, an edit here is seen by the norm alone, unless made in place.
        edited, between = shared.shown(self.resid_mid, between, whole)
        normed = self.norm_2(edited)
        neurons = self.act(self.gate_proj.forward(normed)).mul_(self.up_proj.forward(normed))
        written = self.down_proj.forward(shared.hooked(self.mlp_post, neurons, whole))
        after = between + shared.hooked(self.mlp_out, written, whole)
        return _hooked(self.resid_post, shared.spread(after, whole, keep=True))

    def _heads(
        self,
        x: Float[Tensor, "*token d_model"],
        over: Float[Tensor, "batch pos d_model"],
        mask: Tensor,
        cache: Any,
    ) -> Float[Tensor, "batch pos head_and_d_head"]:
        """Compute what the heads mix of the values, side by side."""
        batch, n, _ = over.shape
        query, key, value = (
            self.shared.spread(projected.forward(x), over, keep=False).view(
                batch, n, -1, self.d_head
            )
            for projected in (self.q_proj, self.k_proj, self.v_proj)
        )
        value = value.transpose(1, 2)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = self.shared.turned(query.transpose(1, 2))
        key = self.shared.turned(key.transpose(1, 2))
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mask = self.shared.added(mask, query.dtype)
        mixed = _attention(query, key, value, mask, self.scaling)
        return mixed.transpose(1, 2).reshape(batch, n, -1)

    def __getattr__(self, name: str) -> Any:
        # What a caller asks a Hugging Face module.
        return getattr(self.__dict__["component"].original_component, name)


def direct_block(component: Any, instead: nn.Module, shared: Pass) -> DirectBlock | None:
    """Make the direct block of a component that stands for a block, if it has one now.

    It has none where the block is built in another way, where a hook point in it is used that is no
    site, where something else than its own layers would run (quantised weights, adapters, hooks of
    torch, forwards that were replaced), or in training.

    Args:
        component: A block of TransformerLens around one of Hugging Face's.
        instead: What runs where gradients are wanted.
        shared: What the blocks of a pass share.
    """
    if not is_direct(component):
        return None
    served = {id(point) for _, point in _served(component)}
    others = (point for point in _inside(component)[0] if id(point) not in served)
    return None if any(map(is_used, others)) else DirectBlock(component, instead, shared)


def is_direct(component: Any) -> bool:
    """Tell whether a block holds just the modules of a Llama-like one, as they were made.

    RMS norms before attention and MLP, four projections (with an RMS norm over each head's query
    and key, or without), and a gated MLP.
    """
    block = component.original_component
    if not (isinstance(block, nn.Module) and set(block._modules) == _BLOCK):
        return False
    parts = {name: _raw(child) for name, child in block._modules.items()}
    attention, mlp = parts["self_attn"], parts["mlp"]
    is_llama_like = (
        set(attention._modules) in (set(_PROJECTIONS), set(_PROJECTIONS) | _HEAD_NORMS)
        and set(mlp._modules) in (set(_MLP), {*_MLP, "act_fn"})
        and callable(getattr(mlp, "act_fn", None))
        and all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx"))
        and not (block._parameters or attention._parameters or mlp._parameters)
    )
    if not is_llama_like:
        return False
    linears = [_raw(attention._modules[name]) for name in _PROJECTIONS]
    linears += [_raw(mlp._modules[name]) for name in _MLP]
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    norms += [_raw(attention._modules[name]) for name in _HEAD_NORMS & set(attention._modules)]
    others = [block, attention, mlp, *norms]
    if isinstance(mlp.act_fn, nn.Module):
        others.append(mlp.act_fn)
    return (
        all(type(layer) is nn.Linear for layer in linears)
        and all(map(_is_rms_norm, norms))
        and all(_is_as_made(layer) or is_packed_layer(layer) for layer in linears)
        and all(map(_is_as_made, others))
        and not any(module.training or _has_torch_hooks(module) for module in (*others, *linears))
        and not any(map(is_watched, (component, *_inside(component)[1])))
    )


def is_used(point: Any) -> bool:
    """Tell whether a hook point has hooks; None, where a module has no such point, has none."""
    return bool(
        point is not None
        and (point.fwd_hooks or point.bwd_hooks or point._forward_hooks or point._forward_pre_hooks)
    )


def is_watched(component: Any) -> bool:
    """Tell whether anyone but the two libraries has put a torch hook on a component."""
    hooks = [*component._forward_hooks.values(), *component._forward_pre_hooks.values()]
    return any(map(_is_foreign, hooks))


_OWN = ("transformer_lens.", "transformers.utils.output_capturing")
"""Modules whose hooks, which a call of ``run_with_cache`` leaves behind, only record."""


def _is_foreign(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(_OWN)


def _served(component: Any) -> Iterator[tuple[str, Any]]:
    """Name the hook points of a block that sites stand for."""
    inside = component.original_component._modules
    attention, mlp = inside["self_attn"], inside["mlp"]
    yield "resid_pre", component.hook_in
    yield "resid_mid", _point(inside["post_attention_layernorm"], "hook_in")
    yield "resid_post", component.hook_out
    yield "attn_out", _point(attention, "hook_out")
    yield "mlp_out", _point(mlp, "hook_out")
    yield "mlp_post", _point(_raw(mlp)._modules["down_proj"], "hook_in")
    yield "z", _point(_raw(attention)._modules["o_proj"], "hook_in")


def _parts(component: Any) -> dict[str, Any]:
    """Collect what a direct block computes with."""
    inside = {name: _raw(child) for name, child in component.original_component._modules.items()}
    attention, mlp = inside["self_attn"], inside["mlp"]
    head_norms = {
        name: _norm(_raw(attention._modules[name])) if name in attention._modules else None
        for name in _HEAD_NORMS
    }
    act = mlp.act_fn
    return {
        **{name: _raw(attention._modules[name]) for name in _PROJECTIONS},
        **{name: _raw(mlp._modules[name]) for name in _MLP},
        **head_norms,
        "norm_1": _norm(inside["input_layernorm"]),
        "norm_2": _norm(inside["post_attention_layernorm"]),
        "act": act.forward if isinstance(act, nn.Module) else act,
        "d_head": attention.head_dim,
        "scaling": attention.scaling,
        "layer": attention.layer_idx,
    }


def _attention(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head past_and_pos d_head"],
    value: Float[Tensor, "batch kv_head past_and_pos d_head"],
    mask: Float[Tensor, "batch one pos past_and_pos"],
    scaling: float,
) -> Float[Tensor, "batch head pos d_head"]:
    """Attend with fewer keys and values than queries, which are not repeated where it can be."""
    attend = functional.scaled_dot_product_attention
    batch, n_heads, n, d_head = query.shape
    groups = n_heads // key.shape[1]
    if n == 1:  # the queries of a group are like several positions that see the same
        query = query.reshape(batch, -1, groups, d_head)
        return attend(query, key, value, attn_mask=mask, scale=scaling).reshape(
            batch, n_heads, 1, -1
        )
    # Torch's fused kernels on other devices take no mask with grouped queries.
    if groups > 1 and query.device.type != "cpu":
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        groups = 1
    return attend(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)


def _real_places(mask: Tensor, batch: int, n: int) -> Int[Tensor, " token"] | None:
    """Find the real tokens of a pass; None where few are not, or the mask does not tell.

    A real token sees itself, whatever else a window or the past hides from it, and padding is seen
    by no token. Where a mask lets padding see itself it is computed, as a real token is.
    """
    if n == 1 or mask.dim() != 4 or mask.shape[:3] != (batch, 1, n):
        return None
    sees = mask if mask.dtype == torch.bool else mask == 0
    itself = sees[:, 0, :, mask.shape[3] - n :].diagonal(dim1=1, dim2=2).flatten()
    places = itself.nonzero()[:, 0]
    return places if 0 < len(places) <= (1 - PADDING) * len(itself) else None


def _hooked(point: Hook, x: Tensor) -> Tensor:
    return x if point is None else point(x)


def _raw(module: Any) -> Any:
    """Give Hugging Face's module where a component stands around it."""
    inside = module._modules.get("_original_component")
    return module if inside is None else inside


def _point(component: Any, name: str) -> Any:
    """Give a hook point of a component; None for a module that has none."""
    return component._modules.get(name)


def _inside(component: Any) -> tuple[list[Any], list[Any]]:
    """List the hook points in a block, and the components in it."""
    if component not in _INSIDE:
        modules = [module for module in component.modules() if module is not component]
        points = [module for module in modules if hasattr(module, "fwd_hooks")]
        components = [module for module in modules if "_original_component" in module._modules]
        _INSIDE[component] = points, components
    return _INSIDE[component]


def _norm(module: Any) -> _Norm:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return _Norm(module.weight, eps)  # type: ignore[arg-type]


def _is_rms_norm(module: Any) -> bool:
    """Tell whether a norm may be one of root mean squares: a weight, a small number, no more."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return set(module._parameters) == {"weight"} and not module._modules and isinstance(eps, float)


def _is_as_made(module: nn.Module) -> bool:
    """Tell whether nobody has put another forward in the place of a module's own."""
    return "forward" not in module.__dict__


def _has_torch_hooks(module: nn.Module) -> bool:
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(backward) or is_watched(module)
