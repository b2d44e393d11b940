"""What a run does: the settings of ``workbench run``, from a YAML file or the command line, checked before anything starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.files.hints import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping


CONSTRUCTIONS = {
    "prompt_contrast": ("the paper's: neutral prompts minus the category's unsafe ones", True),
    "answer_contrast": (
        "written openings of answers: turning to safety minus going along (CAA's paired differences)",
        True,
    ),
    "answer_contrast_pooled": ("the same, the mean direction of all categories", True),
    "self_contrast_pooled": (
        "the model's own answers under an instruction minus its plain ones, all categories",
        True,
    ),
    "answer_and_self_pooled": ("the sum of the two before, direction by direction", True),
    "prompt_guided": (
        "the paper's, from those unsafe prompts that the model goes along with (2410.01174)",
        False,
    ),
    "prompt_own_part": ("the paper's vector minus the mean of the other categories'", False),
    "answer_principal": ("openings, first principal component of the differences (RepE)", False),
    "answer_probe": ("openings, normal of a logistic probe", False),
    "answer_without_refusal": ("openings, orthogonal to the refusal direction", False),
}
"""Constructions of steering vectors: what each is, and whether a run takes it unless told otherwise."""


@dataclass(frozen=True)
class RunConfig:
    """What a run does; every field can stand in the YAML file or on the command line.

    Attributes:
        model: Hub name, local folder or .gguf file; None is the default model.
        device: Torch device; None takes a GPU if there is one.
        dtype: float32, bfloat16 or float16.
        packing: Linear layers packed for the processor's fast product: "auto" where that is measured to be faster, "on", or "off".
        prompts: Data sets ("safebench:PATH", a jsonl file, several with commas); None is the project's own set.
        categories: Risk categories; None takes all that the prompts have.
        seed: Of folds, controls and bootstrap.
        tune_prompts: Unsafe prompts a category that choose sign and strength.
        test_prompts: Unsafe prompts a category that are reported; None takes the whole test fold.
        max_new_tokens: Length limit of answers.
        constructions: Vectors that are compared (``CONSTRUCTIONS``); None takes those that are no mere baselines.
        rhos: Relative strengths tried at one layer; the band of layers gets .41 of each at every layer (as .07 is to .17).
        relevance_loss: Largest loss of mean relevance (cosine) against unsteered: a limit of the calibration and the margin of the test of no loss.
        refusal_rise: Largest rise of the share of refusals, likewise.
        degenerate_rise: Largest rise of the share of broken answers, likewise.
        neutral_kl: Largest mean KL on neutral prompts, nats a token; None sets no limit, as the gate keeps neutral prompts apart.
        neutral_rate: Share of neutral prompts that may open the gate.
        hard_safe_rate: Share of safe prompts that look risky that may.
    """

    model: str | None = None
    device: str | None = None
    dtype: str = "float32"
    packing: str = "auto"
    prompts: str | None = None
    categories: tuple[str, ...] | None = None
    seed: int = 0
    tune_prompts: int = 6
    test_prompts: int | None = None
    max_new_tokens: int = 64
    constructions: tuple[str, ...] | None = None
    rhos: tuple[float, ...] = (0.09, 0.17)
    relevance_loss: float = 0.05
    refusal_rise: float = 0.02
    degenerate_rise: float = 0.02
    neutral_kl: float | None = None
    neutral_rate: float = 0.02
    hard_safe_rate: float = 0.10

    def __post_init__(self) -> None:
        if self.packing not in ("auto", "on", "off"):
            raise ValueError(f"packing must be auto, on or off, got {self.packing!r}.")
        for name in ("tune_prompts", "max_new_tokens"):
            _check_count(name, getattr(self, name))
        if self.test_prompts is not None:
            _check_count("test_prompts", self.test_prompts)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}.")
        if self.constructions is not None and not any(
            c[:6] != "prompt" for c in self.constructions
        ):
            raise ValueError(
                "constructions must hold a contrast of answers: it is what the gate and the controls are for."
            )
        for name in self.constructions or ():
            if name not in CONSTRUCTIONS:
                known = ", ".join(CONSTRUCTIONS)
                raise ValueError(
                    f"unknown construction {name!r}; known: {known}.{did_you_mean(name, CONSTRUCTIONS)}"
                )
        if not self.rhos or not all(isinstance(r, int | float) and 0 < r < 2 for r in self.rhos):
            raise ValueError(
                f"rhos must be relative strengths above 0 and below 2, got {self.rhos!r}."
            )
        for name in (
            "relevance_loss",
            "refusal_rise",
            "degenerate_rise",
            "neutral_rate",
            "hard_safe_rate",
        ):
            _check_share(name, getattr(self, name))
        if self.neutral_kl is not None and not (
            _is_number(self.neutral_kl) and self.neutral_kl > 0
        ):
            raise ValueError(
                f"neutral_kl must be above 0 nats, or nothing for no limit, got {self.neutral_kl!r}."
            )


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
    for name in ("categories", "constructions", "rhos"):
        if name in values and values[name] is not None and not isinstance(values[name], tuple):
            raise ValueError(f"{name} must be a list, got {values[name]!r}.")
    for name in ("model", "device", "dtype", "prompts"):
        if values.get(name) is not None and not isinstance(values[name], str):
            raise ValueError(f"{name} must be a text, got {values[name]!r}.")
    return replace(RunConfig(), **values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_share(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}.")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}.")
