"""How fast the workbench is beside its peers on the same work, and how much of the machine it uses. Ratios, measured side by side in one run.

    python benchmarks/speed.py                                            # own prompts; writes benchmarks/RESULTS.md and results.png
    python benchmarks/speed.py --prompts safebench:FILE --threads 1       # a public set, one core
    python benchmarks/speed.py --peer nnsight=ENV/bin/python --peer steering-vectors=ENV2/bin/python --peer repeng=ENV3/bin/python

Every task runs each contender once a round, one after the other, and reports the median over rounds of CPU time (all threads) and the ratio of
medians to raw Hugging Face hooks or generate. Peers that need other versions run as workers in environments of their own
(``pip install nnsight``, ``"steering-vectors transformers<5"``, ``repeng``) and are timed there, in turn with the others.
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
from speed_peers import batches_of, raw_extraction, raw_generation

import workbench as wb
from workbench.files.store import write_json, write_text
from workbench.models.forward import without_shared_prefix
from workbench.models.packing import is_packed, pack_linears
from workbench.models.tokens import encode

KINDS = ("attn_out", "resid_post", "mlp_post")
STEERED_LAYER, RHO = 15, 0.1
Contender = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", help="a data set (default: the project's own)")
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
        "--largest", type=int, default=5000, help="prompts of the growth curve, at most"
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
    found: dict[str, Any] = {"about": about(model, prompts, options)}
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
            found[name] = tasks[name]()
            print(json.dumps(found[name], indent=1), file=sys.stderr, flush=True)
    out = Path(options.out)
    write_json(out / "results.json", found)
    write_text(out / "RESULTS.md", markdown(found))
    if "growth" in found:
        picture(found, out / "results.png")
    print(out / "RESULTS.md")


def about(model: Any, prompts: Sequence[wb.Prompt], options: argparse.Namespace) -> dict[str, Any]:
    gain = pack_linears(model.original_model, "auto")
    cpu = (
        next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            "",
        )
        if Path("/proc/cpuinfo").is_file()
        else platform.processor()
    )
    return {
        "model": wb.model_info(model).name,
        "threads": torch.get_num_threads(),
        "processor": cpu,
        "prompts": f"{len(prompts)} of {(options.prompts or 'data/prompts.jsonl').partition(':')[0]}",
        "rounds": options.rounds,
        "packed": f"{'yes' if gain.packed else 'no'} (measured gain of the product {gain.gain:.2f}: {gain.reason})",
        "versions": {
            n: importlib.metadata.version(n)
            for n in ("workbench", "torch", "transformers", "transformer-lens")
        },
    }


def spread(prompts: Sequence[wb.Prompt], n: int) -> list[wb.Prompt]:
    """N prompts from all over a set, in its order."""
    return [prompts[i * len(prompts) // n] for i in range(min(n, len(prompts)))]


def long_prompts(n: int) -> list[wb.Prompt]:
    """Texts of about 200 tokens without anything in common at their beginning but the template."""
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
    """Median CPU seconds of each, interleaved; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            gc.collect()
            start = time.process_time()
            result = run()
            spent = result if isinstance(result, float) else time.process_time() - start
            if turn:
                seconds[name].append(spent)
    return {name: statistics.median(own) for name, own in seconds.items()}


def extraction(
    model: Any,
    prompts: Sequence[wb.Prompt],
    options: argparse.Namespace,
    *,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    encoded = encode(model, prompts)
    n_tokens = sum(len(row.ids) for row in encoded)
    sites = [site for kind in KINDS for site in wb.sites_of_kind(model, kind)]
    rows = [(list(row.ids), list(row.span("content"))) for row in encoded]

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
        with wb.plain(model):
            return wb.cache_activations(model, prompts, sites)

    def without_prefix() -> Any:
        with without_shared_prefix():
            return wb.cache_activations(model, prompts, sites)

    unpacked_hf = raw_model()
    contenders: dict[str, Contender] = {
        "raw Hugging Face hooks": lambda: raw_extraction(unpacked_hf, rows),
        "workbench": fast,
        "workbench, no shared prefix": without_prefix,
        "workbench, plain routes": slow,
        "TransformerLens run_with_cache": lambda: plainly(model, transformer_lens),
    }
    workers = [Worker(*peer.split("=", 1), rows) for peer in peers]
    contenders |= {worker.name: worker.run for worker in workers}
    error = max_error(
        raw_extraction(unpacked_hf, rows[:8]),
        wb.cache_activations(model, prompts[:8], sites),
        sites,
    )
    times = measured(contenders, options.rounds)
    for worker in workers:
        worker.stop()
    return {
        "tokens": n_tokens,
        "shared prefix": shared(encoded),
        "seconds": times,
        "tokens/s": {name: n_tokens / own for name, own in times.items()},
        "times faster than raw": {
            name: times["raw Hugging Face hooks"] / own for name, own in times.items()
        },
        "largest relative difference to raw": error,
    }


def plainly(model: Any, run: Contender) -> Any:
    with wb.plain(model):
        return run()


def raw_model() -> Any:
    """The same weights as transformers loads them by default."""
    from transformers import AutoModelForCausalLM

    from workbench.models.load import _converted_folder, _embedded_file

    loaded = AutoModelForCausalLM.from_pretrained(
        _converted_folder(_embedded_file()), dtype=torch.float32
    )
    return loaded.eval().requires_grad_(False)


def shared(encoded: Sequence[Any]) -> str:
    """What of the prompts need not be run at all, in words."""
    left = computed_tokens(encoded)
    mean, n = sum(len(row.ids) for row in encoded) / len(encoded), prefix_of(encoded)
    behind = sum(len(row.ids) - row.content[1] for row in encoded) / len(encoded)
    return (
        f"of {mean:.0f} tokens on average {n} are the shared template prefix and {behind:.0f} come behind what is read: "
        f"leaving both out is a gain of {mean * len(encoded) / left:.2f} by itself"
    )


def prefix_of(encoded: Sequence[Any]) -> int:
    from workbench.models.forward import shared_prefix_length

    return shared_prefix_length(encoded, keep=lambda row: row.content[0])


def computed_tokens(encoded: Sequence[Any]) -> int:
    """Tokens that have to be run: the shared prefix once, the rest of each row up to the end of what is read."""
    n = prefix_of(encoded)
    return n + sum(row.content[1] - n for row in encoded)


def max_error(raw: dict[Any, torch.Tensor], own: Any, sites: Sequence[wb.Site]) -> float:
    worst = 0.0
    for site in sites:
        values = own[site].values
        for place in range(len(values)):
            expected = raw[site.kind, site.layer, place]
            worst = max(worst, float((values[place] - expected).norm() / expected.norm()))
    return worst


def generation(model: Any, prompts: Sequence[wb.Prompt], rounds: int) -> dict[str, Any]:
    hf = raw_model()
    ids = [list(row.ids) for row in encode(model, prompts)]
    steering = some_steering(model)

    def own(interventions: Any) -> Any:
        return wb.generate(model, prompts, interventions, decoding=wb.Decoding(max_new_tokens=48))

    expected = raw_generation(hf, ids, 48, model.tokenizer)
    said = [list(c.tokens) for c in own(())]
    times = measured(
        {
            "Hugging Face generate": lambda: raw_generation(hf, ids, 48, model.tokenizer),
            "workbench, unsteered": lambda: own(()),
            "workbench, steered": lambda: own(steering),
            "workbench, plain routes": lambda: plainly(model, lambda: own(())),
        },
        rounds,
    )
    n_tokens = sum(len(t) for t in said)
    steered_tokens = sum(len(c.tokens) for c in own(steering))
    return {
        "seconds": times,
        "tokens": {"unsteered": n_tokens, "steered": steered_tokens},
        "times faster than Hugging Face generate": {
            k: times["Hugging Face generate"] / v for k, v in times.items()
        },
        "cost of steering, a token": (times["workbench, steered"] / steered_tokens)
        / (times["workbench, unsteered"] / n_tokens)
        - 1,
        "answers with the tokens of Hugging Face": f"{sum(a == b for a, b in zip(said, expected, strict=True))} of {len(said)}",
    }


def some_steering(model: Any, seed: int = 0) -> list[Any]:
    """A random direction: what is added does not change what it costs to add it."""
    site = wb.Site(STEERED_LAYER, "resid_post")
    acts = wb.cache_activations(
        model, wb.select_prompts(wb.load_prompts(), label=["unsafe", "neutral"], limit=4), site
    )
    vector = next(iter(wb.fit_steering_vectors(acts[site]).values()))
    return [wb.add_vector(wb.random_vector(vector, seed=seed), rho=RHO)]


def sweep(
    model: Any, prompts: Sequence[wb.Prompt], rounds: int, n_conditions: int = 12, n_new: int = 32
) -> dict[str, Any]:
    hf = raw_model()
    ids = [list(row.ids) for row in encode(model, prompts)]
    conditions = {f"c{k}": some_steering(model, k) for k in range(n_conditions)}

    def own() -> Any:
        return wb.sweep(
            model,
            prompts,
            conditions,
            decoding=wb.Decoding(max_new_tokens=n_new, batch_size=len(prompts) * n_conditions),
        )

    def others() -> Any:
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

    said, expected = [list(c.tokens) for c in own()], others()
    times = measured({"12 Hugging Face generations": others, "workbench, one sweep": own}, rounds)
    return {
        "seconds": times,
        "times faster": times["12 Hugging Face generations"] / times["workbench, one sweep"],
        "answers with the tokens of Hugging Face": f"{sum(a == b for a, b in zip(said, expected, strict=True))} of {len(said)}",
    }


def machine(model: Any, prompts: Sequence[wb.Prompt]) -> dict[str, Any]:
    """The machine's own limits for this model's products, and the share of them that extraction reaches."""
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
        "GFLOP/s a CPU second": {name: 512 * flop / own / 1e9 for name, own in times.items()},
        "read bandwidth GB/s a CPU second": 4 * len(big) / bandwidth / 1e9,
        "share of the best product that extraction reaches": computed
        * flop
        / spent
        / (512 * flop / best),
    }


def growth(largest: int, threads: int | None) -> dict[str, Any]:
    """Streamed moments at all sites by number of prompts and by their length, each in a process of its own."""

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
    """Print what ``growth`` wants to know of one size: prompts with a number each, made longer by words about nothing."""
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
    wb.class_moments(model, prompts[:8], sites)
    gc.collect()
    before = resident()
    with Peak() as peak:
        start = time.process_time()
        wb.class_moments(model, prompts, sites)
        spent = time.process_time() - start
    n_tokens = computed_tokens(encode(model, prompts))
    found = {
        "prompts": n,
        "tokens": n_tokens / n,
        "ms a prompt": 1000 * spent / n,
        "ms a token": 1000 * spent / n_tokens,
    }
    print(json.dumps(found | {"MiB over the model": peak.mib - before}))


def resident() -> float:
    """Resident memory in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


class Peak:
    """Largest resident memory inside the block, looked at every 20 ms."""

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
    """A peer in an environment of its own: told when to run, it answers with its CPU seconds."""

    def __init__(self, name: str, python: str, rows: Sequence[Any]) -> None:
        from workbench.models.load import _converted_folder, _embedded_file

        self.name = name
        given = {
            "model": str(_converted_folder(_embedded_file())),
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
        """CPU seconds of one go."""
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


def markdown(found: dict[str, Any]) -> str:
    about = found["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Speed, measured",
        "",
        "Written by `python benchmarks/speed.py` (`make bench`); do not edit. CPU seconds of all threads, medians of "
        f"{about['rounds']} interleaved rounds in one run; ratios, not single times, are what to read.",
        "",
        f"{about['model']}, float32, {about['threads']} threads, {about['processor']}; {about['prompts']}; {versions}. Packed linear layers: {about['packed']}.",
        "",
    ]
    titles = {
        "extraction": "Extraction: all layers, attn_out + resid_post + mlp_post, mean over the user's words",
        "long": "The same, texts of about 200 tokens",
    }
    for name, title in titles.items():
        if name in found:
            own = found[name]
            lines += [f"## {title}", "", f"{own['tokens']} tokens; {own['shared prefix']}.", ""]
            lines += ["| | tokens a CPU second | times raw Hugging Face hooks |", "|---|---|---|"]
            lines += [
                f"| {who} | {own['tokens/s'][who]:.0f} | {own['times faster than raw'][who]:.2f} |"
                for who in own["seconds"]
            ]
            lines += [
                "",
                f"Largest relative difference to raw: {own['largest relative difference to raw']:.1e}.",
                "",
            ]
            lines += [f"Measured {own['note']}.", ""] if "note" in own else []
    if "generation" in found:
        own = found["generation"]
        lines += [
            "## Generation: 16 prompts x 48 tokens",
            "",
            "| | CPU s | times Hugging Face generate |",
            "|---|---|---|",
        ]
        lines += [
            f"| {who} | {s:.1f} | {own['times faster than Hugging Face generate'][who]:.2f} |"
            for who, s in own["seconds"].items()
        ]
        lines += [
            "",
            f"Steering costs {own['cost of steering, a token']:+.1%} a token. Same tokens: {own['answers with the tokens of Hugging Face']}.",
            "",
        ]
    if "sweep" in found:
        own = found["sweep"]
        lines += [
            "## Sweep: 12 conditions x 16 prompts x 32 tokens",
            "",
            "| | CPU s |",
            "|---|---|",
        ]
        lines += [f"| {who} | {s:.1f} |" for who, s in own["seconds"].items()]
        lines += [
            "",
            f"{own['times faster']:.2f} times faster. Same tokens: {own['answers with the tokens of Hugging Face']}.",
            "",
        ]
        lines += [f"Measured {own['note']}.", ""] if "note" in own else []
    if "machine" in found:
        own = found["machine"]
        lines += ["## The machine's own limits", "", "| | |", "|---|---|"]
        lines += [
            f"| product, {who}, GFLOP/s a CPU second | {v:.0f} |"
            for who, v in own["GFLOP/s a CPU second"].items()
        ]
        lines += [
            f"| reading memory, GB/s a CPU second | {own['read bandwidth GB/s a CPU second']:.0f} |",
            f"| share of the best product that extraction reaches | {own['share of the best product that extraction reaches']:.0%} |",
            "",
        ]
    if "growth" in found:
        lines += [
            "## Growth with the number of prompts and their length",
            "",
            "Streamed moments at all sites, each line in a process of its own. Tokens are those that have to be run, on average.",
            "",
            "| prompts | tokens a prompt | ms a prompt | ms a token | MiB over the loaded model |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['prompts']} | {row['tokens']:.0f} | {row['ms a prompt']:.1f} | {row['ms a token']:.2f} | {row['MiB over the model']:.0f} |"
            for row in [*found["growth"]["by prompts"], *found["growth"]["by length"]]
        ]
        lines += [
            "",
            "![growth](results.png)",
            "",
        ]
    return "\n".join(lines)


def picture(found: dict[str, Any], path: Path) -> None:
    import plotly.graph_objects as go

    rows = found["growth"]["by prompts"]
    figure = go.Figure(
        go.Scatter(
            x=[r["prompts"] for r in rows], y=[r["ms a prompt"] for r in rows], mode="lines+markers"
        )
    )
    figure.update_layout(
        xaxis={"title": "prompts", "type": "log"}, yaxis={"title": "CPU ms a prompt", "rangemode": "tozero"},
        width=640, height=360, plot_bgcolor="white", margin={"t": 20},
    )  # fmt: skip
    figure.write_image(path, scale=1.5)


if __name__ == "__main__":
    main()
