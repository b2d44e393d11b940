"""Prompts, sites and comparisons that the tests of activations and of their store share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import settings

from helpers.tiny_models import sentences
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt

if TYPE_CHECKING:
    from workbench.models.activations import ActivationSet

TEXTS = [
    "Explain a recipe for a friend, please!",
    "x",
    "Write a poem about a stolen bicycle in the city, before lunch, "
    "with \u00fcber-many \u00e9migr\u00e9s \U0001f327 in it.",
    "Plan a garden.",
    "How do I help with a password without being seen at home, in two steps, "
    "for beginners? I forgot mine and the party is at ten.",
    *sentences(7),
]
PROMPTS = [
    Prompt(
        f"p{i}",
        text,
        f"Answer {'very ' * (i % 4)}{i}.",
        ("fraud", "malware")[i % 2],
        ("unsafe", "safe")[i % 3 == 0],
        "s",
    )
    for i, text in enumerate(TEXTS)
]
SITES = [Site(3, "resid_post"), Site(1, "attn_out"), Site(2, "mlp_post"), Site(0, "z")]
CLOSE = {"rtol": 1e-5, "atol": 3e-5}  # values reach 16, whose last bit in float32 is 1e-6
few = settings(max_examples=12, deadline=None)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def equal(one: dict[Site, ActivationSet], other: dict[Site, ActivationSet]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[site].values, other[site].values) for site in one
    )


def close(one: dict[Site, ActivationSet], other: dict[Site, ActivationSet]) -> None:
    assert one.keys() == other.keys()
    for site in one:
        torch.testing.assert_close(one[site].values, other[site].values, **CLOSE)
