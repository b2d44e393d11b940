"""Run jobs on a pool of Ray Data's actors: each job is done once, a killed worker is replaced.

What goes in and comes out of a job are numbers, JSON and safetensors bytes. Ray itself pickles code
and settings on their way between its own processes; nothing here reads a pickle from a file.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.files.hints import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


@dataclass(frozen=True)
class RayPool:
    """Say where workers run and what each of them has.

    Attributes:
        address: None starts Ray on this machine, or uses what runs in this process; "auto" joins
            the cluster this machine belongs to, "HOST:PORT" or "ray://HOST:PORT" another one.
        workers: Actors, each with a model of its own.
        cpus: Processors of a worker, which are also its torch threads; may be a fraction.
        gpus: GPUs of a worker; .5 puts two of them on one, 0 none.
        prompts_per_job: Prompts whose answers a worker writes, or judges, before it hands them in:
            what is done again if it dies. (Of activations a job is a shard.)
        attempts: How often a job may be begun again because its worker died, and a worker replaced.
    """

    address: str | None = None
    workers: int = 2
    cpus: float = 1
    gpus: float = 0
    prompts_per_job: int = 256
    attempts: int = 3
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the workers."""

    def __post_init__(self) -> None:
        for name in ("workers", "prompts_per_job"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("cpus", "gpus", "attempts"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.cpus + self.gpus == 0:
            raise ValueError("a worker needs a processor or a GPU: give cpus or gpus above 0.")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus is a share of one GPU or a whole number, got {self.gpus}.")


def import_ray() -> Any:
    """Import Ray.

    Raises:
        ImportError: If it is not installed, with what to do.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            "engine 'ray' needs Ray: pip install 'workbench[ray]' here and on every machine of "
            "the cluster."
        ) from error
    return ray


def connect(pool: RayPool) -> Any:
    """Start or join Ray, quietly, and check that the pool fits on this machine.

    Raises:
        ImportError: If Ray is not installed.
        RuntimeError: If it does not start, or no cluster is at the address.
        ValueError: If this machine has too few processors or GPUs for the pool.
    """
    ray = import_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A worker imports torch first, which takes a minute where files are far or processors busy.
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
    if not ray.is_initialized():
        try:
            ray.init(
                address=pool.address,
                log_to_driver=False,
                logging_level="error",
                include_dashboard=False if pool.address is None else None,
            )
        except Exception as error:  # Ray raises whatever it comes upon, Exception itself too
            where = f"at {pool.address!r}" if pool.address else "on this machine"
            raise RuntimeError(
                f"Ray does not start {where} ({one_line(error)}); give the address of a cluster "
                "that runs, or wait until this machine is less busy."
            ) from error
    if pool.address is None:
        _check_fits(pool, ray.cluster_resources())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _check_fits(pool: RayPool, resources: Mapping[str, float]) -> None:
    for name, each in (("CPU", pool.cpus), ("GPU", pool.gpus)):
        has, needs = resources.get(name, 0), each * pool.workers
        if needs > has + 1e-6:
            raise ValueError(
                f"{pool.workers} workers with {each:g} {name} need {needs:g}, this machine has "
                f"{has:g}; give fewer workers, less for each, or the address of a cluster."
            )


def run_jobs(
    pool: RayPool,
    worker: type,
    settings: Mapping[str, Any],
    jobs: Sequence[tuple[int, str]],
) -> Iterator[tuple[int, bytes]]:
    """Run jobs on a pool of workers and give each result as soon as it is there.

    Args:
        pool: Where they run.
        worker: A class of this package. Its objects are made with ``settings`` in the worker's
            process; its method ``do`` takes the text of a job and returns bytes.
        settings: What the class is made with.
        jobs: A number and a text for each.

    Yields:
        The number of a job and its result, each once, in the order in which they come.

    Raises:
        RuntimeError: If a job has killed its worker too often, or Ray has ended.
        ValueError: What a worker raised, in its words; TypeError, OSError and RuntimeError too.
    """
    if not jobs:
        return
    ray = connect(pool)
    import pyarrow as pa

    blocks = [pa.table({"number": [number], "job": [job]}) for number, job in jobs]
    variables = {"OMP_NUM_THREADS": str(max(1, int(pool.cpus)))} | dict(pool.environment)
    with warnings.catch_warnings():
        # Ray 2.64 will know no limit of restarts any more; the extra asks for an earlier one.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.* is deprecated")
        data = ray.data.from_arrow(blocks).map_batches(
            _Actor,
            fn_constructor_args=(worker, dict(settings)),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(pool.workers, len(jobs)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            runtime_env={"env_vars": variables},
            max_restarts=pool.attempts,
            max_task_retries=pool.attempts,
        )
    seen: set[int] = set()
    for block in _blocks(ray, data):
        for number, result, error in zip(
            block["number"], block["result"], block["error"], strict=True
        ):
            if error.as_py():
                raise _error(error.as_py())
            if number.as_py() not in seen:  # a job that was begun twice counts once
                seen.add(number.as_py())
                yield number.as_py(), result.as_py()
    if lost := sorted({number for number, _ in jobs} - seen):
        raise RuntimeError(f"Ray lost {len(lost)} of {len(jobs)} jobs; start the call again.")


class _Actor:
    """Adapt a worker to Ray Data: a table of one job in, a table of one result or error out.

    Errors travel as words, for Ray drops what is under the errors that it wraps.
    """

    def __init__(self, worker: Callable[..., Any], settings: Mapping[str, Any]) -> None:
        self.worker, self.error = None, ""
        try:
            self.worker = worker(**settings)
        except tuple(_KNOWN.values()) as error:
            self.error = _in_words(error)

    def __call__(self, jobs: Any) -> Any:
        import pyarrow as pa

        done = [self._do(job.as_py()) for job in jobs["job"]]
        results = pa.array([result for result, _ in done], pa.large_binary())
        errors = pa.array([error for _, error in done], pa.large_string())
        return pa.table({"number": jobs["number"], "result": results, "error": errors})

    def _do(self, job: str) -> tuple[bytes, str]:
        if self.worker is None:
            return b"", self.error
        try:
            return self.worker.do(job), ""
        except tuple(_KNOWN.values()) as error:
            return b"", _in_words(error)


_KNOWN = {kind.__name__: kind for kind in (ValueError, TypeError, RuntimeError, OSError)}
"""Errors that a worker may raise about what it was asked."""


def _in_words(error: BaseException) -> str:
    """Write an error down, as the kind among those known that it is of."""
    name = next(name for name, kind in _KNOWN.items() if isinstance(error, kind))
    return json.dumps([name, str(error)])


def _error(words: str) -> Exception:
    """Make an error again of what ``_in_words`` wrote."""
    name, text = json.loads(words)
    return _KNOWN[name](text)


def _blocks(ray: Any, data: Any) -> Iterator[Any]:
    """Give tables of results as they come; Ray's own errors become one line."""
    try:
        yield from data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except Exception as error:  # Ray Data's own errors are of several kinds
        if not (isinstance(error, ray.exceptions.RayError) or _is_of_ray(error)):
            raise
        raise RuntimeError(
            f"a worker of Ray could not go on ({one_line(error)}); what was done is kept: start "
            "the call again, with fewer workers on a machine if memory ran out."
        ) from error


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"
