"""Linear probes: the same decisions as scikit-learn's, in the values' own units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from workbench.stats.linear_probe import fit_linear_probe


def rows(classes: str, n: int = 40) -> tuple[torch.Tensor, list[str]]:
    """Features of very different mean and scale."""
    generator = torch.Generator().manual_seed(3)
    labels = [classes[i % len(classes)] for i in range(n)]
    shift = torch.tensor([classes.index(label) for label in labels]).float()
    values = torch.randn(n, 4, generator=generator) + shift[:, None]
    return values * torch.tensor([1.0, 100.0, 0.01, 5.0]) + torch.tensor(
        [3.0, -50.0, 0.2, 7.0]
    ), labels


@pytest.mark.parametrize("classes", ["ab", "abc"])
def test_scores_are_the_log_odds_of_a_regression_on_standardised_values(classes: str) -> None:
    values, labels = rows(classes)
    probe = fit_linear_probe(values, labels, penalty=2.0)
    scores = (values.double() @ probe.weights.T + probe.bias).numpy()
    scale = np.sqrt((len(labels) - 1) / len(labels))  # scikit-learn scales by the other deviation
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=scale**2 / 2.0, max_iter=5000))
    reference = pipeline.fit(values.double().numpy(), labels).decision_function(
        values.double().numpy()
    )
    assert probe.classes == tuple(classes)
    assert np.allclose(scores.squeeze(), reference, atol=1e-2)


def test_a_smaller_penalty_gives_larger_weights() -> None:
    values, labels = rows("ab")
    weak, strong = (fit_linear_probe(values, labels, penalty=p).weights.norm() for p in (0.1, 10.0))
    assert weak > strong


def test_balanced_classes_move_the_decision_towards_the_common_one() -> None:
    values, labels = rows("ab")
    keep = [i for i, label in enumerate(labels) if label == "a" or i < 8]
    values, labels = values[keep], [labels[i] for i in keep]
    plain, balanced = (
        (values.double() @ p.weights.T + p.bias > 0).float().mean()
        for p in (fit_linear_probe(values, labels, balanced=b) for b in (False, True))
    )
    assert balanced >= plain


def test_one_class_or_too_few_labels_are_refused() -> None:
    values, labels = rows("ab")
    with pytest.raises(ValueError, match="one label per row and at least two classes"):
        fit_linear_probe(values, labels[:-1])
    with pytest.raises(ValueError, match="1 classes"):
        fit_linear_probe(values, ["a"] * len(labels))


@pytest.mark.parametrize("classes", ["ab", "abc"])
def test_a_probe_looked_for_among_the_rows_is_the_same_probe(classes):
    generator = torch.Generator().manual_seed(3)
    labels = list(classes) * 8
    values = 3 * torch.randn(len(labels), 60, generator=generator) + 1
    one = fit_linear_probe(values, labels, penalty=2.0)
    other = fit_linear_probe(values, labels, penalty=2.0, in_row_space=True)
    assert one.classes == other.classes
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(one.bias, other.bias, rtol=1e-2, atol=1e-3)
