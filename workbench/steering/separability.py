"""Measure how well a category's direction tells held-out prompts apart, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np

from workbench.prompts.contrasts import Against, rows_against, unsafe_rows
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
    """Compute held-out AUROCs of the projection on each category's direction, layer by layer.

    The direction is the mean difference. Against neutral prompts a high value mostly measures style
    and topic; against the safe twins it measures risk.

    Args:
        activations: Residual-stream sites to look at, with the prompts of both folds.
        fit: Prompts the directions are fitted on (neutral minus unsafe).
        held_out: Prompts that are projected.

    Returns:
        One row per site, category and comparison: columns layer, kind, category, against (see
        ``contrasts.rows_against``), auroc, low, high, n. A comparison without prompts is left out.
    """
    import pandas as pd

    rows = []
    for site, acts in activations.items():
        projected = acts.of(held_out)
        for category, vector in fit_steering_vectors(acts.of(fit)).items():
            scores = (projected.values.double() @ -vector.direction.double()).numpy()
            unsafe = unsafe_rows(projected.prompts, category)
            for against in get_args(Against):
                reference = rows_against(projected.prompts, category, against)
                if not unsafe or not reference:
                    continue
                both = sorted([*unsafe, *reference])
                value = float(auroc(scores[both], np.isin(both, unsafe)))
                low, high = auroc_interval(value, len(unsafe), len(reference))
                rows.append((site.layer, site.kind, category, against, value, low, high, len(both)))
    return pd.DataFrame(
        rows, columns=["layer", "kind", "category", "against", "auroc", "low", "high", "n"]
    )
