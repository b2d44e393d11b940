"""Cache, steer and judge a million prompts on many workers, with Ray Data.

Workers load the model by its name or path. Shards, manifest and answer files are those of the local
engine, and only the calling process writes them: a run goes on from what either engine has left.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from workbench.engines.moments import MergedMoments
from workbench.engines.ray_pool import RayPool, run_jobs
from workbench.engines.ray_worker import (
    JudgeWorker,
    Planner,
    Reader,
    Writer,
    open_local,
    plan_from,
    prompts_to_json,
)
from workbench.files.store import append_jsonl, key_of, local_path, read_jsonl, read_tensors
from workbench.generation.answers import Completion, LogProbs, check_conditions
from workbench.generation.decoding import GREEDY, Decoding
from workbench.judges.base import Verdict, check_pairs
from workbench.judges.opening import JudgeSettings, check_judge
from workbench.models.activations import ActivationSet, ClassMoments
from workbench.models.load import load_model, model_info
from workbench.models.progress import progress_bar
from workbench.models.shard_plan import plan_shards, several_sites
from workbench.models.stored_rows import ShardFolder, shard_path
from workbench.models.templates import asked_as, asked_by
from workbench.prompts.forms import as_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from workbench.engines.base import Engine
    from workbench.files.store import PathLike
    from workbench.generation.answers import Condition
    from workbench.models.hooked_model import HookedModel
    from workbench.models.shard_plan import ShardPlan
    from workbench.models.sites import Site
    from workbench.models.templates import Keywords
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt


def open_ray(
    name_or_path: str | Path,
    model: HookedModel,
    *,
    revision: str | None = None,
    device: str | None = None,
    **settings: Any,
) -> RayEngine:
    """Make the engine of a run, whose model is in memory: workers must load the same weights.

    Args:
        name_or_path: What the model was loaded from.
        model: The model of the run; its data type is that of the workers.
        revision: Branch, tag or commit of a hub repository.
        device: Where a worker runs it; a GPU if it has one, else the processor.
        settings: Fields of ``RayPool``, such as workers, cpus, gpus and address.
    """
    load = {"dtype": model_info(model).dtype, "revision": revision, "device": device}
    given = {name: value for name, value in load.items() if value is not None}
    return RayEngine(str(name_or_path), RayPool(**settings), load=given, loaded=model)


class RayEngine:
    """Run a model on a pool of Ray's workers, each call on a pool of its own.

    A call starts its workers, which takes seconds and the time to load the model, so that it is for
    large sets. A worker that dies is replaced and its job done again; what is on disk and checks
    out is not.

    Args:
        model: Name or path of the model, which every machine can load.
        pool: Workers, what each has, and where they are.
        load: Further arguments of ``load_model``, such as device and dtype.
        loaded: The same model, where the calling process has it in memory: workers must then have
            loaded the same weights. Without it, a worker says how prompts are cut into shards.
        open_engine: What runs in a worker: a function of a module that makes an engine from name
            and load arguments. By default the local engine.
    """

    name = "ray"

    def __init__(
        self,
        model: str,
        pool: RayPool = RayPool(),  # noqa: B008 - frozen
        *,
        load: Mapping[str, Any] | None = None,
        loaded: HookedModel | None = None,
        open_engine: Callable[[str, Mapping[str, Any]], Engine] = open_local,
    ) -> None:
        if not isinstance(model, str):
            raise TypeError(
                f"engine 'ray' takes the name or path of a model, got {model!r:.60}; every worker "
                "loads it."
            )
        self.name_or_path, self.pool, self.load = model, pool, dict(load or {})
        self.open_engine = open_engine
        if loaded is not None:
            self.__dict__["model"] = loaded

    @cached_property
    def model(self) -> HookedModel:
        """Load the model into this process, for what needs it here; no method below does."""
        return load_model(self.name_or_path, **self.load)

    def cache_activations(
        self,
        prompts: PromptsLike,
        sites: Sequence[Site] | Site,
        *,
        span: str = "content",
        system_prompt: str | None = None,
        template_keywords: Keywords = None,
        batch_size: int = 32,
        max_tokens: int = 4096,
        store: PathLike | None = None,
        progress: bool = False,
    ) -> dict[Site, ActivationSet]:
        """Do what ``models.activations.cache_activations`` does, a job for each shard.

        Without a store all values come into the memory of this process.
        """
        prompts, sites = as_prompts(prompts), several_sites(sites)
        asked = asked_as(system_prompt, template_keywords)
        reads = _reads(sites, span, asked, batch_size, max_tokens)
        plan = self._plan(prompts, reads)
        shards = plan.shards()
        folder = None
        if store is not None:
            folder = ShardFolder.open(local_path(store), plan.what, [p.id for p in prompts])
        todo = [n for n in range(len(shards)) if folder is None or not folder.is_whole(n)]
        bar = self._bar(shards, todo, "activations", progress)
        held: dict[str, Tensor] = {}
        for number, values in self._read(prompts, shards, todo, reads, plan, moments=False):
            if folder is None:
                _put(held, values, shards[number], len(prompts))
            else:
                folder.write(number, values)
            bar.update(len(shards[number]))
        bar.close()
        rows: Any = (
            {site: held[str(site)] for site in sites}
            if folder is None
            else folder.rows(sites, plan.order)
        )
        return {
            site: ActivationSet(site, rows[site], tuple(prompts), span, plan.model, asked)
            for site in sites
        }

    def class_moments(
        self,
        prompts: PromptsLike,
        sites: Sequence[Site] | Site,
        *,
        span: str = "content",
        system_prompt: str | None = None,
        template_keywords: Keywords = None,
        batch_size: int = 32,
        max_tokens: int = 4096,
        store: PathLike | None = None,
        progress: bool = False,
    ) -> dict[Site, ClassMoments]:
        """Do what ``models.activations.class_moments`` does, a job for each shard.

        Args:
            prompts: As there, like the arguments that follow.
            sites: One site or several.
            span: Which tokens are pooled.
            system_prompt: Words for the system turn.
            template_keywords: What else the chat template reads.
            batch_size: Largest number of rows per batch.
            max_tokens: Largest number of tokens per batch.
            store: Folder that keeps the moments of each shard, so that an interrupted call goes on.
            progress: Show a progress bar.
        """
        prompts, sites = as_prompts(prompts), several_sites(sites)
        asked = asked_as(system_prompt, template_keywords)
        reads = _reads(sites, span, asked, batch_size, max_tokens)
        plan = self._plan(prompts, reads)
        shards = plan.shards()
        merged = MergedMoments(sites, _classes(prompts))
        folder = None
        if store is not None:
            labels = key_of([[prompt.categories, prompt.label] for prompt in prompts])
            what = plan.what | {"moments": labels}
            folder = ShardFolder.open(local_path(store), what, [p.id for p in prompts])
        todo = [n for n in range(len(shards)) if folder is None or not folder.is_whole(n)]
        bar = self._bar(shards, todo, "moments", progress)
        done = self._read(prompts, shards, todo, reads, plan, moments=True)
        for number, tensors in done if folder else _in_order(done):
            if folder is None:
                merged.add(tensors, _classes([prompts[i] for i in shards[number]]))
            else:
                folder.write(number, tensors)
            bar.update(len(shards[number]))
        bar.close()
        for number, places in enumerate(shards if folder else ()):
            tensors, _ = read_tensors(shard_path(folder.folder, number))  # type: ignore[union-attr]
            merged.add(tensors, _classes([prompts[i] for i in places]))
        return merged.result(span, plan.model)

    def sweep(
        self,
        prompts: PromptsLike,
        conditions: Mapping[str, Condition],
        decoding: Decoding = GREEDY,
        *,
        output: PathLike | None = None,
        progress: bool = False,
        transfer: bool = False,
        continue_response: bool = False,
    ) -> list[Completion]:
        """Do what ``generation.answers.sweep`` does, some prompts to a job.

        Batches are other ones than the local engine's: where two tokens are equally likely but for
        rounding, another one may be written. What ``sweep`` refuses because a condition reached
        nothing in all answers is refused here where it reached nothing in the answers of a job.
        """
        if not isinstance(decoding, Decoding):
            raise TypeError(f"decoding must be a wb.Decoding, got {decoding!r:.60}.")
        prompts = check_conditions(prompts, conditions)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].text))
        size = self.pool.prompts_per_job
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        known = _known_lines(output)
        jobs = []
        for number, places in enumerate(parts):
            lines = [line for i in places for line in known.get(prompts[i].id, ())]
            fields = [dataclasses.asdict(prompts[i]) for i in places]
            text = json.dumps({"prompts": fields, "known": lines}, ensure_ascii=False)
            jobs.append((number, text))
        settings = self._settings() | {
            "conditions": dict(conditions),
            "decoding": decoding,
            "transfer": transfer,
            "continue_response": continue_response,
        }
        by_id = {prompt.id: prompt for prompt in prompts}
        answers: dict[tuple[str, str, int], Completion] = {}
        bar = progress_bar(len(prompts), "answers", "prompt", show=progress)
        for number, result in run_jobs(self.pool, Writer, settings, jobs):
            given = json.loads(result)
            if output is not None and given["lines"]:
                append_jsonl(output, given["lines"])
            for row in given["answers"]:
                answer = _completion(row, by_id, given["asked"])
                answers[answer.condition, answer.prompt.id, answer.sample] = answer
            bar.update(len(parts[number]))
        bar.close()
        return [
            answers[name, prompt.id, sample]
            for name in conditions
            for prompt in prompts
            for sample in range(decoding.n_samples)
        ]

    def close(self) -> None:
        """Forget the model, if it was loaded here; each call ends its own workers.

        Ray itself goes on until the process ends, for other calls.
        """
        self.__dict__.pop("model", None)

    def _settings(self) -> dict[str, Any]:
        """Collect what every worker that holds a model is made with."""
        here = self.__dict__.get("model")
        return {
            "open_engine": self.open_engine,
            "model": self.name_or_path,
            "load": self.load,
            "expected": None if here is None else model_info(here).fingerprint,
        }

    def _plan(self, prompts: Sequence[Prompt], reads: Mapping[str, Any]) -> ShardPlan:
        """Cut prompts into shards: here if the model is loaded, else in one worker."""
        here = self.__dict__.get("model")
        if here is not None and self.open_engine is open_local:
            words = asked_by(reads["asked"])
            return plan_shards(here, prompts, reads["sites"], span=reads["span"], **words)
        settings = self._settings() | {"reads": reads}
        [(_, result)] = run_jobs(self.pool, Planner, settings, [(0, prompts_to_json(prompts))])
        return plan_from(result)

    def _read(
        self,
        prompts: Sequence[Prompt],
        shards: Sequence[Sequence[int]],
        todo: Sequence[int],
        reads: Mapping[str, Any],
        plan: ShardPlan,
        *,
        moments: bool,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Read the shards that are missing, and give each as soon as it is there."""
        from safetensors.torch import load

        settings = self._settings() | {"reads": reads, "moments": moments}
        settings["expected"] = plan.model.fingerprint
        jobs = [(n, prompts_to_json([prompts[i] for i in shards[n]])) for n in todo]
        for number, result in run_jobs(self.pool, Reader, settings, jobs):
            yield number, load(result)

    def _bar(self, shards: Sequence[Any], todo: Sequence[int], what: str, show: bool) -> Any:
        total, left = sum(map(len, shards)), sum(len(shards[number]) for number in todo)
        return progress_bar(total, what, "prompt", show=show, done=total - left)


class RayJudge:
    """Judge answers on a pool of Ray's workers, each of which opens the judge by its name.

    It hands out verdicts as they come, so that ``judges.cache.cached`` keeps them: a second call
    asks only about the answers that the file does not know.

    Args:
        judge: Name of a judge, as ``open_judge`` takes it.
        pool: Workers, what each has, and where they are.
        settings: Device, dtype and endpoint.
    """

    def __init__(
        self,
        judge: str,
        pool: RayPool = RayPool(),  # noqa: B008 - frozen
        settings: JudgeSettings | None = None,
    ) -> None:
        check_judge(judge)
        self.pool = pool
        self.opened_by = {"judge": judge, "settings": settings or JudgeSettings()}

    @cached_property
    def _about(self) -> dict[str, Any]:
        """Ask one worker what the judge says of itself."""
        [(_, about)] = run_jobs(self.pool, JudgeWorker, self.opened_by, [(0, "[]")])
        return json.loads(about)

    @property
    def name(self) -> str:
        """Name of the judge that the workers open, with its version."""
        return self._about["name"]

    @property
    def agreement(self) -> str | None:
        """Say how far it agrees with labels, if it says so."""
        return self._about["agreement"]

    @property
    def fitted_on(self) -> frozenset[str]:
        """Keys of the questions whose answers it was fitted on."""
        return frozenset(self._about["fitted_on"])

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Give one verdict per answer, in order."""
        verdicts = dict(self.stream(prompts, responses))
        return [verdicts[row] for row in range(len(prompts))]

    def stream(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        """Give pairs of row and verdict, a job's as soon as it is done."""
        check_pairs(prompts, responses)
        size = self.pool.prompts_per_job
        starts = range(0, len(prompts), size)
        pairs = ((list(prompts[s : s + size]), list(responses[s : s + size])) for s in starts)
        jobs = [(n, json.dumps(pair, ensure_ascii=False)) for n, pair in enumerate(pairs)]
        for number, result in run_jobs(self.pool, JudgeWorker, self.opened_by, jobs):
            for row, fields in enumerate(json.loads(result), start=number * size):
                yield row, Verdict(**fields)


def _reads(
    sites: Sequence[Site], span: str, asked: str, batch_size: int, max_tokens: int
) -> dict[str, Any]:
    """Collect what is read and how, for the workers."""
    if batch_size < 1 or max_tokens < 1:
        raise ValueError(
            f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}."
        )
    return {
        "sites": tuple(sites),
        "span": span,
        "asked": asked,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
    }


def _classes(prompts: Sequence[Prompt]) -> tuple[tuple[str, str], ...]:
    """List the classes of prompts, sorted, as ``class_moments`` does."""
    return tuple(sorted({(name, p.label) for p in prompts for name in p.categories}))


def _put(
    held: dict[str, Tensor], values: Mapping[str, Tensor], places: Sequence[int], n: int
) -> None:
    """Put a shard's rows where they belong, in memory that is taken once."""
    for site, rows in values.items():
        if site not in held:
            held[site] = torch.empty(n, rows.shape[1])
        held[site][torch.tensor(places)] = rows


def _in_order(results: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Give results by their numbers from 0, so that sums do not depend on who was first."""
    waiting, number = {}, 0
    for got, result in results:
        waiting[got] = result
        while number in waiting:
            yield number, waiting.pop(number)
            number += 1


def _known_lines(output: PathLike | None) -> dict[str, list[dict[str, Any]]]:
    """Read the lines of an answer file by the id of their prompt; a line cut by a kill is dropped.

    The worker's ``sweep`` tells by the key which of them are answers to what is asked now.
    """
    if output is None or not local_path(output).exists():
        return {}
    known: dict[str, list[dict[str, Any]]] = {}
    for line in read_jsonl(output, cut_last=True):
        known.setdefault(str(line.get("prompt_id")), []).append(line)
    return known


def _completion(row: dict[str, Any], by_id: Mapping[str, Prompt], asked: str) -> Completion:
    log_probs = row["log_probs"]
    return Completion(
        by_id[row["prompt_id"]],
        row["text"],
        tuple(row["tokens"]),
        row["finish"],
        row["condition"],
        row["thinking"],
        row["sample"],
        None if log_probs is None else LogProbs(tuple(log_probs), asked),
    )
