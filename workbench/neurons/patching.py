"""Patch between a steered and an unsteered run: which neurons carry the effect?

``contrast_activations`` ranks neurons by how far steering moves them. ``patched_answers`` gives the
neurons of one run the values of the other while it writes, and ``patching_effect`` turns that into
the share of the steering's effect that a set of neurons carries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from workbench.generation.answers import Completion, sweep
from workbench.generation.decoding import Decoding
from workbench.models.batches import batches_by_length, pad, widths_to_keep_apart
from workbench.models.forward import forward, keep_rows, reading
from workbench.models.hooked_model import input_device
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import Site, sites_of_kind
from workbench.models.tokens import Encoded, decode, encode, pad_id, stop_ids
from workbench.neurons.effects import Scorer
from workbench.prompts.forms import as_prompts
from workbench.stats.estimates import Estimate, ratio_of_means, to_floats
from workbench.steering.apply import intervene
from workbench.steering.interventions import Intervention, Positions, check_interventions

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    import pandas as pd
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.models.templates import Keywords
    from workbench.neurons.silencing import Neuron
    from workbench.prompts.forms import PromptsLike


Direction = Literal["sufficiency", "necessity"]
"""Which run is patched; see ``patched_answers``."""


DIRECTIONS: tuple[Direction, ...] = ("sufficiency", "necessity")


_Finish = Literal["eos", "length"]


@dataclass(frozen=True, eq=False)
class ActivationContrast:
    """Hold how far steering moves each neuron while the same text is read.

    Attributes:
        rms: Root mean square over generated positions of unsteered minus steered activation,
            float64.
        mean: Mean of steered minus unsteered activation: which way.
        n_prompts: Answers read.
        n_tokens: Generated positions read.
        model: What ran.
    """

    rms: Float[Tensor, "layer d_mlp"]
    mean: Float[Tensor, "layer d_mlp"]
    n_prompts: int
    n_tokens: int
    model: ModelInfo

    def __repr__(self) -> str:
        layers, d_mlp = self.rms.shape
        return (
            f"ActivationContrast({layers} layers x {d_mlp} neurons, {self.n_prompts} answers, "
            f"{self.n_tokens} tokens)"
        )

    def ranked(self, n: int | None = None) -> list[Neuron]:
        """Rank neurons by root mean square, largest first; the first ``n``, or all."""
        d_mlp = self.rms.shape[1]
        order = self.rms.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return [(place // d_mlp, place % d_mlp) for place in order]

    def to_frame(self) -> pd.DataFrame:
        """Tabulate neurons, largest first: layer, neuron, rms, mean (steered minus unsteered)."""
        import pandas as pd

        layer, neuron = zip(*self.ranked(), strict=True)
        columns = {"layer": layer, "neuron": neuron}
        return pd.DataFrame(
            columns | {name: getattr(self, name)[layer, neuron].numpy() for name in ("rms", "mean")}
        )


@dataclass(frozen=True)
class PatchingEffect:
    """Hold how much of what steering does to answers some neurons carry.

    Attributes:
        name: Name of the set of neurons.
        direction: "sufficiency": the unsteered run was given the steered run's values. "necessity":
            the other way round.
        n_neurons: Size of the set.
        share: E[F(patched) - F(run)] / E[F(other run) - F(run)]: 1 where patching has the whole
            effect of the other run, 0 where it has none, with a paired bootstrap interval; without
            bounds where the steering itself has no clear effect on F.
        values: F of the patched answers, prompt by prompt (nan where unscored).
        answers: The patched answers.
    """

    name: str
    direction: str
    n_neurons: int
    share: Estimate
    values: tuple[float, ...]
    answers: tuple[Completion, ...]


@dataclass(frozen=True, eq=False)
class CopyNeurons:
    """Overwrite neurons of a batch's first half by those of its second: row i by row i + n.

    Attributes:
        patched: Neurons to overwrite, for each row of the first half.
    """

    patched: Bool[Tensor, "row d_mlp"]

    def __call__(
        self, activation: Float[Tensor, "two_rows pos d_mlp"]
    ) -> Float[Tensor, "two_rows pos d_mlp"]:
        """Return the batch with the first half's neurons overwritten, the second as it was."""
        receiver, donor = activation.chunk(2)
        return torch.cat(
            [torch.where(self.patched[:, None].to(activation.device), donor, receiver), donor]
        )

    @property
    def width(self) -> int:
        """Width of the activations it fits."""
        return self.patched.shape[-1]


def contrast_activations(
    model: HookedModel,
    completions: Sequence[Completion],
    interventions: Sequence[Intervention],
    *,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 16,
    transfer: bool = False,
) -> ActivationContrast:
    """Compare every neuron while unsteered answers are read with and without steering.

    The answers are given (teacher forcing), so both runs read the same tokens. They are halves of
    one batch, so a layer is compared as soon as it is computed: memory does not grow with prompts
    or layers.

    Args:
        model: A hooked model.
        completions: Answers of the unsteered model, from ``generate``; empty ones are left out.
        interventions: The steering.
        system_prompt: As it was when the answers were made.
        template_keywords: As they were when the answers were made.
        batch_size: Answers per pass.
        transfer: Allow vectors of another model of the same architecture.

    Raises:
        ValueError: If there is no steering or no answer, or an intervention does not fit.

    Source: activation contrasting of Chen et al. 2024 (arXiv:2406.14144), there between a base and
    an aligned model.
    """
    _check(model, interventions, transfer)
    acting = _before_the_last_neurons(model, interventions)
    answers = [completion for completion in completions if completion.tokens]
    if not answers:
        raise ValueError("no answers to contrast: give completions that hold tokens.")
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    encoded = encode(model, [answer.prompt for answer in answers], **asked_by)
    sums = _ContrastSums.of(model)
    with torch.no_grad():
        lengths = [len(answer.tokens) for answer in answers]
        widths = [(len(row.ids), n) for row, n in zip(encoded, lengths, strict=True)]
        alike = widths_to_keep_apart(model, widths)
        for batch in batches_by_length(lengths, batch_size, alike=alike):
            rows, texts = [encoded[i] for i in batch], [answers[i].tokens for i in batch]
            sums.add(model, rows, texts, acting, transfer)
    n_tokens = sum(len(answer.tokens) for answer in answers)
    rms, mean = (sums.squares / n_tokens).sqrt(), sums.differences / n_tokens
    return ActivationContrast(rms, mean, len(answers), n_tokens, model_info(model))


def patched_answers(
    model: HookedModel,
    prompts: PromptsLike,
    neurons: Mapping[str, Sequence[Neuron]],
    interventions: Sequence[Intervention],
    *,
    direction: Direction = "sufficiency",
    positions: Positions = "all",
    max_new_tokens: int = 48,
    batch_size: int = 48,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    transfer: bool = False,
) -> list[Completion]:
    """Write answers of one run whose neurons take, at every step, the other run's values.

    The other run reads the same text: every token the patched run writes is appended to both. Each
    has its own key-value cache; they are the two halves of one batch. Decoding is greedy.

    Args:
        model: A hooked model.
        prompts: What to answer.
        neurons: Name to neurons (layer, neuron); the sets share batches.
        interventions: The steering.
        direction: "sufficiency": the unsteered run is patched with the steered run's values.
            "necessity": the steered run is patched with the unsteered run's values.
        positions: Tokens at which neurons are overwritten.
        max_new_tokens: Length limit of an answer.
        batch_size: Answers per batch; the rows are twice as many.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        transfer: Allow vectors of another model of the same architecture.

    Returns:
        Answers set by set, prompts in order; the condition is the name of the set.

    Raises:
        ValueError: If there is no steering, a neuron does not exist, or an argument is out of
            range.

    Source: dynamic activation patching of Chen et al. 2024 (arXiv:2406.14144).
    """
    _check(model, interventions, transfer)
    prompts = as_prompts(prompts)
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; directions: {', '.join(DIRECTIONS)}.")
    if not prompts or not neurons or max_new_tokens < 1 or batch_size < 1:
        raise ValueError("give at least one prompt, one set of neurons, one token and one row.")
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords}
    encoded = encode(model, prompts, max_new_tokens=max_new_tokens, **asked_by)
    masks = torch.stack([_as_mask(model, members) for members in neurons.values()])
    is_necessity = direction == "necessity"
    loop = _PairLoop(model, interventions, is_necessity, positions, max_new_tokens, transfer)
    texts = loop.run_all(encoded, masks, batch_size)
    return [
        Completion(prompt, decode(model, tokens), tuple(tokens), finish, name)
        for name, of_set in zip(neurons, texts, strict=True)
        for prompt, (tokens, finish) in zip(prompts, of_set, strict=True)
    ]


def patching_effect(
    model: HookedModel,
    prompts: PromptsLike,
    neurons: Mapping[str, Sequence[Neuron]],
    interventions: Sequence[Intervention],
    score: Scorer,
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    positions: Positions = "all",
    max_new_tokens: int = 48,
    batch_size: int = 48,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    transfer: bool = False,
    seed: int = 0,
) -> list[PatchingEffect]:
    """Measure the share of the steering's effect on answers that sets of neurons carry.

    Args:
        model: A hooked model.
        prompts: What to answer.
        neurons: Name to neurons (layer, neuron); matched controls are sets of their own.
        interventions: The steering.
        score: F, a number for each answer.
        directions: Which of "sufficiency" and "necessity".
        positions: See ``patched_answers``.
        max_new_tokens: Length limit of an answer.
        batch_size: Answers per batch.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``Decoding``.
        transfer: Allow vectors of another model of the same architecture.
        seed: Seed of the bootstrap.

    Returns:
        One effect per direction and set.

    Raises:
        ValueError: As ``patched_answers``.
    """
    _check(model, interventions, transfer)
    prompts = as_prompts(prompts)
    asked_by: Any = {"system_prompt": system_prompt, "template_keywords": template_keywords or {}}
    decoding = Decoding(max_new_tokens=max_new_tokens, batch_size=2 * batch_size, **asked_by)
    options = asked_by | {
        "positions": positions,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "transfer": transfer,
    }
    runs = {"unsteered": [], "steered": list(interventions)}
    both = sweep(model, prompts, runs, decoding=decoding, transfer=transfer)
    unsteered, steered = _scored(score, both).reshape(2, -1)
    effects: list[PatchingEffect] = []
    for direction in directions:
        run, other = (unsteered, steered) if direction == "sufficiency" else (steered, unsteered)
        options["direction"] = direction
        answers = patched_answers(model, prompts, neurons, interventions, **options)
        scores = _scored(score, answers)
        effects += _effects(neurons, direction, answers, scores, run, other, seed)
    return effects


@dataclass(frozen=True, eq=False)
class _ContrastSums:
    """Sums, per layer and neuron, of steered minus unsteered activations and of their squares."""

    squares: Float[Tensor, "layer d_mlp"]
    differences: Float[Tensor, "layer d_mlp"]

    @classmethod
    def of(cls, model: HookedModel) -> _ContrastSums:
        """Begin with zeros."""
        shape = (len(sites_of_kind(model, "mlp_post")), model.cfg.d_mlp)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for _ in range(2)))

    def add(
        self,
        model: HookedModel,
        rows: Sequence[Encoded],
        texts: Sequence[Sequence[int]],
        interventions: Sequence[Intervention],
        transfer: bool,
    ) -> None:
        """Read a batch of prompts and answers, unsteered and steered, and add its differences."""
        device = input_device(model)
        tokens, mask, inside = _forced(model, rows, texts, device)

        def reader(layer: int) -> Callable[[Tensor], None]:
            def read(activation: Tensor) -> None:
                plain, steered = activation[:, -inside.shape[1] :].double().chunk(2)
                difference = (steered - plain)[inside.to(plain.device)]
                self.squares[layer] += (difference**2).sum(dim=0).cpu()
                self.differences[layer] += difference.sum(dim=0).cpu()

            return read

        n, prompt_length = len(rows), tokens.shape[1] - inside.shape[1]
        steering = [intervention.for_rows(range(n, 2 * n)) for intervention in interventions]
        readers = [
            (site.hook_name, reader(site.layer)) for site in sites_of_kind(model, "mlp_post")
        ]
        with (
            intervene(model, steering, prompt_length=prompt_length, transfer=transfer),
            reading(model, readers) as run,
        ):
            run(tokens.repeat(2, 1), mask.repeat(2, 1))


@dataclass(frozen=True, eq=False)
class _PairLoop:
    """Decode pairs of runs on one text, greedily.

    Rows [0, n) are patched and write the text, rows [n, 2n) give their values. This loop is apart
    from ``generation._decode_loop``: there each row writes a text of its own, here two rows read
    one, and a row that ends leaves together with its partner.
    """

    model: HookedModel
    interventions: Sequence[Intervention]
    patched_is_steered: bool
    positions: Positions
    max_new_tokens: int
    transfer: bool

    def run_all(
        self,
        encoded: Sequence[Encoded],
        masks: Bool[Tensor, "set layer d_mlp"],
        batch_size: int,
    ) -> list[list[tuple[list[int], _Finish]]]:
        """Write an answer for each set and prompt, longest prompts first, in batches."""
        pairs = [(i, row) for i in range(len(masks)) for row in range(len(encoded))]
        lengths = [len(encoded[row].ids) for _, row in pairs]
        texts: dict[tuple[int, int], tuple[list[int], _Finish]] = {}
        with torch.no_grad():
            alike = widths_to_keep_apart(self.model, lengths)
            for places in batches_by_length(lengths, batch_size, alike=alike):
                batch = [pairs[place] for place in places]
                rows, patched = [encoded[row] for _, row in batch], masks[[i for i, _ in batch]]
                texts |= zip(batch, self.run(rows, patched), strict=True)
        return [[texts[i, row] for row in range(len(encoded))] for i in range(len(masks))]

    def run(
        self, rows: Sequence[Encoded], patched: Bool[Tensor, "row layer d_mlp"]
    ) -> list[tuple[list[int], _Finish]]:
        """Return token ids and the way it ended, for each row."""
        n, device = len(rows), input_device(self.model)
        stops = torch.tensor(sorted(stop_ids(self.model)), device=device)
        batch = pad(rows, pad_id=pad_id(self.model), side="left", device=device)
        tokens, mask = batch.tokens.repeat(2, 1), batch.mask.repeat(2, 1)
        width, cache = mask.shape[1], None
        written = torch.zeros((n, 0), dtype=torch.long, device=device)
        alive = torch.arange(n, device=device)
        texts: list[list[int]] = [[] for _ in rows]
        finish: list[_Finish] = ["length"] * n
        while len(alive) and written.shape[1] < self.max_new_tokens:
            # the same pairs are decoded until one of them ends
            with self._paired(patched[alive.cpu()], prompt_length=width):
                ended = torch.zeros(len(alive), dtype=torch.bool, device=device)
                while written.shape[1] < self.max_new_tokens and not bool(ended.any()):
                    logits, cache = forward(self.model, tokens, mask, cache=cache, use_cache=True)
                    following = logits[: len(alive)].argmax(dim=-1)
                    self._check_finite(logits, [rows[i].prompt.id for i in alive.tolist()])
                    ended = torch.isin(following, stops)
                    written = torch.cat([written, following[:, None]], dim=1)
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                    both = following.repeat(2)[:, None]
                    tokens = both if cache is not None else torch.cat([tokens, both], dim=1)
            # pairs that ended are written down and dropped
            for place in ended.nonzero()[:, 0].tolist():
                texts[alive[place]], finish[alive[place]] = written[place, :-1].tolist(), "eos"
            keep = (~ended).nonzero()[:, 0]
            pairs = torch.cat([keep, keep + len(alive)])
            alive, written, tokens, mask = alive[keep], written[keep], tokens[pairs], mask[pairs]
            if cache is not None and len(keep):
                keep_rows(cache, pairs)
        for place, row in enumerate(alive.tolist()):
            texts[row] = written[place].tolist()
        return list(zip(texts, finish, strict=True))

    def _check_finite(
        self, logits: Float[Tensor, "two_rows d_vocab"], prompt_ids: Sequence[str]
    ) -> None:
        """Raise where a row of either half has logits that are not finite."""
        finite = logits.isfinite().all(dim=1).view(2, -1).all(dim=0)
        if not bool(finite.all()):
            prompt_id = prompt_ids[int((~finite).nonzero()[0])]
            raise ValueError(
                f"prompt {prompt_id!r}: numbers are infinite or undefined in "
                f"{model_info(self.model).dtype}; steer less, or load the model in float32 or "
                "bfloat16."
            )

    def _paired(
        self, patched: Bool[Tensor, "row layer d_mlp"], prompt_length: int
    ) -> AbstractContextManager[Any]:
        """Steer one half; then let the first half take over the second's patched neurons."""
        n = len(patched)
        steered = range(n) if self.patched_is_steered else range(n, 2 * n)
        copies = [
            Intervention(Site(layer, "mlp_post"), CopyNeurons(patched[:, layer]), self.positions)
            for layer in patched.any(dim=2).any(dim=0).nonzero()[:, 0].tolist()
        ]
        both = [*(intervention.for_rows(steered) for intervention in self.interventions), *copies]
        return intervene(self.model, both, prompt_length=prompt_length, transfer=self.transfer)


def _effects(
    neurons: Mapping[str, Sequence[Neuron]],
    direction: Direction,
    answers: Sequence[Completion],
    scores: Float[np.ndarray, " answer"],
    run: Float[np.ndarray, " prompt"],
    other: Float[np.ndarray, " prompt"],
    seed: int,
) -> list[PatchingEffect]:
    """Compare the patched answers, set by set, with the scores of both runs."""
    n, effects = len(run), []
    for place, (name, members) in enumerate(neurons.items()):
        rows = slice(place * n, (place + 1) * n)
        share = ratio_of_means(scores[rows] - run, other - run, seed=seed)
        values, of_set = tuple(scores[rows].tolist()), tuple(answers[rows])
        effects.append(PatchingEffect(name, direction, len(set(members)), share, values, of_set))
    return effects


def _scored(score: Scorer, answers: Sequence[Completion]) -> Float[np.ndarray, " answer"]:
    """Score answers, nan where unscored."""
    questions, texts = [answer.prompt.text for answer in answers], [a.text for a in answers]
    return to_floats(score(questions, texts), "scores")


def _forced(
    model: HookedModel,
    rows: Sequence[Encoded],
    texts: Sequence[Sequence[int]],
    device: torch.device,
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"], Bool[Tensor, "row new"]]:
    """Pad prompts on the left and answers on the right, so that answers begin in one column.

    Returns:
        Tokens, mask, and where the answers are among the columns behind the prompts.
    """
    fill = pad_id(model)
    prompts = pad(rows, pad_id=fill, side="left", device=device)
    replies = [
        dataclasses.replace(row, ids=tuple(text)) for row, text in zip(rows, texts, strict=True)
    ]
    answers = pad(replies, pad_id=fill, side="right", device=device)
    tokens = torch.cat([prompts.tokens, answers.tokens], dim=1)
    return tokens, torch.cat([prompts.mask, answers.mask], dim=1), answers.mask


def _as_mask(model: HookedModel, neurons: Sequence[Neuron]) -> Bool[Tensor, "layer d_mlp"]:
    """Mark neurons in a mask of all of them; raise where one does not exist."""
    n_layers, d_mlp = model.cfg.n_layers, model.cfg.d_mlp
    mask = torch.zeros(n_layers, d_mlp, dtype=torch.bool)
    for layer, neuron in neurons:
        if not (0 <= layer < n_layers and 0 <= neuron < d_mlp):
            raise ValueError(
                f"no neuron ({layer}, {neuron}): the model has {n_layers} layers of {d_mlp}, "
                "counted from 0."
            )
        mask[layer, neuron] = True
    return mask


def _before_the_last_neurons(
    model: HookedModel, interventions: Sequence[Intervention]
) -> list[Intervention]:
    """Keep the interventions that can move a neuron: not those behind the last layer's."""
    behind = [Site(model.cfg.n_layers - 1, kind) for kind in ("mlp_out", "resid_post")]
    acting = [i for i in interventions if i.site not in behind]
    if not acting:
        raise ValueError(
            f"steering at {interventions[0].site} comes after the last neurons, so that none "
            "can move; steer at an earlier layer."
        )
    return acting


def _check(model: HookedModel, interventions: Sequence[Intervention], transfer: bool) -> None:
    """Raise unless there is steering that applies to a whole run and fits the model."""
    if not interventions:
        raise ValueError("no steering: give the interventions that make the two runs differ.")
    if any(intervention.rows is not None for intervention in interventions):
        raise ValueError(
            "steering for patching applies to a whole run: give interventions without rows."
        )
    check_interventions(model, interventions, transfer=transfer)
