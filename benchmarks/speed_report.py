"""Write the results of speed.py as a page and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

EXTRACTIONS = {
    "extraction": "Extraction: all layers, attn_out + resid_post + mlp_post, mean over the user's "
    "words",
    "long": "The same, texts of about 200 tokens",
}


def markdown(results: dict[str, Any]) -> str:
    """Write RESULTS.md from what speed.py measured, with a section for each task that was run."""
    lines = _about(results["about"])
    for name, title in EXTRACTIONS.items():
        if name in results:
            lines += _extraction(title, results[name])
    for name, section in (
        ("generation", _generation),
        ("sweep", _sweep),
        ("machine", _machine),
        ("growth", _growth),
    ):
        if name in results:
            lines += section(results[name])
    return "\n".join(lines)


def picture(results: dict[str, Any], path: Path) -> None:
    """Draw CPU time per prompt over the number of prompts."""
    import plotly.graph_objects as go

    rows = results["growth"]["by prompts"]
    figure = go.Figure(
        go.Scatter(
            x=[row["prompts"] for row in rows],
            y=[row["ms a prompt"] for row in rows],
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


def _about(about: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [
        "# Speed, measured",
        "",
        "Written by `python benchmarks/speed.py` (`make bench`); do not edit. "
        f"CPU seconds of all threads, medians of {about['rounds']} interleaved rounds in one run; "
        "ratios, not single times, are what to read.",
        "",
        f"{about['model']}, float32, {about['threads']} threads, {about['processor']}; "
        f"{about['prompts']}; {versions}. Packed linear layers: {about['packed']}.",
        "",
    ]


def _extraction(title: str, result: dict[str, Any]) -> list[str]:
    speeds, ratios = result["tokens/s"], result["times faster than raw"]
    return [
        f"## {title}",
        "",
        f"{result['tokens']} tokens; {result['shared prefix']}.",
        "",
        *_table(
            ["", "tokens a CPU second", "times raw Hugging Face hooks"],
            [[who, f"{speeds[who]:.0f}", f"{ratios[who]:.2f}"] for who in result["seconds"]],
        ),
        "",
        f"Largest relative difference to raw: {result['largest relative difference to raw']:.1e}.",
        "",
        *_note(result),
    ]


def _generation(result: dict[str, Any]) -> list[str]:
    ratios = result["times faster than Hugging Face generate"]
    return [
        "## Generation: 16 prompts x 48 tokens",
        "",
        *_table(
            ["", "CPU s", "times Hugging Face generate"],
            [
                [who, f"{seconds:.1f}", f"{ratios[who]:.2f}"]
                for who, seconds in result["seconds"].items()
            ],
        ),
        "",
        f"Steering costs {result['cost of steering, a token']:+.1%} a token. "
        f"Same tokens: {result['answers with the tokens of Hugging Face']}.",
        "",
    ]


def _sweep(result: dict[str, Any]) -> list[str]:
    return [
        "## Sweep: 12 conditions x 16 prompts x 32 tokens",
        "",
        *_table(
            ["", "CPU s"],
            [[who, f"{seconds:.1f}"] for who, seconds in result["seconds"].items()],
        ),
        "",
        f"{result['times faster']:.2f} times faster. "
        f"Same tokens: {result['answers with the tokens of Hugging Face']}.",
        "",
        *_note(result),
    ]


def _machine(result: dict[str, Any]) -> list[str]:
    products = [
        [f"product, {who}, GFLOP/s a CPU second", f"{value:.0f}"]
        for who, value in result["GFLOP/s a CPU second"].items()
    ]
    bandwidth = result["read bandwidth GB/s a CPU second"]
    share = result["share of the best product that extraction reaches"]
    return [
        "## The machine's own limits",
        "",
        *_table(
            ["", ""],
            [
                *products,
                ["reading memory, GB/s a CPU second", f"{bandwidth:.0f}"],
                ["share of the best product that extraction reaches", f"{share:.0%}"],
            ],
        ),
        "",
    ]


def _growth(result: dict[str, Any]) -> list[str]:
    return [
        "## Growth with the number of prompts and their length",
        "",
        "Streamed moments at all sites, each line in a process of its own. "
        "Tokens are those that have to be run, on average.",
        "",
        *_table(
            [
                "prompts",
                "tokens a prompt",
                "ms a prompt",
                "ms a token",
                "MiB over the loaded model",
            ],
            [
                [
                    row["prompts"],
                    f"{row['tokens']:.0f}",
                    f"{row['ms a prompt']:.1f}",
                    f"{row['ms a token']:.2f}",
                    f"{row['MiB over the model']:.0f}",
                ]
                for row in [*result["by prompts"], *result["by length"]]
            ],
        ),
        "",
        "![growth](results.png)",
        "",
    ]


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    head = "|" + "".join(f" {name} |" if name else " |" for name in names)
    return [
        head,
        "|" + "---|" * len(names),
        *("|" + "".join(f" {cell} |" for cell in row) for row in rows),
    ]


def _note(result: dict[str, Any]) -> list[str]:
    return [f"Measured {result['note']}.", ""] if "note" in result else []
