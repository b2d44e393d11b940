"""Try every faster way through a model on a few tokens, against Hugging Face's model alone.

Two rows of unlike length that begin alike are enough to need all of it: padding, a shared prefix, a
cache that grows, and rows that are taken from it. Mostly all ways agree at once; only where they do
not, they are tried one by one.

In 16 bit the model's own attention rounds scores, of which large ones then differ by more than a
tolerance can allow (Qwen's reach several hundred). Ways that fuse attention, which round less, are
compared with the model's own attention on queries, keys and values in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.models._idle_hooks import (
    computes_its_own_way,
    has_direct_blocks,
    hugging_face_alone,
    may_fuse_attention,
)
from workbench.models.batches import PaddingSide, pad_ids
from workbench.models.forward import (
    as_by_default,
    fast,
    last_logits,
    late_logits,
    prefix_cache,
    rows_of_cache,
)
from workbench.models.hooked_model import HookedModel, hugging_face_model, input_device, model_lock
from workbench.models.packing import is_packed, pack_linears, unpacked
from workbench.models.shared_layers import run_below
from workbench.models.trusted_paths import ROUTES, Route, assumed, trusts

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from jaxtyping import Bool, Float, Int
    from torch import Tensor


LENGTHS = (9, 7)
"""Tokens of the two rows."""


PREFIX = 3
"""Tokens with which both begin."""


TOLERANCE = 1e-3
"""Largest error of a float32 model's logits at one position, as a share of their norm."""


TOLERANCE_16_BIT = 0.1
"""The same for 16 bit and quantised weights, where rounding alone reaches some hundredths. There
the median over positions counts: near a tie, an expert of a mixture may be another one."""


_Pairs = Iterator[tuple["Tensor", "Tensor"]]
"""Logits that were found, and those expected, (pos, vocabulary)."""


def check_routes(model: HookedModel) -> Mapping[Route, str]:
    """Find the routes that must not be taken for a model, each with the reason.

    Hooks that are set are out of action meanwhile, and random numbers are left as they were.

    Raises:
        ValueError: If the model cannot be run at all.
    """
    if hugging_face_model(model) is None:  # such a model takes no faster way than padding
        return {}
    with torch.no_grad(), model_lock(model), _hooks_out_of_action(model), as_by_default():
        trial = _Trial.of(model)
        if not all(bool(logits.isfinite().all()) for logits in trial.expected):
            return dict.fromkeys(ROUTES[1:], "the model's own numbers are not finite")
        trial.check_causal()
        unseen = _beyond_the_check(model)
        every = frozenset(ROUTES) - unseen.keys()
        if trial.problem(every, trial.all_at_once) is None:
            return unseen
        return {**trial.one_by_one(), **unseen}


def _beyond_the_check(model: HookedModel) -> dict[Route, str]:
    """List the routes that rows as short as these cannot tell about.

    Attention that picks the keys each token sees (``index_topk`` of them) is like any other until
    there are more keys than that.
    """
    config: Any = hugging_face_model(model).config  # type: ignore[union-attr]
    for name, value in vars(config.get_text_config(decoder=True)).items():
        if name.endswith("topk") and isinstance(value, int) and value >= max(LENGTHS):
            return {"fused": f"attention is sparse beyond {value} tokens, the check is shorter"}
    return {}


@dataclass(frozen=True, eq=False)
class _Trial:
    """A model, two rows of tokens, and the logits behind each token when a row runs alone.

    Attributes:
        model: A hooked model.
        rows: Tokens.
        expected: What Hugging Face's model computes.
        exactly: The same in 16 bit with attention in float32, to compare fused attention with.
        tolerance: Largest error that is taken for rounding.
    """

    model: HookedModel
    rows: tuple[list[int], list[int]]
    expected: tuple[Float[Tensor, "pos d_vocab"], ...]
    exactly: tuple[Float[Tensor, "pos d_vocab"], ...]
    tolerance: float

    @classmethod
    def of(cls, model: HookedModel) -> _Trial:
        """Draw the rows and let Hugging Face's model run them."""
        ids = _ordinary_ids(model, PREFIX + sum(LENGTHS))
        first = ids[: LENGTHS[0]]
        rows = first, first[:PREFIX] + ids[LENGTHS[0] : LENGTHS[0] + LENGTHS[1] - PREFIX]
        weights = list(model.parameters())
        exact = all(weight.dtype in (torch.float32, torch.float64) for weight in weights)
        trial = cls(model, rows, (), (), TOLERANCE if exact else TOLERANCE_16_BIT)
        try:
            with trial._alone():
                expected = exactly = tuple(trial._logits([row], "right")[0] for row in rows)
                if not exact and may_fuse_attention(hugging_face_model(model)):
                    with suppress(AttributeError), _attention_in_float32(model):
                        exactly = tuple(trial._logits([row], "right")[0] for row in rows)
        except Exception as error:  # any module of any architecture may raise anything
            raise ValueError(
                f"{model.cfg.model_name!r} cannot be run ({_first_line(error)}); choose a causal "
                "language model that Hugging Face's transformers runs on token ids alone."
            ) from error
        return cls(model, rows, expected, exactly, trial.tolerance)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let Hugging Face's model run as if TransformerLens had not taken it over."""
        alone: AbstractContextManager[Any] = (
            assumed(frozenset())  # TransformerLens has changed the weights or what is computed
            if computes_its_own_way(self.model)
            else hugging_face_alone(self.model)
        )
        with assumed(frozenset()), alone, unpacked(self.model):
            yield

    @property
    def wanted(self) -> tuple[Float[Tensor, "pos d_vocab"], ...]:
        """Give what the routes that are tried right now have to compute."""
        return self.exactly if trusts(self.model, "fused") else self.expected

    def check_causal(self) -> None:
        """Raise where the first tokens, which both rows share, see what comes after them.

        Raises:
            ValueError: If they do.
        """
        one, other = (logits[:PREFIX] for logits in self.expected)
        error = self._error(one, other)
        if error > max(self.tolerance, TOLERANCE_16_BIT / 2):
            raise ValueError(
                f"{self.model.cfg.model_name!r} is not causal: its tokens see what comes after "
                f"them (logits off by {error:.2g}); choose a model that writes from left to right."
            )

    def problem(
        self, routes: frozenset[Route], scenario: Callable[[frozenset[Route]], _Pairs]
    ) -> str | None:
        """Run a scenario with some routes trusted; say what went wrong, None if nothing did."""
        try:
            with assumed(routes):
                errors = [self._error(found, wanted) for found, wanted in scenario(routes)]
        except Exception as error:  # any module of any architecture may raise anything
            return _first_line(error)
        # The comparison is false for nan too.
        return None if max(errors) <= self.tolerance else f"off by {max(errors):.2g}"

    def one_by_one(self) -> Mapping[Route, str]:
        """Try each route with the ones that already proved right where it needs them."""
        untrusted: dict[Route, str] = {}
        base: set[Route] = set()

        def attempt(route: Route, scenario: Callable[[frozenset[Route]], _Pairs]) -> None:
            needed = {"growing": "cache", "prefix": "cache", "shared_layers": "prefix"}
            needed["direct"] = "fused"
            missing = untrusted.get(needed.get(route, route))  # type: ignore[call-overload]
            found = missing or self.problem(frozenset(base | {route}), scenario)
            if found is None:
                base.add(route)
            else:
                untrusted[route] = found

        with unpacked(self.model):
            attempt("components", self.alone)
            base.clear()  # the others go by Hugging Face's modules where these are right
            attempt("bypass", self.alone)
            attempt("padding", lambda _: self._compared(self._logits(self.rows, "left")))
            attempt("right_padding", lambda _: self._compared(self._logits(self.rows, "right")))
            attempt("cache", self.decoded)
            attempt("growing", self.decoded)
            attempt("prefix", self.behind_a_prefix)
            attempt("padding_behind", self.behind_a_prefix)
            attempt("shared_layers", self.behind_a_prefix)
            attempt("late_head", self.in_parts)
            attempt("fused", self.all_at_once)
            if has_direct_blocks(self.model):  # else nothing goes that way
                attempt("direct", self.all_at_once)
        if is_packed(self.model):
            attempt("packed", self.alone)
            if "packed" in untrusted:
                hf_model: Any = hugging_face_model(self.model)
                pack_linears(hf_model, "off")
        if "components" not in untrusted:
            base.add("components")
        if self.problem(frozenset(base), self.all_at_once) is not None:
            return dict.fromkeys(ROUTES[1:], "right one by one, wrong together") | untrusted
        return untrusted

    def all_at_once(self, routes: frozenset[Route]) -> _Pairs:
        """Take all trusted routes together, and TransformerLens's own components beside them."""
        if "components" in routes:
            with assumed(frozenset({"components"})):
                yield next(self.alone(routes))
        if "prefix" in routes:
            yield from self.behind_a_prefix(routes)
        else:
            yield from self.alone(routes)
        if "cache" in routes and "prefix" not in routes:
            yield from self.decoded(routes)
        yield from self.in_parts(routes)
        if "direct" in routes and has_direct_blocks(self.model):
            yield from self.at_the_end(routes)

    def at_the_end(self, _: frozenset[Route]) -> _Pairs:
        """Run a row at the last positions of the context: attention may be scaled by positions."""
        tokens, mask = self._padded(self.rows[:1], "right")
        hf_model: Any = hugging_face_model(self.model)
        config = hf_model.config.get_text_config(decoder=True)
        end = getattr(config, "max_position_embeddings", 0)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        keywords = {"attention_mask": mask.long(), "use_cache": False}
        keywords["position_ids"] = positions + max(0, end - tokens.shape[1])
        is_exact = self.exactly is self.expected
        with self._alone(), nullcontext() if is_exact else _attention_in_float32(self.model):
            expected = hf_model(tokens, **keywords).logits
        with fast(self.model):
            yield hf_model(tokens, **keywords).logits[0], expected[0]

    def alone(self, _: frozenset[Route]) -> _Pairs:
        """Run each row by itself."""
        for tokens, expected in zip(self.rows, self.wanted, strict=True):
            yield self._logits([tokens], "right")[0], expected

    def decoded(self, _: frozenset[Route]) -> _Pairs:
        """Read all but two tokens at once, and these one at a time, in two copies of the row."""
        row, expected = self.rows[0], self.wanted[0]
        tokens, mask = self._padded([row], "right")
        start = len(row) - 2
        begun = last_logits(self.model, tokens[:, :start], mask[:, :start], 1, use_cache=True)
        cache = rows_of_cache(_kept(begun[1]), tokens.new_zeros(2))
        tokens, mask = tokens.repeat(2, 1), mask.repeat(2, 1)
        for place in range(start, len(row)):
            new, seen = tokens[:, place : place + 1], mask[:, : place + 1]
            logits, cache = last_logits(self.model, new, seen, 1, cache=cache, use_cache=True)
            for one in logits:
                yield one, expected[place : place + 1]

    def behind_a_prefix(self, routes: frozenset[Route]) -> _Pairs:
        """Read both rows behind their common prefix, each twice, and their last tokens apart."""
        places = (0, 1) if "padding_behind" in routes else (0, 0)
        rests = [self.rows[place][PREFIX:-1] for place in places]
        rest, real = self._padded(rests, "left")
        tokens, width = rest.repeat(2, 1), rest.shape[1]
        mask = torch.cat([real.new_ones(4, PREFIX), real.repeat(2, 1)], dim=1)
        prefix = _kept(prefix_cache(self.model, self.rows[0][:PREFIX]))
        cache = rows_of_cache(prefix, tokens.new_zeros(4))
        layer = self.model.cfg.n_layers // 2
        below = run_below(self.model, layer, tokens, mask, cache, [*places, *places])
        if below is None:
            logits, cache = last_logits(
                self.model, tokens, mask, width, cache=cache, use_cache=True
            )
        else:
            with below.known(self.model, cache):
                logits, cache = last_logits(
                    self.model, tokens, mask, width, cache=cache, use_cache=True
                )
        for row, place in enumerate([*places, *places]):
            n = len(self.rows[place]) - 1 - PREFIX
            yield logits[row, width - n :], self.wanted[place][PREFIX:-1]
        last = tokens.new_tensor([[self.rows[place][-1]] for place in (*places, *places)])
        mask = torch.cat([mask, mask.new_ones(4, 1)], dim=1)
        logits, _ = last_logits(self.model, last, mask, 1, cache=cache, use_cache=True)
        for row, place in enumerate([*places, *places]):
            yield logits[row], self.wanted[place][-1:]

    def in_parts(self, routes: frozenset[Route]) -> _Pairs:
        """Compute logits in two parts, of both rows where they may share a batch."""
        rows = self.rows if "padding" in routes else self.rows[:1]
        tokens, mask = self._padded(rows, "left")
        width = tokens.shape[1]
        parts, _ = late_logits(self.model, tokens, mask, width)
        logits = torch.cat([parts(slice(0, 4)), parts(slice(4, width))], dim=1)
        for place, row in enumerate(rows):
            yield logits[place, width - len(row) :], self.wanted[place]

    def _compared(self, found: Sequence[Tensor]) -> _Pairs:
        return iter(zip(found, self.wanted, strict=True))

    def _logits(
        self, rows: Sequence[Sequence[int]], side: PaddingSide
    ) -> list[Float[Tensor, "pos d_vocab"]]:
        """Run rows as one batch and return each one's logits."""
        tokens, mask = self._padded(rows, side)
        logits, _ = last_logits(self.model, tokens, mask, tokens.shape[1])
        return [logits[place][mask[place]] for place in range(len(rows))]

    def _padded(
        self, rows: Sequence[Sequence[int]], side: PaddingSide
    ) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
        tokens, mask = pad_ids(rows, pad_id=self.rows[0][0], side=side)
        device = input_device(self.model)
        return tokens.to(device), mask.to(device)

    def _error(
        self, found: Float[Tensor, "pos vocab"], wanted: Float[Tensor, "pos vocab"]
    ) -> float:
        """Compare logits up to a constant per position, which changes no probability."""
        difference, wanted = found.float() - wanted.float(), wanted.float()
        difference = difference - difference.mean(dim=-1, keepdim=True)
        wanted = wanted - wanted.mean(dim=-1, keepdim=True)
        relative = difference.norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
        return float(relative.max() if self.tolerance == TOLERANCE else relative.median())


@contextmanager
def _attention_in_float32(model: HookedModel) -> Iterator[None]:
    """Let the model's own attention run in float32 inside the block, whatever its weights are.

    An architecture that does not have it as a function of its module is left as it is.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any
    ) -> Any:
        own: Any = sys.modules[type(module).__module__]
        mask = None if mask is None else mask.float()
        out, weights = own.eager_attention_forward(
            module, query.float(), key.float(), value.float(), mask, **others
        )
        return out.to(query.dtype), weights

    name, config = "workbench_float32", hugging_face_model(model).config  # type: ignore[union-attr]
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    before = config._attn_implementation
    try:
        config._attn_implementation = name
        yield
    finally:
        config._attn_implementation = before


def _kept(cache: Any) -> Any:
    """Return a cache, if there is one."""
    if cache is None:
        raise ValueError("the model hands no cache back")
    return cache


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).split("\n")[0]
    return f"{type(error).__name__}: {line:.160}"


def _ordinary_ids(model: HookedModel, n: int) -> list[int]:
    """Pick token ids from all over the vocabulary, no special ones, always the same."""
    tokenizer, config = model.tokenizer, hugging_face_model(model).config  # type: ignore[union-attr]
    text_config = config.get_text_config(decoder=True)
    sizes = [getattr(text_config, "vocab_size", None), tokenizer and len(tokenizer)]
    size = min(size for size in sizes if size)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    golden, place = 0.6180339887, 0
    ids: list[int] = []
    while len(ids) < n:
        place += 1
        token = int(size * (place * golden % 1))
        if token not in special or place > 100 * n:  # a vocabulary may be nothing but special
            ids.append(token)
    return ids


@contextmanager
def _hooks_out_of_action(model: HookedModel) -> Iterator[None]:
    """Take off every hook but TransformerLens's own inside the block, and put it back."""
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    lists: list[tuple[Any, str, list[Any]]] = []
    hf_model: Any = hugging_face_model(model)
    modules = {id(module): module for module in (*model.modules(), *hf_model.modules())}
    for module in modules.values():
        is_point = hasattr(module, "fwd_hooks")
        for kind in ("fwd_hooks", "bwd_hooks") if is_point else ():
            lists.append((module, kind, getattr(module, kind)))
            setattr(module, kind, [])
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            if hooks:
                taken.append((hooks, dict(hooks)))
                for key, hook in taken[-1][1].items():
                    own = str(getattr(hook, "__module__", "")).startswith("transformer_lens.")
                    if is_point or not own:
                        del hooks[key]
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)
        for module, kind, before_it in lists:
            setattr(module, kind, before_it)
