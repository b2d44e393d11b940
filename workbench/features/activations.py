"""Read what features of a sparse autoencoder do on prompts, pooled over a span of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from workbench.features.sae import SparseAutoencoder
from workbench.models.activations import ActivationSet, pooled_batches
from workbench.models.batches import order_by_length
from workbench.models.errors import CannotBeDone
from workbench.models.load import model_info
from workbench.models.sites import check_sites
from workbench.models.templates import Keywords, asked_as, asked_by
from workbench.models.tokens import SPANS, encode
from workbench.prompts.forms import as_prompts

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Hold pooled features of prompts, beside the activations they were computed from.

    A feature is computed token by token and then pooled: a feature of the mean activation would be
    another number.

    Attributes:
        sae: Whose features.
        values: Mean over the span's tokens, float32 on the CPU, one row per prompt.
        stream: The activations at the SAE's site, pooled over the same tokens.
        explained: Share of the squared norm of the tokens' activations that the SAE explains,
            1 - sum |x - decoded|^2 / sum |x|^2. Near 0 or below, it is not this model's SAE.
    """

    sae: SparseAutoencoder
    values: Float[Tensor, "prompt feature"]
    stream: ActivationSet
    explained: float

    def __repr__(self) -> str:
        n, d = self.values.shape
        return (
            f"FeatureSet({self.sae.name!r} at {self.sae.site}, {n} prompts x {d} features, "
            f"span={self.stream.span!r}, explained={self.explained:.2f})"
        )

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What was run, row by row."""
        return self.stream.prompts


class _Widths(NamedTuple):
    """How many columns hold features, the activation, its squared norm and its squared error."""

    features: int
    activation: int
    norm: int = 1
    error: int = 1


def cache_features(
    model: HookedModel,
    prompts: PromptsLike,
    sae: SparseAutoencoder,
    *,
    span: str = "content",
    system_prompt: str | None = None,
    template_keywords: Keywords = None,
    batch_size: int = 32,
    max_tokens: int = 4096,
) -> FeatureSet:
    """Run prompts once and keep the features of a sparse autoencoder, pooled.

    Args:
        model: The hooked model that the SAE was trained on.
        prompts: What to run, as ``as_prompts`` reads it.
        sae: From ``load_sae``.
        span: Which tokens, see ``cache_activations``. An SAE knows nothing of a first token with a
            massive activation, so "all" says little.
        system_prompt: Words for the system turn.
        template_keywords: What else the chat template reads, see ``template_text``.
        batch_size: Largest number of rows per batch.
        max_tokens: Largest number of tokens per batch, padding included; each holds all features
            in float32.

    Raises:
        ValueError: If a span or prompt does not fit.
        CannotBeDone: If the SAE is of another width than its site in the model.
    """
    prompts = as_prompts(prompts)
    if not prompts or span not in SPANS:
        raise ValueError(
            f"give at least one prompt and a span ({', '.join(SPANS)}), got {len(prompts)} and "
            f"{span!r}."
        )
    check_fits(model, sae)
    asked = asked_as(system_prompt, template_keywords)
    encoded = encode(model, prompts, with_response=span == "response", **asked_by(asked))
    order = order_by_length([len(row.ids) for row in encoded])
    widths = _Widths(sae.n_features, len(sae.decoder_bias))

    def seen_as(x: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos all"]:
        features = sae.encode(x)
        error = x - sae.decode(features)
        squares = [part.square().sum(dim=-1, keepdim=True) for part in (x, error)]
        return torch.cat([features, x, *squares], dim=-1)

    rows = [encoded[i] for i in order]
    batches = pooled_batches(model, rows, [sae.site], span, batch_size, max_tokens, seen_as)
    pooled = torch.cat([of_batch[sae.site].cpu() for _, of_batch in batches])
    features, stream, norm, error = pooled[torch.tensor(order).argsort()].split(list(widths), dim=1)
    acts = ActivationSet(sae.site, stream.clone(), tuple(prompts), span, model_info(model), asked)
    n_tokens = torch.tensor([row.span(span)[1] - row.span(span)[0] for row in encoded])[:, None]
    explained = 1 - float((error * n_tokens).sum() / (norm * n_tokens).sum())
    return FeatureSet(sae, features.clone(), acts, explained)


def check_fits(model: HookedModel, sae: SparseAutoencoder) -> None:
    """Raise unless a model has an SAE's site, at the SAE's width.

    Raises:
        CannotBeDone: If the model does not compute the site, or at another width.
        ValueError: If the layer does not exist.
    """
    check_sites(model, [sae.site])
    widths = {"mlp_post": model.cfg.d_mlp, "z": model.cfg.n_heads * model.cfg.d_head}
    width = widths.get(sae.site.kind, model.cfg.d_model)
    if width != len(sae.decoder_bias):
        raise CannotBeDone(
            f"{sae!r} has width {len(sae.decoder_bias)}, but {sae.site} of this model has {width}: "
            "it is of another model."
        )
