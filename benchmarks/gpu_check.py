"""Check on a machine with an accelerator what the tests can only imitate on a processor.

    python benchmarks/gpu_check.py        # one line for each check; exit 1 if one fails

It takes under three minutes: a tiny Llama that it makes itself, and the embedded model.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.gates import ALWAYS, gate, through, vector
from helpers.tiny_models import sentences, tiny_model

from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.hooked_model import input_device
from workbench.models.load import load_model, model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt, load_prompts, select_prompts
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import fit_steering_vectors

SITES = [Site(layer, kind) for layer in (0, 3) for kind in ("resid_post", "mlp_post", "attn_out")]
DECODING = Decoding(max_new_tokens=12)


def main() -> int:
    if not torch.cuda.is_available():
        print("no accelerator: nothing to check")
        return 0
    name, n_devices = torch.cuda.get_device_name(), torch.cuda.device_count()
    print(f"{name} x {n_devices}, torch {torch.__version__}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_model("llama3", Path(folder) / "tiny")
        for check in CHECKS:
            start = time.monotonic()
            try:
                said = check(tiny)
            except Exception as error:
                failed += 1
                said = f"FAILED: {type(error).__name__}: {str(error).splitlines()[:1]}"
                traceback.print_exc()
            print(f"{check.__name__}: {said} ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return int(failed > 0)


def questions(n: int = 6) -> list[Prompt]:
    return [
        Prompt(f"q{i}", text, None, ("fraud", "malware")[i % 2], "unsafe", "test")
        for i, text in enumerate(sentences(n, seed=4))
    ]


def largest_error(values: dict[Site, Any], expected: dict[Site, Any]) -> float:
    """Relative to the largest value of each site."""
    return max(
        float((values[s].values - expected[s].values).abs().max() / expected[s].values.abs().max())
        for s in expected
    )


def cuda_equals_cpu(tiny: Path) -> str:
    here, there = (load_model(tiny, device=device) for device in ("cpu", "cuda"))
    assert model_info(here).fingerprint == model_info(there).fingerprint
    error = largest_error(*(cache_activations(m, questions(), SITES) for m in (there, here)))
    assert error < 1e-3, error
    return f"same fingerprint, activations within {error:.1e}"


def bf16_on_cuda(tiny: Path) -> str:
    half = load_model(tiny, device="cuda", dtype="bfloat16")
    whole = load_model(tiny, device="cpu")
    error = largest_error(*(cache_activations(m, questions(), SITES) for m in (half, whole)))
    assert 1e-4 < error < 0.2, error
    auto = load_model(tiny, device="cuda", dtype="auto")
    assert model_info(auto).dtype == "float32"
    return f"activations within {error:.1e} of float32; dtype auto is the checkpoint's"


def device_map_auto(tiny: Path) -> str:
    model, plain = load_model(tiny, device_map="auto"), load_model(tiny, device="cpu")
    devices = sorted({str(p.device) for p in model.parameters()})
    error = largest_error(*(cache_activations(m, questions(), SITES) for m in (model, plain)))
    assert error < 1e-3, error
    assert input_device(model).type == "cuda"
    assert model_info(model).fingerprint == model_info(plain).fingerprint
    return f"on {', '.join(devices)}, activations within {error:.1e}"


def device_map_over_all_devices(tiny: Path) -> str:
    n = torch.cuda.device_count()
    places = {f"model.layers.{i}": i * n // 4 for i in range(4)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": n - 1, "lm_head": n - 1}
    model, plain = load_model(tiny, device_map=places | ends), load_model(tiny, device="cpu")
    error = largest_error(*(cache_activations(m, questions(), SITES) for m in (model, plain)))
    assert error < 1e-3, error
    assert steered(model) == steered(plain)
    return f"{n} devices, activations within {error:.1e}, the same steered answers"


def steered(model: Any) -> list[list[int]]:
    """Answers unsteered, steered, and behind a gate that reads at a lower layer."""
    conditions: dict[str, Any] = {
        "plain": [],
        "steered": [add_vector(vector(model), rho=0.3)],
        "gated": through(model, gate(model, ALWAYS)),
    }
    return [list(c.tokens) for c in sweep(model, questions(), conditions, decoding=DECODING)]


def masks_and_vectors_follow(tiny: Path) -> str:
    here, there = (steered(load_model(tiny, device=device)) for device in ("cpu", "cuda"))
    n = sum(a == b for a, b in zip(here, there, strict=True))
    assert n >= len(here) - 1, f"{n} of {len(here)}"
    assert len({str(answer) for answer in there}) > len(there) / 2
    return f"{n} of {len(here)} answers as on the processor, steered and gated ones among them"


def embedded_model_in_bf16(_: Path) -> str:
    model = load_model("embedded", device="cuda", dtype="bfloat16")
    prompts = select_prompts(load_prompts(), category="fraud", label=["unsafe", "safe"], limit=12)
    site = Site(15, "resid_post")
    direction = fit_steering_vectors(cache_activations(model, prompts, site)[site])["fraud"]
    conditions = {"plain": [], "steered": [add_vector(direction, rho=0.15)]}
    answers = sweep(model, prompts[:6], conditions, decoding=Decoding(max_new_tokens=24))
    changed = sum(a.tokens != b.tokens for a, b in zip(answers[:6], answers[6:], strict=True))
    assert all(answer.text for answer in answers)
    assert changed
    return f"{changed} of 6 answers change, norm {direction.norm:.1f}"


def four_and_eight_bits(tiny: Path) -> str:
    if importlib.util.find_spec("bitsandbytes") is None:
        return "left out: bitsandbytes is not installed"
    whole, said = load_model(tiny, device="cpu"), []
    for quantize in ("8bit", "4bit"):
        model = load_model(tiny, device="cuda", dtype="bfloat16", quantize=quantize)
        pair = (cache_activations(m, questions(), SITES[:1]) for m in (model, whole))
        error = largest_error(*pair)
        assert 1e-4 < error < 0.5, error
        assert len(steered(model)) == 3 * len(questions())
        said.append(f"{model_info(model).quantization} within {error:.1e}")
    return ", ".join(said)


CHECKS: list[Callable[[Path], str]] = [
    cuda_equals_cpu,
    bf16_on_cuda,
    device_map_auto,
    device_map_over_all_devices,
    masks_and_vectors_follow,
    embedded_model_in_bf16,
    four_and_eight_bits,
]


if __name__ == "__main__":
    sys.exit(main())
