"""The likeliest token and its log-probability are those that torch finds in all logits at once."""

from __future__ import annotations

import pytest
import torch

from workbench.generation._choice import WIDTH, likeliest, log_probs_of


@pytest.mark.parametrize("n_words", [3 * WIDTH, 5 * WIDTH + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_the_largest_logits_is_found(n_words: int, dtype: torch.dtype) -> None:
    logits = torch.randn(40, n_words, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:10] = logits[:10].round()  # many that are as large
    logits[10, [5, 70, 130]] = 99.0
    largest, tokens = likeliest(logits)
    firsts = [row.index(max(row)) for row in logits.tolist()]
    assert tokens.tolist() == firsts
    assert torch.equal(largest, logits.amax(dim=-1))


@pytest.mark.parametrize("n_words", [3 * WIDTH, 5 * WIDTH + 7])
def test_a_row_with_an_undefined_logit_has_an_undefined_largest_one(n_words: int) -> None:
    logits = torch.randn(4, n_words)
    logits[1, 150], logits[2, 0], logits[3, 9] = float("nan"), float("inf"), -float("inf")
    largest, _ = likeliest(logits)
    assert largest.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_of_some_rows_are_those_of_log_softmax(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(21, 200, generator=generator) + 300).to(dtype)
    tokens = torch.randint(0, 200, (21,), generator=generator)
    rows = torch.tensor([20, 0, 3, 4, 5, 7, 8, 9, 10, 11])
    before = logits.clone()
    found = log_probs_of(logits, likeliest(logits)[0], tokens, rows)
    expected = logits.double().log_softmax(dim=-1).gather(1, tokens[:, None])[rows, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)
