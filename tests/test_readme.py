"""README keeps its promises: its code prints what it shows, its links and commands exist."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shlex
from pathlib import Path

import pytest
from helpers.fenced_blocks import blocks, code_and_outputs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_commands(text):
    """Command lines of ``workbench`` in the shell blocks, continued ones as a whole."""
    shell = [block.replace("\\\n", " ") for language, block in blocks(text) if language == "sh"]
    lines = [line for block in shell for line in block.splitlines()]
    return [line for line in lines if line.startswith("workbench ")]


@pytest.fixture(scope="module")
def printed(real_model):
    """What the Python blocks print, in order, and the names they leave behind."""
    names: dict = {}
    outputs = []
    for code, _ in code_and_outputs(README):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, "README.md", "exec"), names)
        outputs.append(output.getvalue())
    return outputs, names


@pytest.mark.slow
def test_the_quick_start_prints_what_readme_shows(printed):
    expected = [output for _, output in code_and_outputs(README)]
    assert any(expected)
    assert printed[0] == expected


@pytest.mark.slow
def test_the_answers_shown_are_those_the_model_gives(printed):
    answers = {
        completion.condition: completion.text
        for completion in printed[1]["result"].completions
        if completion.prompt.text in README
    }
    shown = re.findall(r"^\| (unsteered|steered|random) \| ([A-Z][^|]+) \|$", README, re.M)
    assert [condition for condition, _ in shown] == ["unsteered", "steered", "random"]
    for condition, text in shown:
        assert answers[condition].startswith(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_exists(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_parses(page):
    from workbench.cli import app

    for line in shell_commands(page.read_text(encoding="utf-8")):
        tokens = shlex.split(line, comments=True)[1:]
        app.parse_args(tokens, exit_on_error=False, print_error=False)


def test_readme_shows_five_commands():
    assert len(shell_commands(README)) == 5


def test_every_file_of_a_run_and_every_column_is_described(finished):
    page = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[\w.]+", page))
    words |= {
        f"{rate}{side}"
        for rate in ("safe_helpful_proxy", "refusal", "degenerate")
        for side in ("_before", "_after")
        if {rate, side} <= words
    }
    tables = sorted(finished.glob("*.csv"))
    assert tables
    for path in finished.iterdir():
        name = path.name.replace("fraud", "CATEGORY")
        assert f"{name}/" in page if path.is_dir() else name in words, name
    for path in tables:
        with path.open(encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file))
        assert set(columns) <= words, f"{path.name}: {set(columns) - words}"
