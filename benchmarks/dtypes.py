"""Compare the data types that a model can be read in: error, memory and speed.

    python benchmarks/dtypes.py --model embedded --out dtypes.json

Errors are those of the logits at every token of some prompts against float32: the norm of their
difference over that of float32's (both centred per token), the mean KL in nats, and how often the
most likely token is the same. Speed is that of greedy answers, and of one product of the model's
own shapes. Timings are medians; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

import workbench as wb
from workbench.files.store import write_json
from workbench.models import encode, last_logits, load_notes, model_info, pad, pad_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.prompt import Prompt


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"packing": "off"},
    "float32, packed": {"packing": "on"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int8 in bfloat16": {"quantize": "int8", "dtype": "bfloat16"},
}
"""What is compared, as ``load_model`` reads it."""


def main() -> None:
    """Read the model in each way and print a row of numbers for it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=int, default=16, help="prompts whose logits are compared")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 16, 96], help="answers at a time"
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer; 0 times none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args()
    prompts = wb.select_prompts(wb.load_prompts(), label="neutral")
    exact: list[torch.Tensor] = []
    results = {}
    for name, how in VARIANTS.items():
        model = wb.load_model(options.model, device="cpu", **how)
        found = logits_of(model, prompts[: options.prompts])
        exact = exact or found
        results[name] = {
            **facts(model),
            **errors(found, exact),
            **speeds(model, prompts, options.rows, options.tokens, options.repeats),
        }
        print(name, results[name], flush=True)
        del model
        gc.collect()
    if options.out:
        write_json(options.out, {"threads": torch.get_num_threads(), "variants": results})


def facts(model: HookedModel) -> dict[str, Any]:
    """Say what a model is and how large its weights are."""
    info, notes = model_info(model), load_notes(model)
    parts = (*model.original_model.parameters(), *model.original_model.buffers())
    return {
        "dtype": info.dtype,
        "quantization": info.quantization,
        "weights_mb": round(sum(p.numel() * p.element_size() for p in parts) / 2**20),
        "loading": notes and notes.to_dict(),
    }


def logits_of(model: HookedModel, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """Compute each prompt's logits at every token, in float32."""
    found = []
    for row in encode(model, prompts):
        batch = pad([row], pad_id=pad_id(model), side="right")
        with torch.no_grad():
            logits, _ = last_logits(model, batch.tokens, batch.mask, len(row.ids))
        found.append(logits[0].float())
    return found


def errors(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> dict[str, float]:
    """Compare logits with those of float32, token by token."""
    a, b = torch.cat(list(found)).double(), torch.cat(list(exact)).double()
    a, b = (logits.log_softmax(dim=-1) for logits in (a, b))
    kl = (b.exp() * (b - a)).sum(dim=-1)
    same = a.argmax(dim=-1) == b.argmax(dim=-1)
    a, b = (logits - logits.mean(dim=-1, keepdim=True) for logits in (a, b))
    relative = (a - b).norm(dim=-1) / b.norm(dim=-1)
    return {
        "tokens": len(a),
        "relative_error_median": float(relative.median()),
        "relative_error_largest": float(relative.max()),
        "kl_mean": float(kl.mean()),
        "same_top_token": float(same.double().mean()),
    }


def speeds(
    model: HookedModel, prompts: Sequence[Prompt], rows: Sequence[int], tokens: int, repeats: int
) -> dict[str, Any]:
    """Time greedy answers of so many prompts at a time; milliseconds a token step."""
    if not tokens:
        return {}
    decoding = wb.Decoding(max_new_tokens=tokens)
    timed: dict[str, Any] = {}
    for n in rows:
        some = [prompts[i % len(prompts)] for i in range(n)]
        some = list({prompt.id: prompt for prompt in some}.values())
        seconds = [
            _seconds(lambda: wb.sweep(model, some, {"unsteered": ()}, decoding=decoding))  # noqa: B023
            for _ in range(repeats + 1)  # the first one warms up
        ][1:]
        timed[f"ms_per_step_{len(some)}_rows"] = round(
            1000 * statistics.median(seconds) / tokens, 2
        )
    return timed


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
