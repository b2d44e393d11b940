"""Questions of two categories with their twins, and openings of answers to them."""

from __future__ import annotations

from workbench.prompts.openings import OPENING_KINDS
from workbench.prompts.prompt import Prompt

CATEGORIES = ("fraud", "malware")


OPENINGS = [
    {
        "category": category,
        "kind": kind,
        "style": f"s{i}",
        "text": f"{kind.replace('_', ' ')} {category} {i}.",
    }
    for category in CATEGORIES
    for kind in OPENING_KINDS
    for i in range(3)
]


def prompts_of(n=40):
    """Make n unsafe questions per category, each with its twin, and 2 n neutral ones."""
    rows = [
        Prompt(f"{c}-{i}-{label}", f"{label} question {i}", None, c, label, "test", f"{c}-{i}")
        for c in CATEGORIES
        for i in range(n)
        for label in ("unsafe", "safe")
    ]
    return (
        *rows,
        *(
            Prompt(f"n-{i}", f"neutral {i}", None, "harmless", "neutral", "test")
            for i in range(2 * n)
        ),
    )
