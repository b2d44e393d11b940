"""Small runs: the prompts and settings that the tests of a run share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.prompts.prompt import load_prompts, save_prompts, select_prompts
from workbench.safesteer.config import RunConfig


def write_few_prompts(path: Path) -> Path:
    """Write eight pairs of two categories and some neutral prompts, all of them short."""
    short = [p for p in load_prompts() if len(p.text) < 90]
    whole = {p.pair_id for p in short if p.label == "safe"} & {
        p.pair_id for p in short if p.label == "unsafe"
    }
    paired = [p for p in short if p.pair_id in whole]
    risky = select_prompts(paired, category=["fraud", "malware"], limit=8)
    save_prompts(path, [*risky, *select_prompts(short, label="neutral", limit=16)])
    return path


def settings(path: Path, **changes: Any) -> RunConfig:
    """Return settings of a run that takes seconds."""
    return RunConfig(prompts=str(path), tune_prompts=2, max_new_tokens=4, rhos=(0.1,), **changes)
