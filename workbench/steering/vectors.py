"""Fit steering vectors, their controls, and keep them in files.

A steering vector is a measured difference between activations of unsafe and of safe text; no
gradient is taken. It points from unsafe to safe, always: a multiplier above 0 means safer. Which
rows are the two sides is decided in ``prompts.contrasts``, what is made of them in ``estimators``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from workbench.files.foreign_tensors import PICKLED, file_format
from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, read_tensors, write_tensors
from workbench.models.load import ModelInfo
from workbench.models.sites import RESIDUAL_KINDS, Site
from workbench.prompts.contrasts import SafeSide, sides_to_fit
from workbench.prompts.prompt import categories_of, text_key
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
    from workbench.prompts.prompt import Prompt


Estimator = Literal["mean_difference", "principal", "probe"]
"""Ways from two sets of rows to a vector; each names a function of ``estimators``."""


RefusalFilter = Literal["none", "keep", "drop"]
"""What happens to safe rows whose response is a refusal."""


FORMAT = "workbench steering vector 1"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Hold what was measured at one site for one category, from unsafe to safe.

    Attributes:
        site: Where it was measured and where it is added.
        category: Risk category, or what a control was made from.
        vector: The measured difference, float32, in units of the residual stream, not normalised.
        method: Construction: "prompt_contrast", "answer_contrast", or a control ("random",
            "shuffled", "other:<category>").
        span: Which tokens were pooled.
        kept: Fraction of the differences that pruning kept.
        n_unsafe: Rows on the unsafe side.
        n_safe: Rows on the safe side.
        site_norm: Mean L2 norm of the residual stream at this layer (pooled rows); nan where it was
            not measured.
        model: What it was measured on.
        fitted_on: ``prompts.text_key`` of the prompts it was fitted on, so that an evaluation on
            one of them is noticed.
        asked_as: System prompt and template keywords that it was measured under, see
            ``ActivationSet``.
        safe_projection: Mean projection of the safe side's rows on the unit direction, in units of
            the residual stream: a target for ``raise_to``. nan where it was not measured.
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
    asked_as: str = ""
    safe_projection: float = math.nan

    def __repr__(self) -> str:
        return (
            f"SteeringVector({self.category!r} at {self.site}, {self.method}, "
            f"d={len(self.vector)}, norm={self.norm:.3g}, n={self.n_unsafe}+{self.n_safe}, "
            f"model={self.model.name!r})"
        )

    __array_ufunc__ = None  # so that a NumPy number leaves ``number * vector`` to the vector

    def __mul__(self, factor: float) -> SteeringVector:
        """Multiply the vector by a number, see ``algebra.multiplied``."""
        from workbench.steering.algebra import is_number, multiplied

        return multiplied(self, float(factor)) if is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        """Turn the vector: it points from safe to unsafe then."""
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """Add a vector of the same site and model, see ``algebra.added``."""
        from workbench.steering.algebra import added

        return added(self, other) if isinstance(other, SteeringVector) else NotImplemented

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        """Subtract a vector of the same site and model, see ``algebra.added``."""
        from workbench.steering.algebra import added

        return added(self, other, -1.0) if isinstance(other, SteeringVector) else NotImplemented

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
        """Turn a multiplier into relative strength: norm added over mean norm of the stream.

        Raises:
            ValueError: If the norm of the residual stream was not measured.
        """
        return abs(multiplier) * self.norm / self._known_site_norm()

    def multiplier_for(self, rho: float) -> float:
        """Find the multiplier whose relative strength is ``|rho|``, with the sign of ``rho``.

        Raises:
            ValueError: If the vector is zero, or the norm of the residual stream was not measured.
        """
        if self.norm == 0:
            raise ValueError(
                f"the vector of {self.category!r} at {self.site} is zero: no multiplier gives it a "
                "strength."
            )
        return rho * self._known_site_norm() / self.norm

    def target_for(self, rho: float) -> float:
        """Find the projection that lies ``rho`` beyond the safe side's mean, for ``raise_to``.

        Args:
            rho: Distance relative to the norm of the residual stream; below 0 it stops short of the
                safe side's mean.

        Raises:
            ValueError: If that mean, or the norm of the residual stream, was not measured.
        """
        if math.isnan(self.safe_projection):
            raise ValueError(
                f"a target at {self.site} needs the safe side's mean projection, which the vector "
                f"of {self.category!r} ({self.method}) lacks: measure it with "
                "with_safe_projection(vector, activations), or give raise_to a target."
            )
        return self.safe_projection + rho * self._known_site_norm()

    def _known_site_norm(self) -> float:
        if math.isnan(self.site_norm):
            raise ValueError(
                f"relative strength at {self.site} needs the norm of the residual stream: fit with "
                f"residual=activations at {Site(self.site.layer, 'resid_post')}, or give a "
                "multiplier."
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
    """Fit one steering vector per category, from its unsafe rows to the safe ones.

    Args:
        activations: Pooled activations at one site of unsafe and safe prompts together (or of
            answers, see ``openings.answer_prompts``).
        residual: The same prompts at the residual stream of the layer, for relative strength; not
            needed when ``activations`` is of the residual stream itself.
        categories: Risk categories; by default all that have unsafe rows.
        safe_side: "paired": the safe rows with the same ``pair_id``. "generic": all neutral rows,
            for every category (where there are none, all safe rows).
        estimator: "mean_difference" (with paired rows that of CAA, Rimsky et al. 2023,
            arXiv:2312.06681; with generic ones the refusal direction, Arditi et al. 2024,
            arXiv:2406.11717). "principal" (paired rows only) and "probe" give a direction, which
            gets the mean difference's norm. See ``estimators``.
        pruning: Which differences to keep by their norm, see ``pruned_mean_difference``; for
            "mean_difference" only.
        keep: Share kept when pruning.
        refusals: Ids of the safe rows whose response is a refusal; needed for a refusal filter.
        refusal_filter: "keep" only those safe rows, or "drop" them.
        method: Name of the construction, for the card.
        seed: Seed of random pruning.

    Returns:
        Category to vector.

    Raises:
        ValueError: If the site is not in the residual stream, a category or an option is unknown,
            or a side is empty.
    """
    options = _FitOptions(safe_side, estimator, pruning, keep, refusals, refusal_filter, seed)
    chosen_categories = _checked_categories(activations, categories)
    site_norm = _site_norm(activations, residual)
    return {
        category: _fit_category(activations, category, options, method, site_norm)
        for category in chosen_categories
    }


def random_vector(like: SteeringVector, *, seed: int) -> SteeringVector:
    """Make a control: a uniformly random direction with the norm of ``like``."""
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
        safe_projection=math.nan,
    )


def shuffled_vector(
    like: SteeringVector, activations: ActivationSet, *, seed: int, safe_side: SafeSide = "generic"
) -> SteeringVector:
    """Make a control: the rows of ``like`` with shuffled labels, at the norm of ``like``.

    It is what the construction finds where there is nothing to find.

    Args:
        like: The vector it is a control for, with its category.
        activations: What ``like`` was fitted on.
        seed: Seed of the shuffle. Paired sides are swapped pair by pair; generic sides are mixed.
        safe_side: As in the fit.

    Raises:
        ValueError: If the activations are of another site or model, or hold no such rows.
    """
    _check_same_place("a control", like, activations)
    unsafe_rows, safe_rows = sides_to_fit(activations.prompts, like.category, safe_side)
    if not unsafe_rows or not safe_rows:
        raise ValueError(
            f"no rows to shuffle for category {like.category!r} with safe_side={safe_side!r}."
        )
    generator = torch.Generator().manual_seed(seed)
    n_unsafe = len(unsafe_rows)
    if safe_side == "paired":
        sign = torch.randint(0, 2, (n_unsafe, 1), generator=generator).double() * 2 - 1
        safe, unsafe = (activations.rows(rows).double() for rows in (safe_rows, unsafe_rows))
        vector = (sign * (safe - unsafe)).mean(dim=0)
    else:
        order = torch.randperm(n_unsafe + len(safe_rows), generator=generator)
        mixed = torch.tensor(unsafe_rows + safe_rows)[order].tolist()
        vector = activations.mean(mixed[n_unsafe:]) - activations.mean(mixed[:n_unsafe])
    return replace(
        scaled_to(replace(like, vector=vector.float()), like.norm),
        method="shuffled",
        category=f"{like.category}/shuffled{seed}",
        safe_projection=math.nan,
    )


def with_safe_projection(
    vector: SteeringVector,
    activations: ActivationSet,
    *,
    category: str | None = None,
    safe_side: SafeSide = "generic",
) -> SteeringVector:
    """Measure where the safe side lies along a vector that was combined, or is a control.

    ``fit_steering_vectors`` has measured it already.

    Args:
        vector: Its direction is used.
        activations: Activations at its site, with rows of the safe side.
        category: Whose safe rows; by default the vector's own category. Where it has none, those
            of all categories stand for them.
        safe_side: As in the fit.

    Returns:
        The vector with its ``safe_projection``.

    Raises:
        ValueError: If the activations are of another site or model, or hold no safe rows.
    """
    _check_same_place("a target", vector, activations)
    _, rows = sides_to_fit(activations.prompts, category or vector.category, safe_side)
    rows = rows or [i for i, prompt in enumerate(activations.prompts) if prompt.label == "safe"]
    if not rows:
        raise ValueError(
            f"no safe rows to measure a target of {vector.category!r} on; give activations that "
            "hold the safe side too."
        )
    return replace(vector, safe_projection=_projection(activations.rows(rows), vector.vector))


def scaled_to(vector: SteeringVector, norm: float) -> SteeringVector:
    """Give a vector's direction another norm, for comparisons at equal strength."""
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
        "format": FORMAT,
        "fitted_on": sorted(vector.fitted_on),
    }
    card["versions"] = {
        name: importlib.metadata.version(name)
        for name in ("workbench", "torch", "transformer-lens")
    }
    for name in ("site_norm", "safe_projection"):
        card[name] = None if math.isnan(card[name]) else card[name]
    write_tensors(path, {"vector": vector.vector}, card)


def load_vector(path: PathLike) -> SteeringVector:
    """Read a vector written by ``save_vector``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else; a file of another library is read by
            ``import_vectors``.
    """
    try:
        tensors, card = read_tensors(path)
    except ValueError as error:
        if file_format(path) == "safetensors" and "damaged" in str(error):
            raise
        raise ValueError(f"{path} is {_what_it_is(path)}") from error
    try:
        vector = SteeringVector(
            site=Site.parse(str(card["site"])),
            vector=tensors["vector"],
            site_norm=_or_nan(card["site_norm"]),
            safe_projection=_or_nan(card.get("safe_projection")),
            model=ModelInfo(**card["model"]),
            fitted_on=frozenset(card.get("fitted_on", ())),
            asked_as=str(card.get("asked_as", "")),
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
            f"{path} is damaged: its vector of shape {tuple(vector.vector.shape)} is not the one "
            "of its card; take another copy, or fit it again."
        )
    return vector


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _what_it_is(path: PathLike) -> str:
    """Say what a file is that ``save_vector`` did not write, and what to do with it."""
    kind = file_format(path)
    if kind == "pickle":
        return f"{PICKLED}; then read it with wb.import_vectors."
    if kind:
        return (
            f"not one of save_vector's files but {kind} of another origin; read it with "
            "wb.import_vectors(path, model, sign='unsafe_to_safe' or 'safe_to_unsafe')."
        )
    return (
        "no vector of save_vector and of no format that wb.import_vectors reads; "
        "is the file complete?"
    )


@dataclass(frozen=True)
class _FitOptions:
    """Hold how vectors are fitted, as ``fit_steering_vectors`` was told, and check it."""

    safe_side: SafeSide
    estimator: Estimator
    pruning: Pruning
    keep: float
    refusals: Collection[str] | None
    refusal_filter: RefusalFilter
    seed: int

    def __post_init__(self) -> None:
        if self.estimator not in get_args(Estimator):
            raise ValueError(
                f"unknown estimator {self.estimator!r}; "
                f"estimators: {', '.join(get_args(Estimator))}."
            )
        unpaired = self.estimator == "principal" and self.safe_side != "paired"
        if unpaired or (self.estimator != "mean_difference" and self.pruning != "none"):
            raise ValueError(
                f"estimator {self.estimator!r} does not go with safe_side={self.safe_side!r} and "
                f"pruning={self.pruning!r}: 'principal' needs safe_side='paired', and only "
                "'mean_difference' can be pruned."
            )


def _checked_categories(activations: ActivationSet, categories: Iterable[str] | None) -> list[str]:
    """List the categories to fit: those asked for, or all that have unsafe rows."""
    if activations.site.kind not in RESIDUAL_KINDS:
        raise ValueError(
            "a steering vector lives in the residual stream: fit it at "
            f"{', '.join(RESIDUAL_KINDS)}, not at {activations.site}."
        )
    known = categories_of(activations.prompts)
    chosen_categories = known if categories is None else list(categories)
    for category in chosen_categories:
        if category not in known:
            raise ValueError(
                f"no unsafe prompts of category {category!r}; categories: {', '.join(known)}."
                f"{did_you_mean(category, known)}"
            )
    if not chosen_categories:
        raise ValueError("no unsafe rows: a steering vector needs a risk category.")
    return chosen_categories


def _fit_category(
    activations: ActivationSet, category: str, options: _FitOptions, method: str, site_norm: float
) -> SteeringVector:
    unsafe_rows, safe_rows = _rows_to_fit(activations.prompts, category, options)
    fitted_rows = (*unsafe_rows, *safe_rows)
    safe = activations.rows(safe_rows)
    vector = _estimate(activations.rows(unsafe_rows), safe, options)
    return SteeringVector(
        site=activations.site,
        category=category,
        vector=vector,
        method=method,
        span=activations.span,
        kept=1.0 if options.pruning == "none" else options.keep,
        n_unsafe=len(unsafe_rows),
        n_safe=len(set(safe_rows)),
        site_norm=site_norm,
        model=activations.model,
        fitted_on=frozenset(
            text_key(activations.prompts[i].text, activations.prompts[i].history)
            for i in fitted_rows
        ),
        asked_as=activations.asked_as,
        safe_projection=_projection(safe, vector),
    )


def _rows_to_fit(
    prompts: Sequence[Prompt], category: str, options: _FitOptions
) -> tuple[list[int], list[int]]:
    """List the rows of both sides, after the refusal filter; neither side is empty."""
    unsafe_rows, safe_rows = sides_to_fit(prompts, category, options.safe_side)
    if options.refusal_filter != "none":
        unsafe_rows, safe_rows = _filter_refusals(prompts, unsafe_rows, safe_rows, options)
    if not unsafe_rows or not safe_rows:
        side = "unsafe" if not unsafe_rows else "safe"
        raise ValueError(
            f"no {side} rows for category {category!r} with safe_side={options.safe_side!r}, "
            f"refusal_filter={options.refusal_filter!r}."
        )
    return unsafe_rows, safe_rows


def _filter_refusals(
    prompts: Sequence[Prompt], unsafe_rows: list[int], safe_rows: list[int], options: _FitOptions
) -> tuple[list[int], list[int]]:
    """Keep or drop safe rows whose response is a refusal; pairs stay or go together."""
    how, refusals = options.refusal_filter, options.refusals
    if how not in ("keep", "drop"):
        raise ValueError(f"unknown refusal_filter {how!r}; allowed: none, keep, drop.")
    if refusals is None:
        raise ValueError(
            "a refusal filter needs refusals=ids of the safe rows whose response is a refusal."
        )
    places = [
        place
        for place, row in enumerate(safe_rows)
        if (prompts[row].id in refusals) == (how == "keep")
    ]
    if options.safe_side == "paired":
        unsafe_rows = [unsafe_rows[place] for place in places]
    return unsafe_rows, [safe_rows[place] for place in places]


def _estimate(
    unsafe: Float[Tensor, "unsafe d"], safe: Float[Tensor, "safe d"], options: _FitOptions
) -> Float[Tensor, " d"]:
    if options.estimator == "mean_difference":
        return pruned_mean_difference(
            unsafe,
            safe,
            keep=options.keep,
            which=options.pruning,
            paired=options.safe_side == "paired",
            seed=options.seed,
        )
    direction = (
        probe_direction(unsafe, safe)
        if options.estimator == "probe"
        else principal_direction(unsafe, safe)
    )
    return direction * mean_difference(unsafe, safe).norm()


def _projection(rows: Float[Tensor, "row d"], vector: Float[Tensor, " d"]) -> float:
    """Average the projections of rows on a vector's unit direction; nan for a zero vector."""
    along = rows.double().mean(dim=0) @ vector.double()
    return float(along / vector.double().norm())


def _check_same_place(what: str, vector: SteeringVector, activations: ActivationSet) -> None:
    """Raise where activations are not of a vector's site and model."""
    if activations.site != vector.site or activations.model.fingerprint != vector.model.fingerprint:
        raise ValueError(
            f"{what} at {vector.site} of {vector.model.name!r} needs activations from there, "
            f"got {activations!r}."
        )


def _site_norm(activations: ActivationSet, residual: ActivationSet | None) -> float:
    """Measure the mean L2 norm of the residual stream; nan where it is not given."""
    if residual is None and not activations.site.kind.startswith("resid"):
        return math.nan
    stream = activations if residual is None else residual
    if not stream.site.kind.startswith("resid") or stream.site.layer != activations.site.layer:
        raise ValueError(
            f"residual must be of the residual stream of layer {activations.site.layer}, "
            f"got {stream.site}."
        )
    if stream.model.fingerprint != activations.model.fingerprint:
        raise ValueError(
            f"residual must be of the same model {activations.model.name!r}, "
            f"got {stream.model.name!r}."
        )
    return stream.mean_norm()
