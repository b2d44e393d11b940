"""Estimators: planted directions come back, and pruned differences are those of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.numpy_vectors import by_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from workbench.steering.estimators import (
    mean_difference,
    principal_direction,
    probe_direction,
    pruned_mean_difference,
)

D = 24
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(n=60, strength=6.0):
    u = noise(1, D)
    u = u / u.norm()
    unsafe = noise(2, n, D)
    return unsafe, unsafe + strength * u + 0.5 * noise(3, n, D), u


@pytest.mark.parametrize("find", [principal_direction, probe_direction])
def test_a_planted_direction_comes_back_from_unsafe_to_safe(find):
    unsafe, safe, u = planted()
    direction = find(unsafe, safe)
    assert float(direction.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float(direction @ u) > 0.75
    assert float(find(safe, unsafe) @ u) < -0.75


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_a_shared_direction_is_found_from_few_pairs(n):
    """What all differences have in common is their largest component, with any noise beside it."""
    for seed in range(40):
        u = torch.nn.functional.normalize(noise(1000 + seed, D), dim=0)
        unsafe = noise(seed, n, D)
        safe = unsafe + 6.0 * u + 0.3 * noise(500 + seed, n, D)
        assert float(principal_direction(unsafe, safe) @ u) > 0.9, seed


def test_the_principal_direction_is_the_largest_axis_of_the_differences():
    unsafe, safe = noise(0, 9, D), noise(1, 9, D)
    difference = (safe - unsafe).double().numpy()
    values, axes = np.linalg.eigh(difference.T @ difference)
    direction = principal_direction(unsafe, safe).double().numpy()
    assert abs(direction @ axes[:, values.argmax()]) == pytest.approx(1, abs=1e-6)
    assert (difference @ direction).mean() > 0


@pytest.mark.parametrize("penalty", [1.0, 30.0])
def test_a_probe_ranks_rows_as_its_decision_function_does(penalty):
    """The probe is fitted on standardised values; features differ a thousandfold in scale."""
    scale = torch.logspace(-1.5, 1.5, D)
    unsafe, safe = noise(1, 40, D) * scale + 3 * scale, noise(2, 30, D) * scale + 3.4 * scale
    rows = torch.cat([unsafe, safe]).double().numpy()
    standard = (rows - rows.mean(axis=0)) / rows.std(axis=0, ddof=1)
    reference = LogisticRegression(C=1 / penalty, max_iter=2000)
    reference.fit(standard, [0] * len(unsafe) + [1] * len(safe))
    decision = reference.decision_function(standard)
    projected = rows @ probe_direction(unsafe, safe, penalty=penalty).double().numpy()
    assert np.corrcoef(decision, projected)[0, 1] > 0.9999
    assert (projected[40:].mean() > projected[:40].mean()).all()


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="needs two pairs or more"):
        principal_direction(noise(0, 1, D), noise(1, 1, D))
    with pytest.raises(ValueError, match="both sides need rows, got 0 unsafe"):
        probe_direction(noise(0, 0, D), noise(1, 3, D))


@EXAMPLES
@given(
    n=st.integers(1, 30),
    n_safe=st.integers(1, 30),
    keep=st.floats(0.01, 1.0),
    which=st.sampled_from(["none", "top", "bottom"]),
    paired=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pruned_differences_are_those_of_numpy(n, n_safe, keep, which, paired, seed):
    generator = torch.Generator().manual_seed(seed)
    unsafe, safe = (
        torch.randn(n, D, generator=generator),
        torch.randn(n if paired else n_safe, D, generator=generator),
    )
    difference = pruned_mean_difference(unsafe, safe, keep=keep, which=which, paired=paired)
    assert difference.dtype == torch.float32
    np.testing.assert_allclose(
        difference.numpy(), by_numpy(unsafe, safe, keep, which, paired), atol=1e-6
    )


@EXAMPLES
@given(n=st.integers(2, 25), seed=st.integers(0, 1000))
def test_half_of_the_differences_is_those_above_the_median(n, seed):
    unsafe = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    safe = torch.zeros(n, D)
    norms = unsafe.norm(dim=1)
    above = -unsafe[norms > np.median(norms.numpy())].double().mean(dim=0)
    difference = pruned_mean_difference(unsafe, safe, keep=0.5, which="top", paired=True)
    torch.testing.assert_close(difference.double(), above, atol=1e-6, rtol=1e-6)


def test_random_pruning_keeps_as_many_rows_and_is_seeded():
    unsafe, safe = torch.randn(20, D), torch.zeros(20, D)
    one, again, other = (
        pruned_mean_difference(unsafe, safe, which="random", seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    eye = torch.eye(20)
    pruned = pruned_mean_difference(
        eye, torch.zeros(20, 20), keep=0.25, which="random", paired=True
    )
    assert sorted(pruned.tolist()) == pytest.approx([-0.2] * 5 + [0.0] * 15)


@EXAMPLES
@given(n=st.integers(1, 20), m=st.integers(1, 20), seed=st.integers(0, 1000))
def test_without_pruning_it_is_the_difference_of_means(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    unsafe, safe = torch.randn(n, D, generator=generator), torch.randn(m, D, generator=generator)
    expected = safe.double().mean(dim=0) - unsafe.double().mean(dim=0)
    torch.testing.assert_close(mean_difference(unsafe, safe), expected.float())
    torch.testing.assert_close(pruned_mean_difference(unsafe, safe, which="none"), expected.float())
    torch.testing.assert_close(mean_difference(safe, unsafe), -mean_difference(unsafe, safe))


def test_means_are_taken_in_float64():
    big = torch.full((1001, 1), 1e8)
    assert mean_difference(big, big + 16) == 16
