"""Merge means and variances of classes that were computed on different prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workbench.models.activations import ClassMoments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from workbench.models.load import ModelInfo
    from workbench.models.sites import Site


class MergedMoments:
    """Add up the moments of parts of a set; the order of the parts changes rounding alone.

    Counts are whole numbers. Means and sums of squared deviations are merged in float64 by the
    pairwise update of Chan et al. (1979), as ``class_moments`` merges its batches.

    Args:
        sites: Sites that are measured.
        classes: (category, label) of every class of the whole set, sorted.
    """

    def __init__(self, sites: Sequence[Site], classes: Sequence[tuple[str, str]]) -> None:
        self.sites, self.classes = tuple(sites), tuple(classes)
        self.n = {site: torch.zeros(len(classes), dtype=torch.long) for site in sites}
        self.mean: dict[Site, Tensor] = {}
        self.squares: dict[Site, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor], classes: Sequence[tuple[str, str]]) -> None:
        """Add a part, as ``moments_to_tensors`` wrote it.

        Args:
            tensors: Counts, means and variances of the part.
            classes: Classes of the part's prompts, sorted.
        """
        rows = torch.tensor([self.classes.index(one) for one in classes])
        for site in self.sites:
            added = tensors[f"{site}|n"]
            mean, variance = tensors[f"{site}|mean"], tensors[f"{site}|variance"]
            if site not in self.mean:
                self.mean[site] = torch.zeros(len(self.classes), mean.shape[1], dtype=mean.dtype)
                self.squares[site] = torch.zeros_like(self.mean[site])
            before, added = self.n[site][rows].double(), added.double()  # for exact shares
            total = before + added
            delta = mean - self.mean[site][rows]
            self.squares[site][rows] += variance * (added - 1).clamp(min=0)[:, None]
            self.squares[site][rows] += delta**2 * (before * added / total)[:, None]
            self.mean[site][rows] += delta * (added / total)[:, None]
            self.n[site][rows] = total.long()

    def result(self, span: str, model: ModelInfo) -> dict[Site, ClassMoments]:
        """Give the moments of all parts together."""
        return {
            site: ClassMoments(
                site,
                self.classes,
                self.n[site],
                self.mean[site],
                self.squares[site] / (self.n[site] - 1).clamp(min=1)[:, None],
                span,
                model,
            )
            for site in self.sites
        }


def moments_to_tensors(moments: Mapping[Site, ClassMoments]) -> dict[str, Tensor]:
    """Write moments as named tensors: the site as it prints, "|", and n, mean or variance."""
    tensors: dict[str, Tensor] = {}
    for site, of_site in moments.items():
        parts = {"n": of_site.n, "mean": of_site.mean, "variance": of_site.variance}
        tensors |= {f"{site}|{name}": values.clone() for name, values in parts.items()}
    return tensors
