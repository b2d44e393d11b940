"""Find the module of a transformers model whose output, or input, a site is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from workbench.models.hooked_model import hook_points, hugging_face_model
from workbench.models.sites import Site, check_sites

if TYPE_CHECKING:
    from typing import Any

    from workbench.models.hooked_model import HookedModel


_WRAPPER = "._original_component"


class ModulePlace(NamedTuple):
    """Name one place in a transformers model.

    Attributes:
        module: Name of the module, as ``named_modules`` of the plain model gives it.
        side: Whether the activation is what it puts out or what it is given.
    """

    module: str
    side: Literal["output", "input"]


def module_of(model: HookedModel, site: Site) -> ModulePlace:
    """Find the module that computes the activation at a site.

    Args:
        model: A ``TransformerBridge``, which has the transformers model inside.
        site: Of the residual stream: resid_pre, resid_post, attn_out or mlp_out.

    Raises:
        ValueError: If the site does not exist in the model, or no module computes it.
    """
    check_sites(model, [site])
    source: Any = hugging_face_model(model)
    if source is None:
        raise ValueError(
            "modules are named by a TransformerBridge, which holds the transformers model; load "
            "the model with wb.load_model."
        )
    point = hook_points(model)[site.hook_name]
    for name, module in source.named_modules():
        for attribute, side in (("hook_out", "output"), ("hook_in", "input")):
            if getattr(module, attribute, None) is point:
                plain = name.replace(_WRAPPER, "")
                return ModulePlace(plain, "output" if side == "output" else "input")
    raise ValueError(
        f"no module of {model.cfg.model_name!r} computes {site} alone; steer at "
        f"{Site(site.layer, 'resid_post')} instead."
    )


def template_of(place: ModulePlace, layer: int) -> str:
    """Put ``{num}`` for the block's number in a module's name: "model.layers.{num}.mlp".

    Raises:
        ValueError: If the name does not hold that number once.
    """
    parts = place.module.split(".")
    if parts.count(str(layer)) != 1:
        raise ValueError(
            f"the module {place.module!r} does not hold the number of block {layer} once; export "
            "as pytorch instead."
        )
    return ".".join("{num}" if part == str(layer) else part for part in parts)


def model_type(model: HookedModel) -> str:
    """Give transformers' name of a model's architecture, such as "llama"; "unknown" without it."""
    config = getattr(hugging_face_model(model), "config", None)
    return str(getattr(config, "model_type", "unknown"))
