"""``workbench export`` and ``workbench import``: a run's vectors leave, and come in again."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.exported import import_file, plain, steered
from helpers.hub import Hub
from helpers.hugging_face import plain_model
from helpers.interventions import steering_vector

from workbench import cli
from workbench.export.from_run import run_numbers, run_strengths
from workbench.models.sites import Site
from workbench.safesteer.saved_run import chosen_settings, steering_from
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import load_vector, save_vector

SITE = Site(2, "resid_post")


@pytest.fixture
def saved(tiny, tmp_path):
    """A vector in a file, and the model's folder is ``tiny_path``."""
    vector = steering_vector(tiny, SITE)
    save_vector(tmp_path / "v.safetensors", vector)
    return vector


def test_a_vector_leaves_as_gguf_and_comes_in_again(saved, tiny, tiny_path, tmp_path, capsys):
    file, out = str(tmp_path / "v.safetensors"), str(tmp_path / "v.gguf")
    assert cli.main(["export", "gguf", "--vector", file, "--rho", "0.3", "--out", out]) == 0
    assert capsys.readouterr().out.splitlines()[0] == out
    arguments = [
        "--sign",
        "unsafe_to_safe",
        "--model",
        str(tiny_path),
        "--out",
        str(tmp_path / "in"),
    ]
    assert cli.main(["import", out, *arguments]) == 0
    back = load_vector(tmp_path / "in" / "imported.L2.resid_post.safetensors")
    expected = steered(tiny, [add_vector(saved, rho=0.3)])
    torch.testing.assert_close(steered(tiny, [add_vector(back, 1.0)]), expected)


def test_a_run_leaves_as_hooks_that_steer_as_it_does(finished, tiny, tiny_path, tmp_path, capsys):
    out = tmp_path / "hooks.py"
    arguments = ["--run", str(finished), "--category", "fraud", "--model", str(tiny_path)]
    assert cli.main(["export", "pytorch", *arguments, "--out", str(out)]) == 0
    assert "does not travel: what was written steers every question" in capsys.readouterr().out
    hf_model = plain_model(tiny_path)
    with import_file(out).steering(hf_model):
        expected = steered(tiny, steering_from(finished, "fraud"))
        torch.testing.assert_close(plain(hf_model), expected, rtol=1e-4, atol=1e-4)


def test_a_runs_strengths_and_numbers_are_those_it_chose(finished):
    strengths, numbers = run_strengths(finished, "fraud"), run_numbers(finished)
    setting = chosen_settings(finished)[numbers.construction]
    assert {str(s.vector.site): s.multiplier for s in strengths} == setting["multiplier"]["fraud"]
    assert numbers.table is not None
    assert {"unsteered", numbers.condition, "random"} <= set(numbers.table["condition"])
    assert set(numbers.table["category"]) == {"all"}
    assert all(name for name, _ in numbers.judges)
    assert numbers.has_gate
    with pytest.raises(ValueError, match=r"no category 'frau' .*Did you mean 'fraud'\?"):
        run_strengths(finished, "frau")
    with pytest.raises(ValueError, match=r"no construction 'answers'"):
        run_numbers(finished, construction="answers")


def test_a_run_goes_to_a_hub_and_comes_back(finished, tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants

    hub = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    addresses = hub.url + "/{repo_id}/resolve/{revision}/{filename}"  # both follow HF_ENDPOINT
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", addresses)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    arguments = ["--run", str(finished), "--category", "fraud", "--out", "somebody/vectors"]
    assert cli.main(["export", "hub", *arguments, "--private"]) == 0
    assert "/somebody/vectors/commit/" in capsys.readouterr().out
    assert hub.is_private(0)
    assert b"95 % interval" in hub.repos["somebody/vectors"]["README.md"]
    assert cli.main(["import", "hub:somebody/vectors", "--out", str(tmp_path / "in")]) == 0
    strengths = run_strengths(finished, "fraud")
    files = sorted((tmp_path / "in").iterdir())
    assert len(files) == len(strengths)
    vectors = {load_vector(path).site: load_vector(path).vector for path in files}
    for strength in strengths:
        assert torch.equal(vectors[strength.vector.site], strength.vector.vector)
    hub.close()


def test_requests_are_json_files(saved, tmp_path):
    for name in ("easysteer", "vllm-lens"):
        arguments = ["--vector", str(tmp_path / "v.safetensors"), "--multiplier", "1"]
        out = tmp_path / f"{name}.json"
        assert cli.main(["export", name, *arguments, "--out", str(out)]) == 0
        assert json.loads(out.read_text())


def test_what_is_missing_is_said_in_one_line(saved, tmp_path, capsys):
    file = str(tmp_path / "v.safetensors")
    missing = {
        "give either --run and --category, or --vector": ["--multiplier", "1"],
        "--run needs --category": ["--run", "runs/x"],
        "--vector needs one strength": ["--vector", file],
        "a run has its strengths": ["--run", "x", "--category", "y", "--rho", "0.1"],
        "needs --model": ["--vector", file, "--rho", "0.1"],
    }
    for message, arguments in missing.items():
        command = ["export", "pytorch", *arguments, "--out", str(tmp_path / "x.py")]
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert cli.main(["import", file, "--out", str(tmp_path)]) == 2
    assert "--sign says which way" in capsys.readouterr().err
    assert cli.main(["import", file, "--sign", "unsafe_to_safe", "--out", str(tmp_path)]) == 2
    assert "give --model, or --run" in capsys.readouterr().err
