"""One model object in several threads: each gets what it would have got alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.gates import vector
from helpers.tiny_models import sentences

from workbench.generation.answers import sweep
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.forward import forward, plain
from workbench.models.hooked_model import model_lock
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene
from workbench.steering.interventions import add_vector

SITE = Site(2, "resid_post")


def prompts(seed: int) -> list[Prompt]:
    return [
        Prompt(f"{seed}-{i}", text, None, "fraud", "unsafe", "test")
        for i, text in enumerate(sentences(8, seed=seed))
    ]


def job(model: Any, seed: int) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Cache activations, and answer with steering of its own."""
    activations = cache_activations(model, prompts(seed), SITE)[SITE].values
    steering = {"steered": [add_vector(vector(model, seed), rho=0.3)]}
    answers = sweep(model, prompts(seed), steering, decoding=Decoding(max_new_tokens=10))
    return activations, [tuple(c.tokens) for c in answers]


def test_threads_that_share_a_model_do_not_mix_their_batches(tiny: Any) -> None:
    alone = [job(tiny, seed) for seed in range(4)]
    assert len({str(answers) for _, answers in alone}) == 4
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda seed: job(tiny, seed), range(4)))
    for (values, answers), (expected, alone_answers) in zip(together, alone, strict=True):
        assert torch.equal(values, expected)
        assert answers == alone_answers


@pytest.mark.parametrize("how", ["fast", "plain"])
def test_a_pass_of_another_thread_waits_until_steering_ends(tiny: Any, how: str) -> None:
    tokens = torch.tensor([[9, 40, 41, 60]])
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def unsteered() -> torch.Tensor:
        with torch.no_grad():
            if how == "fast":
                return forward(tiny, tokens, mask)[0]
            with plain(tiny):
                return forward(tiny, tokens, mask)[0]

    expected, got = unsteered(), []
    thread = threading.Thread(target=lambda: got.append(unsteered()))
    with torch.no_grad(), intervene(tiny, [add_vector(vector(tiny), rho=0.5)]):
        thread.start()
        steered = forward(tiny, tokens, mask)[0]  # this thread goes on meanwhile
        thread.join(timeout=0.3)
        assert not got
    thread.join(timeout=30)
    assert torch.equal(got[0], expected)
    assert not torch.equal(steered, expected)


def test_the_lock_of_a_model_is_its_own_and_opens_again_after_an_error(
    tiny: Any, chatless: Any
) -> None:
    assert model_lock(tiny) is model_lock(tiny)
    assert model_lock(tiny) is not model_lock(chatless)
    with pytest.raises(ZeroDivisionError), intervene(tiny, []):
        raise ZeroDivisionError
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(model_lock(tiny).acquire, timeout=5).result()
        thread.submit(model_lock(tiny).release).result()
