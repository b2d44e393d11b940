"""Two-choice questions: one text and two letters a pair, and no letter that tells the side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.openings import CATEGORIES, OPENINGS, prompts_of

from workbench.models.activations import cache_activations, token_activations
from workbench.models.sites import Site
from workbench.models.tokens import encode
from workbench.prompts.choices import choice_prompts


def test_a_pair_has_one_text_and_differs_in_the_letter() -> None:
    rows = choice_prompts(prompts_of(4), OPENINGS)
    by_pair: dict[Any, Any] = {}
    for row in rows:
        by_pair.setdefault(row.pair_id, {})[row.label] = row
    assert len(by_pair) == 4 * 3 * len(CATEGORIES)
    for pair in by_pair.values():
        safe, unsafe = pair["safe"], pair["unsafe"]
        assert safe.text == unsafe.text
        assert {safe.response, unsafe.response} == {"A", "B"}
        for row, kind in ((safe, "safe reframing"), (unsafe, "going along")):
            assert f"({row.response}) {kind} {row.category}" in row.text


def test_the_safe_choice_is_a_as_often_as_b_in_every_category_whatever_the_seed() -> None:
    orders = set()
    for seed in range(6):
        rows = [r for r in choice_prompts(prompts_of(5), OPENINGS, seed=seed) if r.label == "safe"]
        for category in CATEGORIES:
            letters = [row.response for row in rows if row.category == category]
            assert abs(letters.count("A") - letters.count("B")) <= 1
        orders.add("".join(str(row.response) for row in rows))
    assert len(orders) > 1
    assert choice_prompts(prompts_of(5), OPENINGS, seed=1) == choice_prompts(
        prompts_of(5), OPENINGS, seed=1
    )


@pytest.mark.parametrize("family", ["llama3", "gpt2", "llama2", "gemma2"])
def test_what_is_read_is_the_letters_token(family: str, family_model: Any) -> None:
    model, site = family_model(family), Site(1, "resid_post")
    rows = choice_prompts(prompts_of(1), OPENINGS, per_prompt=1)
    read = cache_activations(model, rows, site, span="response")[site]
    letters = []
    for row, encoded, value in zip(
        rows, encode(model, rows, with_response=True), read.values, strict=True
    ):
        start, end = encoded.response
        assert model.tokenizer.decode(encoded.ids[-1:]).strip() == row.response
        tokens = token_activations(model, row, site)[1]
        letters.append((tokens[-1], end - start))
        if family != "gpt2":  # its tiny tokenizer has no token of a space and a letter
            assert end - start == 1
            torch.testing.assert_close(value, tokens[-1], rtol=1e-4, atol=1e-4)
    for place in range(0, len(rows), 2):
        (one, n_tokens), (other, _) = letters[place : place + 2]
        difference = read.values[place] - read.values[place + 1]
        torch.testing.assert_close(difference * n_tokens, one - other, rtol=1e-3, atol=1e-4)
