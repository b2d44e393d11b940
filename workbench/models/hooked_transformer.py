"""What TransformerLens 3.x does in another way than 4.x: its ``HookedTransformer`` above all.

A HookedTransformer keeps keys and values in a cache of its own kind, takes the mask of the new
columns alone, computes logits for every column, and may have processed weights. All that is known
of it is here. TransformerLens 4 has no such class.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from workbench.models.hooked_model import HookedModel


_POST_NORM = frozenset({"Olmo2ForCausalLM", "Olmo3ForCausalLM"})
"""Architectures whose norms behind attention and MLP TransformerLens 3 calls ln1 and ln2, in its
bridge too."""


def is_hooked_transformer(model: HookedModel) -> bool:
    """Tell whether a model is a TransformerLens 3.x HookedTransformer, or a subclass of it."""
    return any(kind.__name__ == "HookedTransformer" for kind in type(model).__mro__)


def takes_cache(model: HookedModel) -> bool:
    """Tell whether a model is a HookedTransformer that can keep keys and values.

    With grouped heads taken apart it cannot.
    """
    cfg = model.cfg
    return is_hooked_transformer(model) and not getattr(
        cfg, "ungroup_grouped_query_attention", False
    )


def last_logits_and_cache(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"],
    n: int,
    *,
    cache: Any = None,
    use_cache: bool = False,
) -> tuple[Float[Tensor, "batch n d_vocab"], Any]:
    """Compute the logits after each of the last ``n`` columns, and the cache, in one pass.

    The cache is a transformers ``Cache``, as the bridge has it, so that all that copies rows of one
    or lets it grow works for both. It holds keys before their rotation, as HookedTransformer does.

    Arguments are those of ``forward.last_logits``.
    """
    if cache is None and use_cache and takes_cache(model):
        cache = _empty_cache(model, len(tokens))
    mask = mask.long()
    keywords: dict[str, Any] = {"attention_mask": mask[:, mask.shape[1] - tokens.shape[1] :]}
    if cache is not None:
        keywords["past_kv_cache"] = _CacheView(cache, mask)
        if use_cache:
            from workbench.models._growing_cache import grow_in_place

            grow_in_place(cache)
    with _only_last_columns(model, n):
        return model(tokens, **keywords), cache


def attention_windows(model: HookedModel) -> list[int]:
    """List how many columns a HookedTransformer's local layers look back, padding counted too.

    With ALiBi, where distances are counted in columns, that is none.
    """
    cfg: Any = model.cfg
    if getattr(cfg, "positional_embedding_type", None) == "alibi":
        return [0]
    is_local = getattr(cfg, "use_local_attn", False) and "local" in (cfg.attn_types or ())
    return [cfg.window_size] if is_local else []


def weights_are_processed(model: HookedModel) -> bool:
    """Tell whether layer norms were folded into a HookedTransformer's weights, or these centred."""
    if str(model.cfg.normalization_type).endswith("Pre"):  # type: ignore[attr-defined]
        return True
    written = model.blocks[0].attn.W_O.detach().float()
    return bool(written.mean(dim=-1).abs().max() < 1e-3 * written.abs().mean())


def norm_name(model: HookedModel, layer: int, name: str) -> str | None:
    """Give the name of a block's norm in this model, or None where it has no such norm.

    Args:
        model: A hooked model, of either kind.
        layer: The block.
        name: The name in TransformerLens 4: ln1 or ln2 for the norms before attention and MLP,
            ln1_post or ln2_post for those behind them.
    """
    architectures = (
        getattr(model.cfg, key, None) for key in ("architecture", "original_architecture")
    )
    if hasattr(model.blocks[layer], "ln1_post") or _POST_NORM.isdisjoint(architectures):
        return name
    return name.removesuffix("_post") if name.endswith("_post") else None


def norm_of_block(model: HookedModel, layer: int, name: str) -> Any | None:
    """Give a norm of a block by its ``norm_name``, or None where the block has none."""
    own_name = norm_name(model, layer, name)
    return None if own_name is None else getattr(model.blocks[layer], own_name, None)


def watch_passes(
    model: HookedModel, see: Callable[[Tensor, int, Tensor | None], None]
) -> Iterator[RemovableHandle]:
    """Tell of each forward pass before it runs, also of those of the model's own ``generate``.

    That one does not call the model but its ``forward``, where no hook of torch fires; so the first
    block is watched.

    Args:
        model: A HookedTransformer.
        see: Is given what enters the first block (one entry per row and column), the columns that
            the cache holds, and the mask of the columns, where there is one.

    Yields:
        Handles; the watch ends when they are removed.
    """
    of_texts: list[Tensor] = []

    def before_model(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = args[0] if args else keywords["input"]
        # Behind rows that it pads on the right, the model needs no mask and makes none.
        of_texts[:] = [] if torch.is_tensor(given) else [_mask_of_texts(model, given, keywords)]

    def before_first_block(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        cached, mask = keywords.get("past_kv_cache_entry"), keywords.get("attention_mask")
        if mask is None and of_texts:
            mask = of_texts.pop()
        see(args[0], 0 if cached is None else int(cached.past_keys.shape[1]), mask)

    yield model.register_forward_pre_hook(before_model, with_kwargs=True)  # type: ignore[attr-defined]
    yield model.blocks[0].register_forward_pre_hook(before_first_block, with_kwargs=True)


def _mask_of_texts(
    model: Any, given: str | list[str], keywords: Mapping[str, Any]
) -> Bool[Tensor, "batch pos"]:
    """Mask what is no padding in the tokens that HookedTransformer makes of texts.

    It pads them on the right, or makes the mask itself.
    """
    texts = [given] if isinstance(given, str) else given
    options = {"prepend_bos": keywords["prepend_bos"]} if "prepend_bos" in keywords else {}
    lengths = torch.tensor([model.to_tokens(text, **options).shape[1] for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return mask.to(next(iter(model.parameters())).device)


@dataclass(frozen=True)
class _LayerView:
    """One layer of a transformers cache, under the names HookedTransformer's attention uses."""

    layer: Any

    @property
    def past_keys(self) -> Float[Tensor, "batch pos head d_head"]:
        return self.layer.keys.transpose(1, 2)

    def append(
        self,
        new_keys: Float[Tensor, "batch pos head d_head"],
        new_values: Float[Tensor, "batch pos head d_head"],
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.layer.update(new_keys.transpose(1, 2), new_values.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _CacheView:
    """A transformers cache, under the names HookedTransformer's forward pass uses."""

    cache: Any
    mask: Int[Tensor, "batch past_and_pos"]

    def __getitem__(self, layer: int) -> _LayerView:
        return _LayerView(self.cache.layers[layer])

    def append_attention_mask(self, _: Tensor) -> Int[Tensor, "batch past_and_pos"]:
        """Give the mask of the cached and the new columns; that of the new ones is its end."""
        return self.mask


def _empty_cache(model: HookedModel, rows: int) -> Any:
    """Make a cache of no columns."""
    from transformers import DynamicCache

    cfg: Any = model.cfg
    parameter = next(iter(model.parameters()))
    heads = cfg.n_key_value_heads or cfg.n_heads
    nothing = torch.zeros(rows, heads, 0, cfg.d_head, device=parameter.device, dtype=cfg.dtype)
    cache: Any = DynamicCache()
    for layer in range(cfg.n_layers):
        cache.update(nothing, nothing, layer)
    return cache


@contextmanager
def _only_last_columns(model: HookedModel, n: int) -> Iterator[None]:
    """Compute the logits of the last ``n`` columns only, inside the block."""

    def cut(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -n:], *args[1:])

    handle = model.unembed.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()
