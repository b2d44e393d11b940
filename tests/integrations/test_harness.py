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
