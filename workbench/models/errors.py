"""Tell what a model cannot do from what a user got wrong."""

from __future__ import annotations


class CannotBeDone(ValueError):  # noqa: N818 - it says what it is where it is caught
    """Say that a model, or a set of prompts, does not allow what was asked of it.

    No other option would help: a mixture of experts has no neurons that all tokens share, a
    recurrent layer has no heads. A run leaves such a stage out, keeps this message as the reason,
    and goes on.
    """
