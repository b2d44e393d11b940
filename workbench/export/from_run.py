"""Take what leaves a run: its chosen vectors with their strengths, and the numbers that tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.evaluation.metrics import HEADLINE
from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, local_path
from workbench.models.sites import Site
from workbench.safesteer.run_folder import read_run, vector_file
from workbench.safesteer.saved_run import chosen_settings
from workbench.steering.spectral import load_fitted
from workbench.steering.vectors import SteeringVector

if TYPE_CHECKING:
    import pandas as pd


SHOWN = (HEADLINE, "refusal", "blanket_refusal", "relevance", "degenerate", "perplexity")
"""Metrics of a run that a model card shows, where the run has them."""

CONTROLS = ("unsteered", "random", "shuffled labels", "other category")
"""Conditions that a card shows beside the steered one."""


@dataclass(frozen=True, eq=False)
class Strength:
    """Hold a vector with how much of it is added.

    Attributes:
        vector: What was measured.
        multiplier: How much of it.
        applied: In what way, where that is not plainly to every token.
    """

    vector: SteeringVector
    multiplier: float
    applied: str = ""


@dataclass(frozen=True, eq=False)
class RunNumbers:
    """Hold what a run says of the vectors that leave it.

    Attributes:
        construction: Construction of the vectors.
        condition: Its name in the table.
        table: Rows of evaluation.csv: this condition and the controls, over all categories; None
            where the run did not answer its test questions.
        judges: Name of each judge, with how far it agrees with labels.
        settings: Seed and prompts of the run.
        has_gate: Whether the run steers behind a gate, which does not travel.
    """

    construction: str
    condition: str
    table: pd.DataFrame | None
    judges: tuple[tuple[str, str], ...]
    settings: dict[str, str]
    has_gate: bool


def run_strengths(
    folder: PathLike, category: str, *, construction: str | None = None, calibrated: bool = False
) -> tuple[Strength, ...]:
    """Read the vectors that a run chose for a category, with their multipliers.

    Args:
        folder: Folder of a run.
        category: One of its categories.
        construction: One of those it chose settings for; None is its main one.
        calibrated: Take the settings of a later ``workbench calibrate``.

    Raises:
        ValueError: If the run chose nothing, has no such category or construction, steers to a
            target, or by an edit that is no vector.
    """
    name, setting = _setting(folder, construction, calibrated=calibrated)
    if setting.get("form", "add") != "add" or "multiplier" not in setting:
        raise ValueError(
            f"{name!r} steers to a target, not by a multiple of a vector; export it as pytorch, or "
            "calibrate with --applied add."
        )
    strengths: dict[str, dict[str, float]] = setting["multiplier"]
    if category not in strengths:
        raise ValueError(
            f"no category {category!r} in {str(folder)!r}; categories: {', '.join(strengths)}."
            f"{did_you_mean(category, strengths)}"
        )
    vectors = local_path(folder) / "vectors"
    loaded = []
    for site, multiplier in strengths[category].items():
        fitted = load_fitted(vectors / vector_file(name, Site.parse(site), category))
        if not isinstance(fitted, SteeringVector):
            raise ValueError(
                f"{name!r} is an edit and no vector: it can only be used in workbench."
            )
        loaded.append(Strength(fitted, multiplier, _applied(setting)))
    return tuple(loaded)


def run_numbers(
    folder: PathLike, *, construction: str | None = None, calibrated: bool = False
) -> RunNumbers:
    """Read what a run measured with a construction: rates, intervals, controls and judges.

    Args:
        folder: Folder of a run.
        construction: One of those it chose settings for; None is its main one.
        calibrated: Take the settings of a later ``workbench calibrate``, of which no test answers
            exist: there is no table.
    """
    name, _ = _setting(folder, construction, calibrated=calibrated)
    run, condition = read_run(folder), name.replace("_", " ")
    table = None if calibrated else run.tables["evaluation"]
    if table is not None:
        wanted = (*CONTROLS[:1], condition, *CONTROLS[1:])
        table = table[
            table["condition"].isin(wanted)
            & (table["category"] == "all")
            & table["metric"].isin(SHOWN)
        ]
        table = None if table.empty else table.reset_index(drop=True)
    judges: Any = run.notes["judges"]
    prompts, folds = run.notes["prompts"], run.notes["folds"]
    return RunNumbers(
        name,
        condition,
        table,
        tuple((str(row["name"]), str(row.get("agreement") or "unknown")) for row in judges),
        {
            "seed": str(run.notes["seed"]),
            "prompts": f"{prompts.get('source')} (sha256 {prompts.get('sha256')})",
            "questions": ", ".join(f"{fold}: {sizes}" for fold, sizes in folds.items()),
        },
        (run.path / "gate.safetensors").is_file(),
    )


def _setting(
    folder: PathLike, construction: str | None, *, calibrated: bool
) -> tuple[str, dict[str, Any]]:
    """Find a construction's chosen setting, as ``steering_from`` does."""
    settings = chosen_settings(folder, calibrated=calibrated)
    notes: Any = read_run(folder).notes
    main = notes.get("main") or (notes.get("gate") or {}).get("construction")
    name = construction or main or list(settings)[-1]
    if name not in settings:
        raise ValueError(
            f"no construction {name!r} in {str(folder)!r}; constructions: {', '.join(settings)}."
            f"{did_you_mean(name, settings)}"
        )
    return name, settings[name]


def _applied(setting: dict[str, Any]) -> str:
    """Say in what way a run applied a vector, where it is not plainly to every token."""
    words = []
    if setting.get("positions", "all") != "all":
        words.append(f"positions={setting['positions']!r}")
    if setting.get("until") is not None:
        words.append(f"until={setting['until']}")
    if setting.get("decay", "none") != "none":
        words.append(f"decay={setting['decay']!r}")
    if setting.get("keep_norm"):
        words.append("keep_norm=True")
    return ", ".join(words)
