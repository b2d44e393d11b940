"""Measure how fast the workbench is beside its peers on the same work.

    python benchmarks/speed.py                                       # the project's own prompts
    python benchmarks/speed.py --prompts safebench:FILE --threads 1  # a public set, one core
    python benchmarks/speed.py --peer nnsight=ENV/bin/python --peer repeng=ENV2/bin/python

It writes benchmarks/RESULTS.md, results.json and, for the growth curve, results.png. Every task
runs each contender once per round, one after the other, and reports the median over rounds of CPU
time (all threads) and the ratio of medians to raw Hugging Face hooks or generate; it also measures
how much of the machine is used. Peers that need other versions run as workers in environments of
their own (``pip install nnsight``, ``"steering-vectors transformers<5"``, ``repeng``) and are timed
there, in turn with the others.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speed_peers import Rows, batches_of, raw_extraction, raw_generation
from speed_report import markdown, picture

import workbench as wb
from workbench.files.store import write_json, write_text
from workbench.models.activations import class_moments
from workbench.models.forward import plain, shared_prefix_length, without_shared_prefix
from workbench.models.packaged import EMBEDDED, packaged_folder
from workbench.models.packing import is_packed, pack_linears
from workbench.models.tokens import encode

KINDS = ("attn_out", "resid_post", "mlp_post")
STEERED_LAYER, RHO = 15, 0.1
Contender = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", help="a data set (default: the project's own prompts)")
    parser.add_argument("--n", type=int, default=200, help="prompts of the extraction")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        help="NAME=python of its environment; may be repeated",
    )
    parser.add_argument(
        "--only", nargs="+", help="tasks: extraction, long, generation, sweep, machine, growth"
    )
    parser.add_argument(
        "--largest", type=int, default=5000, help="most prompts of the growth curve"
    )
    parser.add_argument("--alone", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="benchmarks", help="folder of RESULTS.md and results.png")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.alone:
        alone(*options.alone)
        return
    model = wb.load_model("embedded", device="cpu")
    wanted = options.only or ["extraction", "long", "generation", "sweep", "machine", "growth"]
    prompts = spread(wb.prompts_from(options.prompts), options.n)
    results: dict[str, Any] = {"about": about(model, prompts, options)}
    tasks: dict[str, Callable[[], Any]] = {
        "extraction": lambda: extraction(model, prompts, options, peers=options.peer),
        "long": lambda: extraction(model, long_prompts(40), options),
        "generation": lambda: generation(model, prompts[:16], options.rounds),
        "sweep": lambda: sweep(model, prompts[:16], options.rounds),
        "machine": lambda: machine(model, prompts),
        "growth": lambda: growth(options.largest, options.threads),
    }
    with torch.no_grad():
        for name in wanted:
            print(f"-- {name}", file=sys.stderr, flush=True)
            results[name] = tasks[name]()
            print(json.dumps(results[name], indent=1), file=sys.stderr, flush=True)
    out = Path(options.out)
    write_json(out / "results.json", results)
    write_text(out / "RESULTS.md", markdown(results))
    if "growth" in results:
        picture(results, out / "results.png")
    print(out / "RESULTS.md")


def about(model: Any, prompts: Sequence[wb.Prompt], options: argparse.Namespace) -> dict[str, Any]:
    """Say on what the numbers were measured."""
    packing = pack_linears(model.original_model, "auto")
    source = (options.prompts or "data/prompts.jsonl").partition(":")[0]
    return {
        "model": wb.model_info(model).name,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "prompts": f"{len(prompts)} of {source}",
        "rounds": options.rounds,
        "packed": f"{'yes' if packing.packed else 'no'} "
        f"(measured gain of the product {packing.gain:.2f}: {packing.reason})",
        "versions": {
            n: importlib.metadata.version(n)
            for n in ("workbench", "torch", "transformers", "transformer-lens")
        },
    }


def processor() -> str:
    """Name the processor, as Linux lists it or as Python knows it."""
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return platform.processor()
    names = [
        line.partition(":")[2].strip()
        for line in listing.read_text().splitlines()
        if "model name" in line
    ]
    return names[0] if names else ""


def spread(prompts: Sequence[wb.Prompt], n: int) -> list[wb.Prompt]:
    """Take n prompts from all over a set, in its order."""
    return [prompts[i * len(prompts) // n] for i in range(min(n, len(prompts)))]


def long_prompts(n: int) -> list[wb.Prompt]:
    """Make texts of about 200 tokens that share no beginning but the template."""
    words = [w for p in wb.load_prompts() for w in p.text.split()]
    return [
        wb.Prompt(
            f"long-{i}",
            " ".join(words[(i * 977 + k * 31) % len(words)] for k in range(150)),
            None,
            "harmless",
            "neutral",
            "speed",
        )
        for i in range(n)
    ]


def measured(contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Measure the median CPU seconds of each, interleaved; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            gc.collect()
            start = time.process_time()
            result = run()
            spent = result if isinstance(result, float) else time.process_time() - start
            if turn:
                seconds[name].append(spent)
    return {name: statistics.median(spent) for name, spent in seconds.items()}


def extraction(
    model: Any,
    prompts: Sequence[wb.Prompt],
    options: argparse.Namespace,
    *,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure reading activations at every layer, beside raw hooks and the peers."""
    encoded = encode(model, prompts)
    n_tokens = sum(len(row.ids) for row in encoded)
    sites = [site for kind in KINDS for site in wb.sites_of_kind(model, kind)]
    rows = [(list(row.ids), list(row.span("content"))) for row in encoded]
    hf = raw_model()
    contenders = extraction_contenders(model, hf, prompts, sites, rows)
    workers = []
    for peer in peers:
        name, _, python = peer.partition("=")
        workers.append(Worker(name, python, rows))
    contenders |= {worker.name: worker.run for worker in workers}
    error = max_error(
        raw_extraction(hf, rows[:8]), wb.cache_activations(model, prompts[:8], sites), sites
    )
    times = measured(contenders, options.rounds)
    for worker in workers:
        worker.stop()
    return {
        "tokens": n_tokens,
        "shared prefix": shared(encoded),
        "seconds": times,
        "tokens/s": {name: n_tokens / seconds for name, seconds in times.items()},
        "times faster than raw": {
            name: times["raw Hugging Face hooks"] / seconds for name, seconds in times.items()
        },
        "largest relative difference to raw": error,
    }


def extraction_contenders(
    model: Any,
    hf: Any,
    prompts: Sequence[wb.Prompt],
    sites: Sequence[wb.Site],
    rows: Rows,
) -> dict[str, Contender]:
    """Name the ways to read the same activations, as functions to call."""

    def transformer_lens() -> Any:
        names = {site.hook_name for site in sites}
        means = {}
        for tokens, mask, spans, places in batches_of(rows, 32):
            _, cache = model.run_with_cache(
                tokens, attention_mask=mask, names_filter=lambda name: name in names
            )
            for name in names:
                for row, (place, (a, b)) in enumerate(zip(places, spans, strict=True)):
                    means[name, place] = cache[name][row, a:b].mean(dim=0)
        return means

    def fast() -> Any:
        return wb.cache_activations(model, prompts, sites)

    def slow() -> Any:
        with plain(model):
            return wb.cache_activations(model, prompts, sites)

    def without_prefix() -> Any:
        with without_shared_prefix():
            return wb.cache_activations(model, prompts, sites)

    return {
        "raw Hugging Face hooks": lambda: raw_extraction(hf, rows),
        "workbench": fast,
        "workbench, no shared prefix": without_prefix,
        "workbench, plain routes": slow,
        "TransformerLens run_with_cache": lambda: plainly(model, transformer_lens),
    }


def plainly(model: Any, run: Contender) -> Any:
    with plain(model):
        return run()


def raw_model() -> Any:
    """Load the same weights as transformers does by default."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(packaged_folder(EMBEDDED), dtype=torch.float32)
    return loaded.eval().requires_grad_(False)


def shared(encoded: Sequence[Any]) -> str:
    """Say in words which tokens of the prompts need not be run at all."""
    n_computed = computed_tokens(encoded)
    mean, n_prefix = sum(len(row.ids) for row in encoded) / len(encoded), prefix_of(encoded)
    behind = sum(len(row.ids) - row.content[1] for row in encoded) / len(encoded)
    return (
        f"of {mean:.0f} tokens on average {n_prefix} are the shared template prefix and "
        f"{behind:.0f} come behind what is read: "
        f"leaving both out is a gain of {mean * len(encoded) / n_computed:.2f} by itself"
    )


def prefix_of(encoded: Sequence[Any]) -> int:
    """Count the tokens that all prompts begin with."""
    return shared_prefix_length(encoded, keep=lambda row: row.content[0])


def computed_tokens(encoded: Sequence[Any]) -> int:
    """Count the tokens to be run: the shared prefix once, then each row up to what is read."""
    n_prefix = prefix_of(encoded)
    return n_prefix + sum(row.content[1] - n_prefix for row in encoded)


def max_error(raw: dict[Any, torch.Tensor], activations: Any, sites: Sequence[wb.Site]) -> float:
    """Find the largest relative difference to what raw hooks read."""
    worst = 0.0
    for site in sites:
        values = activations[site].values
        for place in range(len(values)):
            expected = raw[site.kind, site.layer, place]
            worst = max(worst, float((values[place] - expected).norm() / expected.norm()))
    return worst


def generation(model: Any, prompts: Sequence[wb.Prompt], rounds: int) -> dict[str, Any]:
    """Measure answering prompts, steered and unsteered, beside Hugging Face's generate."""
    hf = raw_model()
    ids = [list(row.ids) for row in encode(model, prompts)]
    steering = some_steering(model)

    def answer(interventions: Any) -> Any:
        return wb.generate(model, prompts, interventions, decoding=wb.Decoding(max_new_tokens=48))

    expected = raw_generation(hf, ids, 48, model.tokenizer)
    answered = [list(c.tokens) for c in answer(())]
    times = measured(
        {
            "Hugging Face generate": lambda: raw_generation(hf, ids, 48, model.tokenizer),
            "workbench, unsteered": lambda: answer(()),
            "workbench, steered": lambda: answer(steering),
            "workbench, plain routes": lambda: plainly(model, lambda: answer(())),
        },
        rounds,
    )
    n_tokens = sum(len(tokens) for tokens in answered)
    steered_tokens = sum(len(c.tokens) for c in answer(steering))
    return {
        "seconds": times,
        "tokens": {"unsteered": n_tokens, "steered": steered_tokens},
        "times faster than Hugging Face generate": {
            k: times["Hugging Face generate"] / v for k, v in times.items()
        },
        "cost of steering, a token": (times["workbench, steered"] / steered_tokens)
        / (times["workbench, unsteered"] / n_tokens)
        - 1,
        "answers with the tokens of Hugging Face": n_equal(answered, expected),
    }


def n_equal(answered: Sequence[list[int]], expected: Sequence[list[int]]) -> str:
    """Count the answers with the expected tokens, in words."""
    n = sum(ours == theirs for ours, theirs in zip(answered, expected, strict=True))
    return f"{n} of {len(answered)}"


def some_steering(model: Any, seed: int = 0) -> list[Any]:
    """Steer along a random direction: what is added does not change what adding costs."""
    site = wb.Site(STEERED_LAYER, "resid_post")
    acts = wb.cache_activations(
        model, wb.select_prompts(wb.load_prompts(), label=["unsafe", "neutral"], limit=4), site
    )
    vector = next(iter(wb.fit_steering_vectors(acts[site]).values()))
    return [wb.add_vector(wb.random_vector(vector, seed=seed), rho=RHO)]


def sweep(
    model: Any, prompts: Sequence[wb.Prompt], rounds: int, n_conditions: int = 12, n_new: int = 32
) -> dict[str, Any]:
    """Measure answering prompts under many conditions at once, beside one after the other."""
    hf = raw_model()
    ids = [list(row.ids) for row in encode(model, prompts)]
    conditions = {f"c{k}": some_steering(model, k) for k in range(n_conditions)}

    def at_once() -> Any:
        return wb.sweep(
            model,
            prompts,
            conditions,
            decoding=wb.Decoding(max_new_tokens=n_new, batch_size=len(prompts) * n_conditions),
        )

    def one_by_one() -> Any:
        answers = []
        for steering in conditions.values():
            edit = steering[0].edit
            push = edit.multiplier * edit.vector
            handle = hf.model.layers[STEERED_LAYER].register_forward_hook(
                lambda _m, _a, out, push=push: (
                    (out[0] + push, *out[1:]) if isinstance(out, tuple) else out + push
                )
            )
            answers += raw_generation(hf, ids, n_new, model.tokenizer)
            handle.remove()
        return answers

    answered, expected = [list(c.tokens) for c in at_once()], one_by_one()
    times = measured(
        {"12 Hugging Face generations": one_by_one, "workbench, one sweep": at_once}, rounds
    )
    return {
        "seconds": times,
        "times faster": times["12 Hugging Face generations"] / times["workbench, one sweep"],
        "answers with the tokens of Hugging Face": n_equal(answered, expected),
    }


def machine(model: Any, prompts: Sequence[wb.Prompt]) -> dict[str, Any]:
    """Measure the machine's limits for this model's products, and how near extraction comes."""
    weights = [
        m.weight for m in model.original_model.model.layers.modules() if type(m) is torch.nn.Linear
    ]
    flop = 2 * sum(w.numel() for w in weights)
    x = {w.shape[1]: torch.randn(512, w.shape[1]) for w in weights}
    packed = (
        [torch.ops.mkldnn._reorder_linear_weight(w.detach(), 512) for w in weights]
        if is_packed(model)
        else []
    )

    def plain_product() -> None:
        for w in weights:
            torch.nn.functional.linear(x[w.shape[1]], w)

    def packed_product() -> None:
        for w, p in zip(weights, packed, strict=True):
            torch.ops.mkldnn._linear_pointwise(x[w.shape[1]], p, None, "none", [], "")

    contenders: dict[str, Contender] = {"plain": plain_product} | (
        {"packed": packed_product} if packed else {}
    )
    times = measured(contenders, 5)
    big = torch.randn(64_000_000)
    bandwidth = measured({"read": lambda: big.sum()}, 5)["read"]
    rows = encode(model, prompts)
    sites = [site for kind in KINDS for site in wb.sites_of_kind(model, kind)]
    spent = measured({"extraction": lambda: wb.cache_activations(model, prompts, sites)}, 3)[
        "extraction"
    ]
    computed = computed_tokens(rows)
    best = min(times.values())
    return {
        "GFLOP/s a CPU second": {
            name: 512 * flop / seconds / 1e9 for name, seconds in times.items()
        },
        "read bandwidth GB/s a CPU second": 4 * len(big) / bandwidth / 1e9,
        "share of the best product that extraction reaches": computed
        * flop
        / spent
        / (512 * flop / best),
    }


def growth(largest: int, threads: int | None) -> dict[str, Any]:
    """Measure streamed moments at all sites by number of prompts and by their length.

    Each size is measured in a process of its own.
    """

    def measured_alone(n: int, n_words: int) -> dict[str, float]:
        command = [sys.executable, __file__, "--alone", str(n), str(n_words)]
        command += ["--threads", str(threads)] if threads else []
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(run.stdout.strip().splitlines()[-1])

    sizes = [n for n in (50, 200, 800, 2000, 5000) if n <= largest]
    return {
        "by prompts": [measured_alone(n, 0) for n in sizes],
        "by length": [measured_alone(50, n_words) for n_words in (30, 90, 270)],
    }


def alone(n: int, n_words: int) -> None:
    """Print what ``growth`` needs of one size.

    Prompts get a number each and are made longer by words about nothing.
    """
    model = wb.load_model("embedded", device="cpu")
    base = wb.select_prompts(wb.load_prompts(), label="unsafe")
    sites = [site for kind in KINDS for site in wb.sites_of_kind(model, kind)]
    filler = " ".join(["and", "so", "on"] * n_words)[: 4 * n_words]
    prompts = [
        replace(
            base[i % len(base)],
            id=f"p{i}",
            text=f"{base[i % len(base)].text} ({i}) {filler}".strip(),
        )
        for i in range(n)
    ]
    class_moments(model, prompts[:8], sites)
    gc.collect()
    before = resident()
    with Peak() as peak:
        start = time.process_time()
        class_moments(model, prompts, sites)
        spent = time.process_time() - start
    n_tokens = computed_tokens(encode(model, prompts))
    result = {
        "prompts": n,
        "tokens": n_tokens / n,
        "ms a prompt": 1000 * spent / n,
        "ms a token": 1000 * spent / n_tokens,
    }
    print(json.dumps(result | {"MiB over the model": peak.mib - before}))


def resident() -> float:
    """Read the resident memory in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


class Peak:
    """Record the largest resident memory inside a block, looked at every 20 ms."""

    def __enter__(self) -> Peak:
        import threading

        self.mib, self._on = resident(), True

        def watch() -> None:
            while self._on:
                self.mib = max(self.mib, resident())
                time.sleep(0.02)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


class Worker:
    """Run a peer in an environment of its own; told to run, it answers with its CPU seconds."""

    def __init__(self, name: str, python: str, rows: Rows) -> None:
        self.name = name
        given = {
            "model": str(packaged_folder(EMBEDDED)),
            "rows": rows,
            "threads": torch.get_num_threads(),
        }
        script = Path(__file__).with_name("speed_peers.py")
        self._process = subprocess.Popen(
            [python, str(script), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say(json.dumps(given))
        ready = self._hear()
        if not ready.startswith("ready"):
            raise SystemExit(f"peer {name!r} did not start: {ready}")
        self.name = f"{name} {ready.removeprefix('ready ')}"

    def run(self) -> float:
        """Run once and return the CPU seconds."""
        self._say("go")
        return float(self._hear())

    def stop(self) -> None:
        """End the process."""
        self._say("stop")
        self._process.wait(timeout=60)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@ "):
                return line[2:].strip()
        return "it ended without an answer"


if __name__ == "__main__":
    main()
