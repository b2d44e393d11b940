"""Describe what neurons read and write: tokens, categories and words.

One pass over the prompts keeps the best tokens and the histograms of all neurons up to date: what
is held does not grow with the number of prompts. What the weights say needs no prompts at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import einops
import torch

from workbench.models.batches import (
    SharedPrefix,
    order_by_length,
    pad,
    share_prefix,
    span_mask,
)
from workbench.models.forward import reading
from workbench.models.hooked_model import input_device
from workbench.models.load import ModelInfo, model_info
from workbench.models.progress import progress_bar
from workbench.models.sites import Site, check_sites
from workbench.models.tokens import Encoded, encode, pad_id, token_strings
from workbench.models.trusted_paths import trusts
from workbench.neurons.weights import Vocabulary, WeightCosine, vocabulary_of, weight_cosines
from workbench.prompts.forms import as_prompts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords
    from workbench.neurons.silencing import Neuron
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt


HALF_BINS = 64
"""Bins on either side of zero while counting; a finished histogram has at most ``MOST_BINS``."""


MOST_BINS = 40
"""Bins of a finished histogram, at most."""


@dataclass(frozen=True)
class Example:
    """Hold one token at which a neuron is extreme, with the tokens around it.

    Attributes:
        prompt_id: Prompt the token is in.
        category: Category of that prompt.
        label: Label of that prompt.
        tokens: The token and its context, as texts.
        activations: The neuron's activation at each of them.
        peak: Place of the token itself among them.
    """

    prompt_id: str
    category: str
    label: str
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int

    @property
    def value(self) -> float:
        """Activation at the token itself."""
        return self.activations[self.peak]


@dataclass(frozen=True)
class Histogram:
    """Hold how often a neuron takes which values.

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
    """Hold what one neuron reads and writes.

    Attributes:
        layer: Its layer.
        neuron: Its index at ``mlp_post``.
        highest: Tokens at which it is highest, highest first.
        lowest: Tokens at which it is lowest: gated neurons carry as much below zero as above.
        per_prompt: Histogram of its mean over each prompt's tokens: what AUROC and contribution are
            made of.
        per_token: Histogram of its value at each token.
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
        words = [word for word, _ in self.vocabulary.promoted[:4]]
        return f"NeuronProfile(L{self.layer} N{self.neuron}, {best}promotes {words})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> NeuronProfile:
        """Make a profile from what ``to_dict`` gave, also after it went through JSON.

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
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(
                f"this is not a neuron profile ({error}); its fields are {names}."
            ) from error


def random_neurons(model: HookedModel, neurons: Sequence[Neuron], *, seed: int = 0) -> list[Neuron]:
    """Draw another neuron of the same layer for each neuron: controls for a dashboard.

    None of them is one of the given neurons, and none is drawn twice.

    Raises:
        ValueError: If a layer has too few others.
    """
    generator = torch.Generator().manual_seed(seed)
    taken, drawn = set(neurons), []
    for layer, _ in neurons:
        free = [n for n in range(model.cfg.d_mlp) if (layer, n) not in taken]
        if not free:
            raise ValueError(
                f"layer {layer} has {model.cfg.d_mlp} neurons, too few to draw a control for each; "
                "give fewer."
            )
        drawn.append((layer, free[int(torch.randint(len(free), (1,), generator=generator))]))
        taken.add(drawn[-1])
    return drawn


def profile_neurons(
    model: HookedModel,
    neurons: Sequence[Neuron],
    prompts: PromptsLike,
    *,
    directions: Mapping[str, Mapping[Site, Float[Tensor, " d_model"]]] | None = None,
    site: Site | None = None,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    n_examples: int = 8,
    tokens_per_prompt: int = 1,
    context: int = 12,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> list[NeuronProfile]:
    """Describe neurons: what drives them, how they answer to each category, what they write.

    All neurons share one pass over the prompts; give targets and their controls in one call.

    Args:
        model: A hooked model.
        neurons: Pairs (layer, neuron).
        prompts: What to look at, in any form that ``as_prompts`` reads.
        directions: Category to site to direction (unsafe minus reference): at ``reading_site`` of
            a neuron's layer for its input weights, at ``site`` for its output weights. Cosines
            whose direction is not given are left out.
        site: Residual site that was attributed.
        span: Which tokens count; see ``cache_activations``. With "all" the first token's massive
            activation leads many lists.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        n_examples: Tokens kept at either end.
        tokens_per_prompt: Tokens a prompt may have among them.
        context: Tokens shown on either side; those before the user's words are not.
        batch_size: Prompts per pass.
        seed: Seed of the random neurons that vocabularies are compared with.
        progress: Show a progress bar.

    Returns:
        One profile per neuron, in order.

    Raises:
        ValueError: If a neuron, site, span or prompt does not fit the model.
    """
    prompts = as_prompts(prompts)
    _check(model, neurons, prompts, n_examples, tokens_per_prompt, context, batch_size)
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    encoded = encode(model, prompts, with_response=span == "response", **asked_by)
    stream = _Stream.of(model, neurons, encoded, span, n_examples, tokens_per_prompt, context)
    stream.read(batch_size, progress)
    of_weights = _weights_of(model, stream.neurons, directions or {}, site, seed)
    profiles = {
        neuron: stream.profile(place, vocabulary, cosines)
        for place, (neuron, (vocabulary, cosines)) in enumerate(of_weights.items())
    }
    return [profiles[neuron] for neuron in neurons]


@dataclass(frozen=True, eq=False)
class _Stream:
    """Passes over prompts, and what they leave of each neuron: top tokens and histograms.

    Attributes:
        model: What runs.
        neurons: Those read, layer by layer: the columns of all tensors here.
        rows: Encoded prompts, longest first.
        span: Which tokens count.
        prefix: Tokens that all rows share; the columns read begin behind it.
        classes: (category, label) of each row of the histograms.
        ends: Top tokens, highest and lowest.
        means: Histograms of each prompt's mean.
        values: Histograms of each token's value.
    """

    model: HookedModel
    neurons: list[Neuron]
    rows: list[Encoded]
    span: str
    prefix: SharedPrefix
    classes: tuple[tuple[str, str], ...]
    ends: tuple[_TopTokens, _TopTokens]
    means: _Counts
    values: _Counts

    @classmethod
    def of(
        cls,
        model: HookedModel,
        neurons: Iterable[Neuron],
        encoded: Sequence[Encoded],
        span: str,
        n_examples: int,
        tokens_per_prompt: int,
        context: int,
    ) -> _Stream:
        """Begin with nothing read."""
        columns = sorted(set(neurons))
        rows = [encoded[i] for i in order_by_length([len(row.ids) for row in encoded])]
        prefix = share_prefix(model, rows, keep=lambda row: _shown(row, span).start)
        pairs = {(name, row.prompt.label) for row in rows for name in row.prompt.categories}
        classes = tuple(sorted(pairs))
        highest, lowest = (
            _TopTokens.empty(len(columns), n_examples, tokens_per_prompt, context, sign)
            for sign in (1, -1)
        )
        means, values = (_Counts.empty(len(columns), len(classes)) for _ in range(2))
        return cls(model, columns, rows, span, prefix, classes, (highest, lowest), means, values)

    def read(self, batch_size: int, progress: bool) -> None:
        """Run all prompts and take in every neuron's activations."""
        model, first = self.model, self.prefix.length
        batch_size = batch_size if trusts(model, "right_padding") else 1
        device = input_device(model)
        layers = sorted({layer for layer, _ in self.neurons})
        parts: dict[int, Tensor] = {}

        def reader(layer: int) -> tuple[str, Callable[[Tensor], None]]:
            in_layer = torch.tensor([n for at, n in self.neurons if at == layer])

            def read(activation: Tensor) -> None:
                parts[layer] = activation[..., in_layer.to(activation.device)].float().cpu()

            return Site(layer, "mlp_post").hook_name, read

        with torch.no_grad(), reading(model, [reader(layer) for layer in layers]) as run:
            for start in _progress(range(0, len(self.rows), batch_size), progress):
                rows = self.rows[start : start + batch_size]
                batch = pad(rows, pad_id=pad_id(model), side="right", device=device)
                inside = span_mask(rows, batch, self.span)[:, first:].cpu()
                run(batch.tokens[:, first:], batch.mask, self.prefix.for_rows(len(rows)))
                self._take_in(start, torch.cat([parts[layer] for layer in layers], dim=2), inside)

    def _take_in(
        self,
        start: int,
        activations: Float[Tensor, "batch pos neuron"],
        inside: Bool[Tensor, "batch pos"],
    ) -> None:
        """Update top tokens and histograms with the rows from ``start`` on."""
        if not activations[inside].isfinite().all():
            raise ValueError(
                f"an activation is not finite in {model_info(self.model).dtype}; "
                "load the model in float32."
            )
        places = torch.arange(start, start + len(activations))
        prompts = [self.rows[i].prompt for i in places.tolist()]
        for end in self.ends:
            end.update(places, activations, inside)
        # a row of several categories counts in each of them
        in_class = [(i, (name, p.label)) for i, p in enumerate(prompts) for name in p.categories]
        class_of_row = torch.tensor([self.classes.index(pair) for _, pair in in_class])
        rows = torch.tensor([i for i, _ in in_class])
        activations, inside = activations[rows], inside[rows]
        self.values.update(class_of_row[:, None].expand_as(inside)[inside], activations[inside])
        weights = inside.float() / inside.sum(dim=1, keepdim=True)
        spanned = torch.where(inside[..., None], activations, 0.0)
        self.means.update(
            class_of_row, einops.einsum(weights, spanned, "row pos, row pos neuron -> row neuron")
        )

    def profile(
        self, place: int, vocabulary: Vocabulary, cosines: tuple[WeightCosine, ...]
    ) -> NeuronProfile:
        """Put together what was read of one neuron and what its weights say."""
        highest, lowest = (
            end.examples(self.model, self.rows, self.span, self.prefix.length, place)
            for end in self.ends
        )
        return NeuronProfile(
            *self.neurons[place],
            highest=highest,
            lowest=lowest,
            per_prompt=self.means.histogram(place, self.classes),
            per_token=self.values.histogram(place, self.classes),
            vocabulary=vocabulary,
            cosines=cosines,
            span=self.span,
            model=model_info(self.model),
        )


@dataclass(eq=False)
class _TopTokens:
    """Keep the k tokens at which each neuron is highest (sign 1) or lowest (sign -1) so far.

    The activations around them are kept too. Ties go to the token that came first.
    """

    sign: int
    per_prompt: int
    values: Float[Tensor, "k neuron"]  # times sign; -inf while there are fewer tokens than k
    prompts: Int[Tensor, "k neuron"]
    columns: Int[Tensor, "k neuron"]
    windows: Float[Tensor, "k neuron window"]

    @classmethod
    def empty(cls, n_neurons: int, k: int, per_prompt: int, context: int, sign: int) -> _TopTokens:
        """Begin without any token."""
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
        """Take in a batch: its prompts' numbers, activations, and which tokens count."""
        k, width = len(self.values), self.windows.shape[2]
        # the best tokens of each prompt of the batch
        n_best = min(self.per_prompt, activations.shape[1])
        scores = torch.where(inside[..., None], self.sign * activations, -torch.inf)
        best, columns = (
            part[:, :n_best].flatten(0, 1)
            for part in scores.sort(dim=1, descending=True, stable=True)
        )
        # the best k of those held so far and those
        every = torch.cat([self.values, best])
        order = every.argsort(dim=0, descending=True, stable=True)[:k]
        is_old, old, new = order < k, order.clamp(max=k - 1), (order - k).clamp(min=0)
        rows, columns = new // n_best, columns.gather(0, new)
        around = torch.nn.functional.pad(activations, (0, 0, width // 2, width // 2))
        neurons = torch.arange(activations.shape[2])[None, :, None]
        windows = around[rows[..., None], columns[..., None] + torch.arange(width), neurons]
        self.values = every.gather(0, order)
        self.prompts = torch.where(is_old, self.prompts.gather(0, old), prompts[rows])
        self.columns = torch.where(is_old, self.columns.gather(0, old), columns)
        self.windows = torch.where(
            is_old[..., None], self.windows.gather(0, old[..., None].expand_as(windows)), windows
        )

    def examples(
        self, model: HookedModel, encoded: Sequence[Encoded], span: str, first: int, neuron: int
    ) -> tuple[Example, ...]:
        """Show a neuron's tokens in words; ``first`` is the position of the first column."""
        examples, middle = [], self.windows.shape[2] // 2
        for place in range(int(self.values[:, neuron].isfinite().sum())):
            row = encoded[int(self.prompts[place, neuron])]
            at = first + int(self.columns[place, neuron])
            shown = _shown(row, span)
            start, stop = max(shown.start, at - middle), min(shown.stop, at + middle + 1)
            window = self.windows[place, neuron, start - at + middle : stop - at + middle]
            tokens, prompt = token_strings(model, row.ids[start:stop]), row.prompt
            examples.append(
                Example(
                    prompt.id,
                    prompt.category,
                    prompt.label,
                    tuple(tokens),
                    tuple(window.tolist()),
                    at - start,
                )
            )
        return tuple(examples)


@dataclass(eq=False)
class _Counts:
    """Count each neuron's values per class, over bins that cover -2^e to 2^e.

    e grows with the values: bins have a width that is a power of two and doubles (pairs of bins
    merge) when a value falls outside. So the result is that of fixed bins chosen with hindsight,
    whatever the order of the prompts.
    """

    exponents: Int[Tensor, " neuron"]
    counts: Int[Tensor, "class bin neuron"]

    @classmethod
    def empty(cls, n_neurons: int, n_classes: int) -> _Counts:
        """Begin without any value."""
        return cls(
            torch.full((n_neurons,), -40),
            torch.zeros(n_classes, 2 * HALF_BINS, n_neurons, dtype=torch.long),
        )

    def update(self, classes: Int[Tensor, " value"], values: Float[Tensor, "value neuron"]) -> None:
        """Take in values and the class of each."""
        # bins grow as far as the largest value needs, and what was counted moves along
        largest = values.abs().amax(dim=0)
        needed = torch.frexp(largest).exponent.long()  # |value| < 2^e, so the bins hold it
        grown = torch.where(largest > 0, torch.maximum(self.exponents, needed), self.exponents)
        doublings = (grown - self.exponents).clamp(max=62)
        # rounds down, below zero too
        bins = torch.arange(-HALF_BINS, HALF_BINS)[:, None] >> doublings
        target = (bins + HALF_BINS).expand_as(self.counts)
        self.counts = torch.zeros_like(self.counts).scatter_add(1, target, self.counts)
        self.exponents = grown
        # each value is counted in its bin
        bin_of = torch.ldexp(values.double(), -grown).mul(HALF_BINS).floor().long() + HALF_BINS
        flat = self.counts.flatten(0, 1)  # shares storage
        flat.scatter_add_(0, classes[:, None] * 2 * HALF_BINS + bin_of, torch.ones_like(bin_of))

    def histogram(self, neuron: int, classes: tuple[tuple[str, str], ...]) -> Histogram:
        """Cut out the bins that one neuron uses, merged where they are too many."""
        counts, width = self.counts[:, :, neuron], 2.0 ** float(self.exponents[neuron]) / HALF_BINS
        used = counts.sum(dim=0).nonzero()
        first, last = int(used[0]), int(used[-1])
        while last - first >= MOST_BINS:  # both ends far from zero: half the resolution is enough
            counts, width = counts.reshape(len(counts), -1, 2).sum(dim=2), 2 * width
            first, last = first // 2, last // 2
        zero = counts.shape[1] // 2
        edges = tuple((i - zero) * width for i in range(first, last + 2))
        return Histogram(
            edges, classes, tuple(tuple(row) for row in counts[:, first : last + 1].tolist())
        )


def _shown(row: Encoded, span: str) -> range:
    """Return the positions that may be shown.

    From the user's first word, or the span's if that comes before, to the span's end.
    """
    start, stop = row.span(span)
    return range(min(start, row.content[0]), stop)


def _tuples(value: Any) -> Any:
    """Turn JSON arrays into tuples, inside objects too."""
    if isinstance(value, Mapping):
        return {name: _tuples(part) for name, part in value.items()}
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value


def _weights_of(
    model: HookedModel,
    neurons: Sequence[Neuron],
    directions: Mapping[str, Mapping[Site, Float[Tensor, " d_model"]]],
    site: Site | None,
    seed: int,
) -> dict[Neuron, tuple[Vocabulary, tuple[WeightCosine, ...]]]:
    """Read the vocabulary and the cosines of sorted neurons off their weights, layer by layer."""
    of_weights: dict[Neuron, tuple[Vocabulary, tuple[WeightCosine, ...]]] = {}
    for layer in sorted({layer for layer, _ in neurons}):
        in_layer = [n for at, n in neurons if at == layer]
        vocabularies = vocabulary_of(model, layer, in_layer, seed=seed)
        cosines = weight_cosines(model, layer, in_layer, directions, site)
        for n, vocabulary, of_neuron in zip(in_layer, vocabularies, cosines, strict=True):
            of_weights[layer, n] = (vocabulary, of_neuron)
    return of_weights


def _check(
    model: HookedModel,
    neurons: Sequence[Neuron],
    prompts: Sequence[Prompt],
    n_examples: int,
    tokens_per_prompt: int,
    context: int,
    batch_size: int,
) -> None:
    """Raise unless the neurons exist and the counts make sense."""
    if not neurons or not prompts:
        raise ValueError("nothing to describe: give at least one neuron and one prompt.")
    check_sites(model, [Site(int(layer), "mlp_post") for layer, _ in neurons])
    for layer, n in neurons:
        if not 0 <= n < model.cfg.d_mlp:
            raise ValueError(
                f"no neuron {n} in layer {layer}: it has {model.cfg.d_mlp} neurons "
                f"(0-{model.cfg.d_mlp - 1})."
            )
    if min(n_examples, tokens_per_prompt, batch_size) < 1 or context < 0:
        given = f"{n_examples}, {tokens_per_prompt}, {batch_size} and {context}"
        raise ValueError(
            "n_examples, tokens_per_prompt and batch_size must be at least 1 and context 0, "
            f"got {given}."
        )


def _progress(steps: range, show: bool) -> Iterator[int]:
    """Step through batches, with a progress bar when asked."""
    with progress_bar(len(steps), "profiles", "batch", show=show) as bar:
        for step in steps:
            yield step
            bar.update(1)
