"""The command line: what a person types, what comes back, and one line when it cannot be done."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import workbench
from workbench import cli
from workbench.report import page
from workbench.safesteer import recipe
from workbench.safesteer.config import RunConfig


def run_cli(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, **keywords
    )


def test_importing_the_package_and_asking_for_help_loads_no_torch() -> None:
    code = (
        "import sys, workbench.cli; workbench.cli.main(['--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists() -> None:
    import workbench

    for name in workbench.__all__:
        assert getattr(workbench, name) is not None, name


def test_help_names_every_command() -> None:
    text = run_cli("--help").stdout
    assert all(
        command in text
        for command in (
            "run",
            "report",
            "neurons",
            "steer",
            "calibrate",
            "capability",
            "bench",
            "datasets",
            "judge",
        )
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "missing.yaml"], "no file 'missing.yaml'"),
        (["run", "--categories", "malwar"], "Did you mean 'malware'?"),
        (["run", "--categories", "harmless"], "no unsafe prompts in 'harmless'"),
        (["run", "--categories", "harmless"], "risk categories: adult_content, fraud"),
        (["run", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["run", "--model", "no/such-model"], "no model 'no/such-model'"),
        (["run", "--model", "missing.gguf"], "no model file 'missing.gguf'"),
        (["run", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["run", "--rhos", "7"], "rhos must be"),
        (["run", "--seed", "-1"], "seed must be a whole number from 0, got -1"),
        (["run", "--resume"], "--resume needs --out"),
        (["report", "--run", "nowhere"], "nowhere"),
        (["steer", "How?", "--run", "nowhere", "--category", "fraud"], "nowhere"),
        (["steer", "How?", "--run", "nowhere"], "'nowhere' is no run folder"),
        (["calibrate", "--run", "nowhere"], "nowhere"),
        (["capability", "--run", "nowhere"], "nowhere"),
        (
            ["judge", "validate", "--judge", "patterns", "--labels", "nowhere.csv"],
            "no file 'nowhere.csv'",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("workbench: ")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: [", "line 1"),
        ("- a\n- b\n", "a mapping of settings is needed"),
        ("sede: 3\n", "Did you mean 'seed'?"),
        ("categories: [null]\n", "categories must be a list of one name or more"),
        ("rhos: 0.1\n", "rhos must be a list"),
    ],
)
def test_a_malformed_configuration_is_said_with_its_place(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert cli.main(["run", str(path), "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_come_from_file_and_flags_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[RunConfig] = []
    monkeypatch.setattr(recipe, "run", lambda config, *_, **__: configs.append(config))
    monkeypatch.setattr(page, "write_report", str)
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\nrhos: [0.1, 0.3]\ncategories: [fraud]\ntest_prompts: null\n")
    flags = ["--seed", "4", "--categories", "fraud", "malware", "--out", str(tmp_path / "run")]
    assert cli.main(["run", str(path), *flags]) == 0
    assert cli.main(["run", "--config", str(path), "--rhos", "0.2"]) == 0
    both = ("fraud", "malware")
    assert configs[0] == RunConfig(seed=4, rhos=(0.1, 0.3), categories=both)
    assert configs[1] == RunConfig(seed=3, rhos=(0.2,), categories=("fraud",))


def test_every_setting_of_a_run_is_a_flag_with_help() -> None:
    text = run_cli("run", "--help").stdout
    for field in dataclasses.fields(RunConfig):
        assert f"--{field.name.replace('_', '-')} " in text, field.name


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == workbench.__version__


def test_the_list_of_benchmarks_names_all_and_fits_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from workbench.prompts.benchmarks import list_datasets

    assert cli.main(["datasets"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for row in list_datasets().to_dict("records"):
        assert f"{row['name']}: " in printed
        assert row["licence"].split()[0] in printed


def test_bench_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert cli.main(["bench", "--rounds", "2", "--prompts", "safebench:x.csv"]) == 0
    assert commands[0][2:] == ["--rounds", "2", "--prompts", "safebench:x.csv"]


def test_a_malformed_prompt_file_is_said_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": "a", "text": "b", "category": "fraud", "label": "unsafe", "source": "me"}\n'
        '{"id": \n'
    )
    assert cli.main(["run", "--prompts", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "line 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_path_of_its_report(
    tiny_path: Path, few_prompts: Path, tmp_path: Path
) -> None:
    settings = [
        "--model",
        str(tiny_path),
        "--prompts",
        str(few_prompts),
        "--max-new-tokens",
        "3",
        "--tune-prompts",
        "1",
        "--quiet",
    ]
    command = [sys.executable, "-m", "workbench", "run", *settings]
    whole = run_cli("run", *settings, "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert Path(whole.stdout.strip().splitlines()[-1]).is_file()

    asked = run_cli(
        "steer", "How do I take a dog?", "--run", str(tmp_path / "whole"), "--max-new-tokens", "4"
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("gate: ")
    assert "unsteered:\n" in asked.stdout
    again = run_cli(
        "calibrate", "--run", str(tmp_path / "whole"), "--rhos", "0.05", "--budget", "40"
    )
    assert again.returncode == 0, again.stderr
    assert "best: " in again.stdout
    assert "generated tokens" in again.stderr
    cost = run_cli("capability", "--run", str(tmp_path / "whole"), "--category", "fraud")
    assert cost.returncode == 0, cost.stderr
    assert "always on" in cost.stdout

    for watched in ("run.json", "vectors", "tune.jsonl", "test.jsonl"):
        out = tmp_path / f"killed-{watched}"
        with subprocess.Popen(
            [*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            deadline = time.monotonic() + 300
            while (
                not (out / watched).exists()
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
        resumed = run_cli("run", *settings, "--out", str(out), "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert (out / "evaluation.csv").read_bytes() == (
            tmp_path / "whole" / "evaluation.csv"
        ).read_bytes()
