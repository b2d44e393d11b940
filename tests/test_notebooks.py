"""The committed notebooks: executed without errors, readable offline, true when run again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.models.packaged import is_installed

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def printed(cell: Any) -> str:
    """Return what a cell prints as text, and the text of the value it ends with."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif "data" in output and "application/vnd.plotly.v1+json" not in output.data:
            parts.append(str(output.data.get("text/plain", "")))
    # Addresses in memory, and how large a picture is: the renderer decides that.
    return re.sub(r"0x[0-9a-f]+|(?:Picture|Html)\([^)]*\)", "", "\n".join(parts))


NUMBER = re.compile(r"[-+−]?\d*\.?\d+(?:e[-+]?\d+)?")
CLOSE = 0.06
"""Largest difference of two numbers, absolute or as a share: one greedy answer of eighteen that
another processor's rounding turns, but no other result."""


def differences(before: str, after: str) -> list[tuple[str, str]]:
    """Compare printed tables number by number; where words differ, an answer may read otherwise."""
    first, second = (
        [float(n.replace("−", "-")) for n in NUMBER.findall(text)] for text in (before, after)
    )
    if len(first) != len(second):
        lines = [len(text.splitlines()) for text in (before, after)]
        return [] if lines[0] == lines[1] else [(before, after)]
    far = [
        (str(a), str(b))
        for a, b in zip(first, second, strict=True)
        if abs(a - b) > CLOSE * max(1.0, abs(a))
    ]
    return far if len(far) > len(first) // 50 else []


def test_a_table_with_another_result_is_noticed_and_one_of_other_rounding_is_not() -> None:
    table = "condition  value\nunsteered .17 [.05, .45]\nsteered .33 [.16, .56] n=18"
    assert not differences(table, table.replace(".33", ".35"))
    assert differences(table, table.replace(".33", ".66"))
    assert differences(table, table + "\nrandom .17")
    assert differences("-0.91", "0.91")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_from_top_to_bottom_without_errors(path: Path) -> None:
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_loads_nothing_from_the_network_and_names_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"""<(script|link|img|iframe)[^>]+(src|href)=\\?["']https?:""", text)
    assert not re.search(r"/(home|root|work|tmp)/\w", text)


QWEN = "qwen2.5-coder-0.5b"


def run_again(notebook: Any, folder: Path) -> None:
    """Execute a notebook in place, without what it printed before."""
    from nbclient import NotebookClient

    for cell in code_cells(notebook):
        cell.outputs = []
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_again(path: Path, real_model: Any, tmp_path: Path) -> None:
    if QWEN in path.read_text(encoding="utf-8") and not is_installed(QWEN):
        pytest.skip(f"it was executed on {QWEN}, which 'make models' installs")
    notebook = nbformat.read(path, as_version=4)
    committed = [printed(cell) for cell in code_cells(notebook)]
    run_again(notebook, tmp_path)
    for number, (before, cell) in enumerate(zip(committed, code_cells(notebook), strict=True), 1):
        assert not differences(before, printed(cell)), f"cell {number}"


WITHOUT_QWEN = f"""
from dataclasses import replace
from workbench.models.packaged import PACKAGED
PACKAGED["{QWEN}"] = replace(PACKAGED["{QWEN}"], packages=("no-such-package==1",))
"""


@pytest.mark.slow
def test_the_notebook_of_a_larger_model_runs_on_the_embedded_one_too(
    real_model: Any, tmp_path: Path
) -> None:
    path = next(path for path in NOTEBOOKS if QWEN in path.read_text(encoding="utf-8"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(WITHOUT_QWEN))
    run_again(notebook, tmp_path)
    assert "SmolLM2-135M-Instruct" in printed(code_cells(notebook)[1])
