"""Reward models: five numbers an answer, from the outputs that are documented to be them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_models import sentences, tiny_model

from workbench.judges._checkpoints import judge_models
from workbench.judges.cache import cached
from workbench.judges.rewards import ATTRIBUTES, RewardJudge, Rewards, load_reward_model

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = sentences(5)
RESPONSES = [
    "Here is what to do: first",
    "I am sorry, no.",
    "...",
    "A much longer answer, " * 6,
    "Sure",
]


def tiny_reward(
    family: str,
    folder: Path,
    labels: list[str],
    *,
    head: str = "score",
    config: dict[str, Any] | None = None,
) -> Path:
    """A random classifier on a tiny decoder, its head stored under any name."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tiny_model(family, folder)
    named = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    settings = AutoConfig.from_pretrained(folder, **named, **(config or {}))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=settings)
        torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(folder)
    if head != "score":
        weights = load_file(folder / "model.safetensors")
        weights[f"{head}.weight"] = weights.pop("score.weight")
        weights["gating.logit_scale"] = torch.ones(1)  # something that is not read
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, **options: Any) -> RewardJudge:
    return load_reward_model(folder, dtype="float32", device="cpu", **options)


def numbers(rewards: Rewards) -> list[float | None]:
    return [getattr(rewards, attribute) for attribute in ATTRIBUTES]


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma2"])
def test_the_numbers_are_the_outputs_at_the_last_token(tmp_path: Path, family: str) -> None:
    judge = load(tiny_reward(family, tmp_path / "rm", list(ATTRIBUTES)), batch_size=3)
    model, tokenizer = judge.checkpoint.model, judge.checkpoint.tokenizer
    model.config.pad_token_id = (
        None  # the classifier's own pooling then takes the last token of a single row
    )
    for prompt, response, rewards in zip(
        PROMPTS, RESPONSES, judge(PROMPTS, RESPONSES), strict=True
    ):
        if response == "...":
            assert rewards == Rewards(None, None, None, None, None, judge.name, "empty")
            continue
        text = judge.frame.fill(prompt, response)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        assert numbers(rewards) == pytest.approx(model(input_ids=ids).logits[0].tolist(), abs=1e-4)
        assert rewards.reason == ""


def test_an_end_of_turn_that_is_also_padding_is_read_all_the_same(tmp_path: Path) -> None:
    plain = load(tiny_reward("llama3", tmp_path / "a", list(ATTRIBUTES)))
    eot = plain.checkpoint.tokenizer.eos_token_id
    folder = tiny_reward("llama3", tmp_path / "b", list(ATTRIBUTES), config={"pad_token_id": eot})
    same = load(folder)(PROMPTS, RESPONSES)
    for one, two in zip(plain(PROMPTS, RESPONSES), same, strict=True):
        assert numbers(one) == pytest.approx(numbers(two), abs=1e-5)


def test_outputs_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    labels = [
        "toxicity",
        "HelpSteer-Verbosity",
        "coherence",
        "helpsteer2_helpfulness",
        "complexity",
        "Correctness",
    ]
    judge = load(tiny_reward("llama3", tmp_path / "rm", labels))
    assert judge.columns == (3, 5, 2, 4, 1)
    given = load(tmp_path / "rm", outputs=["quality", *reversed(ATTRIBUTES)])
    assert given.columns == (5, 4, 3, 2, 1)
    first, second = judge(["p"], ["an answer"])[0], given(["p"], ["an answer"])[0]
    assert (first.verbosity, first.coherence, first.helpfulness) == (
        second.verbosity,
        second.complexity,
        second.coherence,
    )
    assert (first.complexity, first.correctness) == (second.correctness, second.helpfulness)
    assert judge.name != given.name


def test_a_documented_model_is_read_with_its_head_order_and_scale(tmp_path: Path) -> None:
    (documented,) = judge_models("rewards").values()
    outputs, folder = documented["outputs"], tmp_path / "ArmoRM-Llama3-8B-v0.1"
    assert len(outputs) == 19
    tiny_reward("llama3", folder, [f"LABEL_{i}" for i in range(19)], head=documented["head"])
    judge = load(folder)
    assert judge.columns == (0, 1, 2, 3, 4)
    (rewards,) = judge(["prompt"], ["an answer"])
    ids = torch.tensor(
        [
            judge.checkpoint.tokenizer(
                judge.frame.fill("prompt", "an answer"), add_special_tokens=False
            ).input_ids
        ]
    )
    judge.checkpoint.model.config.pad_token_id = None
    expected = judge.checkpoint.model(input_ids=ids).logits[0, :5] * 5 - 0.5
    assert numbers(rewards) == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["helpfulness"], "has 1 output.*need one each"),
        (["helpfulness", "correctness", "coherence", "complexity"], r"has 4 output\(s\)"),
        (
            [f"LABEL_{i}" for i in range(5)],
            r"does not say which of its 5 outputs .*LABEL_0.*pass outputs=",
        ),
        (["helpfulness", *ATTRIBUTES], "does not say which of its 6 outputs"),
        ([*ATTRIBUTES[:4], "brevity"], "does not say which"),
    ],
)
def test_outputs_that_are_not_documented_are_not_guessed(
    tmp_path: Path, labels: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tiny_reward("llama3", tmp_path / "rm", labels))


def test_a_model_without_the_head_is_refused(tmp_path: Path) -> None:
    tiny_model("llama3", tmp_path / "lm")
    with pytest.raises(ValueError, match=r"'lm' has no weights for score.weight.*random numbers"):
        load(tmp_path / "lm", outputs=ATTRIBUTES)
    tiny_reward("llama3", tmp_path / "rm", list(ATTRIBUTES), head="regression_layer")
    with pytest.raises(ValueError, match=r"'rm' has no weights for score.weight"):
        load(tmp_path / "rm")


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    folder = tiny_reward("gpt2", tmp_path / "rm", list(ATTRIBUTES))
    with pytest.raises(ValueError, match="'rm' has no chat template"):
        load(folder)


def test_what_cannot_be_rated_is_unscored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = load(tiny_reward("llama3", tmp_path / "rm", list(ATTRIBUTES)))
    short, long = judge(["p", "p"], ["word", "word " * 600])
    assert numbers(long) == [None] * 5
    assert "too long" in long.reason
    assert short == judge(["p"], ["word"])[0]
    monkeypatch.setattr(
        judge.checkpoint.model.score, "weight", torch.nn.Parameter(torch.full((5, 32), torch.inf))
    )
    (broken,) = judge(["p"], ["word"])
    assert numbers(broken) == [None] * 5
    assert "not finite" in broken.reason


def test_ratings_can_be_cached(tmp_path: Path) -> None:
    judge = load(tiny_reward("llama3", tmp_path / "rm", list(ATTRIBUTES)))
    path = tmp_path / "r.jsonl"
    first = cached(judge, path, result=Rewards, batch=5)(PROMPTS, RESPONSES)
    assert (
        first
        == judge(PROMPTS, RESPONSES)
        == cached(judge, path, result=Rewards)(PROMPTS, RESPONSES)
    )
    assert set(asdict(first[0])) == {*ATTRIBUTES, "judge", "reason"}


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    judge = load(tiny_reward("llama3", tmp_path / "rm", list(ATTRIBUTES)))
    assert judge([], []) == []
    with pytest.raises(TypeError, match="lists of texts"):
        judge("prompt", ["answer"])
    with pytest.raises(ValueError, match="2 and 1"):
        judge(["p", "q"], ["a"])
    with pytest.raises(ValueError, match="at least 1"):
        load(tmp_path / "rm", batch_size=0)
