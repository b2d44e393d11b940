"""Batches of answers are as large as a share of the free memory allows, and at least 1 GiB."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.generation import _decode_loop, _memory
from workbench.generation.answers import generate, sweep
from workbench.generation.decoding import Decoding
from workbench.models.forward import SPARE_COLUMNS, plain
from workbench.models.tokens import encode
from workbench.prompts.prompt import Prompt

GIB = 2**30


def questions(n: int) -> list[Prompt]:
    texts = sentences(3 * n)
    return [
        Prompt(f"p{i}", " ".join(texts[i : i + 1 + i % 3]), None, "c", "safe", "s")
        for i in range(n)
    ]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Return ``free(n_bytes)``, which sets the memory that is free on every device."""
    return lambda n_bytes: monkeypatch.setattr(_memory, "free_bytes", lambda *_: n_bytes)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "input_device", lambda model: torch.device("cuda"))


# The budget.


def test_the_budget_is_at_most_half_of_what_is_free_and_a_power_of_two(tiny, free, monkeypatch):
    on_a_gpu(monkeypatch)
    for free_gib, budget_gib in ((0.3, 1), (1.9, 1), (4, 2), (7.9, 2), (62, 16), (64, 32)):
        free(int(free_gib * GIB))
        assert _memory.memory_budget(tiny) == budget_gib * GIB


def test_a_processor_leaves_memory_to_other_programs(tiny, free):
    free(500 * GIB)
    assert _memory.memory_budget(tiny) == _memory.MOST_ON_CPU == 4 * GIB


def test_where_nobody_says_what_is_free_the_budget_is_one_gibibyte(tiny, free):
    free(None)
    assert _memory.memory_budget(tiny) == GIB


def test_weights_and_what_is_used_count_against_what_is_free(tiny, monkeypatch, tmp_path):
    files = {name: tmp_path / name for name in ("meminfo", "status", "limit")}
    files["meminfo"].write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:  8000 kB\n")
    files["status"].write_text("Name:\tpython\nVmRSS:\t  1000 kB\n")
    monkeypatch.setattr(_memory, "_MEMORY_INFO", files["meminfo"])
    monkeypatch.setattr(_memory, "_STATUS", files["status"])
    monkeypatch.setattr(_memory, "_CONTAINER_LIMITS", (files["limit"],))
    cpu = torch.device("cpu")
    weights = sum(one.numel() * one.element_size() for one in tiny.parameters())
    assert _memory.weight_bytes(tiny) == weights > 0
    assert _memory.free_bytes(tiny, cpu) == 8000 * 1024 - weights
    files["limit"].write_text("max\n")
    assert _memory.free_bytes(tiny, cpu) == 8000 * 1024 - weights
    files["limit"].write_text(f"{3000 * 1024}\n")
    assert _memory.free_bytes(tiny, cpu) == 2000 * 1024
    files["limit"].write_text("9223372036854771712\n")
    assert _memory.free_bytes(tiny, cpu) == 8000 * 1024 - weights
    monkeypatch.setattr(_memory, "_MEMORY_INFO", Path(tmp_path / "absent"))
    assert _memory.free_bytes(tiny, cpu) is None


def test_a_gpu_counts_what_torch_holds_and_does_not_use(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GIB)
    assert _memory.free_bytes(tiny, torch.device("cuda", 0)) == 12 * GIB
    assert _memory.free_bytes(tiny, torch.device("mps")) is None


# Rows.


def test_a_row_counts_its_cache_its_logits_and_what_passes_through_a_layer(tiny, monkeypatch):
    row = _memory.bytes_per_row(tiny, 30, 20)
    width = tiny.original_model.config.vocab_size
    cfg = tiny.cfg
    per_token = 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head * 4
    assert _memory.bytes_per_token(tiny) == per_token
    assert row.kept == per_token * (30 + 20 + SPARE_COLUMNS) + 4 * width
    sampled = _memory.bytes_per_row(tiny, 30, 20, is_sampled=True)
    assert sampled.kept - row.kept == 40 * width
    behind = _memory.bytes_per_row(tiny, 30, 20, n_prefix=15)
    assert (behind.kept, 2 * behind.passing) == (row.kept, row.passing)
    monkeypatch.setattr(_memory, "trusts", lambda model, route: route != "fused")
    scores = _memory.bytes_per_row(tiny, 30, 20).passing - row.passing
    assert scores == 12 * cfg.n_heads * 30 * 30


@settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=50
)
@given(
    kept=st.integers(1, 2**34),
    passing=st.integers(0, 2**36),
    exponent=st.integers(30, 36),
    n_prefixes=st.integers(0, 2**20),
)
def test_rows_fit_the_budget_or_a_gibibyte_of_it(kept, passing, exponent, n_prefixes, tiny):
    budget, row = 2**exponent, _memory.RowBytes(kept, passing)
    rows = _memory.rows_that_fit(tiny, budget, row, n_prefixes=n_prefixes)
    prefixes = n_prefixes * _memory.bytes_per_token(tiny)
    in_a_gibibyte = min(_memory.MOST_ROWS, (GIB - prefixes) // kept)
    assert max(1, in_a_gibibyte) <= rows <= _memory.MOST_ROWS
    within = rows * (kept + passing) + prefixes <= budget
    assert within or rows == 1 or rows * kept + prefixes <= GIB
    more = _memory.rows_that_fit(tiny, 2 * budget, row, n_prefixes=n_prefixes)
    assert more >= rows


def test_a_gpu_takes_more_rows_than_a_processor(tiny, monkeypatch):
    row = _memory.RowBytes(1, 1)
    assert _memory.rows_that_fit(tiny, GIB, row) == _memory.MOST_ROWS
    on_a_gpu(monkeypatch)
    assert _memory.rows_that_fit(tiny, GIB, row) == _memory.MOST_ROWS_ON_GPU > _memory.MOST_ROWS


# Batches.


def batches_made(model, monkeypatch, prompts, decoding, conditions=None):
    """Answer prompts; return each batch's prompt lengths, and the answers' tokens."""
    sizes: list[list[int]] = []
    run = _decode_loop.DecodeLoop.run

    def spy(self, rows):
        sizes.append([len(row.encoded.ids) for row in rows])
        return run(self, rows)

    monkeypatch.setattr(_decode_loop.DecodeLoop, "run", spy)
    answers = sweep(model, prompts, conditions or {"a": []}, decoding, progress=True)
    monkeypatch.setattr(_decode_loop.DecodeLoop, "run", run)
    return sizes, [answer.tokens for answer in answers]


def test_each_batch_has_as_many_rows_as_its_own_longest_row_allows(tiny, monkeypatch, capsys):
    prompts, decoding = questions(12), Decoding(max_new_tokens=3)
    _, expected = batches_made(tiny, monkeypatch, prompts, decoding)
    capsys.readouterr()
    with plain(tiny):
        longest = max(len(row.ids) for row in encode(tiny, prompts))
        row = _memory.bytes_per_row(tiny, longest, 3)
        budget = 3 * (row.kept + row.passing)
        monkeypatch.setattr(_decode_loop, "memory_budget", lambda model: budget)
        monkeypatch.setattr(_memory, "LEAST", 0)
        sizes, found = batches_made(tiny, monkeypatch, prompts, decoding)
    assert found == expected
    assert len(sizes[0]) == 3
    assert max(sizes[0]) == longest
    assert len(sizes[-2]) > 3  # shorter rows, more of them
    for lengths in sizes:
        each = _memory.bytes_per_row(tiny, max(lengths), 3)
        assert len(lengths) * (each.kept + each.passing) <= budget
    said = capsys.readouterr().err
    most = max(map(len, sizes))
    assert f"12 answers of at most 3 tokens in {len(sizes)} batches of up to {most} rows; " in said


def test_the_announcement_says_what_is_allowed_and_what_the_weights_take(tiny, monkeypatch, capsys):
    monkeypatch.setattr(_decode_loop, "memory_budget", lambda model: 3 * 2**20)
    monkeypatch.setattr("workbench.generation.answers.weight_bytes", lambda model: 7 * 2**20 + 1)
    generate(tiny, questions(2), decoding=Decoding(max_new_tokens=2), progress=True)
    said = capsys.readouterr().err
    assert re.search(r"take up to 0 MiB of 3 MiB allowed, beside 7 MiB of weights\.", said)
    decoding = Decoding(max_new_tokens=2, batch_size=2)
    generate(tiny, questions(2), decoding=decoding, progress=True)
    assert "take up to 0 MiB, beside 7 MiB of weights." in capsys.readouterr().err


def test_a_given_batch_size_is_taken_whatever_memory_is_free(tiny, monkeypatch):
    monkeypatch.setattr(_decode_loop, "memory_budget", lambda model: 1)
    sizes, _ = batches_made(
        tiny, monkeypatch, questions(7), Decoding(max_new_tokens=2, batch_size=5)
    )
    assert [len(lengths) for lengths in sizes] == [5, 2]


def test_prefixes_of_many_groups_are_read_few_at_a_time(tiny, monkeypatch):
    from workbench.steering.interventions import scale_neurons

    conditions = {f"{n}": scale_neurons([(1, n)], 0.0) for n in range(5)}
    sizes: list[int] = []
    right = _decode_loop.prefix_cache

    def spy(model, ids, *, rows=1):
        sizes.append(rows)
        return right(model, ids, rows=rows)

    monkeypatch.setattr(_decode_loop, "prefix_cache", spy)
    decoding = Decoding(max_new_tokens=2)
    expected = [c.tokens for c in sweep(tiny, questions(3), conditions, decoding)]
    assert sizes == [6]
    sizes.clear()
    monkeypatch.setattr(_decode_loop, "rows_that_fit", lambda *_, **__: 4)
    assert [c.tokens for c in sweep(tiny, questions(3), conditions, decoding)] == expected
    assert sizes == [4, 2]
