"""Open a judge by its name: the one place that knows all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from workbench.files.hints import did_you_mean
from workbench.files.store import local_path
from workbench.judges.framing import framing_judge_for, load_framing_judge, shipped_for
from workbench.judges.guards import guard_families, load_guard
from workbench.judges.local import load_local_judge
from workbench.judges.on_demand import on_demand
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.probe import load_probe
from workbench.judges.refusal import load_refusal_judge
from workbench.models.load import load_model, model_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.judges.base import Judge
    from workbench.models.hooked_model import HookedModel


KINDS = {
    "framing": "the project's own judge, read by the embedded model",
    "local:MODEL": "a language model on this machine: with a fitted judge that ships for it, or "
    "else asked by a rubric",
    "guard:FAMILY": "a guard model; guard:FAMILY=CHECKPOINT for another of its checkpoints",
    "api:MODEL": "a language model behind an OpenAI-compatible endpoint",
    "probe:FILE": "a probe of 'workbench judge train'",
    "refusal": "the project's own judge of refusals, which tells blanket from principled ones",
    "patterns": "refusal patterns, which say nothing of safety",
}
"""How judges are named, and what each is."""


@dataclass(frozen=True)
class JudgeSettings:
    """Say where a judge runs and how it is reached.

    Attributes:
        device: Torch device of a judge that is a model; a GPU if there is one, else the CPU.
        dtype: float32, bfloat16 or float16; None takes what is usual for the judge.
        url: Address of the endpoint of an "api:" judge, such as "http://localhost:8000/v1".
        key_env: Environment variable with its key; None for an endpoint that needs none.
    """

    device: str | None = None
    dtype: str | None = None
    url: str | None = None
    key_env: str | None = "OPENAI_API_KEY"


def open_judge(
    name: str,
    *,
    device: str | None = None,
    settings: JudgeSettings | None = None,
    model: HookedModel | None = None,
    keep: bool = True,
) -> Judge:
    """Open a judge by its name.

    Args:
        name: One of ``KINDS``, such as "framing", "local:Qwen/Qwen2.5-1.5B-Instruct",
            "guard:qwen3guard", "api:gpt-4o-mini" or "probe:mine.safetensors". Short: a family of
            guards, or the file of a probe.
        device: Where a model runs, in place of the settings'.
        settings: Device, dtype and endpoint.
        model: A loaded model: a judge that reads with just this one shares it.
        keep: Keep the model of a "local:" or "guard:" judge in memory; without it, it is loaded
            when it is asked and let go afterwards. It is loaded once now, to find errors early.

    Raises:
        ValueError: If there is no such judge, or it cannot be loaded.
    """
    settings = settings or JudgeSettings()
    if device is not None:
        settings = JudgeSettings(device, settings.dtype, settings.url, settings.key_env)
    kind, _, rest = name.partition(":")
    if name == "framing" and model is not None and shipped_for(model) is not None:
        return load_framing_judge(model)
    if kind == "local" and rest and model is not None and rest == model_info(model).name:
        return framing_judge_for(model) or load_local_judge(model)
    load = _loader(name, kind, rest, settings)
    if keep or kind not in ("local", "guard"):  # the others are small
        return load()
    return on_demand(load)


def check_judge(name: str) -> None:
    """Check that there is a judge of this name, without loading anything.

    Raises:
        ValueError: If there is none.
    """
    kind, _, rest = name.partition(":")
    _loader(name, kind, rest, JudgeSettings())


def _loader(name: str, kind: str, rest: str, settings: JudgeSettings) -> Callable[[], Judge]:
    """Return what loads a judge.

    Raises:
        ValueError: If there is none of that name, or what it needs is not said.
    """
    if name == "patterns":
        return RefusalPatterns
    if name == "refusal":
        return load_refusal_judge
    if name == "framing":
        return partial(_framing, settings.device)
    if kind == "local" and rest:
        return partial(_local, rest, settings.dtype or "bfloat16", settings.device)
    family, _, checkpoint = (rest if kind == "guard" else name).partition("=")
    if family in guard_families():
        dtype, device = settings.dtype or "bfloat16", settings.device
        return partial(load_guard, family, checkpoint or None, dtype=dtype, device=device)
    if kind == "api" and rest:
        return partial(_api, rest, settings)
    file = rest if kind == "probe" else name
    if file and local_path(file).is_file():
        return partial(load_probe, file)
    raise _unknown(name, kind, rest)


def _unknown(name: str, kind: str, rest: str) -> ValueError:
    """Make the error for a name that no judge has."""
    if kind == "guard":
        known = ", ".join(guard_families())
        return ValueError(
            f"no guard family {rest!r}; families: {known}.{did_you_mean(rest, guard_families())}"
        )
    if kind == "probe":
        return ValueError(f"no probe {rest!r}: there is no such file; 'workbench judge train'.")
    if kind in ("local", "api"):
        return ValueError(f"judge {name!r} names no model; write {kind}:MODEL.")
    names = [*KINDS, *guard_families()]
    hint = did_you_mean(name, [word.partition(":")[0] for word in names])
    return ValueError(f"no judge {name!r}; judges: {', '.join(KINDS)}.{hint}")


@cache
def _framing(device: str | None) -> Judge:
    """Load the framing judge with its reader, in the float32 that it was fitted in, once."""
    return load_framing_judge(load_model("embedded", device=device))


def _local(model: str, dtype: str, device: str | None) -> Judge:
    """Load a judge that reads with a model: the one fitted for it if it ships, else the rubric."""
    reader = load_model(model, dtype=dtype, device=device)
    path = shipped_for(reader)
    return load_local_judge(reader) if path is None else load_framing_judge(reader, path)


def _api(model: str, settings: JudgeSettings) -> Judge:
    from workbench.judges.api import ApiJudge

    if settings.url is None:
        raise ValueError(
            f"judge 'api:{model}' needs the address of its endpoint, such as "
            "http://localhost:8000/v1: give judge_url (--judge-url)."
        )
    return ApiJudge("framing", model, settings.url, settings.key_env)
