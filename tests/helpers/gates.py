"""Gates on a tiny model: never open, always open, or open for half of some prompts."""

from __future__ import annotations

import dataclasses
import math

import torch

from helpers.tiny_models import D_MODEL, sentences
from workbench.models.activations import cache_activations
from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.stats.selectivity import Threshold
from workbench.steering.gates import Gate
from workbench.steering.interventions import gated, suppress
from workbench.steering.vectors import SteeringVector

READ, STEERED = Site(0, "resid_post"), Site(1, "resid_post")
NEVER, ALWAYS = Threshold(math.inf, 0.02, 0.0, 0.0, 3), Threshold(-math.inf, 0.02, 0.0, 1.0, 3)


def questions(n=6):
    texts = sentences(n, seed=4)
    return [
        Prompt(f"q{i}", text, None, ("fraud", "malware")[i % 2], "unsafe", "test")
        for i, text in enumerate(texts)
    ]


def vector(model, seed=0, category="fraud", size=6.0):
    values = size * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(
        STEERED, category, values, "prompt_contrast", "content", 1.0, 3, 3, 20.0, model_info(model)
    )


def gate(model, threshold=None, **fields):
    torch.manual_seed(7)
    random_gate = Gate(
        READ,
        "content",
        ("fraud", "malware"),
        torch.randn(2, D_MODEL),
        torch.zeros(2),
        {"neutral": threshold or Threshold(0.0, 0.02, 0.0, 0.1, 50)},
        1.0,
        model_info(model),
    )
    return dataclasses.replace(random_gate, **fields)


def through(model, a_gate, rho=0.4):
    """Steer two categories through a gate."""
    return gated(
        {c: [suppress(vector(model, i, c), rho)] for i, c in enumerate(("fraud", "malware"))},
        a_gate,
    )


def half_open(model, prompts):
    """Return a gate whose threshold lies amid these prompts' scores, and for which it opens."""
    always_same = gate(model)
    scores = always_same.scores(cache_activations(model, prompts, READ)[READ].values).amax(dim=1)
    middle = float(scores.sort().values[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean())
    return gate(model, Threshold(middle, 0.02, 0.0, 1.0, 3)), scores > middle
