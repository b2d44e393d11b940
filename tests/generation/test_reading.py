"""Reading answers: what they share is read once, and the numbers are those of each alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.tiny_models import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.generation import _logits, reading
from workbench.generation.answers import Completion
from workbench.generation.reading import SPARED, read_rows, shared_beginnings, with_answers
from workbench.models import forward
from workbench.models.activations import cache_activations, pooled_batches
from workbench.models.forward import plain
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt

SITE = Site(2, "resid_post")


def family_of_answers(model: Any) -> list[Any]:
    """Rows of three prompts: answers that share beginnings, repeat, end in others, or are alone."""
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 290, (n,), generator=generator).tolist())

    first, second = drawn(12), drawn(9)
    answers = {
        0: [first, first + drawn(3), first + drawn(5), second, second + drawn(1), first, drawn(4)],
        1: [drawn(6)],
        2: [drawn(1), drawn(2), (), second],
    }
    texts = sentences(6)
    completions = [
        Completion(
            Prompt(f"p{i}", " ".join(texts[: i + 1]), None, "fraud", "unsafe", "test"),
            *("some text", tokens, "length", "unsteered"),
        )
        for i, of_prompt in answers.items()
        for tokens in of_prompt
    ]
    return with_answers(model, completions, {})


def states_of(model: Any, rows: list[Any]) -> torch.Tensor:
    """Mean states over the responses, as ``cache_activations`` reads them."""
    answered = [row for row in rows if row.response[1] > row.response[0]]
    batches = pooled_batches(model, answered, [SITE], "response", 1, 4096)
    return torch.cat([pooled[SITE] for _, pooled in batches])


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "gpt2", "pythia"])
def test_answers_that_share_beginnings_are_read_as_each_alone(family: str, family_model) -> None:
    model = family_model(family)
    rows = family_of_answers(model)
    together = read_rows(model, rows, site=SITE, batch_size=3)
    for row, log_probs in zip(rows, together.log_probs, strict=True):
        assert log_probs.shape == (row.response[1] - row.response[0],)
        torch.testing.assert_close(
            log_probs, read_rows(model, [row]).log_probs[0], atol=5e-5, rtol=1e-5
        )
    states = [state for state in together.states if state is not None]
    torch.testing.assert_close(torch.stack(states), states_of(model, rows), atol=1e-5, rtol=1e-4)
    assert [state is None for state in together.states] == [
        row.response[1] == row.response[0] for row in rows
    ]


def tokens_read(model: Any, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the real tokens that passes of a reading are given."""
    counts, right = [], _logits.last_logits

    def spy(model: Any, tokens: Any, mask: Any, *args: Any, **keywords: Any) -> Any:
        counts.append(int(mask[:, -tokens.shape[1] :].sum()))
        return right(model, tokens, mask, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(_logits, "last_logits", spy)
        read_rows(model, rows)
    return sum(counts)


def test_a_question_and_what_its_answers_begin_with_are_read_once(tiny, monkeypatch) -> None:
    rows = family_of_answers(tiny)[:3]
    prompt = rows[0].response[0]
    ids = rows[0].ids[:prompt]
    one, two, three = ((*ids, *range(20, 32), *rest) for rest in ((40,), (41, 42), (43, 44, 45)))
    rows = [
        dataclasses.replace(rows[0], ids=each, response=(prompt, len(each)))
        for each in (one, two, three, three)
    ]
    alone = tokens_read(tiny, rows[:1], monkeypatch)
    shared = tokens_read(tiny, rows, monkeypatch)
    assert alone <= len(one)
    # All but the first token of the prompt may be a prefix that is counted elsewhere.
    beyond = shared - 12 - (1 + 2 + 3)
    assert 1 <= beyond <= prompt
    with plain(tiny):
        assert tokens_read(tiny, rows, monkeypatch) == len(one) + len(two) + len(three)


@pytest.mark.parametrize("where", ["logits", "cache"])
def test_little_memory_changes_nothing(where: str, tiny, monkeypatch) -> None:
    rows = family_of_answers(tiny)
    expected = read_rows(tiny, rows, site=SITE)
    sizes, right = [], forward.head_logits

    def head_logits(*args: Any) -> Any:
        sizes.append(right(*args).shape)
        return right(*args)

    monkeypatch.setattr(forward, "head_logits", head_logits)
    monkeypatch.setattr(_logits if where == "logits" else reading, "MEMORY", 1)
    found = read_rows(tiny, rows, site=SITE)
    if where == "logits":
        assert {n_columns for _, n_columns, _ in sizes} == {1}, "a column at a time"
    torch.testing.assert_close(torch.cat(found.log_probs), torch.cat(expected.log_probs))
    for one, other in zip(found.states, expected.states, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_states_are_those_of_the_activation_cache(tiny) -> None:
    prompts = [
        Prompt(f"p{i}", text, "The dog sings and plays.", "fraud", "unsafe", "test")
        for i, text in enumerate(sentences(3))
    ]
    rows = reading.encode(tiny, prompts, with_response=True)
    states = read_rows(tiny, rows, site=SITE).states
    cached = cache_activations(tiny, prompts, SITE, span="response")[SITE].values
    torch.testing.assert_close(
        torch.stack([state for state in states if state is not None]), cached, atol=1e-5, rtol=1e-4
    )


def test_a_model_without_a_cache_reads_each_row_by_itself(tiny, monkeypatch) -> None:
    rows = family_of_answers(tiny)
    expected = torch.cat(read_rows(tiny, rows).log_probs)
    monkeypatch.setattr(reading, "may_share_prefix", lambda *_: False)
    torch.testing.assert_close(
        torch.cat(read_rows(tiny, rows).log_probs), expected, atol=5e-5, rtol=1e-5
    )


def partitions(items: list[int]) -> Any:
    """Every way to put items into groups."""
    if not items:
        yield []
        return
    head, *rest = items
    for groups in partitions(rest):
        yield [[head], *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], [head, *group], *groups[i + 1 :]]


def common(sequences: list[list[int]]) -> int:
    n = 0
    while all(len(s) > n and s[n] == sequences[0][n] for s in sequences):
        n += 1
    return n


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=14), min_size=1, max_size=5))
def test_groups_of_beginnings_spare_as_much_as_any_other_groups(
    sequences: list[list[int]],
) -> None:
    def spared(groups: list[list[int]]) -> int:
        several = [[sequences[i] for i in group] for group in groups if len(group) > 1]
        return sum((len(each) - 1) * common(each) - SPARED for each in several)

    groups = shared_beginnings(sequences)
    assert sorted(i for group, _ in groups for i in group) == list(range(len(sequences)))
    for group, n in groups:
        assert n == common([sequences[i] for i in group])
    best = max(spared(each) for each in partitions(list(range(len(sequences)))))
    assert spared([group for group, _ in groups]) == best
