"""Random vectors of two categories at one place, and questions of the two."""

from __future__ import annotations

from dataclasses import replace

import torch

from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.vectors import SteeringVector

SITE = Site(1, "resid_post")
CATEGORIES = ("fraud", "malware")


def questions(n=4):
    return [
        Prompt(f"{c}-{i}", f"the {c} dog {i}", None, c, "unsafe", "test")
        for c in CATEGORIES
        for i in range(n)
    ]


def vectors_of(model, constructions=("a", "b")):
    info = model_info(model)

    def made(construction, category):
        seed = sum(map(ord, construction + category))
        values = torch.randn(info.d_model, generator=torch.Generator().manual_seed(seed))
        return SteeringVector(
            SITE, category, values, construction, "content", 1.0, 5, 5, 10.0, info
        )

    return {(name, SITE): {c: made(name, c) for c in CATEGORIES} for name in constructions}


def with_targets(vectors, value=2.5):
    return {
        key: {c: replace(v, safe_projection=value) for c, v in by_category.items()}
        for key, by_category in vectors.items()
    }
