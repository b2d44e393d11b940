"""A batch that rows join and leave writes the answer that each row gets alone."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.gates import gate, half_open, through, vector
from helpers.tiny_models import sentences

from workbench.generation._endings import Endings
from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.generation.running import Asked, RunningBatch
from workbench.models.tokens import encode
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import ablate_direction, add_vector


def ways_of_steering(model):
    """Return one list of interventions of each kind."""
    a_gate = half_open(model, [Prompt(text) for text in sentences(30)])[0]
    one, two = vector(model, 1), vector(model, 2, "malware")
    return [
        (),
        (add_vector(one, rho=0.5),),
        (add_vector(two, rho=-0.4, positions="generated"),),
        (add_vector(two, rho=0.9, until=3),),
        (add_vector(one, rho=0.9, until=6, decay="linear", keep_norm=True),),
        (add_vector(one, rho=0.3, positions="prompt"), add_vector(two, rho=0.3)),
        tuple(ablate_direction(two)),
        tuple(through(model, a_gate, 0.9)),
        tuple(through(model, gate(model, form="stepwise"), 0.9)),
    ]


def asked(model, text, interventions=(), **settings):
    decoding = Decoding(**{"max_new_tokens": 12, **settings})
    (encoded,) = encode(model, [Prompt(text)], **decoding.asked_by)
    return Asked(encoded, interventions, decoding, Endings.of(model, decoding))


def alone(model, one):
    """Answer by ``generate``; return the tokens and how they ended."""
    (answer,) = generate(model, [one.encoded.prompt], list(one.interventions), one.decoding)
    return list(answer.tokens), answer.finish


def write(batch, waiting, *, at_once=3, order=None, leaving=()):
    """Write answers whose rows join a few at a time; return tokens and finish of each."""
    waiting, rng = list(waiting), random.Random(order)
    written = {one: [] for one in waiting}
    ended, steps = {}, 0
    while waiting or batch.alive:
        n = rng.randint(0, at_once) if batch.alive else at_once
        joining, waiting = waiting[:n], waiting[n:]
        for token in (batch.join(joining) if joining else []) + batch.step():
            written[token.asked].append(token)
            ended[token.asked] = token.finish
        steps += 1
        batch.leave([one for one, step in leaving if step == steps])
    batch.close()
    return {one: (tokens, ended[one]) for one, tokens in written.items()}


def cut(one, tokens, finish):
    """Cut an answer as ``generate`` cuts it."""
    ids = [token.id for token in tokens]
    answer = one.endings.written(ids[:-1] if finish == "eos" else ids, finish)
    return answer.tokens, answer.finish


@pytest.mark.parametrize("family", ["llama3", "gpt2", "gemma2"])
def test_rows_that_join_at_any_time_get_the_answers_they_get_alone(family_model, family) -> None:
    model = family_model(family)
    ways, texts = ways_of_steering(model), sentences(18, seed=3)
    rng = random.Random(0)
    rows = [
        asked(
            model,
            " and ".join(texts[: 1 + i % 4]) if i % 5 == 0 else texts[i],
            ways[i % len(ways)],
            max_new_tokens=rng.randint(1 if i % len(ways) != 2 else 4, 14),
        )
        for i in range(18)
    ]
    batch = RunningBatch(model)
    if family == "gemma2":  # its windows count columns: a batch is written to its end
        rows = rows[:9]
    waiting, written = list(rows), {one: [] for one in rows}
    finish = {}
    while waiting or batch.alive:
        joining = []
        while waiting and len(joining) < 2 and batch.may_join(joining, waiting[0]):
            joining.append(waiting.pop(0))
        for token in (batch.join(joining) if joining else []) + batch.step():
            written[token.asked].append(token)
            finish[token.asked] = token.finish
    batch.close()
    for one in rows:
        assert cut(one, written[one], finish[one]) == alone(model, one)


def test_rows_that_leave_make_room_and_change_no_other(tiny) -> None:
    ways, texts = ways_of_steering(tiny), sentences(10, seed=5)
    rows = [asked(tiny, text, ways[i % 5], max_new_tokens=20) for i, text in enumerate(texts)]
    gone = [(rows[0], 2), (rows[4], 5)]
    written = write(RunningBatch(tiny), rows, order=1, leaving=gone)
    for one in rows:
        tokens, finish = written[one]
        if one in dict(gone):
            assert finish is None
            assert len(tokens) < 20
        else:
            assert cut(one, tokens, finish) == alone(tiny, one)


def test_a_long_traffic_of_short_rows_does_not_widen_the_batch(tiny) -> None:
    rows = [asked(tiny, text, max_new_tokens=16) for text in sentences(40, seed=8)]
    batch, waiting, widest = RunningBatch(tiny), list(rows), 0
    while waiting or batch.alive:
        batch.join([waiting.pop(0)]) if waiting else None
        batch.step()
        widest = max(widest, batch.width)
    longest = max(len(one.encoded.ids) for one in rows) + 16
    assert widest < longest + 64


def test_samples_are_those_of_generate_and_stops_end_answers(tiny) -> None:
    text = sentences(1)[0]
    settings = {"temperature": 1.3, "top_p": 0.8, "top_k": 50, "seed": 4}
    sampled = asked(tiny, text, **settings)
    full = generate(tiny, [sampled.encoded.prompt], (), sampled.decoding)[0].text
    stopped = asked(tiny, text, **settings, stop=(full[3:5],))
    greedy = asked(tiny, text)
    written = write(RunningBatch(tiny), [sampled, greedy, stopped])
    for one in (sampled, greedy, stopped):
        assert cut(one, *written[one]) == alone(tiny, one)
    assert written[stopped][1] == "stop"


def test_an_unsteered_row_has_the_same_bits_whatever_was_written_before(tiny) -> None:
    plain = asked(tiny, "plan a party at home")
    plain = Asked(plain.encoded, (), plain.decoding, plain.endings, n_likely=5)
    batch = RunningBatch(tiny)
    before = write(batch, [plain])[plain][0]
    ways = ways_of_steering(tiny)
    write(batch, [asked(tiny, text, ways[i % 9]) for i, text in enumerate(sentences(12))], order=2)
    after = write(batch, [plain])[plain][0]
    assert [token._replace(asked=None) for token in before] == [
        token._replace(asked=None) for token in after
    ]
    assert before[0].log_prob == pytest.approx(before[0].likely[0][1])
    assert len(before[0].likely) == 5


def test_numbers_that_cannot_be_held_end_their_own_row_alone(tiny) -> None:
    huge = asked(tiny, "write a poem", (add_vector(vector(tiny, size=1e30), 1e30),))
    good = [asked(tiny, text) for text in sentences(3)]
    written = write(RunningBatch(tiny), [good[0], huge, *good[1:]])
    assert written[huge][1] == "failed"
    for one in good:
        assert cut(one, *written[one]) == alone(tiny, one)


def test_a_row_says_whether_its_gate_opened(tiny) -> None:
    prompts = [Prompt(text) for text in sentences(6)]
    a_gate, is_open = half_open(tiny, prompts)
    steering = tuple(through(tiny, a_gate))
    rows = [asked(tiny, prompt.text, steering) for prompt in prompts]
    batch = RunningBatch(tiny)
    first = batch.join([*rows, asked(tiny, "list a recipe")])
    batch.close()
    assert [token.is_open for token in first] == [*is_open.tolist(), None]


def test_hooks_are_gone_when_the_batch_is_closed(tiny) -> None:
    batch = RunningBatch(tiny)
    batch.join([asked(tiny, "show a garden", (add_vector(vector(tiny), rho=0.5),))])
    batch.close()
    assert batch.alive == []
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


def test_a_join_that_fails_leaves_the_rows_that_are_written(tiny, family_model) -> None:
    one = asked(tiny, "describe a bicycle at home")
    foreign = asked(tiny, "help", (add_vector(vector(family_model("qwen2")), rho=0.5),))
    batch = RunningBatch(tiny)
    tokens = batch.join([one])
    with pytest.raises(ValueError, match="was fitted on"):
        batch.join([foreign])
    while batch.alive:
        tokens += batch.step()
    batch.close()
    assert cut(one, tokens, tokens[-1].finish) == alone(tiny, one)
    assert torch.is_grad_enabled()
