"""Take a faster way through a model only where it was shown to compute what the slow one computes.

Names of architectures and flags of libraries promise more than they keep: an attention that says it
can be fused may add a mask that is to be taken as true and false, and a cache may hold something
else than keys and values. So the first pass of every model is preceded by a few short ones (see
``_route_checks``), which run some tokens both ways. A way that gives other numbers, or ends with an
error, is not taken for that model, and the reason is kept.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from workbench.models.hooked_model import HookedModel


Route = Literal[
    "components",
    "bypass",
    "packed",
    "padding",
    "right_padding",
    "fused",
    "direct",
    "cache",
    "growing",
    "prefix",
    "padding_behind",
    "shared_layers",
    "late_head",
]
"""A way through a model. The first is slow, and the only one where hooks inside a component of
TransformerLens are in use; the others are faster:

- components: TransformerLens's own components run, around Hugging Face's weights;
- bypass: Hugging Face's own modules run where TransformerLens's hooks are idle;
- packed: packed linear layers;
- padding, right_padding: rows of different lengths share a batch, filled up on the left or right;
- fused: torch's fused attention;
- direct: Llama-like blocks computed by torch's functions alone, attention fused;
- cache: what earlier tokens left behind (keys, values, states) is kept while an answer is written;
- growing: keys and values grow in place;
- prefix: the tokens that all rows begin with are computed once;
- padding_behind: padding stands between these and the rest of a row;
- shared_layers: layers below all steering run once per prompt;
- late_head: logits are computed from hidden states, a few columns at a time.
"""


ROUTES: tuple[Route, ...] = get_args(Route)


_UNTRUSTED: weakref.WeakKeyDictionary[Any, Mapping[Route, str]] = weakref.WeakKeyDictionary()
"""Routes each model must not take, with the reason."""


_assumed: ContextVar[frozenset[Route] | None] = ContextVar("assumed", default=None)


_LOG = logging.getLogger(__name__)


def trusts(model: HookedModel, route: Route) -> bool:
    """Tell whether a model may take a route; the first question runs the checks."""
    assumed = _assumed.get()
    return route in assumed if assumed is not None else route not in untrusted_paths(model)


def untrusted_paths(model: HookedModel) -> Mapping[Route, str]:
    """List the faster ways that a model does not take, each with the reason in a few words.

    The first call for a model checks them all, which takes as long as a few passes over a dozen
    tokens. It is empty for most models.

    Raises:
        ValueError: If the model computes something else once TransformerLens has hooked it.
    """
    if model not in _UNTRUSTED:
        from workbench.models._route_checks import check_routes

        untrusted = check_routes(model)
        if {"components", "bypass"} <= untrusted.keys():
            raise ValueError(
                f"{model.cfg.model_name!r} cannot be hooked: with TransformerLens around it, it "
                f"computes something else ({untrusted['components']}); choose another model."
            )
        _UNTRUSTED[model] = untrusted
        if untrusted:
            reasons = "; ".join(f"{route}: {reason}" for route, reason in untrusted.items())
            _LOG.warning("%s takes slower ways (%s)", model.cfg.model_name, reasons)
    return _UNTRUSTED[model]


@contextmanager
def assumed(routes: frozenset[Route]) -> Iterator[None]:
    """Trust exactly these routes inside the block: how they are tried."""
    token = _assumed.set(routes)
    try:
        yield
    finally:
        _assumed.reset(token)
