"""Fit, read and keep steering gates, which let steering through only on risky prompts.

A gate reads an activation below the layer that is steered, row by row, and scores each risk
category; above its threshold it opens. It is fitted against style-matched safe prompts as well as
neutral ones, so that it sees risk and not the style of a question, and its threshold is set on
prompts it was not fitted on. In this folder "gate" always means a steering gate, never the gate of
a gated MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, read_tensors, tensor_digest, write_tensors
from workbench.models.errors import CannotBeDone
from workbench.models.load import ModelInfo
from workbench.models.sites import Site
from workbench.prompts.contrasts import rows_that_must_not_open, unsafe_rows
from workbench.stats.linear_probe import fit_linear_probe
from workbench.stats.selectivity import Threshold, conformal_threshold

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.prompts.prompt import Prompt


Form = Literal["hard", "soft", "stepwise"]
"""How a gate opens above its threshold: see ``Gate.form``."""


Several = Literal["argmax", "whitened"]
"""What happens where several categories pass: see ``Gate.several``."""


FORMAT = "workbench gate 1"


@dataclass(frozen=True, eq=False)
class Gate:
    """Score risk categories, and open above a threshold; made by ``fit_gate``.

    Attributes:
        site: Where it reads; below every site that it lets be steered.
        span: Tokens of the prompt whose mean it reads: "content" or "last".
        categories: Risk categories, one score each.
        weights: Score of a category = its row @ activation + its bias: log-odds of the category
            against safe prompts, so above 0 where it is likelier than those, with as many prompts
            of each as it was fitted on.
        bias: One number per category.
        thresholds: Name of a set that must not open it ("neutral", "hard_safe") to the threshold
            that set asks for. The highest one holds.
        scale: Score above the threshold at which a soft gate is fully open: the median of risky
            tune prompts that pass it.
        model: What it was fitted on.
        form: "hard" (open or closed, by the prompt), "soft" (opens in proportion up to ``scale``)
            or "stepwise" (goes on reading while the answer is written: opens above the threshold,
            closes ``hysteresis * scale`` below it). Thresholds of ``fit_gate`` promise their rates
            for one look, so for the first two; those of a stepwise gate are set by
            ``calibrate_over_answers``.
        several: Where several categories pass: "argmax" lets the highest one through; "whitened"
            lets all, so that the activation moves along each of their vectors by that vector's own
            length however much they overlap, capped at the longest vector's norm.
        hysteresis: See ``form``.
        memory: Share of the running score that a stepwise gate keeps at each new token.
        asked_as: System prompt and template keywords that it was fitted under, see
            ``ActivationSet``.
    """

    site: Site
    span: Literal["content", "last"]
    categories: tuple[str, ...]
    weights: Float[Tensor, "category d"]
    bias: Float[Tensor, " category"]
    thresholds: Mapping[str, Threshold]
    scale: float
    model: ModelInfo
    form: Form = "hard"
    several: Several = "argmax"
    hysteresis: float = 0.5
    memory: float = 0.9
    asked_as: str = ""

    def __post_init__(self) -> None:
        forms, ways = get_args(Form), get_args(Several)
        if self.form not in forms or self.several not in ways:
            raise ValueError(
                f"a gate's form is one of {', '.join(forms)} and several one of {', '.join(ways)}, "
                f"got {self.form!r}, {self.several!r}."
            )
        if not 0 <= self.memory < 1 or self.hysteresis < 0 or not self.scale > 0:
            given = f"{self.memory}, {self.hysteresis}, {self.scale}"
            raise ValueError(
                f"memory lies in [0, 1), hysteresis is at least 0, scale above 0; got {given}."
            )

    def __repr__(self) -> str:
        return (
            f"Gate({len(self.categories)} categories at {self.site}, {self.form}, "
            f"opens above {self.threshold:.2f})"
        )

    @property
    def threshold(self) -> float:
        """Score above which it opens."""
        return highest_of(self.thresholds)

    @property
    def why_closed(self) -> str:
        """Say why it can never open: too few prompts for a rate; empty where it can."""
        return why_closed(self.thresholds)

    @property
    def key(self) -> list[Any]:
        """What tells it from another gate, as JSON."""
        return [
            str(self.site),
            self.span,
            tensor_digest(self.weights),
            tensor_digest(self.bias),
            self.threshold,
            self.scale,
            self.form,
            self.several,
            self.hysteresis,
            self.memory,
        ]

    def index(self, category: str) -> int:
        """Find the place of a category among ``categories``.

        Raises:
            ValueError: If the gate was not fitted on it.
        """
        if category not in self.categories:
            hint = did_you_mean(category, self.categories)
            raise ValueError(
                f"the gate has no category {category!r}; "
                f"categories: {', '.join(self.categories)}.{hint}"
            )
        return self.categories.index(category)

    def scores(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... category"]:
        """Compute the log-odds of each category, in float32."""
        weights = self.weights.to(activation.device)
        return activation.float() @ weights.T + self.bias.to(activation.device)

    def opening(
        self,
        scores: Float[Tensor, "... category"],
        before: Float[Tensor, "... category"] | None = None,
    ) -> Float[Tensor, "... category"]:
        """Tell how far it opens for each category, from 0 (closed: nothing is changed) to 1.

        Args:
            scores: From ``scores``.
            before: How far it was open before, for hysteresis; only a stepwise gate looks at it.
        """
        above = scores - self.threshold
        allowed = torch.ones_like(above, dtype=torch.bool)
        if self.several == "argmax":
            allowed = scores == scores.amax(dim=-1, keepdim=True)
        if self.form == "soft":
            return (above / self.scale).clamp(0, 1) * allowed
        opened = (above > 0) & allowed
        if self.form == "stepwise" and before is not None:
            stays = (before > 0) & (above > -self.hysteresis * self.scale)
            opened = (
                opened & ~stays.any(dim=-1, keepdim=True) | stays
                if self.several == "argmax"
                else opened | stays
            )
        return opened.to(scores)


def fit_gate(
    fit: ActivationSet,
    tune: ActivationSet,
    *,
    neutral_rate: float = 0.02,
    hard_rate: float = 0.10,
    penalty: float = 100.0,
    form: Form = "hard",
    several: Several = "argmax",
) -> Gate:
    """Fit a gate's category scores on one fold and set its threshold on another.

    Scores are a multinomial logistic regression on standardised activations: each risk category
    against all safe prompts of the fold together, twins and look-alikes (label "safe") and neutral
    ones. The threshold is the higher of two conformal ones, which hold for one look at a prompt: a
    stepwise gate looks many times (``calibrate_over_answers``).

    Args:
        fit: Pooled activations of unsafe, safe and neutral prompts; span "content" or "last".
        tune: The same site and span on prompts of the tune fold.
        neutral_rate: Largest share of neutral prompts that may open the gate.
        hard_rate: Largest share of twins and look-alikes that may open it.
        penalty: Weight of the squared norm.
        form: See ``Gate``.
        several: See ``Gate``.

    Raises:
        ValueError: If sets do not fit each other or share prompts.
        CannotBeDone: If a fold lacks a label that the gate needs.
    """
    check_folds(fit, tune)
    categories, weights, bias = fit_log_odds(fit.values, fit.prompts, penalty)
    highest = (tune.values.double() @ weights.T + bias).amax(dim=1).numpy()
    thresholds = thresholds_on(tune.prompts, highest, neutral_rate, hard_rate)
    return Gate(
        site=fit.site,
        span=cast('Literal["content", "last"]', fit.span),
        categories=categories,
        weights=weights.float(),
        bias=bias.float(),
        thresholds=thresholds,
        scale=scale_above(thresholds, highest[unsafe_rows(tune.prompts)]),
        model=fit.model,
        form=form,
        several=several,
        asked_as=fit.asked_as,
    )


def fit_log_odds(
    values: Float[Tensor, "prompt feature"],
    prompts: Sequence[Prompt],
    penalty: float,
    *,
    in_row_space: bool = False,
) -> tuple[tuple[str, ...], Float[Tensor, "category feature"], Float[Tensor, " category"]]:
    """Fit each category's log-odds against all safe and neutral prompts together.

    A prompt of several categories is one of its main category.

    Args:
        values: What is known of each prompt, such as an activation.
        prompts: Prompts of the fit fold, row by row.
        penalty: Weight of the squared norm of the weights of standardised values.
        in_row_space: As for ``fit_linear_probe``.

    Returns:
        Categories in order, and for each the weights and the bias of its score, in float64.

    Raises:
        CannotBeDone: If there are no risky prompts, or no others.
    """
    risks = [p.category if p.label == "unsafe" else "" for p in prompts]
    categories = tuple(sorted(set(risks) - {""}))
    if not categories or "" not in risks:
        raise CannotBeDone("a gate needs unsafe prompts and safe or neutral ones in the fit fold.")
    probe = fit_linear_probe(values, risks, penalty=penalty, in_row_space=in_row_space)
    if len(categories) == 1:  # two classes have one row, for the second of them: "" sorts first
        return categories, probe.weights, probe.bias
    safe, places = probe.classes.index(""), [probe.classes.index(c) for c in categories]
    weights = probe.weights[places] - probe.weights[safe]
    return categories, weights, probe.bias[places] - probe.bias[safe]


def thresholds_on(
    prompts: Sequence[Prompt],
    highest: Float[np.ndarray, " prompt"],
    neutral_rate: float,
    hard_rate: float,
) -> dict[str, Threshold]:
    """Set a gate's conformal thresholds, one for each set that must not open it.

    Args:
        prompts: Prompts of the tune fold.
        highest: The highest score of each.
        neutral_rate: Largest share of neutral prompts that may open the gate.
        hard_rate: Largest share of twins and look-alikes that may open it.

    Raises:
        CannotBeDone: If no prompt is safe or neutral.
    """
    rates = {"neutral": neutral_rate, "hard_safe": hard_rate}
    thresholds = {
        name: conformal_threshold(highest[rows], rates[name])
        for name, rows in rows_that_must_not_open(prompts).items()
        if rows
    }
    if not thresholds:
        raise CannotBeDone(
            "no safe or neutral prompts in the tune fold: nothing to set a gate's threshold on."
        )
    return thresholds


def scale_above(thresholds: Mapping[str, Threshold], risky: Float[np.ndarray, " prompt"]) -> float:
    """Compute ``Gate.scale`` from the highest scores of risky tune prompts; 1 where none pass."""
    threshold = highest_of(thresholds)
    passing = risky[risky > threshold] - threshold
    return float(np.median(passing)) if len(passing) else 1.0


def highest_of(thresholds: Mapping[str, Threshold]) -> float:
    """Return the highest threshold: the one that holds."""
    return max(threshold.value for threshold in thresholds.values())


def why_closed(thresholds: Mapping[str, Threshold]) -> str:
    """Say why thresholds never let anything pass: too few prompts; empty where they do."""
    return " and ".join(
        f"{threshold.n} {name.replace('_', ' ')} prompts of the tune fold are too few to "
        f"promise a rate of {threshold.rate:g} ({math.ceil(1 / threshold.rate - 1e-9) - 1} "
        "are needed)"
        for name, threshold in thresholds.items()
        if threshold.value == math.inf
    )


def thresholds_to_json(thresholds: Mapping[str, Threshold]) -> dict[str, dict[str, Any]]:
    """Write thresholds as JSON has them: an infinite one as a text."""
    return {
        name: {
            key: value if np.isfinite(value) else str(value)
            for key, value in vars(threshold).items()
        }
        for name, threshold in thresholds.items()
    }


def thresholds_from_json(card: Mapping[str, Mapping[str, Any]]) -> dict[str, Threshold]:
    """Read what ``thresholds_to_json`` wrote."""
    return {
        name: Threshold(
            float(numbers["value"]),
            float(numbers["rate"]),
            float(numbers["low"]),
            float(numbers["high"]),
            int(numbers["n"]),
        )
        for name, numbers in card.items()
    }


def combined(
    opening: Float[Tensor, "batch category"],
    vectors: Float[Tensor, "batch category d"],
    several: Several,
) -> Float[Tensor, "batch d"]:
    """Put each row's open categories' vectors together, as ``Gate.several`` says.

    Args:
        opening: How far the gate is open.
        vectors: Each row's vector of each category, residual-stream units.
        several: "argmax": their weighted sum (one is open). "whitened": the shortest vector whose
            projection on each open category's vector is that vector's own weighted length, no
            longer than the longest of them.

    Returns:
        What is added to each row; zero where all categories are closed.
    """
    if several == "argmax":
        return torch.einsum("bc,bcd->bd", opening, vectors)
    norms = vectors.norm(dim=-1)
    is_open = (opening > 0) & (norms > 0)
    units = vectors / norms.clamp(min=1e-12)[..., None] * is_open[..., None]
    gram = torch.einsum("bcd,bed->bce", units, units)
    # Closed categories get a row of the identity; the ridge keeps two equal vectors from dividing
    # by zero.
    gram = gram + torch.diag_embed((~is_open).to(gram) + 1e-4)
    lengths = opening * norms * is_open
    coefficients = torch.linalg.solve(gram, lengths[..., None])[..., 0]
    total = torch.einsum("bc,bcd->bd", coefficients, units)
    cap = lengths.amax(dim=1) / total.norm(dim=-1).clamp(min=1e-12)
    return total * cap.clamp(max=1.0)[:, None]


def save_gate(path: PathLike, gate: Gate) -> None:
    """Write a gate as safetensors with a JSON card, atomically."""
    card = {
        "format": FORMAT,
        "site": str(gate.site),
        "span": gate.span,
        "categories": list(gate.categories),
        "thresholds": thresholds_to_json(gate.thresholds),
        "scale": gate.scale,
        "form": gate.form,
        "several": gate.several,
        "hysteresis": gate.hysteresis,
        "memory": gate.memory,
        "asked_as": gate.asked_as,
        "model": gate.model.to_dict(),
    }
    write_tensors(path, {"weights": gate.weights, "bias": gate.bias}, card)


def load_gate(path: PathLike) -> Gate:
    """Read a gate written by ``save_gate``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    tensors, card = read_tensors(path)
    if card.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no gate (its format is {card.get('format')!r}); make one with fit_gate."
        )
    try:
        return Gate(
            site=Site.parse(card["site"]),
            categories=tuple(card["categories"]),
            weights=tensors["weights"],
            bias=tensors["bias"],
            thresholds=thresholds_from_json(card["thresholds"]),
            model=ModelInfo(**card["model"]),
            asked_as=str(card.get("asked_as", "")),
            **{
                name: card[name]
                for name in ("span", "scale", "form", "several", "hysteresis", "memory")
            },
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no whole gate ({error}: missing or wrong); make it again with fit_gate."
        ) from error


def check_folds(fit: ActivationSet, tune: ActivationSet) -> None:
    """Raise where two folds are of another site, span, model or template, or share prompts."""
    if (fit.site, fit.span, fit.model.fingerprint) != (
        tune.site,
        tune.span,
        tune.model.fingerprint,
    ):
        raise ValueError(f"both folds need one site, span and model, got {fit!r} and {tune!r}.")
    if fit.asked_as != tune.asked_as:
        raise ValueError(
            "both folds need one system prompt and the same template keywords, got "
            f"{fit.asked_as or 'none'} and {tune.asked_as or 'none'}."
        )
    if fit.span not in ("content", "last"):
        raise ValueError(f"a gate reads the prompt's span 'content' or 'last', got {fit.span!r}.")
    shared = {p.id for p in fit.prompts} & {p.id for p in tune.prompts}
    if shared:
        raise ValueError(
            f"prompt {min(shared)!r} is in both folds; a threshold set on fitted prompts promises "
            "nothing: split them with split_prompts."
        )
