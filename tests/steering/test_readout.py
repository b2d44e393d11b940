"""A steering vector read as words: promoted and suppressed tokens, beside a random direction."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from workbench.models.load import model_info
from workbench.models.sites import Site
from workbench.models.tokens import token_strings
from workbench.steering.readout import logit_readout
from workbench.steering.vectors import SteeringVector


def vector_of(model, values) -> SteeringVector:
    site = Site(1, "resid_post")
    return SteeringVector(
        site, "fraud", values, "planted", "content", 1.0, 1, 1, 1.0, model_info(model)
    )


@pytest.mark.parametrize("family", ["llama3", "gpt2", "gemma2"])
def test_a_vector_along_a_word_promotes_it_and_its_opposite_suppresses_it(
    family_model, family
) -> None:
    model = family_model(family)
    row = model.unembed.W_U[:, 40].detach().float()
    readout = logit_readout(vector_of(model, row), model, 5)
    (word,) = token_strings(model, [40])
    assert readout.promoted[0][0] == word
    assert readout.p_promoted == pytest.approx(1 / 101)
    back = logit_readout(vector_of(model, -3 * row), model, 5)
    assert back.suppressed[0][0] == word
    torch.testing.assert_close(back.suppressed[0][1], -readout.promoted[0][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
def test_the_logits_are_those_of_transformer_lens(family_model, family) -> None:
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    if not hasattr(analysis, "logit_readout"):
        pytest.skip("this TransformerLens has no readout of its own")
    model = family_model(family)
    generator = torch.Generator().manual_seed(0)
    vector = vector_of(model, 30 * torch.randn(model.cfg.d_model, generator=generator))
    ours = logit_readout(vector, model, model.unembed.W_U.shape[1])
    both = torch.stack([vector.vector, torch.zeros_like(vector.vector)])
    theirs, bias = analysis.logit_readout(model, both).values
    theirs = theirs - bias
    logits = sorted((theirs - theirs.mean()).tolist(), reverse=True)
    assert [value for _, value in ours.promoted] == pytest.approx(logits, rel=1e-3, abs=1e-3)


def test_a_random_vector_stands_out_no_more_than_others(tiny) -> None:
    values = torch.randn(tiny.cfg.d_model, generator=torch.Generator().manual_seed(5))
    readout = logit_readout(vector_of(tiny, values), tiny)
    assert readout.p_promoted > 0.02
    assert readout.p_suppressed > 0.02
    assert readout.random_promoted != readout.promoted
    again = logit_readout(vector_of(tiny, values), tiny)
    assert again == readout
    assert logit_readout(vector_of(tiny, values), tiny, seed=7) != readout


def test_the_table_has_a_rank_per_row_and_logits_beside_words(tiny) -> None:
    frame = logit_readout(vector_of(tiny, torch.ones(tiny.cfg.d_model)), tiny, 3).to_frame()
    assert frame.index.tolist() == [1, 2, 3]
    assert frame.columns.tolist() == [
        "promoted", "promoted_logit", "suppressed", "suppressed_logit",
        "random_promoted", "random_promoted_logit", "random_suppressed", "random_suppressed_logit",
    ]  # fmt: skip
    assert frame["promoted_logit"].is_monotonic_decreasing
    assert frame["suppressed_logit"].is_monotonic_increasing


def test_what_cannot_be_read_is_refused(tiny, chatless) -> None:
    vector = vector_of(tiny, torch.ones(tiny.cfg.d_model))
    with pytest.raises(ValueError, match="k must be from 1"):
        logit_readout(vector, tiny, 0)
    with pytest.raises(ValueError, match="is not of this model"):
        logit_readout(vector, chatless)
    zero = dataclasses.replace(vector, vector=torch.zeros(tiny.cfg.d_model))
    with pytest.raises(ValueError, match="no direction"):
        logit_readout(zero, tiny)
