"""A sentence encoder that can be worked out by hand."""

from __future__ import annotations

import numpy as np


class WordEncoder:
    """A sentence encoder in which each known word is an axis."""

    axes = ("garden", "card", "dog", "bicycle")

    def encode(self, texts, **_):
        counts = np.array(
            [[text.lower().count(word) for word in self.axes] for text in texts], dtype=float
        )
        return counts / np.linalg.norm(counts, axis=1, keepdims=True).clip(min=1e-9)
