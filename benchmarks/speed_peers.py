"""What the workbench is measured against: raw Hugging Face hooks and generate, and, run as a script in their own environments, other libraries.

    python benchmarks/speed_peers.py nnsight    # started by speed.py; lines on standard input say when to run

No import of workbench here: those environments do not have it.
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
    """Sorted by length, padded on the right: tokens, mask, spans, places."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = max(len(rows[i][0]) for i in places)
        tokens, mask = (
            torch.zeros(len(places), width, dtype=torch.long),
            torch.zeros(len(places), width, dtype=torch.long),
        )
        for row, i in enumerate(places):
            ids = torch.tensor(rows[i][0])
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        yield tokens, mask, [rows[i][1] for i in places], places


def raw_extraction(model: Any, rows: Rows, size: int = 32) -> dict[Any, torch.Tensor]:
    """Means over the user's words of what attention writes, the residual stream and the neurons, at every layer: hooks, batches, no head."""
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
    """Hugging Face's generate, one left-padded batch, greedy; tokens up to the end of each answer."""
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
                kept = list().save()  # noqa: C408 - nnsight's own way of keeping values
                for block in model.model.layers:
                    kept.append(block.self_attn.output[0])
                    kept.append(block.mlp.down_proj.input)
                    kept.append(block.output)
            for value in kept:
                own = value[0] if isinstance(value, tuple) else value
                for row, (a, b) in enumerate(spans):
                    own[row, a:b].mean(dim=0)

    return run


def steering_vectors(folder: str, rows: Rows) -> Any:
    from steering_vectors import record_activations
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()

    def run() -> (
        None
    ):  # one kind of site a pass is what it offers: three passes would be unfair, so the residual stream alone
        for tokens, mask, spans, _ in batches_of(rows, 32):
            with torch.no_grad(), record_activations(model, layer_type="decoder_block") as kept:
                model(input_ids=tokens, attention_mask=mask)
            for values in kept.values():
                for row, (a, b) in enumerate(spans):
                    values[0][row, a:b].mean(dim=0)

    return run


def repeng(folder: str, rows: Rows) -> Any:
    from repeng.extract import batched_get_hiddens
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder
    )  # its transformers is older than the checkpoint's tokenizer class
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [tokenizer.decode(ids) for ids, _ in rows]
    layers = list(range(1, model.config.num_hidden_layers))

    def run() -> None:  # its own batching, the residual stream at the last token alone
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
