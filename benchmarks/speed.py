"""Measure how fast the workbench is beside its peers on the same work, all in one run.

    make bench                                         # everything, with the peers: 25 minutes
    make bench BENCH=--demo                            # and 'make demo': 4 minutes more
    python benchmarks/speed.py --quick                 # whether it works: two minutes, no growth
    python benchmarks/speed.py --peer nnsight=ENV/bin/python --without growth
    python benchmarks/speed.py --prompts safebench:FILE --threads 1

It writes benchmarks/RESULTS.md, results.json and, for the growth curve, results.png, each of them
whole. In every work the contenders take turns (``speed_measure``), and what they compute is
compared before it is timed. Peers that need other versions run as workers in environments of their
own, which ``make bench-peers`` makes and ``--peers`` finds, and are timed there. A contender that
fails is named with its reason.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import speed_growth
import speed_machine
import speed_tasks as tasks
import torch
from speed_measure import say
from speed_report import markdown, picture
from speed_tasks import FIRST, LARGER, QUICK, Sizes, Subject
from speed_workers import ROOT, Worker, environments, start

import workbench as wb
from workbench.files.store import write_json, write_text
from workbench.models.packaged import PACKAGED, packaged_folder
from workbench.models.packing import pack_linears

MODELS = ("embedded", "qwen2.5-coder-0.5b")


PARTS = (
    "extraction", "long", "generation", "sweep", "attribution", "scoring", "machine", "one-core",
    "memory", "growth", "gpu",
)  # fmt: skip
"""What can be left out, in the order of the run."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for; return the page."""
    options = parsed(arguments)
    threads = options.threads or cores()
    torch.set_num_threads(threads)
    parts = [part for part in PARTS if part not in options.without]
    try:
        pythons = environments(options.peer, all_known=options.peers)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    started = time.monotonic()
    results: dict[str, Any] = {"about": about(options, threads), "peers": {}, "models": {}}
    results["left out"] = dict.fromkeys(options.without, "asked for")
    if options.quick:
        results["left out"]["growth"] = "a quick run"
    for place, name in enumerate(options.models):
        sizes = QUICK if options.quick else (FIRST, LARGER)[min(place, 1)]
        if options.rounds:
            sizes = replace(sizes, rounds=options.rounds)
        found = of_model(name, place, sizes, options, parts, pythons, results["peers"])
        results["models"][label(name)] = found
    first = next((name for name in options.models if folder_of(name) is not None), None)
    if first is not None and "growth" in parts:
        results["growth"] = speed_growth.growth(first, threads)
    if "gpu" in parts:
        results["gpu"] = on_gpu(options) if torch.cuda.is_available() else None
    if options.demo:
        results["demo"] = demo()
    results["about"]["minutes"] = (time.monotonic() - started) / 60
    return written(results, Path(options.out))


def written(results: dict[str, Any], out: Path) -> Path:
    """Write the page, the numbers and the picture, each of them whole."""
    write_json(out / "results.json", results)
    write_text(out / "RESULTS.md", markdown(results))
    if "growth" in results:
        picture(results, out / "results.png")
    say(f"wrote {out / 'RESULTS.md'}")
    return out / "RESULTS.md"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a quick run leaves the growth out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names or folders")
    parser.add_argument("--prompts", help="a data set (default: the project's own prompts)")
    parser.add_argument("--rounds", type=int, help="default: 5, or 1 in a quick run")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument(
        "--demo", action="store_true", help="also run 'make demo' from nothing, 4 minutes more"
    )
    parser.add_argument(
        "--peers", action="store_true", help="take the environments that 'make bench-peers' makes"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        help="NAME=python of its environment; may be repeated",
    )
    parser.add_argument("--without", nargs="+", default=[], choices=PARTS, help="what to leave out")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder of RESULTS.md")
    options = parser.parse_args(arguments)
    if options.quick:
        options.without.append("growth")
    return options


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def about(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Say on what the numbers are measured."""
    return {
        "threads": threads,
        "processor": speed_machine.processor(),
        "features": speed_machine.features(),
        "prompts": (options.prompts or "data/prompts.jsonl").partition(":")[0],
        "quick": options.quick,
        "versions": speed_machine.versions(),
        "day": time.strftime("%Y-%m-%d"),
    }


def label(name: str) -> str:
    """Say what the page calls a model: a folder by its last part."""
    return Path(name).name


def folder_of(name: str) -> Path | None:
    """Find a model's checkpoint; None where it is not installed."""
    if name not in PACKAGED:
        return Path(name) if Path(name).is_dir() else None
    return packaged_folder(name) if wb.models.is_installed(name) else None


def subject_of(
    name: str, folder: Path, sizes: Sizes, options: argparse.Namespace, device: str = "cpu"
) -> Subject:
    """Load a model twice: hooked, and as transformers loads it by default."""
    from transformers import AutoModelForCausalLM

    say(f"{name}: load on {device}")
    raw = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    raw = raw.to(device).eval().requires_grad_(False)
    model = wb.load_model(name, device=device)
    clock = "cpu" if device == "cpu" else "wall"
    return Subject(label(name), model, raw, folder, wb.prompts_from(options.prompts), sizes, clock)


def of_model(
    name: str,
    place: int,
    sizes: Sizes,
    options: argparse.Namespace,
    parts: Sequence[str],
    pythons: dict[str, str],
    states: dict[str, str],
) -> dict[str, Any]:
    """Measure everything on one model: the first one also decoding alone and one core."""
    folder = folder_of(name)
    if folder is None:
        say(f"{name}: left out, it is not installed")
        return {"left out": "it is not installed ('make models' installs packaged models)"}
    subject = subject_of(name, folder, sizes, options)
    packing = pack_linears(subject.model.original_model, "auto")
    found: dict[str, Any] = {
        "model": wb.model_info(subject.model).name,
        "rounds": sizes.rounds,
        "packed": {
            "packed": packing.packed,
            "gain": None if math.isnan(packing.gain) else packing.gain,
            "reason": packing.reason,
        },
    }
    with torch.no_grad():
        workers = start(pythons, folder, torch.get_num_threads(), states)
        try:
            found |= run_parts(readings(subject, workers), parts)
        finally:
            for worker in workers:
                worker.stop()
        note_failures(found, states)
        found |= run_parts(works(subject), parts)
        if place == 0 and "one-core" in parts:
            found["one core"] = one_core(subject)
    if "memory" in parts:
        found["memory"] = speed_growth.in_process(name, torch.get_num_threads(), "memory")
    return found


def run_parts(
    named: dict[str, Callable[[], dict[str, Any]]], parts: Sequence[str]
) -> dict[str, Any]:
    """Run those parts that are asked for."""
    return {name: run() for name, run in named.items() if name in parts}


def readings(
    subject: Subject, workers: Sequence[Worker]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name the parts that peers take part in."""
    short = subject.spread(subject.sizes.n_short)
    long = tasks.long_prompts(subject.model, subject.sizes.n_long, subject.sizes.long_tokens)
    return {
        "extraction": lambda: tasks.extraction(subject, short, f"{len(short)} prompts", workers),
        "long": lambda: tasks.extraction(subject, long, f"{len(long)} long texts"),
    }


def works(subject: Subject) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name the parts in which workbench stands beside plain code."""
    return {
        "generation": lambda: tasks.generation(subject, n_new=subject.sizes.n_new),
        "sweep": lambda: tasks.sweep(subject),
        "attribution": lambda: tasks.attribution(subject),
        "scoring": lambda: tasks.scoring(subject),
        "machine": lambda: {
            "products": speed_machine.products(subject),
            "bandwidth": speed_machine.bandwidth(subject.sizes.rounds),
            "decoding": speed_machine.decoding(subject),
        },
    }


def one_core(subject: Subject) -> dict[str, Any]:
    """Measure reading and answering again with one thread."""
    short = subject.spread(subject.sizes.n_short // 2)
    with tasks.on_threads(subject.model, 1):
        return {
            "extraction": tasks.extraction(subject, short, f"one core, {len(short)} prompts"),
            "generation": tasks.generation(subject, n_new=subject.sizes.core_new, whole=False),
        }


def note_failures(found: dict[str, Any], states: dict[str, str]) -> None:
    """Write into ``states`` why a peer did not finish a work."""
    for one in found.get("extraction", {"works": []})["works"]:
        for name, reason in one["failed"].items():
            states[name.split(" ")[0]] = f"FAILED in {one['title']}: {reason}"


def on_gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Measure reading, answering and a sweep on a GPU; seconds are those on the wall."""
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    found["models"] = {}
    for place, name in enumerate(options.models):
        folder = folder_of(name)
        if folder is not None:
            sizes = QUICK if options.quick else (FIRST, LARGER)[min(place, 1)]
            found["models"][label(name)] = on_device(name, folder, sizes, options, "cuda")
    return found


def on_device(
    name: str, folder: Path, sizes: Sizes, options: argparse.Namespace, device: str
) -> dict[str, Any]:
    """Measure reading, answering and a sweep of a model on one device."""
    subject = subject_of(name, folder, sizes, options, device)
    short = subject.spread(sizes.n_short)
    with torch.no_grad():
        return {
            "extraction": tasks.extraction(subject, short, f"{device}, {len(short)} prompts", ()),
            "generation": tasks.generation(subject, n_new=sizes.n_new),
            "sweep": tasks.sweep(subject),
        }


def demo() -> dict[str, Any]:
    """Run what ``make demo`` runs, from nothing, and read its own record of its stages.

    Returns:
        Seconds on the wall, and of each stage; or {"failed": the reason}.
    """
    if not (ROOT / ".venv" / ".ready").is_file():
        return {"failed": "there is no .venv of 'make setup' here"}
    say("make demo, from nothing")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        begin = time.perf_counter()
        command = ["make", "-C", str(ROOT), "demo", f"DEMO_OUT={out}"]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        wall = time.perf_counter() - begin
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if line.strip()]
            return {"failed": lines[-1][:200] if lines else f"exit status {run.returncode}"}
        stages = json.loads((out / "run.json").read_text(encoding="utf-8"))["durations"]
    return {"wall": wall, "stages": stages}


if __name__ == "__main__":
    main()
