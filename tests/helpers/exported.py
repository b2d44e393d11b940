"""Compare what an export does to a plain model with what workbench does to its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from workbench.steering.apply import intervene

IDS = (1, 20, 33, 47, 60, 81, 122)


def steered(model, interventions, ids=IDS):
    """Give workbench's logits of one prompt, (pos, words)."""
    with torch.no_grad(), intervene(model, interventions):
        return model(torch.tensor([list(ids)]))[0]


def plain(hf_model, ids=IDS):
    """Give the logits of a plain transformers model."""
    with torch.no_grad():
        return hf_model(torch.tensor([list(ids)])).logits[0]


def import_file(path) -> ModuleType:
    """Run a Python file that was written, as a module of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
