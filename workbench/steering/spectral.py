"""Spectral editing of activations: a linear map in the place of a vector.

Some directions of the neutral activations covary with safe answers to the same questions, others
with unsafe ones. The edit keeps the first and removes the second, and gives every token the norm
that it had. What is fitted is a ``SpectralEdit``, which is kept in files as vectors are;
``edit_spectrum`` makes an intervention of it.

Source: SEA (Qiu et al. 2024, arXiv:2405.09719), its linear form.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from workbench.files.store import PathLike, read_tensors, write_tensors
from workbench.models.load import ModelInfo
from workbench.models.sites import RESIDUAL_KINDS, Site
from workbench.prompts.contrasts import paired_rows
from workbench.prompts.prompt import categories_of, text_key
from workbench.steering.edits import at_least_float32
from workbench.steering.estimators import spectral_directions
from workbench.steering.interventions import Decay, Intervention, Positions, add_vector
from workbench.steering.vectors import SteeringVector, load_vector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet


FORMAT = "workbench spectral edit 1"
SHARE = 0.9
"""Share of the covariance that the directions of either side explain, unless told otherwise."""


@dataclass(frozen=True, eq=False)
class SpectralEdit:
    """Hold what was fitted at one site for one category.

    Attributes:
        site: Where it was measured and where it edits.
        category: Risk category, or what a control was made from.
        mean: Mean of the neutral activations, float32, residual-stream units: what the edit leaves
            where it is.
        keep: Orthonormal directions that covary with safe answers, float32.
        remove: Orthonormal directions that covary with unsafe answers, float32.
        share: Share of the covariance that either set of directions explains.
        method: "sea", or a control ("random", "shuffled").
        span: Which tokens of the answers were pooled.
        n_pairs: Pairs of answers it was fitted on.
        model: What it was measured on.
        fitted_on: ``prompts.text_key`` of the questions it was fitted on.
        asked_as: System prompt and template keywords that it was measured under, see
            ``ActivationSet``.
    """

    site: Site
    category: str
    mean: Float[Tensor, " d_model"]
    keep: Float[Tensor, "d_model kept"]
    remove: Float[Tensor, "d_model removed"]
    share: float
    method: str
    span: str
    n_pairs: int
    model: ModelInfo
    fitted_on: frozenset[str] = frozenset()
    asked_as: str = ""

    def __repr__(self) -> str:
        return (
            f"SpectralEdit({self.category!r} at {self.site}, {self.method}, d={len(self.mean)}, "
            f"keeps {self.keep.shape[1]} and removes {self.remove.shape[1]} directions, "
            f"n={self.n_pairs}, model={self.model.name!r})"
        )

    def multiplier_for(self, rho: float) -> float:
        """Return ``rho``: the strength of an edit is the share of the way that it goes."""
        return rho


Fitted = SteeringVector | SpectralEdit
"""What a construction makes for a category at a site."""


@dataclass(frozen=True, eq=False)
class EditSpectrum:
    """Go a share of the way to the edited activation, and give it the norm that it had.

    Along a kept direction the distance from the mean is doubled, along a removed one it is taken
    away, along one that is both, or neither, it stays; then the norm is restored.
    """

    mean: Float[Tensor, " d"]
    keep: Float[Tensor, "d kept"]
    remove: Float[Tensor, "d removed"]
    rho: float

    def __call__(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Edit the activation."""
        wide = at_least_float32(activation)
        keep, remove = self.keep.to(wide), self.remove.to(wide)
        from_mean = wide - self.mean.to(wide)
        change = (from_mean @ keep) @ keep.T - (from_mean @ remove) @ remove.T
        moved = wide + self.rho * change
        norm = moved.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
        return (moved * (wide.norm(dim=-1, keepdim=True) / norm)).to(activation)

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return len(self.mean)


def fit_spectral_edits(
    answers: ActivationSet,
    questions: ActivationSet,
    *,
    share: float = SHARE,
    pooled: bool = False,
    method: str = "sea",
) -> dict[str, SpectralEdit]:
    """Fit a spectral edit per category, from pairs of a safe and an unsafe answer to a question.

    Covariances are centred, and with them what is edited: the mean neutral activation stays as it
    is. A question's neutral activation is that of the question alone, without an answer.

    Args:
        answers: Pooled activations of the answers (``openings.answer_prompts``), at one site.
        questions: Those of the questions, at the same site: the neutral ones.
        share: Share of the summed singular values that the directions of either side explain,
            above 0 and at most 1. The source chooses it per task. At 1 both sides are everything
            there is, and nothing is edited.
        pooled: Fit one edit on the pairs of all categories, and give it to each.
        method: Name of the construction, for the card.

    Raises:
        ValueError: If the two sets are of different sites or models, the site is not in the
            residual stream, a question is missing, or a category has fewer than two pairs.
    """
    _check_sets(answers, questions)
    row_of = {text_key(p.text, p.history): i for i, p in enumerate(questions.prompts)}
    pairs = {
        category: list(zip(*paired_rows(answers.prompts, category), strict=True))
        for category in categories_of(answers.prompts)
    }
    if pooled:
        everything = sorted({pair for of_category in pairs.values() for pair in of_category})
        pairs = dict.fromkeys(pairs, everything)
    edits: dict[str, SpectralEdit] = {}
    for category, rows in pairs.items():
        if pooled and edits:
            edits[category] = replace(next(iter(edits.values())), category=category)
            continue
        edits[category] = _fit(answers, questions, rows, row_of, category, share, method)
    return edits


def _check_sets(answers: ActivationSet, questions: ActivationSet) -> None:
    if answers.site.kind not in RESIDUAL_KINDS:
        raise ValueError(
            "a spectral edit lives in the residual stream: fit it at "
            f"{', '.join(RESIDUAL_KINDS)}, not at {answers.site}."
        )
    if (answers.site, answers.model.fingerprint) != (questions.site, questions.model.fingerprint):
        raise ValueError(
            f"answers and questions must be of one site and model, got {answers!r} and "
            f"{questions!r}."
        )


def _fit(
    answers: ActivationSet,
    questions: ActivationSet,
    pairs: Sequence[tuple[int, int]],
    row_of: dict[str, int],
    category: str,
    share: float,
    method: str,
) -> SpectralEdit:
    """Fit one edit on pairs of an unsafe and a safe row of ``answers``."""
    if len(pairs) < 2:
        raise ValueError(
            f"a spectral edit needs two pairs of answers or more, got {len(pairs)} for category "
            f"{category!r}."
        )
    keys = [text_key(answers.prompts[i].text, answers.prompts[i].history) for i, _ in pairs]
    missing = [key for key in keys if key not in row_of]
    if missing:
        place = keys.index(missing[0])
        raise ValueError(
            f"no activations of the question of {answers.prompts[pairs[place][0]].id!r} at "
            f"{questions.site}; cache it first."
        )
    neutral = questions.rows([row_of[key] for key in keys])
    safe = answers.rows([j for _, j in pairs])
    unsafe = answers.rows([i for i, _ in pairs])
    return SpectralEdit(
        site=answers.site,
        category=category,
        mean=neutral.double().mean(dim=0).float(),
        keep=spectral_directions(neutral, safe, share=share),
        remove=spectral_directions(neutral, unsafe, share=share),
        share=share,
        method=method,
        span=answers.span,
        n_pairs=len(pairs),
        model=answers.model,
        fitted_on=frozenset(keys),
        asked_as=answers.asked_as,
    )


def random_edit(like: SpectralEdit, *, seed: int) -> SpectralEdit:
    """Make a control: the same edit along random directions.

    Kept and removed directions are turned together, so that ranks, and what both share, stay.
    """
    generator = torch.Generator().manual_seed(seed)
    both = torch.cat([like.keep, like.remove], dim=1).double()
    basis, coefficients = torch.linalg.qr(both)
    noise = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    turned = (torch.linalg.qr(noise)[0] @ coefficients).float()
    n_kept = like.keep.shape[1]
    return replace(
        like,
        keep=turned[:, :n_kept],
        remove=turned[:, n_kept:],
        method="random",
        category=f"{like.category}/random{seed}",
        fitted_on=frozenset(),
    )


def shuffled_edits(
    answers: ActivationSet,
    questions: ActivationSet,
    *,
    seed: int,
    share: float = SHARE,
    pooled: bool = False,
) -> dict[str, SpectralEdit]:
    """Make a control: fit again after safe and unsafe changed places in a random half of the pairs.

    Args:
        answers: What the edits were fitted on.
        questions: Those of the questions.
        seed: Seed of the shuffle.
        share: As in the fit.
        pooled: As in the fit.
    """
    generator = torch.Generator().manual_seed(seed)
    safe_of = {p.pair_id: i for i, p in enumerate(answers.prompts) if p.label == "safe"}
    order = list(range(len(answers)))
    for i, prompt in enumerate(answers.prompts):
        j = safe_of.get(prompt.pair_id)
        swapped = bool(torch.randint(0, 2, (1,), generator=generator))
        if prompt.label == "unsafe" and j is not None and swapped:
            order[i], order[j] = j, i
    mixed = replace(answers, values=answers.rows(order))
    edits = fit_spectral_edits(mixed, questions, share=share, pooled=pooled, method="shuffled")
    return {c: replace(edit, category=f"{c}/shuffled{seed}") for c, edit in edits.items()}


def edit_spectrum(
    edit: SpectralEdit,
    rho: float = 1.0,
    *,
    positions: Positions = "all",
    until: int | None = None,
) -> Intervention:
    """Steer by a spectral edit at its site.

    Args:
        edit: What was fitted.
        rho: Share of the way from the activation to the edited one, above 0 and at most 1.
        positions: Which tokens: "all", those of the "prompt", or the "generated" ones.
        until: Generated tokens after which it ends; None never ends.

    Raises:
        ValueError: If ``rho`` is no such share.
    """
    if not 0 < rho <= 1:
        raise ValueError(
            f"a spectral edit goes a share of its way: rho must be above 0 and at most 1, got "
            f"{rho}."
        )
    return Intervention(
        edit.site,
        EditSpectrum(edit.mean, edit.keep, edit.remove, float(rho)),
        positions,
        label=f"{rho:.3g} of the spectral edit {edit.category}",
        model=edit.model,
        until=until,
        fitted_on=edit.fitted_on,
    )


def steer_by(
    fitted: Fitted,
    multiplier: float | None = None,
    *,
    rho: float | None = None,
    positions: Positions = "all",
    until: int | None = None,
    decay: Decay = "none",
    keep_norm: bool = False,
) -> Intervention:
    """Steer by a vector or by an edit, whichever was fitted.

    Args:
        fitted: A vector is added (``add_vector``), an edit is made (``edit_spectrum``).
        multiplier: How much of a vector, or the share of an edit's way.
        rho: Relative strength of a vector, or the share of an edit's way.
        positions: Which tokens.
        until: Generated tokens after which it ends; None never ends.
        decay: How a vector's strength falls; none for an edit.
        keep_norm: Whether a vector leaves norms as they are; an edit always does.

    Raises:
        ValueError: If not exactly one of multiplier and rho is given, one is out of range, or an
            edit is to decay.
    """
    extent: dict[str, Any] = {"positions": positions, "until": until}
    if not isinstance(fitted, SpectralEdit):
        way: dict[str, Any] = {"decay": decay, "keep_norm": keep_norm}
        return add_vector(fitted, multiplier, rho=rho, **extent, **way)
    if decay != "none":
        raise ValueError(f"a spectral edit does not decay, got decay={decay!r}; leave it out.")
    shares = [value for value in (multiplier, rho) if value is not None]
    if len(shares) != 1:
        raise ValueError("give either multiplier or rho, for an edit the share of its way.")
    return edit_spectrum(fitted, shares[0], **extent)


def save_spectral_edit(path: PathLike, edit: SpectralEdit) -> None:
    """Write an edit as safetensors with its card, atomically."""
    import importlib.metadata

    tensors = {"mean": edit.mean, "keep": edit.keep, "remove": edit.remove}
    nothing = torch.empty(0)
    without_tensors = replace(edit, mean=nothing, keep=nothing, remove=nothing)
    card = {name: v for name, v in asdict(without_tensors).items() if name not in tensors}
    card |= {
        "site": str(edit.site),
        "format": FORMAT,
        "fitted_on": sorted(edit.fitted_on),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("workbench", "torch", "transformer-lens")
        },
    }
    write_tensors(path, tensors, card)


def load_spectral_edit(path: PathLike) -> SpectralEdit:
    """Read an edit written by ``save_spectral_edit``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    tensors, card = read_tensors(path)
    if card.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds {card.get('format')!r} and no spectral edit; load_vector reads a vector."
        )
    try:
        edit = SpectralEdit(
            site=Site.parse(str(card["site"])),
            model=ModelInfo(**card["model"]),
            fitted_on=frozenset(card["fitted_on"]),
            mean=tensors["mean"],
            keep=tensors["keep"],
            remove=tensors["remove"],
            **{
                name: card[name]
                for name in ("category", "share", "method", "span", "n_pairs", "asked_as")
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no spectral edit ({error}: missing or wrong).") from error
    width = edit.model.d_model
    if {len(tensor) for tensor in tensors.values()} != {width}:
        raise ValueError(
            f"{path} is damaged: its tensors are not {width} wide, as the model of its card; take "
            "another copy, or fit it again."
        )
    return edit


def load_fitted(path: PathLike) -> Fitted:
    """Read a vector or an edit, whichever a file of a run holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    try:
        _, card = read_tensors(path)
    except ValueError:
        return load_vector(path)  # says what the file is
    return load_spectral_edit(path) if card.get("format") == FORMAT else load_vector(path)
