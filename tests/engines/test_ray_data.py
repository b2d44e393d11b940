"""Ray's workers give what the local engine gives, although one of them is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hugging_face import calls_of
from helpers.logged_engine import finished, open_logged, was_killed
from helpers.tiny_models import sentences, tiny_model

from workbench.engines.base import LocalEngine
from workbench.engines.ray_data import RayEngine, RayJudge
from workbench.engines.ray_pool import RayPool
from workbench.generation.decoding import Decoding
from workbench.judges.cache import cached
from workbench.judges.patterns import RefusalPatterns
from workbench.models import activations as activations_module
from workbench.models.load import load_model, model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import SteeringVector

pytest.importorskip("ray", reason="Ray is an extra: 'make test-ray' runs these")

TESTS = Path(__file__).resolve().parents[1]
HERE = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
LOAD = {"device": "cpu", "packing": "off"}
SITES = [Site(1, "resid_post"), Site(2, "mlp_post")]
PROMPTS = [
    Prompt(text=text, category=("fraud", "malware")[i % 2], label=("unsafe", "safe")[i % 3 == 0])
    for i, text in enumerate(sentences(24))
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(tiny_model("llama3", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def local(path) -> LocalEngine:
    return LocalEngine(load_model(path, **LOAD))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(activations_module, "SHARD", 5)


def engine_on(
    path: str, local: LocalEngine, log: Path, *, dies_after: int | None = None, attempts: int = 3
) -> RayEngine:
    pool = RayPool(workers=2, cpus=0.5, prompts_per_job=5, attempts=attempts, environment=HERE)
    load = LOAD | {"log": str(log), "dies_after": dies_after}
    engine = RayEngine(path, pool, load=load, loaded=local.model, open_engine=open_logged)
    engine._plan = RayEngine(path, pool, loaded=local.model)._plan  # type: ignore[method-assign]
    return engine


def steering(local: LocalEngine) -> list[Any]:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    about = ("random", "content", 1.0, 3, 3, 1.0, model_info(local.model))
    vector = SteeringVector(Site(1, "resid_post"), "fraud", direction, *about)
    return [add_vector(vector, 2.0)]


def test_shards_are_those_of_the_local_engine_though_a_worker_was_killed(
    path, local, tmp_path
) -> None:
    log = tmp_path / "log"
    here = local.cache_activations(PROMPTS, SITES, store=tmp_path / "local")
    engine = engine_on(path, local, log, dies_after=2)
    there = engine.cache_activations(PROMPTS, SITES, store=tmp_path / "ray")
    assert was_killed(log)
    assert sum(finished(log)) == len(PROMPTS)
    for site in SITES:
        assert torch.equal(there[site].values, here[site].values)
        assert there[site].prompts == here[site].prompts
        assert there[site].model == here[site].model
    [ours], [theirs] = ((tmp_path / n).rglob("manifest.json") for n in ("ray", "local"))
    assert json.loads(ours.read_text())["what"] == json.loads(theirs.read_text())["what"]
    assert set(json.loads(ours.read_text())["shards"]) == set("01234")
    with calls_of(local.model.original_model.model.layers[0]) as calls:
        local.cache_activations(PROMPTS, SITES, store=tmp_path / "ray")
    assert calls == []  # the local engine goes on from what Ray has written

    log.unlink()
    damaged = sorted(ours.parent.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.warns(UserWarning, match=r"shard-00001\.safetensors is missing or damaged"):
        again = engine.cache_activations(PROMPTS, SITES, store=tmp_path / "ray")
    assert finished(log) == [5]  # only that one
    assert torch.equal(again[SITES[0]].values, here[SITES[0]].values)


def test_a_job_that_kills_its_worker_too_often_ends_the_call_and_loses_nothing(
    path, local, tmp_path
) -> None:
    log, store = tmp_path / "log", tmp_path / "store"
    engine = engine_on(path, local, log, dies_after=2, attempts=0)
    with pytest.raises(RuntimeError, match=r"could not go on .* start the call again"):
        engine.cache_activations(PROMPTS, SITES, store=store)
    kept = len(list(store.rglob("*.safetensors")))
    assert 0 < kept < 5
    log.unlink()
    found = engine.cache_activations(PROMPTS, SITES, store=store)
    assert len(finished(log)) == 5 - kept
    here = local.cache_activations(PROMPTS, SITES)
    assert torch.allclose(found[SITES[0]].values, here[SITES[0]].values, atol=1e-5)


def test_moments_count_every_prompt_once_though_a_worker_was_killed(path, local, tmp_path) -> None:
    log, store = tmp_path / "log", tmp_path / "store"
    engine = engine_on(path, local, log, dies_after=2)
    moments = engine.class_moments(PROMPTS, SITES, store=store)
    assert was_killed(log)
    sets = local.cache_activations(PROMPTS, SITES, store=tmp_path / "local")
    for site in SITES:
        values, of_site = sets[site].values.double(), moments[site]
        for row, (category, label) in enumerate(of_site.classes):
            members = [p.category == category and p.label == label for p in PROMPTS]
            of_class = values[torch.tensor(members)]
            assert of_site.n[row] == len(of_class)
            torch.testing.assert_close(of_site.mean[row], of_class.mean(0), rtol=1e-12, atol=0)
            torch.testing.assert_close(of_site.variance[row], of_class.var(0), rtol=1e-11, atol=0)
    log.unlink()
    again = engine.class_moments(PROMPTS, SITES, store=store)
    assert finished(log) == []
    assert torch.equal(again[SITES[0]].mean, moments[SITES[0]].mean)


def test_steered_answers_are_those_of_the_local_engine_though_a_worker_was_killed(
    path, local, tmp_path
) -> None:
    log, output = tmp_path / "log", tmp_path / "answers.jsonl"
    conditions: dict[str, Any] = {"unsteered": (), "steered": {"fraud": steering(local)}}
    here = local.sweep(PROMPTS, conditions, Decoding(6, batch_size=8))
    assert {a.text for a in here if a.condition == "steered"} != {
        a.text for a in here if a.condition == "unsteered"
    }
    engine = engine_on(path, local, log, dies_after=2)
    there = engine.sweep(PROMPTS, conditions, Decoding(6, batch_size=8), output=output)
    assert was_killed(log)
    assert there == here
    keys = [json.loads(line)["key"] for line in output.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 2 * len(PROMPTS)
    with calls_of(local.model.original_model.model.layers[0]) as calls:
        assert local.sweep(PROMPTS, conditions, Decoding(6), output=output) == here
    assert calls == []  # the local engine goes on from what Ray has written
    assert engine.sweep(PROMPTS, conditions, Decoding(6), output=output) == here
    assert len(output.read_text().splitlines()) == len(keys)  # nothing is written twice


def test_a_judge_on_workers_gives_the_judges_verdicts_and_keeps_them(tmp_path) -> None:
    prompts = [prompt.text for prompt in PROMPTS]
    answers = [("I'm sorry, but I can't help with that.", "Take flour.")[i % 2] for i in range(24)]
    judge = RayJudge("patterns", RayPool(workers=2, cpus=0.5, prompts_per_job=7, environment=HERE))
    keeping = cached(judge, tmp_path / "verdicts.jsonl")
    expected = RefusalPatterns()(prompts, answers)
    assert keeping(prompts, answers) == expected
    assert cached(RefusalPatterns(), tmp_path / "verdicts.jsonl")(prompts, answers) == expected
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 24


def test_what_a_worker_refuses_is_said_as_it_was_said_there(path, local) -> None:
    pool = RayPool(workers=1, cpus=0.5, environment=HERE)
    with pytest.raises(ValueError, match="layer=9"):  # planned in a worker
        RayEngine(path, pool, load=LOAD).cache_activations(PROMPTS, Site(9, "resid_post"))
    other = RayEngine("no-such-model-here", pool, load=LOAD)
    with pytest.raises(ValueError, match="no-such-model-here"):
        other.sweep(PROMPTS, {"unsteered": ()}, Decoding(2))


def test_a_pool_larger_than_this_machine_is_refused(path) -> None:
    engine = RayEngine(path, RayPool(workers=4096), load=LOAD)
    with pytest.raises(ValueError, match=r"4096 workers with 1 CPU need 4096, this machine has"):
        engine.sweep(PROMPTS, {"unsteered": ()}, Decoding(2))


@pytest.mark.slow
def test_the_embedded_model_is_read_alike_though_a_worker_is_killed_from_outside(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(activations_module, "SHARD", 4)
    local = LocalEngine(load_model("embedded", **LOAD))
    sites = [Site(15, "resid_post")]
    here = local.cache_activations(PROMPTS, sites, store=tmp_path / "local")
    pool = RayPool(workers=2, cpus=0.5, environment=HERE)
    engine = RayEngine("embedded", pool, load=LOAD, loaded=local.model)
    killed: list[int] = []

    def kill_a_worker() -> None:
        while not list((tmp_path / "ray").rglob("shard-*.safetensors")):
            time.sleep(0.05)
        killed.extend(worker_processes()[:1])
        for process in killed:
            os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    there = engine.cache_activations(PROMPTS, sites, store=tmp_path / "ray")
    thread.join()
    assert len(killed) == 1
    assert torch.equal(there[sites[0]].values, here[sites[0]].values)


def worker_processes() -> list[int]:
    """The processes of this test's own workers that hold a model."""
    import psutil

    below = psutil.Process().children(recursive=True)
    return [p.pid for p in below if p.status() != "zombie" and "MapWorker" in " ".join(p.cmdline())]
