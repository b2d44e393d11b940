"""Make steering vectors of files that other libraries wrote.

Their files say little of what a vector means. Which way it points, and on which model it was
measured, is said by who imports it.
"""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from workbench.files.foreign_tensors import read_foreign
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import HOOK_NAMES, RESIDUAL_KINDS, Site
from workbench.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float

    from workbench.files.store import PathLike
    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel


Sign = Literal["unsafe_to_safe", "safe_to_unsafe"]
"""Which way a vector in a file points; here all point from unsafe to safe."""


# "layer_12", "model.layers[12].mlp", "direction.12", "blocks.12.hook_resid_post", "L12.resid_post"
_LAYER = re.compile(r"(?:layers?|blocks?|directions?|\bL|\bh)[._\[ -]?(\d+)", re.IGNORECASE)
_INSIDE = re.compile(r"attn|attention|mlp|ffn|feed_?forward|resid_(?:pre|mid)|_proj", re.IGNORECASE)
_NO_LAYER = re.compile(r"[._\[ ]-\d|\d\.\d")  # a negative number, or one with decimals


def import_vectors(
    path: PathLike,
    model: HookedModel | ModelInfo,
    *,
    sign: Sign,
    site: Site | None = None,
    kind: str | None = None,
    first_layer: int = 0,
    residual: Mapping[Site, ActivationSet] | None = None,
) -> dict[Site, SteeringVector]:
    """Read steering vectors that another library wrote.

    GGUF control vectors (repeng, llama.cpp, EasySteer: ``direction.N`` is added to what block N
    puts out, counted from 0), safetensors with a key per layer ("layer_12",
    "blocks.12.hook_resid_post"), NumPy's npy and npz, and JSON (.svec of AISteer360, steerability
    and activation-steering; its "location" says whether inputs of blocks are meant). An
    array of two axes with a row per block has the blocks in order. Pickles (.pt) are never read.

    Args:
        path: The file.
        model: The model that the vectors were measured on, or what ``model_info`` says of it.
        sign: Which way the file's vectors point. Few formats say it: repeng's and
            activation-steering's point from the negative to the positive examples, that of
            refusal_direction from harmless to harmful prompts ("safe_to_unsafe").
        site: The one vector to take; needed where the file names no layer.
        kind: Where in the block the vectors belong, where the file does not say; "resid_post"
            (the block's output) by default.
        first_layer: Number of the first block in the file: 0, or 1 where it counts from 1.
        residual: Activations of the residual stream by site, as ``cache_activations`` gives them,
            at the layers imported: their mean norm makes relative strength (rho) known. Without it
            a vector is used with a multiplier.

    Returns:
        Site to vector, in the order of the layers, pointing from unsafe to safe.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, if a layer or a width is not the model's, or if something
            is missing that the file does not say.
    """
    _check_said(sign, kind)
    if first_layer not in (0, 1):
        raise ValueError(f"first_layer is 0, or 1 where blocks count from 1; got {first_layer!r}.")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"give the file first, then the model; got a {type(path).__name__}.")
    info = model if isinstance(model, ModelInfo) else model_info(model)
    file_kind, arrays, location = read_foreign(path)
    kind = _kind_there(location, kind, path)
    rows = _rows_by_site(arrays, info, site, kind, first_layer, path)
    if site is not None and site not in rows:
        raise ValueError(
            f"{path} has no vector at {site}; it has: {', '.join(map(str, sorted(rows)))}."
        )
    turned = 1 if sign == "unsafe_to_safe" else -1
    return {
        at: _imported(turned * _checked(rows[at], info, at, path), at, info, file_kind, residual)
        for at in ([site] if site is not None else sorted(rows))
    }


LOCATIONS = {"layer_output": "resid_post", "layer_input": "resid_pre"}
"""Where the vectors of an .svec file of steerability belong, in its words."""


def _kind_there(location: str, kind: str | None, path: PathLike) -> str | None:
    """Give the kind of site that a file names, or the one that was asked for.

    Raises:
        ValueError: If the file names an unknown one, or another one.
    """
    if not location:
        return kind
    if location not in LOCATIONS:
        raise ValueError(
            f"{path} is of the location {location!r}; those that can be read: "
            f"{', '.join(LOCATIONS)}."
        )
    if kind is not None and kind != LOCATIONS[location]:
        raise ValueError(
            f"{path} is of {LOCATIONS[location]!r} ({location}), got kind={kind!r}; leave kind out."
        )
    return LOCATIONS[location]


def _imported(
    vector: Float[torch.Tensor, " d_model"],
    site: Site,
    info: ModelInfo,
    file_kind: str,
    residual: Mapping[Site, ActivationSet] | None,
) -> SteeringVector:
    """Make a steering vector of which nothing is known but where it is from."""
    return SteeringVector(
        site=site,
        category="imported",
        vector=vector,
        method=f"imported:{file_kind}",
        span="unknown",
        kept=1.0,
        n_unsafe=0,
        n_safe=0,
        site_norm=_norm_at(site, residual, info),
        model=info,
    )


def _check_said(sign: str, kind: str | None) -> None:
    """Refuse a sign or a kind that there is not."""
    if sign not in get_args(Sign):
        raise ValueError(
            f"sign says which way the file's vectors point: {' or '.join(get_args(Sign))}, "
            f"got {sign!r}."
        )
    if kind is not None and kind not in RESIDUAL_KINDS:
        raise ValueError(
            f"steering vectors live in the residual stream: {', '.join(RESIDUAL_KINDS)}; "
            f"got kind={kind!r}."
        )


def _rows_by_site(
    arrays: Mapping[str, Float[np.ndarray, "..."]],
    info: ModelInfo,
    site: Site | None,
    kind: str | None,
    first_layer: int,
    path: PathLike,
) -> dict[Site, Float[np.ndarray, "..."]]:
    """Find the site of every row of a file."""
    rows: dict[Site, Float[np.ndarray, "..."]] = {}
    for name, array in arrays.items():
        layer, said_kind = _place(name)
        if kind is not None and said_kind is not None and said_kind != kind:
            raise ValueError(
                f"{path}: {name!r} is at {said_kind!r}, got kind={kind!r}; leave kind out."
            )
        if (inside := _INSIDE.search(name)) and not (said_kind or kind or site):
            raise ValueError(
                f"{path}: {name!r} is at {inside[0]!r}, inside the block; pass kind=, one of "
                f"{', '.join(RESIDUAL_KINDS)}."
            )
        at_kind = said_kind or kind or (site.kind if site is not None else "resid_post")
        if layer is not None:
            found = {layer - first_layer: array}
        elif array.ndim == 2 and len(array) == info.n_layers > 1 and not first_layer:
            found = dict(enumerate(array))
        elif len(arrays) == 1 and site is not None:
            found = {site.layer: array}
        else:
            what = f"{name!r} of shape {array.shape}" if name else f"an array of {array.shape}"
            raise ValueError(
                f"{path} does not say the layer of {what}; pass site=Site(layer, 'resid_post') for "
                "a file with one vector, or name the keys 'layer_12'."
            )
        for number, row in found.items():
            if not 0 <= number < info.n_layers:
                raise ValueError(
                    f"{path}: {name!r} is layer {number} counted from 0, but {info.name!r} has "
                    f"{info.n_layers} layers (0-{info.n_layers - 1}); is it the right model, and "
                    f"first_layer={first_layer} right?"
                )
            at = Site(number, at_kind)
            if at in rows:
                raise ValueError(f"{path} has two vectors for {at}, one of them is {name!r}.")
            rows[at] = row
    return rows


def _place(name: str) -> tuple[int | None, str | None]:
    """Read the layer, and the kind where it is a hook point's name, off a key of a file."""
    layers = [name] if name.isdigit() else _LAYER.findall(name)
    if len(layers) != 1 or _NO_LAYER.search(name):
        return None, None
    layer = int(layers[0])
    for kind in RESIDUAL_KINDS:
        if name in (HOOK_NAMES[kind].format(layer=layer), str(Site(layer, kind))):
            return layer, kind
    return layer, None


def _checked(
    row: Float[np.ndarray, "..."], info: ModelInfo, site: Site, path: PathLike
) -> Float[torch.Tensor, " d_model"]:
    """Make a vector of a row, after a look at its width and its numbers."""
    values = np.squeeze(row)
    if values.shape != (info.d_model,):
        raise ValueError(
            f"{path}: the vector at {site} has shape {row.shape}, but {info.name!r} has width "
            f"{info.d_model}; is it the right model?"
        )
    if not values.any():
        raise ValueError(f"{path}: the vector at {site} is zero: there is nothing to steer with.")
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: the vector at {site} has values that are no finite numbers.")
    return torch.from_numpy(values.astype(np.float32))


def _norm_at(site: Site, residual: Mapping[Site, ActivationSet] | None, info: ModelInfo) -> float:
    """Measure the mean norm of the residual stream at a layer; nan where it is not given."""
    if residual is None:
        return math.nan
    fitting = [
        acts
        for at, acts in residual.items()
        if at.layer == site.layer and at.kind.startswith("resid")
    ]
    if not fitting or fitting[0].model.fingerprint != info.fingerprint:
        raise ValueError(
            f"residual must hold activations of {info.name!r} in the residual stream of layer "
            f"{site.layer}; it has: {', '.join(map(str, residual))}."
        )
    return fitting[0].mean_norm()
