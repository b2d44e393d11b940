"""Activations of prompts at sites, pooled over a span of tokens: one forward pass for all sites, kept on disk when asked."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.files.store import (
    PathLike,
    file_checksum,
    key_of,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from workbench.models.forward import (
    has_key_value_cache,
    prefix_cache,
    reading,
    rows_of_cache,
    shared_prefix_length,
)
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import Site, check_sites
from workbench.models.tokens import SPANS, Encoded, encode, pad, pad_id, span_mask, template_text
from workbench.prompts.prompt import Prompt, prompts_key, select_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from workbench.models.load import HookedModel


SHARD = 256
"""Prompts a shard on disk: what an interruption can lose."""


@dataclass(frozen=True, eq=False)
class ActivationSet:
    """Pooled activations of prompts at one site.

    Attributes:
        site: Where they were read.
        values: Mean over the span's tokens, float32 on the CPU; one row a prompt. At ``z`` the heads are laid side by side.
        prompts: What was run, row by row.
        span: Which tokens were pooled.
        model: What ran.
    """

    site: Site
    values: Float[Tensor, "prompt d"]
    prompts: tuple[Prompt, ...]
    span: str
    model: ModelInfo

    def __repr__(self) -> str:
        n, d = self.values.shape
        return f"ActivationSet({self.site}, {n} prompts x {d}, span={self.span!r}, model={self.model.name!r})"

    def __len__(self) -> int:
        return len(self.prompts)

    def select(
        self,
        *,
        category: str | Iterable[str] | None = None,
        label: str | Iterable[str] | None = None,
    ) -> ActivationSet:
        """The rows of prompts of a category and a label, in order.

        Raises:
            ValueError: If there are none.
        """
        return self.of(select_prompts(self.prompts, category=category, label=label))

    def of(self, prompts: Sequence[Prompt]) -> ActivationSet:
        """The rows of the given prompts, in their order.

        Raises:
            ValueError: If a prompt was not run, or with another text.
        """
        row = {prompt.id: i for i, prompt in enumerate(self.prompts)}
        for prompt in prompts:
            if prompt.id not in row:
                raise ValueError(
                    f"no activations of prompt {prompt.id!r} at {self.site}; cache it first."
                )
            ran = self.prompts[row[prompt.id]]
            if ran.text != prompt.text or (
                self.span == "response" and ran.response != prompt.response
            ):
                raise ValueError(
                    f"prompt {prompt.id!r} was run at {self.site} with another text; cache it again."
                )
        return replace(
            self, values=self.values[[row[prompt.id] for prompt in prompts]], prompts=tuple(prompts)
        )


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Mean and variance of activations a class, from a stream: memory does not grow with the number of prompts.

    Attributes:
        site: Where they were read.
        classes: (category, label) of each row.
        n: Prompts a class.
        mean: Mean a class, float64.
        variance: Sample variance a class (n - 1), float64; zero where n is 1.
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


def cache_activations(
    model: HookedModel,
    prompts: Sequence[Prompt],
    sites: Sequence[Site] | Site,
    *,
    span: str = "content",
    system_prompt: str | None = None,
    batch_size: int = 32,
    max_tokens: int = 4096,
    store: PathLike | None = None,
    progress: bool = False,
) -> dict[Site, ActivationSet]:
    """Run prompts once and keep their pooled activations at all sites.

    Prompts are sorted by length and batched under a token budget; the chat template's common prefix is computed once, logits never,
    and no layer above the last site runs.

    Args:
        model: A hooked model.
        prompts: What to run. With span "response" each prompt's response is run behind it, teacher-forced.
        sites: One site or several.
        span: "content" (the user's words), "response", "last" (the token before the answer), or "all" (BOS and template included: the
            first token's massive activation then dominates many means).
        system_prompt: Words for the system turn.
        batch_size: Rows a batch, at most.
        max_tokens: Tokens a batch, padding included, at most.
        store: Folder for shards on disk. The same call reads them back; an interrupted one goes on where it was; other prompts, sites,
            spans or models get a place of their own; a damaged shard is computed again.
        progress: Show a progress bar.

    Returns:
        One ``ActivationSet`` a site, rows in the order of ``prompts``.

    Raises:
        ValueError: If a site, span or prompt does not fit the model.
    """
    sites = (sites,) if isinstance(sites, Site) else tuple(dict.fromkeys(sites))
    encoded, info = _prepare(model, prompts, sites, span, system_prompt)
    order = sorted(
        range(len(encoded)), key=lambda i: -len(encoded[i].ids)
    )  # longest first: memory trouble shows at once
    shards = [order[i : i + SHARD] for i in range(0, len(order), SHARD)]
    folder: Path | None = None
    manifest: dict[str, Any] = {}
    if store is not None:
        what = {
            "model": info.to_dict(),
            "template": template_text(model, system_prompt),
            "prompts": prompts_key(prompts),
            "tokens": key_of(
                [[row.ids, row.span(span)] for row in encoded]
            ),  # tells tokenizers of one model apart
            "span": span,
            "sites": [str(site) for site in sites],
            "shard": SHARD,
        }
        folder, manifest = _open_store(Path(store), what, [prompt.id for prompt in prompts])

    bar = _progress_bar(len(prompts), "activations", progress)
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for number, shard in enumerate(shards):
        values = _read_shard(folder, manifest, number) if folder is not None else None
        if values is None:
            columns: dict[Site, list[Tensor]] = {site: [] for site in sites}
            for _, pooled in pooled_batches(
                model, [encoded[i] for i in shard], sites, span, batch_size, max_tokens
            ):
                for site in sites:
                    columns[site].append(pooled[site].cpu())
                bar.update(len(pooled[sites[0]]))
            values = {str(site): torch.cat(columns[site]) for site in sites}
            if folder is not None:
                _write_shard(folder, manifest, number, values)
        else:
            bar.update(len(shard))
        for site in sites:
            parts[site].append(values[str(site)])
    bar.close()
    inverse = torch.empty(len(order), dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    return {
        site: ActivationSet(site, torch.cat(parts.pop(site))[inverse], tuple(prompts), span, info)
        for site in list(parts)
    }


def class_moments(
    model: HookedModel,
    prompts: Sequence[Prompt],
    sites: Sequence[Site] | Site,
    *,
    span: str = "content",
    system_prompt: str | None = None,
    batch_size: int = 32,
    max_tokens: int = 4096,
    progress: bool = False,
) -> dict[Site, ClassMoments]:
    """Run prompts once and keep only mean and variance of each (category, label): for sets too large to hold.

    Arguments are those of ``cache_activations``. Batches are merged in float64 by the pairwise update of Chan et al. (1979).

    Returns:
        One ``ClassMoments`` a site.
    """
    sites = (sites,) if isinstance(sites, Site) else tuple(dict.fromkeys(sites))
    encoded, info = _prepare(model, prompts, sites, span, system_prompt)
    encoded.sort(key=lambda row: -len(row.ids))
    classes = tuple(sorted({(prompt.category, prompt.label) for prompt in prompts}))
    n = torch.zeros(len(classes), dtype=torch.long)
    mean: dict[Site, Tensor] = {}
    squares: dict[Site, Tensor] = {}  # sums of squared deviations from the mean
    bar = _progress_bar(len(prompts), "moments", progress)
    for rows, pooled in pooled_batches(model, encoded, sites, span, batch_size, max_tokens):
        label = torch.tensor(
            [classes.index((row.prompt.category, row.prompt.label)) for row in rows]
        )
        member = torch.nn.functional.one_hot(label, len(classes)).double()
        added = member.sum(dim=0)
        total = (n + added).clamp(min=1)
        for site in sites:
            values = pooled[site].cpu().double()
            if site not in mean:
                mean[site] = torch.zeros(len(classes), values.shape[1], dtype=torch.float64)
                squares[site] = torch.zeros_like(mean[site])
            batch_mean = (member.T @ values) / added.clamp(min=1)[:, None]
            batch_squares = member.T @ (values - batch_mean[label]) ** 2
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


def token_activations(
    model: HookedModel, prompt: Prompt, site: Site, *, system_prompt: str | None = None
) -> tuple[Encoded, Float[Tensor, "pos d"]]:
    """Activations of one prompt token by token, for views: the tokens and one row each (with the response, if the prompt has one)."""
    check_sites(model, [site])
    row = encode(model, [prompt], with_response=bool(prompt.response), system_prompt=system_prompt)[
        0
    ]
    batch = pad([row], pad_id=pad_id(model), side="right", device=_device(model))
    kept: list[Tensor] = []
    with (
        torch.no_grad(),
        reading(
            model, [(site.hook_name, lambda a: kept.append(a.flatten(2)[0].float().cpu()))]
        ) as run,
    ):
        run(batch.tokens, batch.mask)
    return row, kept[0].clone()


def pooled_batches(
    model: HookedModel,
    encoded: Sequence[Encoded],
    sites: Sequence[Site],
    span: str,
    batch_size: int,
    max_tokens: int,
) -> Iterator[tuple[Sequence[Encoded], dict[Site, Float[Tensor, "batch d"]]]]:
    """Forward passes over rows in their order, each giving the span means of its rows at every site.

    What comes after a row's span is not run: no earlier token sees it.
    """
    if batch_size < 1 or max_tokens < 1:
        raise ValueError(
            f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}."
        )
    device = _device(model)
    encoded = [dataclasses.replace(row, ids=row.ids[: row.span(span)[1]]) for row in encoded]
    n_prefix = (
        shared_prefix_length(encoded, keep=lambda row: row.span(span)[0])
        if has_key_value_cache(model)
        else 0
    )
    weights: (
        Tensor  # share of each token in its row's mean; set for each batch before the hooks read it
    )
    columns: slice
    pooled: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            inside = activation.flatten(2)[:, columns].float()
            pooled[site] = torch.bmm(weights[:, None], inside)[:, 0]

        return read

    with torch.no_grad():
        prefix = prefix_cache(model, encoded[0].ids[:n_prefix]) if n_prefix else None
        with reading(model, [(site.hook_name, reader(site)) for site in sites]) as run:
            for rows in _batches(encoded, batch_size, max_tokens):
                batch = pad(rows, pad_id=pad_id(model), side="right", device=device)
                inside = span_mask(rows, batch, span)[:, n_prefix:]
                used = inside.any(dim=0).nonzero()
                columns = slice(int(used[0]), int(used[-1]) + 1)
                inside = inside[:, columns]
                weights = inside.float() / inside.sum(dim=1, keepdim=True)
                cache = (
                    rows_of_cache(prefix, torch.zeros(len(rows), dtype=torch.long, device=device))
                    if prefix is not None
                    else None
                )
                run(batch.tokens[:, n_prefix:], batch.mask, cache)
                yield rows, dict(pooled)


def _prepare(
    model: HookedModel,
    prompts: Sequence[Prompt],
    sites: Sequence[Site],
    span: str,
    system_prompt: str | None,
) -> tuple[list[Encoded], ModelInfo]:
    if not prompts or not sites:
        raise ValueError("nothing to run: give at least one prompt and one site.")
    if span not in SPANS:
        raise ValueError(f"unknown span {span!r}; spans: {', '.join(SPANS)}.")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"prompt {twice!r} comes twice; ids must be unique in a set.")
    check_sites(model, sites)
    encoded = encode(model, prompts, with_response=span == "response", system_prompt=system_prompt)
    for row in encoded:
        row.span(span)
    return encoded, model_info(model)


def _batches(
    encoded: Sequence[Encoded], batch_size: int, max_tokens: int
) -> Iterator[list[Encoded]]:
    """Consecutive rows, at most batch_size and at most max_tokens with padding (a longer single row goes alone)."""
    rows: list[Encoded] = []
    width = 0
    for row in encoded:
        wider = max(width, len(row.ids))
        if rows and (len(rows) == batch_size or wider * (len(rows) + 1) > max_tokens):
            yield rows
            rows, wider = [], len(row.ids)
        rows.append(row)
        width = wider
    yield rows


def _open_store(store: Path, what: dict[str, Any], ids: list[str]) -> tuple[Path, dict[str, Any]]:
    """Folder of exactly this measurement and its manifest, begun if there is none."""
    what = json.loads(json.dumps(what))  # as it will be read back
    folder = store / key_of(what)
    path = folder / "manifest.json"
    if path.exists():
        try:
            manifest = read_json(path)
            if manifest["what"] == what and isinstance(manifest["shards"], dict):
                return folder, manifest
        except (ValueError, KeyError, TypeError):
            pass
        warnings.warn(
            f"{path.name} of the activations in {folder.name} is damaged; computing them again.",
            stacklevel=3,
        )
    manifest = {"what": what, "ids": ids, "shards": {}}
    write_json(path, manifest)
    return folder, manifest


def _read_shard(folder: Path, manifest: dict[str, Any], number: int) -> dict[str, Tensor] | None:
    """A shard that is there and whole, else None."""
    checksum = manifest["shards"].get(str(number))
    path = folder / f"shard-{number:05d}.safetensors"
    if checksum is None:
        return None
    if not path.is_file() or file_checksum(path) != checksum:
        warnings.warn(
            f"activation shard {path.name} is missing or damaged; computing it again.", stacklevel=3
        )
        return None
    return read_tensors(path)[0]


def _write_shard(
    folder: Path, manifest: dict[str, Any], number: int, values: dict[str, Tensor]
) -> None:
    path = folder / f"shard-{number:05d}.safetensors"
    manifest["shards"][str(number)] = write_tensors(
        path, values, {"shard": number, **manifest["what"]}
    )
    write_json(folder / "manifest.json", manifest)


def _progress_bar(total: int, what: str, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit="prompt", disable=not show)


def _device(model: HookedModel) -> torch.device:
    return next(iter(model.parameters())).device
