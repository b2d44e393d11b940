"""Send interventions to another process as bytes: safetensors with JSON beside, no pickle."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.sites import Site
from workbench.steering.edits import (
    AblateDirection,
    AddVector,
    ClampNeurons,
    RaiseTo,
    ScaleNeurons,
)
from workbench.steering.interventions import Intervention

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


EDITS: dict[str, type] = {
    kind.__name__: kind
    for kind in (AddVector, AblateDirection, RaiseTo, ScaleNeurons, ClampNeurons)
}
"""Edits that can be sent, by name; another one may be any function."""


def pack(plans: Mapping[str, Sequence[Intervention]]) -> bytes:
    """Write lists of interventions as bytes: the extent as JSON, the tensors as safetensors.

    Model, gate and what they were fitted on stay behind: they are checked before.

    Args:
        plans: Key to interventions, whose edits are among ``EDITS``.

    Raises:
        ValueError: If an edit is another function.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    described: dict[str, list[dict[str, Any]]] = {}
    for key, interventions in plans.items():
        described[key] = []
        for one in interventions:
            kind = type(one.edit).__name__
            if EDITS.get(kind) is not type(one.edit):
                raise ValueError(f"an edit that is no known one cannot be sent: {kind}.")
            values: dict[str, Any] = {}
            for field in fields(one.edit):  # type: ignore[arg-type]
                value = getattr(one.edit, field.name)
                if isinstance(value, torch.Tensor):
                    name = f"{len(tensors)}"
                    tensors[name] = value.detach().float().cpu().contiguous().clone()
                    value = {"tensor": name}
                values[field.name] = value
            described[key].append(
                {
                    "site": str(one.site),
                    "edit": kind,
                    "values": values,
                    "positions": one.positions,
                    "until": one.until,
                    "decay": one.decay,
                }
            )
    tensors["none"] = torch.zeros(1)  # a file needs a tensor
    return save(tensors, metadata={"plans": json.dumps(described)})


def unpack(payload: bytes) -> dict[str, list[Intervention]]:
    """Read what ``pack`` wrote."""
    from safetensors.torch import load

    tensors = load(payload)
    length = int.from_bytes(payload[:8], "little")
    metadata = json.loads(payload[8 : 8 + length])["__metadata__"]
    return {
        key: [_intervention(one, tensors) for one in described]
        for key, described in json.loads(metadata["plans"]).items()
    }


def _intervention(one: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    values = {
        name: tensors[value["tensor"]]
        if isinstance(value, dict)
        else (tuple(value) if isinstance(value, list) else value)
        for name, value in one["values"].items()
    }
    return Intervention(
        Site.parse(one["site"]),
        EDITS[one["edit"]](**values),
        one["positions"],
        until=one["until"],
        decay=one["decay"],
    )


def pack_rows(rows: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Write pooled activations as bytes: row to site to vector."""
    from safetensors.torch import save

    flat = {
        f"{row}|{site}": values.detach().float().cpu().contiguous().clone()
        for row, by_site in rows.items()
        for site, values in by_site.items()
    }
    return save(flat | {"none": torch.full((1,), math.nan)})


def unpack_rows(payload: bytes) -> dict[str, dict[str, Tensor]]:
    """Read what ``pack_rows`` wrote."""
    from safetensors.torch import load

    rows: dict[str, dict[str, Tensor]] = {}
    for name, values in load(payload).items():
        if name != "none":
            row, _, site = name.partition("|")
            rows.setdefault(row, {})[site] = values
    return rows
