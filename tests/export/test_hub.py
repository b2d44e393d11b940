"""Vectors on a hub: the real client against a stand-in of its endpoints on this machine."""

from __future__ import annotations

from dataclasses import replace

import huggingface_hub.constants
import pandas as pd
import pytest
import torch
import yaml
from helpers.hub import SHA, Hub
from helpers.interventions import steering_vector

from workbench.export.card import model_card
from workbench.export.from_run import RunNumbers, Strength
from workbench.export.hub import MOST_BYTES, pull_vectors, push_vectors
from workbench.models.sites import Site

REPO = "somebody/vectors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield stand_in
    stand_in.close()


@pytest.fixture
def strengths(family_model):
    model = family_model("llama3")
    return [
        Strength(steering_vector(model, Site(2, "resid_post"), 0), 1.25),
        Strength(steering_vector(model, Site(1, "attn_out"), 1), 0.5, "until=16"),
    ]


def numbers(**fields) -> RunNumbers:
    row = {
        "condition": "answer contrast", "category": "all", "metric": "refusal", "value": 0.25,
        "low": 0.1, "high": 0.5, "n": 24.0, "n_unscored": 1.0, "difference": 0.05,
        "difference_low": -0.1, "difference_high": 0.2,
    }  # fmt: skip
    unsteered = row | dict.fromkeys(
        ("difference", "difference_low", "difference_high"), float("nan")
    )
    table = pd.DataFrame([unsteered | {"condition": "unsteered"}, row])
    made = RunNumbers(
        "answer_contrast", "answer contrast", table, (("refusal-1", "kappa 0.81, n=191"),),
        {"seed": "0", "prompts": "prompts.jsonl (sha256 abc)", "questions": "test: 24"}, True,
    )  # fmt: skip
    return replace(made, **fields)


def test_vectors_and_their_card_go_up_in_one_commit_and_come_back(hub, strengths):
    url = push_vectors(
        REPO, strengths, numbers=numbers(), private=True, token="hf_made_up", endpoint=hub.url
    )
    assert url == f"{hub.url}/{REPO}/commit/{SHA}"
    assert hub.created[0]["name"] == "vectors"
    assert hub.is_private(0)
    assert [path for _, path in hub.asked].count(f"/api/models/{REPO}/commit/main") == 1
    assert "Bearer hf_made_up" in hub.tokens
    files = hub.repos[REPO]
    assert sorted(files) == [
        "README.md",
        "prompt_contrast.L1.attn_out.fraud.safetensors",
        "prompt_contrast.L2.resid_post.fraud.safetensors",
    ]
    back = pull_vectors(REPO, endpoint=hub.url, token="hf_made_up")
    for strength in strengths:
        name = f"prompt_contrast.{strength.vector.site}.fraud"
        assert torch.equal(back[name].vector, strength.vector.vector)
        assert back[name].model == strength.vector.model
    assert files["README.md"].decode() == model_card(
        dict(zip(sorted(files)[:0:-1], strengths, strict=True)), REPO, numbers()
    )


def test_a_card_has_the_runs_numbers_with_their_intervals(strengths):
    card = model_card(
        {"v.safetensors": strengths[0], "w.safetensors": strengths[1]}, REPO, numbers()
    )
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "workbench"
    assert "base_model" not in head  # the name of a folder is no repository
    assert "steering-vector" in head["tags"]
    for words in (
        "| answer contrast | refusal | 0.25 \\[0.1, 0.5\\]".replace("\\", ""),
        "| 24 | 1 | 0.05 [-0.1, 0.2] |",
        "| unsteered | refusal | 0.25 [0.1, 0.5] | 24 | 1 |  |",
        "kappa 0.81, n=191",
        "from unsafe to safe",
        "| 1.25 |",
        "0.5 (until=16)",
        "seed 0",
        "gate, which reads each question first. It is not part",
        "A negative multiplier pushes towards unsafe text",
    ):
        assert words in card, words
    hub_model = replace(strengths[0].vector, model=replace(strengths[0].vector.model, name="a/b"))
    card = model_card({"v.safetensors": replace(strengths[0], vector=hub_model)}, REPO)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "a/b"
    assert "Nothing: these vectors come without a run." in card


def test_texts_of_a_run_cannot_change_a_card(strengths):
    evil = "x | y\n## Safe!\n<script>alert(1)</script> [a](b) `c`"
    vector = replace(strengths[0].vector, category=evil, method=evil)
    row = numbers().table.assign(condition=evil)
    card = model_card(
        {evil: replace(strengths[0], vector=vector)},
        REPO,
        numbers(table=row, judges=((evil, evil),), construction=evil),
    )
    assert "\n## Safe!" not in card
    assert "<script>" not in card.replace("`", "").split("## Use")[0].split("| file |")[0]
    tables = [line for line in card.splitlines() if line.startswith("|") and "0.25" in line]
    assert all(line.replace("\\|", "").count("|") == 7 for line in tables)


def test_what_is_pulled_is_limited_and_checked(hub, strengths):
    with pytest.raises(ValueError, match=r"no repository 'somebody/vectors' on the hub"):
        pull_vectors(REPO, endpoint=hub.url)
    hub.repos[REPO] = {"README.md": b"", "vector.pt": b"\x80\x04"}
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        pull_vectors(REPO, endpoint=hub.url)
    hub.repos[REPO]["model.safetensors"] = b"12345678{"
    hub.sizes["model.safetensors"] = MOST_BYTES + 1
    with pytest.raises(ValueError, match=r"is it a model\?"):
        pull_vectors(REPO, endpoint=hub.url)
    hub.sizes.clear()
    with pytest.raises(ValueError, match=r"model\.safetensors|damaged|is "):
        pull_vectors(REPO, endpoint=hub.url)
    hub.repos[REPO] = {f"{n}.safetensors": b"" for n in range(300)}
    with pytest.raises(ValueError, match=r"has 300 files; up to 256"):
        pull_vectors(REPO, endpoint=hub.url)
    asked = [path for _, path in hub.asked]
    assert not any("resolve" in path and "vector.pt" in path for path in asked)


def test_every_refusal_is_one_line_that_says_what_to_do(hub, strengths, monkeypatch):
    hub.refuse = 403
    with pytest.raises(ValueError, match=r"refused .*\(status 403\): check the token") as error:
        push_vectors(REPO, strengths, token="hf_x", endpoint=hub.url)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot be reached for .*Connect"):
        push_vectors(REPO, strengths, token="hf_x", endpoint="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"no repository can be called 'a/b/c'"):
        pull_vectors("a/b/c", endpoint=hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    for call in (lambda: push_vectors(REPO, strengths, endpoint=hub.url),
                 lambda: pull_vectors(REPO, endpoint=hub.url)):  # fmt: skip
        with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set; unset it") as error:
            call()
        assert "\n" not in str(error.value)
    assert len(hub.asked) == asked


def test_vectors_of_two_models_or_none_are_not_pushed(hub, family_model, strengths):
    other = Strength(steering_vector(family_model("mistral"), Site(2, "resid_post")), 1.0)
    with pytest.raises(ValueError, match=r"vectors of one model"):
        push_vectors(REPO, [strengths[0], other], endpoint=hub.url)
    with pytest.raises(ValueError, match=r"nothing to push"):
        push_vectors(REPO, [], endpoint=hub.url)
    with pytest.raises(ValueError, match=r"two vectors have one site"):
        push_vectors(REPO, [strengths[0], strengths[0]], endpoint=hub.url)
    assert not hub.asked
