"""Positions: which columns of a forward pass are prompt, which are generated, and so which of them an intervention means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from workbench.models.sites import Site


@dataclass(frozen=True, eq=False)
class GateState:
    """What a gate has read of each row of a batch.

    Attributes:
        scores: One a category; a running mean while a stepwise gate goes on reading.
        opening: How far it is open.
    """

    scores: Float[Tensor, "batch category"]
    opening: Float[Tensor, "batch category"]

    def rows(self, keep: Tensor) -> GateState:
        """The same for some rows of the batch."""
        return GateState(self.scores[keep], self.opening[keep])


@dataclass
class Steering:
    """What ``intervene`` yields: how often each site was reached, and where the prompt ends.

    Attributes:
        fired: Calls of each site's hook.
        prompt_length: Columns of the batch that belong to the prompt; None until the first forward pass has told.
        reached: Sites with the kinds of positions that at least one column had.
        gates: What each gate has read so far.
        content: True at the user's words, for the prompt's columns; None where nobody said.
    """

    fired: dict[Site, int] = field(default_factory=dict)
    prompt_length: int | None = None
    reached: set[tuple[Site, str]] = field(default_factory=set)
    gates: dict[Any, GateState] = field(default_factory=dict)
    content: Bool[Tensor, "batch prompt"] | None = None
    past: int = 0
    new: int = 0
    mask: Bool[Tensor, "batch pos"] | None = None
    last: Tensor | None = None

    def see(self, tokens: Tensor, past: int, mask: Bool[Tensor, "batch pos"] | None, *, fixed: bool) -> None:
        """Take note of a forward pass that begins: its lengths say which columns are prompt and which are generated."""
        self.new, self.past = tokens.shape[1], past
        self.mask = mask[:, -self.new :].bool() if mask is not None and mask.ndim == 2 and self.new > 1 else None
        # Several columns are prompt, behind a cached prefix too. Without a cache, decoding runs all again with one token more.
        grown = past == 0 and self.last is not None and torch.equal(tokens[:, :-1], self.last)
        if not fixed and not grown and (past == 0 or self.new > 1):
            self.prompt_length = past + self.new
        self.last = tokens if past == 0 else None

    def selected(
        self, positions: str, activation: Tensor, until: int | None = None
    ) -> Bool[Tensor, "batch pos"] | bool:
        """Which columns of this pass a kind of positions means: a mask, or True for all and False for none of them.

        Args:
            positions: "all", "prompt" or "generated".
            activation: What the hook was given.
            until: Generated tokens after which no column is meant; None for no end.
        """
        end = self.new if self.prompt_length is None else self.prompt_length
        n_prompt = self.n_prompt
        if activation.shape[1] != self.new:
            raise RuntimeError(
                f"an activation has {activation.shape[1]} positions where the model was given {self.new}."
            )
        if (positions == "generated" and n_prompt == self.new) or (positions == "prompt" and n_prompt == 0):
            return False
        n_open = self.new if until is None else min(max(end + until - self.past, 0), self.new)
        if n_open == 0:
            return False
        everything = n_open == self.new and (
            positions == "all" or n_prompt == (0 if positions == "generated" else self.new)
        )
        if everything and self.mask is None:
            return True
        chosen = (
            torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
            if self.mask is None
            else self.mask
        )
        if not everything:
            columns = torch.arange(self.new, device=activation.device)
            if positions != "all":
                chosen = chosen & ((columns < n_prompt) == (positions == "prompt"))
            chosen = chosen & (columns < n_open)
        return chosen

    @property
    def n_prompt(self) -> int:
        """Columns of this pass that are prompt, the first ones."""
        end = self.past + self.new if self.prompt_length is None else self.prompt_length
        return min(max(end - self.past, 0), self.new)

    def read(self, activation: Float[Tensor, "batch pos d"], span: str) -> Float[Tensor, "batch d"] | None:
        """What a gate reads in this pass: the mean over the user's words, or the prompt's last token; None behind the prompt.

        Raises:
            ValueError: If the user's words are wanted and nobody said where they are.
        """
        n = self.n_prompt
        if n == 0:
            return None
        if span == "last":
            if self.mask is None:
                return activation[:, n - 1]
            columns = torch.arange(n, device=activation.device)
            last = (self.mask[:, :n] * columns).argmax(dim=1)
            return activation[torch.arange(len(activation), device=activation.device), last]
        if self.content is None:
            raise ValueError(
                "this gate reads the user's words: say which columns they are with intervene(content=...), or fit it with span='last'."
            )
        inside = self.content[:, self.past : self.past + n].to(activation.dtype)
        total = torch.einsum("bp,bpd->bd", inside, activation[:, :n])
        return total / inside.sum(dim=1, keepdim=True).clamp(min=1)

    def behind_template(self) -> Bool[Tensor, "batch pos"] | None:
        """Columns of this pass from the user's first word on, where it is known which these are and some are not."""
        if self.content is None or self.n_prompt == 0:
            return None
        begun = self.content.cumsum(dim=1)[:, self.past : self.past + self.n_prompt] > 0
        return torch.cat([begun, begun.new_ones(len(begun), self.new - self.n_prompt)], dim=1)
