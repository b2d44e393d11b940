"""Let another engine write the answers that a sweep lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from workbench.files.store import append_jsonl
from workbench.models.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from workbench.files.store import PathLike
    from workbench.generation._decode_loop import Decoded, Row
    from workbench.generation.decoding import Decoding
    from workbench.steering.interventions import Intervention


class Writer(Protocol):
    """Write answers elsewhere: what an engine gives to ``sweep``.

    Attributes:
        name: Of the engine; the answers in a file are told by it.
    """

    name: str

    def written(
        self,
        rows: Sequence[Row],
        groups: Sequence[Sequence[Intervention]],
        decoding: Decoding,
    ) -> Iterator[tuple[Row, Decoded]]:
        """Answer rows, in any order; each row points to the group of its interventions."""


KEPT_AT_A_TIME = 64
"""Answers that are gathered before they are written to the file."""


def answer_elsewhere(
    writer: Writer,
    groups: Sequence[Sequence[Intervention]],
    alike: Sequence[Sequence[Row]],
    answers: dict[str, dict[str, Any]],
    decoding: Decoding,
    record_of: Callable[[Decoded], dict[str, Any]],
    give: Callable[..., list[dict[str, Any]]],
    output: PathLike | None,
    *,
    progress: bool,
) -> None:
    """Have the rows written that have no answer yet, and keep what comes.

    Args:
        writer: Who writes.
        groups: Lists of interventions that the rows point to.
        alike: The rows, those together that ask for one and the same answer.
        answers: Record of each key that is known; it is added to.
        decoding: Length and stops.
        record_of: Makes the record of an answer.
        give: Gives a record to all rows that ask for it; returns the lines that keep it.
        output: File that keeps them.
        progress: Show a progress bar.
    """
    lines: list[dict[str, Any]] = []
    for members in alike:
        known = next((answers[row.key] for row in members if row.key in answers), None)
        lines += give(known, members, answers) if known else []
    members_of = {members[0].key: members for members in alike}
    missing = [members[0] for members in alike if members[0].key not in answers]
    done = len(alike) - len(missing)
    with progress_bar(len(alike), "answers", "answer", show=progress, done=done) as bar:
        for row, decoded in writer.written(missing, groups, decoding) if missing else ():
            lines += give(record_of(decoded), members_of[row.key], answers)
            if len(lines) >= KEPT_AT_A_TIME:
                _keep(output, lines)
                lines = []
            bar.update(1)
    _keep(output, lines)


def _keep(output: PathLike | None, lines: list[dict[str, Any]]) -> None:
    if output is not None and lines:
        append_jsonl(output, lines)
