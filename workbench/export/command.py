"""The commands ``workbench export`` and ``workbench import``.

What they need is imported when they run, so that ``workbench --help`` does not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from workbench.export.additions import Exported
    from workbench.export.from_run import Strength
    from workbench.models.hooked_model import HookedModel
    from workbench.models.load import ModelInfo
    from workbench.steering.interventions import Intervention


Format = Literal[
    "hub",
    "gguf",
    "repeng",
    "svec",
    "steering-vectors",
    "lm-eval",
    "pytorch",
    "weights",
    "easysteer",
    "vllm-lens",
]
"""Where vectors go to; docs/travel.md says what each of them holds."""

HUB = "hub:"
"""What stands before the name of a repository, where a file could be given too."""


@dataclass(frozen=True)
class Source:
    """Say what is exported: a run's vectors of one category, or files of vectors.

    Attributes:
        run: folder of a run
        category: one of the run's categories; its vectors are exported always on, without the gate
        construction: one of those in the run's tuning (default: the run's main one)
        calibrated: use the settings of a later 'workbench calibrate'
        vector: files of wb.save_vector, in place of a run
        multiplier: how much of these vectors; 1 is the measured difference
        rho: strength of these vectors relative to the residual stream, in place of a multiplier
        model: hub name, local folder or .gguf file (default: the run's); needed for
            steering-vectors, lm-eval, pytorch and weights
    """

    run: str | None = None
    category: str | None = None
    construction: str | None = None
    calibrated: bool = False
    vector: tuple[str, ...] = ()
    multiplier: float | None = None
    rho: float | None = None
    model: str | None = None

    def check(self) -> None:
        """Raise unless it names a run and a category, or vectors and a strength.

        Raises:
            ValueError: If it does not, or names both.
        """
        if (self.run is None) == (not self.vector):
            raise ValueError("give either --run and --category, or --vector and a strength.")
        if self.run is not None and self.category is None:
            raise ValueError("--run needs --category: one category's vectors are exported.")
        strengths = (self.multiplier, self.rho)
        if self.run is not None and strengths != (None, None):
            raise ValueError("a run has its strengths: leave out --multiplier and --rho.")
        if self.vector and strengths.count(None) != 1:
            raise ValueError("--vector needs one strength: --multiplier 1, or --rho 0.1.")


def export_vectors(
    format: Format,
    *,
    out: str,
    source: Annotated[Source, Parameter(name="*")] = Source(),
    private: bool = False,
) -> None:
    """Write steering vectors for another program, or push them to the Hugging Face Hub.

    Args:
        format: the program they go to; gguf is llama.cpp, svec is AISteer360 and steerability, and
            weights are a checkpoint with the vectors as biases
        out: the file, the folder (weights), or the repository USER/NAME (hub)
        source: what is exported
        private: make a new repository private
    """
    source.check()
    if format == "hub":
        _push(source, out, private=private)
        return
    exported = _written(format, source, out)
    for path in exported.files:
        print(path)
    for note in (*exported.notes, *_gate_note(source)):
        print(f"- {note}")


def import_vectors_from(
    source: str,
    *,
    out: str,
    sign: Literal["unsafe_to_safe", "safe_to_unsafe"] | None = None,
    model: str | None = None,
    run: str | None = None,
    site: str | None = None,
    kind: str | None = None,
    first_layer: int = 0,
    revision: str | None = None,
) -> None:
    """Read vectors that another program wrote, or those of a hub's repository, into our own files.

    Pickles (.pt, .pkl) are never read; docs/vectors.md shows how to convert them.

    Args:
        source: file of another library (GGUF, safetensors, .svec, npy, npz), or hub:USER/NAME
        out: folder for one file per vector
        sign: which way the file's vectors point; a repository says it itself
        model: the model they were measured on: hub name, local folder or .gguf file
        run: folder of a run on that model, in place of --model
        site: the one vector to take, like L15.resid_post, where the file names no layer
        kind: where in the block they belong (default: resid_post, the block's output)
        first_layer: 0, or 1 where the file counts blocks from 1
        revision: branch, tag or commit of a repository
    """
    from workbench.export.hub import pull_vectors
    from workbench.files.store import local_path
    from workbench.models.sites import Site
    from workbench.steering.foreign_vectors import import_vectors
    from workbench.steering.vectors import save_vector

    if source.startswith(HUB):
        vectors = pull_vectors(source.removeprefix(HUB), revision=revision)
    else:
        if sign is None:
            raise ValueError("--sign says which way the vectors point; try both and measure.")
        imported = import_vectors(
            source,
            _model_info(model, run),
            sign=sign,
            site=None if site is None else Site.parse(site),
            kind=kind,
            first_layer=first_layer,
        )
        vectors = {f"imported.{at}": vector for at, vector in imported.items()}
    for name, vector in vectors.items():
        path = local_path(out) / f"{name}.safetensors"
        save_vector(path, vector)
        print(f"{path}: {vector!r}")


def _written(format: Format, source: Source, out: str) -> Exported:
    """Write one of the formats that are files."""
    from workbench.export.additions import Exported
    from workbench.export.baked_weights import bake_weights
    from workbench.export.control_vectors import export_gguf, export_svec
    from workbench.export.python_libraries import export_lm_eval, export_steering_vectors
    from workbench.export.pytorch_hooks import export_pytorch
    from workbench.export.request_json import easysteer_request, vllm_lens_request
    from workbench.files.store import local_path, write_json

    interventions = _interventions(source)
    if format in ("gguf", "repeng"):
        reader: Any = "llama.cpp" if format == "gguf" else "repeng"
        return export_gguf(out, interventions, model_type=_model_type(source), reader=reader)
    if format == "svec":
        return export_svec(out, interventions, model_type=_model_type(source))
    if format == "weights":
        return bake_weights(out, interventions, _model_name(source))
    if format in ("easysteer", "vllm-lens"):
        request = easysteer_request if format == "easysteer" else vllm_lens_request
        write_json(out, request(interventions))
        use = (
            "Send it beside the fields of an OpenAI-compatible request (extra_body of the client)."
        )
        return Exported((local_path(out),), (use,))
    by_modules = {
        "steering-vectors": export_steering_vectors,
        "lm-eval": export_lm_eval,
        "pytorch": export_pytorch,
    }
    return by_modules[format](out, interventions, _loaded(source))


def _push(source: Source, repo_id: str, *, private: bool) -> None:
    from workbench.export.from_run import run_numbers, run_strengths
    from workbench.export.hub import push_vectors

    numbers, strengths = None, _strengths(source)
    if source.run is not None:
        choice: Any = {"construction": source.construction, "calibrated": source.calibrated}
        strengths = run_strengths(source.run, str(source.category), **choice)
        numbers = run_numbers(source.run, **choice)
    print(push_vectors(repo_id, strengths, numbers=numbers, private=private or None))


def _strengths(source: Source) -> tuple[Strength, ...]:
    """Read the files of vectors, with the strength that was given."""
    from workbench.export.from_run import Strength
    from workbench.steering.vectors import load_vector

    strengths = []
    for path in source.vector:
        vector = load_vector(path)
        multiplier = source.multiplier
        if multiplier is None:
            multiplier = vector.multiplier_for(float(source.rho or 0.0))
        strengths.append(Strength(vector, multiplier))
    return tuple(strengths)


def _interventions(source: Source) -> list[Intervention]:
    """Make the interventions that are exported."""
    from workbench.safesteer.saved_run import steering_from
    from workbench.steering.interventions import add_vector

    if source.run is None:
        return [add_vector(s.vector, s.multiplier) for s in _strengths(source)]
    return steering_from(
        source.run,
        str(source.category),
        construction=source.construction,
        calibrated=source.calibrated,
    )


def _gate_note(source: Source) -> tuple[str, ...]:
    """Say that a run's gate stays behind."""
    from workbench.files.store import local_path

    if source.run is None or not (local_path(source.run) / "gate.safetensors").is_file():
        return ()
    return (
        "The run steers behind a gate, which reads each question first and does not travel: what "
        "was written steers every question.",
    )


def _run_config(run: str) -> Any:
    from workbench.safesteer.config import config_from
    from workbench.safesteer.run_folder import read_run

    return config_from(read_run(run).notes["config"])


def _model_name(source: Source) -> str:
    """Name the model to read: the one given, the run's, or the default one."""
    from workbench.models.load import DEFAULT_MODEL

    if source.model is not None:
        return source.model
    if source.run is None:
        raise ValueError("this format needs --model: the model the vectors were measured on.")
    return str(_run_config(source.run).model or DEFAULT_MODEL)


def _model_type(source: Source) -> str:
    """Read transformers' name of the architecture where a model was given; it is a hint only."""
    if source.model is None:
        return "unknown"
    from workbench.models.checkpoints import find_checkpoint, read_config

    checkpoint, _ = find_checkpoint(source.model, None)
    return str(read_config(checkpoint, None).model_type)


def _loaded(source: Source) -> HookedModel:
    """Load the model that vectors are exported for, in the data type they were measured in."""
    from workbench.models.load import load_model
    from workbench.safesteer.inputs import load_run_model
    from workbench.steering.vectors import load_vector

    if source.run is not None:
        config = _run_config(source.run)
        return load_run_model(replace(config, model=source.model or config.model))
    return load_model(_model_name(source), dtype=load_vector(source.vector[0]).model.dtype)


def _model_info(model: str | None, run: str | None) -> ModelInfo:
    """Describe the model that a file's vectors were measured on."""
    from workbench.models.load import ModelInfo, load_model, model_info
    from workbench.safesteer.run_folder import read_run

    if (model is None) == (run is None):
        raise ValueError(
            "give --model, or --run of a run on it: what the vectors were measured on."
        )
    if run is not None:
        return ModelInfo(**read_run(run).notes["model"])
    return model_info(load_model(model))
