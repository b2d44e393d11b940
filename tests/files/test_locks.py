"""A folder is written by one process, and a lock never outlives its process."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from workbench.files.locks import LOCK, locked_folder
from workbench.files.store import name_for_file

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import sys, time
from workbench.files.locks import locked_folder
with locked_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_that_another_process_holds_is_refused_and_free_again_once_that_is_killed(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is in use: another run is writing"):
            locked_folder(folder).__enter__()
        process.kill()
    assert (folder / LOCK).exists(), "a killed process leaves the file"
    with locked_folder(folder):
        (folder / "a").touch()


def test_a_folder_is_refused_inside_one_process_too_and_free_after_an_error(tmp_path: Path) -> None:
    def failing() -> None:
        with locked_folder(tmp_path):
            (tmp_path / "a").touch()
            with pytest.raises(ValueError, match="is in use"), locked_folder(tmp_path):
                pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    with locked_folder(tmp_path):
        pass


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()


def test_any_category_becomes_a_short_name_of_its_own() -> None:
    assert name_for_file("hate_speech") == "hate_speech"
    strange = ["Hate speech", "hate speech", "HATE SPEECH", "x" * 300, "y" * 299 + "z", "../../x",
               "a/b", "a\\b", "é", "仇恨", "con:1", ".", "", "hate_speech.", "_a_"]  # fmt: skip
    names = [name_for_file(text) for text in strange]
    assert len({name.lower() for name in names}) == len(names)
    assert max(map(len, names)) <= 80
    assert all(not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_-") for name in names)
