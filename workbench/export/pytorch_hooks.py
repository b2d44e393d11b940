"""Write steering as one Python file of forward hooks that needs torch and nothing of workbench."""

from __future__ import annotations

import base64
import json
import struct
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.export.additions import (
    ONLY_WORKBENCH,
    Exported,
    check_flat,
    one_model,
    refuse_conditions,
)
from workbench.export.modules import module_of
from workbench.files.store import local_path, write_text
from workbench.steering.edits import AblateDirection, AddVector, RaiseTo
from workbench.steering.interventions import Intervention, check_interventions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from workbench.files.store import PathLike
    from workbench.models.hooked_model import HookedModel
    from workbench.models.load import ModelInfo


_TEMPLATE = Path(__file__).parent / "standalone_hooks.py"
_WIDTH = 76


def export_pytorch(
    path: PathLike, interventions: Sequence[Intervention], model: HookedModel
) -> Exported:
    """Write a Python file that steers the plain transformers model as workbench steers its own.

    It holds more than other formats: every site that can be steered, additions that keep norms,
    ``raise_to`` and ``ablate_direction``. It does not import workbench.

    Args:
        path: The file, .py.
        interventions: Of every token, without a gate.
        model: The model they are for; the names of its modules are written down.

    Raises:
        ValueError: If an intervention does not fit the model, acts on some tokens only, is behind
            a gate, or edits in another way than those above.
    """
    check_flat(interventions)
    for one in interventions:
        refuse_conditions(one, "a file of PyTorch hooks", extent_held=False)
    check_interventions(model, interventions)
    info = one_model(interventions)
    places = []
    for site in sorted({one.site for one in interventions}):
        place = module_of(model, site)
        steps = list(_steps([one for one in interventions if one.site == site]))
        places.append({"module": place.module, "side": place.side, "steps": steps})
    path = local_path(path)
    write_text(path, _source(info, places))
    return Exported(
        (path,),
        (
            f"Import it and use: with {path.stem}.steering(model): model.generate(...). It reads "
            "no other file, and is made for transformers' model, not for a wrapped one.",
            "The strength is in the vectors; every token is steered.",
        ),
    )


def _steps(interventions: Sequence[Intervention]) -> Iterator[dict[str, Any]]:
    """Describe what is done at one site, in order; additions that follow each other are a sum."""
    for is_sum, group in groupby(interventions, key=_is_plain_addition):
        edits: list[Any] = [one.edit for one in group]
        if is_sum:
            yield {"step": "add", "vector": _encoded(sum(_scaled(edit) for edit in edits))}
            continue
        for edit in edits:
            if isinstance(edit, AddVector):
                yield {"step": "keep_norm", "vector": _encoded(_scaled(edit))}
            elif isinstance(edit, RaiseTo | AblateDirection):
                step = "raise" if isinstance(edit, RaiseTo) else "set"
                target = float(edit.target)
                yield {"step": step, "vector": _encoded(edit.direction), "target": target}
            else:
                raise ValueError(
                    f"a file of PyTorch hooks holds additions, raise_to and ablate_direction, not "
                    f"{type(edit).__name__}: {ONLY_WORKBENCH}."
                )


def _is_plain_addition(one: Intervention) -> bool:
    return isinstance(one.edit, AddVector) and not one.edit.keep_norm


def _scaled(edit: AddVector) -> Tensor:
    return edit.multiplier * edit.vector.float().cpu()


def _encoded(vector: Any) -> str:
    """Write float32 numbers, little-endian, as base64."""
    values = vector.detach().float().cpu().tolist()
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")


def _source(info: ModelInfo, places: list[dict[str, Any]]) -> str:
    """Put model and vectors into the text of the standalone module."""
    model = {
        "name": info.name,
        "dtype": info.dtype,
        "blocks": info.n_layers,
        "fingerprint": info.fingerprint,
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    for empty, value in (("MODEL: dict = {}", model), ("PLACES: list = []", places)):
        name = empty.partition(":")[0]
        text = text.replace(f"\n{empty}\n", f"\n{name} = {_literal(value)}\n", 1)
    return text


def _literal(value: Any, indent: str = "") -> str:
    """Write a value of texts, numbers, lists and dictionaries as Python, long texts in pieces."""
    inner = indent + "    "
    if isinstance(value, dict):
        rows = [f"{inner}{json.dumps(key)}: {_literal(v, inner)},\n" for key, v in value.items()]
        return "{\n" + "".join(rows) + indent + "}"
    if isinstance(value, list):
        return "[\n" + "".join(f"{inner}{_literal(v, inner)},\n" for v in value) + indent + "]"
    if isinstance(value, str) and len(value) > _WIDTH:
        pieces = [value[i : i + _WIDTH] for i in range(0, len(value), _WIDTH)]
        return "(\n" + "".join(f"{inner}{json.dumps(p)}\n" for p in pieces) + indent + ")"
    return json.dumps(value) if isinstance(value, str) else repr(value)
