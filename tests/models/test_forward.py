"""Forward passes: padding, caches and early stops never change what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.hugging_face import calls_of, plain_model
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.models import forward as forward_module
from workbench.models.batches import pad
from workbench.models.forward import (
    forward,
    has_key_value_cache,
    last_logits,
    prefix_cache,
    reading,
    rows_of_cache,
    shared_prefix_length,
)
from workbench.models.sites import Site
from workbench.models.tokens import Encoded, encode
from workbench.prompts.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = [[9, 40, 41, 60, 7, 88], [9, 40, 120], [9, 33, 33, 34, 50, 61, 72, 83, 94, 105]]
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def encoded(rows: Sequence[Sequence[int]]) -> list[Encoded]:
    prompt = Prompt("p", "x", None, "c", "safe", "s")
    return [Encoded(prompt, tuple(row), (1, len(row)), (len(row), len(row))) for row in rows]


def last_columns(batch: Any) -> list[int]:
    return [int(row.nonzero()[-1]) for row in batch.mask]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "gpt2", "pythia"])
@torch.no_grad()
def test_padding_on_either_side_leaves_every_rows_logits(
    family_model, family_path, family: str, side: str
) -> None:
    model, plain = family_model(family), plain_model(family_path(family))
    batch = pad(encoded(ROWS), pad_id=5, side=side)
    width = batch.tokens.shape[1]
    logits, _ = last_logits(model, batch.tokens, batch.mask, width)
    assert logits.shape[:2] == batch.tokens.shape
    for row, ids in enumerate(ROWS):
        torch.testing.assert_close(
            logits[row][batch.mask[row]], plain(torch.tensor([ids])).logits[0], **CLOSE
        )


@torch.no_grad()
def test_only_the_columns_asked_for_get_logits(tiny) -> None:
    batch = pad(encoded(ROWS), pad_id=5, side="left")
    whole, cache = last_logits(tiny, batch.tokens, batch.mask, batch.tokens.shape[1])
    assert cache is None
    for n in (1, 3):
        some, _ = last_logits(tiny, batch.tokens, batch.mask, n)
        assert some.shape[1] == n
        torch.testing.assert_close(some, whole[:, -n:], **CLOSE)
    last, _ = forward(tiny, batch.tokens, batch.mask)
    torch.testing.assert_close(last, whole[:, -1], **CLOSE)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2", "pythia"])
@torch.no_grad()
def test_a_prefix_and_its_rest_are_the_whole(family_model, family: str) -> None:
    model = family_model(family)
    prefix = [9, 40, 41, 60] * 11  # longer than Gemma's window of 32
    rests = [[7, 88, 12], [33]]
    batch = pad(encoded(rests), pad_id=5, side="right")
    mask = torch.cat([torch.ones(2, len(prefix), dtype=torch.bool), batch.mask], dim=1)
    cache = rows_of_cache(prefix_cache(model, prefix), torch.zeros(2, dtype=torch.long))
    logits, _ = last_logits(model, batch.tokens, mask, 3, cache=cache)
    for row, rest in enumerate(rests):
        expected = model(torch.tensor([prefix + rest]))[0, len(prefix) :]
        torch.testing.assert_close(logits[row, : len(rest)], expected, **CLOSE)


@torch.no_grad()
def test_decoding_token_by_token_is_one_pass(tiny) -> None:
    batch = pad(encoded([row[:3] for row in ROWS]), pad_id=5, side="left")
    logits, cache = forward(tiny, batch.tokens, batch.mask, use_cache=True)
    mask = batch.mask
    for token in (50, 60, 70):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], dim=1)
        logits, cache = forward(tiny, torch.full((3, 1), token), mask, cache=cache)
    for row in range(3):
        expected = tiny(torch.tensor([[*ROWS[row][:3], 50, 60, 70]]))[0, -1]
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@torch.no_grad()
def test_taking_rows_of_a_cache_leaves_it_as_it_was(tiny) -> None:
    tokens = torch.tensor([[9, 40, 41], [9, 50, 51]])
    _, cache = forward(tiny, tokens, torch.ones(2, 3, dtype=torch.bool), use_cache=True)
    before = [layer.keys.clone() for layer in cache.layers]
    chosen = rows_of_cache(cache, torch.tensor([1, 0, 1]))
    logits, _ = forward(
        tiny, torch.tensor([[7], [7], [8]]), torch.ones(3, 4, dtype=torch.bool), cache=chosen
    )
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)  # neither reordered nor grown
    for row, ids in enumerate([[9, 50, 51, 7], [9, 40, 41, 7], [9, 50, 51, 8]]):
        torch.testing.assert_close(logits[row], tiny(torch.tensor([ids]))[0, -1], **CLOSE)


@torch.no_grad()
def test_a_model_without_this_cache_runs_whole_rows(tiny, monkeypatch) -> None:
    assert has_key_value_cache(tiny)
    batch = pad(encoded(ROWS), pad_id=5, side="right")
    expected, _ = last_logits(tiny, batch.tokens, batch.mask, 4)
    monkeypatch.setattr(forward_module, "has_key_value_cache", lambda model: False)
    found, cache = last_logits(tiny, batch.tokens, batch.mask, 4, use_cache=True)
    assert cache is None
    for row in (0, 2):  # the second row is all padding there
        keep = batch.mask[row, -4:]
        torch.testing.assert_close(found[row][keep], expected[row][keep], **CLOSE)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5),
    st.integers(0, 6),
)
def test_the_shared_prefix_is_the_longest_that_nobody_reads(
    rows: list[list[int]], first: int
) -> None:
    def keep(row: Encoded) -> int:
        return min(first, len(row.ids) - 1)

    n = shared_prefix_length(encoded(rows), keep)
    limit = min(keep(row) for row in encoded(rows))
    assert all(row[:n] == rows[0][:n] for row in rows)
    assert n == limit or (n < limit and len({tuple(row[: n + 1]) for row in rows}) > 1)


def test_the_prefix_of_chat_prompts_is_their_template(tiny) -> None:
    rows = encode(
        tiny,
        [
            Prompt(str(i), text, None, "c", "safe", "s")
            for i, text in enumerate(("Tell me.", "Ask him."))
        ],
    )
    assert shared_prefix_length(rows, lambda row: row.content[0]) == rows[0].content[0] > 0


# Reading


@torch.no_grad()
def test_no_layer_runs_above_the_last_one_read(tiny) -> None:
    layers = tiny.original_model.model.layers
    tokens, seen = torch.tensor([[9, 40, 41]]), []
    with (
        calls_of(layers[1]) as second,
        calls_of(layers[2]) as third,
        calls_of(tiny.original_model.lm_head) as head,
        reading(
            tiny,
            [(Site(1, "mlp_post").hook_name, seen.append), (Site(0, "z").hook_name, seen.append)],
        ) as run,
    ):
        run(tokens, torch.ones_like(tokens, dtype=torch.bool))
        run(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert (len(second), len(third), len(head), len(seen)) == (2, 0, 0, 4)


@torch.no_grad()
def test_readers_see_what_run_with_cache_sees(tiny) -> None:
    tokens = torch.tensor([ROWS[0]])
    _, cache = tiny.run_with_cache(tokens)
    sites = [
        Site(layer, kind)
        for layer in range(4)
        for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    ]
    seen: dict[Site, torch.Tensor] = {}
    readers = [
        (site.hook_name, lambda a, site=site: seen.__setitem__(site, a.clone())) for site in sites
    ]
    with reading(tiny, readers) as run:
        run(tokens, torch.ones_like(tokens, dtype=torch.bool))
    for site in sites:
        torch.testing.assert_close(seen[site], cache[site.hook_name], rtol=0, atol=1e-5)


def hooks_left(model: Any) -> int:
    points = {id(point): point for point in model.hook_dict.values()}  # some have several names
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points.values())


@torch.no_grad()
def test_nothing_is_left_behind_after_a_stop_or_an_exception(tiny) -> None:
    tokens = torch.tensor([ROWS[0]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    before, left = tiny(tokens), hooks_left(tiny)

    def fail(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        with reading(tiny, [(Site(2, "resid_mid").hook_name, fail)]) as run:
            run(tokens, mask)

    with reading(tiny, [(Site(1, "resid_post").hook_name, lambda _: None)]) as run:
        run(tokens, mask)
        assert hooks_left(tiny) == left + 1
    assert hooks_left(tiny) == left
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks_left(tiny) == left
    assert torch.equal(tiny(tokens), before)


@torch.no_grad()
def test_a_run_after_a_failed_one_waits_for_every_reader_again(tiny) -> None:
    tokens, seen = torch.tensor([ROWS[0]]), []
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def fail_once(_: torch.Tensor) -> None:
        seen.append("late")
        if len(seen) == 2:
            raise TimeoutError

    readers = [
        (Site(0, "z").hook_name, lambda _: seen.append("early")),
        (Site(2, "z").hook_name, fail_once),
    ]
    with reading(tiny, readers) as run:
        with pytest.raises(TimeoutError):
            run(tokens, mask)
        run(tokens, mask)
    assert seen == ["early", "late", "early", "late"]


@torch.no_grad()
def test_a_hook_point_that_never_fires_is_an_error_not_a_silence(tiny) -> None:
    name, silent = (
        Site(0, "resid_post").hook_name,
        "hook_pos_embed",
    )  # a Llama has no embeddings of positions
    tokens = torch.tensor([ROWS[0]])
    with (
        reading(tiny, [(name, lambda _: None), (silent, lambda _: None)]) as run,
        pytest.raises(
            RuntimeError,
            match=rf"never fired: {silent}; this architecture does not compute them, so choose",
        ),
    ):
        run(tokens, torch.ones_like(tokens, dtype=torch.bool))
