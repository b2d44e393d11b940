"""Name the vectors inside a transformer that can be read or edited: a layer and a kind.

No other module spells the name of a TransformerLens hook point.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from workbench.files.hints import did_you_mean
from workbench.models.errors import CannotBeDone
from workbench.models.hooked_model import check_hooked, hook_points

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workbench.models.hooked_model import HookedModel


HOOK_NAMES = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
    "z": "blocks.{layer}.attn.hook_z",
}
"""Kind of site to the TransformerLens name of its hook point."""


INNER_HOOK_NAMES = {
    "v": "blocks.{layer}.attn.hook_v",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "mlp_gate": "blocks.{layer}.mlp.hook_pre",
    "mlp_value": "blocks.{layer}.mlp.hook_pre_linear",
    "norm_scale": "blocks.{layer}.{norm}.hook_scale",
}
"""What a sublayer computes on the way to its output: only read, to split a neuron or a head.

v and pattern are what a head mixes and how; mlp_gate and mlp_value the two factors of a gated
neuron (the gate before its activation function); norm_scale what a norm divides by, for those
behind attention and MLP (Gemma-2, Gemma-3, OLMo-2).
"""


KINDS = tuple(HOOK_NAMES)
"""Every kind of site."""


RESIDUAL_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Kinds whose vectors have the residual stream's width: where steering vectors are measured."""


_PATTERN = re.compile(r"^L?(\d+)[.:](\w+)$")


@dataclass(frozen=True, order=True)
class Site:
    """One vector inside a transformer: a layer and the kind of activation there.

    Attributes:
        layer: Block index, from 0.
        kind: One of ``KINDS``: resid_pre, resid_mid and resid_post are the residual stream before,
            inside and after the block; attn_out and mlp_out what attention and MLP add to it;
            mlp_post the neurons (the values that enter W_out, after gating); z the heads' outputs
            before W_O, flattened to one vector.
    """

    layer: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in HOOK_NAMES:
            raise ValueError(
                f"unknown site kind {self.kind!r}; kinds: {', '.join(KINDS)}."
                f"{did_you_mean(self.kind, KINDS)}"
            )
        if isinstance(self.layer, bool) or not isinstance(self.layer, Integral) or self.layer < 0:
            raise ValueError(f"layer must be a whole number from 0, got {self.layer!r}.")
        # A NumPy integer, as tables hold them, would print otherwise.
        object.__setattr__(self, "layer", int(self.layer))

    @property
    def hook_name(self) -> str:
        """Spell the TransformerLens name of the hook point."""
        return HOOK_NAMES[self.kind].format(layer=self.layer)

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site as it is printed: ``"L15.resid_post"`` (also ``"15:resid_post"``).

        Raises:
            ValueError: If the text is not a layer and a kind.
        """
        match = _PATTERN.match(text.strip())
        if match is None:
            raise ValueError(f"cannot read site {text!r}; write it like 'L15.resid_post'.")
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"L{self.layer}.{self.kind}"


def sites_of_kind(model: HookedModel, kind: str, layers: Iterable[int] | None = None) -> list[Site]:
    """List the sites of one kind, one per layer.

    Args:
        model: A hooked model.
        kind: One of ``KINDS``.
        layers: Which layers; all of them by default.

    Raises:
        ValueError: If the kind is unknown or the model has no such hook point.
    """
    sites = [
        Site(layer, kind) for layer in (range(model.cfg.n_layers) if layers is None else layers)
    ]
    check_sites(model, sites)
    return sites


def present_sites(model: HookedModel, kinds: Iterable[str]) -> list[Site]:
    """List the sites of some kinds that a model computes, kind by kind.

    Layers that do not compute a kind (recurrent ones have no heads, a mixture of experts no
    neurons) are passed over.
    """
    present = hook_points(model)
    sites = [Site(layer, kind) for kind in kinds for layer in range(model.cfg.n_layers)]
    return [site for site in sites if _why_missing(site, present) is None]


def check_sites(model: HookedModel, sites: Iterable[Site]) -> None:
    """Raise unless the model has a hook point for each site.

    A hook on a wrong name would never fire, and nothing would say so.

    Raises:
        ValueError: If a layer is beyond the model.
        CannotBeDone: If the architecture has no such hook point, or, for mlp_post, no neurons that
            all tokens share (a mixture of experts).
    """
    check_hooked(model)
    n_layers, present = model.cfg.n_layers, hook_points(model)
    name = str(getattr(model.cfg, "model_name", "the model")).rstrip("/").rsplit("/", 1)[-1]
    for site in sites:
        if site.layer >= n_layers:
            raise ValueError(
                f"no hook point for {site!r}: {name!r} has {n_layers} layers (0-{n_layers - 1})."
            )
        reason = _why_missing(site, present)
        if reason is not None:
            raise CannotBeDone(f"no hook point for {site!r}: {name!r} {reason}")


def check_per_token(activation: Any, hook_name: str) -> None:
    """Raise unless an activation has rows and positions before anything else.

    Some architectures run all tokens of a batch as one long row (OPT's MLP, experts) or pass a list
    (OpenAI's first GPT): no vector there belongs to a token of a prompt.

    Raises:
        CannotBeDone: If it has not.
    """
    if not isinstance(activation, torch.Tensor) or activation.ndim < 3:
        shape = tuple(getattr(activation, "shape", ())) or type(activation).__name__
        raise CannotBeDone(
            f"{hook_name} holds no vector per prompt and token in this architecture (it is "
            f"{shape}); choose another kind of site."
        )


def _why_missing(site: Site, hook_points: Mapping[str, Any]) -> str | None:
    """Say why a model does not compute what a site names; None where it does."""
    if site.hook_name not in hook_points:
        return f"does not compute {site.hook_name}; choose another kind."
    # TransformerLens also calls the output of a mixture of experts hook_post: one hook point under
    # two names, and no neurons behind it.
    whole_mlp = hook_points.get(f"blocks.{site.layer}.mlp.hook_out")
    if site.kind == "mlp_post" and hook_points[site.hook_name] is whole_mlp:
        return (
            f"shows no neurons in layer {site.layer}, whose MLP is a mixture of experts or opaque; "
            "choose mlp_out."
        )
    return None
