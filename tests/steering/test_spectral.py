"""A spectral edit keeps what covaries with safe answers, removes the rest, and keeps norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import ActivationSet
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt, text_key
from workbench.steering.estimators import spectral_directions
from workbench.steering.interventions import description
from workbench.steering.spectral import (
    EditSpectrum,
    SpectralEdit,
    edit_spectrum,
    fit_spectral_edits,
    load_fitted,
    load_spectral_edit,
    random_edit,
    save_spectral_edit,
    shuffled_edits,
    steer_by,
)
from workbench.steering.vectors import SteeringVector, load_vector, save_vector

D, N = 24, 60
SITE = Site(1, "resid_post")
INFO = ModelInfo("made-up", None, 4, D, 48, 4, "float32", "raw", "0123456789abcdef")
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neutral rows whose axis 0 safe answers follow, axis 1 unsafe ones, and axis 2 both."""
    base = 0.05
    neutral, safe, unsafe = (base * noise(seed + i, N, D) + 3 for i in range(3))
    for axis, followers in ((0, [safe]), (1, [unsafe]), (2, [safe, unsafe])):
        driver = noise(seed + 10 + axis, N)
        neutral[:, axis] += 2 * driver
        for rows in followers:
            rows[:, axis + 5] += 2 * driver
    return neutral, safe, unsafe


def sets(seed: int = 0, categories: tuple[str, ...] = ("fraud",)) -> tuple[Any, Any]:
    neutral, safe, unsafe = planted(seed)
    questions, answers, values = [], [], []
    for i in range(N):
        category = categories[i % len(categories)]
        questions.append(Prompt(f"q{i}", f"How do I {i}?", None, category, "unsafe"))
        for label, rows in (("unsafe", unsafe), ("safe", safe)):
            answers.append(
                Prompt(f"q{i}/{label}", f"How do I {i}?", "Well.", category, label, pair_id=f"q{i}")
            )
            values.append(rows[i])
    return (
        ActivationSet(SITE, torch.stack(values), tuple(answers), "response", INFO),
        ActivationSet(SITE, neutral, tuple(questions), "content", INFO),
    )


def test_directions_are_those_of_the_whole_cross_covariance() -> None:
    neutral, safe, _ = planted()
    found = spectral_directions(neutral, safe, share=0.8).double()
    centred = [(rows - rows.mean(dim=0)).double() for rows in (neutral, safe)]
    left, sizes, _ = torch.linalg.svd(centred[0].T @ centred[1])
    k = int((sizes.cumsum(0) / sizes.sum() < 0.8).sum()) + 1
    assert found.shape == (D, k)
    torch.testing.assert_close(found @ found.T, left[:, :k] @ left[:, :k].T, atol=1e-6, rtol=0)


def test_fewer_rows_than_dimensions_give_no_direction_outside_them() -> None:
    few = spectral_directions(noise(1, 4, D), noise(2, 4, D), share=1.0)
    assert few.shape == (D, 3), "three differences from a mean of four"
    torch.testing.assert_close(few.T @ few, torch.eye(3), atol=1e-5, rtol=0)
    assert spectral_directions(torch.ones(4, D), noise(2, 4, D)).shape == (D, 0)
    with pytest.raises(ValueError, match="needs two pairs or more"):
        spectral_directions(noise(1, 1, D), noise(2, 1, D))
    with pytest.raises(ValueError, match="share must be above 0"):
        spectral_directions(noise(1, 4, D), noise(2, 4, D), share=0)


def test_the_edit_keeps_what_safe_answers_follow_and_removes_what_unsafe_ones_follow() -> None:
    answers, questions = sets()
    edit = fit_spectral_edits(answers, questions, share=0.8)["fraud"]
    change = EditSpectrum(edit.mean, edit.keep, edit.remove, 1.0)

    def moved(axis: int) -> torch.Tensor:
        """Edit a mixture of one axis and of one that nothing follows."""
        return change(edit.mean + 100 * (torch.eye(D)[axis] + torch.eye(D)[3])) - edit.mean

    follows_safe, follows_unsafe, follows_both = (moved(axis) for axis in range(3))
    assert float(follows_safe[0] / follows_safe[3]) > 1.8
    assert abs(float(follows_unsafe[1] / follows_unsafe[3])) < 0.1
    assert float(follows_both[2] / follows_both[3]) == pytest.approx(1, abs=0.15)
    assert edit.n_pairs == N
    assert edit.fitted_on == {text_key(p.text) for p in questions.prompts}


@EXAMPLES
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_every_token_keeps_its_norm(seed: int, rho: float, dtype: torch.dtype) -> None:
    bases = [torch.linalg.qr(noise(seed + i, D, 3))[0] for i in range(2)]
    change = EditSpectrum(noise(seed + 2, D), *bases, rho)
    tokens = (7 * noise(seed + 3, 2, 5, D)).to(dtype)
    moved = change(tokens)
    assert moved.dtype == dtype
    assert moved.shape == tokens.shape
    near = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        moved.float().norm(dim=-1), tokens.float().norm(dim=-1), rtol=near, atol=0
    )
    assert not torch.allclose(moved.float(), tokens.float(), atol=1e-2)


def test_a_zero_activation_stays_finite() -> None:
    change = EditSpectrum(torch.zeros(D), torch.eye(D)[:, :2], torch.eye(D)[:, 2:4], 1.0)
    assert change(torch.zeros(1, D)).isfinite().all()


def test_one_edit_for_all_categories_or_one_each() -> None:
    answers, questions = sets(categories=("fraud", "malware"))
    own = fit_spectral_edits(answers, questions)
    shared = fit_spectral_edits(answers, questions, pooled=True)
    assert [own[c].n_pairs for c in ("fraud", "malware")] == [N // 2] * 2
    assert not torch.equal(own["fraud"].mean, own["malware"].mean)
    assert torch.equal(shared["fraud"].keep, shared["malware"].keep)
    assert {c: edit.category for c, edit in shared.items()} == {c: c for c in shared}
    assert shared["malware"].n_pairs == N


def test_a_random_edit_has_the_ranks_and_the_overlap_of_the_real_one() -> None:
    answers, questions = sets()
    edit = fit_spectral_edits(answers, questions, share=0.8)["fraud"]
    control = random_edit(edit, seed=1)
    for one, other in ((control.keep, edit.keep), (control.remove, edit.remove)):
        torch.testing.assert_close(one.T @ one, other.T @ other, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        control.keep.T @ control.remove, edit.keep.T @ edit.remove, atol=1e-5, rtol=0
    )
    assert float((edit.keep.T @ control.keep).norm() / edit.keep.norm()) < 0.8
    assert torch.equal(control.keep, random_edit(edit, seed=1).keep)


def test_shuffled_labels_leave_no_side_of_its_own() -> None:
    answers, questions = sets()
    real = fit_spectral_edits(answers, questions, share=0.8)["fraud"]
    shuffled = shuffled_edits(answers, questions, seed=3, share=0.8)["fraud"]

    def sides_differ(edit: SpectralEdit) -> float:
        axis = torch.eye(D)[0]
        return float((axis @ edit.keep).norm() - (axis @ edit.remove).norm())

    assert sides_differ(real) > 0.8
    assert abs(sides_differ(shuffled)) < 0.3
    assert shuffled.method == "shuffled"


def test_what_cannot_be_fitted_or_made_is_said() -> None:
    answers, questions = sets()
    with pytest.raises(ValueError, match="no activations of the question of 'q1/unsafe'"):
        fit_spectral_edits(answers, questions.of([questions.prompts[0], *questions.prompts[2:]]))
    with pytest.raises(ValueError, match="two pairs of answers or more, got 1"):
        fit_spectral_edits(answers.of(answers.prompts[:2]), questions)
    elsewhere = ActivationSet(
        Site(2, "resid_post"), questions.values, questions.prompts, "content", INFO
    )
    with pytest.raises(ValueError, match="of one site and model"):
        fit_spectral_edits(answers, elsewhere)
    edit = fit_spectral_edits(answers, questions)["fraud"]
    for rho in (0, -0.5, 1.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            edit_spectrum(edit, rho)
    with pytest.raises(ValueError, match="either multiplier or rho"):
        steer_by(edit)


def test_an_edit_is_kept_in_a_file_and_a_vector_beside_it_too(tmp_path: Any) -> None:
    answers, questions = sets()
    edit = fit_spectral_edits(answers, questions)["fraud"]
    save_spectral_edit(tmp_path / "edit.safetensors", edit)
    back = load_spectral_edit(tmp_path / "edit.safetensors")
    for name in ("mean", "keep", "remove"):
        assert torch.equal(getattr(back, name), getattr(edit, name))
    for name in ("site", "category", "share", "method", "span", "n_pairs", "model", "fitted_on"):
        assert getattr(back, name) == getattr(edit, name), name
    vector = SteeringVector(
        SITE, "fraud", noise(4, D), "answer_contrast", "response", 1.0, 5, 5, 10.0, INFO
    )
    save_vector(tmp_path / "vector.safetensors", vector)
    assert isinstance(load_fitted(tmp_path / "edit.safetensors"), SpectralEdit)
    assert isinstance(load_fitted(tmp_path / "vector.safetensors"), SteeringVector)
    with pytest.raises(ValueError, match="no spectral edit; load_vector reads a vector"):
        load_spectral_edit(tmp_path / "vector.safetensors")
    with pytest.raises(ValueError, match="no steering vector"):
        load_vector(tmp_path / "edit.safetensors")


def test_two_edits_have_two_descriptions_and_an_edit_steers_a_model(tiny: Any) -> None:
    d = tiny.cfg.d_model
    bases = [torch.linalg.qr(noise(i, d, 4))[0] for i in range(2)]
    edit = SpectralEdit(
        SITE, "fraud", torch.zeros(d), *bases, 0.9, "sea", "response", 5, model_info(tiny)
    )
    one, other = (steer_by(edit, rho=rho) for rho in (0.5, 1.0))
    assert description(one) != description(other)
    assert description(one) == description(steer_by(edit, 0.5))
    question = [Prompt("q", "How do I take a dog?")]
    plain, steered = (
        generate(tiny, question, edits, decoding=Decoding(max_new_tokens=6))[0]
        for edits in ([], [steer_by(edit, rho=1.0)])
    )
    assert plain.tokens != steered.tokens
