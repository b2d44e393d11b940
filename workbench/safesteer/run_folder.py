"""The folder of a run: written stage by stage, and read back for reports and for steering.

What a run has not reached may be missing; what is there is checked when it is read.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files.locks import LOCK, locked_folder
from workbench.files.store import (
    PathLike,
    local_path,
    name_for_file,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from workbench.models.errors import CannotBeDone
from workbench.models.load import model_info
from workbench.models.progress import folded_into
from workbench.models.sites import Site
from workbench.safesteer.run_progress import FITTED, RunProgress, Work
from workbench.steering.spectral import Fitted, SpectralEdit, load_fitted, save_spectral_edit
from workbench.steering.vectors import save_vector

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models.hooked_model import HookedModel
    from workbench.safesteer.config import RunConfig
    from workbench.safesteer.settings import Vectors

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
    "evaluation_fitted": (
        *("condition", "category", "metric", "value", "n"),
        *("difference", "difference_low", "difference_high"),
    ),
    "scores": ("condition", "category", "label", "prompt_id", "metric", "value"),
    "neurons": ("category", "layer", "neuron", "contribution"),
    "judge_agreement": ("condition", "kappa", "low", "high", "first_yes", "second_yes", "n"),
    "corrected": (
        *("metric", "condition", "judged", "judged_low", "judged_high"),
        *("judged_difference", "judged_difference_low", "judged_difference_high"),
        *("corrected", "low", "high", "difference", "difference_low", "difference_high", "p_holm"),
        *("precision", "precision_low", "precision_high", "precision_n"),
        *("recall", "recall_low", "recall_high", "recall_n", "n_read", "n", "reason"),
    ),
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
_TEXT = (
    "condition",
    "category",
    "metric",
    "label",
    "prompt_id",
    "against",
    "kind",
    "construction",
    "sites",
    "set",
    "truth",
    "opened",
    "gate",
    "prompts",
    "positions",
    "decay",
    "form",
    "dropped",
    "reason",
)
_WHOLE = ("layer", "neuron")
_OPTIONAL = (
    *("low", "high", "own_low", "own_high", "n", "n_unscored", "p", "p_holm", "no_loss_p", "asked"),
)
_YES_NO = ("feasible", "chosen", "front", "keep_norm")
_OBJECTS = ("config", "model", "versions", "durations", "folds", "chosen", "prompts", "left_out")
_LISTS = ("categories", "judges", "vectors")


@dataclass(frozen=True, eq=False)
class RunFolder:
    """Write a run: open its folder, time its stages, keep its notes, tables and vectors.

    Attributes:
        path: The folder; it is made when the first file is written.
        notes: What run.json holds.
        progress: Shows on standard error how far the run is; None shows nothing.
    """

    path: Path
    notes: dict[str, Any]
    progress: RunProgress | None = None

    @classmethod
    @contextmanager
    def open(
        cls, folder: PathLike, config: RunConfig, *, resume: bool = False, progress: bool = False
    ) -> Iterator[RunFolder]:
        """Begin a run in a new folder, or take up an interrupted run of the same settings.

        Inside the block the folder is this process's alone.

        Args:
            folder: Where the run is.
            config: Its settings.
            resume: Take up an interrupted run.
            progress: Show on standard error how far the run is.

        Raises:
            ValueError: If the folder holds another run, or something else, or another process is
                writing into it.
        """
        path = local_path(folder)
        _check_free(path)
        with locked_folder(path):
            _check_free(path)  # now that nobody else can write into it
            notes = _notes(path, config, resume)
            more = (FITTED,) if config.fitted_is_evaluated else ()
            shown = RunProgress(notes["durations"], more=more) if progress else None
            try:
                yield cls(path, notes, shown)
            finally:
                if shown is not None:
                    shown.close()

    @contextmanager
    def stage(self, name: str, *, may_be_left_out: bool = False) -> Iterator[None]:
        """Time a stage, and write the notes when it is done.

        A resumed stage adds its seconds to what it took before.

        Args:
            name: Name of the stage.
            may_be_left_out: Where the stage cannot be done for this model or these prompts
                (``CannotBeDone``), keep the reason in the notes and go on.
        """
        start = time.monotonic()
        self.notes["left_out"].pop(name, None)
        if self.progress is not None:
            self.progress.begin(name)
        try:
            with folded_into(self.progress) if self.progress is not None else nullcontext():
                yield
        except CannotBeDone as reason:
            if not may_be_left_out:
                raise
            self.leave_out(name, str(reason))
        durations = self.notes["durations"]
        durations[name] = round(durations.get(name, 0) + time.monotonic() - start, 1)
        write_json(self.path / "run.json", self.notes)
        if self.progress is not None:
            self.progress.end()

    def plan(self, work: Mapping[str, Work]) -> None:
        """Say how much work the stages have, so that the time left can be shown."""
        if self.progress is not None:
            self.progress.plan(work)

    def leave_out(self, what: str, reason: str) -> None:
        """Note what this run does without, and why; the report says so."""
        self.notes["left_out"][what] = reason

    def note(self, **facts: Any) -> None:
        """Add facts to the notes; they are written at the end of the stage."""
        self.notes.update(facts)

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Write a table as NAME.csv, numbers with five digits."""
        write_table(self.path / f"{name}.csv", frame)

    def write_rows(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows as NAME.jsonl."""
        write_jsonl(self.path / f"{name}.jsonl", rows)

    def save_vectors(self, vectors: Vectors) -> None:
        """Write every vector or spectral edit with its card, and note their files."""
        names = []
        for (construction, site), by_category in vectors.items():
            for category, fitted in by_category.items():
                names.append(vector_file(construction, site, category))
                path = self.path / "vectors" / names[-1]
                if isinstance(fitted, SpectralEdit):
                    save_spectral_edit(path, fitted)
                else:
                    save_vector(path, fitted)
        self.note(vectors=names)

    def finish(self) -> Path:
        """Note when the run ended, and return its folder."""
        self.note(finished=_now())
        write_json(self.path / "run.json", self.notes)
        return self.path


@dataclass(frozen=True, eq=False)
class SavedRun:
    """Hold what a run left behind, as read.

    Attributes:
        path: The folder.
        notes: What run.json holds.
        tables: Name of a csv file, without its ending, to its rows; None where the run did not get
            that far.
        completions: Rows of completions.jsonl.
    """

    path: Path
    notes: dict[str, Any]
    tables: dict[str, pd.DataFrame | None]
    completions: list[dict[str, Any]]


def read_run(folder: PathLike) -> SavedRun:
    """Read a run folder; files that a run may not have reached are allowed to be missing.

    Raises:
        ValueError: If the folder holds no run, or a file of it cannot be read.
    """
    path = local_path(folder)
    if not (path / "run.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is no run folder (it has no run.json); "
            "give the folder that 'workbench run' wrote."
        )
    notes = read_json(path / "run.json")
    if not isinstance(notes, dict) or notes.get("format") != FORMAT:
        given = notes.get("format") if isinstance(notes, dict) else None
        raise ValueError(
            f"{str(folder)!r} is no run this version reads: "
            f"its format is {given!r}, needed is {FORMAT!r}."
        )
    for names, kind, word in ((_OBJECTS, dict, "an object"), (_LISTS, list, "a list")):
        for name in names:
            notes[name] = kind() if notes.get(name) is None else notes[name]
            if not isinstance(notes[name], kind):
                raise ValueError(
                    f"{path / 'run.json'}: {name!r} must be {word}, got {notes[name]!r:.60}; "
                    "run again."
                )
    tables = {name: _read_table(path / f"{name}.csv", columns) for name, columns in COLUMNS.items()}
    answers = path / "completions.jsonl"
    return SavedRun(path, notes, tables, read_jsonl(answers) if answers.is_file() else [])


def check_model_of(run: SavedRun, model: HookedModel) -> None:
    """Raise where a model has other weights than the one that a run was made with.

    Raises:
        ValueError: With both names.
    """
    info, of_run = model_info(model), run.notes["model"]
    if info.fingerprint != of_run.get("fingerprint"):
        raise ValueError(
            f"{str(run.path)!r} was made with other weights ({of_run.get('name')!r}) than "
            f"{info.name!r} has; give the run's model."
        )


def saved_vectors(folder: PathLike) -> dict[tuple[str, Site], dict[str, Fitted]]:
    """Read what a run fitted: (construction, site) to category to vector or spectral edit.

    Raises:
        ValueError: If the run has none.
    """
    run = read_run(folder)
    vectors: dict[tuple[str, Site], dict[str, Fitted]] = {}
    for name in run.notes["vectors"]:
        construction = str(name).split(".", 1)[0]
        fitted = load_fitted(run.path / "vectors" / str(name))
        vectors.setdefault((construction, fitted.site), {})[fitted.category] = fitted
    if not vectors:
        raise ValueError(
            f"{str(folder)!r} has no vectors yet; "
            f"finish it with 'workbench run --out {folder} --resume'."
        )
    return vectors


def vector_file(construction: str, site: Site, category: str) -> str:
    """Name the file of a vector inside a run's folder "vectors"."""
    return f"{construction}.{site}.{name_for_file(category)}.safetensors"


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as csv, atomically, numbers with five digits."""
    write_text(path, frame.to_csv(index=False, float_format="%.5g"))


def _check_free(path: Path) -> None:
    """Raise where a path holds something that is no run."""
    if not path.exists() or (path / "run.json").is_file():
        return
    if not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir()):
        raise ValueError(
            f"{str(path)!r} is not an empty folder and holds no run; give another one with --out."
        )


def _notes(path: Path, config: RunConfig, resume: bool) -> dict[str, Any]:
    """Begin the notes of a run, or read those of the run to go on with."""
    if (path / "run.json").is_file():
        return {"left_out": {}, **_notes_to_resume(path, config, resume)}
    packages = ("workbench", "torch", "transformers", "transformer-lens")
    return {
        "format": FORMAT,
        "config": _as_noted(asdict(config)),
        "seed": config.seed,
        "started": _now(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "durations": {},
        "left_out": {},
    }


def _as_noted(settings: dict[str, Any]) -> dict[str, Any]:
    """Write settings as JSON gives them back, lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def _notes_to_resume(path: Path, config: RunConfig, resume: bool) -> dict[str, Any]:
    settings = _as_noted(asdict(config))
    notes = read_json(path / "run.json")
    if not resume:
        raise ValueError(
            f"{str(path)!r} holds a run already; "
            "go on with --resume, or give another folder with --out."
        )
    before = (notes.get("config") if isinstance(notes, dict) else None) or {}
    # A setting that is newer than the run, and at its default, is no other one.
    usual = _as_noted({field.name: field.default for field in fields(config)})
    usual["search"] = "exhaustive"  # as runs were searched before there was a choice
    differing = [n for n, value in settings.items() if before.get(n, usual[n]) != value]
    if differing:
        raise ValueError(
            f"{str(path)!r} holds a run with another {differing[0]}; "
            "resume it with its own, or give another --out."
        )
    return notes


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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
        again = (
            f"'workbench judge correct --run {path.parent}'"
            if path.stem == "corrected"
            else f"'workbench run --out {path.parent} --resume' and the run's settings"
        )
        raise ValueError(
            f"{path} cannot be read ({problem}); write it again with {again}."
        ) from error
    return None if frame.empty else frame
