"""One thread writes all answers; one that fails or is cancelled costs the others nothing."""

from __future__ import annotations

import threading

import pytest
from helpers.gates import vector
from helpers.tiny_models import sentences

from workbench.generation._endings import Endings
from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.generation.running import Asked
from workbench.models.tokens import encode
from workbench.prompts.prompt import Prompt
from workbench.serve.engine import Engine, Failed
from workbench.steering.interventions import add_vector


class Written:
    """Collects what an engine delivers."""

    def __init__(self) -> None:
        self.tokens: dict[Asked, list] = {}
        self.most = 0
        self.changed = threading.Condition()

    def __call__(self, tokens) -> None:
        with self.changed:
            self.most = max(self.most, len(tokens))
            for token in tokens:
                self.tokens.setdefault(token.asked, []).append(token)
            self.changed.notify_all()

    def wait_for(self, rows) -> None:
        def have_ended() -> bool:
            last = [self.tokens.get(one, [None])[-1] for one in rows]
            return all(isinstance(x, Failed) or (x is not None and x.finish) for x in last)

        with self.changed:
            assert self.changed.wait_for(have_ended, timeout=300)


@pytest.fixture
def running(tiny):
    written = Written()
    engine = Engine(tiny, written, max_rows=4)
    engine.start()
    yield engine, written
    engine.stop()
    assert not engine.is_alive
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


def asked(model, text, interventions=(), n=8):
    decoding = Decoding(max_new_tokens=n)
    (encoded,) = encode(model, [Prompt(text)])
    return Asked(encoded, interventions, decoding, Endings.of(model, decoding))


def text_of(one, tokens):
    ids = [token.id for token in tokens]
    finish = tokens[-1].finish
    return one.endings.written(ids[:-1] if finish == "eos" else ids, finish).text


def alone(model, one):
    return generate(model, one.encoded.prompt, list(one.interventions), one.decoding)[0].text


def test_more_answers_than_rows_are_written_in_turn(tiny, running) -> None:
    engine, written = running
    ways = [(), (add_vector(vector(tiny, 1), rho=0.6),), (add_vector(vector(tiny, 2), rho=-0.6),)]
    rows = [asked(tiny, text, ways[i % 3]) for i, text in enumerate(sentences(13))]
    engine.submit(rows)
    written.wait_for(rows)
    assert [text_of(one, written.tokens[one]) for one in rows] == [alone(tiny, x) for x in rows]
    assert 1 < written.most <= 4


def test_a_prompt_that_fails_ends_itself_alone(tiny, family_model, running) -> None:
    engine, written = running
    foreign = (add_vector(vector(family_model("qwen2")), rho=0.5),)
    texts = sentences(4)
    rows = [asked(tiny, text, foreign if i == 1 else ()) for i, text in enumerate(texts)]
    engine.submit(rows)
    written.wait_for(rows)
    assert written.tokens[rows[1]] == [Failed(rows[1])]
    for one in (rows[0], *rows[2:]):
        assert text_of(one, written.tokens[one]) == alone(tiny, one)


def test_a_step_that_fails_ends_what_is_written_and_the_engine_goes_on(
    tiny, running, monkeypatch
) -> None:
    engine, written = running
    first = asked(tiny, "list a poem")

    def breaks(self):
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr("workbench.generation.running.RunningBatch.step", breaks)
    engine.submit([first])
    written.wait_for([first])
    assert isinstance(written.tokens[first][-1], Failed)
    again = asked(tiny, "list a poem")
    engine.submit([again])
    written.wait_for([again])
    assert text_of(again, written.tokens[again]) == alone(tiny, again)


def test_cancelled_answers_make_room(tiny, running) -> None:
    engine, written = running
    long = [asked(tiny, text, n=400) for text in sentences(4, seed=9)]
    short = asked(tiny, "show a garden at home", n=3)
    engine.submit([*long, short])
    with written.changed:
        assert written.changed.wait_for(lambda: len(written.tokens) >= 4, timeout=300)
    engine.cancel(long)
    written.wait_for([short])
    assert text_of(short, written.tokens[short]) == alone(tiny, short)


def test_the_model_can_be_looked_at_between_two_steps(tiny, running) -> None:
    engine, written = running
    steered = asked(tiny, "plan a party", (add_vector(vector(tiny), rho=0.5),), n=30)
    engine.submit([steered])
    hooks = engine.call(lambda model: [p for p in model.hook_dict.values() if p.fwd_hooks])
    assert hooks.result(60) == []
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda model: 1 / 0).result(60)
    written.wait_for([steered])
    assert text_of(steered, written.tokens[steered]) == alone(tiny, steered)
