"""Verdicts on disk: what a judge has said of an answer once is not asked again, not after a kill either."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, runtime_checkable

from workbench.files.store import PathLike, append_jsonl, key_of, read_jsonl
from workbench.judges.base import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


NO_ANSWER = "no answer: "
"""How the reason of an unscored verdict begins where the judge could not be reached. It is not kept: the next call asks again.
Unscored for any other reason (the judge answered, and not with a verdict) is a result, and kept like the others."""


T = TypeVar("T")


T_co = TypeVar("T_co", covariant=True)


class Asked(Protocol[T]):
    """A ``judges.Judge``, or anything called like one that returns other records with the fields judge and reason."""

    @property
    def name(self) -> str:
        """Name and version: part of every key, so two judges may share a file."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[T]:
        """One record an answer, in order."""


@runtime_checkable
class Streams(Protocol[T_co]):
    """A judge that hands out each verdict when it has it, in any order, with the row it belongs to."""

    def stream(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterator[tuple[int, T_co]]:
        """Pairs of row and verdict."""


def cached(
    judge: Asked[T], path: PathLike, *, result: Callable[..., T] | None = None, batch: int = 16
) -> CachedJudge[T]:
    """The same judge, asked only about answers that the file does not know.

    Args:
        judge: Any judge; its name must change whenever its verdicts would.
        path: A jsonl file, made when the first verdict comes. Several judges may share it, but only one process at a time.
        result: The class of what the judge returns; None is ``Verdict``.
        batch: Answers the judge gets at a time: what a kill may lose. A judge with a ``stream`` loses only what it is waiting for.

    Raises:
        ValueError: If batch is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    return CachedJudge(judge, Path(path), cast("Callable[..., T]", result or Verdict), batch)


@dataclass(frozen=True)
class CachedJudge(Generic[T]):
    """A judge with a memory on disk; made by ``cached``.

    The file holds one line a verdict: its key (of judge, prompt and response; not the texts themselves) and its fields.
    """

    judge: Asked[T]
    path: Path
    result: Callable[..., T]
    batch: int

    @property
    def name(self) -> str:
        """The judge's own name."""
        return self.judge.name

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[T]:
        """One verdict an answer, in order: from the file where it is known, else from the judge, then added to the file.

        Raises:
            ValueError: If the file is not a cache of verdicts, or the lists differ in length.
            RuntimeError: If the judge does not return one verdict an answer.
        """
        check_pairs(prompts, responses)
        name = self.name
        keys = [verdict_key(name, *pair) for pair in zip(prompts, responses, strict=True)]
        verdicts = self._known(frozenset(keys))
        rows = {key: row for row, key in reversed(list(enumerate(keys))) if key not in verdicts}
        missing = sorted(rows.values())
        for part in self._ask(
            [prompts[row] for row in missing], [responses[row] for row in missing]
        ):
            new = {keys[missing[i]]: verdict for i, verdict in part}
            verdicts |= new
            kept = [
                {"key": key, **_fields(verdict)}
                for key, verdict in new.items()
                if _is_final(verdict)
            ]
            if kept:
                append_jsonl(self.path, kept)
        if lost := [row for key, row in rows.items() if key not in verdicts]:
            raise RuntimeError(
                f"judge {self.name!r} gave no verdict for {len(lost)} of {len(missing)} answers."
            )
        return [verdicts[key] for key in keys]

    def _ask(self, prompts: list[str], responses: list[str]) -> Iterator[list[tuple[int, T]]]:
        """Rows and verdicts, in the parts in which they become known."""
        if isinstance(self.judge, Streams):
            if prompts:
                yield from ([pair] for pair in self.judge.stream(prompts, responses))
            return
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            verdicts = self.judge(prompts[part], responses[part])
            if len(verdicts) != len(prompts[part]):
                raise RuntimeError(
                    f"judge {self.name!r} gave {len(verdicts)} verdicts for {len(prompts[part])} answers; "
                    "a judge returns one an answer, in order."
                )
            yield list(enumerate(verdicts, start))

    def _known(self, keys: frozenset[str]) -> dict[str, T]:
        """Verdicts of the file under these keys; a line cut by a kill is dropped."""
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
                    f"{self.path}, row {number} is not a verdict of this judge ({error}); give another file."
                ) from error
        return known


def verdict_key(judge: str, prompt: str, response: str) -> str:
    """Key of a verdict: the same for the same judge and the same two texts, whatever characters they hold."""
    return key_of([_encodable(text) for text in (judge, prompt, response)])


def check_pairs(prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Refuse what cannot be prompts and their responses.

    Raises:
        TypeError: If one string is given in place of a list.
        ValueError: If the two lists differ in length.
    """
    if isinstance(prompts, str) or isinstance(responses, str):
        raise TypeError(
            "prompts and responses must be lists of texts, got one string; write [prompt], [response]."
        )
    if len(prompts) != len(responses):
        raise ValueError(
            f"prompts and responses must pair up, got {len(prompts)} and {len(responses)}."
        )


def is_empty(response: str) -> bool:
    """Whether an answer has no letter and no digit: there is nothing to judge, so no judge is asked."""
    return not any(char.isalnum() for char in response)


def _is_final(verdict: object) -> bool:
    return not str(getattr(verdict, "reason", "")).startswith(NO_ANSWER)


def _fields(verdict: Any) -> dict[str, Any]:
    return {
        name: _encodable(value) if isinstance(value, str) else value
        for name, value in asdict(verdict).items()
    }


def _encodable(text: str) -> str:
    """The text with lone surrogates (broken characters in JSON from elsewhere) spelt out, for they cannot be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
