"""Keep verdicts on disk: what a judge has said once is not asked again, even after a kill."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, runtime_checkable

from workbench.files.store import PathLike, append_jsonl, key_of, local_path, read_jsonl
from workbench.judges.base import Verdict, check_pairs
from workbench.models.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


NO_ANSWER = "no answer: "
"""How the reason of an unscored verdict begins where the judge could not be reached.

It is not kept: the next call asks again. Unscored for any other reason (the judge answered, and not
with a verdict) is a result, and kept like the others.
"""


T = TypeVar("T")


T_co = TypeVar("T_co", covariant=True)


class Asked(Protocol[T]):
    """Stand for a ``Judge``, or what is called like one and returns other records.

    The records have the fields judge and reason.
    """

    @property
    def name(self) -> str:
        """Name the judge and its version; part of every key, so two judges may share a file."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[T]:
        """Give one record per answer, in order."""


@runtime_checkable
class Streams(Protocol[T_co]):
    """Stand for a judge that hands out each verdict as it has it, in any order, with its row."""

    def stream(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterator[tuple[int, T_co]]:
        """Give pairs of row and verdict."""


def cached(
    judge: Asked[T],
    path: PathLike,
    *,
    result: Callable[..., T] | None = None,
    batch: int = 16,
    progress: bool = False,
) -> CachedJudge[T]:
    """Wrap a judge so that it is asked only about answers that the file does not know.

    Args:
        judge: Any judge; its name must change whenever its verdicts would.
        path: A jsonl file, made when the first verdict comes. Several judges may share it, but only
            one process at a time.
        result: The class of what the judge returns; None is ``Verdict``.
        batch: Answers the judge gets at a time: what a kill may lose. A judge with a ``stream``
            loses only what it is waiting for.
        progress: Show a progress bar.

    Raises:
        ValueError: If batch is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    of = cast("Callable[..., T]", result or Verdict)
    return CachedJudge(judge, local_path(path), of, batch, progress)


@dataclass(frozen=True)
class CachedJudge(Generic[T]):
    """Remember a judge's verdicts on disk; made by ``cached``.

    The file holds one line per verdict: its key (of judge, prompt and response; not the texts
    themselves) and its fields.
    """

    judge: Asked[T]
    path: Path
    result: Callable[..., T]
    batch: int
    progress: bool = False

    @property
    def name(self) -> str:
        """Name the judge behind it."""
        return self.judge.name

    @property
    def agreement(self) -> str | None:
        """Say how far the judge behind it agrees with labels, if it says so."""
        return getattr(self.judge, "agreement", None)

    @property
    def fitted_on(self) -> frozenset[str]:
        """Keys of the questions whose answers the judge behind it was fitted on."""
        return frozenset(getattr(self.judge, "fitted_on", ()))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[T]:
        """Give one verdict per answer, in order; ask the judge only where the file has none.

        What the judge says is added to the file as it comes.

        Raises:
            ValueError: If the file is not a cache of verdicts, or the lists differ in length.
            RuntimeError: If the judge does not return one verdict per answer.
        """
        check_pairs(prompts, responses)
        name = self.name
        keys = [verdict_key(name, *pair) for pair in zip(prompts, responses, strict=True)]
        verdicts = self._known(frozenset(keys))
        # Of equal pairs only the first is asked about.
        rows = {key: row for row, key in reversed(list(enumerate(keys))) if key not in verdicts}
        missing = sorted(rows.values())
        bar = progress_bar(len(missing), f"verdicts of {name}", "verdict", show=self.progress)
        for part in self._ask(
            [prompts[row] for row in missing], [responses[row] for row in missing]
        ):
            new = {keys[missing[i]]: verdict for i, verdict in part}
            verdicts |= new
            bar.update(len(new))
            final_records = [
                {"key": key, **_fields(verdict)}
                for key, verdict in new.items()
                if _is_final(verdict)
            ]
            if final_records:
                append_jsonl(self.path, final_records)
        bar.close()
        if lost := [row for key, row in rows.items() if key not in verdicts]:
            raise RuntimeError(
                f"judge {self.name!r} gave no verdict for {len(lost)} of {len(missing)} answers."
            )
        return [verdicts[key] for key in keys]

    def _ask(self, prompts: list[str], responses: list[str]) -> Iterator[list[tuple[int, T]]]:
        """Give rows and verdicts in the parts in which they become known."""
        if isinstance(self.judge, Streams):
            if prompts:
                yield from ([pair] for pair in self.judge.stream(prompts, responses))
            return
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            verdicts = self.judge(prompts[part], responses[part])
            if len(verdicts) != len(prompts[part]):
                raise RuntimeError(
                    f"judge {self.name!r} gave {len(verdicts)} verdicts for "
                    f"{len(prompts[part])} answers; a judge returns one per answer, in order."
                )
            yield list(enumerate(verdicts, start))

    def _known(self, keys: frozenset[str]) -> dict[str, T]:
        """Read the file's verdicts under these keys; a line cut by a kill is dropped."""
        if not self.path.is_file():
            return {}
        known = {}
        for number, row in enumerate(read_jsonl(self.path, cut_last=True), start=1):
            try:
                if row["key"] in keys:
                    known[row["key"]] = self.result(
                        **{name: value for name, value in row.items() if name != "key"}
                    )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.path}, row {number} is not a verdict of this judge ({error}); "
                    "give another file."
                ) from error
        return known


def verdict_key(judge: str, prompt: str, response: str) -> str:
    """Make the key of a verdict: the same for the same judge and the same two texts."""
    return key_of([_encodable(text) for text in (judge, prompt, response)])


def _is_final(verdict: object) -> bool:
    return not str(getattr(verdict, "reason", "")).startswith(NO_ANSWER)


def _fields(verdict: Any) -> dict[str, Any]:
    return {
        name: _encodable(value) if isinstance(value, str) else value
        for name, value in asdict(verdict).items()
    }


def _encodable(text: str) -> str:
    """Spell out lone surrogates (broken characters in JSON), which UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
