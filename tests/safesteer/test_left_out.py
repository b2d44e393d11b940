"""A run leaves out what its model cannot do, says so in notes and report, and finishes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.runs import settings
from helpers.tiny_models import tiny_model
from helpers.unusual_models import layer_norm_behind_mlp, tiny_mixtral

from workbench.files.store import read_json
from workbench.generation.decoding import GREEDY
from workbench.judges.patterns import RefusalPatterns
from workbench.models.errors import CannotBeDone
from workbench.models.load import hooked, load_model
from workbench.models.sites import Site, check_sites, present_sites
from workbench.prompts.prompt import load_prompts, save_prompts, split_prompts
from workbench.report.neuron_page import write_neuron_page
from workbench.report.page import write_report
from workbench.safesteer import recipe
from workbench.safesteer.constructions import measure
from workbench.safesteer.inputs import Job, load_job
from workbench.safesteer.recipe import run
from workbench.safesteer.run_folder import read_run, saved_vectors
from workbench.safesteer.saved_run import gated_steering_from, steering_from
from workbench.safesteer.settings import placements

if TYPE_CHECKING:
    from pathlib import Path

RESULTS = ("evaluation.csv", "scores.csv", "completions.jsonl", "tuning.csv", "separability.csv")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny_mixtral(tmp_path_factory.mktemp("mixtral") / "tiny-mixtral"))


def test_a_mixture_of_experts_finishes_without_neurons(
    mixtral: Any, few_prompts: Path, tmp_path: Path
) -> None:
    out = run(settings(few_prompts), tmp_path / "run", model=mixtral)
    assert all((out / name).stat().st_size > 0 for name in (*RESULTS, "gate_rates.csv"))
    assert not (out / "neurons.csv").exists()
    reason = read_json(out / "run.json")["left_out"]["neurons"]
    assert "mixture of experts" in reason
    page = write_report(out).read_text()
    assert page.count(reason.replace("'", "&#39;")) == 2, "at the top, and where the section stands"
    with pytest.raises(ValueError, match=r"has no neurons: .*mixture of experts"):
        write_neuron_page(out, "fraud", model=mixtral)


def test_what_was_left_out_is_left_out_again_after_an_interruption(
    mixtral: Any, few_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "calibrate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings(few_prompts), tmp_path, model=mixtral)
    before = read_json(tmp_path / "run.json")["left_out"]
    run(settings(few_prompts), tmp_path, model=mixtral, resume=True)
    after = read_run(tmp_path).notes["left_out"]
    assert after["neurons"] == before["neurons"]
    assert (tmp_path / "evaluation.csv").is_file()


def test_a_run_says_which_faster_ways_its_model_did_not_take(
    finished: Path, few_prompts: Path, tmp_path: Path
) -> None:
    assert read_json(finished / "run.json")["slow_ways"] == {}
    copy = shutil.copytree(finished, tmp_path / "run")
    assert "slow ways</th><td>none" in write_report(copy).read_text()
    hf_model, tokenizer = tiny_architecture("FalconForCausalLM")
    model = hooked(hf_model, tokenizer, "falcon")
    job = load_job(settings(few_prompts), verdicts=tmp_path / "verdicts.jsonl", model=model)
    assert set(job.facts()["slow_ways"]) == {"fused"}


def test_a_mixture_of_experts_names_no_site_for_its_neurons(mixtral: Any) -> None:
    """TransformerLens calls the whole MLP's output hook_post there, in the stream's width."""
    assert "blocks.0.mlp.hook_post" in mixtral.hook_dict
    with pytest.raises(CannotBeDone, match=r"layer 0, whose MLP is a mixture of experts"):
        check_sites(mixtral, [Site(0, "mlp_post")])
    assert present_sites(mixtral, ["mlp_post"]) == []
    assert len(present_sites(mixtral, ["z", "mlp_out"])) == 2 * mixtral.cfg.n_layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_16_bit_finishes_with_its_neurons(
    dtype: str, tiny_path: Path, few_prompts: Path, tmp_path: Path, finished: Path
) -> None:
    model = load_model(tiny_path, dtype=dtype)
    out = run(settings(few_prompts, dtype=dtype), tmp_path / "run", model=model)
    notes = read_json(out / "run.json")
    assert notes["model"]["dtype"] == dtype
    assert "neurons" not in notes["left_out"]
    assert all((out / name).stat().st_size > 0 for name in (*RESULTS, "gate.safetensors"))
    for by_category in saved_vectors(out).values():
        for vector in by_category.values():
            assert vector.vector.dtype == torch.float32
            assert vector.vector.isfinite().all()
    # The same model in float32 ranks neurons alike: rounding does not decide.
    both = [
        pd.read_csv(folder / "neurons.csv").set_index(["category", "layer", "neuron"])
        for folder in (out, finished)
    ]
    first, second = (table["contribution"].sort_index() for table in both)
    assert first.corr(second) > 0.99


def test_a_norm_behind_a_sublayer_that_is_not_linear_is_a_reason_to_leave_neurons_out(
    few_prompts: Path, tmp_path: Path
) -> None:
    model = layer_norm_behind_mlp(tmp_path / "model")
    prompts = load_prompts(few_prompts)
    folds = split_prompts(prompts, seed=0)
    measured = measure(model, folds, tmp_path / "store")
    job = Job(
        settings(few_prompts), model, folds, (), None, RefusalPatterns(), GREEDY, progress=False
    )
    with pytest.raises(CannotBeDone, match="is not an RMS norm"):
        recipe.neuron_scores(job, measured)


def test_a_run_without_a_gate_goes_on_and_steers_always(
    few_prompts: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gate(*_: Any, **__: Any) -> None:
        raise CannotBeDone("no safe or neutral prompts in the tune fold.")

    monkeypatch.setattr(recipe, "fit_gate", no_gate)
    out = run(settings(few_prompts), tmp_path / "run", model=tiny)
    notes = read_json(out / "run.json")
    assert notes["left_out"]["gate"] == "no safe or neutral prompts in the tune fold."
    answered = pd.read_csv(out / "evaluation.csv")["condition"].unique()
    assert {"unsteered", "answer contrast", "random"} <= set(answered)
    assert "gated" not in answered
    assert "This run has no gate: no safe or neutral prompts" in write_report(out).read_text()
    with pytest.raises(ValueError, match="has no gate: no safe or neutral prompts in the tune"):
        gated_steering_from(out)
    # Always-on steering takes the run's main construction, not the last of the list.
    main = notes["main"]
    expected = steering_from(out, "fraud", construction=main)
    for one, other in zip(steering_from(out, "fraud"), expected, strict=True):
        assert torch.equal(one.edit.vector, other.edit.vector)


def test_other_errors_of_a_stage_that_may_be_left_out_end_the_run(
    few_prompts: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a fault of the program")

    monkeypatch.setattr(recipe, "neuron_scores", broken)
    with pytest.raises(ValueError, match="a fault of the program"):
        run(settings(few_prompts), tmp_path / "run", model=tiny)


def test_a_gate_that_too_few_prompts_keep_closed_is_said(finished: Path) -> None:
    """Four neutral prompts of the tune fold cannot promise one in fifty."""
    reason = read_json(finished / "run.json")["left_out"]["gate"]
    assert "4 neutral prompts of the tune fold are too few to promise a rate of 0.02" in reason
    assert "(49 are needed)" in reason


def test_a_category_with_one_prompt_in_a_fold_has_no_neuron_scores_and_a_run(
    few_prompts: Path, tmp_path: Path, tiny: Any
) -> None:
    fraud = [p for p in load_prompts(few_prompts) if p.category == "fraud"]
    pairs = sorted({p.pair_id for p in fraud})[:3]
    others = [p for p in load_prompts(few_prompts) if p.category != "fraud"]
    few = [*(p for p in fraud if p.pair_id in pairs), *others]
    save_prompts(tmp_path / "few.jsonl", few)
    out = run(settings(tmp_path / "few.jsonl"), tmp_path / "run", model=tiny)
    assert "at least two of each are needed" in read_json(out / "run.json")["left_out"]["neurons"]
    assert (out / "evaluation.csv").is_file()


def test_places_are_those_a_model_computes(mixtral: Any, tiny: Any) -> None:
    band = [s for place in placements(tiny) for s in place if s.kind == "attn_out"]
    assert band
    without = [Site(layer, "resid_post") for layer in range(tiny.cfg.n_layers)]
    assert placements(tiny, without) == [p for p in placements(tiny) if p[0].kind == "resid_post"]
    assert [p for p in placements(mixtral) if p[0].kind == "attn_out"]


def test_16_bit_is_allowed_what_rounding_explains_and_no_more(tmp_path: Path) -> None:
    from workbench.neurons.attribution import completeness_tolerance

    path = tiny_model("llama3", tmp_path)
    allowed = {
        dtype: completeness_tolerance(load_model(path, dtype=dtype))
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert allowed["float32"] == 1e-5
    assert allowed["bfloat16"] == pytest.approx(2**-8 * 4)  # half of 2^-7, times sqrt(4 * 4)
    assert allowed["float16"] == pytest.approx(2**-11 * 4)
