"""Tests of judges.opening and judges.on_demand: judges by name, in memory only while they judge."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.tiny_models import tiny_model

from workbench.judges import opening
from workbench.judges.api import ApiJudge
from workbench.judges.base import FRAMINGS, Verdict
from workbench.judges.cache import cached
from workbench.judges.framing import FramingJudge, save_framing_judge
from workbench.judges.local import LocalJudge
from workbench.judges.on_demand import PART, on_demand
from workbench.judges.opening import JudgeSettings, open_judge
from workbench.judges.patterns import RefusalPatterns
from workbench.models.load import load_model, model_info
from workbench.models.sites import Site


class Loud:
    """A judge that counts how often it is made and asked."""

    made: list[weakref.ref] = []
    asked: list[int] = []
    agreement = "kappa 0.9"
    fitted_on = frozenset({"key"})
    name = "loud-1"

    def __init__(self):
        Loud.made.append(weakref.ref(self))

    def __call__(self, prompts, responses):
        Loud.asked.append(len(prompts))
        return [Verdict("safe", 1.0, self.name, r) for r in responses]


@pytest.fixture
def loud():
    Loud.made, Loud.asked = [], []
    return Loud


def test_a_judge_on_demand_is_gone_before_and_after_it_is_asked(loud):
    judge = on_demand(loud)
    gc.collect()
    assert [made() for made in loud.made] == [None]
    assert (judge.name, judge.agreement, judge.fitted_on) == (
        "loud-1",
        "kappa 0.9",
        frozenset({"key"}),
    )
    answers = [f"a{i}" for i in range(PART + 3)]
    assert [v.reason for v in judge(["q"] * len(answers), answers)] == answers
    assert loud.asked == [PART, 3]
    gc.collect()
    assert [made() for made in loud.made] == [None, None]


def test_a_judge_on_demand_is_not_loaded_for_what_is_on_disk(loud, tmp_path):
    judge = cached(on_demand(loud), tmp_path / "verdicts.jsonl")
    assert len(judge(["q"], ["a"])) == len(judge(["q"], ["a"])) == 1
    assert len(loud.made) == 2  # to know it, and to ask it once
    assert (judge.agreement, judge.fitted_on) == ("kappa 0.9", frozenset({"key"}))


def test_what_was_judged_before_a_kill_is_kept(loud, tmp_path, monkeypatch):
    answers = [f"a{i}" for i in range(3 * PART)]
    call = loud.__call__

    def dies(self, prompts, responses):
        if "a70" in responses and len(loud.asked) < 2:
            raise KeyboardInterrupt
        return call(self, prompts, responses)

    monkeypatch.setattr(loud, "__call__", dies)
    judge = cached(on_demand(loud), tmp_path / "verdicts.jsonl")
    with pytest.raises(KeyboardInterrupt):
        judge(["q"] * len(answers), answers)
    monkeypatch.setattr(loud, "__call__", call)
    loud.asked.clear()
    assert len(judge(["q"] * len(answers), answers)) == len(answers)
    assert sum(loud.asked) == len(answers) - PART


def test_a_judge_that_changes_during_a_run_is_refused(loud, monkeypatch):
    judge = on_demand(loud)
    monkeypatch.setattr(loud, "name", "loud-2")
    with pytest.raises(RuntimeError, match="was 'loud-1' when the run began and is 'loud-2' now"):
        judge(["q"], ["a"])


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader") / "tiny-reader"
    return tiny_model("llama3", folder, max_position_embeddings=4096)


def test_a_local_judge_opens_by_the_name_of_its_model(reader_folder):
    judge = open_judge(f"local:{reader_folder}", settings=JudgeSettings("cpu", "float32"))
    assert isinstance(judge, LocalJudge)
    assert judge.name.startswith("local:tiny-reader:framing-")
    freed = open_judge(f"local:{reader_folder}", device="cpu", keep=False)
    assert not isinstance(freed, LocalJudge)
    assert freed(["How?"], ["Turn the wheel."])[0].judge == freed.name


def test_a_judge_that_reads_with_the_answering_model_shares_it(reader_folder):
    model = load_model(reader_folder, device="cpu")
    judge = open_judge("local:tiny-reader", model=model, keep=False)
    assert judge.reader is model


def test_judges_without_a_model_of_their_own_open_at_once(tmp_path):
    assert isinstance(open_judge("patterns"), RefusalPatterns)
    settings = JudgeSettings(url="http://localhost:9/v1", key_env=None)
    judge = open_judge("api:small", settings=settings, keep=False)
    assert isinstance(judge, ApiJudge)
    assert judge.name.startswith("api:small:framing-")


def test_a_guard_opens_by_family_and_checkpoint(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        opening, "load_guard", lambda *names, **how: asked.update(names=names, **how)
    )
    open_judge("guard:wildguard", settings=JudgeSettings("cpu"))
    assert asked == {"names": ("wildguard", None), "dtype": "bfloat16", "device": "cpu"}
    open_judge("guard:wildguard=mine/guard", settings=JudgeSettings("cpu", "float16"))
    assert (asked["names"], asked["dtype"]) == (("wildguard", "mine/guard"), "float16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("guard:wildgard", r"no guard family 'wildgard'; families: .* Did you mean 'wildguard'\?"),
        ("probe:nowhere.safetensors", "no probe 'nowhere.safetensors': there is no such file"),
        ("local:", "judge 'local:' names no model; write local:MODEL"),
        ("api:gpt", "judge 'api:gpt' needs the address of its endpoint"),
        ("framin", r"no judge 'framin'; judges: framing, .* Did you mean 'framing'\?"),
    ],
)
def test_a_judge_that_is_none_is_named_with_what_to_do(name, message):
    with pytest.raises(ValueError, match=message):
        open_judge(name)


def test_a_local_judge_is_the_fitted_one_where_one_ships_for_its_model(
    reader_folder, tmp_path, monkeypatch
):
    reader = load_model(reader_folder, device="cpu")
    info = model_info(reader)
    weights = torch.ones(len(FRAMINGS), reader.cfg.d_model)
    card = {"reader": info.name, "reader_fingerprint": info.fingerprint}
    fitted = FramingJudge(reader, Site(1, "resid_post"), weights, torch.zeros(len(FRAMINGS)), card)
    save_framing_judge(tmp_path / "fitted.safetensors", fitted)
    monkeypatch.setattr(opening, "shipped_for", lambda _: tmp_path / "fitted.safetensors")
    judge = open_judge(f"local:{reader_folder}", settings=JudgeSettings("cpu", "float32"))
    assert isinstance(judge, FramingJudge)
    assert judge.name == fitted.name
