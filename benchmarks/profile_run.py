"""Profile a command of the workbench: where its seconds go, by kind of work.

    python benchmarks/profile_run.py run --model embedded --out FOLDER ...

Everything behind the script's name is what ``workbench`` takes. Python's own profiler watches the
main thread, which makes small functions look dearer than they are: it adds about a tenth to the
whole. Products are told by the functions of torch that make them, the rest by the package whose
function held the processor.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections import Counter

from workbench.cli import main as workbench

KINDS = {
    "products": (".linear>", "mkldnn._linear", "_linear_pointwise", ".addmm", ".mm>", ".matmul",
                 ".bmm", "baddbmm", "'__matmul__'", "linear_prepacked", "mkldnn_linear"),
    "attention": ("scaled_dot_product_attention",),
    "other functions of torch": ("torch._C", "built-in method torch"),
}  # fmt: skip
"""What a function's name holds, of functions that are not Python's; the first that fits."""


PACKAGES = (
    "workbench", "transformer_lens", "transformers", "sentence_transformers", "tokenizers",
    "safetensors", "gguf", "torch", "pandas", "numpy", "scipy", "sklearn", "matplotlib",
)  # fmt: skip


def kind_of(place: tuple[str, int, str]) -> str:
    """Say what kind of work a function of the profile does."""
    path, _, name = place
    if path == "~":
        for kind, parts in KINDS.items():
            if any(part in name for part in parts):
                return kind
        return "functions of Python and other libraries in C"
    if "importlib" in path:
        return "imports"
    found = [package for package in PACKAGES if f"/{package}/" in path]
    return f"Python of {found[-1]}" if found else "Python of others"


def main() -> None:
    """Run the command under the profiler and print the table."""
    profile, started = cProfile.Profile(), time.perf_counter()
    try:
        profile.runcall(workbench, sys.argv[1:])
    except SystemExit as ended:
        if ended.code:
            raise
    seconds = time.perf_counter() - started
    by_kind: Counter[str] = Counter()
    for place, (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        by_kind[kind_of(place)] += own
    print(f"\n{seconds:.0f} seconds under the profiler\n")
    print("| kind of work | seconds | share |\n|---|---|---|")
    for kind, own in by_kind.most_common():
        if own >= 0.005 * seconds:
            print(f"| {kind} | {own:.1f} | {own / seconds:.1%} |")
    if "--functions" in sys.argv:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
