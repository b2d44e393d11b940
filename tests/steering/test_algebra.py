"""Multiples, sums and differences of steering vectors, and the table of their cosines."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.models.load import ModelInfo
from workbench.models.sites import Site
from workbench.steering.algebra import cosine_table
from workbench.steering.vectors import SteeringVector, load_vector, save_vector

D = 16
MODEL = ModelInfo("made-up", None, 4, D, 64, 4, "float32", "raw", "0123456789abcdef")
OTHER = replace(MODEL, name="another", fingerprint="fedcba9876543210")
SITE = Site(2, "resid_post")


def vector(seed: int, **fields) -> SteeringVector:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=D).astype(np.float32))
    made = SteeringVector(
        SITE, "fraud", values, "answer_contrast", "response", 1.0, 5, 7, 20.0, MODEL,
        frozenset({f"prompt {seed}"}), "", 3.0,
    )  # fmt: skip
    return replace(made, **fields)


@settings(deadline=None, max_examples=50)
@given(st.floats(-50, 50, allow_subnormal=False), st.integers(0, 20), st.integers(21, 40))
def test_vectors_calculate_as_their_numbers_do(factor, a, b):
    v, w = vector(a), vector(b)
    torch.testing.assert_close((v * factor).vector, v.vector * factor)
    torch.testing.assert_close((factor * v).vector, v.vector * factor)
    torch.testing.assert_close((v + w).vector, v.vector + w.vector)
    torch.testing.assert_close((v - w).vector, v.vector - w.vector)
    torch.testing.assert_close((-v).vector, -v.vector)
    torch.testing.assert_close((v * factor + w).vector, (w + v * factor).vector)
    torch.testing.assert_close((v - w).vector, (v + -w).vector)


def test_a_numpy_number_multiplies_from_both_sides():
    v = vector(0)
    for two in (np.float32(2), np.float64(2), np.int64(2)):
        torch.testing.assert_close((two * v).vector, v.vector * 2)
        torch.testing.assert_close((v * two).vector, v.vector * 2)


def test_a_multiple_keeps_what_was_measured_around_it():
    v = vector(0)
    double = v * 2
    assert (double.site, double.site_norm, double.n_unsafe, double.fitted_on) == (
        v.site, v.site_norm, v.n_unsafe, v.fitted_on,
    )  # fmt: skip
    assert double.safe_projection == v.safe_projection  # the direction is the same
    assert math.isclose(double.rho(1.0), 2 * v.rho(1.0))
    assert double.method == "2 * (answer_contrast)"


def test_a_turned_vector_says_so_and_has_no_safe_side():
    turned = -vector(0)
    assert turned.method == "-1 * (answer_contrast)"
    assert math.isnan(turned.safe_projection)


def test_a_sum_was_fitted_on_the_prompts_of_both():
    total = vector(0) + vector(1, category="malware", span="prompt", asked_as="x", site_norm=30.0)
    assert total.fitted_on == {"prompt 0", "prompt 1"}
    assert (total.n_unsafe, total.n_safe) == (10, 14)
    assert (total.category, total.span, total.asked_as) == (
        "fraud + malware",
        "response, prompt",
        "",
    )
    assert total.site_norm == 25.0
    assert math.isnan(total.safe_projection)
    assert (vector(0) - vector(1, category="malware")).category == "fraud - malware"
    assert (vector(0) + vector(1, site_norm=math.nan)).site_norm == 20.0


def test_only_vectors_of_one_site_and_model_are_added():
    with pytest.raises(ValueError, match=r"L2\.resid_post and L3\.resid_post cannot be added"):
        vector(0) + vector(1, site=Site(3, "resid_post"))
    with pytest.raises(ValueError, match=r"different models: 'made-up'.*'another'"):
        vector(0) - vector(1, model=OTHER)
    for wrong in (1.0, None, torch.ones(D)):
        with pytest.raises(TypeError):
            vector(0) + wrong
    for wrong in ("2", None, vector(1), True):
        with pytest.raises(TypeError):
            vector(0) * wrong
    with pytest.raises(ValueError, match=r"finite number, got inf"):
        vector(0) * math.inf


def test_a_result_is_saved_and_read_as_any_vector(tmp_path):
    total = vector(0) * 2 - vector(1)
    save_vector(tmp_path / "v.safetensors", total)
    back = load_vector(tmp_path / "v.safetensors")
    assert torch.equal(back.vector, total.vector)
    assert back.method == total.method == "(2 * (answer_contrast)) - (answer_contrast)"


def test_cosines_are_those_of_numpy_and_ignore_norms():
    vectors = {"a": vector(0), "b": vector(1) * 3, "turned": -vector(0), "zero": vector(0) * 0}
    table = cosine_table(vectors)
    a, b = (vector(n).vector.double().numpy() for n in (0, 1))
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert list(table.index) == list(table.columns) == ["a", "b", "turned", "zero"]
    np.testing.assert_allclose(table.loc["a", "b"], expected, rtol=1e-6)
    np.testing.assert_allclose(table.loc["b", "turned"], -expected, rtol=1e-6)
    assert table.loc["a", "turned"] == -1
    assert table.loc["zero"].isna().all()
    np.testing.assert_allclose(np.diag(table)[:3], 1)


def test_a_table_is_of_one_model_and_of_one_site_unless_it_is_said():
    there = vector(1, site=Site(3, "resid_post"), category="malware")
    with pytest.raises(ValueError, match=r"2 sites .*across_sites=True"):
        cosine_table([vector(0), there])
    table = cosine_table([vector(0), there], across_sites=True)
    assert list(table.index) == [
        "fraud, answer_contrast, L2.resid_post", "malware, answer_contrast, L3.resid_post",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"different models"):
        cosine_table([vector(0), vector(1, model=OTHER, category="x")])
    with pytest.raises(ValueError, match=r"two vectors are called 'fraud, answer_contrast'"):
        cosine_table([vector(0), vector(1)])
    with pytest.raises(ValueError, match=r"at least one"):
        cosine_table([])
