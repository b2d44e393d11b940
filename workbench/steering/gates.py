"""Gates: how much an activation says of each risk category, and from which score on steering is let through.

A gate reads below the layer that is steered, row by row. It is fitted against style-matched safe prompts as well as neutral ones, so that
it sees risk and not the style of a question, and its threshold is set on prompts it was not fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, read_tensors, tensor_digest, write_tensors
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


Form = Literal["hard", "soft", "stepwise"]


FORMS = ("hard", "soft", "stepwise")


Several = Literal["argmax", "whitened"]


SEVERAL = ("argmax", "whitened")


FORMAT = "workbench gate 1"


@dataclass(frozen=True, eq=False)
class Gate:
    """Scores of the risk categories, the threshold, and what happens above it; made by ``fit_gate``.

    Attributes:
        site: Where it reads; below every site that it lets be steered.
        span: Tokens of the prompt whose mean it reads: "content" or "last".
        categories: Risk categories, one score each.
        weights: Score of a category = its row @ activation + its bias: log-odds of the category against safe prompts, so above 0 where it
            is likelier than that, with as many prompts of each as it was fitted on.
        bias: One number a category.
        thresholds: Name of a set that must not open it ("neutral", "hard_safe") to the threshold that set asks for. The highest one holds.
        scale: Score above the threshold at which a soft gate is fully open: the median of risky tune prompts that pass it.
        model: What it was fitted on.
        form: "hard" (open or closed, by the prompt), "soft" (opens in proportion up to ``scale``) or "stepwise" (goes on reading while the
            answer is written: opens above the threshold, closes ``hysteresis * scale`` below it).
        several: Where several categories pass: "argmax" lets the highest one through; "whitened" lets all, so that the activation moves along each
            of their vectors by that vector's own length however much they overlap, capped at the longest vector's norm.
        hysteresis: See ``form``.
        memory: Share of the running score that a stepwise gate keeps at each new token.
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

    def __post_init__(self) -> None:
        if self.form not in FORMS or self.several not in SEVERAL:
            raise ValueError(
                f"a gate's form is one of {', '.join(FORMS)} and several one of {', '.join(SEVERAL)}, got {self.form!r}, {self.several!r}."
            )
        if not 0 <= self.memory < 1 or self.hysteresis < 0 or not self.scale > 0:
            given = f"{self.memory}, {self.hysteresis}, {self.scale}"
            raise ValueError(
                f"memory lies in [0, 1), hysteresis is at least 0, scale above 0; got {given}."
            )

    def __repr__(self) -> str:
        return f"Gate({len(self.categories)} categories at {self.site}, {self.form}, opens above {self.threshold:.2f})"

    @property
    def threshold(self) -> float:
        """Score above which it opens."""
        return max(own.value for own in self.thresholds.values())

    @property
    def key(self) -> list[Any]:
        """What tells it from another gate, as JSON."""
        numbers = [
            tensor_digest(self.weights),
            tensor_digest(self.bias),
            self.threshold,
            self.scale,
        ]
        return [
            str(self.site),
            self.span,
            *numbers,
            self.form,
            self.several,
            self.hysteresis,
            self.memory,
        ]

    def index(self, category: str) -> int:
        """Place of a category.

        Raises:
            ValueError: If it was not fitted on it.
        """
        if category not in self.categories:
            hint = did_you_mean(category, self.categories)
            raise ValueError(
                f"the gate has no category {category!r}; categories: {', '.join(self.categories)}.{hint}"
            )
        return self.categories.index(category)

    def scores(self, activation: Float[Tensor, "... d"]) -> Float[Tensor, "... category"]:
        """Log-odds of each category, in float32."""
        weights = self.weights.to(activation.device)
        return activation.float() @ weights.T + self.bias.to(activation.device)

    def opening(
        self,
        scores: Float[Tensor, "... category"],
        before: Float[Tensor, "... category"] | None = None,
    ) -> Float[Tensor, "... category"]:
        """How far it opens for each category, from 0 (closed: nothing is changed) to 1.

        Args:
            scores: From ``scores``.
            before: How far it was open, for hysteresis; only a stepwise gate looks at it.
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
    """Fit category scores on one fold and set the threshold on another.

    Scores are a multinomial logistic regression on standardised activations: each risk category against all safe prompts of the fold
    together, twins and look-alikes (label "safe") and neutral ones. The threshold is the higher of two conformal ones.

    Args:
        fit: Pooled activations of unsafe, safe and neutral prompts; span "content" or "last".
        tune: The same site and span on prompts of the tune fold.
        neutral_rate: Share of neutral prompts that may open it.
        hard_rate: Share of twins and look-alikes that may.
        penalty: Weight of the squared norm.
        form: See ``Gate``.
        several: See ``Gate``.

    Raises:
        ValueError: If sets do not fit each other, share prompts, or lack a label.
    """
    if (fit.site, fit.span, fit.model.fingerprint) != (
        tune.site,
        tune.span,
        tune.model.fingerprint,
    ):
        raise ValueError(f"both folds need one site, span and model, got {fit!r} and {tune!r}.")
    if fit.span not in ("content", "last"):
        raise ValueError(f"a gate reads the prompt's span 'content' or 'last', got {fit.span!r}.")
    shared = {p.id for p in fit.prompts} & {p.id for p in tune.prompts}
    if shared:
        raise ValueError(
            f"prompt {min(shared)!r} is in both folds; a threshold set on fitted prompts promises nothing."
        )
    names = [p.category if p.label == "unsafe" else "" for p in fit.prompts]
    categories = tuple(sorted(set(names) - {""}))
    if not categories or "" not in names:
        raise ValueError("a gate needs unsafe prompts and safe or neutral ones in the fit fold.")
    probe = fit_linear_probe(fit.values, names, penalty=penalty)
    if len(categories) == 1:  # two classes have one row, for the second of them: "" sorts first
        weights, bias = probe.weights, probe.bias
    else:
        safe, own = probe.classes.index(""), [probe.classes.index(c) for c in categories]
        weights = probe.weights[own] - probe.weights[safe]
        bias = probe.bias[own] - probe.bias[safe]
    highest = (tune.values.double() @ weights.T + bias).amax(dim=1).numpy()
    thresholds = {}
    rates = {"neutral": neutral_rate, "hard_safe": hard_rate}
    for name, rows in rows_that_must_not_open(tune.prompts).items():
        if rows:
            thresholds[name] = conformal_threshold(highest[rows], rates[name])
    if not thresholds:
        raise ValueError(
            "no safe or neutral prompts in the tune fold: nothing to set a threshold on."
        )
    threshold = max(own.value for own in thresholds.values())
    risky = highest[unsafe_rows(tune.prompts)]
    passing = risky[risky > threshold] - threshold
    scale = float(np.median(passing)) if len(passing) else 1.0
    span: Any = fit.span
    return Gate(
        fit.site,
        span,
        categories,
        weights.float(),
        bias.float(),
        thresholds,
        scale,
        fit.model,
        form,
        several,
    )


def combined(
    opening: Float[Tensor, "batch category"],
    vectors: Float[Tensor, "batch category d"],
    several: Several,
) -> Float[Tensor, "batch d"]:
    """What is added to each row: its open categories' vectors, put together as ``Gate.several`` says.

    Args:
        opening: How far the gate is open.
        vectors: Each row's vector of each category, residual-stream units.
        several: "argmax": their weighted sum (one is open). "whitened": the shortest vector whose projection on each open category's vector is
            that vector's own weighted length, no longer than the longest of them.
    """
    if several == "argmax":
        return torch.einsum("bc,bcd->bd", opening, vectors)
    norms = vectors.norm(dim=-1)
    is_open = (opening > 0) & (norms > 0)
    units = vectors / norms.clamp(min=1e-12)[..., None] * is_open[..., None]
    gram = torch.einsum("bcd,bed->bce", units, units)
    # Closed categories get a row of the identity; the ridge keeps two equal vectors from dividing by zero.
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
        "thresholds": {
            name: {
                key: value if np.isfinite(value) else str(value) for key, value in vars(own).items()
            }
            for name, own in gate.thresholds.items()
        },
        "scale": gate.scale,
        "form": gate.form,
        "several": gate.several,
        "hysteresis": gate.hysteresis,
        "memory": gate.memory,
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
        thresholds = {
            name: Threshold(
                float(own["value"]),
                float(own["rate"]),
                float(own["low"]),
                float(own["high"]),
                int(own["n"]),
            )
            for name, own in card["thresholds"].items()
        }
        own = {
            name: card[name]
            for name in ("span", "scale", "form", "several", "hysteresis", "memory")
        }
        return Gate(
            site=Site.parse(card["site"]),
            categories=tuple(card["categories"]),
            weights=tensors["weights"],
            bias=tensors["bias"],
            thresholds=thresholds,
            model=ModelInfo(**card["model"]),
            **own,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no whole gate ({error}: missing or wrong); make it again with fit_gate."
        ) from error


def only(gate: Gate, categories: Sequence[str]) -> Gate:
    """The gate for some of its categories.

    Raises:
        ValueError: If one is unknown.
    """
    rows = [gate.index(category) for category in categories]
    return replace(
        gate, categories=tuple(categories), weights=gate.weights[rows], bias=gate.bias[rows]
    )
