"""Run a model in vLLM: activations of many prompts, and answers under many vectors at once.

It uses vLLM's own extension points: a worker extension class (``_vllm_worker``), what a request
carries in its sampling parameters, and the collective call. Every request has its own vector, and
all of them share vLLM's batches. docs/vllm.md says what works and what is refused.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from workbench.engines._wire import EDITS, pack, unpack_rows
from workbench.engines.base import EngineCannot
from workbench.generation._decode_loop import Decoded
from workbench.generation.answers import sweep
from workbench.generation.decoding import GREEDY
from workbench.models.activations import cache_activations, class_moments
from workbench.models.checkpoints import find_checkpoint
from workbench.models.site_names import as_sites
from workbench.models.tokens import stop_ids

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from workbench.generation._decode_loop import Row
    from workbench.generation.answers import Completion, Condition
    from workbench.generation.decoding import Decoding
    from workbench.models.activations import ActivationSet, ClassMoments
    from workbench.models.hooked_model import HookedModel
    from workbench.models.sites import Site
    from workbench.models.tokens import Encoded
    from workbench.prompts.forms import PromptsLike
    from workbench.steering.interventions import Intervention


WORKER = "workbench.engines._vllm_worker.SteeringWorker"
"""What is mixed into vLLM's workers."""

AT_A_TIME = 1024
"""Requests that are handed to vLLM together: it makes batches of them as its memory allows."""


def open_vllm(
    name_or_path: str | Path,
    model: HookedModel,
    *,
    revision: str | None = None,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    **settings: Any,
) -> VLLMEngine:
    """Start vLLM on a checkpoint, with what steers and reads requests in its workers.

    Args:
        name_or_path: What ``load_model`` takes: a hub name, a folder, a .gguf file (vLLM is given
            its conversion), or a packaged model.
        model: The same model as a hooked one: it tells tokens, sites and identity, and what dtype
            vLLM shall use. ``load_shell`` makes one without weights.
        revision: Branch, tag or commit of a hub repository.
        tensor_parallel_size: Devices that share each layer (on a processor: processes).
        max_model_len: Longest text, in tokens; vLLM keeps room for it. The model's context by
            default.
        settings: Further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization=0.9`` or
            ``max_num_seqs=512``.

    Raises:
        ImportError: If vLLM is not installed.
        ValueError: If the checkpoint cannot be found, or vLLM's model has no list of blocks.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "engine 'vllm' needs the package vllm; install it as docs/vllm.md says ('make "
            "setup-vllm' on a processor, 'pip install vllm' on a GPU), or use engine 'local'."
        )
    taken = {"worker_extension_cls", "enforce_eager", "enable_prefix_caching"} & set(settings)
    taken |= {"pipeline_parallel_size"} & set(settings)
    if taken:
        raise ValueError(f"{sorted(taken)[0]} is set by the engine itself; leave it out.")
    source, _ = find_checkpoint(name_or_path, revision)
    # The engine's loop in this process, and the model runner whose batch the worker looks at.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    from vllm import LLM

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    llm = LLM(
        str(source),
        revision=revision,
        trust_remote_code=False,
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=max_model_len,
        worker_extension_cls=WORKER,
        enforce_eager=True,  # a compiled graph would not call the hooks
        enable_prefix_caching=False,  # a prefix is steered by its request's vector
        disable_log_stats=True,
        **settings,
    )
    return VLLMEngine(model, llm)


class VLLMEngine:
    """Cache activations and write answers in vLLM, each request steered by its own vector.

    Attributes:
        name: "vllm".
        model: What tells tokens, sites and identity.
        llm: The engine of vLLM.
    """

    name = "vllm"

    def __init__(self, model: HookedModel, llm: Any) -> None:
        self.model, self.llm = model, llm
        self.kinds = frozenset(llm.collective_rpc("workbench_install")[0])

    def cache_activations(
        self, prompts: PromptsLike, sites: Sequence[Site] | Site, **how: Any
    ) -> dict[Site, ActivationSet]:
        """Do what ``models.activations.cache_activations`` does; vLLM makes the batches.

        Raises:
            EngineCannot: If a site is none of the residual stream, attention's or the MLP's output.
        """
        sites = as_sites(self.model, sites)
        self.check_sites(sites)
        return cache_activations(self.model, prompts, sites, reader=self, **how)

    def class_moments(
        self, prompts: PromptsLike, sites: Sequence[Site] | Site, **how: Any
    ) -> dict[Site, ClassMoments]:
        """Do what ``models.activations.class_moments`` does; vLLM makes the batches.

        Raises:
            EngineCannot: If a site is none of the residual stream, attention's or the MLP's output.
        """
        sites = as_sites(self.model, sites)
        self.check_sites(sites)
        return class_moments(self.model, prompts, sites, reader=self, **how)

    def sweep(
        self,
        prompts: PromptsLike,
        conditions: Mapping[str, Condition],
        decoding: Decoding = GREEDY,
        **how: Any,
    ) -> list[Completion]:
        """Do what ``generation.answers.sweep`` does, with all requests in vLLM's batches.

        Raises:
            EngineCannot: If an intervention needs a gate, a site or an edit that vLLM has not, or
                answers are to be sampled.
        """
        self.check_conditions(
            conditions.values() if isinstance(conditions, Mapping) else (), decoding
        )
        return sweep(self.model, prompts, conditions, decoding, writer=self, **how)

    def close(self) -> None:
        """End vLLM and give its memory back."""
        import gc

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()

    def check_sites(self, sites: Sequence[Site] | Site) -> None:
        """Raise where vLLM does not compute what is at a site.

        Raises:
            EngineCannot: If it does not.
        """
        check_kinds(self.name, sites, self.kinds)

    def check_conditions(self, conditions: Iterable[Condition], decoding: Decoding) -> None:
        """Raise where something cannot be done in vLLM's workers.

        Raises:
            EngineCannot: If there is a gate, an edit that is any function, another kind of site, or
                a temperature: the numbers that conditions share are drawn in the local decode loop.
        """
        check_vllm_can(self.name, conditions, decoding, self.kinds)

    def pooled(
        self,
        encoded: Sequence[Encoded],
        sites: Sequence[Site],
        span: str,
        batch_size: int,
        max_tokens: int,
    ) -> Iterator[tuple[Sequence[Encoded], dict[Site, Float[Tensor, "batch d"]]]]:
        """Run rows and give their means: what ``cache_activations`` asks of its reader.

        Raises:
            ValueError: If an activation is infinite or undefined.
        """
        if batch_size < 1 or max_tokens < 1:
            raise ValueError(
                f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}."
            )
        names = [str(site) for site in sites]
        for start in range(0, len(encoded), AT_A_TIME):
            rows = encoded[start : start + AT_A_TIME]
            tags = [
                {"row": str(i), "span": list(row.span(span)), "sites": names}
                for i, row in enumerate(rows)
            ]
            prompts = [row.ids[: row.span(span)[1]] for row in rows]
            self._run(prompts, tags, max_tokens=1)
            read = unpack_rows(self.llm.collective_rpc("workbench_read")[0])
            pooled = {
                site: torch.stack([read[str(i)][str(site)] for i in range(len(rows))])
                for site in sites
            }
            finite = torch.stack([values.isfinite().all(dim=1) for values in pooled.values()])
            if not bool(finite.all()):
                row = rows[int((~finite.all(dim=0)).nonzero()[0])]
                raise ValueError(
                    f"the activations of prompt {row.prompt.id!r} are infinite or undefined in "
                    "vLLM; load the model with dtype='bfloat16' or 'float32'."
                )
            yield rows, pooled

    def written(
        self,
        rows: Sequence[Row],
        groups: Sequence[Sequence[Intervention]],
        decoding: Decoding,
    ) -> Iterator[tuple[Row, Decoded]]:
        """Answer rows, each under its group: what ``sweep`` asks of its writer."""
        plans = {str(i): group for i, group in enumerate(groups) if group}
        self.llm.collective_rpc("workbench_plans", args=(pack(plans),))
        stops = sorted(stop_ids(self.model))
        for start in range(0, len(rows), AT_A_TIME):
            batch = rows[start : start + AT_A_TIME]
            tags = [{"plan": str(row.group)} if groups[row.group] else None for row in batch]
            outputs = self._run(
                [row.encoded.ids for row in batch],
                tags,
                max_tokens=decoding.max_new_tokens,
                stop_token_ids=stops,
                n_log_probs=0,
            )
            for row, output in zip(batch, outputs, strict=True):
                first, last = row.encoded.response
                known = not groups[row.group] and first == last
                yield row, decoded_of(output.outputs[0], stops, with_log_probs=known)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        tags: Sequence[dict[str, Any] | None],
        *,
        max_tokens: int,
        stop_token_ids: Sequence[int] = (),
        n_log_probs: int | None = None,
    ) -> list[Any]:
        """Hand requests to vLLM, and give its outputs in their order."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=0.0,
                max_tokens=max_tokens,
                stop_token_ids=list(stop_token_ids),
                logprobs=n_log_probs,
                detokenize=False,
                extra_args=None if tag is None else {"workbench": tag},
            )
            for tag in tags
        ]
        given: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return list(self.llm.generate(given, parameters, use_tqdm=False))


def check_kinds(engine: str, sites: Any, kinds: Container[str]) -> None:
    """Raise where a site is of another kind than an engine has.

    Raises:
        EngineCannot: If one is.
    """
    for site in sites if isinstance(sites, list | tuple | set | frozenset) else [sites]:
        kind = getattr(site, "kind", None)
        if kind is not None and kind not in kinds:
            raise EngineCannot(engine, f"read or steer {site}")


def check_vllm_can(
    engine: str, conditions: Iterable[Condition], decoding: Decoding, kinds: Container[str]
) -> None:
    """Raise where conditions or decoding ask for what vLLM's workers cannot do.

    Raises:
        EngineCannot: If they do, with what.
    """
    if getattr(decoding, "temperature", 0) > 0:
        raise EngineCannot(engine, "sample with the same random numbers for all conditions")
    for one in every_intervention(conditions):
        if not hasattr(one, "site"):
            continue  # ``sweep`` says what it should be
        if one.gate is not None:
            raise EngineCannot(engine, f"open a gate at {one.gate.site} while it reads")
        if EDITS.get(type(one.edit).__name__) is not type(one.edit):
            raise EngineCannot(engine, f"make the edit {type(one.edit).__name__} at {one.site}")
        check_kinds(engine, [one.site], kinds)


def every_intervention(conditions: Iterable[Any]) -> Iterator[Any]:
    """List what all conditions do, whatever their form; ``sweep`` says what is none."""
    for condition in conditions:
        lists = condition.values() if isinstance(condition, Mapping) else [condition]
        for interventions in lists:
            yield from interventions if isinstance(interventions, list | tuple) else ()


def decoded_of(output: Any, stops: Sequence[int], *, with_log_probs: bool) -> Decoded:
    """Read one answer of vLLM: without the token that ended it.

    Args:
        output: A ``CompletionOutput``.
        stops: Tokens that end an answer.
        with_log_probs: Whether the log-probabilities are those of the unsteered model.
    """
    tokens, ended = list(output.token_ids), set(stops)
    place = next((i for i, token in enumerate(tokens) if token in ended), None)
    kept = tokens if place is None else tokens[:place]
    log_probs = None
    if with_log_probs and output.logprobs is not None:
        steps = zip(kept, output.logprobs, strict=False)
        log_probs = [float(step[token].logprob) for token, step in steps]
    return Decoded(kept, "length" if place is None else "eos", log_probs)
