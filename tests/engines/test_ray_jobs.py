"""What Ray's workers do, without Ray: jobs are texts in and bytes out, and come in any order."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.activation_sets import PROMPTS, SITES
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.engines import ray_data
from workbench.engines.base import LocalEngine
from workbench.engines.moments import MergedMoments, moments_to_tensors
from workbench.engines.ray_data import RayEngine, RayJudge, open_ray
from workbench.engines.ray_pool import RayPool
from workbench.engines.ray_worker import for_prompts
from workbench.generation.decoding import Decoding
from workbench.judges.cache import cached
from workbench.judges.patterns import RefusalPatterns
from workbench.models import activations as activations_module
from workbench.models.activations import ClassMoments
from workbench.models.load import load_model
from workbench.models.sites import Site

if TYPE_CHECKING:
    from pathlib import Path

LOAD = {"device": "cpu", "packing": "off"}


@pytest.fixture(autouse=True)
def jobs_in_this_process(monkeypatch) -> list[int]:
    """Do the jobs here, in an order of chance; the list holds the jobs of each call."""
    numbers: list[int] = []

    def run_jobs(pool: RayPool, worker: Any, made_with: Any, jobs: Any) -> Any:
        numbers.append(len(jobs))
        doing = worker(**made_with) if jobs else None
        for number, job in random.Random(0).sample(jobs, len(jobs)):
            yield number, doing.do(job)

    monkeypatch.setattr(ray_data, "run_jobs", run_jobs)
    monkeypatch.setattr(activations_module, "SHARD", 5)
    return numbers


@pytest.fixture(scope="module")
def local(tiny_path) -> LocalEngine:
    return LocalEngine(load_model(tiny_path, **LOAD))


@pytest.fixture
def engine(tiny_path) -> RayEngine:
    return RayEngine(str(tiny_path), RayPool(prompts_per_job=4), load=LOAD)


def test_shards_are_those_of_the_local_engine_and_are_read_once(
    engine, local, tmp_path, jobs_in_this_process
) -> None:
    here = local.cache_activations(PROMPTS, SITES, store=tmp_path / "local")
    there = engine.cache_activations(PROMPTS, SITES, store=tmp_path / "ray")
    in_memory = engine.cache_activations(PROMPTS, SITES)
    for site in SITES:
        assert torch.equal(there[site].values, here[site].values)
        assert torch.equal(in_memory[site].values, here[site].values)
        assert (there[site].prompts, there[site].model) == (here[site].prompts, here[site].model)
    of_local, of_ray = ({p.name for p in (tmp_path / n).iterdir()} for n in ("local", "ray"))
    assert of_local == of_ray
    jobs_in_this_process.clear()
    engine.cache_activations(PROMPTS, SITES, store=tmp_path / "local")
    assert jobs_in_this_process == [1, 0]  # the plan, and no shard


def test_moments_are_those_of_all_prompts_and_go_on_from_a_store(
    engine, local, tmp_path, jobs_in_this_process
) -> None:
    sets = local.cache_activations(PROMPTS, SITES, store=tmp_path / "local")
    stored = engine.class_moments(PROMPTS, SITES, store=tmp_path / "ray")
    for moments in (engine.class_moments(PROMPTS, SITES), stored):
        for site in SITES:
            assert moments[site].classes == local.class_moments(PROMPTS, site)[site].classes
            for row, (category, label) in enumerate(moments[site].classes):
                rows = [category in p.categories and p.label == label for p in PROMPTS]
                values = sets[site].values[torch.tensor(rows)].double()
                assert moments[site].n[row] == len(values)
                torch.testing.assert_close(moments[site].mean[row], values.mean(0))
    [shard] = sorted((tmp_path / "ray").rglob("shard-00001*"))
    shard.unlink()
    jobs_in_this_process.clear()
    with pytest.warns(UserWarning, match="shard-00001"):
        again = engine.class_moments(PROMPTS, SITES, store=tmp_path / "ray")
    assert jobs_in_this_process == [1, 1]
    assert torch.equal(again[SITES[0]].variance, stored[SITES[0]].variance)


def test_answers_come_in_the_order_of_the_local_engine(
    engine, local, tmp_path, jobs_in_this_process
) -> None:
    conditions: dict[str, Any] = {"unsteered": (), "again": {PROMPTS[3].id: ()}}
    decoding = Decoding(4, n_samples=2, temperature=1.0)
    here = local.sweep(PROMPTS, conditions, decoding)
    output = tmp_path / "answers.jsonl"
    assert engine.sweep(PROMPTS, conditions, decoding, output=output) == here
    assert local.sweep(PROMPTS, conditions, decoding, output=output) == here
    lines = output.read_text().splitlines()
    assert len(lines) == 4 * len(PROMPTS)
    output.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])  # cut by a kill
    assert engine.sweep(PROMPTS, conditions, decoding, output=output) == here
    assert sorted(output.read_text().splitlines()) == sorted(lines)


def test_the_engine_of_a_run_takes_its_pool_from_settings(tiny_path, local) -> None:
    engine = open_ray(tiny_path, local.model, workers=3, prompts_per_job=4, device="cpu")
    assert engine.pool == RayPool(workers=3, prompts_per_job=4)
    assert engine.model is local.model
    conditions = {"unsteered": ()}
    here = local.sweep(PROMPTS, conditions, Decoding(3))
    assert engine.sweep(PROMPTS, conditions, Decoding(3)) == here


def test_a_judge_keeps_what_each_job_says(tmp_path) -> None:
    prompts = [prompt.text for prompt in PROMPTS]
    answers = [("I cannot help with that.", "Take flour.")[i % 2] for i in range(len(prompts))]
    judge = RayJudge("patterns", RayPool(prompts_per_job=3))
    file = tmp_path / "verdicts.jsonl"
    assert cached(judge, file)(prompts, answers) == RefusalPatterns()(prompts, answers)
    assert judge.name == RefusalPatterns().name
    assert len(file.read_text().splitlines()) == len(prompts)


def test_weights_other_than_those_of_this_process_are_refused(
    tiny_path, family_model, tmp_path
) -> None:
    engine = RayEngine(str(tiny_path), load=LOAD, loaded=family_model("qwen2"))
    with pytest.raises(ValueError, match="has loaded another model as"):
        engine.sweep(PROMPTS, {"unsteered": ()}, Decoding(2))


def test_a_condition_that_names_no_prompt_is_refused_before_a_worker_starts(
    engine, jobs_in_this_process
) -> None:
    with pytest.raises(ValueError, match="no prompt has id or category 'frad'"):
        engine.sweep(PROMPTS, {"steered": {"frad": [None]}}, Decoding(2))
    assert jobs_in_this_process == []


def test_a_job_gets_what_a_condition_says_of_its_prompts() -> None:
    condition: Any = {PROMPTS[0].id: ["a"], PROMPTS[0].category: ["b"], "other": ["c"]}
    assert for_prompts(condition, PROMPTS[:1]) == {
        PROMPTS[0].id: ["a"],
        PROMPTS[0].category: ["b"],
    }
    assert for_prompts(["all"], PROMPTS[:1]) == ["all"]  # type: ignore[list-item]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), cuts=st.integers(1, 6))
def test_moments_of_parts_are_those_of_the_whole_in_any_order(seed: int, n: int, cuts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = 3 + torch.randn(n, 4, generator=generator, dtype=torch.float64)
    kinds = [("a", "unsafe"), ("a", "safe"), ("b", "unsafe")]
    of_row = torch.randint(3, (n,), generator=generator)
    present = sorted({kinds[k] for k in of_row.tolist()})
    site, merged = Site(0, "resid_post"), MergedMoments([Site(0, "resid_post")], present)
    for rows in torch.randperm(n, generator=generator).chunk(cuts):
        classes = tuple(sorted({kinds[k] for k in of_row[rows].tolist()}))
        members = [values[rows[of_row[rows] == kinds.index(c)]] for c in classes]
        part = ClassMoments(
            site,
            classes,
            torch.tensor([len(m) for m in members]),
            torch.stack([m.mean(0) for m in members]),
            torch.stack([m.var(0, correction=min(1, len(m) - 1)) for m in members]),
            "content",
            None,  # type: ignore[arg-type]
        )
        merged.add(moments_to_tensors({site: part}), classes)
    whole = merged.result("content", None)[site]  # type: ignore[arg-type]
    for row, kind in enumerate(present):
        of_class = values[of_row == kinds.index(kind)]
        assert whole.n[row] == len(of_class)
        torch.testing.assert_close(whole.mean[row], of_class.mean(0), rtol=1e-12, atol=1e-12)
        variance = of_class.var(0) if len(of_class) > 1 else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(whole.variance[row], variance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"cpus": 0}, "a worker needs a processor or a GPU"),
        ({"gpus": 1.5}, "a share of one GPU or a whole number, got 1.5"),
        ({"attempts": -1}, "attempts must be at least 0"),
        ({"prompts_per_job": 0}, "prompts_per_job must be at least 1"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RayPool(**settings)


def test_a_model_is_given_by_its_name_for_every_worker_loads_it(local, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes the name or path of a model"):
        RayEngine(local.model)
