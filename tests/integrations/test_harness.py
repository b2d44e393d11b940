"""The steered model inside other harnesses, where they are installed.

They come with ``pip install 'workbench[harness]'``.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.prompts.prompt import Prompt
from workbench.safesteer.saved_run import steering_from

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("steering", ["off", "fraud", "gated"])
def test_inspect_runs_a_task_on_the_steered_model(finished: Path, tiny, steering, tmp_path):
    pytest.importorskip("inspect_ai")
    from inspect_ai import Task
    from inspect_ai import eval as inspect_eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate as ask

    import workbench.integrations.inspect_ai  # noqa: F401 - makes the name known

    steered_model = get_model(
        f"workbench/{finished}", memoize=False, steering=steering, hooked=tiny
    )
    question = "How do I take a dog?"
    task = Task(
        MemoryDataset([Sample(input=question, target="dog")]), solver=ask(), scorer=includes()
    )
    settings = {"max_tokens": 6, "log_dir": str(tmp_path), "display": "none"}
    (log,) = inspect_eval(task, model=steered_model, **settings)
    assert log.status == "success"
    answer = log.samples[0].output.completion
    prompt = [Prompt("q", question, None, "harmless", "neutral", "t")]
    if steering != "gated":
        interventions = [] if steering == "off" else steering_from(finished, steering)
        decoding = Decoding(max_new_tokens=6)
        assert answer == generate(tiny, prompt, interventions, decoding=decoding)[0].text


def test_lm_eval_runs_a_task_on_the_steered_model(finished: Path, tiny, tmp_path):
    pytest.importorskip("lm_eval")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from workbench.integrations.lm_eval import SteeredLM

    rows = [{"q": f"What is {i}?", "choices": ["one", "two"], "gold": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        + str(tmp_path / "rows.jsonl")
        + "\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        SteeredLM(str(finished), model=tiny), tasks=["own"], task_manager=manager, bootstrap_iters=0
    )
    assert 0 <= results["results"]["own"]["acc,none"] <= 1
    unsteered = SteeredLM(str(finished), model=tiny, steering="off")
    requests = [SimpleNamespace(args=("Where?", {"until": ["\n"], "max_gen_toks": 4}))]
    assert unsteered.generate_until(requests) == [
        generate(
            tiny,
            [Prompt("q", "Where?", None, "harmless", "neutral", "t")],
            decoding=Decoding(max_new_tokens=4),
        )[0].text.split("\n")[0]
    ]
    (value, is_greedy), *_ = unsteered.loglikelihood([SimpleNamespace(args=("Where?", " here"))])
    assert value < 0
    assert isinstance(is_greedy, bool)
    assert unsteered.loglikelihood_rolling([SimpleNamespace(args=("A text.",))])[0] < 0


# Settings of a caller are followed or refused.


def ask(model, **settings):
    import asyncio

    from inspect_ai.model import ChatMessageUser, GenerateConfig

    config = GenerateConfig(**settings)
    message = [ChatMessageUser(content="hello there")]
    return asyncio.run(model.generate(message, [], "none", config))


@pytest.fixture
def in_inspect(tiny):
    pytest.importorskip("inspect_ai")
    from workbench.integrations.inspect_ai import SteeredModel

    return SteeredModel("none", steering="off", hooked=tiny)


def test_inspect_without_a_seed_draws_anew_and_with_one_the_same(in_inspect) -> None:
    warm = {"max_tokens": 12, "temperature": 1.0}
    assert len({ask(in_inspect, **warm).completion for _ in range(4)}) > 1
    assert len({ask(in_inspect, **warm, seed=3).completion for _ in range(3)}) == 1
    assert len({ask(in_inspect, max_tokens=12).completion for _ in range(2)}) == 1


def test_inspect_gets_stops_choices_reasons_and_usage(in_inspect) -> None:
    full = ask(in_inspect, max_tokens=30)
    assert full.stop_reason == "max_tokens"
    stop = full.completion[4:6]
    cut = ask(in_inspect, max_tokens=30, stop_seqs=[stop])
    assert cut.completion == full.completion[: full.completion.index(stop)]
    assert cut.stop_reason == "stop"
    three = ask(in_inspect, max_tokens=6, temperature=1.0, num_choices=3)
    assert len({choice.message.text for choice in three.choices}) == 3
    assert 12 < three.usage.output_tokens <= 18  # tokens that end an answer are none of it
    greedy = ask(in_inspect, max_tokens=6, temperature=3.0, top_k=1).completion
    assert greedy == ask(in_inspect, max_tokens=6).completion
    assert greedy == ask(in_inspect, max_tokens=6, temperature=1.0, top_p=1e-9).completion


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frequency_penalty": 0.5}, "does not follow frequency_penalty=0.5; leave it out"),
        ({"logprobs": True}, "does not follow logprobs=True"),
        ({"best_of": 3}, "does not follow best_of=3"),
        ({"num_choices": 2}, "2 samples at temperature 0"),
        ({"reasoning_effort": "low"}, "never reads 'reasoning_effort'"),
    ],
)
def test_inspect_settings_that_are_not_followed_are_refused(in_inspect, settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        ask(in_inspect, **settings)


def test_inspect_settings_that_change_no_answer_are_let_through(in_inspect) -> None:
    settings = {"max_connections": 3, "max_retries": 2, "frequency_penalty": 0.0, "best_of": 1}
    assert ask(in_inspect, max_tokens=4, **settings).completion


def test_inspect_gets_thoughts_apart(tmp_path, monkeypatch) -> None:
    pytest.importorskip("inspect_ai")
    import itertools

    import torch
    from helpers.thinking import OPENED, thinking_model

    from workbench.generation._decode_loop import DecodeLoop
    from workbench.integrations.inspect_ai import SteeredModel
    from workbench.models.load import load_model
    from workbench.models.tokens import token_ids

    model = load_model(thinking_model(tmp_path, OPENED), device="cpu")
    ids = token_ids(model, "They ask.</think>Yes.")
    written = itertools.cycle(ids)
    monkeypatch.setattr(DecodeLoop, "_choose", lambda self, *_: torch.tensor([next(written)]))
    output = ask(SteeredModel("none", steering="off", hooked=model), max_tokens=len(ids))
    reasoning, text = output.choices[0].message.content
    assert (reasoning.reasoning, text.text) == ("They ask.", "Yes.")


@pytest.fixture
def in_lm_eval(finished, tiny):
    pytest.importorskip("lm_eval")
    from workbench.integrations.lm_eval import SteeredLM

    return SteeredLM(str(finished), model=tiny, steering="off")


def until(model, **settings):
    return model.generate_until([SimpleNamespace(args=("Where?", settings))])[0]


def test_lm_eval_settings_are_followed(in_lm_eval) -> None:
    full = until(in_lm_eval, max_gen_toks=12)
    assert until(in_lm_eval, max_gen_toks=12, temperature=0.9, do_sample=False) == full
    assert until(in_lm_eval, max_gen_toks=12, temperature=0.9, top_k=1) == full
    warm = {"max_gen_toks": 12, "temperature": 1.5}
    assert until(in_lm_eval, **warm) != full
    assert until(in_lm_eval, **warm) == until(in_lm_eval, **warm, do_sample=True)
    assert until(in_lm_eval, **warm, seed=5) != until(in_lm_eval, **warm)
    stop = full[3:5]
    assert until(in_lm_eval, max_gen_toks=12, until=["", stop]) == full[: full.index(stop)]
    assert until(in_lm_eval, max_gen_toks=12, num_beams=1, until=stop) == full[: full.index(stop)]


def test_lm_eval_settings_that_are_not_followed_are_refused(in_lm_eval) -> None:
    with pytest.raises(ValueError, match="does not follow num_beams=4; leave it out"):
        until(in_lm_eval, num_beams=4)


def test_lm_eval_continues_the_context_of_a_base_model_as_it_stands(chatless) -> None:
    pytest.importorskip("lm_eval")
    import torch

    from workbench.integrations.lm_eval import SteeredLM

    model = SteeredLM("none", model=chatless, steering="off")
    (scored, _), *_ = model.loglikelihood([SimpleNamespace(args=("Answer:", " here"))])
    tokenizer = chatless.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer("Answer:", add_special_tokens=False).input_ids]
    answer = tokenizer(" here", add_special_tokens=False).input_ids
    logits = chatless.original_model(torch.tensor([[*ids, *answer]])).logits[0]
    log_probs = logits[len(ids) - 1 : -1].log_softmax(-1)
    by_hand = log_probs.gather(1, torch.tensor(answer)[:, None]).sum()
    assert scored == pytest.approx(float(by_hand.detach()), abs=1e-4)
