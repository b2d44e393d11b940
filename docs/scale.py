"""Write the tables of docs/scale.md from the cost model.

python docs/scale.py          # writes them
python docs/scale.py --check  # fails where the page is not what it would write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workbench.engines.architecture import known_models  # noqa: E402
from workbench.engines.cost import HARDWARE  # noqa: E402
from workbench.engines.plan import Plan, make_plan  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
ON_SMALL = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
WIDEST = "llama-3.1-70b"


def main(arguments: list[str] | None = None) -> int:
    """Write the tables, or compare them with the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if they differ")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    written = with_tables(page)
    if options.check:
        return int(written != page)
    PAGE.write_text(written, encoding="utf-8")
    return 0


def with_tables(page: str) -> str:
    """Put each table between its marks."""
    for name, table in tables().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return page


def tables() -> dict[str, str]:
    """Make all tables, by the names of their marks."""
    big = [n for n in known_models() if n not in ON_SMALL[:-1]]
    gpus = [name for name in HARDWARE if name.startswith("nvidia")]
    return {
        "models on eight H100": _models(big, "nvidia-h100"),
        "one model on several machines": _machines(WIDEST, gpus),
        "models on two cores": _models(ON_SMALL, "two-cores"),
    }


def _models(names: Sequence[str], hardware: str) -> str:
    header = (
        "model", "parameters (of a token)", "GB", "devices", "caching h", "answers h",
        "judging h", "PFLOP", "disk GB", "network GB", "machines in a day", "a second pays from",
    )  # fmt: skip
    rows = []
    for name in names:
        plan = make_plan(name, hardware)
        sizes = f"{_billions(plan.model.parameters)} ({_billions(plan.model.active_parameters)})"
        rows.append((name, sizes, *_numbers(plan)))
    return _table(header, rows)


def _machines(model: str, names: Sequence[str]) -> str:
    header = (
        "machine", "GB", "devices", "caching h", "answers h", "judging h", "PFLOP", "disk GB",
        "network GB", "machines in a day", "a second pays from",
    )  # fmt: skip
    return _table(header, [(name, *_numbers(make_plan(model, name))) for name in names])


def _numbers(plan: Plan) -> tuple[str, ...]:
    weights = plan.model.parameters * plan.work.weight_bytes / 1e9
    caching, answers, judging = plan.costs
    hours = (_rounded(cost.seconds / 3600) for cost in (caching, answers, judging))
    return (
        f"{weights:.3g}",
        f"{plan.fit.devices}",
        *hours,
        f"{sum(cost.flops for cost in plan.costs) / 1e15:,.0f}",
        f"{sum(cost.disk for cost in plan.costs) / 1e9:.0f}",
        f"{sum(cost.network for cost in plan.costs) / 1e9:,.0f}",
        f"{plan.machines}",
        _rounded(plan.pays_from),
    )


def _rounded(n: float) -> str:
    """Write two digits that count, and no power of ten."""
    return f"{float(f'{n:.2g}'):,.7g}"


def _billions(n: float) -> str:
    return f"{n / 1e9:.3g} B"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
