"""Batches: rows of unlike length together with little padding, and back in their order."""

from __future__ import annotations

import pytest
import torch
from helpers.activation_sets import PROMPTS, few
from helpers.architectures import tiny_architecture
from hypothesis import given
from hypothesis import strategies as st

from workbench.models import batches as batches_module
from workbench.models.batches import (
    batches_by_length,
    batches_under_budget,
    in_given_order,
    order_by_length,
    pad_ids,
    share_prefix,
    widths_to_keep_apart,
)
from workbench.models.forward import (
    forward,
    joined_caches,
    rows_of_cache,
    without_shared_prefix,
)
from workbench.models.load import hooked
from workbench.models.tokens import Encoded, encode

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=20)


@few
@given(st.integers(1, 8), st.integers(1, 300))
def test_batches_keep_to_rows_and_tokens(tiny, batch_size, max_tokens) -> None:
    rows = sorted(encode(tiny, PROMPTS), key=lambda row: -len(row.ids))
    batches = list(batches_under_budget(rows, batch_size, max_tokens))
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        assert len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * max(len(row.ids) for row in batch) <= max_tokens


@given(lengths, st.booleans())
def test_rows_are_sorted_by_length_and_ties_stay_in_order(sizes, longest_first) -> None:
    order = order_by_length(sizes, longest_first=longest_first)
    expected = sorted(
        range(len(sizes)), key=lambda row: -sizes[row] if longest_first else sizes[row]
    )
    assert order == expected


def test_ties_may_be_ordered_by_a_name() -> None:
    assert order_by_length([2, 3, 2, 2], ties=["c", "z", "a", "b"]) == [1, 2, 3, 0]


@given(lengths, st.integers(1, 7))
def test_batches_hold_every_row_once_and_results_come_back_in_order(sizes, size) -> None:
    batches = batches_by_length(sizes, size)
    order = [row for batch in batches for row in batch]
    assert order == order_by_length(sizes)
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    results = torch.tensor([sizes[row] for row in order])
    assert in_given_order(results, order).tolist() == sizes


@pytest.mark.parametrize(
    ("side", "tokens"),
    [("left", [[7, 8, 9], [0, 0, 5], [0, 0, 0]]), ("right", [[7, 8, 9], [5, 0, 0], [0, 0, 0]])],
)
def test_rows_of_ids_are_padded_on_either_side(side, tokens) -> None:
    ids, mask = pad_ids([(7, 8, 9), (5,), ()], pad_id=0, side=side)
    assert ids.tolist() == tokens
    assert mask.tolist() == [[token != 0 for token in row] for row in tokens]
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)


def test_a_shared_prefix_gives_each_batch_a_cache_of_its_own(tiny) -> None:
    rows = encode(tiny, PROMPTS[:2])
    prefix = share_prefix(tiny, rows, keep=lambda row: row.content[0])
    assert prefix.length == rows[0].content[0] > 0
    first, second = prefix.for_rows(1), prefix.for_rows(1)
    tokens = torch.tensor([rows[0].ids[prefix.length :]])
    mask = torch.ones(1, len(rows[0].ids), dtype=torch.bool)
    with torch.no_grad():
        once, _ = forward(tiny, tokens, mask, cache=first)
        again, _ = forward(tiny, tokens, mask, cache=second)
    assert torch.equal(once, again)


def test_without_a_prefix_there_is_no_cache(tiny, family_model) -> None:
    with without_shared_prefix():
        prefix = share_prefix(tiny, encode(tiny, PROMPTS), keep=lambda row: row.content[0])
    assert (prefix.length, prefix.for_rows(3)) == (0, None)
    gemma = family_model("gemma3")  # its window is 32 columns
    rows = encode(gemma, PROMPTS)
    for columns, is_shared in ((None, True), (20, True), (50, False)):
        prefix = share_prefix(gemma, rows, lambda row: row.content[0], padded_columns=columns)
        assert (prefix.length > 0) == (prefix.cache is not None) == is_shared


def test_rows_that_may_not_share_a_batch_are_kept_apart(tiny, monkeypatch) -> None:
    lengths = [4, 2, 4, 2, 2, 3, 4]
    apart = batches_by_length(lengths, 2, alike=lengths)
    assert sorted(row for batch in apart for row in batch) == list(range(7))
    assert all(len({lengths[row] for row in batch}) == 1 for batch in apart)
    assert [len(batch) for batch in apart] == [2, 1, 1, 2, 1]
    rows = [Encoded(PROMPTS[0], (5,) * n, (0, 1), (n, n)) for n in sorted(lengths)]
    batches = list(batches_under_budget(rows, 2, 1000, mixed=False))
    assert [[len(row.ids) for row in batch] for batch in batches] == [
        [2, 2], [2], [3], [4, 4], [4]
    ]  # fmt: skip
    assert widths_to_keep_apart(tiny, lengths) is None
    monkeypatch.setattr(batches_module, "trusts", lambda model, route: route != "padding")
    assert widths_to_keep_apart(tiny, lengths) == lengths
    assert widths_to_keep_apart(tiny, lengths, "right") is None


def test_rows_of_a_recurrent_cache_are_taken_and_left_as_they_were() -> None:
    hf_model, tokenizer = tiny_architecture("Qwen3_5ForCausalLM")
    model = hooked(hf_model, tokenizer, "states")
    tokens = torch.tensor([[9, 40, 41, 60], [9, 33, 34, 7]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        expected, _ = forward(model, tokens, mask)
        _, cache = forward(model, tokens[:, :3], mask[:, :3], use_cache=True)
        for rows in ([1, 0, 1], [0], [0, 1]):
            taken = rows_of_cache(cache, torch.tensor(rows))
            found, _ = forward(model, tokens[rows, 3:], mask[rows], cache=taken)
            torch.testing.assert_close(found, expected[rows], rtol=1e-4, atol=1e-5)
        halves = [rows_of_cache(cache, torch.tensor([row])) for row in (1, 0)]
        found, _ = forward(model, tokens[[1, 0], 3:], mask, cache=joined_caches(halves))
    torch.testing.assert_close(found, expected[[1, 0]], rtol=1e-4, atol=1e-5)
