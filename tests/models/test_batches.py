"""Batches: rows of unlike length together with little padding, and back in their order."""

from __future__ import annotations

import pytest
import torch
from helpers.activation_sets import PROMPTS, few
from hypothesis import given
from hypothesis import strategies as st

from workbench.models.batches import (
    batches_by_length,
    batches_under_budget,
    in_given_order,
    order_by_length,
    pad_ids,
    share_prefix,
)
from workbench.models.forward import forward, without_shared_prefix
from workbench.models.tokens import encode

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
