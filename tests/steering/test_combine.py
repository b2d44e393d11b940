"""Combined vectors: sums, pools and own parts, and what is taken out of a vector is gone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.models.load import ModelInfo
from workbench.models.sites import Site
from workbench.steering.combine import own_part, pooled, summed, without
from workbench.steering.vectors import SteeringVector

D = 24


INFO = ModelInfo("made-up", None, 4, D, 48, 4, "float32", "raw", "0123456789abcdef")


EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def vector(values, category="fraud", site=None, method="prompt_contrast"):
    site = site or Site(1, "resid_post")
    return SteeringVector(site, category, values, method, "content", 1.0, 5, 5, 10.0, INFO)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_sum_weighs_directions_alike_and_keeps_the_mean_norm():
    a, b = vector(torch.eye(D)[0] * 8), vector(torch.eye(D)[1] * 2, method="answer_contrast")
    total = summed([a, b])
    assert total.norm == pytest.approx(5.0)
    assert float(total.direction[0]) == pytest.approx(float(total.direction[1]))
    assert total.method == "prompt_contrast+answer_contrast"
    with pytest.raises(ValueError, match="only vectors of one site"):
        summed([a, vector(noise(0, D), site=Site(2, "resid_post"))])
    with pytest.raises(ValueError, match="nothing to sum"):
        summed([])


def test_pooling_gives_every_category_one_direction_at_its_own_norm():
    vectors = {"fraud": vector(noise(1, D)), "malware": vector(3 * noise(2, D), "malware")}
    shared = pooled(vectors)
    torch.testing.assert_close(shared["fraud"].direction, shared["malware"].direction)
    for category, before in vectors.items():
        assert shared[category].norm == pytest.approx(before.norm, rel=1e-5)
        assert shared[category].category == category
    with pytest.raises(ValueError, match="nothing to pool"):
        pooled({})


def test_what_all_categories_share_is_no_part_of_their_own():
    shared = 5 * torch.eye(D)[0]
    vectors = {
        c: vector(shared + torch.eye(D)[i + 1], c)
        for i, c in enumerate(("fraud", "malware", "hate_speech"))
    }
    own_parts = own_part(vectors)
    for i, part in enumerate(own_parts.values()):
        assert float(part.vector[0]) == pytest.approx(0.0, abs=1e-6)
        assert int(part.vector.argmax()) == i + 1
    with pytest.raises(ValueError, match="needs another category"):
        own_part({"fraud": vector(shared)})


@EXAMPLES
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_directions_taken_out_are_gone_and_nothing_is_added(seed, n):
    removed = [vector(noise(seed + i + 1, D)) for i in range(n)]
    whole = vector(noise(seed, D))
    left = without(whole, removed)
    for other in removed:
        assert abs(float(left.vector @ other.direction)) < 1e-4
    assert left.norm <= whole.norm + 1e-5


def test_a_vector_that_is_taken_out_as_a_whole_is_refused():
    whole = vector(noise(0, D))
    with pytest.raises(ValueError, match="nothing is left"):
        without(whole, [whole])
    with pytest.raises(ValueError, match="cannot be taken out"):
        without(whole, [vector(noise(1, D), site=Site(2, "resid_post"))])
