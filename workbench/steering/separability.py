"""How well a category's direction tells held-out prompts apart, layer by layer, and against what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.stats.selectivity import auroc, auroc_interval
from workbench.steering.vectors import fit_steering_vectors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from workbench.models.activations import ActivationSet
    from workbench.models.sites import Site
    from workbench.prompts.prompt import Prompt


def layer_separability(
    activations: Mapping[Site, ActivationSet], fit: Sequence[Prompt], held_out: Sequence[Prompt]
) -> pd.DataFrame:
    """Held-out AUROC of the projection on each category's mean-difference direction, layer by layer.

    Against neutral prompts a high value mostly measures style and topic; against the safe twins it measures risk.

    Args:
        activations: Residual-stream sites to look at, with the prompts of both folds.
        fit: Prompts the directions are fitted on (neutral minus unsafe).
        held_out: Prompts that are projected.

    Returns:
        Columns layer, kind, category, against (twins, neutral, other), auroc, low, high, n. A comparison without prompts is left out.
    """
    import pandas as pd

    rows = []
    for site, acts in activations.items():
        fitted = fit_steering_vectors(acts.of(fit))
        projected = acts.of(held_out)
        for category, vector in fitted.items():
            scores = (projected.values.double() @ -vector.direction.double()).numpy()
            is_unsafe = [p.label == "unsafe" and p.category == category for p in projected.prompts]
            against = {
                "twins": [p.label == "safe" and p.category == category for p in projected.prompts],
                "neutral": [p.label == "neutral" for p in projected.prompts],
                "other": [
                    p.label == "unsafe" and p.category != category for p in projected.prompts
                ],
            }
            for name, is_other in against.items():
                rows_used = [
                    i for i, (a, b) in enumerate(zip(is_unsafe, is_other, strict=True)) if a or b
                ]
                labels = [is_unsafe[i] for i in rows_used]
                if not any(labels) or all(labels):
                    continue
                value = float(auroc(scores[rows_used], np.array(labels)))
                low, high = auroc_interval(value, sum(labels), len(labels) - sum(labels))
                rows.append((site.layer, site.kind, category, name, value, low, high, len(labels)))
    return pd.DataFrame(
        rows, columns=["layer", "kind", "category", "against", "auroc", "low", "high", "n"]
    )
