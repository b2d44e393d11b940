"""Steering vectors: measured differences between activations of unsafe and safe text, without gradients. From unsafe to safe, always."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, read_tensors, write_tensors
from workbench.models.load import ModelInfo
from workbench.models.sites import RESIDUAL_KINDS, Site
from workbench.prompts.contrasts import SafeSide, sides_to_fit
from workbench.prompts.prompt import Prompt, categories_of, text_key
from workbench.steering.estimators import (
    Pruning,
    mean_difference,
    principal_direction,
    probe_direction,
    pruned_mean_difference,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet


Estimator = Literal["mean_difference", "principal", "probe"]


ESTIMATORS = ("mean_difference", "principal", "probe")


RefusalFilter = Literal["none", "keep", "drop"]


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """What was measured at one site for one category: it points from unsafe to safe, so a multiplier above 0 means safer.

    Attributes:
        site: Where it was measured and where it is added.
        category: Risk category, or what a control was made from.
        vector: The measured difference, float32, in units of the residual stream, not normalised.
        method: Construction: "prompt_contrast", "answer_contrast", or a control ("random", "shuffled", "other:<category>").
        span: Which tokens were pooled.
        kept: Fraction of the differences that pruning kept.
        n_unsafe: Rows on the unsafe side.
        n_safe: Rows on the safe side.
        site_norm: Mean L2 norm of the residual stream at this layer (pooled rows); nan where it was not measured.
        model: What it was measured on.
        fitted_on: ``prompts.text_key`` of the prompts it was fitted on, so that an evaluation on one of them is noticed.
    """

    site: Site
    category: str
    vector: Float[Tensor, " d_model"]
    method: str
    span: str
    kept: float
    n_unsafe: int
    n_safe: int
    site_norm: float
    model: ModelInfo
    fitted_on: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return (
            f"SteeringVector({self.category!r} at {self.site}, {self.method}, d={len(self.vector)}, norm={self.norm:.3g}, "
            f"n={self.n_unsafe}+{self.n_safe}, model={self.model.name!r})"
        )

    @property
    def norm(self) -> float:
        """L2 norm of the vector, residual-stream units."""
        return float(self.vector.norm())

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The vector at unit norm.

        Raises:
            ValueError: If the vector is zero.
        """
        if self.norm == 0:
            raise ValueError(
                f"the vector of {self.category!r} at {self.site} is zero: it has no direction."
            )
        return self.vector / self.vector.norm()

    def rho(self, multiplier: float) -> float:
        """Relative strength of a multiplier: norm of what is added over the mean norm of the residual stream there."""
        return abs(multiplier) * self.norm / self._known_site_norm()

    def multiplier_for(self, rho: float) -> float:
        """The multiplier whose relative strength is ``|rho|``, with the sign of ``rho``.

        Raises:
            ValueError: If the norm of the residual stream was not measured.
        """
        if self.norm == 0:
            raise ValueError(
                f"the vector of {self.category!r} at {self.site} is zero: no multiplier gives it a strength."
            )
        return rho * self._known_site_norm() / self.norm

    def _known_site_norm(self) -> float:
        if math.isnan(self.site_norm):
            raise ValueError(
                f"relative strength at {self.site} needs the norm of the residual stream: fit with residual=activations at "
                f"{Site(self.site.layer, 'resid_post')}, or give a multiplier."
            )
        return self.site_norm


def fit_steering_vectors(
    activations: ActivationSet,
    *,
    residual: ActivationSet | None = None,
    categories: Iterable[str] | None = None,
    safe_side: SafeSide = "generic",
    estimator: Estimator = "mean_difference",
    pruning: Pruning = "none",
    keep: float = 0.5,
    refusals: Collection[str] | None = None,
    refusal_filter: RefusalFilter = "none",
    method: str = "prompt_contrast",
    seed: int = 0,
) -> dict[str, SteeringVector]:
    """One steering vector a category: from its unsafe rows to the safe ones.

    Args:
        activations: Pooled activations at one site, unsafe and safe prompts (or answers, see ``openings.answer_prompts``) together.
        residual: Activations of the same prompts at the residual stream of the layer, for relative strength; not needed when
            ``activations`` is of the residual stream itself.
        categories: Which; all that have unsafe rows by default.
        safe_side: "paired": the safe rows with the same ``pair_id``. "generic": all neutral rows, whatever their topic, for every
            category (where there are none, all safe rows).
        estimator: "mean_difference" (with paired rows what CAA does, Rimsky et al. 2023, arXiv:2312.06681; with generic ones the refusal direction's
            construction, Arditi et al. 2024, arXiv:2406.11717), "principal" (paired rows only) or "probe", see ``estimators``; the latter two
            give a direction, which gets the mean difference's norm.
        pruning: Which differences to keep by their norm, see ``pruned_mean_difference``; for the mean difference only.
        keep: Share kept when pruning.
        refusals: Ids of the safe rows whose response is a refusal; needed for a refusal filter.
        refusal_filter: "keep" only those safe rows, or "drop" them.
        method: Name of the construction, for the card.
        seed: For random pruning, and of the signs of "principal".

    Returns:
        Category to vector.

    Raises:
        ValueError: If the site is not in the residual stream, a category is unknown or a side is empty.
    """
    if activations.site.kind not in RESIDUAL_KINDS:
        raise ValueError(
            f"a steering vector lives in the residual stream: fit it at {', '.join(RESIDUAL_KINDS)}, not at {activations.site}."
        )
    known = categories_of(activations.prompts)
    chosen = known if categories is None else list(categories)
    for category in chosen:
        if category not in known:
            raise ValueError(
                f"no unsafe prompts of category {category!r}; categories: {', '.join(known)}.{did_you_mean(category, known)}"
            )
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; estimators: {', '.join(ESTIMATORS)}.")
    if (estimator == "principal" and safe_side != "paired") or (
        estimator != "mean_difference" and pruning != "none"
    ):
        raise ValueError(
            f"estimator {estimator!r} does not go with safe_side={safe_side!r} and pruning={pruning!r}: 'principal' needs "
            "safe_side='paired', and only 'mean_difference' can be pruned."
        )
    if not chosen:
        raise ValueError("no unsafe rows: a steering vector needs a risk category.")
    norm = _site_norm(activations, residual)
    vectors = {}
    for category in chosen:
        unsafe_rows, safe_rows = sides_to_fit(activations.prompts, category, safe_side)
        if refusal_filter != "none":
            unsafe_rows, safe_rows = _filter_refusals(
                activations.prompts,
                unsafe_rows,
                safe_rows,
                refusals,
                refusal_filter,
                paired=safe_side == "paired",
            )
        if not unsafe_rows or not safe_rows:
            side = "unsafe" if not unsafe_rows else "safe"
            raise ValueError(
                f"no {side} rows for category {category!r} with safe_side={safe_side!r}, refusal_filter={refusal_filter!r}."
            )
        unsafe, safe = activations.values[unsafe_rows], activations.values[safe_rows]
        if estimator == "mean_difference":
            vector = pruned_mean_difference(
                unsafe, safe, keep=keep, which=pruning, paired=safe_side == "paired", seed=seed
            )
        else:
            found = (
                probe_direction(unsafe, safe)
                if estimator == "probe"
                else principal_direction(unsafe, safe, seed=seed)
            )
            vector = found * mean_difference(unsafe, safe).norm()
        vectors[category] = SteeringVector(
            site=activations.site,
            category=category,
            vector=vector,
            method=method,
            span=activations.span,
            kept=1.0 if pruning == "none" else keep,
            n_unsafe=len(unsafe_rows),
            n_safe=len(set(safe_rows)),
            site_norm=norm,
            model=activations.model,
            fitted_on=frozenset(
                text_key(activations.prompts[i].text) for i in (*unsafe_rows, *safe_rows)
            ),
        )
    return vectors


def random_vector(like: SteeringVector, *, seed: int) -> SteeringVector:
    """Control: a uniformly random direction with the norm of ``like``."""
    noise = torch.randn(
        like.vector.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    vector = (noise / noise.norm() * like.vector.double().norm()).float()
    return replace(
        like,
        vector=vector,
        method="random",
        category=f"{like.category}/random{seed}",
        fitted_on=frozenset(),
    )


def shuffled_vector(
    like: SteeringVector, activations: ActivationSet, *, seed: int, safe_side: SafeSide = "generic"
) -> SteeringVector:
    """Control: the same rows with shuffled labels, scaled to the norm of ``like``: what the construction finds where nothing is.

    Args:
        like: The vector it is a control for, with its category.
        activations: What ``like`` was fitted on.
        seed: Of the shuffle. Paired sides are swapped pair by pair; generic sides are mixed.
        safe_side: As in the fit.

    Raises:
        ValueError: If the activations are of another site or model, or hold no such rows.
    """
    if activations.site != like.site or activations.model.fingerprint != like.model.fingerprint:
        raise ValueError(
            f"a control at {like.site} of {like.model.name!r} needs activations from there, got {activations!r}."
        )
    unsafe_rows, safe_rows = sides_to_fit(activations.prompts, like.category, safe_side)
    if not unsafe_rows or not safe_rows:
        raise ValueError(
            f"no rows to shuffle for category {like.category!r} with safe_side={safe_side!r}."
        )
    generator = torch.Generator().manual_seed(seed)
    values = activations.values.double()
    if safe_side == "paired":
        sign = torch.randint(0, 2, (len(unsafe_rows), 1), generator=generator).double() * 2 - 1
        vector = (sign * (values[safe_rows] - values[unsafe_rows])).mean(dim=0)
    else:
        mixed = torch.tensor(unsafe_rows + safe_rows)[
            torch.randperm(len(unsafe_rows) + len(safe_rows), generator=generator)
        ]
        vector = values[mixed[len(unsafe_rows) :]].mean(dim=0) - values[
            mixed[: len(unsafe_rows)]
        ].mean(dim=0)
    return replace(
        scaled_to(replace(like, vector=vector.float()), like.norm),
        method="shuffled",
        category=f"{like.category}/shuffled{seed}",
    )


def scaled_to(vector: SteeringVector, norm: float) -> SteeringVector:
    """The same direction with another norm, for comparisons at equal strength."""
    return replace(vector, vector=vector.direction * norm)


def save_vector(path: PathLike, vector: SteeringVector) -> None:
    """Write a vector as safetensors with its card, atomically."""
    import importlib.metadata

    without_tensor: Any = replace(vector, vector=None)  # type: ignore[arg-type]
    card = {name: v for name, v in asdict(without_tensor).items() if name != "vector"}
    card |= {
        "site": str(vector.site),
        "sign": "from unsafe to safe",
        "norm": vector.norm,
        "format": "workbench steering vector 1",
        "fitted_on": sorted(vector.fitted_on),
    }
    card["versions"] = {
        name: importlib.metadata.version(name)
        for name in ("workbench", "torch", "transformer-lens")
    }
    card["site_norm"] = None if math.isnan(vector.site_norm) else vector.site_norm
    write_tensors(path, {"vector": vector.vector}, card)


def load_vector(path: PathLike) -> SteeringVector:
    """Read a vector written by ``save_vector``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    tensors, card = read_tensors(path)
    try:
        vector = SteeringVector(
            site=Site.parse(str(card["site"])),
            vector=tensors["vector"],
            site_norm=math.nan if card["site_norm"] is None else card["site_norm"],
            model=ModelInfo(**card["model"]),
            fitted_on=frozenset(card.get("fitted_on", ())),
            **{
                name: card[name]
                for name in ("category", "method", "span", "kept", "n_unsafe", "n_safe")
            },
        )
        norm = float(card["norm"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no steering vector ({error}: missing or wrong).") from error
    if vector.vector.shape != (vector.model.d_model,) or not math.isclose(
        vector.norm, norm, rel_tol=1e-5
    ):
        raise ValueError(
            f"{path} is damaged: its vector of shape {tuple(vector.vector.shape)} is not the one of its card; delete and rebuild it."
        )
    return vector


def _filter_refusals(
    prompts: Sequence[Prompt],
    unsafe: list[int],
    safe: list[int],
    refusals: Collection[str] | None,
    how: str,
    *,
    paired: bool,
) -> tuple[list[int], list[int]]:
    if how not in ("keep", "drop"):
        raise ValueError(f"unknown refusal_filter {how!r}; allowed: none, keep, drop.")
    if refusals is None:
        raise ValueError(
            "a refusal filter needs refusals=ids of the safe rows whose response is a refusal."
        )
    kept = [place for place, i in enumerate(safe) if (prompts[i].id in refusals) == (how == "keep")]
    return ([unsafe[k] for k in kept] if paired else unsafe), [safe[k] for k in kept]


def _site_norm(activations: ActivationSet, residual: ActivationSet | None) -> float:
    source = (
        residual
        if residual is not None
        else activations
        if activations.site.kind.startswith("resid")
        else None
    )
    if source is None:
        return math.nan
    if not source.site.kind.startswith("resid") or source.site.layer != activations.site.layer:
        raise ValueError(
            f"residual must be of the residual stream of layer {activations.site.layer}, got {source.site}."
        )
    if source.model.fingerprint != activations.model.fingerprint:
        raise ValueError(
            f"residual must be of the same model {activations.model.name!r}, got {source.model.name!r}."
        )
    return float(source.values.double().norm(dim=1).mean())
