"""Say how answers are decoded: their length, sampling, batches and the system turn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """Hold the settings of the decode loop; the default is greedy decoding of 64 tokens.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the most likely token; above 0 the softmax of logits / temperature
            is sampled.
        top_p: Sample only among the most likely tokens that together reach this probability;
            1 samples among all. It has no effect at temperature 0.
        seed: Seed for sampling: the same seed, prompt and step give the same random number in
            any batch and under every condition, so comparisons are paired.
        batch_size: Largest number of rows (prompts x conditions) per batch; None takes as many
            as 1 GiB holds the keys and values of, up to 96.
        system_prompt: Words for the system turn; None leaves it to the chat template.

    Raises:
        ValueError: If a setting is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}.")


GREEDY = Decoding()
"""The default: the most likely token each time, 64 tokens at most."""
