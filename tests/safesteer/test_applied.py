"""Ways of applying vectors, asked for by name: in a run, resumed or not, and in a calibration."""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.category_vectors import SITE, questions, vectors_of, with_targets
from helpers.runs import settings

from workbench import cli
from workbench.files.store import read_json, write_json
from workbench.generation import answers as generation
from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_kl
from workbench.models.sites import Site
from workbench.report import page
from workbench.safesteer import inputs, recipe
from workbench.safesteer.config import RunConfig, config_from
from workbench.safesteer.constructions import CONSTRUCTIONS, settings_to_try
from workbench.safesteer.paper import settings_of
from workbench.safesteer.recalibration import recalibrate
from workbench.safesteer.recipe import run
from workbench.safesteer.run_folder import RunFolder
from workbench.safesteer.saved_run import steering_from
from workbench.safesteer.settings import WAYS, grid, raw_grid, steering, variants_of

PLACES = [(SITE,), (SITE, Site(2, "resid_post"))]
NAMES = ["prompt_contrast", "answer_contrast", "sea"]
ASKED = ("add", "norm_kept", "first", "target")


def the_run(few_prompts: Path, **changes: Any) -> RunConfig:
    how = {"constructions": ("answer_contrast",), "applied": ASKED, "applied_tokens": 2, **changes}
    return settings(few_prompts, **how)


def test_the_default_tries_exactly_what_was_tried_before_there_were_names(tiny: Any) -> None:
    config = RunConfig(rhos=(0.1, 0.2))
    of_grid = [
        s
        for name in NAMES
        for s in grid(
            [name],
            PLACES,
            CONSTRUCTIONS[name].rhos or (0.1, 0.2),
            signs={name: CONSTRUCTIONS[name].signs},
        )
    ]
    assert settings_of(config, {}, NAMES, PLACES) == of_grid
    assert {(s.positions, s.until, s.is_plain) for s in of_grid} == {("all", None, True)}
    vectors = vectors_of(tiny)
    raw = settings_of(RunConfig(multipliers=(-1.0, 2.0)), vectors, ["a", "b"], [(SITE,)])
    assert raw == raw_grid(vectors, ["a", "b"], [(SITE,)], [-1.0, 2.0])
    assert [(s.sign, s.multiplier) for s in raw] == [(-1, 1.0), (1, 2.0)] * 2


def test_every_way_computes_something_of_its_own(tiny: Any) -> None:
    vectors = with_targets(vectors_of(tiny, ["a"]))
    config = RunConfig(rhos=(0.8,), applied=tuple(WAYS), applied_tokens=3, max_new_tokens=8)
    tried = settings_of(config, vectors, ["a"], [(SITE,)])
    assert len(tried) == len(WAYS)
    (answer,) = generate(tiny, questions(1)[:1], decoding=Decoding(max_new_tokens=8))
    assert len(answer.tokens) > 4
    conditions = {name: [steering(vectors, s)["fraud"]]
                  for name, s in zip(WAYS, tried, strict=True)}  # fmt: skip
    effects = answer_kl(tiny, [answer], conditions)
    assert min(effects.values()) > 0
    for (name, one), (other, another) in itertools.combinations(effects.items(), 2):
        assert one != pytest.approx(another, rel=1e-3), (name, other)


def test_the_number_of_tokens_is_that_of_the_ways_that_are_counted() -> None:
    ends = {name: variants_of([name], 5, longest=64)[0].get("until") for name in WAYS}
    assert {name for name, end in ends.items() if end == 5} == {"first", "linear", "altsteer"}
    assert {end for name, end in ends.items() if not WAYS[name].is_counted} == {None}


def test_a_way_that_comes_again_counts_once() -> None:
    assert variants_of(["add", "sqrt", "add"], 5, longest=64) == [{}, {"decay": "sqrt"}]


def test_raw_multiples_are_applied_in_the_same_ways_but_for_a_target(tiny: Any) -> None:
    vectors = vectors_of(tiny, ["a"])
    ways = tuple(name for name in WAYS if name != "target")
    config = RunConfig(multipliers=(-1.0, 2.0), applied=ways)
    tried = settings_of(config, vectors, ["a"], [(SITE,)])
    of_each = variants_of(ways, 24, longest=64)
    plain = raw_grid(vectors, ["a"], [(SITE,)], [-1.0, 2.0])
    assert [(s.sign, s.multiplier) for s in plain] == [(-1, 1.0), (1, 2.0)]
    assert tried == [one._replace(**fields) for one in plain for fields in of_each]
    for multiplier in (-1.0, 2.0):
        with pytest.raises(ValueError, match="takes no decay and no keep_norm, nor a raw multiple"):
            raw_grid(vectors, ["a"], [(SITE,)], [multiplier], variants=[{"form": "target"}])


def test_an_edit_is_tried_in_the_ways_that_it_has_and_plainly_where_it_has_none() -> None:
    def ways(*applied: str) -> set[tuple[str, int | None]]:
        config = RunConfig(rhos=(0.1,), applied=applied, applied_tokens=6)
        tried = settings_of(config, {}, ["sea"], [(SITE,)])
        assert tuple(dict.fromkeys(s.rho for s in tried)) == CONSTRUCTIONS["sea"].rhos
        assert all(s.is_plain for s in tried)
        return {(s.positions, s.until) for s in tried}

    assert ways("generated", "first", "linear") == {("generated", None), ("all", 6)}
    assert ways("linear", "norm_kept", "target") == {("all", None)}
    extents: Any = {"extents": [("prompt", None)], "variants": [{"keep_norm": True}]}
    assert {s.positions for s in settings_to_try(["sea"], [(SITE,)], [], **extents)} == {"prompt"}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"applied": ["norm_keep"]}, "unknown way .* 'norm_keep'; known: add, .*mean 'norm_kept'"),
        ({"applied": "add"}, "applied must be a list"),
        ({"applied": []}, "applied must be a list of one name or more"),
        ({"applied_tokens": 0}, "applied_tokens must be a whole number from 1"),
        ({"applied_tokens": 2.5}, "applied_tokens must be a whole number from 1"),
        ({"applied": ["first"], "max_new_tokens": 25}, "'first' with applied_tokens 24 does noth"),
        ({"applied": ["sqrt"], "max_new_tokens": 2}, "'sqrt' does nothing of its own"),
        ({"applied": ["generated"], "max_new_tokens": 1}, "'generated' does nothing of its own"),
        ({"applied": ["target"], "multipliers": [1.0]}, "give rhos in place of multipliers"),
        ({"applied": ["add", "target"], "preset": "paper"}, "takes no raw multiples"),
    ],
)
def test_a_way_that_cannot_be_asked_for_is_named(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from(mapping)


def test_ways_that_just_fit_into_an_answer_are_taken() -> None:
    assert RunConfig(applied=("first",), applied_tokens=24, max_new_tokens=26).applied == ("first",)
    assert RunConfig(applied=("generated",), max_new_tokens=2).max_new_tokens == 2
    assert (
        RunConfig(applied=("linear",), applied_tokens=512, max_new_tokens=8).applied_tokens == 512
    )
    assert RunConfig(applied=("target",), preset="paper", rhos=(0.1,)).multipliers is None


def test_a_bad_way_fails_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inputs, "load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert cli.main(["run", "--applied", "adds", "--out", str(tmp_path / "run")]) == 2
    assert "Did you mean 'add'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ways_come_from_the_file_as_a_list_and_from_flags_which_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[RunConfig] = []
    monkeypatch.setattr(recipe, "run", lambda config, *_, **__: configs.append(config))
    monkeypatch.setattr(page, "write_report", str)
    path = tmp_path / "config.yaml"
    path.write_text("applied: [norm_kept, first]\napplied_tokens: 9\n")
    out = ["--out", str(tmp_path / "run")]
    assert cli.main(["run", str(path), *out]) == 0
    assert cli.main(["run", str(path), "--applied", "add", "target", *out]) == 0
    flags = ["--applied", "linear", "--applied-tokens", "12"]
    assert cli.main(["run", *flags, *out]) == 0
    assert cli.main(["run", *out]) == 0
    assert [(c.applied, c.applied_tokens) for c in configs] == [
        (("norm_kept", "first"), 9),
        (("add", "target"), 9),
        (("linear",), 12),
        (("add",), 24),
    ]


def test_the_help_and_the_page_of_vectors_name_every_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = re.search(r"applied: ways.*?applied_tokens:", str(RunConfig.__doc__), re.DOTALL)
    assert said is not None
    docs = Path(__file__).resolve().parents[2] / "docs" / "vectors.md"
    for name in WAYS:
        assert name in re.findall(r"\w+", said[0]), name
        assert f"`{name}`" in docs.read_text(encoding="utf-8"), name
    cli.main(["calibrate", "--help"])
    assert "--applied-tokens" in capsys.readouterr().out


@pytest.fixture(scope="module")
def whole(few_prompts: Path, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a finished run that compares four ways."""
    folder = tmp_path_factory.mktemp("applied") / "run"
    return run(the_run(few_prompts), folder, model=tiny)


def ways_in(folder: Path) -> set[tuple[Any, ...]]:
    table = pd.read_csv(folder / "tuning.csv").fillna({"until": 0})
    tried = table[table["construction"] != "unsteered"]
    return set(tried[["until", "keep_norm", "form"]].itertuples(index=False, name=None))


def test_a_run_tries_the_ways_it_is_asked_for_and_steers_as_it_chose(whole: Path) -> None:
    assert ways_in(whole) == {
        (0, False, "add"),
        (0, True, "add"),
        (2, False, "add"),
        (0, False, "target"),
    }
    notes = read_json(whole / "run.json")
    assert notes["config"]["applied"] == list(ASKED)
    chosen = notes["chosen"]["answer_contrast"]
    (one, *_) = steering_from(whole, "fraud")
    assert (one.until, type(one.edit).__name__) == (
        chosen["until"],
        "RaiseTo" if chosen["form"] == "target" else "AddVector",
    )


def test_a_run_in_the_middle_of_its_ways_resumes_to_the_same_result(
    whole: Path, few_prompts: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, left = generation.append_jsonl, [1]

    def interrupted(*args: Any, **how: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return append(*args, **how)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(generation, "append_jsonl", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(the_run(few_prompts), out, model=tiny)
    assert (out / "tune.jsonl").stat().st_size > 0
    assert not (out / "tuning.csv").exists()
    with pytest.raises(ValueError, match="holds a run with another applied"):
        run(the_run(few_prompts, applied=("add",)), out, model=tiny, resume=True)
    run(the_run(few_prompts), out, model=tiny, resume=True)
    for name in ("tuning.csv", "evaluation.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_that_is_older_than_the_setting_resumes_with_its_default(
    few_prompts: Path, tmp_path: Path
) -> None:
    config = settings(few_prompts)
    with RunFolder.open(tmp_path / "run", config) as out, out.stage("vectors"):
        pass
    noted = tmp_path / "run" / "run.json"
    notes = read_json(noted)
    assert notes["config"].keys() == asdict(config).keys()
    for name in ("applied", "applied_tokens"):
        del notes["config"][name]
    write_json(noted, notes)
    with RunFolder.open(tmp_path / "run", config, resume=True):
        pass
    another = replace(config, applied=("norm_kept",))
    with (
        pytest.raises(ValueError, match="another applied"),
        RunFolder.open(tmp_path / "run", another, resume=True),
    ):
        pass


def test_a_calibration_tries_the_runs_ways_or_others(whole: Path, tiny: Any) -> None:
    recalibrate(whole, tune_prompts=1, model=tiny)
    assert ways_in(whole / "calibration") == ways_in(whole)
    how: dict[str, Any] = {"tune_prompts": 1, "model": tiny}
    recalibrate(whole, applied=["linear"], applied_tokens=3, positions=["generated"], **how)
    table = pd.read_csv(whole / "calibration" / "tuning.csv")
    steered = table[table["construction"] != "unsteered"]
    found = steered[["positions", "until", "decay"]].drop_duplicates()
    assert found.to_numpy().tolist() == [["generated", 3.0, "linear"]]
    (one, *_) = steering_from(whole, "fraud", calibrated=True)
    assert (one.positions, one.until, one.decay) == ("generated", 3, "linear")
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        recalibrate(whole, applied=["linar"], **how)


def test_calibrate_takes_ways_as_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.safesteer import calibration, recalibration

    given: dict[str, Any] = {}
    monkeypatch.setattr(recalibration, "recalibrate", lambda _, **how: given.update(how))
    monkeypatch.setattr(calibration, "in_words", str)
    assert cli.main(["calibrate", "--run", "r"]) == 0
    assert (given["applied"], given["applied_tokens"]) == (None, None)
    flags = ["--applied", "add", "sqrt", "--applied-tokens", "7"]
    assert cli.main(["calibrate", "--run", "r", *flags]) == 0
    assert (given["applied"], given["applied_tokens"]) == (("add", "sqrt"), 7)
