"""Do each work with plain PyTorch and transformers, as one would without any library.

Nothing of workbench is imported here: environments of peers do not have it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

Rows = list[tuple[list[int], list[int]]]
"""Token ids of a prompt, and where that which is read begins and ends."""


Values = dict[Any, torch.Tensor]
"""Kind and layer to a row per prompt."""


KINDS = ("attn_out", "resid_post", "mlp_post")
"""What attention writes, the residual stream behind a layer, and the neurons."""


class Batch(NamedTuple):
    """Padded rows: their tokens, mask, spans and places."""

    tokens: torch.Tensor
    mask: torch.Tensor
    spans: list[list[int]]
    places: list[int]


def batches_of(rows: Rows, size: int, device: Any = "cpu") -> Iterator[Batch]:
    """Cut rows, longest first, into batches padded on the right."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = max(len(rows[i][0]) for i in places)
        tokens = torch.zeros(len(places), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, i in enumerate(places):
            ids = torch.tensor(rows[i][0])
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        yield Batch(tokens.to(device), mask.to(device), [rows[i][1] for i in places], places)


class Means:
    """Averages activations over the span of each row, batch by batch."""

    def __init__(self) -> None:
        self._rows: dict[Any, dict[int, torch.Tensor]] = {}
        self.batch: Batch | None = None

    def keep(self, kind: str, layer: int, value: Any) -> None:
        """Average one batch's activations at one place of the model."""
        assert self.batch is not None
        value = value[0] if isinstance(value, tuple) else value
        rows = self._rows.setdefault((kind, layer), {})
        for row, (place, (a, b)) in enumerate(
            zip(self.batch.places, self.batch.spans, strict=True)
        ):
            rows[place] = value[row, a:b].mean(dim=0)

    def values(self) -> Values:
        """Give a row per prompt at each place, in order of the prompts."""
        return {
            key: torch.stack([rows[place] for place in range(len(rows))])
            for key, rows in self._rows.items()
        }


@contextmanager
def reading(
    model: Any, kinds: Collection[str], layers: Iterable[int], means: Means
) -> Iterator[None]:
    """Set hooks that read kinds of activation in some layers of a Llama-like model."""
    handles = []

    def behind(module: Any, kind: str, layer: int) -> None:
        handles.append(
            module.register_forward_hook(lambda _m, _a, out: means.keep(kind, layer, out))
        )

    def before(module: Any, kind: str, layer: int) -> None:
        handles.append(
            module.register_forward_pre_hook(lambda _m, args: means.keep(kind, layer, args[0]))
        )

    try:
        for layer in layers:
            block = model.model.layers[layer]
            if "attn_out" in kinds:
                behind(block.self_attn, "attn_out", layer)
            if "resid_post" in kinds:
                behind(block, "resid_post", layer)
            if "mlp_post" in kinds:
                before(block.mlp.down_proj, "mlp_post", layer)
            if "z" in kinds:
                before(block.self_attn.o_proj, "z", layer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def extraction(
    model: Any,
    rows: Rows,
    kinds: Collection[str] = KINDS,
    layers: Sequence[int] | None = None,
    size: int = 32,
) -> Values:
    """Average layers' activations over a span, with hooks and without the head."""
    means = Means()
    layers = range(len(model.model.layers)) if layers is None else layers
    with torch.no_grad(), reading(model, kinds, layers, means):
        for batch in batches_of(rows, size, model.device):
            means.batch = batch
            model.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    return means.values()


def generation(model: Any, ids: Sequence[Sequence[int]], n_new: int, pad: int) -> list[list[int]]:
    """Answer greedily in one left-padded batch with Hugging Face's generate.

    Each answer's tokens go up to its end.
    """
    width = max(map(len, ids))
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    out = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=n_new,
        do_sample=False,
        pad_token_id=pad,
    )
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    answers = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers


@contextmanager
def pushed(
    model: Any, layer: int, push: torch.Tensor, starts: Sequence[int] | None = None
) -> Iterator[None]:
    """Add a vector to a layer's output with a forward hook.

    Args:
        model: A Llama-like model of transformers.
        layer: Whose output.
        push: What is added.
        starts: Column from which on each row of a prompt gets it; all columns where it is None.
            Single tokens always get it: they are of answers.
    """
    push = push.to(model.device, model.dtype)

    def add(_module: Any, _args: Any, out: Any) -> Any:
        states = out[0] if isinstance(out, tuple) else out
        if starts is None or states.shape[1] == 1:
            moved = states + push
        else:
            columns = torch.arange(states.shape[1], device=states.device)
            first = torch.tensor(starts, device=states.device)[:, None]
            moved = torch.where((columns >= first)[..., None], states + push, states)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = model.model.layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def attribution(
    model: Any, unsafe: Rows, safe: Rows, layer: int, direction: torch.Tensor
) -> Values:
    """Split a difference of means along a direction into heads and neurons.

    Returns:
        What each head and each neuron up to the layer adds, a row per layer.
    """
    means = Means()
    with torch.no_grad(), reading(model, ("z", "mlp_post"), range(layer + 1), means):
        for batch in batches_of([*unsafe, *safe], 32, model.device):
            means.batch = batch
            model.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    values, u = means.values(), direction.double() / direction.double().norm()
    heads, neurons = [], []
    for n, block in enumerate(model.model.layers[: layer + 1]):
        for kind, module, parts in (
            ("z", block.self_attn.o_proj, heads),
            ("mlp_post", block.mlp.down_proj, neurons),
        ):
            rows = values[kind, n].double().cpu()
            difference = rows[: len(unsafe)].mean(dim=0) - rows[len(unsafe) :].mean(dim=0)
            parts.append((u @ module.weight.double().cpu()) * difference)
    n_heads = model.config.num_attention_heads
    return {
        "heads": torch.stack([row.reshape(n_heads, -1).sum(dim=1) for row in heads]),
        "neurons": torch.stack(neurons),
    }


def scoring(model: Any, rows: Rows, layer: int, size: int = 16) -> Values:
    """Read answers behind their prompts, in batches: log-probabilities and hidden states.

    Args:
        model: A causal language model of transformers.
        rows: Tokens of prompt and answer, and where the answer begins and ends.
        layer: The hidden states behind it are averaged over the answer.
        size: Rows per batch.

    Returns:
        "log_probs", one after the other, and "states", a row per answer.
    """
    means, log_probs = Means(), {}
    with torch.no_grad(), reading(model, ("resid_post",), [layer], means):
        for batch in batches_of(rows, size, model.device):
            means.batch = batch
            logits = model(
                input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False
            ).logits
            for row, (place, (a, b)) in enumerate(zip(batch.places, batch.spans, strict=True)):
                told = logits[row, a - 1 : b - 1].float().log_softmax(dim=-1)
                log_probs[place] = told.gather(1, batch.tokens[row, a:b, None])[:, 0]
    return {
        "log_probs": torch.cat([log_probs[place] for place in range(len(rows))]),
        "states": means.values()["resid_post", layer],
    }
