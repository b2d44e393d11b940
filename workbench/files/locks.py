"""Keep two processes from writing into one folder."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.files.store import PathLike

LOCK = ".lock"
"""Name of the lock file inside a folder; a file of this name alone means nothing."""


@contextmanager
def locked_folder(folder: PathLike) -> Iterator[None]:
    """Hold a folder inside the block; another process that wants it is refused at once.

    The lock is the operating system's on the open file. It ends with the process, however that
    ends, so a killed run leaves no stale lock. The folder is made where it is not there, and
    removed again if nothing was written into it.

    Raises:
        ValueError: If the folder is held already.
    """
    from filelock import FileLock, Timeout

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{str(path)!r} is in use: another run is writing into it; wait until that has ended, "
            "or give another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()
        if all(entry.name == LOCK for entry in path.iterdir()):
            with suppress(OSError):  # another process may have come in between
                (path / LOCK).unlink()
                path.rmdir()
