"""Start peers in environments of their own, and say of each what became of it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from speed_measure import PeerFailed, Spent, say
from speed_plain import Rows, Values

ROOT = Path(__file__).resolve().parents[1]


KNOWN = ("nnsight", "repeng", "steering-vectors")
"""Peers that every page of results names, measured or not."""


def environments(given: Sequence[str], *, all_known: bool) -> dict[str, str]:
    """Find the Python of each peer: those given as NAME=PYTHON, and those of ``make bench-peers``.

    Raises:
        ValueError: If one is not given as NAME=PYTHON.
    """
    pythons = {name: str(made_python(name)) for name in KNOWN} if all_known else {}
    for one in given:
        name, _, python = one.partition("=")
        if not name or not python:
            raise ValueError(f"--peer takes NAME=PYTHON, got {one!r}.")
        pythons[name] = python
    return pythons


def made_python(name: str) -> Path:
    """Say where ``make bench-peers`` puts the Python of a peer."""
    return ROOT / f".venv-bench-{name}" / "bin" / "python"


class Worker:
    """Runs a peer; told to run, it answers with its seconds.

    Raises:
        PeerFailed: If it does not start or ends before its time, with the last line it said.
    """

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        self.name, self.version = name, ""
        script = Path(__file__).with_name("speed_peers.py")
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed by stop
        try:
            self._process = subprocess.Popen(
                [python, str(script), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            reason = f"{error.strerror}; 'make bench-peers' makes its environment"
            raise PeerFailed(f"it did not start: {reason}") from error
        self.version = self._ask({"folder": str(folder), "threads": threads})
        self.version = self.version.removeprefix("ready ")

    def give(self, rows: Rows) -> None:
        """Hand over the rows of the work that comes next."""
        self._ask({"rows": rows})

    def result(self) -> Values:
        """Run once and give what was computed."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "values.safetensors"
            self._ask({"file": str(file)})
            values = load_file(file)
        keys = {name: name.rpartition(".") for name in values}
        return {(keys[name][0], int(keys[name][2])): rows for name, rows in values.items()}

    def run(self) -> Spent:
        """Run once and give the seconds that it took."""
        cpu, wall = self._ask({}).split()
        return Spent(float(cpu), float(wall))

    def stop(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _ask(self, command: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said last tells why
        for line in self._process.stdout:
            if line.startswith("@ "):
                return line[2:].strip()
        raise PeerFailed(f"it ended: {self._last_words()}")

    def _last_words(self) -> str:
        if self._errors.closed:
            return "it was stopped before"
        self._process.wait(timeout=30)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:200] if lines else f"exit status {self._process.returncode}"


def start(
    pythons: dict[str, str], folder: Path, threads: int, states: dict[str, str]
) -> list[Worker]:
    """Start all peers on a checkpoint; write into ``states`` the version or the failure of each."""
    workers = []
    for name, python in pythons.items():
        say(f"peer {name}: start")
        try:
            worker = Worker(name, python, folder, threads)
        except PeerFailed as reason:
            states[name] = f"FAILED: {reason}"
            say(f"peer {name} FAILED: {reason}")
            continue
        states.setdefault(name, worker.version)
        workers.append(worker)
    return workers
