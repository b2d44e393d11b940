"""The cost model counts what real models have and do, from their config.json alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES as TINY
from helpers.tiny_models import sentences, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.engines.architecture import (
    FAMILIES,
    Architecture,
    architecture_of,
    known_models,
    read_architecture,
)
from workbench.engines.cost import (
    HARDWARE,
    Machine,
    Work,
    answering,
    caching,
    fit,
    forward_flops,
    judging,
)
from workbench.engines.plan import in_words, make_plan
from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.load import load_model
from workbench.models.sites import Site

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "gemma-2-27b": 27_227_128_320,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-235b-a22b": 235_093_634_560,
    "llama-3.1-405b": 405_853_388_800,
}
"""Parameters that the checkpoints' own headers say."""

SITES = (Site(1, "resid_post"), Site(2, "mlp_post"))
WORK = Work(sites=SITES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_model_has_as_many_parameters_as_its_checkpoint(name: str) -> None:
    assert set(known_models()) == set(PUBLISHED)
    assert read_architecture(name).parameters == PUBLISHED[name]


def test_a_token_passes_as_many_parameters_of_a_mixture_as_its_name_says() -> None:
    for name, billions in (("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22.2), ("mixtral-8x7b", 13)):
        assert read_architecture(name).active_parameters / 1e9 == pytest.approx(billions, rel=0.03)


SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([32, 64]),
        "intermediate_size": st.sampled_from([48, 64]),
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([4, 8]),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "vocab_size": st.sampled_from([100, 131]),
        "tie_word_embeddings": st.booleans(),
    }
)


def config_of(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    config = {"model_type": family, **sizes, "pad_token_id": None}
    if family in ("gpt2", "gpt_neox"):
        del config["num_key_value_heads"]
    if family == "gpt2":
        own = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}
        own |= {"num_attention_heads": "n_head", "intermediate_size": "n_inner"}
        config = {own.get(name, name): value for name, value in config.items()}
    if family in ("gemma2", "gemma3_text", "qwen3", "qwen3_moe"):
        config["head_dim"] = 24
    if "moe" in family:
        config |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        config |= {"decoder_sparse_step": 2}
    if family == "qwen2_moe":
        config |= {"shared_expert_intermediate_size": 56}
    if family == "mixtral":
        config |= {"num_local_experts": 6, "num_experts_per_tok": 2}
    return config


@settings(max_examples=3, deadline=None)
@given(sizes=SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model_that_transformers_builds(
    family: str, sizes: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(family, sizes)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    counted = architecture_of(config, family)
    assert counted.parameters == sum(p.numel() for p in built.parameters())
    assert counted.active_parameters <= counted.parameters
    assert counted.is_tied == built.config.get_text_config().tie_word_embeddings


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt2", "pythia"])
def test_operations_are_those_that_torch_counts(family: str, tmp_path) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    assert family in TINY
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model(family, tmp_path), attn_implementation="eager"
    )
    counted = read_architecture(tmp_path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3 * 20).reshape(3, 20) + 5, use_cache=False, logits_to_keep=1)
    rotary = 2 * 3 * 20 * counted.d_head  # at most: the angles are a product too
    operations = forward_flops(counted, 3 * 20, 3 * 20 * 20, logits=3)
    assert operations <= counter.get_total_flops() <= operations + rotary


def test_a_cached_set_takes_the_bytes_that_were_predicted(tmp_path) -> None:
    model = load_model(tiny_model("llama3", tmp_path / "model"), device="cpu")
    prompts = sentences(640)
    cache_activations(model, prompts, SITES, store=tmp_path / "store")
    kept = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.safetensors"))
    counted = read_architecture(tmp_path / "model")
    work = dataclasses.replace(WORK, prompts=len(prompts))
    predicted = caching(counted, HARDWARE["two-cores"], work).disk
    assert predicted == 640 * (32 + 64) * 4
    assert predicted < kept < 1.1 * predicted  # what is more are the headers


def test_an_answer_file_takes_the_bytes_that_were_predicted(tmp_path) -> None:
    model = load_model(tiny_model("llama3", tmp_path / "model"), device="cpu")
    output = tmp_path / "answers.jsonl"
    answers = generate(model, sentences(8), decoding=Decoding(64), output=output)
    n_tokens = sum(len(answer.tokens) for answer in answers) / 8
    work = Work(prompts=8, new_tokens=n_tokens, conditions=1, sites=SITES)
    predicted = answering(read_architecture(tmp_path / "model"), HARDWARE["two-cores"], work).disk
    assert output.stat().st_size == pytest.approx(predicted, rel=0.4)  # its words are short ones


H100 = dataclasses.replace(HARDWARE["nvidia-h100"], disk=1e15)  # never waits for its disk


@functools.cache
def the_8b() -> Architecture:
    return read_architecture("llama-3.1-8b")


def total(work: Work, machine: Machine = H100) -> tuple[float, float]:
    costs = caching(the_8b(), machine, work), answering(the_8b(), machine, work)
    return sum(cost.seconds for cost in costs), sum(cost.flops for cost in costs)


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.integers(10**5, 10**7),
    prompt_tokens=st.floats(1, 500),
    new_tokens=st.floats(2, 500),
    factor=st.floats(1.5, 4),
)
def test_more_work_takes_longer_and_a_better_machine_less(
    prompts: int, prompt_tokens: float, new_tokens: float, factor: float
) -> None:
    work = Work(prompts, prompt_tokens, new_tokens=new_tokens, sites=SITES)
    seconds, flops = total(work)
    assert seconds > 0
    for field in ("prompts", "prompt_tokens", "new_tokens"):
        value = type(getattr(work, field))(getattr(work, field) * factor)
        more = total(dataclasses.replace(work, **{field: value}))
        assert more[0] > seconds
        assert more[1] > flops
    for field in ("product", "bandwidth"):
        better = dataclasses.replace(H100, **{field: getattr(H100, field) * factor})
        assert total(work, better)[0] <= seconds
    twice = dataclasses.replace(H100, devices=16)
    assert total(work, twice)[0] == pytest.approx(seconds / 2)


def test_twice_the_prompts_are_twice_the_time() -> None:
    one, two = total(Work(10**6, sites=SITES)), total(Work(2 * 10**6, sites=SITES))
    assert two == pytest.approx((2 * one[0], 2 * one[1]))


def test_blocks_above_the_last_site_are_not_counted() -> None:
    model, machine = read_architecture("llama-3.1-8b"), HARDWARE["nvidia-h100"]
    half = caching(model, machine, Work(sites=(Site(15, "resid_post"),)))
    whole = caching(model, machine, Work(sites=(Site(31, "resid_post"),)))
    assert whole.flops == pytest.approx(2 * half.flops)


def test_experts_that_no_token_chooses_are_not_read() -> None:
    model = read_architecture("mixtral-8x7b")
    assert model.weights_read(1) < 0.35 * model.weights_read(1000)
    assert model.weights_read(1000) == pytest.approx(model.parameters, rel=0.01)
    dense = read_architecture("llama-3.1-8b")
    assert dense.weights_read(1) == dense.weights_read(1000)


def test_a_model_takes_as_many_devices_as_hold_it() -> None:
    machine = HARDWARE["nvidia-h100"]
    placed = {name: fit(read_architecture(name), machine, WORK) for name in PUBLISHED}
    assert (placed["llama-3.1-8b"].devices, placed["llama-3.1-8b"].copies) == (1, 8)
    assert (placed["llama-3.1-70b"].devices, placed["llama-3.1-70b"].copies) == (4, 2)
    assert (placed["llama-3.1-405b"].devices, placed["llama-3.1-405b"].machines) == (16, 2)
    for name, one in placed.items():
        assert one.devices * machine.memory > 2 * PUBLISHED[name]
        assert one.rows >= 1


def test_judging_reads_every_answer_with_the_judge() -> None:
    judge, machine = read_architecture("qwen2.5-1.5b"), HARDWARE["nvidia-h100"]
    one, three = (judging(judge, machine, Work(conditions=n)) for n in (1, 3))
    assert three.flops == pytest.approx(3 * one.flops)
    assert one.tokens == 10**6 * (20 + 64 + 20)


def test_a_plan_says_why_one_machine_is_not_enough() -> None:
    assert make_plan("llama-3.1-8b", "nvidia-h100").machines == 1
    big = make_plan("llama-3.1-405b", "nvidia-h100")
    assert "does not fit into one" in big.reason
    assert big.machines % 2 == 0
    slow = make_plan("qwen2.5-1.5b", "two-cores")
    assert "hours, not 24" in slow.reason
    assert slow.machines * 24 * 3600 >= slow.seconds > (slow.machines - 1) * 24 * 3600
    assert json.loads(json.dumps(slow.to_dict()))["machines"] == slow.machines
    assert f"{slow.machines} machines" in in_words(slow)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_plan("llama-3.1-80b", "nvidia-h100"), "no model 'llama-3.1-80b'.*llama-3.1"),
        (lambda: make_plan("llama-3.1-8b", "h100"), "unknown hardware 'h100'; known: nvidia"),
        (lambda: make_plan("llama-3.1-8b", "two-cores", hours=0), "hours must be above 0"),
        (lambda: make_plan("llama-3.1-8b", "two-cores", prompts=0), "prompts must be above 0"),
        (lambda: make_plan("llama-3.1-8b", "two-cores", n_sites=99), "sites must be 1 to 32"),
        (lambda: architecture_of({"model_type": "rwkv"}, "x"), "cannot count .*a rwkv; families"),
    ],
)
def test_what_cannot_be_planned_is_said(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_the_tables_of_the_page_are_those_that_its_command_writes() -> None:
    source = Path(__file__).resolve().parents[2] / "docs" / "scale.py"
    script = importlib.util.module_from_spec(spec_from_file_location("scale", source))
    script.__spec__.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.with_tables(page) == page
