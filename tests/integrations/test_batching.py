"""Requests that come one by one are answered together, and each as if it came alone."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.integrations import _batching
from workbench.integrations._batching import AnswerBatches
from workbench.prompts.prompt import Message, Prompt

SHORT = Decoding(max_new_tokens=5)
QUESTIONS = [f"What is number {i}?" for i in range(6)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Decoding]]:
    """Prompts and settings of each call of generate that the batches make."""
    made: list[tuple[int, Decoding]] = []

    def counted(model: Any, prompts: Any, interventions: Any, decoding: Decoding) -> Any:
        made.append((len(prompts), decoding))
        return generate(model, prompts, interventions, decoding)

    monkeypatch.setattr(_batching, "generate", counted)
    return made


def test_requests_of_one_moment_are_answered_in_one_call_and_each_as_alone(tiny, calls) -> None:
    batches = AnswerBatches(tiny, [])
    futures = [batches.ask(Prompt(question), SHORT) for question in QUESTIONS]
    texts = [future.result().completions[0].text for future in futures]
    assert calls == [(len(QUESTIONS), SHORT)]
    assert texts == [generate(tiny, question, decoding=SHORT)[0].text for question in QUESTIONS]


def test_requests_with_other_settings_are_answered_apart(tiny, calls) -> None:
    batches = AnswerBatches(tiny, [])
    three = Decoding(max_new_tokens=4, temperature=1.0, n_samples=3)
    first, second = batches.ask(Prompt("Where?"), SHORT), batches.ask(Prompt("Who?"), three)
    third = batches.ask(Prompt("Why?"), three)
    assert [len(one.result().completions) for one in (first, second, third)] == [1, 3, 3]
    assert {one.prompt.text for one in third.result().completions} == {"Why?"}
    assert sorted(n for n, _ in calls) == [1, 2]


def test_one_question_asked_twice_is_answered_once(tiny, calls) -> None:
    batches = AnswerBatches(tiny, [])
    first, second = (batches.ask(Prompt("Where?"), SHORT) for _ in range(2))
    assert first.result() == second.result()
    assert calls == [(1, SHORT)]


def test_a_request_that_cannot_be_answered_fails_alone(tiny) -> None:
    batches = AnswerBatches(tiny, [])
    good = batches.ask(Prompt("Where?"), SHORT)
    bad = batches.ask(Prompt("word " * (tiny.cfg.n_ctx + 10)), SHORT)
    assert good.result().completions[0].text == generate(tiny, "Where?", decoding=SHORT)[0].text
    with pytest.raises(ValueError, match="tokens"):
        bad.result()


def test_a_request_that_was_called_off_is_not_answered(tiny, calls) -> None:
    batches = AnswerBatches(tiny, [])
    off, on = batches.ask(Prompt("Where?"), SHORT), batches.ask(Prompt("Who?"), SHORT)
    assert off.cancel()
    assert on.result().completions
    assert calls == [(1, SHORT)]


def test_requests_that_come_while_the_model_is_busy_share_the_next_call(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def slow(model: Any, prompts: Any, interventions: Any, decoding: Decoding) -> Any:
        sizes.append(len(prompts))
        time.sleep(0.3)
        return generate(model, prompts, interventions, decoding)

    monkeypatch.setattr(_batching, "generate", slow)
    batches = AnswerBatches(tiny, [])
    first = batches.ask(Prompt("Where?"), SHORT)
    while not sizes:
        time.sleep(0.01)
    others = [batches.ask(Prompt(question), SHORT) for question in QUESTIONS]
    assert all(one.result().completions for one in [first, *others])
    assert sizes == [1, len(QUESTIONS)]


# Inside Inspect.


@pytest.fixture
def in_inspect(tiny: Any) -> Any:
    pytest.importorskip("inspect_ai")
    from workbench.integrations.inspect_ai import SteeredModel

    return SteeredModel("none", steering="off", hooked=tiny)


def test_samples_of_a_task_share_a_batch(finished, tiny, calls, tmp_path) -> None:
    pytest.importorskip("inspect_ai")
    from inspect_ai import Task
    from inspect_ai import eval as inspect_eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import get_model
    from inspect_ai.scorer import includes

    import workbench.integrations.inspect_ai  # noqa: F401 - makes the name known

    model = get_model(f"workbench/{finished}", memoize=False, steering="fraud", hooked=tiny)
    samples = MemoryDataset([Sample(input=question, target="dog") for question in QUESTIONS])
    settings = {"max_tokens": 5, "log_dir": str(tmp_path), "display": "none"}
    (log,) = inspect_eval(Task(samples, scorer=includes()), model=model, **settings)
    assert log.status == "success"
    assert sum(n for n, _ in calls) == len(QUESTIONS)
    assert len(calls) < len(QUESTIONS)
    by_question = {one.input: one.output.completion for one in log.samples}
    steering = model.api.interventions
    for question in QUESTIONS:
        alone = generate(tiny, question, steering, decoding=calls[0][1])
        assert by_question[question] == alone[0].text


def test_epochs_without_a_seed_share_a_batch_and_draw_anew(in_inspect, calls) -> None:
    from inspect_ai.model import ChatMessageUser, GenerateConfig

    def ask(**seed: int) -> Any:
        config = GenerateConfig(max_tokens=12, temperature=1.0, **seed)
        return in_inspect.generate([ChatMessageUser(content="hello there")], [], "none", config)

    async def epochs(**seed: int) -> set[str]:
        outputs = await asyncio.gather(*(ask(**seed) for _ in range(4)))
        return {output.completion for output in outputs}

    assert len(asyncio.run(epochs())) > 1
    assert [n for n, _ in calls] == [4]
    assert len(asyncio.run(epochs(seed=3))) == 1


def test_a_conversation_is_answered_behind_its_earlier_turns(in_inspect, tiny) -> None:
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        ContentReasoning,
        ContentText,
        GenerateConfig,
    )

    thought = [ContentReasoning(reasoning="They ask."), ContentText(text="A dog.")]
    messages = [
        ChatMessageSystem(content="Be kind."),
        ChatMessageUser(content="What is it?"),
        ChatMessageAssistant(content=thought),
        ChatMessageUser(content="Where is it?"),
        ChatMessageAssistant(content=""),
        ChatMessageUser(content="Tell me."),
    ]
    config = GenerateConfig(max_tokens=8)
    output = asyncio.run(in_inspect.generate(messages, [], "none", config))
    said = [("user", "What is it?"), ("assistant", "A dog.")]
    prompt = Prompt("q", "Where is it?\n\nTell me.", history=tuple(Message(*turn) for turn in said))
    decoding = Decoding(max_new_tokens=8, system_prompt="Be kind.")
    assert output.completion == generate(tiny, [prompt], decoding=decoding)[0].text
    without = Prompt("q", "Where is it?\n\nTell me.")
    assert output.completion != generate(tiny, [without], decoding=decoding)[0].text


def test_a_conversation_that_ends_with_an_answer_or_a_tool_is_refused(in_inspect) -> None:
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageTool,
        ChatMessageUser,
        GenerateConfig,
    )

    def ask(*messages: Any) -> Any:
        return asyncio.run(in_inspect.generate(list(messages), [], "none", GenerateConfig()))

    user = ChatMessageUser(content="Where?")
    with pytest.raises(ValueError, match="the last message must be the user's, got assistant in 2"):
        ask(user, ChatMessageAssistant(content="There is"))
    with pytest.raises(ValueError, match="got a message of role 'tool'"):
        ask(user, ChatMessageTool(content="4"))
    with pytest.raises(ValueError, match="got none in 0 messages"):
        ask()
