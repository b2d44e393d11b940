"""What a run does: the settings of ``workbench run``, from a YAML file or the command line, checked before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from workbench.sites import did_you_mean


@dataclass(frozen=True)
class RunConfig:
    """What a run does; every field can stand in the YAML file or on the command line.

    Attributes:
        model: Hub name, local folder or .gguf file; None is the default model.
        device: Torch device; None takes a GPU if there is one.
        dtype: float32, bfloat16 or float16.
        prompts: Data sets ("safebench:PATH", a jsonl file, several with commas); None is the project's own set.
        categories: Risk categories; None takes all that the prompts have.
        seed: Of folds, controls and bootstrap.
        tune_prompts: Unsafe prompts a category that choose sign and strength.
        test_prompts: Unsafe prompts a category that are reported; None takes the whole test fold.
        max_new_tokens: Length limit of answers.
        rhos: Relative strengths tried at one layer; the band of layers gets .41 of each at every layer (as .07 is to .17).
    """

    model: str | None = None
    device: str | None = None
    dtype: str = "float32"
    prompts: str | None = None
    categories: tuple[str, ...] | None = None
    seed: int = 0
    tune_prompts: int = 6
    test_prompts: int | None = None
    max_new_tokens: int = 64
    rhos: tuple[float, ...] = (0.09, 0.17)

    def __post_init__(self) -> None:
        for name in ("tune_prompts", "max_new_tokens"):
            _check_count(name, getattr(self, name))
        if self.test_prompts is not None:
            _check_count("test_prompts", self.test_prompts)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}.")
        if not self.rhos or not all(isinstance(r, int | float) and 0 < r < 2 for r in self.rhos):
            raise ValueError(f"rhos must be relative strengths above 0 and below 2, got {self.rhos!r}.")


def config_from(mapping: Mapping[str, Any]) -> RunConfig:
    """A configuration from a YAML mapping.

    Raises:
        ValueError: If a name is unknown or a value has the wrong kind.
    """
    names = {field.name for field in dataclasses.fields(RunConfig)}
    for name in mapping:
        if name not in names:
            raise ValueError(
                f"unknown setting {name!r}; settings: {', '.join(sorted(names))}.{did_you_mean(str(name), names)}"
            )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}
    for name in ("categories", "rhos"):
        if name in values and values[name] is not None and not isinstance(values[name], tuple):
            raise ValueError(f"{name} must be a list, got {values[name]!r}.")
    for name in ("model", "device", "dtype", "prompts"):
        if values.get(name) is not None and not isinstance(values[name], str):
            raise ValueError(f"{name} must be a text, got {values[name]!r}.")
    return replace(RunConfig(), **values)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}.")
