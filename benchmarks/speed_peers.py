"""Run a peer in an environment of its own: it is told what to do line by line.

    PEER_ENVIRONMENT/bin/python benchmarks/speed_peers.py nnsight    # started by speed.py

Each peer reads activations in its own way, of the kinds and positions that it can read in one pass
(``WORK_OF``). Nothing of workbench is imported here, because those environments do not have it.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import speed_plain
import torch
from safetensors.torch import save_file
from speed_plain import Means, Rows, Values, batches_of

Prepare = Callable[[Rows], Callable[[], Values]]
"""Takes the rows of a work and gives what does it."""


WORK_OF = {
    "nnsight": "all kinds",
    "steering-vectors": "residual stream",
    "repeng": "last token",
    "hugging-face": "all kinds",
}
"""What each peer can read in one pass: all three kinds of activation averaged over the user's
words, the residual stream alone averaged over them, or the residual stream at the last token (of
all layers but the last)."""


PACKAGE_OF = {"hugging-face": "transformers"}
"""Packages whose names are not those of the peers."""


def config_of(folder: str) -> Any:
    """Read a configuration; transformers before 5 looks for the rope's base at another place."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    major = int(importlib.metadata.version("transformers").partition(".")[0])
    rope = getattr(config, "rope_parameters", None)
    if major < 5 and rope:
        config.rope_theta = rope["rope_theta"]
    return config


def model_of(folder: str) -> Any:
    """Load a checkpoint with the environment's own transformers."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        folder, config=config_of(folder), dtype=torch.float32
    )
    return loaded.eval().requires_grad_(False)


def hugging_face(folder: str) -> Prepare:
    """Read with raw hooks, in another environment: what another transformers changes shows."""
    model = model_of(folder)
    return lambda rows: lambda: speed_plain.extraction(model, rows)


def nnsight(folder: str) -> Prepare:
    """Read with nnsight's tracing."""
    from nnsight import LanguageModel

    model = LanguageModel(folder, dtype=torch.float32, dispatch=True)

    def run(rows: Rows) -> Values:
        means = Means()
        for batch in batches_of(rows, 32):
            means.batch = batch
            given = {"input_ids": batch.tokens, "attention_mask": batch.mask}
            with torch.no_grad(), model.trace(given):
                saved = list().save()  # noqa: C408 - nnsight's own way of keeping values
                for block in model.model.layers:
                    saved.append(block.self_attn.output[0])
                    saved.append(block.mlp.down_proj.input)
                    saved.append(block.output)
            for place, value in enumerate(saved):
                layer, kind = divmod(place, 3)
                means.keep(("attn_out", "mlp_post", "resid_post")[kind], layer, value)
        return means.values()

    return lambda rows: lambda: run(rows)


def steering_vectors(folder: str) -> Prepare:
    """Read with record_activations, which takes one kind of place a pass: the residual stream."""
    from steering_vectors import record_activations

    model = model_of(folder)

    def run(rows: Rows) -> Values:
        means = Means()
        for batch in batches_of(rows, 32):
            means.batch = batch
            with torch.no_grad(), record_activations(model, layer_type="decoder_block") as recorded:
                model(input_ids=batch.tokens, attention_mask=batch.mask)
            for layer, values in recorded.items():
                means.keep("resid_post", layer, values[0])
        return means.values()

    return lambda rows: lambda: run(rows)


def repeng(folder: str) -> Prepare:
    """Read with repeng's own batching: the residual stream at the last token of texts."""
    from repeng.extract import batched_get_hiddens
    from transformers import PreTrainedTokenizerFast

    model = model_of(folder)
    # Its transformers may be older than the checkpoint's tokenizer class.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    layers = list(range(model.config.num_hidden_layers - 1))  # the last one's is behind a norm

    def prepare(rows: Rows) -> Callable[[], Values]:
        texts = [tokenizer.decode(ids) for ids, _ in rows]

        def run() -> Values:
            with torch.no_grad():
                hidden = batched_get_hiddens(model, tokenizer, texts, layers, 32)
            return {
                ("resid_post", layer): torch.as_tensor(values) for layer, values in hidden.items()
            }

        return run

    return prepare


PEERS: dict[str, Callable[[str], Prepare]] = {
    "nnsight": nnsight,
    "steering-vectors": steering_vectors,
    "repeng": repeng,
    "hugging-face": hugging_face,
}


def main() -> None:
    """Answer each line of standard input with a line that begins with "@"."""
    name = sys.argv[1]
    given = json.loads(sys.stdin.readline())
    torch.set_num_threads(given["threads"])
    prepare = PEERS[name](given["folder"])
    versions = [importlib.metadata.version(PACKAGE_OF.get(name, name))]
    if name not in PACKAGE_OF:
        versions.append(f"transformers {importlib.metadata.version('transformers')}")
    print(f"@ ready {', '.join(versions)}", flush=True)
    run: Callable[[], Values] = dict
    while line := sys.stdin.readline():
        command = json.loads(line)
        if "rows" in command:
            run = prepare([(ids, span) for ids, span in command["rows"]])
            print("@ ok", flush=True)
        elif "file" in command:
            values = {f"{kind}.{n}": rows.contiguous() for (kind, n), rows in run().items()}
            save_file(values, command["file"])
            print("@ ok", flush=True)
        else:
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            print(f"@ {spent[0]} {spent[1]}", flush=True)


if __name__ == "__main__":
    main()
