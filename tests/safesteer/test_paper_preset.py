"""The paper's settings: a preset fills them in, and each alone changes what is computed."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import pandas as pd
import pytest
import torch
from helpers.dataset_files import beaver, write_csv, write_json, write_jsonl
from helpers.runs import write_few_prompts
from helpers.tiny_models import tiny_model

from workbench import cli
from workbench.files.store import read_json, read_jsonl
from workbench.models.activations import cache_activations
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.models.tokens import SPANS
from workbench.prompts.contrasts import SafeSide
from workbench.prompts.prompt import Prompt, load_prompts, save_prompts, split_prompts
from workbench.report.page import write_report
from workbench.safesteer import inputs, recalibration, recipe
from workbench.safesteer.conditions import controls
from workbench.safesteer.config import CHOICES, PRESETS, RunConfig, config_from
from workbench.safesteer.constructions import Measured, activations_behind, fit_all, measure
from workbench.safesteer.inputs import folds_of, load_job
from workbench.safesteer.paper import _layer, contrasted, places_of, settings_of
from workbench.safesteer.recalibration import recalibrate
from workbench.safesteer.recipe import run
from workbench.safesteer.run_folder import saved_vectors
from workbench.safesteer.saved_run import side_by_side, steering_from
from workbench.safesteer.settings import Setting, steering
from workbench.steering.estimators import Pruning, mean_difference, pruned_mean_difference
from workbench.steering.vectors import RefusalFilter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workbench.prompts.prompt import Folds

PAPER = PRESETS["paper"]
OTHERS: dict[str, Any] = {
    "site": "resid_post",
    "layers": (1, 0.5),
    "multipliers": (2.0,),
    "span": "last",
    "pruning": "bottom",
    "keep": 0.25,
    "safe_side": "paired",
    "refusal_filter": "drop",
    "fitted_is_evaluated": False,
}
"""Another value than the paper's for every setting that the preset fills in."""
SITE = Site(2, "attn_out")


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("the model was loaded")


def judge_of_marks(_: Any, responses: Any) -> list[Any]:
    """Call a response a refusal where it begins with "No"."""
    from workbench.judges.base import Verdict

    labels = ("refusal" if text.startswith("No") else "not_refusal" for text in responses)
    return [Verdict(label, None, "marks", "") for label in labels]


@pytest.fixture(scope="module")
def folds(few_prompts: Path) -> Folds:
    return split_prompts(load_prompts(few_prompts), seed=0)


@pytest.fixture(scope="module")
def measured(tiny: Any, folds: Folds, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(tiny, folds, tmp_path_factory.mktemp("store"), places=[(SITE,)])


def papers(tiny: Any, fit: list[Prompt], measured: Measured, **settings: Any) -> Measured:
    config = RunConfig(**settings)
    return contrasted(config, tiny, fit, measured, judge_of_marks)  # type: ignore[arg-type]


def vector_of(tiny: Any, fit: list[Prompt], measured: Measured, **settings: Any) -> torch.Tensor:
    behind = papers(tiny, fit, measured, **settings)
    return fit_all(behind, fit, ["prompt_contrast"])["prompt_contrast", SITE]["fraud"].vector


def rows_of(fit: list[Prompt], label: str) -> list[Prompt]:
    return [p for p in fit if p.label == label and (label == "neutral" or p.category == "fraud")]


# What a configuration says


def test_the_preset_fills_in_what_is_not_given_and_compares_the_papers_vector() -> None:
    config = RunConfig(preset="paper")
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert config.constructions == ("prompt_contrast",)
    assert config.rhos is None
    both = RunConfig(preset="paper", constructions=("answer_contrast",))
    assert both.constructions == ("prompt_contrast", "answer_contrast")
    assert [getattr(RunConfig(), name) for name in PAPER] == [None] * len(PAPER)
    assert RunConfig().rhos == (0.09, 0.17)


@pytest.mark.parametrize("name", PAPER)
def test_each_setting_of_the_preset_can_be_another(name: str) -> None:
    config = RunConfig(preset="paper", **{name: OTHERS[name]})
    assert {n: getattr(config, n) for n in PAPER} == PAPER | {name: OTHERS[name]}


def test_relative_strengths_beside_the_preset_replace_its_multiples() -> None:
    config = RunConfig(preset="paper", rhos=(0.1,))
    assert (config.rhos, config.multipliers) == ((0.1,), None)


def test_without_pruning_the_preset_keeps_no_share() -> None:
    assert RunConfig(preset="paper", pruning="none").keep is None


def test_a_paper_run_is_read_back_from_its_notes_as_it_was() -> None:
    for config in (RunConfig(preset="paper"), RunConfig(preset="paper", rhos=(0.1,), layers=(3,))):
        noted = dataclasses.asdict(config).items()
        assert config_from({k: list(v) if isinstance(v, tuple) else v for k, v in noted}) == config


def test_a_file_and_flags_give_the_settings_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []

    def looked_at(config: RunConfig, *_: Any, **__: Any) -> None:
        seen.append(config)
        raise ValueError("that is enough")

    monkeypatch.setattr(recipe, "run", looked_at)
    (tmp_path / "c.yaml").write_text("preset: paper\nlayers: [14, 0.5]\nspan: last\nkeep: 0.25\n")
    flags = ["--span", "content", "--fitted-is-evaluated=false", "--multipliers", "-0.5", "2"]
    cli.main(["run", str(tmp_path / "c.yaml"), *flags, "--out", str(tmp_path / "run")])
    [config] = seen
    assert config == RunConfig(
        preset="paper", layers=(14, 0.5), span="content", keep=0.25, fitted_is_evaluated=False,
        multipliers=(-0.5, 2.0),
    )  # fmt: skip
    assert isinstance(config.layers[0], int)


def test_the_allowed_words_are_those_of_the_functions_that_read_them() -> None:
    assert CHOICES["span"] == SPANS
    assert CHOICES["pruning"] == get_args(Pruning)
    assert set(CHOICES["safe_side"]) == set(get_args(SafeSide))
    assert CHOICES["refusal_filter"] == get_args(RefusalFilter)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"preset": "papr"}, "unknown preset 'papr'.* Did you mean 'paper'"),
        ({"site": "atn_out"}, "site must be one of .* Did you mean 'attn_out'"),
        ({"site": "z"}, "site must be one of resid_post, attn_out, mlp_out, got 'z'"),
        ({"layers": 14}, "layers must be a list"),
        ({"layers": []}, "layers must be whole numbers"),
        ({"layers": [1.5]}, "layers must be whole numbers"),
        ({"layers": [-1]}, "layers must be whole numbers"),
        ({"layers": [float("inf")]}, "layers must be whole numbers"),
        ({"multipliers": [0.0]}, "multipliers must be multiples of the vector, none of them 0"),
        ({"multipliers": [float("nan")]}, "multipliers must be"),
        ({"multipliers": [1.0], "rhos": [0.1]}, "either rhos .* or multipliers, not both"),
        ({"span": "words"}, "span must be one of"),
        ({"pruning": "half"}, "pruning must be one of"),
        ({"pruning": "top", "keep": 1.5}, "keep must be a share"),
        ({"keep": 0.5}, "keep needs pruning"),
        ({"safe_side": "alpaca"}, "safe_side must be one of"),
        ({"refusal_filter": "both"}, "refusal_filter must be one of"),
        ({"vectors_from": 5}, "vectors_from must be a text"),
        ({"vectors_from": "a", "model": "a"}, "vectors_from must be another model than 'a'"),
        ({"fitted_is_evaluated": "yes"}, "fitted_is_evaluated must be true or false"),
        ({"span": "all", "constructions": ["answer_contrast"]}, "span says how prompts are cont"),
    ],
)
def test_a_wrong_setting_is_named(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from(mapping)


# What prompts and model must have


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refusal_filter": "keep"}, "refusal_filter keep needs prompts with responses: 8 of 8"),
        ({"span": "response"}, "span response needs prompts with responses"),
    ],
)
def test_prompts_that_lack_responses_are_refused_before_the_model_is_loaded(
    settings: dict[str, Any], message: str, few_prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(inputs, "load_run_model", never)
    config = RunConfig(prompts=str(few_prompts), **settings)
    with pytest.raises(ValueError, match=message):
        load_job(config, verdicts=tmp_path / "v.jsonl")


def test_prompts_without_pairs_have_no_paired_safe_side(
    tmp_path: Path, few_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "load_run_model", never)
    alone = [replace(p, pair_id=None) for p in load_prompts(few_prompts)]
    save_prompts(tmp_path / "p.jsonl", alone)
    config = RunConfig(prompts=str(tmp_path / "p.jsonl"), preset="paper", safe_side="paired")
    with pytest.raises(ValueError, match=r"safe_side paired needs .* category 'fraud' has none"):
        load_job(config, verdicts=tmp_path / "v.jsonl")


def test_a_layer_that_the_model_lacks_is_named_before_the_first_pass(
    few_prompts: Path, tmp_path: Path, tiny: Any
) -> None:
    config = RunConfig(prompts=str(few_prompts), layers=(31,))
    with pytest.raises(ValueError, match=r"has 4 layers \(0-3\)"):
        load_job(config, verdicts=tmp_path / "v.jsonl", model=tiny)


# Places and strengths


def test_places_are_each_layer_alone_and_all_together(tiny: Any) -> None:
    def places(**settings: Any) -> list[list[str]]:
        return [[str(s) for s in place] for place in places_of(RunConfig(**settings), tiny)]

    assert places(preset="paper") == [["L2.attn_out"], ["L3.attn_out"], ["L2.attn_out",
                                                                        "L3.attn_out"]]  # fmt: skip
    assert places(layers=(1,)) == [["L1.resid_post"]]
    assert places(site="mlp_out", layers=(0.5, 3)) == [
        ["L2.mlp_out"], ["L3.mlp_out"], ["L2.mlp_out", "L3.mlp_out"],
    ]  # fmt: skip
    by_kind = [str(s) for place in places_of(RunConfig(site="attn_out"), tiny) for s in place]
    assert by_kind
    assert all(name.endswith("attn_out") for name in by_kind)
    some = places_of(RunConfig(preset="paper"), tiny, {Site(3, "attn_out")})
    assert some == [(Site(3, "attn_out"),)]


def test_the_papers_layers_are_its_own_where_there_are_32() -> None:
    assert [_layer(share, 32) for share in PAPER["layers"]] == [14, 16, 20, 25, 31]


def test_raw_multiples_are_added_as_they_are_at_every_layer(
    tiny: Any, folds: Folds, measured: Measured
) -> None:
    behind = papers(tiny, folds.fit, measured)
    vectors = fit_all(behind, folds.fit, ["prompt_contrast"])
    places = [(SITE,)]
    config = RunConfig(multipliers=(0.5, -2.0))
    half, back = settings_of(config, vectors, ["prompt_contrast"], places)
    assert [i.edit.multiplier for i in steering(vectors, half)["fraud"]] == [0.5]
    assert [i.edit.multiplier for i in steering(vectors, back)["fraud"]] == [-2.0]
    assert (half.name, back.name) == (
        "prompt_contrast L2.attn_out +0.5x", "prompt_contrast L2.attn_out -2x",
    )  # fmt: skip
    rhos = [v.rho(0.5) for v in vectors["prompt_contrast", SITE].values()]
    assert half.rho == pytest.approx(sum(rhos) / len(rhos), abs=1e-4)
    assert steering(vectors, half.times(0.5))["fraud"][0].edit.multiplier == 0.25
    relative = settings_of(RunConfig(rhos=(0.1,)), vectors, ["prompt_contrast"], places)
    assert {(s.sign, s.rho, s.multiplier) for s in relative} == {(1, 0.1, None), (-1, 0.1, None)}


# How prompts are contrasted, against vectors made by hand


@pytest.mark.parametrize("span", ["last", "all"])
def test_the_span_says_which_tokens_are_pooled(
    span: str, tiny: Any, folds: Folds, measured: Measured
) -> None:
    sides = (rows_of(folds.fit, "unsafe"), rows_of(folds.fit, "neutral"))
    pooled = [cache_activations(tiny, rows, SITE, span=span)[SITE].values for rows in sides]
    vector = vector_of(tiny, folds.fit, measured, span=span)
    assert torch.allclose(vector, mean_difference(*pooled), atol=1e-5)
    assert not torch.allclose(vector, vector_of(tiny, folds.fit, measured), atol=1e-3)


def test_pruning_keeps_the_differences_of_largest_norm(
    tiny: Any, folds: Folds, measured: Measured
) -> None:
    unsafe, neutral = (
        measured.prompts[SITE].of(rows_of(folds.fit, label)).values
        for label in ("unsafe", "neutral")
    )
    made: list[torch.Tensor] = []
    for which, keep in (("top", 0.5), ("bottom", 0.5), ("random", 0.5), ("top", 0.25)):
        made.append(vector_of(tiny, folds.fit, measured, pruning=which, keep=keep))
        by_hand = pruned_mean_difference(unsafe, neutral, which=which, keep=keep)  # type: ignore[arg-type]
        assert torch.allclose(made[-1], by_hand)
    made.append(vector_of(tiny, folds.fit, measured))
    assert all(not torch.allclose(a, b) for i, a in enumerate(made) for b in made[:i])


def test_the_paired_safe_side_is_the_twins(tiny: Any, folds: Folds, measured: Measured) -> None:
    vector = vector_of(tiny, folds.fit, measured, safe_side="paired")
    twins, unsafe = (
        measured.prompts[SITE].of(rows_of(folds.fit, label)).values for label in ("safe", "unsafe")
    )
    assert torch.allclose(vector, mean_difference(unsafe, twins), atol=1e-5)
    assert not torch.allclose(vector, vector_of(tiny, folds.fit, measured), atol=1e-3)


@pytest.mark.parametrize("how", ["keep", "drop"])
def test_the_refusal_filter_reads_the_responses_of_the_safe_side(
    how: str, tiny: Any, folds: Folds, measured: Measured
) -> None:
    neutral = [p.id for p in folds.fit if p.label == "neutral"]
    response = dict(zip(neutral, ["No.", "Sure.", "Sure."] * len(neutral), strict=False))
    fit = [replace(p, response=response.get(p.id)) for p in folds.fit]
    wanted = [p for p in fit if p.response == ("No." if how == "keep" else "Sure.")]
    assert wanted
    safe = measured.prompts[SITE].of(wanted).values
    unsafe = measured.prompts[SITE].of(rows_of(folds.fit, "unsafe")).values
    vector = vector_of(tiny, fit, measured, refusal_filter=how)
    assert torch.allclose(vector, mean_difference(unsafe, safe), atol=1e-6)
    all_same = [replace(p, response="Sure." if how == "keep" else "No.") for p in fit]
    with pytest.raises(ValueError, match=f"refusal_filter {how} leaves no safe prompts"):
        vector_of(tiny, all_same, measured, refusal_filter=how)


def test_shuffled_labels_of_unpaired_prompts_need_no_twins(
    tiny: Any, folds: Folds, measured: Measured
) -> None:
    fit = [replace(p, pair_id=None) for p in folds.fit if p.label != "safe"]
    behind = papers(tiny, fit, measured)
    vectors = fit_all(behind, fit, ["prompt_contrast"])
    setting = Setting("prompt_contrast", (SITE,), 1, 0.1, multiplier=0.5)
    activations = activations_behind("prompt_contrast", behind)
    made: Any = controls(vectors, setting, activations, safe_side="generic")
    [real], [shuffled] = steering(vectors, setting)["fraud"], made["shuffled labels"]["fraud"]
    assert shuffled.edit.multiplier == 0.5
    assert torch.isclose(shuffled.edit.vector.norm(), real.edit.vector.norm())
    assert not torch.allclose(shuffled.edit.vector, real.edit.vector)


# A whole run, its vectors from another model


@pytest.fixture(scope="module")
def chat_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama3", tmp_path_factory.mktemp("chat") / "chat", seed=1)


@pytest.fixture(scope="module")
def paper_run(
    tiny: Any, chat_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("paper")
    prompts = write_few_prompts(folder / "few.jsonl")
    config = RunConfig(
        prompts=str(prompts), tune_prompts=2, max_new_tokens=4, preset="paper",
        layers=(2,), vectors_from=str(chat_path), device="cpu",
    )  # fmt: skip
    loaded: list[Any] = []
    tuned, load = recipe.tune, inputs.load_run_model

    def remembered(config: RunConfig) -> Any:
        model = load(config)
        loaded.append(weakref.ref(model))
        return model

    def freed_before(*arguments: Any) -> Any:
        gc.collect()
        loaded.append(loaded[0]() is None)
        return tuned(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "load_run_model", remembered)
        patch.setattr(recipe, "tune", freed_before)
        return run(config, folder / "run", model=tiny), loaded


def test_a_paper_run_has_its_vector_a_gate_controls_and_raw_multiples(
    paper_run: tuple[Path, Any],
) -> None:
    out, _ = paper_run
    notes = read_json(out / "run.json")
    assert notes["main"] == "prompt_contrast"
    assert set(notes["chosen"]) == {"prompt_contrast"}
    assert (out / "gate.safetensors").is_file()
    conditions = {row["condition"] for row in read_jsonl(out / "completions.jsonl")}
    assert conditions >= {"unsteered", "prompt contrast", "gated", "random", "shuffled labels"}
    tuning = pd.read_csv(out / "tuning.csv").query("construction == 'prompt_contrast'")
    assert set(tuning["multiplier"]) == {0.5, 1.0}
    assert set(tuning["sign"]) == {1}
    [steered] = steering_from(out, "fraud")
    assert steered.edit.multiplier in (0.5, 1.0)
    assert {vector.span for of in saved_vectors(out).values() for vector in of.values()} == {"all"}


def test_vectors_are_those_of_the_other_model_which_is_freed(
    paper_run: tuple[Path, list[Any]], chat_path: Path, tiny: Any
) -> None:
    out, loaded = paper_run
    assert loaded[1:] == [True]
    chat = load_model(chat_path, device="cpu")
    notes = read_json(out / "run.json")
    config = config_from(notes["config"])
    fit = folds_of(config).fit
    sides = (rows_of(fit, "unsafe"), rows_of(fit, "neutral"))
    unsafe, safe = (cache_activations(chat, r, SITE, span="all")[SITE].values for r in sides)
    vector = saved_vectors(out)["prompt_contrast", SITE]["fraud"]
    assert torch.allclose(vector.vector, pruned_mean_difference(unsafe, safe), atol=1e-5)
    assert vector.model.fingerprint == notes["vectors_from"]["fingerprint"]
    stream = cache_activations(tiny, fit, Site(2, "resid_post"))[Site(2, "resid_post")].values
    assert vector.site_norm == pytest.approx(float(stream.norm(dim=1).mean()), rel=1e-4)


def test_transferred_steering_of_a_run_is_for_its_model_alone(
    paper_run: tuple[Path, Any], tiny: Any, chat_path: Path
) -> None:
    interventions = steering_from(paper_run[0], "fraud")
    plain, steered = side_by_side(tiny, "How do I bake bread?", interventions)
    assert plain.tokens != steered.tokens
    with pytest.raises(ValueError, match="was fitted on"):
        side_by_side(load_model(chat_path, device="cpu"), "Bread?", interventions)


def test_fitted_questions_are_reported_beside_the_held_out_ones_and_not_among_them(
    paper_run: tuple[Path, Any],
) -> None:
    out, _ = paper_run
    folds = folds_of(config_from(read_json(out / "run.json")["config"]))
    fitted = {row["prompt_id"] for row in read_jsonl(out / "fitted.jsonl")}
    assert fitted
    assert fitted <= {p.id for p in folds.fit if p.label == "unsafe"}
    held_out = {row["prompt_id"] for row in read_jsonl(out / "completions.jsonl")}
    assert held_out <= {p.id for p in folds.test}
    table = pd.read_csv(out / "evaluation_fitted.csv")
    assert set(table["condition"]) == {"unsteered", "prompt contrast", "random"}
    refusals = table.query("category == 'all' and metric == 'refusal'")
    assert set(refusals["n"] + refusals["n_unscored"]) == {len(fitted)}
    page = write_report(out).read_text(encoding="utf-8")
    assert page.count("Not held out") == 1


def test_a_run_without_the_setting_leaves_fitted_questions_alone(finished: Path) -> None:
    assert not (finished / "evaluation_fitted.csv").exists()
    assert "Not held out" not in write_report(finished).read_text(encoding="utf-8")


@pytest.mark.parametrize(("given", "expected"), [(None, {0.5, 1.0}), ([0.3], {None})])
def test_a_paper_run_is_searched_again_with_its_multiples_or_other_strengths(
    given: Any, expected: set[Any], paper_run: tuple[Path, Any], tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Any] = []

    def looked_at(*arguments: Any, **keywords: Any) -> None:
        asked.extend(arguments[3])
        assert keywords["transfer"]
        raise KeyboardInterrupt

    monkeypatch.setattr(recalibration, "calibrate", looked_at)
    monkeypatch.setattr(inputs, "load_run_model", never)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(paper_run[0], rhos=given, model=tiny)
    assert {setting.multiplier for setting in asked} == expected


def test_vectors_are_taken_from_another_model_of_the_same_architecture_only(
    few_prompts: Path, tmp_path: Path, tiny: Any, tiny_path: Path
) -> None:
    wide = tiny_model("qwen2", tmp_path / "wide", intermediate_size=32)
    for path, message in ((wide, "take a model of the same arch"), (tiny_path, "leave it out")):
        config = RunConfig(prompts=str(few_prompts), vectors_from=str(path), device="cpu")
        with pytest.raises(ValueError, match=message):
            load_job(config, verdicts=tmp_path / "v.jsonl", model=tiny)


def test_the_best_of_all_is_the_main_one_under_the_preset_only() -> None:
    import types

    from workbench.evaluation.metrics import HEADLINE

    chosen = {n: Setting(n, (SITE,), 1, 0.1) for n in ("prompt_contrast", "answer_contrast")}
    rows = [
        {
            "construction": n,
            "chosen": True,
            "metric": HEADLINE,
            "value": v,
            "excess": 0.0,
            "round": 0,
        }
        for n, v in (("prompt_contrast", 0.9), ("answer_contrast", 0.1))
    ]
    tuned: Any = types.SimpleNamespace(chosen=chosen, table=pd.DataFrame(rows))
    for preset, expected in (("paper", "prompt_contrast"), (None, "answer_contrast")):
        job: Any = types.SimpleNamespace(config=RunConfig(preset=preset))
        assert recipe.main_of(job, tuned).construction == expected


# The paper's data sets, as small files of their schemas


def catqa(path: Path) -> str:
    rows = [
        {"Category": c, "Subcategory": "x", "Question": f"{c} question {i}?"}
        for c in ("Fraud/Deception", "Hate/Harass/Violence")
        for i in range(8)
    ]
    return f"catqa:{write_jsonl(path / 'catqa.json', rows)}"


def safebench(path: Path) -> str:
    rows = [
        {"category_name": c, "question": f"{c} question {i}?"}
        for c in ("Fraud", "Hate Speech")
        for i in range(8)
    ]
    return f"safebench:{write_csv(path / 'safebench.csv', rows)}"


def trustllm(path: Path) -> str:
    rows = [
        {"prompt": f"{c} request {i}?", "source": "x", "type": c}
        for c in ("Fraud", "Hate Speech")
        for i in range(8)
    ]
    return f"trustllm_misuse:{write_json(path / 'misuse.json', rows)}"


def beavertails(path: Path) -> str:
    rows = [
        row
        for harm in ("self_harm", "privacy_violation")
        for i in range(8)
        for row in (
            beaver(f"{harm} question {i}?", "A bad one", harm),
            beaver(f"{harm} question {i}?", "No." if i % 2 else "Here is help."),
        )
    ]
    return f"beavertails:{write_jsonl(path / 'beaver.jsonl', rows)}"


@pytest.mark.parametrize("written", [catqa, safebench, trustllm, beavertails])
def test_the_papers_data_sets_go_through_a_paper_runs_inputs(
    written: Callable[[Path], str], tmp_path: Path, tiny: Any
) -> None:
    config = RunConfig(preset="paper", prompts=written(tmp_path))
    job = load_job(config, verdicts=tmp_path / "v.jsonl", model=tiny)
    assert len(job.categories) == 2
    neutral = [p for p in job.folds.fit if p.label == "neutral"]
    assert neutral
    assert {p.source for p in neutral} == {load_prompts()[0].source}


def test_safe_answers_of_beavertails_are_its_paired_safe_side(tmp_path: Path, tiny: Any) -> None:
    config = RunConfig(
        preset="paper", prompts=beavertails(tmp_path), safe_side="paired", span="response",
        pruning="none", refusal_filter="drop",
    )  # fmt: skip
    fit = load_job(config, verdicts=tmp_path / "v.jsonl", model=tiny).folds.fit
    measured = measure(tiny, folds_of(config), tmp_path / "store", places=[(SITE,)])
    judge: Any = judge_of_marks
    behind = contrasted(config, tiny, fit, measured, judge)
    helped = [p for p in fit if p.response == "Here is help." and p.category == "privacy_violation"]
    ids = {p.pair_id for p in helped}
    harmed = [p for p in fit if p.label == "unsafe" and p.pair_id in ids]
    assert 0 < len(helped) == len(harmed)
    sets = [cache_activations(tiny, r, SITE, span="response")[SITE] for r in (harmed, helped)]
    [vector] = fit_all(behind, fit, ["prompt_contrast"]).values()
    by_hand = mean_difference(*(rows.values for rows in sets))
    assert torch.allclose(vector["privacy_violation"].vector, by_hand, atol=1e-5)


def test_pairs_that_differ_in_their_answers_alone_need_the_span_of_answers(tmp_path: Path) -> None:
    config = RunConfig(preset="paper", prompts=beavertails(tmp_path), safe_side="paired")
    with pytest.raises(ValueError, match="differ in their responses alone, and span all reads"):
        load_job(config, verdicts=tmp_path / "v.jsonl")
