"""Do the jobs of an engine in a worker's process, with a model that is loaded there by its name."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.engines.base import Engine, LocalEngine
from workbench.files.store import append_jsonl, read_jsonl
from workbench.generation.answers import asked_key
from workbench.models.load import load_model, model_info
from workbench.models.shard_plan import ShardPlan, plan_shards
from workbench.models.templates import asked_by
from workbench.prompts.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from workbench.generation.answers import Condition
    from workbench.generation.decoding import Decoding


def open_local(model: str, load: Mapping[str, Any]) -> Engine:
    """Load a model by its name or path and run it in this process.

    Args:
        model: Name or path, as ``load_model`` takes it.
        load: Further arguments of ``load_model``.
    """
    return LocalEngine(load_model(model, **load))


def prompts_to_json(prompts: Sequence[Prompt]) -> str:
    """Write prompts as the text of a job."""
    return json.dumps([dataclasses.asdict(prompt) for prompt in prompts], ensure_ascii=False)


def prompts_from_json(text: str) -> list[Prompt]:
    """Read what ``prompts_to_json`` wrote."""
    return [Prompt(**fields) for fields in json.loads(text)]


class _ModelWorker:
    """Hold an engine with its model, loaded once for all jobs of a worker.

    Args:
        open_engine: A function of a module that makes the engine from a name and load arguments.
        model: Name or path of the model.
        load: Further arguments of ``load_model``.
        expected: Fingerprint the model must have; None takes any.
    """

    def __init__(
        self,
        open_engine: Callable[[str, Mapping[str, Any]], Engine],
        model: str,
        load: Mapping[str, Any],
        expected: str | None,
    ) -> None:
        self.engine = open_engine(model, load)
        has = model_info(self.engine.model).fingerprint
        if expected not in (None, has):
            raise ValueError(
                f"a worker has loaded another model as {model!r} (fingerprint {has}, expected "
                f"{expected}); give all machines the same files, chat template and dtype."
            )


class Planner(_ModelWorker):
    """Say in which shards prompts would be kept, for a caller that has not loaded the model."""

    def __init__(self, reads: Mapping[str, Any], **engine: Any) -> None:
        super().__init__(**engine)
        self.reads = reads

    def do(self, job: str) -> bytes:
        """Take prompts as JSON and return the plan as JSON."""
        reads = self.reads
        words = asked_by(reads["asked"])
        plan = plan_shards(
            self.engine.model, prompts_from_json(job), reads["sites"], span=reads["span"], **words
        )
        if self.engine.name != LocalEngine.name:  # its numbers are other ones
            plan = dataclasses.replace(plan, what=plan.what | {"engine": self.engine.name})
        return json.dumps(plan.to_dict()).encode()


class Reader(_ModelWorker):
    """Read the activations of a shard's prompts, or the moments of its classes."""

    def __init__(self, reads: Mapping[str, Any], *, moments: bool, **engine: Any) -> None:
        super().__init__(**engine)
        self.reads, self.moments = reads, moments

    def do(self, job: str) -> bytes:
        """Take prompts as JSON and return tensors by site as safetensors bytes."""
        from safetensors.torch import save

        from workbench.engines.moments import moments_to_tensors

        reads = self.reads
        settings = {name: reads[name] for name in ("span", "batch_size", "max_tokens")}
        settings |= asked_by(reads["asked"])
        prompts, sites = prompts_from_json(job), reads["sites"]
        if self.moments:
            return save(moments_to_tensors(self.engine.class_moments(prompts, sites, **settings)))
        sets = self.engine.cache_activations(prompts, sites, **settings)
        values: dict[str, Tensor] = {str(site): sets[site].values.contiguous() for site in sites}
        return save(values)


class Writer(_ModelWorker):
    """Answer the prompts of a job under all conditions."""

    def __init__(
        self,
        conditions: Mapping[str, Condition],
        decoding: Decoding,
        *,
        transfer: bool,
        continue_response: bool,
        **engine: Any,
    ) -> None:
        super().__init__(**engine)
        self.conditions, self.decoding = conditions, decoding
        self.further = {"transfer": transfer, "continue_response": continue_response}

    def do(self, job: str) -> bytes:
        """Take prompts and the answers that are known, and return all answers and the new lines.

        A job is JSON: ``prompts`` and ``known``, lines of the output file with the prompts' ids.
        """
        given = json.loads(job)
        prompts = [Prompt(**fields) for fields in given["prompts"]]
        conditions = {
            name: for_prompts(condition, prompts) for name, condition in self.conditions.items()
        }
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "answers.jsonl"
            append_jsonl(output, given["known"])
            answers = self.engine.sweep(
                prompts, conditions, self.decoding, output=output, **self.further
            )
            lines = read_jsonl(output)[len(given["known"]) :]
        rows = [
            {
                "prompt_id": answer.prompt.id,
                "text": answer.text,
                "tokens": answer.tokens,
                "finish": answer.finish,
                "condition": answer.condition,
                "thinking": answer.thinking,
                "sample": answer.sample,
                "log_probs": answer.log_probs and answer.log_probs.values,
            }
            for answer in answers
        ]
        asked = asked_key(self.engine.model, self.decoding.asked_by)
        result = {"answers": rows, "lines": lines, "asked": asked}
        return json.dumps(result, ensure_ascii=False).encode()


def for_prompts(condition: Condition, prompts: Sequence[Prompt]) -> Condition:
    """Keep what a condition says of some prompts; nothing where it says nothing of them."""
    if not isinstance(condition, Mapping):
        return condition
    owners = {prompt.id for prompt in prompts}.union(*(prompt.categories for prompt in prompts))
    return {owner: done for owner, done in condition.items() if owner in owners}


class JudgeWorker:
    """Judge the answers of a job, with a judge that is opened in the worker's process."""

    def __init__(self, judge: str, settings: Any) -> None:
        from workbench.judges.opening import open_judge

        self.judge = open_judge(judge, settings=settings)

    def do(self, job: str) -> bytes:
        """Take lists of prompts and responses as JSON and return verdicts as JSON.

        Without any it returns what the judge says of itself.
        """
        given = json.loads(job)
        if not given:
            about = {
                "name": self.judge.name,
                "agreement": getattr(self.judge, "agreement", None),
                "fitted_on": sorted(getattr(self.judge, "fitted_on", ())),
            }
            return json.dumps(about).encode()
        verdicts = self.judge(*given)
        return json.dumps([dataclasses.asdict(verdict) for verdict in verdicts]).encode()


def plan_from(result: bytes) -> ShardPlan:
    """Read what a ``Planner`` returned."""
    return ShardPlan.from_dict(json.loads(result))
