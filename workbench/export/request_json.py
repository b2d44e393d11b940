"""Write steering as the JSON of a request: for EasySteer's and for vllm-lens's servers.

Both add to what a block puts out, counted from 0, and take the vectors inside the request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from workbench.export.additions import check_flat, constant_additions, one_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.steering.interventions import Intervention


EASYSTEER_WIRE = 1
"""Version of EasySteer's form of tensors in JSON."""


def easysteer_request(interventions: Sequence[Intervention]) -> dict[str, Any]:
    """Describe steering for EasySteer: the field ``steering`` of an OpenAI-compatible request.

    With the openai client: ``extra_body=easysteer_request(...)``. It holds which tokens are steered
    (``positions`` and ``until``). The server is started with ``--enable-steer-vector
    --steer-algorithms direct``, and with ``--steer-multi-vector`` where there are several extents.

    Args:
        interventions: Constant additions at outputs of blocks.

    Returns:
        ``{"steering": {"vectors": [...], "conflict": "sequential"}}``, JSON values only.

    Raises:
        ValueError: If the format cannot hold an intervention.
    """
    check_flat(interventions)
    one_model(interventions)
    vectors = []
    for extent, group in groupby(sorted(interventions, key=_extent), key=_extent):
        additions = constant_additions(list(group), "EasySteer", extent_held=True)
        layers = additions.at_block_outputs("EasySteer")
        vectors.append(
            {
                "data": _easysteer_data(layers),
                "algorithm": "direct",
                "scale": 1.0,
                "layers": list(layers),
                "normalize": False,
                "apply": _easysteer_clause(*extent),
                "name": "; ".join(label for label in additions.labels if label) or "workbench",
            }
        )
    return {"steering": {"vectors": vectors, "conflict": "sequential"}}


def _extent(one: Intervention) -> tuple[str, int]:
    """Give positions and end of an intervention, -1 for no end, so that they can be sorted."""
    return one.positions, -1 if one.until is None else one.until


def _easysteer_clause(positions: str, until: int) -> dict[str, Any]:
    """Say which tokens are steered, in EasySteer's words.

    Its decode step i reads the generated token i, from 0, as steering here counts them.
    """
    clause: dict[str, Any] = {}
    if positions != "generated":
        clause["prompt"] = "all"
    if positions != "prompt" and until < 0:
        clause["generation"] = "all"
    elif positions != "prompt" and until > 0:
        clause["generation_window"] = [0, until]
    if not clause:
        raise ValueError("an intervention of generated tokens with until=0 steers no token.")
    return clause


def _easysteer_data(layers: dict[int, Float[Tensor, " d_model"]]) -> dict[str, Any]:
    """Write directions as EasySteer's payload of kind "direction", with its hash of the content."""
    tensors: dict[str, Any] = {}
    digest = hashlib.sha256(f"direction:{EASYSTEER_WIRE}".encode())
    for name, vector in sorted((f"layer.{layer}", v) for layer, v in layers.items()):
        data = _bytes(vector)
        digest.update(name.encode() + str(tuple(vector.shape)).encode() + data)
        tensors[name] = {
            "shape": list(vector.shape),
            "data": base64.b64encode(data).decode("ascii"),
        }
    return {
        "version": EASYSTEER_WIRE,
        "kind": "direction",
        "tensors": tensors,
        "extra": {},
        "sha256": digest.hexdigest(),
    }


def vllm_lens_request(interventions: Sequence[Intervention]) -> dict[str, Any]:
    """Describe steering for vllm-lens: the field ``vllm_xargs`` of a request.

    With the openai client: ``extra_body=vllm_lens_request(...)``. ``norm_match`` is off: it would
    scale the vector to the norm of each token, while a strength here is a constant.

    Args:
        interventions: Constant additions at outputs of blocks, of every token.

    Returns:
        ``{"vllm_xargs": {"apply_steering_vectors": "[...]"}}``: vllm-lens reads the list from a
        text.

    Raises:
        ValueError: If the format cannot hold an intervention.
    """
    additions = constant_additions(interventions, "vllm-lens")
    layers = additions.at_block_outputs("vllm-lens")
    stacked = torch.stack(list(layers.values()))
    vector = {
        "activations": {
            "data": base64.b64encode(_bytes(stacked)).decode("ascii"),
            "dtype": "float32",
            "original_dtype": "torch.float32",
            "shape": list(stacked.shape),
        },
        "layer_indices": list(layers),
        "scale": 1.0,
        "norm_match": False,
        "position_indices": None,
    }
    return {"vllm_xargs": {"apply_steering_vectors": json.dumps([vector])}}


def _bytes(values: Float[Tensor, "..."]) -> bytes:
    """Give the bytes of float32 numbers, little-endian."""
    return values.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()
