"""What the worker does to the requests of a pass, on blocks that answer as vLLM's do."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.engines._vllm_worker import SteeringWorker, blocks_of
from workbench.engines._wire import pack, unpack, unpack_rows
from workbench.models.sites import Site
from workbench.steering.edits import AddVector, ClampNeurons, RaiseTo, ScaleNeurons
from workbench.steering.interventions import Intervention

D, LAYERS = 6, 3


class Block(nn.Module):
    """Return what the MLP adds, and beside it the residual stream before that."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(D, D), nn.Linear(D, D)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream = hidden_states if residual is None else hidden_states + residual
        stream = stream + torch.tanh(self.self_attn(stream))
        return torch.tanh(self.mlp(stream)), stream


class Blocks(nn.Module):
    """A model of three such blocks, on the tokens of all requests laid end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        residual = None
        for block in self.layers:
            stream, residual = block(torch.arange(len(stream)), stream, residual)
        return stream + residual


class Worker(SteeringWorker):
    """A worker with a runner as the passes need it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model_runner = SimpleNamespace(model=Blocks().eval(), requests={})
        self.workbench_install()

    def run(self, *requests: tuple[torch.Tensor, dict[str, Any] | None, int, int]) -> list[Any]:
        """Run the tokens of requests, each with its tag, tokens before, and tokens of its prompt.

        Returns:
            What the model gives for the tokens of each.
        """
        names = [str(i) for i in range(len(requests))]
        lengths = [len(tokens) for tokens, *_ in requests]
        self.model_runner.input_batch = SimpleNamespace(
            req_ids=names, num_computed_tokens_cpu=np.array([past for *_, past, _ in requests])
        )
        starts = np.concatenate([[0], np.cumsum(lengths)])
        self.model_runner.query_start_loc = SimpleNamespace(np=starts)
        for name, (_, tag, _, n_prompt) in zip(names, requests, strict=True):
            extra = None if tag is None else {"workbench": tag}
            parameters = SimpleNamespace(extra_args=extra)
            self.model_runner.requests[name] = SimpleNamespace(
                sampling_params=parameters, num_prompt_tokens=n_prompt
            )
        with torch.no_grad():
            whole = self.model_runner.model(torch.cat([tokens for tokens, *_ in requests]))
        return list(whole.split(lengths))

    def pooled(self) -> dict[str, dict[str, torch.Tensor]]:
        return unpack_rows(self.workbench_read())


def tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def adds(seed: int, site: Site, **extent: Any) -> Intervention:
    return Intervention(site, AddVector(tokens(1, seed)[0], 2.0), **extent)


SITES = [
    Site(0, "resid_pre"),
    Site(1, "resid_pre"),
    Site(1, "resid_post"),
    Site(2, "attn_out"),
    Site(0, "mlp_out"),
]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_each_request_of_a_batch_is_steered_by_its_own_vector_alone(site: Site) -> None:
    worker = Worker()
    plain = worker.run(*[(tokens(4, i), None, 0, 4) for i in range(3)])
    worker.workbench_plans(pack({"a": [adds(10, site)], "b": [adds(11, site)]}))
    tags: list[Any] = [{"plan": "a"}, None, {"plan": "b"}]
    together = worker.run(*[(tokens(4, i), tags[i], 0, 4) for i in range(3)])
    alone = [worker.run((tokens(4, i), tags[i], 0, 4))[0] for i in range(3)]
    for i in range(3):
        torch.testing.assert_close(together[i], alone[i])
    assert torch.equal(together[1], plain[1])
    assert not torch.allclose(together[0], plain[0])
    assert not torch.allclose(together[2], plain[2])


EDITS = [
    AddVector(tokens(1, 5)[0], 0.5, keep_norm=True),
    RaiseTo(torch.eye(D)[2], 3.0),
    ScaleNeurons(tuple(range(D)), 0.0),
    ClampNeurons(tuple(range(D)), torch.arange(D).float()),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)
def test_an_edit_is_made_of_what_comes_out_of_the_block(edit: Any) -> None:
    worker, last = Worker(), Site(LAYERS - 1, "resid_post")
    [plain] = worker.run((tokens(3, 0), None, 0, 3))
    worker.workbench_plans(pack({"a": [Intervention(last, edit)]}))
    [steered] = worker.run((tokens(3, 0), {"plan": "a"}, 0, 3))
    torch.testing.assert_close(steered, edit(plain))


def test_positions_mean_the_tokens_of_the_prompt_or_those_behind_it() -> None:
    worker, last = Worker(), Site(LAYERS - 1, "resid_post")
    plans = {p: [adds(3, last, positions=p)] for p in ("prompt", "generated")}
    worker.workbench_plans(pack(plans))
    # Tokens 2 to 5 of a request whose prompt has four: what was preempted comes like that.
    [plain] = worker.run((tokens(4, 0), None, 2, 4))
    [prompt] = worker.run((tokens(4, 0), {"plan": "prompt"}, 2, 4))
    [generated] = worker.run((tokens(4, 0), {"plan": "generated"}, 2, 4))
    assert torch.equal(prompt[2:], plain[2:])
    assert torch.equal(generated[:2], plain[:2])
    assert not torch.allclose(prompt[:2], plain[:2])
    assert not torch.allclose(generated[2:], plain[2:])


def test_strength_falls_with_the_tokens_of_the_answer() -> None:
    worker, last = Worker(), Site(LAYERS - 1, "resid_post")
    worker.workbench_plans(pack({"a": [adds(3, last, decay="linear", until=4)]}))
    [plain] = worker.run((tokens(5, 0), None, 3, 3))
    [steered] = worker.run((tokens(5, 0), {"plan": "a"}, 3, 3))
    shares = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(steered - plain, shares[:, None] * 2.0 * tokens(1, 3)[0])


def test_a_request_is_steered_and_read_at_the_same_site() -> None:
    worker, site = Worker(), Site(1, "resid_post")
    tag = {"row": "0", "span": [0, 3], "sites": [str(site)]}
    worker.run((tokens(3, 0), tag, 0, 3))
    before = worker.pooled()["0"][str(site)]
    worker.workbench_plans(pack({"a": [adds(3, site)]}))
    worker.run((tokens(3, 0), tag | {"plan": "a"}, 0, 3))
    torch.testing.assert_close(
        worker.pooled()["0"][str(site)] - before, 2.0 * tokens(1, 3)[0], atol=1e-5, rtol=1e-5
    )


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 8), max_size=3, unique=True), first=st.integers(0, 7))
def test_a_mean_is_the_same_however_a_prompt_is_cut_into_passes(
    cuts: list[int], first: int
) -> None:
    worker, site, whole = Worker(), Site(0, "resid_pre"), tokens(9, 1)
    tag = {"row": "7", "span": [first, 8], "sites": [str(site)]}
    worker.run((whole[:5], tag, 0, 9))  # preempted: it begins again
    edges = [0, *sorted(cuts), 9]
    for start, end in pairwise(edges):
        worker.run((tokens(2, 2), None, 0, 2), (whole[start:end], tag, start, 9))
    torch.testing.assert_close(
        worker.pooled()["7"][str(site)], whole[first:8].mean(dim=0), atol=1e-5, rtol=1e-5
    )
    assert worker.pooled() == {}


def test_sites_behind_which_a_norm_follows_are_not_offered() -> None:
    worker = Worker()
    assert set(worker.workbench_install()) == {"attn_out", "mlp_out", "resid_post", "resid_pre"}
    for block in worker.model_runner.model.layers:
        block.post_feedforward_layernorm = nn.LayerNorm(D)
    assert set(worker.workbench_install()) == {"resid_post", "resid_pre"}


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no list of blocks in Linear; engine 'local' can run it"):
        blocks_of(nn.Linear(2, 2))


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)
def test_an_intervention_is_the_same_behind_the_wire(edit: Any) -> None:
    sent = Intervention(Site(2, "attn_out"), edit, "generated", until=7, decay="altsteer")
    [got] = unpack(pack({"k": [sent]}))["k"]
    assert (got.site, got.positions, got.until, got.decay) == (
        sent.site,
        "generated",
        7,
        "altsteer",
    )
    x = tokens(4, 9)
    assert torch.equal(got.edit(x), edit(x))
