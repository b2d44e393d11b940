"""The folder of a run, as read: its notes, tables and answers. What a run has not reached may be missing; what is there is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files.store import PathLike, read_json, read_jsonl

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from workbench.safesteer.settings import Vectors

import datetime
import importlib.metadata
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from workbench.files.store import write_json, write_text
from workbench.steering.vectors import save_vector

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from workbench.safesteer.config import RunConfig

FORMAT = "workbench run 1"


COLUMNS = {
    "separability": ("layer", "kind", "category", "against", "auroc"),
    "tuning": ("construction", "sites", "sign", "rho", "metric", "value"),
    "evaluation": (
        "condition",
        "category",
        "metric",
        "value",
        "difference",
        "difference_low",
        "difference_high",
        "n",
    ),
    "scores": ("condition", "category", "label", "prompt_id", "metric", "value"),
    "neurons": ("category", "layer", "neuron", "contribution"),
    "judge_agreement": ("condition", "kappa", "low", "high", "first_yes", "second_yes", "n"),
    "gate_rates": ("set", "category", "rate", "low", "high", "n", "own_rate"),
    "gate_confusion": ("truth", "opened", "n", "share"),
    "gate_roc": ("against", "false_rate", "recall", "auroc", "low", "high"),
    "gate_cells": ("gate", "prompts", "n", "identical"),
    "gate_comparison": (
        "condition",
        "category",
        "metric",
        "value",
        "difference",
        "difference_low",
        "difference_high",
        "n",
    ),
}
"""Columns without which a table cannot be read."""


_TEXT: tuple[str, ...] = (
    "condition",
    "category",
    "metric",
    "label",
    "prompt_id",
    "against",
    "kind",
    "construction",
    "sites",
)


_TEXT += ("set", "truth", "opened", "gate", "prompts", "positions")


_WHOLE = ("layer", "neuron")


_OPTIONAL = ("low", "high", "n", "n_unscored", "p", "p_holm", "no_loss_p", "asked")


_YES_NO = ("feasible", "chosen", "front")


_OBJECTS = ("config", "model", "versions", "durations", "folds", "chosen", "prompts")


_LISTS = ("categories", "judges", "vectors")


@dataclass(frozen=True, eq=False)
class RunFolder:
    """What a run left behind, as read.

    Attributes:
        path: The folder.
        notes: run.json.
        tables: Name of a csv file, without its ending, to its rows; None where the run did not get that far.
        completions: Rows of completions.jsonl.
    """

    path: Path
    notes: dict[str, Any]
    tables: dict[str, pd.DataFrame | None]
    completions: list[dict[str, Any]]


def read_run(folder: PathLike) -> RunFolder:
    """Read a run folder; files that a run may not have reached are allowed to be missing.

    Raises:
        ValueError: If the folder holds no run, or a file of it cannot be read.
    """
    path = Path(folder)
    if not (path / "run.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is no run folder (it has no run.json); give the folder that 'workbench run' wrote."
        )
    notes = read_json(path / "run.json")
    if not isinstance(notes, dict) or notes.get("format") != FORMAT:
        found = notes.get("format") if isinstance(notes, dict) else None
        raise ValueError(
            f"{str(folder)!r} is no run this version reads: its format is {found!r}, needed is {FORMAT!r}."
        )
    for names, kind, word in ((_OBJECTS, dict, "an object"), (_LISTS, list, "a list")):
        for name in names:
            notes[name] = kind() if notes.get(name) is None else notes[name]
            if not isinstance(notes[name], kind):
                raise ValueError(
                    f"{path / 'run.json'}: {name!r} must be {word}, got {notes[name]!r:.60}; run again."
                )
    answers = path / "completions.jsonl"
    return RunFolder(
        path,
        notes,
        {name: _read_table(path / f"{name}.csv", columns) for name, columns in COLUMNS.items()},
        read_jsonl(answers) if answers.is_file() else [],
    )


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame | None:
    import pandas as pd

    if not path.is_file() or not path.read_bytes().strip():
        return None
    try:
        frame = pd.read_csv(
            path, dtype=dict.fromkeys(_TEXT, "str"), keep_default_na=False, na_values=[""]
        )
        missing = [name for name in columns if name not in frame]
        if missing:
            raise ValueError(f"column {missing[0]!r} is missing")
        for name in frame.columns:
            if name in _TEXT:
                frame[name] = frame[name].fillna("")
            elif name in _YES_NO:
                frame[name] = frame[name].astype(str).str.lower().isin(["true", "1"])
            elif name in columns or name in _OPTIONAL or name.startswith("auroc"):
                frame[name] = pd.to_numeric(frame[name])
                frame[name] = (
                    frame[name].astype(int) if name in _WHOLE else frame[name].astype(float)
                )
    except ValueError as error:
        problem = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read ({problem}); write it again with 'workbench run --resume'."
        ) from error
    return None if frame.empty else frame


def _save_vectors(folder: Path, vectors: Vectors) -> list[str]:
    names = []
    for (construction, site), by_category in vectors.items():
        for category, vector in by_category.items():
            names.append(f"{construction}.{site}.{category}.safetensors")
            save_vector(folder / names[-1], vector)
    return names


def _open_run(folder: Path, config: RunConfig, resume: bool) -> dict[str, Any]:
    """The notes of a run (run.json), begun or taken up."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    path = folder / "run.json"
    if path.is_file():
        notes = read_json(path)
        if not resume:
            raise ValueError(
                f"{str(folder)!r} holds a run already; go on with --resume, or give another folder with --out."
            )
        if not isinstance(notes, dict) or notes.get("config") != settings:
            differing = [k for k, v in settings.items() if (notes.get("config") or {}).get(k) != v]
            raise ValueError(
                f"{str(folder)!r} holds a run with another {differing[0]}; resume it with its own, or give another --out."
            )
        return notes
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{str(folder)!r} is not an empty folder and holds no run; give another one with --out."
        )
    versions = {
        name: importlib.metadata.version(name)
        for name in ("workbench", "torch", "transformers", "transformer-lens")
    }
    notes = {
        "format": FORMAT,
        "config": settings,
        "seed": config.seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "durations": {},
    }
    return notes


def _note(folder: Path, notes: dict[str, Any]) -> None:
    write_json(folder / "run.json", notes)


@contextmanager
def _timed(notes: dict[str, Any], stage: str) -> Iterator[None]:
    """Add the stage's seconds to the notes (a resumed stage adds to what it took before)."""
    start = time.monotonic()
    try:
        yield
    finally:
        durations = notes["durations"]
        durations[stage] = round(durations.get(stage, 0) + time.monotonic() - start, 1)


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, float_format="%.5g"))
