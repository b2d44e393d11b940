"""Measure the server's throughput beside that of ``wb.generate``, in one run.

    python benchmarks/serving.py --run runs/demo                   # ten minutes on two cores
    python benchmarks/serving.py --run runs/demo --requests 64 --rows 16 --tokens 40

The same questions are answered with the same vectors: offline, where all of them are known before
and are sorted into batches (``sweep``, one condition for each vector); by the server, where each
is a request of its own, all sent at once; and by the server one request at a time. All three take
turns, so that what else the machine does falls on each of them. Tokens per second count written
tokens; every answer of the server is compared with the one of ``sweep``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import socket
import statistics
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import workbench as wb
from workbench.safesteer.config import config_from
from workbench.safesteer.inputs import load_run_model
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import decoding_from
from workbench.serve import Catalogue, Choice, Limits, app_of, run_server

if TYPE_CHECKING:
    from collections.abc import Sequence

    import openai

SINGLE = 4
"""Requests that are sent one at a time, for each of the others' rounds."""


def main() -> None:
    options = _options()
    model = load_run_model(config_from(read_run(options.run).notes["config"]))
    catalogue = Catalogue.read(options.run)
    ways = _ways(catalogue, options.vectors)
    prompts = wb.select_prompts(wb.load_prompts(), label="neutral")[: options.requests]
    texts = [prompt.text for prompt in prompts]
    decoding = replace(
        decoding_from(options.run), max_new_tokens=options.tokens, batch_size=options.rows
    )
    limits = Limits(max_tokens=options.tokens, max_in_flight=len(texts) + 1)
    app, name = app_of(options.run, key=None, limits=limits, rows=options.rows, model=model)
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    threading.Thread(
        target=run_server, args=(app, listening), kwargs={"grace_s": 5}, daemon=True
    ).start()
    speeds: dict[str, list[float]] = {"offline": [], "served": [], "one at a time": []}
    differing = 0
    for n in range(options.rounds + 1):  # the first round warms up
        offline, answers = _timed(lambda: _offline(model, texts, ways, catalogue, decoding))
        served, said = _timed(lambda: asyncio.run(_served(url, name, texts, ways, options.tokens)))
        single, _ = _timed(
            lambda: [
                asyncio.run(_served(url, name, [text], [ways[i % len(ways)]], options.tokens))
                for i, text in enumerate(texts[:SINGLE])
            ]
        )
        n_tokens = [len(answer.tokens) for answer in answers]
        if n:
            speeds["offline"].append(sum(n_tokens) / offline)
            speeds["served"].append(sum(n_tokens) / served)
            speeds["one at a time"].append(sum(n_tokens[:SINGLE]) / single)
        differing = sum(a.text != b for a, b in zip(answers, said, strict=True))
    _print(options, speeds, differing, len(texts), len(ways))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--vectors", type=int, default=8, help="different vectors")
    parser.add_argument("--rows", type=int, default=32, help="answers written at a time")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def _ways(catalogue: Catalogue, n: int) -> list[dict[str, Any]]:
    """Choose vectors of the residual stream, and the unsteered model as the last."""
    files = [name for name in catalogue.names if ".resid_post." in name]
    return [{"vector": name, "rho": 0.1} for name in files[: n - 1]] + [{"rho": 0.0}]


def _offline(
    model: Any,
    texts: Sequence[str],
    ways: Sequence[dict[str, Any]],
    catalogue: Catalogue,
    decoding: wb.Decoding,
) -> list[wb.Completion]:
    """Answer all questions in one sweep, each under its own vector alone."""
    prompts = [wb.Prompt(f"q{i}", text) for i, text in enumerate(texts)]
    made = [list(catalogue.interventions(Choice(**way))) for way in ways]
    steering = {prompt.id: made[i % len(ways)] for i, prompt in enumerate(prompts)}
    return wb.generate(model, prompts, steering, decoding, condition="served")


async def _served(
    url: str, name: str, texts: Sequence[str], ways: Sequence[dict[str, Any]], n_tokens: int
) -> list[str]:
    """Send all questions at once, and wait for the answers."""
    import httpx
    import openai

    limits = httpx.Limits(max_connections=len(texts))
    async with (
        httpx.AsyncClient(limits=limits, timeout=None) as http,
        openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client,
    ):
        jobs = [
            _ask(client, name, text, ways[i % len(ways)], n_tokens) for i, text in enumerate(texts)
        ]
        return await asyncio.gather(*jobs)


async def _ask(
    client: openai.AsyncOpenAI, name: str, text: str, way: dict[str, Any], n_tokens: int
) -> str:
    said = await client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": text}],
        max_tokens=n_tokens,
        temperature=0,
        extra_body={"steering": way},
    )
    return said.choices[0].message.content or ""


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def _print(
    options: argparse.Namespace,
    speeds: dict[str, list[float]],
    differing: int,
    n: int,
    n_ways: int,
) -> None:
    print(
        f"{options.run}: {n} requests with {n_ways} vectors, {options.tokens} tokens at most, "
        f"{options.rows} rows, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{options.rounds} rounds in turn"
    )
    base = statistics.median(speeds["offline"])
    for name, values in speeds.items():
        middle = statistics.median(values)
        print(
            f"{name:>14}: {middle:7.1f} tokens/s "
            f"[{min(values):.1f}, {max(values):.1f}], {middle / base:.2f} of offline"
        )
    print(f"answers that differ from offline ones: {differing} of {n}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
