"""One run of the speed benchmark writes its whole page, and names what failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SECTIONS = (
    "## Targets",
    "## Peers",
    "### Extraction, short prompts",
    "### Extraction, long texts",
    "### Answers and the gate",
    "### Sweep",
    "### Attribution",
    "### Scoring",
    "### The machine's limits",
    "### Peak memory",
    "## One core",
    "## Growth with the number of prompts and their length",
    "## GPU",
    "## make demo",
)


@pytest.fixture(scope="module")
def speed() -> Any:
    """The script, with its folder on the path as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import speed

        yield speed


@pytest.fixture(scope="module")
def results(speed: Any, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a quick run on a tiny model, with two peers that fail and one that works."""
    import torch

    out, threads = tmp_path_factory.mktemp("bench"), torch.get_num_threads()
    (out / "RESULTS.md").write_text("of another run\n", encoding="utf-8")
    options = [
        *("--quick", "--threads", "1", "--models", str(tiny_path), "not-installed"),
        *("--peer", "nnsight=/nowhere/bin/python", "--peer", f"repeng={sys.executable}"),
        *("--peer", f"hugging-face={sys.executable}", "--out", str(out)),
    ]
    try:
        assert speed.main(options) == out / "RESULTS.md"
    finally:
        torch.set_num_threads(threads)
    return out


def test_one_run_writes_the_page_whole(results: Path) -> None:
    page = (results / "RESULTS.md").read_text(encoding="utf-8")
    missing = [section for section in SECTIONS if section not in page]
    assert not missing
    assert "of another run" not in page
    assert "A quick run" in page
    assert "not-installed is left out" in page


def test_every_contender_did_the_same_work(results: Path) -> None:
    found = json.loads((results / "results.json").read_text(encoding="utf-8"))
    [model] = [one for one in found["models"].values() if "left out" not in one]
    parts = ("extraction", "long", "generation", "sweep", "attribution", "scoring")
    works = [one for part in parts for one in model[part]["works"]]
    works += [one for part in model["one core"].values() for one in part["works"]]
    for one in works:
        assert len(one["checks"]) > 1
        differing = {name: c["words"] for name, c in one["checks"].items() if not c["same"]}
        assert not differing, one["title"]
        assert all(len(times["cpu"]) == 1 for times in one["times"].values())
    names = {name.split(" ")[0] for one in model["extraction"]["works"] for name in one["times"]}
    assert {"raw", "workbench", "TransformerLens", "hugging-face"} <= names


def test_a_peer_that_fails_is_named_with_its_reason(results: Path) -> None:
    page = (results / "RESULTS.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert "No such file" in rows["nnsight"]
    assert "No module named 'repeng'" in rows["repeng"]
    assert "FAILED" in rows["nnsight"]
    assert "FAILED" in rows["repeng"]
    assert "not in this run" in rows["steering-vectors"]


def test_a_target_is_met_only_by_what_was_measured(speed: Any) -> None:
    import speed_report

    def model(ours: float) -> dict[str, Any]:
        times = {
            "raw Hugging Face hooks": {"cpu": [4.0, 5.0, 4.0]},
            "workbench": {"cpu": [ours] * 3},
        }
        return {"extraction": {"works": [{"clock": "cpu", "times": times}]}}

    def row(ours: float) -> str:
        lines = speed_report._targets({"models": {"small": model(ours)}})
        return next(line for line in lines if "short prompts, small" in line)

    assert "| >= 3.70 | 4.00 [4.00, 5.00] | met |" in row(1.0)
    assert "| >= 3.70 | 2.00 [2.00, 2.50] | **not met** |" in row(2.0)
    lines = speed_report._targets({"models": {"small": {}}})
    assert sum("not measured in this run" in line for line in lines) == len(lines) - 5


def test_a_contender_that_computes_something_else_is_found_out(speed: Any) -> None:
    import speed_measure as measure
    import torch

    rows = {("resid_post", 0): torch.tensor([[3.0, 4.0], [1.0, 0.0]])}
    off = {("resid_post", 0): rows["resid_post", 0] + torch.tensor([[0.0, 0.0], [1e-3, 0.0]])}
    contenders = {
        "raw": measure.Contender(lambda: rows),
        "same": measure.Contender(lambda: rows),
        "off": measure.Contender(lambda: off),
        "few": measure.Contender(dict),
    }
    found = measure.work("reading", contenders, measure.same_values, 2, amount=3)
    assert {name: check["same"] for name, check in found["checks"].items()} == {
        "raw": True,
        "same": True,
        "off": False,
        "few": False,
    }
    assert "1.0e-03" in found["checks"]["off"]["words"]
    assert (
        measure.same_tokens([[1, 2], [3]], [[1, 2], [4]]).words == "tokens equal in 1 of 2 answers"
    )


def test_a_contender_that_breaks_off_leaves_the_others_measured(speed: Any) -> None:
    import speed_measure as measure

    runs = iter([[[1]], [[1]]])

    def breaks() -> Any:
        result = next(runs, None)
        if result is None:
            raise measure.PeerFailed("it ended: out of memory")
        return result

    contenders = {"raw": measure.Contender(lambda: [[1]]), "peer": measure.Contender(breaks)}
    found = measure.work("answers", contenders, measure.same_tokens, 3, amount=1)
    assert list(found["times"]) == ["raw"]
    assert len(found["times"]["raw"]["cpu"]) == 3
    assert found["failed"] == {"peer": "it ended: out of memory"}


def test_a_gpu_is_waited_for_before_and_after_the_clock(
    speed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import speed_measure as measure
    import torch

    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    spent = measure.timed(lambda: order.append("run"))
    assert order == ["wait", "run", "wait"]
    assert min(spent) >= 0


def test_peers_are_found_where_make_bench_peers_puts_them(speed: Any) -> None:
    from speed_workers import environments

    makefile = (BENCHMARKS.parent / "Makefile").read_text(encoding="utf-8")
    [made] = [line for line in makefile.splitlines() if line.startswith("PEERS :=")]
    known = environments(["nnsight=/other/python"], all_known=True)
    assert set(known) == set(made.split()[2:])
    assert known["nnsight"] == "/other/python"
    for name in known:
        assert (BENCHMARKS / "peers" / f"{name}.txt").is_file()
    assert ".venv-bench-%/.ready:" in makefile
    assert known["repeng"] == str(BENCHMARKS.parent / ".venv-bench-repeng/bin/python")
    with pytest.raises(ValueError, match="NAME=PYTHON, got 'nnsight'"):
        environments(["nnsight"], all_known=False)
