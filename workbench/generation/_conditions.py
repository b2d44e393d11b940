"""Check that conditions can steer before anything is answered, and that they did afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.models.templates import asked_as
from workbench.steering.interventions import Intervention, check_interventions

if TYPE_CHECKING:
    from workbench.generation._decode_loop import Row
    from workbench.generation.decoding import Decoding
    from workbench.models.hooked_model import HookedModel


def check_condition(
    model: HookedModel,
    name: str,
    interventions: Sequence[Intervention],
    decoding: Decoding,
    transfer: bool,
) -> None:
    """Raise where interventions do not fit the model, or could steer nothing."""
    check_interventions(model, interventions, transfer=transfer)
    for one in interventions:
        if not one.reaches(decoding.max_new_tokens - 1):
            raise ValueError(
                f"condition {name!r} would steer nothing at {one.site}: positions "
                f"{one.positions!r} until {one.until} with max_new_tokens="
                f"{decoding.max_new_tokens} reach no token that is read again; generate more "
                "tokens, or steer positions 'all'."
            )
    if any(intervention.rows is not None for intervention in interventions):
        raise ValueError(
            f"condition {name!r} names rows of a batch, but generation makes its own batches; "
            "give a mapping from prompt id (or category) to interventions."
        )


def check_reached(
    rows: Sequence[Row],
    groups: Sequence[Sequence[Intervention]],
    answers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raise where interventions of a condition reached no position of any of its answers."""
    reached: dict[str, bool] = {}
    for row in rows:
        if not groups[row.group]:
            continue
        answer = answers[row.key]
        n_read = len(answer["tokens"]) + (answer["finish"] == "eos") - 1
        if answer.get("thinking") or answer["finish"] == "stop":
            n_read += 1  # tokens that are no part of the answer were read too
        reaches = all(one.reaches(n_read) for one in groups[row.group])
        reached[row.condition] = reached.get(row.condition, False) or reaches
    silent = [name for name, is_reached in reached.items() if not is_reached]
    if silent:
        raise RuntimeError(
            f"condition {silent[0]!r} steered nothing: it means generated tokens alone, and every "
            "answer ended with its first one; steer positions 'all', or ask other prompts."
        )


def check_gates(name: str, interventions: Sequence[Intervention], decoding: Decoding) -> None:
    """Warn where a gate was fitted on prompts that were asked with other words around them."""
    asked = asked_as(decoding.system_prompt, decoding.template_keywords)
    for gate in {one.gate for one in interventions if one.gate is not None}:
        if gate.asked_as != asked:
            warnings.warn(
                f"the gate of {name!r} was fitted under {gate.asked_as or 'no system prompt'}, but "
                f"the answers are made under {asked or 'no system prompt'}: its threshold promises "
                "nothing there; fit it again, or ask as it was fitted.",
                stacklevel=5,
            )
