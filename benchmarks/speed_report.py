"""Write the page and the picture of one run of speed.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import speed_machine
from speed_measure import median, ratios, seconds_of
from speed_targets import (
    GENERATE,
    STEERED,
    UNSTEERED,
    cost,
    decoding_share,
    extraction_share,
    targets,
)
from speed_tasks import GATED
from speed_workers import KNOWN

PARTS = {
    "extraction": "Extraction, short prompts",
    "long": "Extraction, long texts",
    "generation": "Answers and the gate",
    "sweep": "Sweep",
    "attribution": "Attribution",
    "scoring": "Scoring",
}


def markdown(results: dict[str, Any]) -> str:
    """Write the whole page from what one run measured."""
    lines = [*_about(results), *_targets(results), *_differing(results)]
    lines += _peers(results["peers"])
    left_out = results["left out"]
    for name, found in results["models"].items():
        lines += [f"## {name}", ""]
        if "left out" in found:
            lines += [f"{name} is left out: {found['left out']}.", ""]
            continue
        lines += [_packed(found), ""]
        for part, title in PARTS.items():
            lines += [f"### {title}", ""]
            lines += _part(part, found[part]) if part in found else _missing(part, left_out)
        lines += ["### The machine's limits", ""]
        lines += _machine(found) if "machine" in found else _missing("machine", left_out)
        lines += ["### Peak memory", ""]
        lines += _memory(found["memory"]) if "memory" in found else _missing("memory", left_out)
    lines += ["## One core", "", *_one_core(results)]
    lines += ["## Growth with the number of prompts and their length", ""]
    lines += _growth(results["growth"]) if "growth" in results else _missing("growth", left_out)
    lines += ["## GPU", "", *_gpu(results, left_out)]
    lines += ["## make demo", "", *_demo(results)]
    return "\n".join(lines)


def picture(results: dict[str, Any], path: Path) -> None:
    """Draw CPU time per prompt over the number of prompts."""
    import plotly.graph_objects as go

    rows = [row for row in results["growth"]["by prompts"] if "failed" not in row]
    figure = go.Figure(
        go.Scatter(
            x=[row["prompts"] for row in rows],
            y=[1000 * row["cpu"] / row["prompts"] for row in rows],
            mode="lines+markers",
        )
    )
    figure.update_layout(
        xaxis={"title": "prompts", "type": "log"},
        yaxis={"title": "CPU ms a prompt", "rangemode": "tozero"},
        width=640,
        height=360,
        plot_bgcolor="white",
        margin={"t": 20},
    )
    figure.write_image(path, scale=1.5)


def _about(results: dict[str, Any]) -> list[str]:
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rounds = sorted({str(m["rounds"]) for m in results["models"].values() if "rounds" in m})
    warning = ["**A quick run: it shows that the script works, not how fast anything is.**", ""]
    return [
        "# Speed, measured",
        "",
        "Written whole by one run of `python benchmarks/speed.py` (`make bench`); do not edit. "
        "Contenders take turns within a round. Numbers are medians of rounds, in brackets the "
        "least and the most; seconds are CPU seconds of all threads, ratios those of medians. "
        "Ratios, not single times, are what to read. What a contender computes is compared before "
        'it is timed: "same work" says the outcome.',
        "",
        *(warning if about["quick"] else []),
        f"{about['processor']} with {about['features']['words']}; threads: {about['threads']}, "
        f"float32, rounds: {' and '.join(rounds) or 'none'}, prompts of {about['prompts']}; "
        f"{about['day']}, {about['minutes']:.0f} minutes in all; {versions}.",
        "",
    ]


def _targets(results: dict[str, Any]) -> list[str]:
    rows = []
    for one in targets(results):
        outcome = "not measured in this run"
        if one.values:
            outcome = "met" if one.met(one.values[0]) else "**not met**"
        rows.append([one.what, one.asked, _spread(one.values, one.said), outcome])
    return ["## Targets", "", *_table(["work", "target", "measured", ""], rows), ""]


def _differing(results: dict[str, Any]) -> list[str]:
    """Name the contenders whose work was not the same: their times mean nothing."""
    said = [
        f"- {name}: {one['title']}: {contender}: {check['words']}"
        for name, found in results["models"].items()
        for parts in (found, found.get("one core", {}))
        for part in PARTS
        for one in parts.get(part, {"works": []})["works"]
        for contender, check in one["checks"].items()
        if not check["same"]
    ]
    if not said:
        return ["Every contender that was measured did the same work.", ""]
    return ["**These did other work, so their times cannot be compared:**", "", *said, ""]


def _peers(states: dict[str, str]) -> list[str]:
    rows = []
    for name in sorted({*KNOWN, *states}):
        missing = "not in this run: `--peers` takes what `make bench-peers` makes"
        rows.append([name, states.get(name, missing)])
    return ["## Peers", "", *_table(["peer", "version, or why it is missing"], rows), ""]


def _packed(found: dict[str, Any]) -> str:
    packed = found["packed"]
    gain = packed["reason"]
    if packed["gain"] is not None:
        gain = f"measured gain of the product {packed['gain']:.2f}: {gain}"
    return (
        f"{found['model']}. Packed linear layers: {'yes' if packed['packed'] else 'no'} ({gain})."
    )


def _part(part: str, found: dict[str, Any]) -> list[str]:
    lines = []
    if "shared" in found:
        lines += [f"{found['shared']}.", ""]
    for one in found["works"]:
        title = one["title"]
        lines += [f"{title[0].upper()}{title[1:]}:", "", *_work(one), ""]
        if part == "generation":
            lines += [*_costs(one), ""]
    return lines


def _work(one: dict[str, Any]) -> list[str]:
    clock = "CPU s" if one["clock"] == "cpu" else "wall s"
    per = "tokens a CPU second" if one["clock"] == "cpu" else "tokens a second"
    names = ["", clock, "wall s", per, f"times {one['baseline']}", "same work"]
    rows = []
    for name in one["times"]:
        seconds = seconds_of(one, name)
        check = one["checks"][name]
        same = check["words"] if check["same"] else f"**NO**: {check['words']}"
        rows.append(
            [
                name,
                _spread([median(seconds), *seconds]),
                f"{median(seconds_of(one, name, 'wall')):.2f}",
                f"{one['amounts'][name] / median(seconds):.0f}",
                _spread(ratios(one, one["baseline"], name)),
                "what it is compared with" if name == one["baseline"] else same,
            ]
        )
    rows += [[name, "FAILED", "", "", "", reason] for name, reason in one["failed"].items()]
    return _table(names, rows)


def _costs(one: dict[str, Any]) -> list[str]:
    said = []
    if STEERED in one["times"]:
        percent = _spread(cost(one, STEERED, UNSTEERED), lambda value: f"{value:+.1%}")
        times = _spread(ratios(one, GENERATE, STEERED))
        said.append(f"Steering costs {percent} a token; steered, {times} x {GENERATE}.")
    if GATED in one["times"]:
        percent = _spread(cost(one, GATED, STEERED), lambda value: f"{value:+.1%}")
        said.append(f"A gate that is open costs {percent} a token over steering without one.")
    return [" ".join(said)]


def _machine(found: dict[str, Any]) -> list[str]:
    machine = found["machine"]
    products = machine["products"]
    rows = []
    for n, kinds in products["times"].items():
        for kind in kinds:
            wall, cpu = (
                _spread(speed_machine.rates(products, int(n), kind, clock), _gflops)
                for clock in ("wall", "cpu")
            )
            rows.append([f"product, {n} rows, {kind}", wall, cpu])
    read = machine["bandwidth"]
    rows.append(
        [
            "reading memory",
            _spread([median(read["wall"]), *read["wall"]], lambda value: f"{value:.1f} GB/s"),
            _spread([median(read["cpu"]), *read["cpu"]], lambda value: f"{value:.1f} GB/s"),
        ]
    )
    lines = [*_table(["", "a second on the wall", "a CPU second"], rows), ""]
    shares = [
        ("extraction, short prompts", extraction_share(found), "512 rows"),
        ("extraction, long texts", extraction_share(found, "long"), "512 rows"),
        ("decoding many rows, CPU time", decoding_share(found), "96 rows"),
        ("decoding many rows, wall time", decoding_share(found, "wall"), "96 rows"),
    ]
    rows = [
        [what, _spread(values, lambda value: f"{value:.0%}"), f"best exact product, {of}"]
        for what, values, of in shares
        if values
    ]
    return [*lines, *_table(["share reached", "", "of"], rows), ""] if rows else lines


def _gflops(value: float) -> str:
    return f"{value / 1e9:.0f} GFLOP/s"


def _memory(found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [f"FAILED: {found['failed']}.", ""]
    share = found["loading"] / found["weights"]
    rows = [
        ["weights", f"{found['weights']:.0f}"],
        ["at most while loading, over what Python and its libraries take",
         f"{found['loading']:.0f} ({share:.2f} x the weights)"],
        ["held by the loaded model", f"{found['loaded']:.0f}"],
        *([f"{what}, at most over the loaded model", f"{mib:.0f}"]
          for what, mib in found["works"].items()),
    ]  # fmt: skip
    return ["In a process of its own.", "", *_table(["", "MiB"], rows), ""]


def _one_core(results: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in results["models"].items():
        if "one core" in found:
            for part, one in found["one core"].items():
                lines += [f"### {name}: {PARTS[part]}", "", *_part(part, one)]
    return lines or _missing("one-core", results["left out"])


def _growth(found: dict[str, Any]) -> list[str]:
    rows = []
    for row in [*found["by prompts"], *found["by length"]]:
        if "failed" in row:
            rows.append([f"FAILED: {row['failed']}", "", "", "", "", ""])
            continue
        n = row["prompts"]
        numbers = [1000 * row["cpu"] / n, 1000 * row["cpu"] / (n * row["computed"])]
        rows.append(
            [
                n,
                f"{row['tokens']:.0f}",
                f"{row['computed']:.0f}",
                f"{numbers[0]:.1f}",
                f"{numbers[1]:.2f}",
                f"{row['MiB']:.0f}",
            ]
        )
    names = ["prompts", "tokens a prompt", "of these run", "CPU ms a prompt",
             "CPU ms a token that is run", "MiB over the loaded model"]  # fmt: skip
    return [
        "Streamed moments at all sites of the first model, each size once and in a process of its "
        "own.",
        "",
        *_table(names, rows),
        "",
        "![CPU time a prompt](results.png)",
        "",
    ]


def _gpu(results: dict[str, Any], left_out: dict[str, str]) -> list[str]:
    if "gpu" not in results:
        return _missing("gpu", left_out)
    found = results["gpu"]
    if found is None:
        return ["There is no GPU in this run.", ""]
    lines = [f"{found['device']}, float32; seconds are those on the wall.", ""]
    for name, parts in found["models"].items():
        for part, one in parts.items():
            lines += [f"### {name}: {PARTS[part]}, GPU", "", *_part(part, one)]
    return lines


def _demo(results: dict[str, Any]) -> list[str]:
    if "demo" not in results:
        return ["Left out (`--demo` runs it).", ""]
    found = results["demo"]
    if "failed" in found:
        return [f"FAILED: {found['failed']}.", ""]
    rows = [[stage, f"{seconds:.1f}"] for stage, seconds in found["stages"].items()]
    rows.append(["in all", f"{found['wall']:.1f}"])
    return ["From nothing, after installation.", "", *_table(["stage", "wall s"], rows), ""]


def _missing(part: str, left_out: dict[str, str]) -> list[str]:
    return [f"Left out ({left_out.get(part, 'no model to measure')}).", ""]


def _spread(values: Sequence[float], said: Any = lambda value: f"{value:.2f}") -> str:
    """Write a median, and the least and the most of the rounds behind it."""
    if not values:
        return ""
    middle, *rounds = values
    if len(rounds) < 2:
        return said(middle)
    return f"{said(middle)} [{said(min(rounds))}, {said(max(rounds))}]"


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    head = "|" + "".join(f" {name} |" if name else " |" for name in names)
    return [
        head,
        "|" + "---|" * len(names),
        *("|" + "".join(f" {cell} |" for cell in row) for row in rows),
    ]
