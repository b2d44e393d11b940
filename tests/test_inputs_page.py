"""The page about forms of input runs as it is, and prints what it shows."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from helpers.fenced_blocks import code_and_outputs

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "inputs.md").read_text(encoding="utf-8")


def test_every_example_of_the_page_prints_what_it_shows(tiny_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    examples = code_and_outputs(PAGE)
    assert len(examples) == 11
    for code, expected in examples:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(
                compile(code.replace('"embedded"', repr(str(tiny_path))), "inputs.md", "exec"),
                names,
            )
        assert output.getvalue() == expected
