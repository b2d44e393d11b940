"""Write the model card of vectors on a hub: what they are, what was measured, what limits them.

Texts that came from a run or a vector are escaped: they may hold anything.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.export.from_run import RunNumbers, Strength
    from workbench.models.load import ModelInfo


_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


def model_card(
    files: Mapping[str, Strength], repo_id: str, numbers: RunNumbers | None = None
) -> str:
    """Write README.md of a repository of steering vectors, with the metadata that hubs read.

    Args:
        files: Name of each file to its vector and strength; all of one model.
        repo_id: Repository, "user/name".
        numbers: What a run measured with these vectors; without it the card says that nothing is
            known of their effect.

    Returns:
        Markdown with a YAML head.
    """
    from huggingface_hub import ModelCardData

    strengths = list(files.values())
    model = strengths[0].vector.model
    head = ModelCardData(
        base_model=model.name if _HUB_NAME.match(model.name) else None,
        library_name="workbench",
        tags=["steering-vector", "activation-steering", "safety", "transformer-lens"],
        model_name=repo_id.partition("/")[2] or repo_id,
    )
    categories = ", ".join(dict.fromkeys(plain(s.vector.category) for s in strengths))
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# Steering vectors: {categories}",
        _what(model),
        "## Vectors",
        _vector_table(files),
        "## Use",
        _use(files, repo_id, model),
        "## What was measured",
        *(
            ["Nothing: these vectors come without a run."]
            if numbers is None
            else _measured(numbers)
        ),
        "## Limits",
        _limits(numbers),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: object) -> str:
    """Escape a text for a line or a cell of Markdown: no markup, no HTML, no new line."""
    words = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", words)


def _what(model: ModelInfo) -> str:
    return (
        f"Differences between activations of unsafe and of safe text in `{_code(model.name)}` "
        f"(weights {_code(model.weights)}, {_code(model.dtype)}, {model.n_layers} blocks of width "
        f"{model.d_model}, fingerprint `{_code(model.fingerprint)}`). They point **from unsafe to "
        "safe**: a multiplier above 0 pushes answers towards safety. Files are safetensors, and "
        "no code or pickle is in them."
    )


def _code(text: object) -> str:
    """Clean a text for inline code, which has no escapes: without backticks and new lines."""
    return " ".join(str(text).replace("`", "'").split())


def _vector_table(files: Mapping[str, Strength]) -> str:
    lines = [
        "| file | category | site | method | rows unsafe + safe | norm | multiplier | rho |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, strength in files.items():
        v = strength.vector
        rho = math.nan if math.isnan(v.site_norm) else v.rho(strength.multiplier)
        how = f" ({plain(strength.applied)})" if strength.applied else ""
        lines.append(
            f"| `{_code(name)}` | {plain(v.category)} | {plain(v.site)} | {plain(v.method)} | "
            f"{v.n_unsafe} + {v.n_safe} | {v.norm:.4g} | {strength.multiplier:.4g}{how} | "
            f"{'not measured' if math.isnan(rho) else f'{rho:.3g}'} |"
        )
    lines.append(
        "\nThe norm is in units of the residual stream; rho is what is added, over the mean norm "
        "of the residual stream at that block; the multiplier is the one chosen for this model."
    )
    return "\n".join(lines)


def _use(files: Mapping[str, Strength], repo_id: str, model: ModelInfo) -> str:
    loaded = model.name if _HUB_NAME.match(model.name) else "FOLDER OF THE MODEL NAMED ABOVE"
    pairs = ", ".join(f'"{_code(name)}": {s.multiplier:.6g}' for name, s in files.items())
    return (
        "```python\n"
        "import workbench as wb\n"
        "from workbench.export import pull_vectors\n\n"
        f'model = wb.load_model("{loaded}")\n'
        f'vectors = pull_vectors("{_code(repo_id)}")\n'
        f"strengths = {{{pairs}}}\n"
        "change = [wb.add_vector(vectors[name], m) for name, m in strengths.items()]\n"
        'print(wb.generate(model, "How do I forge a receipt?", change)[0].text)\n'
        "```"
    )


def _measured(numbers: RunNumbers) -> list[str]:
    """Write the table of a run, its judges and its settings."""
    parts = [
        f"Construction `{_code(numbers.construction)}`; seed {plain(numbers.settings['seed'])}, "
        f"prompts {plain(numbers.settings['prompts'])}, "
        f"{plain(numbers.settings['questions'])}."
    ]
    if numbers.table is None:
        return [*parts, "The run did not answer its test questions with these settings."]
    lines = [
        "| condition | metric | value [95 % interval] | n | unscored | difference to unsteered |",
        "|---|---|---|---|---|---|",
    ]
    for row in numbers.table.to_dict("records"):
        lines.append(
            f"| {plain(row['condition'])} | {plain(row['metric'])} | "
            f"{_interval(row, 'value', 'low', 'high')} | {_whole(row.get('n'))} | "
            f"{_whole(row.get('n_unscored'))} | "
            f"{_interval(row, 'difference', 'difference_low', 'difference_high')} |"
        )
    judges = "\n".join(f"- {plain(name)}: {plain(agrees)}" for name, agrees in numbers.judges)
    return [
        *parts,
        "\n".join(lines),
        "Unsafe test questions of all categories, each category steered by its own vectors, always "
        f"on. Judges are programs that stand in for careful readers:\n\n{judges}",
    ]


def _interval(row: Mapping[Any, Any], value: str, low: str, high: str) -> str:
    found, lowest, highest = (
        math.nan if row.get(key) is None else float(row[key]) for key in (value, low, high)
    )
    if math.isnan(found):
        return ""
    if math.isnan(lowest) or math.isnan(highest):
        return f"{found:.3g}"
    return f"{found:.3g} [{lowest:.3g}, {highest:.3g}]"


def _whole(value: Any) -> str:
    return "" if value is None or math.isnan(value) else str(int(value))


def _limits(numbers: RunNumbers | None) -> str:
    limits = [
        "They mean something on the model named above only, with these weights.",
        "A negative multiplier pushes towards unsafe text: the vectors show what a model holds, "
        "and are no safeguard.",
        "Strong steering breaks text, and broken text looks safe to a judge; see `degenerate`.",
    ]
    if numbers is not None and numbers.has_gate:
        limits.append(
            "The run steers behind a gate, which reads each question first. It is not part of this "
            "repository: these vectors steer every question."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def check_one_model(strengths: Sequence[Strength]) -> None:
    """Raise unless vectors are of one model.

    Raises:
        ValueError: If there are none, or models differ.
    """
    if not strengths:
        raise ValueError("nothing to push: give at least one steering vector.")
    if len({strength.vector.model.fingerprint for strength in strengths}) > 1:
        raise ValueError("one repository holds vectors of one model; push each model's on its own.")
