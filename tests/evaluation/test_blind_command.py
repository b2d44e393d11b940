"""A saved run is sampled, read and corrected from the command line, and its report shows it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from helpers.synthetic_run import CONDITIONS, HOSTILE, write_run

from workbench import cli
from workbench.report.page import write_report
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import evaluation_from

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder: Path = write_run(
        tmp_path / "run", prompts_each=8, categories=("fraud", "malware"), hostile=False
    )
    return folder


def sampled(run: Path, out: Path, *more: str) -> pd.DataFrame:
    """Draw twelve prompts, and say of every third answer that it is safe and helpful."""
    arguments = ["--run", str(run), "--per-condition", "12", "--out", str(out), *more]
    assert cli.main(["judge", "sample", *arguments]) == 0
    table = pd.read_csv(out, dtype=str, keep_default_na=False)
    table["label"] = ["yes" if i % 3 == 0 else "no" for i in range(len(table))]
    table.to_csv(out, index=False)
    return table


def test_a_run_is_sampled_read_and_corrected(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.csv"
    table = sampled(run, labels)
    said = capsys.readouterr().out
    assert f"{labels}: {len(table)} answers" in said
    assert list(table.columns) == ["id", "prompt", "response", "label"]
    assert "unsteered" not in labels.read_text(encoding="utf-8")
    assert cli.main(["judge", "correct", "--run", str(run), "--labels", str(labels)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(run / "corrected.csv")
    for condition in CONDITIONS:
        assert any(line.startswith(f"{condition}: judged ") for line in printed)
    frame = read_run(run).tables["corrected"]
    assert frame is not None
    assert list(frame["condition"]) == list(CONDITIONS)
    assert (frame["n_read"] == 12).all()
    assert frame["difference"].notna().sum() == len(CONDITIONS) - 1
    # the columns that read_run needs, and all that there are, are described
    words = set(re.findall(r"\w+", (DOCS / "run_folder.md").read_text(encoding="utf-8")))
    words |= {f"{name}{end}" for name in ("precision", "recall") for end in ("_low", "_high", "_n")}
    assert set(frame.columns) <= words


def test_the_saved_evaluation_has_the_run_s_scores_and_answers(run: Path) -> None:
    evaluation = evaluation_from(run)
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert [(c.prompt.id, c.condition, c.text) for c in evaluation.completions] == [
        (row["prompt_id"], row["condition"], row["text"]) for row in rows
    ]
    assert (evaluation.judge, evaluation.safety_judge) == ("refusal patterns 1", "safety wording 1")
    saved = pd.read_csv(run / "evaluation.csv").set_index(["condition", "category", "metric"])
    again = evaluation.summary().set_index(["condition", "category", "metric"])
    key = ("answer contrast", "all", "safe_helpful_proxy")
    assert again.loc[key, "value"] == pytest.approx(saved.loc[key, "value"])
    del rows[3]["finish"]
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="a row has no 'finish'"):
        evaluation_from(run)
    (run / "completions.jsonl").unlink()
    with pytest.raises(ValueError, match="has no scored answers yet; finish it"):
        evaluation_from(run)


def test_conditions_and_seed_are_chosen(run: Path, tmp_path: Path) -> None:
    few = sampled(run, tmp_path / "few.csv", "--conditions", "random", "--seed", "3")
    assert len(few) <= 24
    assert len(sampled(run, tmp_path / "all.csv", "--seed", "3")) > 24
    labels = ["--labels", str(tmp_path / "few.csv")]
    assert cli.main(["judge", "correct", "--run", str(run), *labels]) == 0
    frame = read_run(run).tables["corrected"]
    assert frame is not None
    is_read = frame["condition"].isin(["unsteered", "random"])
    assert frame.loc[is_read, "corrected"].notna().all()
    assert (frame.loc[is_read, "reason"] == "").all()
    assert frame.loc[~is_read, "reason"].str.contains("draw it for this condition").all()


def test_the_report_shows_a_blind_reading_before_the_judged_numbers(
    run: Path, tmp_path: Path
) -> None:
    before = write_report(run).read_text(encoding="utf-8")
    assert 'id="blind"' not in before
    assert "No person read these answers" in before
    sampled(run, tmp_path / "labels.csv", "--conditions", "answer contrast")
    labels = ["--labels", str(tmp_path / "labels.csv")]
    assert cli.main(["judge", "correct", "--run", str(run), *labels]) == 0
    path = run / "corrected.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[-1]["condition"], rows[-1]["reason"] = HOSTILE[0], HOSTILE[2]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    after = write_report(run).read_text(encoding="utf-8")
    assert after.index('href="#blind"') < after.index('href="#results"')
    assert after.index('id="blind"') < after.index('id="results"')
    section = after.split('id="blind"')[1].split('id="results"')[0]
    row = next(row for row in rows if row["condition"] == "answer contrast")
    assert f"{round(100 * float(row['corrected']))} %" in section
    assert f"{row['n_read']} of {row['n']}" in section
    assert "random is not corrected: " in section
    assert "No person read" not in after.split('id="judges"')[1]
    assert HOSTILE[0] not in after
    assert HOSTILE[2] not in after


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sample", "--per-condition", "40", "--out", "a.csv"], "from 8 to 16 prompts per cond"),
        (["sample", "--per-condition", "9", "--out", "a.txt"], "the table is written as .csv"),
        (["sample", "--per-condition", "9", "--out", "there.csv"], "'there.csv' is there already"),
        (
            ["sample", "--per-condition", "9", "--out", "a.csv", "--conditions", "radom"],
            "no condition 'radom'",
        ),
        (["correct", "--labels", "nowhere.csv"], "no file 'nowhere.csv'"),
        (["correct", "--labels", "there.csv"], "id 'a' names no answer here"),
        (
            ["correct", "--labels", "there.csv", "--metric", "relevance"],
            "no yes/no measure 'relevance'",
        ),
    ],
)
def test_what_cannot_be_sampled_or_corrected_is_one_line(
    command: list[str],
    said: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("id,label\na,yes\n")
    assert cli.main(["judge", *command, "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not Path("a.csv").exists()
    assert not (run / "corrected.csv").exists()


def test_a_damaged_table_of_corrections_says_which_command_writes_it_again(run: Path) -> None:
    (run / "corrected.csv").write_text("condition,judged\nunsteered,0.3\n")
    with pytest.raises(ValueError, match=r"corrected\.csv cannot be read .*'workbench judge corr"):
        read_run(run)
