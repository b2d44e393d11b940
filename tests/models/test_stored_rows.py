"""Sets whose values stay on disk: the same numbers as in memory, and no more memory for more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from helpers.activation_sets import PROMPTS, SITES, equal
from helpers.hugging_face import calls_of

from workbench.models import activations as activations_module
from workbench.models.activations import ActivationSet, cache_activations
from workbench.models.sites import Site
from workbench.models.stored_rows import StoredRows
from workbench.neurons.attribution import class_difference
from workbench.steering.gates import fit_gate
from workbench.steering.vectors import fit_steering_vectors

HELPERS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def in_memory(tiny) -> dict[Site, ActivationSet]:
    return cache_activations(tiny, PROMPTS, SITES)


@pytest.fixture
def stored(tiny, tmp_path, monkeypatch) -> dict[Site, ActivationSet]:
    monkeypatch.setattr(activations_module, "SHARD", 5)
    monkeypatch.setattr(activations_module, "PIECE", 5)
    return cache_activations(tiny, PROMPTS, SITES, store=tmp_path / "store")


def held(acts: ActivationSet) -> object:
    return vars(acts)["values"]


def test_a_stored_set_holds_no_values_and_gives_those_of_one_in_memory(stored, in_memory) -> None:
    assert equal(stored, cache_of(stored))
    for site, acts in stored.items():
        assert isinstance(held(acts), StoredRows)
        torch.testing.assert_close(acts.values, in_memory[site].values, rtol=1e-5, atol=3e-5)
        assert repr(acts) == repr(in_memory[site])
        for part in (acts.select(label="unsafe"), acts.of([PROMPTS[7], PROMPTS[1]])):
            assert isinstance(held(part), StoredRows)
            rows = [PROMPTS.index(prompt) for prompt in part.prompts]
            assert torch.equal(part.values, acts.values[rows])


def cache_of(stored: dict[Site, ActivationSet]) -> dict[Site, ActivationSet]:
    return {
        site: ActivationSet(site, acts.values, acts.prompts, acts.span, acts.model)
        for site, acts in stored.items()
    }


def test_rows_pieces_means_and_norms_are_those_of_the_whole(stored) -> None:
    for acts in (*stored.values(), *cache_of(stored).values()):
        values, rows = acts.values, [11, 0, 0, 7, 3, 4, 5]
        assert torch.equal(acts.rows(rows), values[rows])
        assert [len(piece) for piece in acts.pieces()] == [5, 5, 2]
        assert torch.equal(torch.cat(list(acts.pieces(rows))), values[rows])
        torch.testing.assert_close(acts.mean(), values.double().mean(dim=0))
        torch.testing.assert_close(acts.mean(rows), values[rows].double().mean(dim=0))
        assert acts.mean_norm() == pytest.approx(float(values.double().norm(dim=1).mean()))
        with pytest.raises(ValueError, match=r"a mean of no rows of .*; give at least one\."):
            acts.mean([])


def test_vectors_gates_and_differences_come_out_of_the_store(stored) -> None:
    whole, site = cache_of(stored), SITES[0]
    half = len(PROMPTS) // 2
    found, wanted = (
        (
            fit_steering_vectors(acts[site], safe_side="generic"),
            fit_gate(acts[site].of(PROMPTS[:half]), acts[site].of(PROMPTS[half:])),
            class_difference(acts, PROMPTS[1:3], PROMPTS[3:7]),
        )
        for acts in (stored, whole)
    )
    for category, vector in wanted[0].items():
        assert torch.equal(found[0][category].vector, vector.vector)
        assert found[0][category].site_norm == vector.site_norm
    assert torch.equal(found[1].weights, wanted[1].weights)
    assert found[1].threshold == wanted[1].threshold
    for at, difference in wanted[2].items():
        torch.testing.assert_close(found[2][at], difference)


def test_a_store_that_was_removed_is_said(tiny, tmp_path) -> None:
    acts = cache_activations(tiny, PROMPTS, SITES[0], store=tmp_path)[SITES[0]]
    next(tmp_path.rglob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"is gone; cache them again, and keep the store"):
        acts.values  # noqa: B018 - reading is what is tried


def test_a_shard_of_a_wide_model_has_fewer_rows_and_a_batch_at_least(tiny, monkeypatch) -> None:
    rows = activations_module._rows_per_shard
    n_bytes = 4 * (32 + 32 + 64 + 32)
    assert rows(tiny, SITES) == 256
    monkeypatch.setattr(activations_module, "SHARD_BYTES", 100 * n_bytes)
    assert rows(tiny, SITES) == 100
    monkeypatch.setattr(activations_module, "SHARD_BYTES", n_bytes)
    assert rows(tiny, SITES) == 32


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from helpers.activation_sets import PROMPTS, SITES
    from workbench.models import activations
    from workbench.models.load import load_model
    from workbench.models.stored_rows import ShardFolder

    write = ShardFolder.write

    def write_one(shards, number, values):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(shards, number, values)

    ShardFolder.write = write_one
    activations.SHARD = 5
    model = load_model(sys.argv[1], device="cpu")
    activations.cache_activations(model, PROMPTS, SITES, store=sys.argv[2])
"""


def in_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{HELPERS}{os.pathsep}{HELPERS.parent}"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_killed_process_leaves_a_store_that_another_one_goes_on_with(
    tiny, tiny_path, tmp_path, in_memory, monkeypatch
) -> None:
    killed = in_child(KILLED, tiny_path, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr(activations_module, "SHARD", 5)
    with calls_of(tiny.original_model.model.layers[0]) as calls, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cache_activations(tiny, PROMPTS, SITES, store=tmp_path)
    # The template once for each of two shards, and what the first one does not hold.
    assert sum(rows for rows, _ in calls) == 2 + len(PROMPTS) - 5
    for site in SITES:
        torch.testing.assert_close(found[site].values, in_memory[site].values, rtol=1e-5, atol=3e-5)


PEAKS = """
    import resource, sys
    import torch
    from pathlib import Path
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from workbench.models.activations import cache_activations
    from workbench.models.load import load_model
    from workbench.models.sites import Site
    from workbench.prompts.prompt import Prompt

    tiny, folder = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8192, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder + "/wide")
    tokenizer.save_pretrained(folder + "/wide")
    model = load_model(folder + "/wide", device="cpu")
    sites = [Site(layer, kind) for layer in (0, 1) for kind in ("resid_pre", "resid_post")]

    for n in (300, 2000):  # texts of the same lengths: these decide how large a batch is
        prompts = [Prompt(f"p{i}", f"poem {i % 300}", None, "c", "safe", "s") for i in range(n)]
        acts = cache_activations(model, prompts, sites, store=f"{folder}/{n}", batch_size=64)
        for site in sites:
            assert acts[site].mean().isfinite().all() and acts[site].mean_norm() > 0
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    print(sum(path.stat().st_size for path in Path(folder, "2000").rglob("*")) // 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units")
def test_the_peak_of_memory_does_not_grow_with_the_number_of_prompts(tiny_path, tmp_path) -> None:
    child = in_child(PEAKS, tiny_path, tmp_path)
    assert child.returncode == 0, child.stderr
    few, many, on_disk = map(int, child.stdout.split())
    assert on_disk >= 250
    assert many - few < on_disk / 3
