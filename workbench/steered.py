"""A model with the steering of a saved run: its vectors at the strength the run chose, for one question or for any code of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.generation import UNSTEERED, Completion, sweep
from workbench.interventions import Intervention, add_vector
from workbench.prompts import Prompt
from workbench.runs import read_run
from workbench.sites import Site, did_you_mean
from workbench.storage import PathLike
from workbench.vectors import load_vector

if TYPE_CHECKING:
    from workbench.models import HookedModel


def steering_from(folder: PathLike, category: str, *, construction: str | None = None) -> list[Intervention]:
    """Interventions of a saved run for one category, as its tune fold chose them.

    Args:
        folder: Folder of a run.
        category: One of its categories.
        construction: One of those it chose settings for; None is the last of them.

    Raises:
        ValueError: If the run chose nothing yet, or has no such category or construction.
    """
    chosen: dict[str, Any] = read_run(folder).notes.get("chosen") or {}
    if not chosen:
        raise ValueError(
            f"{str(folder)!r} has no chosen setting yet; finish it with 'workbench run --out {folder} --resume'."
        )
    name = construction or list(chosen)[-1]
    if name not in chosen:
        raise ValueError(
            f"no construction {name!r} in {str(folder)!r}; constructions: {', '.join(chosen)}.{did_you_mean(name, chosen)}"
        )
    multipliers = chosen[name]["multiplier"]
    if category not in multipliers:
        raise ValueError(
            f"no category {category!r} in {str(folder)!r}; categories: {', '.join(multipliers)}.{did_you_mean(category, multipliers)}"
        )
    vectors = Path(folder) / "vectors"
    return [
        add_vector(load_vector(vectors / f"{name}.{Site.parse(site)}.{category}.safetensors"), multiplier)
        for site, multiplier in multipliers[category].items()
    ]


def side_by_side(
    model: HookedModel, question: str, interventions: list[Intervention], *, max_new_tokens: int = 64
) -> tuple[Completion, Completion]:
    """One question answered without and with interventions, in one batch.

    Args:
        model: The model that the vectors were measured on.
        question: The user's words.
        interventions: For instance from ``steering_from``.
        max_new_tokens: Length limit of an answer.
    """
    prompt = Prompt("question", question, None, "question", "neutral", "user")
    plain, steered = sweep(model, [prompt], {UNSTEERED: (), "steered": interventions}, max_new_tokens=max_new_tokens)
    return plain, steered
