"""Read the activations of prompts at sites, pooled over a span of tokens.

One forward pass serves all sites; results are kept on disk where that is asked for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from workbench.files.store import PathLike, key_of, local_path
from workbench.models.batches import (
    batches_under_budget,
    order_by_length,
    pad,
    share_prefix,
    span_mask,
)
from workbench.models.elsewhere import carried
from workbench.models.finite import check_finite, not_finite
from workbench.models.forward import forward, reading
from workbench.models.hooked_model import input_device
from workbench.models.load import ModelInfo, model_info
from workbench.models.progress import progress_bar
from workbench.models.site_names import SitesLike, as_sites
from workbench.models.sites import Site, check_sites
from workbench.models.stored_rows import ShardFolder, StoredRows
from workbench.models.templates import Keywords, asked_as, asked_by
from workbench.models.tokens import SPANS, Encoded, encode, pad_id, template_text
from workbench.models.trusted_paths import trusts
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import Prompt, prompts_key, select_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike

    PooledBatches = Callable[
        [Sequence[Encoded], Sequence["Site"], str, int, int],
        Iterator[tuple[Sequence[Encoded], dict["Site", Float[Tensor, "batch d"]]]],
    ]


SHARD = 256
"""Largest number of prompts per shard on disk: what an interruption can lose."""


SHARD_BYTES = 256 * 2**20
"""Values of one shard, which are in memory until they are written: a wide model's have fewer rows,
but a batch at least."""


PIECE = 256
"""Rows that are brought into memory at a time where a set is read in pieces."""


class Reader(Protocol):
    """Run prompts elsewhere and pool their activations: what an engine gives to the functions here.

    Attributes:
        name: Of the engine; a measurement on disk is told by it.
    """

    name: str

    def pooled(
        self,
        encoded: Sequence[Encoded],
        sites: Sequence[Site],
        span: str,
        batch_size: int,
        max_tokens: int,
    ) -> Iterator[tuple[Sequence[Encoded], dict[Site, Float[Tensor, "batch d"]]]]:
        """Give rows in their order with the span means at every site, as ``pooled_batches``."""


class _Values:
    """Let the values of a set be in memory or on disk: these are read when they are asked for."""

    def __get__(self, owner: Any, _: Any = None) -> Tensor:
        if owner is None:
            raise AttributeError("values has no default")
        held = owner.__dict__["values"]
        return held.read() if isinstance(held, StoredRows) else held

    def __set__(self, owner: Any, held: Tensor | StoredRows) -> None:
        owner.__dict__["values"] = held


@dataclass(frozen=True, eq=False)
class ActivationSet:
    """Pooled activations of prompts at one site.

    Attributes:
        site: Where they were read.
        values: Mean over the span's tokens, float32 on the CPU; one row per prompt. At ``z`` the
            heads are laid side by side. Of a set that is kept in a store they are read anew each
            time; ``rows``, ``pieces`` and ``mean`` read less at a time.
        prompts: What was run, row by row.
        span: Which tokens were pooled.
        model: What ran.
        asked_as: System prompt and template keywords around the prompts (``asked_by`` reads them);
            empty where all was as the template has it.
    """

    site: Site
    if TYPE_CHECKING:
        values: Float[Tensor, "prompt d"]
    else:
        values: Float[Tensor, "prompt d"] = _Values()
    prompts: tuple[Prompt, ...]
    span: str
    model: ModelInfo
    asked_as: str = ""

    def __repr__(self) -> str:
        n, d = self.__dict__["values"].shape
        read = f"span={self.span!r}, model={self.model.name!r}"
        return f"ActivationSet({self.site}, {n} prompts x {d}, {read})"

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Sequence[int]) -> Float[Tensor, "row d"]:
        """Give the values of some rows, in the order given; no others are read from a store."""
        held = self.__dict__["values"]
        return held.at(rows).read() if isinstance(held, StoredRows) else held[list(rows)]

    def pieces(self, rows: Sequence[int] | None = None) -> Iterator[Float[Tensor, "row d"]]:
        """Give the values of some rows, or all, piece by piece.

        Args:
            rows: Which rows, in which order; all of them by default.
        """
        rows = range(len(self)) if rows is None else rows
        for start in range(0, len(rows), PIECE):
            yield self.rows(rows[start : start + PIECE])

    def mean(self, rows: Sequence[int] | None = None) -> Float[Tensor, " d"]:
        """Compute the mean of some rows, or of all, in float64, with one piece in memory.

        Args:
            rows: Which rows; all of them by default.

        Raises:
            ValueError: If there are none.
        """
        n = len(self) if rows is None else len(rows)
        if not n:
            raise ValueError(f"a mean of no rows of {self!r}; give at least one.")
        sums = [piece.double().sum(dim=0) for piece in self.pieces(rows)]
        return torch.stack(sums).sum(dim=0) / n

    def mean_norm(self) -> float:
        """Compute the mean L2 norm of the rows, in float64, with one piece in memory."""
        norms = [piece.double().norm(dim=1) for piece in self.pieces()]
        return float(torch.cat(norms).mean())

    def select(
        self,
        *,
        category: str | Iterable[str] | None = None,
        label: str | Iterable[str] | None = None,
    ) -> ActivationSet:
        """Take the rows of prompts of a category and a label, in order.

        Raises:
            ValueError: If there are none.
        """
        return self.of(select_prompts(self.prompts, category=category, label=label))

    def of(self, prompts: PromptsLike) -> ActivationSet:
        """Take the rows of the given prompts, in their order.

        Raises:
            ValueError: If a prompt was not run, or with another text.
        """
        prompts = as_prompts(prompts)
        row_of = {prompt.id: row for row, prompt in enumerate(self.prompts)}
        for prompt in prompts:
            if prompt.id not in row_of:
                raise ValueError(
                    f"no activations of prompt {prompt.id!r} at {self.site}; cache it first."
                )
            ran = self.prompts[row_of[prompt.id]]
            if (ran.text, ran.history) != (prompt.text, prompt.history) or (
                self.span == "response" and ran.response != prompt.response
            ):
                raise ValueError(
                    f"prompt {prompt.id!r} was run at {self.site} with another text; cache it "
                    "again."
                )
        held, rows = self.__dict__["values"], [row_of[prompt.id] for prompt in prompts]
        values: Any = held.at(rows) if isinstance(held, StoredRows) else held[rows]
        return replace(self, values=values, prompts=tuple(prompts))


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Mean and variance of the activations of each class, computed from a stream of prompts.

    Memory does not grow with the number of prompts.

    Attributes:
        site: Where they were read.
        classes: (category, label) of each row.
        n: Prompts per class.
        mean: Mean per class, float64.
        variance: Sample variance per class (n - 1), float64; zero where n is 1.
        span: Which tokens were pooled.
        model: What ran.
    """

    site: Site
    classes: tuple[tuple[str, str], ...]
    n: Int[Tensor, " class"]
    mean: Float[Tensor, "class d"]
    variance: Float[Tensor, "class d"]
    span: str
    model: ModelInfo


@carried
def cache_activations(
    model: HookedModel,
    prompts: PromptsLike,
    sites: SitesLike,
    *,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 32,
    max_tokens: int = 4096,
    store: PathLike | None = None,
    progress: bool = False,
    reader: Reader | None = None,
) -> dict[Site, ActivationSet]:
    """Run prompts once and keep their pooled activations at all sites.

    Prompts are sorted by length and batched under a token budget; their common prefix is computed
    once, logits never, and no layer above the last site runs.

    Args:
        model: A hooked model.
        prompts: What to run, as ``as_prompts`` reads it. With span "response" each prompt's
            response is run behind it, teacher-forced.
        sites: One or several, also as TransformerLens's ``names_filter``, see ``as_sites``.
        span: "content" (the user's words), "response", "last" (the token before the answer), or
            "all" (BOS and template too: the first token's massive activation dominates many means).
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``template_text``.
        batch_size: Largest number of rows per batch.
        max_tokens: Largest number of tokens per batch, padding included.
        store: Folder for shards on disk, where values stay until they are asked for. The same call
            finds them again; an interrupted one goes on; a damaged shard is redone.
        progress: Show a progress bar.
        reader: What runs the prompts, where that is another engine than this process.

    Returns:
        One ``ActivationSet`` per site, rows in the order of ``prompts``.

    Raises:
        ValueError: If a site, span or prompt does not fit the model.
    """
    prompts, sites = as_prompts(prompts), as_sites(model, sites)
    asked = asked_as(system_prompt, template_keywords)
    encoded, info = _prepare(model, prompts, sites, span, asked)
    order = order_by_length([len(row.ids) for row in encoded])
    size, shards, held = _rows_per_shard(model, sites), None, _Gathered(len(order), sites)
    pooled = _pooled_by(model, reader)
    if store is not None:
        what = _measurement(model, encoded, sites, span, asked, reader)
        shards = ShardFolder.open(local_path(store), what, [p.id for p in prompts])
    bar = progress_bar(len(prompts), "activations", "prompt", show=progress)
    for number, start in enumerate(range(0, len(order), size)):
        places = order[start : start + size]
        rows = [encoded[i] for i in places]
        pool = partial(_pool, pooled, rows, sites, span, batch_size, max_tokens, bar)
        held.put(places, pool()) if shards is None else shards.ensure(number, pool)
        bar.update(start + len(rows) - bar.n)  # counts those that are on disk already too
    bar.close()
    values: Any = held.values if shards is None else shards.rows(sites, order)
    return {s: ActivationSet(s, values[s], tuple(prompts), span, info, asked) for s in sites}


@carried
def class_moments(
    model: HookedModel,
    prompts: PromptsLike,
    sites: SitesLike,
    *,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 32,
    max_tokens: int = 4096,
    progress: bool = False,
    reader: Reader | None = None,
) -> dict[Site, ClassMoments]:
    """Run prompts once and keep only mean and variance of each (category, label).

    This is for sets too large to hold. A prompt of several categories counts in each. Arguments
    are those of ``cache_activations``. Batches are merged in float64 by the pairwise update of Chan
    et al. (1979).

    Returns:
        One ``ClassMoments`` per site.
    """
    prompts, sites = as_prompts(prompts), as_sites(model, sites)
    asked = asked_as(system_prompt, template_keywords)
    encoded, info = _prepare(model, prompts, sites, span, asked)
    encoded = [encoded[i] for i in order_by_length([len(row.ids) for row in encoded])]
    classes = tuple(sorted({(name, p.label) for p in prompts for name in p.categories}))
    n = torch.zeros(len(classes), dtype=torch.long)
    mean: dict[Site, Tensor] = {}
    squares: dict[Site, Tensor] = {}  # sums of squared deviations from the mean
    bar = progress_bar(len(prompts), "moments", "prompt", show=progress)
    batches = _pooled_by(model, reader)
    for rows, pooled in batches(encoded, sites, span, batch_size, max_tokens):
        row_of, class_of_row = _members([row.prompt for row in rows], classes)
        member = torch.nn.functional.one_hot(class_of_row, len(classes)).double()
        added = member.sum(dim=0)
        total = (n + added).clamp(min=1)
        for site in sites:
            values = pooled[site].cpu().double()[row_of]
            if site not in mean:
                mean[site] = torch.zeros(len(classes), values.shape[1], dtype=torch.float64)
                squares[site] = torch.zeros_like(mean[site])
            batch_mean = (member.T @ values) / added.clamp(min=1)[:, None]
            batch_squares = member.T @ (values - batch_mean[class_of_row]) ** 2
            delta = torch.where(added[:, None] > 0, batch_mean - mean[site], 0.0)
            squares[site] += batch_squares + delta**2 * (n * added / total)[:, None]
            mean[site] += delta * (added / total)[:, None]
        n += added.long()
        bar.update(len(rows))
    bar.close()
    return {
        site: ClassMoments(
            site, classes, n, mean[site], squares[site] / (n - 1).clamp(min=1)[:, None], span, info
        )
        for site in sites
    }


def _members(
    prompts: Sequence[Prompt], classes: Sequence[tuple[str, str]]
) -> tuple[Int[Tensor, " member"], Int[Tensor, " member"]]:
    """Pair each prompt's row with every class that it is in: rows, and classes."""
    places = [(i, (name, p.label)) for i, p in enumerate(prompts) for name in p.categories]
    rows = torch.tensor([i for i, _ in places])
    return rows, torch.tensor([classes.index(in_class) for _, in_class in places])


def computed_sites(model: HookedModel, sites: Sequence[Site], prompt: Prompt) -> list[Site]:
    """Keep the sites that a model really computes while it reads a prompt.

    An architecture may have a hook point that its forward pass never comes by, in some layers or
    in all of them.
    """
    [row] = encode(model, [prompt])
    batch = pad([row], pad_id=pad_id(model), side="right", device=input_device(model))
    seen: set[Site] = set()

    def hook_of(site: Site) -> Callable[..., None]:
        def hook(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 - passed by their names
            seen.add(site)

        return hook

    hooks = [(site.hook_name, hook_of(site)) for site in sites]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        forward(model, batch.tokens, batch.mask)
    return [site for site in sites if site in seen]


def token_activations(
    model: HookedModel,
    prompt: PromptsLike,
    site: Site | str,
    *,
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
) -> tuple[Encoded, Float[Tensor, "pos d"]]:
    """Read the activations of one prompt, or of one text, token by token, for views.

    The site may be given by the name of its hook point.

    Returns:
        The tokens (with the response, if the prompt has one) and one row per token.
    """
    (site,) = as_sites(model, [site])
    prompts = as_prompts(prompt)
    if len(prompts) != 1:
        raise ValueError(f"one prompt is shown at a time, got {len(prompts)}.")
    [row] = encode(
        model,
        prompts,
        with_response=bool(prompts[0].response),
        system_prompt=system_prompt,
        template_keywords=template_keywords,
    )
    batch = pad([row], pad_id=pad_id(model), side="right", device=input_device(model))
    activations: list[Tensor] = []

    def read(activation: Tensor) -> None:
        activations.append(activation.flatten(2)[0].float().cpu())

    with torch.no_grad(), reading(model, [(site.hook_name, read)]) as run:
        run(batch.tokens, batch.mask)
    check_finite(model, activations[0][None], [prompts[0].id], batch.tokens, batch.mask)
    return row, activations[0].clone()


def pooled_batches(
    model: HookedModel,
    encoded: Sequence[Encoded],
    sites: Sequence[Site],
    span: str,
    batch_size: int,
    max_tokens: int,
    seen_as: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Sequence[Encoded], dict[Site, Float[Tensor, "batch d"]]]]:
    """Run rows in their order, and give batch by batch the span means at every site.

    What comes after a row's span is not run: no earlier token sees it.

    ``seen_as`` makes something else of each token's activation, (row, position, width) in float32,
    before the mean is taken.

    Raises:
        ValueError: If an activation is infinite or undefined.
    """
    if batch_size < 1 or max_tokens < 1:
        raise ValueError(
            f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}."
        )
    device = input_device(model)
    encoded = [dataclasses.replace(row, ids=row.ids[: row.span(span)[1]]) for row in encoded]
    # Set for each batch before the hooks read them: the columns that hold a token of a span, and
    # the share of each token in its row's mean.
    columns: slice
    weights: Tensor
    pooled: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            inside = activation.flatten(2)[:, columns].float()
            inside = inside if seen_as is None else seen_as(inside)
            pooled[site] = torch.bmm(weights[:, None].to(inside.device), inside)[:, 0]

        return read

    with torch.no_grad():
        prefix = share_prefix(model, encoded, keep=lambda row: row.span(span)[0])
        mixed = trusts(model, "right_padding")
        with reading(model, [(site.hook_name, reader(site)) for site in sites]) as run:
            for rows in batches_under_budget(encoded, batch_size, max_tokens, mixed=mixed):
                batch = pad(rows, pad_id=pad_id(model), side="right", device=device)
                inside = span_mask(rows, batch, span)[:, prefix.length :]
                used = inside.any(dim=0).nonzero()
                columns = slice(int(used[0]), int(used[-1]) + 1)
                inside = inside[:, columns]
                weights = inside.float() / inside.sum(dim=1, keepdim=True)
                run(batch.tokens[:, prefix.length :], batch.mask, prefix.for_rows(len(rows)))
                finite = torch.stack([values.isfinite().all(dim=1) for values in pooled.values()])
                if not bool(finite.all()):
                    break
                yield rows, dict(pooled)
            else:
                return
    # Outside ``reading``, which ends every pass at its last site.
    row = int((~finite.all(dim=0)).nonzero()[0])
    raise not_finite(model, rows[row].prompt.id, batch.tokens, batch.mask, row)


def _pooled_by(model: HookedModel, reader: Reader | None) -> PooledBatches:
    """Say what runs rows and pools them: the model in this process, unless there is a reader."""
    return partial(pooled_batches, model) if reader is None else reader.pooled


def _measurement(
    model: HookedModel,
    encoded: Sequence[Encoded],
    sites: Sequence[Site],
    span: str,
    asked: str,
    reader: Reader | None,
) -> dict[str, Any]:
    """Describe a measurement by all that its values depend on."""
    return {
        "model": model_info(model).to_dict(),
        "template": template_text(model, **asked_by(asked)),
        "prompts": prompts_key([row.prompt for row in encoded]),
        # Tells tokenizers of one model apart.
        "tokens": key_of([[row.ids, row.span(span)] for row in encoded]),
        "span": span,
        "sites": [str(site) for site in sites],
        "shard": _rows_per_shard(model, sites),
        **({} if reader is None else {"engine": reader.name}),
    }


def _rows_per_shard(model: HookedModel, sites: Sequence[Site]) -> int:
    """Choose how many prompts a shard holds, by the width of the model at the sites."""
    cfg = model.cfg
    widths = {"mlp_post": int(cfg.d_mlp or 0), "z": cfg.n_heads * cfg.d_head}
    n_bytes = 4 * sum(widths.get(site.kind, cfg.d_model) for site in sites)
    return min(SHARD, max(32, SHARD_BYTES // max(1, n_bytes)))


class _Gathered:
    """Put pooled rows where they belong, in memory that is taken once."""

    def __init__(self, n: int, sites: Sequence[Site]) -> None:
        self.n, self.sites = n, sites
        self.values: dict[Site, Tensor] = {}

    def put(self, rows: Sequence[int], pooled: dict[str, Float[Tensor, "row d"]]) -> None:
        """Take the values of some rows at every site."""
        for site in self.sites:
            of_site = pooled.pop(str(site))
            if site not in self.values:
                self.values[site] = torch.empty(self.n, of_site.shape[1])
            self.values[site][torch.tensor(rows)] = of_site


def _pool(
    pooled_of: PooledBatches,
    rows: Sequence[Encoded],
    sites: Sequence[Site],
    span: str,
    batch_size: int,
    max_tokens: int,
    bar: Any,
) -> dict[str, Float[Tensor, "row d"]]:
    """Pool rows at every site, in their order, on the CPU; the sites as they print."""
    gathered, start = _Gathered(len(rows), sites), 0
    for batch, pooled in pooled_of(rows, sites, span, batch_size, max_tokens):
        places = range(start, start + len(batch))
        gathered.put(places, {str(site): pooled[site].cpu() for site in sites})
        start += len(batch)
        bar.update(len(batch))
    return {str(site): values for site, values in gathered.values.items()}


def _prepare(
    model: HookedModel,
    prompts: Sequence[Prompt],
    sites: Sequence[Site],
    span: str,
    asked: str,
) -> tuple[list[Encoded], ModelInfo]:
    if not prompts or not sites:
        raise ValueError("nothing to run: give at least one prompt and one site.")
    if span not in SPANS:
        raise ValueError(f"unknown span {span!r}; spans: {', '.join(SPANS)}.")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(prompt_id for prompt_id in ids if ids.count(prompt_id) > 1)
        raise ValueError(f"prompt {twice!r} comes twice; ids must be unique in a set.")
    check_sites(model, sites)
    encoded = encode(model, prompts, with_response=span == "response", **asked_by(asked))
    for row in encoded:
        row.span(span)
    return encoded, model_info(model)
