"""What a neuron reads and writes: the tokens that drive it, how it answers to each category, the words its output promotes.

One pass over the prompts, in which the best tokens and the histograms of all chosen neurons are kept up to date: what is held does not
grow with the number of prompts. What the weights say needs no prompts at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.forward import (
    has_key_value_cache,
    prefix_cache,
    reading,
    rows_of_cache,
    shared_prefix_length,
)
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import Site, check_sites
from workbench.models.tokens import Encoded, encode, pad, pad_id, span_mask, token_strings
from workbench.neurons.weights import Vocabulary, WeightCosine, vocabulary_of, weight_cosines

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.load import HookedModel
    from workbench.prompts.prompt import Prompt


HALF_BINS = 64
"""Bins on either side of zero while counting; a finished histogram has at most 40 in all."""


@dataclass(frozen=True)
class Example:
    """One token at which a neuron is extreme, with the tokens around it.

    Attributes:
        prompt_id: Whose it is.
        category: Of that prompt.
        label: Of that prompt.
        tokens: The token and its context, as texts.
        activations: The neuron at each of them.
        peak: Which of them it is about.
    """

    prompt_id: str
    category: str
    label: str
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int

    @property
    def value(self) -> float:
        """The neuron at the token."""
        return self.activations[self.peak]


@dataclass(frozen=True)
class Histogram:
    """How often a neuron takes which values.

    Attributes:
        edges: Edges of the bins, one more than there are bins; a bin holds its lower edge.
        classes: (category, label) of each row of counts.
        counts: For each class the count of each bin.
    """

    edges: tuple[float, ...]
    classes: tuple[tuple[str, str], ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class NeuronProfile:
    """What one neuron reads and writes.

    Attributes:
        layer: Its layer.
        neuron: Its index at ``mlp_post``.
        highest: Tokens at which it is highest, highest first.
        lowest: Tokens at which it is lowest: gated neurons carry as much below zero as above.
        per_prompt: Of its mean over each prompt's tokens: what AUROC and contribution are made of.
        per_token: Of its value at each token.
        vocabulary: What it writes to the output.
        cosines: Its weights against the categories' directions.
        span: Which tokens of the prompts were looked at.
        model: What was measured.
    """

    layer: int
    neuron: int
    highest: tuple[Example, ...]
    lowest: tuple[Example, ...]
    per_prompt: Histogram
    per_token: Histogram
    vocabulary: Vocabulary
    cosines: tuple[WeightCosine, ...]
    span: str
    model: ModelInfo

    def __repr__(self) -> str:
        best = f"highest {self.highest[0].value:.3g}, " if self.highest else ""
        return f"NeuronProfile(L{self.layer} N{self.neuron}, {best}promotes {[word for word, _ in self.vocabulary.promoted[:4]]})"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> NeuronProfile:
        """A profile from ``to_dict``, also after it went through JSON.

        Raises:
            ValueError: If it is not one.
        """
        try:
            parts = dict(value)
            for name in ("highest", "lowest"):
                parts[name] = tuple(Example(**_tuples(example)) for example in value[name])
            for name in ("per_prompt", "per_token"):
                parts[name] = Histogram(**_tuples(value[name]))
            parts["vocabulary"] = Vocabulary(**_tuples(value["vocabulary"]))
            parts["cosines"] = tuple(WeightCosine(**cosine) for cosine in value["cosines"])
            parts["model"] = ModelInfo(**value["model"])
            return cls(**parts)
        except (KeyError, TypeError) as error:
            names = ", ".join(own.name for own in fields(cls))
            raise ValueError(
                f"this is not a neuron profile ({error}); its fields are {names}."
            ) from error


def random_neurons(
    model: HookedModel, neurons: Sequence[tuple[int, int]], *, seed: int = 0
) -> list[tuple[int, int]]:
    """For each neuron another one of its layer, drawn at random, none of them given or drawn twice: controls for a dashboard.

    Raises:
        ValueError: If a layer has too few others.
    """
    generator = torch.Generator().manual_seed(seed)
    taken, drawn = set(neurons), []
    for layer, _ in neurons:
        free = [n for n in range(model.cfg.d_mlp) if (layer, n) not in taken]
        if not free:
            raise ValueError(
                f"layer {layer} has {model.cfg.d_mlp} neurons, too few to draw a control for each; give fewer."
            )
        drawn.append((layer, free[int(torch.randint(len(free), (1,), generator=generator))]))
        taken.add(drawn[-1])
    return drawn


def profile_neurons(
    model: HookedModel,
    neurons: Sequence[tuple[int, int]],
    prompts: Sequence[Prompt],
    *,
    directions: Mapping[str, Mapping[Site, Float[Tensor, " d_model"]]] | None = None,
    site: Site | None = None,
    span: str = "content",
    system_prompt: str | None = None,
    n_examples: int = 8,
    tokens_per_prompt: int = 1,
    context: int = 12,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> list[NeuronProfile]:
    """Describe neurons: what drives them, how they answer to each category, what they write.

    One forward pass over the prompts for all neurons together; give targets and their controls in one call. Histograms have bins of a
    width that is a power of two and doubles (merging pairs of bins) when a value falls outside, so the result is that of fixed bins
    chosen with hindsight, whatever the order of the prompts.

    Args:
        model: A hooked model.
        neurons: Pairs (layer, neuron).
        prompts: What to look at; any number.
        directions: Category to direction (unsafe minus reference) at sites: at ``reading_site`` of a neuron's layer for its input weights,
            at ``site`` for its output weights. Cosines whose direction is not given are left out.
        site: Residual site that was attributed.
        span: Which tokens count; see ``cache_activations``. With "all" the first token's massive activation leads many lists.
        system_prompt: Words for the system turn.
        n_examples: Tokens kept at either end.
        tokens_per_prompt: Tokens a prompt may have among them.
        context: Tokens shown on either side; those before the user's words are not.
        batch_size: Prompts a pass.
        seed: Of the random neurons that vocabularies are compared with.
        progress: Show a progress bar.

    Returns:
        One profile a neuron, in order.

    Raises:
        ValueError: If a neuron, site, span or prompt does not fit the model.
    """
    _check(model, neurons, prompts, n_examples, tokens_per_prompt, context, batch_size)
    layers = sorted({layer for layer, _ in neurons})
    columns = {pair: i for i, pair in enumerate(sorted(set(neurons)))}
    encoded = encode(model, prompts, with_response=span == "response", system_prompt=system_prompt)
    encoded.sort(key=lambda row: -len(row.ids))
    device = next(iter(model.parameters())).device
    first = (
        shared_prefix_length(encoded, keep=lambda row: _shown(row, span).start)
        if has_key_value_cache(model)
        else 0
    )
    classes = tuple(sorted({(prompt.category, prompt.label) for prompt in prompts}))
    ends = [
        _TopTokens.empty(len(columns), n_examples, tokens_per_prompt, context, sign)
        for sign in (1, -1)
    ]
    means, values = (_Counts.empty(len(columns), len(classes)) for _ in range(2))
    parts: dict[int, Tensor] = {}

    def reader(layer: int) -> Any:
        own = torch.tensor([n for at, n in columns if at == layer], device=device)

        def read(activation: Tensor) -> None:
            parts[layer] = activation[..., own].float().cpu()

        return Site(layer, "mlp_post").hook_name, read

    prefix = prefix_cache(model, encoded[0].ids[:first]) if first else None
    with torch.no_grad(), reading(model, [reader(layer) for layer in layers]) as run:
        for start in _progress(range(0, len(encoded), batch_size), progress):
            rows = encoded[start : start + batch_size]
            batch = pad(rows, pad_id=pad_id(model), side="right", device=device)
            inside = span_mask(rows, batch, span)[:, first:].cpu()
            copies = torch.zeros(len(rows), dtype=torch.long, device=device)
            run(
                batch.tokens[:, first:],
                batch.mask,
                rows_of_cache(prefix, copies) if prefix is not None else None,
            )
            activations = torch.cat([parts[layer] for layer in layers], dim=2)
            if not activations[inside].isfinite().all():
                raise ValueError(
                    f"an activation is not finite in {model_info(model).dtype}; load the model in float32."
                )
            of_row = torch.tensor(
                [classes.index((row.prompt.category, row.prompt.label)) for row in rows]
            )
            for end in ends:
                end.update(torch.arange(start, start + len(rows)), activations, inside)
            values.update(of_row[:, None].expand_as(inside)[inside], activations[inside])
            weights = inside.float() / inside.sum(dim=1, keepdim=True)
            means.update(
                of_row,
                torch.einsum(
                    "bp,bpn->bn", weights, torch.where(inside[..., None], activations, 0.0)
                ),
            )

    vocabularies: list[Vocabulary] = []  # in the order of the columns: layer by layer
    cosines: list[tuple[WeightCosine, ...]] = []
    for layer in layers:
        own = [n for at, n in columns if at == layer]
        vocabularies += vocabulary_of(model, layer, own, seed=seed)
        cosines += weight_cosines(model, layer, own, directions or {}, site)
    info = model_info(model)
    profiles = {
        (layer, n): NeuronProfile(
            layer,
            n,
            highest=ends[0].examples(model, encoded, span, first, i),
            lowest=ends[1].examples(model, encoded, span, first, i),
            per_prompt=means.histogram(i, classes),
            per_token=values.histogram(i, classes),
            vocabulary=vocabularies[i],
            cosines=cosines[i],
            span=span,
            model=info,
        )
        for (layer, n), i in columns.items()
    }
    return [profiles[pair] for pair in neurons]


@dataclass(eq=False)
class _TopTokens:
    """The k tokens at which each neuron is highest (sign 1) or lowest (sign -1) so far, with the activations around them.

    Ties go to the token that came first.
    """

    sign: int
    per_prompt: int
    values: Float[Tensor, "k neuron"]  # times sign; -inf while there are fewer tokens than k
    prompts: Int[Tensor, "k neuron"]
    columns: Int[Tensor, "k neuron"]
    windows: Float[Tensor, "k neuron window"]

    @classmethod
    def empty(cls, n_neurons: int, k: int, per_prompt: int, context: int, sign: int) -> _TopTokens:
        places = torch.zeros(k, n_neurons, dtype=torch.long)
        windows = torch.zeros(k, n_neurons, 2 * context + 1)
        return cls(
            sign,
            per_prompt,
            torch.full((k, n_neurons), -torch.inf),
            places,
            places.clone(),
            windows,
        )

    def update(
        self,
        prompts: Int[Tensor, " batch"],
        activations: Float[Tensor, "batch pos neuron"],
        inside: Bool[Tensor, "batch pos"],
    ) -> None:
        k, width = len(self.values), self.windows.shape[2]
        n_best = min(self.per_prompt, activations.shape[1])
        scores = torch.where(inside[..., None], self.sign * activations, -torch.inf)
        best, columns = (
            part[:, :n_best].flatten(0, 1)
            for part in scores.sort(dim=1, descending=True, stable=True)
        )
        every = torch.cat([self.values, best])
        order = every.argsort(dim=0, descending=True, stable=True)[:k]
        kept, old, new = order < k, order.clamp(max=k - 1), (order - k).clamp(min=0)
        rows, columns = new // n_best, columns.gather(0, new)
        around = torch.nn.functional.pad(activations, (0, 0, width // 2, width // 2))
        neurons = torch.arange(activations.shape[2])[None, :, None]
        windows = around[rows[..., None], columns[..., None] + torch.arange(width), neurons]
        self.values = every.gather(0, order)
        self.prompts = torch.where(kept, self.prompts.gather(0, old), prompts[rows])
        self.columns = torch.where(kept, self.columns.gather(0, old), columns)
        self.windows = torch.where(
            kept[..., None], self.windows.gather(0, old[..., None].expand_as(windows)), windows
        )

    def examples(
        self, model: HookedModel, encoded: Sequence[Encoded], span: str, first: int, neuron: int
    ) -> tuple[Example, ...]:
        """What was found, in words; ``first`` is the position of the first column."""
        found, middle = [], self.windows.shape[2] // 2
        for place in range(int(self.values[:, neuron].isfinite().sum())):
            row, at = (
                encoded[int(self.prompts[place, neuron])],
                first + int(self.columns[place, neuron]),
            )
            shown = _shown(row, span)
            start, stop = max(shown.start, at - middle), min(shown.stop, at + middle + 1)
            window = self.windows[place, neuron, start - at + middle : stop - at + middle]
            tokens = token_strings(model, row.ids[start:stop])
            prompt = row.prompt
            found.append(
                Example(
                    prompt.id,
                    prompt.category,
                    prompt.label,
                    tuple(tokens),
                    tuple(window.tolist()),
                    at - start,
                )
            )
        return tuple(found)


@dataclass(eq=False)
class _Counts:
    """Histograms of each neuron and class, over bins that cover -2^e to 2^e: e grows with the values, and pairs of bins merge."""

    exponents: Int[Tensor, " neuron"]
    counts: Int[Tensor, "class bin neuron"]

    @classmethod
    def empty(cls, n_neurons: int, n_classes: int) -> _Counts:
        return cls(
            torch.full((n_neurons,), -40),
            torch.zeros(n_classes, 2 * HALF_BINS, n_neurons, dtype=torch.long),
        )

    def update(self, classes: Int[Tensor, " value"], values: Float[Tensor, "value neuron"]) -> None:
        largest = values.abs().amax(dim=0)
        needed = torch.frexp(largest).exponent.long()  # |value| < 2^e, so the bins hold it
        grown = torch.where(largest > 0, torch.maximum(self.exponents, needed), self.exponents)
        doublings = (grown - self.exponents).clamp(max=62)
        bins = (
            torch.arange(-HALF_BINS, HALF_BINS)[:, None] >> doublings
        )  # rounds down, below zero too
        target = (bins + HALF_BINS).expand_as(self.counts)
        self.counts = torch.zeros_like(self.counts).scatter_add(1, target, self.counts)
        self.exponents = grown
        own = torch.ldexp(values.double(), -grown).mul(HALF_BINS).floor().long() + HALF_BINS
        flat = self.counts.flatten(0, 1)  # shares storage
        flat.scatter_add_(0, classes[:, None] * 2 * HALF_BINS + own, torch.ones_like(own))

    def histogram(self, neuron: int, classes: tuple[tuple[str, str], ...]) -> Histogram:
        counts, width = self.counts[:, :, neuron], 2.0 ** float(self.exponents[neuron]) / HALF_BINS
        used = counts.sum(dim=0).nonzero()
        first, last = int(used[0]), int(used[-1])
        while last - first >= 40:  # both ends far from zero: half the resolution is enough
            counts, width = counts.reshape(len(counts), -1, 2).sum(dim=2), 2 * width
            first, last = first // 2, last // 2
        zero = counts.shape[1] // 2
        edges = tuple((i - zero) * width for i in range(first, last + 2))
        return Histogram(
            edges, classes, tuple(tuple(row) for row in counts[:, first : last + 1].tolist())
        )


def _shown(row: Encoded, span: str) -> range:
    """Positions that may be shown: from the user's first word, or the span's if that comes before, to the span's end."""
    start, stop = row.span(span)
    return range(min(start, row.content[0]), stop)


def _tuples(value: Any) -> Any:
    """JSON arrays as tuples, inside objects too."""
    if isinstance(value, Mapping):
        return {name: _tuples(part) for name, part in value.items()}
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value


def _check(
    model: HookedModel,
    neurons: Sequence[tuple[int, int]],
    prompts: Sequence[Prompt],
    n_examples: int,
    tokens_per_prompt: int,
    context: int,
    batch_size: int,
) -> None:
    if not neurons or not prompts:
        raise ValueError("nothing to describe: give at least one neuron and one prompt.")
    check_sites(model, [Site(int(layer), "mlp_post") for layer, _ in neurons])
    for layer, n in neurons:
        if not 0 <= n < model.cfg.d_mlp:
            raise ValueError(
                f"no neuron {n} in layer {layer}: it has {model.cfg.d_mlp} neurons (0-{model.cfg.d_mlp - 1})."
            )
    if min(n_examples, tokens_per_prompt, batch_size) < 1 or context < 0:
        given = f"{n_examples}, {tokens_per_prompt}, {batch_size} and {context}"
        raise ValueError(
            f"n_examples, tokens_per_prompt and batch_size must be at least 1 and context 0, got {given}."
        )


def _progress(steps: range, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(steps, desc="profiles", unit="batch", disable=not show)
