"""What every engine shares: refusals, carrying out what a run asks, and the model beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gates import gate, through
from helpers.runs import settings
from helpers.tiny_models import sentences

from workbench.engines import vllm
from workbench.engines.base import LocalEngine
from workbench.engines.beside import Beside
from workbench.engines.names import EngineCannot
from workbench.engines.opening import engine_of_a_run, open_engine
from workbench.files.store import read_jsonl
from workbench.generation._decode_loop import Decoded, DecodeLoop
from workbench.generation._endings import Endings
from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations, class_moments, pooled_batches
from workbench.models.sites import Site
from workbench.prompts.forms import as_prompts
from workbench.safesteer.recipe import run
from workbench.steering.edits import AddVector
from workbench.steering.interventions import Intervention

DECODING = Decoding(max_new_tokens=5)
KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out")
PROMPTS = as_prompts(sentences(6))


def pushed(layer: int = 1, kind: str = "resid_post", seed: int = 0) -> list[Intervention]:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return [Intervention(Site(layer, kind), AddVector(vector, 3.0))]


class Elsewhere(LocalEngine):
    """An engine with vLLM's limits that reads and writes by the functions of this process.

    It hands rows back in another order than it got them, as vLLM may.
    """

    name = "elsewhere"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.n_read = self.n_written = 0
        self.is_closed = False

    def cache_activations(self, prompts: Any, sites: Any, **how: Any) -> Any:
        self.check_sites(sites)
        return cache_activations(self.model, prompts, sites, reader=self, **how)

    def class_moments(self, prompts: Any, sites: Any, **how: Any) -> Any:
        self.check_sites(sites)
        return class_moments(self.model, prompts, sites, reader=self, **how)

    def sweep(self, prompts: Any, conditions: Any, decoding: Any = DECODING, **how: Any) -> Any:
        self.check_conditions(conditions.values(), decoding)
        return sweep(self.model, prompts, conditions, decoding, writer=self, **how)

    def check_sites(self, sites: Sequence[Site]) -> None:
        vllm.check_kinds(self.name, sites, KINDS)

    def check_conditions(self, conditions: Any, decoding: Decoding) -> None:
        vllm.check_vllm_can(self.name, conditions, decoding, KINDS)

    def close(self) -> None:
        self.is_closed = True

    def pooled(self, encoded: Any, sites: Any, span: str, *limits: int) -> Iterator[Any]:
        self.n_read += len(encoded)
        yield from pooled_batches(self.model, encoded, sites, span, *limits)

    def written(self, rows: Any, groups: Any, decoding: Any) -> Iterator[tuple[Any, Decoded]]:
        self.n_written += len(rows)
        loop = DecodeLoop(self.model, groups, decoding, False, Endings.of(self.model, decoding))
        for row in reversed(rows):
            loop.share_prefix([row.encoded], 1)
            with torch.no_grad():
                yield row, loop.run([row])[0]


def texts(answers: Any) -> list[tuple[Any, ...]]:
    return [(a.condition, a.prompt.id, a.tokens, a.text, a.finish) for a in answers]


def test_the_local_engine_does_what_the_functions_do(tiny) -> None:
    engine, site = LocalEngine(tiny), Site(1, "resid_post")
    caches = engine.cache_activations(PROMPTS, site), cache_activations(tiny, PROMPTS, site)
    assert torch.equal(*(acts[site].values for acts in caches))
    moments = engine.class_moments(PROMPTS, site), class_moments(tiny, PROMPTS, site)
    assert torch.equal(*(one[site].mean for one in moments))
    conditions: Any = {"unsteered": (), "pushed": pushed()}
    assert texts(engine.sweep(PROMPTS, conditions, DECODING)) == texts(
        sweep(tiny, PROMPTS, conditions, DECODING)
    )


def test_answers_that_come_in_another_order_are_put_where_they_belong(tiny, tmp_path) -> None:
    engine, output = Elsewhere(tiny), tmp_path / "answers.jsonl"
    conditions: Any = {"unsteered": (), "pushed": pushed(), "same": pushed()}
    answers = engine.sweep(PROMPTS, conditions, DECODING, output=output)
    assert texts(answers) == texts(sweep(tiny, PROMPTS, conditions, DECODING))
    assert engine.n_written == 12, "two conditions that do the same share their answers"
    assert len(list(read_jsonl(output))) == 18
    again = engine.sweep(PROMPTS, conditions, DECODING, output=output)
    assert engine.n_written == 12, "nothing is answered twice"
    assert texts(again) == texts(answers)


def test_files_of_two_engines_are_told_apart(tiny, tmp_path: Path) -> None:
    engine, output, site = Elsewhere(tiny), tmp_path / "answers.jsonl", Site(1, "resid_post")
    sweep(tiny, PROMPTS, {"unsteered": ()}, DECODING, output=output)
    engine.sweep(PROMPTS, {"unsteered": ()}, DECODING, output=output)
    assert engine.n_written == 6
    cache_activations(tiny, PROMPTS, site, store=tmp_path / "acts")
    acts = engine.cache_activations(PROMPTS, site, store=tmp_path / "acts")
    assert engine.n_read == 6
    assert len(list((tmp_path / "acts").iterdir())) == 2
    assert torch.equal(acts[site].values, cache_activations(tiny, PROMPTS, site)[site].values)


def test_inside_the_block_an_engine_carries_out_what_is_asked_of_its_model(tiny, chatless) -> None:
    engine, site = Elsewhere(tiny), Site(1, "resid_post")
    with engine_of_a_run() as carry_out:
        carry_out(engine)
        acts = cache_activations(tiny, PROMPTS, site)
        class_moments(tiny, PROMPTS, [site])
        answers = sweep(tiny, PROMPTS, {"pushed": pushed()}, DECODING)
        assert (engine.n_read, engine.n_written) == (12, 6)
        cache_activations(chatless, PROMPTS, site)
        assert engine.n_read == 12, "another model runs where it is"
    assert engine.is_closed
    assert torch.equal(acts[site].values, cache_activations(tiny, PROMPTS, site)[site].values)
    assert texts(answers) == texts(sweep(tiny, PROMPTS, {"pushed": pushed()}, DECODING))
    assert (engine.n_read, engine.n_written) == (12, 6), "the block is over"


def test_what_an_engine_cannot_do_the_model_beside_it_does(tiny) -> None:
    engine = Elsewhere(tiny)
    both = Beside(engine)
    sites = [Site(1, "mlp_post"), Site(1, "resid_post"), Site(2, "z")]
    acts = both.cache_activations(PROMPTS, sites)
    assert list(acts) == sites
    local = cache_activations(tiny, PROMPTS, sites)
    assert all(torch.equal(acts[site].values, local[site].values) for site in sites)
    neurons: Any = {"neurons": pushed(1, "resid_post"), "unsteered": (), "odd": [odd_edit()]}
    answers = both.sweep(PROMPTS, neurons, DECODING)
    assert texts(answers) == texts(sweep(tiny, PROMPTS, neurons, DECODING))
    assert (engine.n_read, engine.n_written) == (6, 12)
    assert [line.partition(";")[0] for line in both.done_here] == [
        "engine 'elsewhere' cannot read or steer L1.mlp_post",
        "engine 'elsewhere' cannot read or steer L2.z",
        "engine 'elsewhere' cannot make the edit function at L1.resid_post",
    ]


def odd_edit() -> Intervention:
    return Intervention(Site(1, "resid_post"), lambda activation: activation * 1.5)


def test_what_vllm_cannot_do_is_one_line_that_names_the_engine_that_can(tiny) -> None:
    asked: list[tuple[Any, Decoding, str]] = [
        ([odd_edit()], DECODING, "make the edit function at L1.resid_post"),
        ({"fraud": pushed(1, "resid_mid")}, DECODING, "read or steer L1.resid_mid"),
        (through(tiny, gate(tiny)), DECODING, "open a gate at L0.resid_post while it reads"),
        ((), Decoding(temperature=0.7), "sample with the same random numbers"),
    ]
    for condition, decoding, what in asked:
        line = f"engine 'vllm' cannot {what}.*; engine 'local' can"
        with pytest.raises(EngineCannot, match=line) as refused:
            vllm.check_vllm_can("vllm", [condition], decoding, KINDS)
        assert "\n" not in str(refused.value)
    vllm.check_vllm_can("vllm", [pushed(), {"fraud": pushed(1, "attn_out")}, ()], DECODING, KINDS)
    with pytest.raises(EngineCannot, match=r"read or steer L0.mlp_post; engine 'local' can\."):
        vllm.check_kinds("vllm", [Site(0, "resid_post"), Site(0, "mlp_post")], KINDS)


def test_an_answer_of_vllm_ends_before_its_first_end_token() -> None:
    from types import SimpleNamespace

    def said(tokens: list[int]) -> Any:
        steps = [{token: SimpleNamespace(logprob=-0.5 * token)} for token in tokens]
        return SimpleNamespace(token_ids=tokens, logprobs=steps)

    ended = vllm.decoded_of(said([5, 6, 2, 9]), [2, 3], with_log_probs=True)
    assert ended == Decoded([5, 6], "eos", [-2.5, -3.0])
    assert vllm.decoded_of(said([5, 6]), [2], with_log_probs=False) == Decoded(
        [5, 6], "length", None
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"engine": "vlm"}, "engine must be one of local, vllm.*, got 'vlm'"),
        ({"engine_settings": ("a=1",)}, "engine_settings are for another engine than local"),
        (
            {"engine": "vllm", "engine_settings": ("a",)},
            "engine_settings must be entries name=value",
        ),
        ({"engine": "vllm", "temperature": 0.5}, "cannot sample.*engine 'local' can"),
        ({"engine": "vllm", "quantize": "int8"}, "cannot run weights that are quantised here"),
    ],
)
def test_a_run_refuses_wrong_engines_before_anything_is_loaded(
    few_prompts: Path, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        settings(few_prompts, **changes)


def test_an_unknown_engine_is_one_line(tiny) -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'vlm'; engines: local, vllm"):
        open_engine("vlm", "embedded", tiny, {})
    assert open_engine("local", "embedded", tiny, {}) is None


def test_a_run_on_an_engine_ends_as_a_run_without(
    finished: Path, tiny, few_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    engine = Elsewhere(tiny)
    monkeypatch.setattr("workbench.safesteer.inputs.open_engine", lambda *_: Beside(engine))
    folder = run(settings(few_prompts), tmp_path / "run", model=tiny)
    assert engine.is_closed
    assert engine.n_read > 0
    assert engine.n_written > 0
    for table in ("evaluation", "tuning", "gate_rates"):
        ours, theirs = (pd.read_csv(one / f"{table}.csv") for one in (folder, finished))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3, atol=1e-3)
