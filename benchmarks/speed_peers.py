"""Run what the workbench is measured against: raw Hugging Face code and other libraries.

    python benchmarks/speed_peers.py nnsight    # started by speed.py

The other libraries run as this script, each in an environment of its own; lines on standard input
say when to run. Nothing of workbench is imported here, because those environments do not have it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

Rows = list[tuple[list[int], list[int]]]
"""Token ids of a prompt, and where the user's words begin and end."""


def batches_of(rows: Rows, size: int) -> Any:
    """Cut rows, longest first, into padded batches of tokens, mask, spans and places."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = max(len(rows[i][0]) for i in places)
        tokens = torch.zeros(len(places), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, i in enumerate(places):
            ids = torch.tensor(rows[i][0])
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        yield tokens, mask, [rows[i][1] for i in places], places


def raw_extraction(model: Any, rows: Rows, size: int = 32) -> dict[Any, torch.Tensor]:
    """Average each layer's activations over the user's words, with hooks and without the head.

    Read are what attention writes, the residual stream and the neurons, in batches.
    """
    means: dict[Any, torch.Tensor] = {}
    now: dict[str, Any] = {}

    def keep(kind: str, layer: int, value: torch.Tensor) -> None:
        for row, (place, (a, b)) in enumerate(zip(now["places"], now["spans"], strict=True)):
            means[kind, layer, place] = value[row, a:b].mean(dim=0)

    def first(out: Any) -> Any:
        return out[0] if isinstance(out, tuple) else out

    handles = []
    for layer, block in enumerate(model.model.layers):
        handles += [
            block.self_attn.register_forward_hook(
                lambda _m, _a, out, n=layer: keep("attn_out", n, first(out))
            ),
            block.register_forward_hook(
                lambda _m, _a, out, n=layer: keep("resid_post", n, first(out))
            ),
            block.mlp.down_proj.register_forward_pre_hook(
                lambda _m, args, n=layer: keep("mlp_post", n, args[0])
            ),
        ]
    with torch.no_grad():
        for tokens, mask, spans, places in batches_of(rows, size):
            now.update(spans=spans, places=places)
            model.model(input_ids=tokens, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return means


def raw_generation(model: Any, ids: list[list[int]], n_new: int, tokenizer: Any) -> list[list[int]]:
    """Answer greedily in one left-padded batch with Hugging Face's generate.

    Each answer's tokens go up to its end.
    """
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    out = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=n_new,
        do_sample=False,
        pad_token_id=pad,
    )
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    answers = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers


def nnsight(folder: str, rows: Rows) -> Any:
    from nnsight import LanguageModel

    model = LanguageModel(folder, dtype=torch.float32, dispatch=True)

    def run() -> None:
        for tokens, mask, spans, _ in batches_of(rows, 32):
            with torch.no_grad(), model.trace({"input_ids": tokens, "attention_mask": mask}):
                saved = list().save()  # noqa: C408 - nnsight's own way of keeping values
                for block in model.model.layers:
                    saved.append(block.self_attn.output[0])
                    saved.append(block.mlp.down_proj.input)
                    saved.append(block.output)
            for value in saved:
                activations = value[0] if isinstance(value, tuple) else value
                for row, (a, b) in enumerate(spans):
                    activations[row, a:b].mean(dim=0)

    return run


def steering_vectors(folder: str, rows: Rows) -> Any:
    from steering_vectors import record_activations
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()

    # It reads one kind of site per pass. Three passes would be unfair, so it reads the residual
    # stream alone.
    def run() -> None:
        for tokens, mask, spans, _ in batches_of(rows, 32):
            with torch.no_grad(), record_activations(model, layer_type="decoder_block") as recorded:
                model(input_ids=tokens, attention_mask=mask)
            for values in recorded.values():
                for row, (a, b) in enumerate(spans):
                    values[0][row, a:b].mean(dim=0)

    return run


def repeng(folder: str, rows: Rows) -> Any:
    from repeng.extract import batched_get_hiddens
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    # its transformers is older than the checkpoint's tokenizer class
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [tokenizer.decode(ids) for ids, _ in rows]
    layers = list(range(1, model.config.num_hidden_layers))

    # with its own batching; it reads the residual stream at the last token alone
    def run() -> None:
        with torch.no_grad():
            batched_get_hiddens(model, tokenizer, texts, layers, 32)

    return run


PEERS = {"nnsight": nnsight, "steering-vectors": steering_vectors, "repeng": repeng}


def main() -> None:
    import importlib.metadata

    name = sys.argv[1]
    given = json.loads(sys.stdin.readline())
    torch.set_num_threads(given["threads"])
    run = PEERS[name](given["model"], [(ids, span) for ids, span in given["rows"]])
    print(f"@ ready {importlib.metadata.version(name)}", flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        start = time.process_time()
        run()
        print(f"@ {time.process_time() - start}", flush=True)


if __name__ == "__main__":
    main()
