"""Say how answers are decoded: length, sampling, stops, batches, and what they are asked with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any


class FrozenKeywords(Mapping[str, Any]):
    """Hold keywords that nobody can change, so that settings which have them can be compared."""

    def __init__(self, keywords: Mapping[str, Any] | None = None) -> None:
        self._keywords = dict(keywords or {})

    def __getitem__(self, name: str) -> Any:
        return self._keywords[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keywords)

    def __len__(self) -> int:
        return len(self._keywords)

    def __hash__(self) -> int:
        return hash(json.dumps(self._keywords, sort_keys=True))

    def __repr__(self) -> str:
        return repr(self._keywords)


@dataclass(frozen=True)
class Decoding:
    """Hold the settings of the decode loop; the default is greedy decoding of 64 tokens.

    Attributes:
        max_new_tokens: Longest answer, in tokens; thoughts count.
        temperature: 0 takes the most likely token; above 0 the softmax of logits / temperature
            is sampled.
        top_p: Sample only among the most likely tokens that together reach this probability;
            1 samples among all. It has no effect at temperature 0.
        seed: Seed for sampling: the same seed, prompt, sample and step give the same random number
            in any batch and under every condition, so comparisons are paired.
        batch_size: Largest number of rows (prompts x samples x conditions) per batch; None takes as
            many as half of the free memory holds, up to 96, or 256 on a GPU.
        system_prompt: Words for the system turn; None leaves it to the chat template.
        template_keywords: What else the chat template reads, such as ``{"enable_thinking": True}``
            (thinking is off by default where the template has a switch) or
            ``{"reasoning_effort": "low"}``. A model without a chat template takes
            ``plain_template``, a text with ``{prompt}`` in it.
        n_samples: Answers to each prompt, each with random numbers of its own; needs a temperature
            above 0. More of them go on from fewer.
        top_k: Sample only among so many most likely tokens; None among all. Where ``top_p`` is
            given too, it counts among these.
        stop: Texts that end an answer; it is cut before the first one. Thoughts are not searched.

    Raises:
        ValueError: If a setting is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    system_prompt: str | None = None
    template_keywords: Mapping[str, Any] = FrozenKeywords()
    n_samples: int = 1
    top_k: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._freeze()
        for name in ("max_new_tokens", "batch_size", "n_samples", "top_k"):
            value = getattr(self, name)
            is_optional = name in ("batch_size", "top_k")
            if not (value is None and is_optional) and (not _is_whole(value) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name} must be a number, got {value!r:.40}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature!r}.")
        if not isinstance(self.system_prompt, str | None):
            raise ValueError(f"system_prompt must be a text, got {self.system_prompt!r:.80}.")
        if not _is_whole(self.seed):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}.")
        if self.n_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.n_samples} samples at temperature 0 are one answer over and over; "
                "give a temperature above 0, or n_samples=1."
            )

    def _freeze(self) -> None:
        """Bring mappings and lists into a form that nobody can change; check what is in them."""
        stop: Any = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(
            isinstance(text, str) and text for text in stop
        ):
            raise ValueError(f"stop must be texts that are not empty, got {self.stop!r:.80}.")
        try:
            keywords = FrozenKeywords(self.template_keywords)
            hash(keywords)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "template_keywords must be a mapping from names to JSON values, "
                f"got {self.template_keywords!r:.80}."
            ) from error
        if not all(isinstance(name, str) for name in keywords):
            raise ValueError(f"names of template_keywords must be texts, got {keywords!r:.80}.")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "template_keywords", keywords)

    @property
    def asked_by(self) -> dict[str, Any]:
        """System prompt and template keywords, as the arguments that other functions take."""
        return {
            "system_prompt": self.system_prompt,
            "template_keywords": self.template_keywords,
        }


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


GREEDY = Decoding()
"""The default: the most likely token each time, 64 tokens at most."""
