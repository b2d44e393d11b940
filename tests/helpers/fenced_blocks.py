"""The fenced blocks of a page, and what its examples are said to print."""

from __future__ import annotations

import re

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(text):
    """Language and content of every fenced block."""
    return BLOCK.findall(text)


def code_and_outputs(text):
    """Every Python block with the text block behind it, "" where there is none."""
    found = blocks(text)
    following = [*found[1:], ("", "")]
    return [
        (code, output if shown == "text" else "")
        for (language, code), (shown, output) in zip(found, following, strict=True)
        if language == "python"
    ]
