"""Fit, read and keep gates that look at several layers, or at all, before the model answers.

A gate that steers while it reads must read below the steered layer. This one reads the prompt in an
unsteered pass of its own and decides once, so it may read anywhere. ``open_conditions`` says for
each prompt what the gate lets through, as a condition of ``generate`` and ``sweep``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, read_tensors, write_tensors
from workbench.models.activations import cache_activations
from workbench.models.errors import CannotBeDone
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import Site
from workbench.models.templates import Keywords, asked_as
from workbench.prompts.attacks import question_id
from workbench.prompts.contrasts import safe_rows, unsafe_rows
from workbench.prompts.forms import as_prompts
from workbench.stats.selectivity import Threshold, auroc, auroc_interval
from workbench.steering.edits import AddVector
from workbench.steering.gates import (
    check_folds,
    fit_log_odds,
    highest_of,
    scale_above,
    thresholds_from_json,
    thresholds_on,
    thresholds_to_json,
    why_closed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt
    from workbench.steering.interventions import Intervention


Way = Literal["mean_cosine", "weighted_cosines", "joint_probe"]
"""How layers are put together to the score of a category.

- "mean_cosine": the mean over the sites of the cosine that ``fit_layer_gate`` explains.
- "weighted_cosines": a logistic regression on the cosines of all sites and categories. It is fitted
  on cosines with directions of the other parts of the fold, as a prompt lies too near to a
  direction that it was part of.
- "joint_probe": a logistic regression on the activations of all sites side by side, standardised,
  with a strong penalty.
"""


PENALTIES: dict[str, tuple[float, ...]] = {
    "mean_cosine": (0.0,),
    "weighted_cosines": (1.0, 10.0),
    "joint_probe": (1e3, 1e4),
}
"""Penalties that ``choose_layer_gate`` tries, the usual one first; the mean has none."""


FORMAT = "workbench layer gate 1"
N_PARTS = 5
"""Parts of the fit fold for scores of prompts that a direction was not fitted on."""


@dataclass(frozen=True, eq=False)
class LayerGate:
    """Score risk categories from several layers; made by ``fit_layer_gate``.

    At each site a prompt's activation less the benign mean is compared with a direction of each
    category, as a cosine or as a projection, with its sign. The score of a category is a weighted
    sum of what was found at all sites, and a bias.

    Attributes:
        sites: Where it reads, in an unsteered pass over the prompt.
        span: Tokens of the prompt whose mean it reads: "content" or "last".
        categories: Risk categories, one score each.
        way: How it was fitted.
        center: Benign mean at each site: of the safe and neutral prompts of the fit fold.
        directions: One for each site and category, of unit norm where cosines are read.
        combine: Weight of what was found at each site for each category, in each score.
        bias: One number per category.
        thresholds: As in ``Gate``: name of a set that must not open it to its threshold.
        scale: Score above the threshold at which a soft gate is fully open.
        model: What it was fitted on.
        form: "hard" (open or closed) or "soft" (opens in proportion up to ``scale``).
        asked_as: System prompt and template keywords that it was fitted under.
    """

    sites: tuple[Site, ...]
    span: Literal["content", "last"]
    categories: tuple[str, ...]
    way: Way
    center: Float[Tensor, "site d"]
    directions: Float[Tensor, "site category d"]
    combine: Float[Tensor, "category site category"]
    bias: Float[Tensor, " category"]
    thresholds: Mapping[str, Threshold]
    scale: float
    model: ModelInfo
    form: Literal["hard", "soft"] = "hard"
    asked_as: str = ""

    def __post_init__(self) -> None:
        _check_way(self.way)
        if self.form not in ("hard", "soft"):
            raise ValueError(
                f"a gate over layers decides once: its form is hard or soft, got {self.form!r}."
            )

    def __repr__(self) -> str:
        return (
            f"LayerGate({len(self.categories)} categories at {len(self.sites)} sites, "
            f"{self.way}, {self.form}, opens above {self.threshold:.3g})"
        )

    @property
    def threshold(self) -> float:
        """Score above which it opens."""
        return highest_of(self.thresholds)

    @property
    def why_closed(self) -> str:
        """Say why it can never open: too few prompts for a rate; empty where it can."""
        return why_closed(self.thresholds)

    def scores(self, acts: Mapping[Site, ActivationSet]) -> Float[Tensor, "prompt category"]:
        """Compute each prompt's score of each category, in float32.

        Args:
            acts: Pooled activations at its sites, from ``cache_activations``; others may be there.

        Raises:
            ValueError: If a site is missing, or was read of other tokens or of another model.
        """
        self._check(acts)
        values = [acts[site].values for site in self.sites]
        return _scores(_read(values, self.center, self.directions, self.way), self)

    def opening(self, scores: Float[Tensor, "prompt category"]) -> Float[Tensor, "prompt category"]:
        """Tell how far it opens for each category, from 0 to 1; of several only for the highest.

        Args:
            scores: From ``scores``.
        """
        is_highest = scores == scores.amax(dim=-1, keepdim=True)
        above = torch.where(is_highest, scores - self.threshold, -torch.inf)
        if self.form == "soft":
            return (above / self.scale).clamp(0, 1)
        return (above > 0).to(scores)

    def _check(self, acts: Mapping[Site, ActivationSet]) -> None:
        missing = [site for site in self.sites if site not in acts]
        if missing:
            raise ValueError(
                f"the gate reads {len(self.sites)} sites, and {missing[0]} is not among those "
                "given; cache the activations of gate.sites."
            )
        for site in self.sites:
            one = acts[site]
            if (one.span, one.model.fingerprint) != (self.span, self.model.fingerprint):
                raise ValueError(
                    f"the gate reads span {self.span!r} of {self.model.name!r}; got {one!r}: "
                    "cache those activations instead."
                )


class Chosen(NamedTuple):
    """The gate that was chosen, and a table of all that were tried (way, penalty, auroc, ...)."""

    gate: LayerGate
    tried: pd.DataFrame


def fit_layer_gate(
    fit: Mapping[Site, ActivationSet],
    tune: Mapping[Site, ActivationSet],
    *,
    way: Way = "mean_cosine",
    penalty: float | None = None,
    neutral_rate: float = 0.02,
    hard_rate: float = 0.10,
    form: Literal["hard", "soft"] = "hard",
) -> LayerGate:
    """Fit a gate over all given sites on one fold and set its threshold on another.

    At a site, the direction of a category is the mean activation of its unsafe prompts minus the
    benign mean, that of all safe and neutral prompts of the fit fold. What is compared with it is a
    prompt's activation minus the benign mean. The sign is kept: a prompt on the other side scores
    below zero.

    Both folds should hold wrapped prompts (``wrap_in_turn``): risky ones, and as many twins and
    look-alikes, which must not open the gate; else it learns the wrapping.

    Args:
        fit: Pooled activations of unsafe, safe and neutral prompts at each site.
        tune: The same sites and span on prompts of the tune fold.
        way: How layers are put together, see ``Way``.
        penalty: Weight of the squared norm of what is learned, for standardised values; None is the
            first of ``PENALTIES``.
        neutral_rate: Largest share of neutral prompts that may open the gate.
        hard_rate: Largest share of twins and look-alikes that may open it.
        form: See ``LayerGate``.

    Raises:
        ValueError: If sets do not fit each other or share prompts.
        CannotBeDone: If a fold lacks a label that the gate needs.
    """
    _check_way(way)
    sites, prompts = _check_sites(fit, tune), next(iter(fit.values())).prompts
    values = [fit[site].values for site in sites]
    penalty = PENALTIES[way][0] if penalty is None else penalty
    categories, center, directions, combine, bias = _fitted(values, prompts, way, penalty)
    first = fit[sites[0]]
    gate = LayerGate(
        sites=sites,
        span=cast('Literal["content", "last"]', first.span),
        categories=categories,
        way=way,
        center=center.float(),
        directions=directions.float().contiguous(),
        combine=combine.float().contiguous(),
        bias=bias.float(),
        thresholds={"neutral": Threshold(math.inf, neutral_rate, 0.0, 0.0, 0)},
        scale=1.0,
        model=first.model,
        form=form,
        asked_as=first.asked_as,
    )
    return _calibrated(gate, tune, neutral_rate, hard_rate)


def choose_layer_gate(
    fit: Mapping[Site, ActivationSet],
    tune: Mapping[Site, ActivationSet],
    *,
    penalties: Mapping[str, Sequence[float]] = PENALTIES,
    neutral_rate: float = 0.02,
    hard_rate: float = 0.10,
    form: Literal["hard", "soft"] = "hard",
) -> Chosen:
    """Fit gates in several ways and keep the one that ranks the tune fold best.

    Best is the largest AUROC of the highest score, of risky prompts against twins and look-alikes.
    The threshold is then set on the same fold, so that its promise is a little too good: the rates
    that count are those on a third fold.

    Args:
        fit: As for ``fit_layer_gate``, like the arguments that are not named here.
        tune: As for ``fit_layer_gate``.
        penalties: Ways, each with the penalties that are tried.
        neutral_rate: As for ``fit_layer_gate``.
        hard_rate: As for ``fit_layer_gate``.
        form: See ``LayerGate``.

    Returns:
        The gate, and a table with columns way, penalty, auroc, low, high, n.

    Raises:
        ValueError: As for ``fit_layer_gate``.
        CannotBeDone: As for it, or if the tune fold lacks risky prompts, or safe ones.
    """
    import pandas as pd

    prompts = next(iter(tune.values())).prompts if tune else ()
    risky, safe = unsafe_rows(prompts), safe_rows(prompts)
    if not risky or not safe:
        raise CannotBeDone(
            f"choosing a gate needs risky prompts and safe ones in the tune fold, got {len(risky)} "
            f"and {len(safe)}."
        )
    rates: dict[str, Any] = {"neutral_rate": neutral_rate, "hard_rate": hard_rate, "form": form}
    best, rows = None, []
    for way, values in penalties.items():
        for penalty in values:
            gate = fit_layer_gate(fit, tune, way=cast("Way", way), penalty=penalty, **rates)
            highest = gate.scores(tune).amax(dim=1).double().numpy()[[*risky, *safe]]
            area = float(auroc(highest, np.arange(len(highest)) < len(risky)))
            low, high = auroc_interval(area, len(risky), len(safe))
            row = {"way": way, "penalty": penalty, "auroc": area, "low": low, "high": high}
            rows.append(row | {"n": len(highest)})
            if best is None or area > best[0]:
                best = (area, gate)
    if best is None:
        raise ValueError("no way of fitting a gate is given; name at least one with a penalty.")
    return Chosen(best[1], pd.DataFrame(rows))


def open_conditions(
    model: HookedModel,
    gate: LayerGate,
    prompts: PromptsLike,
    steering: Mapping[str, Sequence[Intervention]],
    *,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
) -> dict[str, list[Intervention]]:
    """Read the prompts, and say for each what the gate lets through: a condition for ``sweep``.

    The prompts run once, unsteered, up to the last site that the gate reads. A prompt for which it
    stays closed gets no intervention: its answer is that of the unsteered model, bit for bit.

    Args:
        model: The model that the gate was fitted on.
        gate: A gate over layers.
        prompts: What will be answered, in any form that ``as_prompts`` reads.
        steering: Risk category to its interventions. A soft gate weakens them in proportion, which
            is possible for added vectors.
        system_prompt: Words for the system turn, as in the answers.
        template_keywords: What else the chat template reads, as in the answers.

    Returns:
        Prompt id to the interventions of the category that the gate opens for; none where it is
        closed, or where ``steering`` has nothing for that category.

    Raises:
        ValueError: If the gate belongs to another model, does not know a category of ``steering``,
            or is soft and an edit has no strength.
    """
    prompts = as_prompts(prompts)
    _check_use(model, gate, steering, asked_as(system_prompt, template_keywords))
    keywords: dict[str, Any] = {
        "system_prompt": system_prompt,
        "template_keywords": template_keywords,
    }
    acts = cache_activations(model, prompts, gate.sites, span=gate.span, **keywords)
    openings = gate.opening(gate.scores(acts))
    condition = {}
    for prompt, opening in zip(prompts, openings, strict=True):
        share, category = float(opening.max()), gate.categories[int(opening.argmax())]
        let_through = steering.get(category, ()) if share > 0 else ()
        condition[prompt.id] = [_weakened(one, share) for one in let_through]
    return condition


def save_layer_gate(path: PathLike, gate: LayerGate) -> None:
    """Write a gate over layers as safetensors with a JSON card, atomically."""
    card = {
        "format": FORMAT,
        "sites": [str(site) for site in gate.sites],
        "categories": list(gate.categories),
        "thresholds": thresholds_to_json(gate.thresholds),
        "model": gate.model.to_dict(),
        **{name: getattr(gate, name) for name in ("span", "way", "scale", "form", "asked_as")},
    }
    tensors = {name: getattr(gate, name) for name in ("center", "directions", "combine", "bias")}
    write_tensors(path, tensors, card)


def load_layer_gate(path: PathLike) -> LayerGate:
    """Read a gate written by ``save_layer_gate``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    tensors, card = read_tensors(path)
    if card.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no gate over layers (its format is {card.get('format')!r}); make one "
            "with fit_layer_gate."
        )
    try:
        return LayerGate(
            sites=tuple(map(Site.parse, card["sites"])),
            categories=tuple(card["categories"]),
            thresholds=thresholds_from_json(card["thresholds"]),
            model=ModelInfo(**card["model"]),
            center=tensors["center"],
            directions=tensors["directions"],
            combine=tensors["combine"],
            bias=tensors["bias"],
            **{name: card[name] for name in ("span", "way", "scale", "form", "asked_as")},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no whole gate ({error}: missing or wrong); make it again with "
            "fit_layer_gate."
        ) from error


def _check_way(way: str) -> None:
    if way not in get_args(Way):
        raise ValueError(
            f"unknown way {way!r} to put layers together; ways: {', '.join(get_args(Way))}."
            f"{did_you_mean(way, get_args(Way))}"
        )


def _check_use(model: HookedModel, gate: LayerGate, categories: Iterable[str], asked: str) -> None:
    """Raise where a gate knows not every category or not the model; warn of other words."""
    for category in categories:
        if category not in gate.categories:
            raise ValueError(
                f"the gate has no category {category!r}; categories: "
                f"{', '.join(gate.categories)}.{did_you_mean(category, gate.categories)}"
            )
    info = model_info(model)
    if gate.model.fingerprint != info.fingerprint:
        raise ValueError(
            f"the gate was fitted on {gate.model.name!r}, not on {info.name!r}; fit it again."
        )
    if gate.asked_as != asked:
        warnings.warn(
            f"the gate was fitted under {gate.asked_as or 'no system prompt'}, but reads under "
            f"{asked or 'no system prompt'}: its threshold promises nothing there; fit it again, "
            "or ask as it was fitted.",
            stacklevel=3,
        )


def _check_sites(
    fit: Mapping[Site, ActivationSet], tune: Mapping[Site, ActivationSet]
) -> tuple[Site, ...]:
    """Check that both folds have the same sites, of one width, and give the sites."""
    if not fit or fit.keys() != tune.keys():
        raise ValueError(
            f"both folds need the same sites, at least one, got {len(fit)} and {len(tune)}; cache "
            "both with one list of sites."
        )
    for site in fit:
        check_folds(fit[site], tune[site])
    if len({acts.values.shape[1] for acts in fit.values()}) > 1:
        raise ValueError("a gate reads sites of one width; take sites of one kind.")
    return tuple(fit)


def _directions(
    values: Sequence[Float[Tensor, "prompt d"]], prompts: Sequence[Prompt]
) -> tuple[tuple[str, ...], Float[Tensor, "site d"], Float[Tensor, "site category d"]]:
    """Compute the benign mean and each category's unit direction at every site, in float64."""
    categories = tuple(sorted({p.category for p in prompts if p.label == "unsafe"}))
    benign = [i for i, p in enumerate(prompts) if p.label != "unsafe"]
    if not categories or not benign:
        raise CannotBeDone("a gate needs unsafe prompts and safe or neutral ones in the fit fold.")
    rows = [
        [i for i, p in enumerate(prompts) if p.label == "unsafe" and p.category == category]
        for category in categories
    ]
    centers, directions = [], []
    for at_site in values:
        center = at_site[benign].double().mean(dim=0)
        means = torch.stack([at_site[own].double().mean(dim=0) for own in rows])
        centers.append(center)
        directions.append(torch.nn.functional.normalize(means - center, dim=1))
    return categories, torch.stack(centers), torch.stack(directions)


def _fitted(
    values: Sequence[Float[Tensor, "prompt d"]], prompts: Sequence[Prompt], way: Way, penalty: float
) -> tuple[
    tuple[str, ...],
    Float[Tensor, "site d"],
    Float[Tensor, "site category d"],
    Float[Tensor, "category site category"],
    Float[Tensor, " category"],
]:
    """Fit categories, center, directions, combine and bias of a ``LayerGate``."""
    categories, center, directions = _directions(values, prompts)
    n_sites, n_categories = len(values), len(categories)
    own_at_every_site = torch.eye(n_categories)[:, None].repeat(1, n_sites, 1)
    if way == "mean_cosine":
        no_bias = torch.zeros(n_categories)
        return categories, center, directions, own_at_every_site / n_sites, no_bias
    if way == "weighted_cosines":
        cosines = _held_out_cosines(values, prompts, categories)
        _, weights, bias = fit_log_odds(cosines.flatten(1), prompts, penalty)
        return categories, center, directions, weights.unflatten(1, (n_sites, n_categories)), bias
    side_by_side = torch.cat(list(values), dim=1)
    _, weights, bias = fit_log_odds(side_by_side, prompts, penalty, in_row_space=True)
    directions = weights.unflatten(1, (n_sites, -1)).transpose(0, 1)
    bias = bias + torch.einsum("scd,sd->c", directions, center)
    return categories, center, directions, own_at_every_site, bias


def _read(
    values: Sequence[Float[Tensor, "prompt d"]],
    center: Float[Tensor, "site d"],
    directions: Float[Tensor, "site category d"],
    way: Way,
) -> Float[Tensor, "prompt site category"]:
    """Compare centred activations with directions at each site: cosines, or projections."""
    found = []
    for at_site, site_center, site_directions in zip(values, center, directions, strict=True):
        centered = at_site.to(site_center) - site_center
        if way != "joint_probe":
            centered = torch.nn.functional.normalize(centered, dim=1)
        found.append(centered @ site_directions.T)
    return torch.stack(found, dim=1)


def _scores(
    found: Float[Tensor, "prompt site category"], gate: LayerGate
) -> Float[Tensor, "prompt category"]:
    return torch.einsum("psk,csk->pc", found, gate.combine) + gate.bias


def _held_out_cosines(
    values: Sequence[Float[Tensor, "prompt d"]],
    prompts: Sequence[Prompt],
    categories: tuple[str, ...],
) -> Float[Tensor, "prompt site category"]:
    """Compute cosines with directions that were fitted without the prompt's own question.

    A twin, and the same question wrapped, are in the part of the question.
    """
    groups = list(dict.fromkeys(p.pair_id or question_id(p) for p in prompts))
    part_of = {group: i % N_PARTS for i, group in enumerate(groups)}
    parts = torch.tensor([part_of[p.pair_id or question_id(p)] for p in prompts])
    cosines = torch.empty(len(prompts), len(values), len(categories), dtype=torch.float64)
    for part in range(min(N_PARTS, len(groups))):
        inside = parts == part
        others = [p for p, is_inside in zip(prompts, inside.tolist(), strict=True) if not is_inside]
        outside = [at_site[~inside] for at_site in values]
        known, center, directions = _directions(outside, others)
        if known != categories:
            missing = min(set(categories) - set(known))
            raise CannotBeDone(
                f"category {missing!r} has too few prompts for cosines with directions of other "
                "prompts; fit the gate with way='mean_cosine'."
            )
        cosines[inside] = _read(
            [at_site[inside] for at_site in values], center, directions, "weighted_cosines"
        )
    return cosines


def _calibrated(
    gate: LayerGate, tune: Mapping[Site, ActivationSet], neutral_rate: float, hard_rate: float
) -> LayerGate:
    """Set the thresholds and the scale of a gate on the tune fold."""
    prompts = tune[gate.sites[0]].prompts
    highest = gate.scores(tune).amax(dim=1).double().numpy()
    thresholds = thresholds_on(prompts, highest, neutral_rate, hard_rate)
    scale = scale_above(thresholds, highest[unsafe_rows(prompts)])
    return replace(gate, thresholds=thresholds, scale=scale)


def _weakened(intervention: Intervention, share: float) -> Intervention:
    """Give an intervention the share of its strength that a soft gate lets through."""
    if share == 1:
        return intervention
    if not isinstance(intervention.edit, AddVector):
        raise ValueError(
            f"a soft gate weakens added vectors only, and the edit at {intervention.site} is "
            f"{type(intervention.edit).__name__}; take a hard gate."
        )
    edit = replace(intervention.edit, multiplier=share * intervention.edit.multiplier)
    return replace(intervention, edit=edit)
