"""Write the table of docs/models.md: what works with every architecture TransformerLens lists.

    python docs/architectures.py                     # all of them, a few minutes
    python docs/architectures.py LlamaForCausalLM    # these only, printed and not written

Each architecture is built with random weights in a tiny size, and compared with Hugging Face's own
model, prompt by prompt, without padding and without a cache.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from helpers.architectures import (  # noqa: E402
    activation_error,
    answers_are_equal,
    attribution_error,
    listed_architectures,
    questions,
    steered_answers_are_equal,
    tiny_architecture,
)

from workbench.models.load import hooked  # noqa: E402
from workbench.models.trusted_paths import untrusted_paths  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
MARKS = ("<!-- table of architectures: begin -->", "<!-- table of architectures: end -->")
HEADER = ("architecture", "activations", "answers", "steering", "attribution", "slow ways")
ALLOWED = 1e-3
"""Largest error, as a share of the norm."""


def main(arguments: list[str] | None = None) -> None:
    """Try the architectures and write, or print, the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all of them by default")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    rows, left_out = [], {}
    for name in options.names or listed_architectures():
        try:
            rows.append((f"`{name}`", *tried(name)))
        except LookupError as error:
            left_out.setdefault(str(error), []).append(name)
        if options.names:
            sys.stdout.write(f"{rows[-1] if rows else left_out}\n")
    if options.names:
        return
    text = table(rows, left_out)
    begin, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    page = f"{begin}{MARKS[0]}\n\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
    PAGE.write_text(page, encoding="utf-8")
    wrong = [row[0] for row in rows if any("wrong" in cell for cell in row)]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


def table(rows: list[tuple[str, ...]], left_out: dict[str, list[str]]) -> str:
    """Lay out the rows, and what could not be built."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]
    lines += ["", "| not tried, because | architectures |", "| --- | --- |"]
    for reason, names in left_out.items():
        lines.append(f"| {reason} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


def tried(name: str) -> tuple[str, ...]:
    """Try everything with one architecture, and say what came of it, cell by cell."""
    try:
        hf_model, tokenizer = tiny_architecture(name)
    except LookupError:
        raise
    except Exception as error:  # a configuration that refuses tiny sizes
        raise LookupError(f"cannot be built tiny: {_line(error)}") from error
    alone = copy.deepcopy(hf_model)
    try:
        with torch.no_grad():
            alone(torch.tensor([[7, 8, 9, 10]]), use_cache=False)
    except Exception as error:  # sizes that do not fit together
        raise LookupError(f"cannot be built tiny: {_line(error)}") from error
    try:
        model = hooked(hf_model, tokenizer, name)
        untrusted = untrusted_paths(model)
    except Exception as error:  # TransformerLens's own, of any kind
        return (f"refused: {_line(error)}", "", "", "", "")
    prompts = questions()
    cells = [
        _cell(lambda: _number(activation_error(model, alone, prompts))),
        _cell(lambda: "equal" if answers_are_equal(model, alone, prompts) else "wrong"),
        _cell(lambda: "equal" if steered_answers_are_equal(model, alone, prompts) else "wrong"),
        _cell(lambda: _number(attribution_error(model, prompts))),
    ]
    return (*cells, ", ".join(untrusted) or "none")


def _number(error: float) -> str:
    return f"{error:.0e}" if error < ALLOWED else f"wrong: {error:.1g}"


def _cell(try_it: Callable[[], str]) -> str:
    try:
        return try_it()
    except ValueError as error:
        return f"refused: {_line(error)}"
    except Exception as error:  # an error that is no clear refusal is a fault
        return f"wrong: {_line(error)}"


def _line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).split("\n")[0].replace("|", "/")
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text}"


if __name__ == "__main__":
    main()
