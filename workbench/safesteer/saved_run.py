"""Use what a saved run left: steer with what it chose, for any question, and read its evaluation.

Steering is behind the run's gate or always on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.evaluation.metrics import HEADLINE
from workbench.evaluation.result import Evaluation
from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, local_path, read_json
from workbench.generation.answers import UNSTEERED, Completion, sweep
from workbench.generation.decoding import GREEDY, Decoding
from workbench.models.activations import token_activations
from workbench.models.load import ModelInfo
from workbench.models.sites import Site
from workbench.models.templates import asked_by
from workbench.models.tokens import token_strings
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Prompt
from workbench.safesteer.config import config_from
from workbench.safesteer.run_folder import read_run, vector_file
from workbench.steering.gates import Gate, load_gate
from workbench.steering.interventions import Intervention, gated, raise_to
from workbench.steering.spectral import load_fitted, steer_by
from workbench.steering.vectors import load_vector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike

CALIBRATION = "calibration"
"""Folder inside a run's where ``workbench calibrate`` leaves what it chose."""


@dataclass(frozen=True, eq=False)
class GateReading:
    """Hold what a gate makes of one question, token by token.

    Attributes:
        tokens: Texts of the tokens it reads.
        scores: Log-odds of each category at each of them, of shape [token, category]. Their mean is
            what the gate decides on where its span is "content"; a gate that reads the last token
            decides on the last row.
        decided: Scores it decides on, of shape [category].
        opening: How far it opens for each category, from 0 to 1.
        categories: Names of the categories.
    """

    tokens: tuple[str, ...]
    scores: Float[Tensor, "token category"]
    decided: Float[Tensor, " category"]
    opening: Float[Tensor, " category"]
    categories: tuple[str, ...]


def evaluation_from(folder: PathLike) -> Evaluation:
    """Read the scores of a saved run, with their answers, from scores.csv and completions.jsonl.

    Raises:
        ValueError: If the folder holds no run, or one that has not answered its test prompts yet.
    """
    run = read_run(folder)
    scores = run.tables["scores"]
    if scores is None or not run.completions:
        raise ValueError(
            f"{str(folder)!r} has no scored answers yet; "
            f"finish it with 'workbench run --out {folder} --resume'."
        )
    judges = {row.get("measures"): str(row.get("name")) for row in run.notes["judges"]}
    refusal, safety = (judges.get(name, "not noted") for name in ("refusal", HEADLINE))
    try:
        completions = tuple(map(_completion, run.completions))
    except KeyError as error:
        raise ValueError(
            f"{run.path / 'completions.jsonl'}: a row has no {error}; write it again with "
            f"'workbench run --out {folder} --resume' and the run's settings."
        ) from error
    return Evaluation(scores, UNSTEERED, completions, refusal, safety)


def _completion(row: dict[str, Any]) -> Completion:
    """Make an answer of a row of completions.jsonl, which has no tokens."""
    prompt = Prompt(
        row["prompt_id"],
        row["prompt"],
        category=row["category"],
        label=row["label"],
        history=row.get("history", ()),
    )
    return Completion(
        prompt,
        row["text"],
        (),
        row["finish"],
        row["condition"],
        row.get("thinking", ""),
        row.get("sample", 0),
    )


def chosen_settings(folder: PathLike, *, calibrated: bool = False) -> dict[str, dict[str, Any]]:
    """Read the settings that a run, or a later calibration, chose for each construction.

    Raises:
        ValueError: If nothing was chosen yet.
    """
    run = read_run(folder)
    settings: Any = run.notes.get("chosen")
    if calibrated:
        path = run.path / CALIBRATION / "chosen.json"
        if not path.is_file():
            raise ValueError(
                f"{str(folder)!r} was not calibrated again; "
                f"do it with 'workbench calibrate --run {folder}'."
            )
        settings = read_json(path)
    if not isinstance(settings, dict) or not settings:
        raise ValueError(
            f"{str(folder)!r} has no chosen setting yet; "
            f"finish it with 'workbench run --out {folder} --resume'."
        )
    return settings


def steering_from(
    folder: PathLike, category: str, *, construction: str | None = None, calibrated: bool = False
) -> list[Intervention]:
    """Make a saved run's interventions for one category, always on.

    Args:
        folder: Folder of a run.
        category: One of its categories.
        construction: One of those it chose settings for; None is the one its gate was fitted for.
        calibrated: Take the settings of a later ``workbench calibrate``.

    Raises:
        ValueError: If the run chose nothing yet, or has no such category or construction.
    """
    settings = chosen_settings(folder, calibrated=calibrated)
    name = construction or _main_construction(folder) or list(settings)[-1]
    if name not in settings:
        raise ValueError(
            f"no construction {name!r} in {str(folder)!r}; constructions: {', '.join(settings)}."
            f"{did_you_mean(name, settings)}"
        )
    return steering_of(folder, name, settings[name], category, read_run(folder).notes)


def steering_of(
    folder: PathLike,
    construction: str,
    setting: Mapping[str, Any],
    category: str,
    notes: Mapping[str, Any],
) -> list[Intervention]:
    """Make the interventions of one category under one of a run's settings, always on.

    Args:
        folder: Folder of a run, where its vectors are.
        construction: Which vectors.
        setting: What ``chosen_settings`` says of them.
        category: One of its categories.
        notes: Notes of the run.

    Raises:
        ValueError: If the setting has no such category.
    """
    is_target = setting.get("form", "add") == "target"
    strengths = setting["target" if is_target else "multiplier"]
    if category not in strengths:
        raise ValueError(
            f"no category {category!r} in {str(folder)!r}; categories: {', '.join(strengths)}."
            f"{did_you_mean(category, strengths)}"
        )
    # Runs of earlier versions have the first two of these, or none.
    how: dict[str, Any] = {
        "positions": setting.get("positions", "all"),
        "until": setting.get("until"),
    }
    if not is_target:
        how |= {
            "decay": setting.get("decay", "none"),
            "keep_norm": setting.get("keep_norm", False),
        }
    apply: Any = raise_to if is_target else steer_by
    load: Any = load_vector if is_target else load_fitted
    vectors = local_path(folder) / "vectors"
    interventions = [
        apply(load(vectors / vector_file(construction, Site.parse(site), category)), value, **how)
        for site, value in strengths[category].items()
    ]
    if "vectors_from" not in notes:
        return interventions
    # The run has checked that vectors of another model fit its own: they are for this one alone.
    steered = ModelInfo(**notes["model"])
    return [replace(one, model=steered) for one in interventions]


def _main_construction(folder: PathLike) -> str | None:
    """Name a run's main construction, its best contrast of answers: that its gate is for."""
    notes = read_run(folder).notes
    name: str | None = notes.get("main") or (notes.get("gate") or {}).get("construction")
    return name


def decoding_from(folder: PathLike) -> Decoding:
    """Make the decoding of a saved run: length, system prompt and template keywords.

    Its vectors and its gate were measured under these.
    """
    return config_from(read_run(folder).notes["config"]).decoding()


def gate_from(folder: PathLike) -> Gate:
    """Load the gate of a saved run.

    Raises:
        ValueError: If the folder holds no run, or one that had to leave out its gate.
        FileNotFoundError: If the run has no gate yet.
    """
    run = read_run(folder)
    path, reason = run.path / "gate.safetensors", run.notes["left_out"].get("gate")
    if reason and not path.is_file():
        raise ValueError(
            f"{str(folder)!r} has no gate: {str(reason).rstrip('.')}; steer always instead, with a "
            "category."
        )
    return load_gate(path)


def gated_steering_from(
    folder: PathLike, *, construction: str | None = None, calibrated: bool = False
) -> list[Intervention]:
    """Make a saved run's interventions behind its gate, which decides for each question.

    Args:
        folder: Folder of a run.
        construction: One of those it chose settings for; None is the one its gate was fitted for.
        calibrated: Take the settings of a later ``workbench calibrate``.

    Raises:
        ValueError: If the run has no such construction, or it steers below what the gate reads.
        FileNotFoundError: If the run has no gate.
    """
    gate = gate_from(folder)
    choice: Any = {"construction": construction, "calibrated": calibrated}
    return gated({c: steering_from(folder, c, **choice) for c in gate.categories}, gate)


def gate_reading(
    model: HookedModel, gate: Gate, question: PromptsLike, decoding: Decoding | None = None
) -> GateReading:
    """Read one question with a gate, token by token.

    Args:
        model: The model it was fitted on.
        gate: A gate.
        question: The user's words, a conversation or a ``Prompt``.
        decoding: Its system prompt and template keywords count; those the gate was fitted under by
            default.
    """
    asked = asked_by(gate.asked_as) if decoding is None else decoding.asked_by
    row, activations = token_activations(model, _asked(question), gate.site, **asked)
    start, end = row.span("content")
    if gate.span == "last":
        end = len(row.ids)
    scores = gate.scores(activations[start:end])
    decided = scores[-1] if gate.span == "last" else gate.scores(activations[start:end].mean(dim=0))
    tokens = tuple(token_strings(model, row.ids[start:end]))
    return GateReading(tokens, scores, decided, gate.opening(decided), gate.categories)


def side_by_side(
    model: HookedModel,
    question: PromptsLike,
    interventions: list[Intervention],
    decoding: Decoding = GREEDY,
) -> tuple[Completion, ...]:
    """Answer one question without and with interventions, in one batch.

    With several samples those of the unsteered model come first, then as many steered ones.

    Args:
        model: The model that the vectors were measured on.
        question: The user's words, a conversation (messages) or a ``Prompt``.
        interventions: For instance from ``steering_from`` or ``gated_steering_from``.
        decoding: Length and sampling of the answers, system prompt and template keywords; those of
            a run are ``decoding_from(folder)``.
    """
    conditions = {UNSTEERED: (), "steered": interventions}
    return tuple(sweep(model, [_asked(question)], conditions, decoding))


def _asked(question: PromptsLike) -> Prompt:
    """Make one prompt of a question; a text is called "question" in results."""
    prompts = as_prompts(question)
    if len(prompts) != 1:
        raise ValueError(f"one question is answered at a time, got {len(prompts)}; use wb.sweep.")
    if isinstance(question, Prompt):
        return question
    return replace(prompts[0], id="question", category="question", source="user")
