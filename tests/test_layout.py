"""The folders, files and functions stay as small and as findable as CONTRIBUTING.md says."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "workbench"
FOLDERS = {
    "files", "stats", "figures", "prompts", "models", "steering", "judges", "generation",
    "engines", "neurons", "evaluation", "safesteer", "report", "integrations",
}  # fmt: skip
SOURCES = sorted(
    path
    for folder in ("workbench", "tests", "benchmarks", "examples", "docs")
    for path in (ROOT / folder).rglob("*.py")
)


def test_the_package_holds_its_folders_and_its_entry_points_only() -> None:
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert names == FOLDERS | {"__init__.py", "__init__.pyi", "__main__.py", "cli.py", "py.typed"}
    for folder in FOLDERS:
        assert {"__init__.py", "__init__.pyi"} <= {
            path.name for path in (PACKAGE / folder).iterdir()
        }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_over_600_lines_and_no_function_over_60(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60]
    assert not long, f"over 60 lines: {long}"


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folders_stub_lists_sorted_names_that_exist(folder: str) -> None:
    import importlib

    tree = ast.parse((PACKAGE / folder / "__init__.pyi").read_text(encoding="utf-8"))
    listed = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    imported = {a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert set(listed) == imported
    modules = {path.stem for path in (PACKAGE / folder).glob("*.py")}
    assert not modules & imported, "a function with the name of a module would hide it"
    if folder != "integrations":  # its libraries are extras
        package = importlib.import_module(f"workbench.{folder}")
        for name in listed:
            assert getattr(package, name) is not None


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_no_notebook_imports_below_a_folder(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not re.findall(r"(?:from|import) workbench\.\w+\.\w+", source)
    assert not re.findall(r"\bwb\.\w+\.\w+\.\w+\(", source)


def test_prose_is_wrapped_at_100() -> None:
    """Tables, links, code and picture lines may be longer."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            is_table_or_link = line.lstrip().startswith(("|", "[", "![", "<")) or "](" in line
            assert len(line) <= 100 or is_table_or_link, f"{page.name}:{number}"


def test_both_environments_have_the_same_versions_but_for_transformer_lens() -> None:
    pins = [
        set((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("constraints.txt", "constraints-tl3.txt")
    ]
    differing = {line.partition("==")[0] for line in pins[0] ^ pins[1]}
    assert differing == {"transformer-lens", "better-abc"}
    assert "transformer-lens==3.9.0" in pins[1]
