"""Count the weights and products of a language model from its config.json, without its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, data_path, local_path, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class _Traits:
    """Say in what a family's block differs from Llama's.

    Attributes:
        norms: Norms over the residual stream in a block.
        norm_vectors: Vectors of a norm: 2 where it has a bias.
        query_norm: "head" or "all" where queries and keys are normed, each head by itself or all
            together.
        query_bias: Whether queries, keys and values have biases, as their family always does.
        all_biased: Whether every product has a bias.
        gated: Whether the MLP multiplies two products.
        positions: Whether positions are embedded in a table.
    """

    norms: int = 2
    norm_vectors: int = 1
    query_norm: str | None = None
    query_bias: bool = False
    all_biased: bool = False
    gated: bool = True
    positions: bool = False


_PLAIN = _Traits(norm_vectors=2, all_biased=True, gated=False)

FAMILIES: dict[str, _Traits] = {
    "llama": _Traits(),
    "mistral": _Traits(),
    "phi3": _Traits(),
    "mixtral": _Traits(),
    "qwen2": _Traits(query_bias=True),
    "qwen2_moe": _Traits(query_bias=True),
    "qwen3": _Traits(query_norm="head"),
    "qwen3_moe": _Traits(query_norm="head"),
    "olmo2": _Traits(query_norm="all"),
    "gemma2": _Traits(norms=4),
    "gemma3_text": _Traits(norms=4, query_norm="head"),
    "gpt2": replace(_PLAIN, positions=True),
    "gpt_neox": _PLAIN,
}
"""Families whose weights can be counted, by ``model_type`` of the config."""


@dataclass(frozen=True)
class Architecture:
    """Hold the sizes of a model that decide what it costs.

    Attributes:
        name: What it is called.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        n_heads: Attention heads of a layer.
        n_kv_heads: Heads of keys and values; fewer than heads where they are shared (GQA).
        d_head: Width of a head.
        d_mlp: Neurons of a layer that a token passes through.
        vocabulary: Rows of the embedding.
        is_tied: Whether the head's weights are those of the embedding.
        layer_parameters: Parameters of each block, all experts included.
        layer_products: Weights that one token is multiplied with in each block: of a mixture of
            experts those of the experts that a token chooses.
        layer_experts: Parameters of all experts of each block; 0 where there are none.
        chosen: Share of the experts that a token chooses; 1 where there are none.
        other_parameters: Parameters of embedding, head and last norm.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocabulary: int
    is_tied: bool
    layer_parameters: tuple[int, ...]
    layer_products: tuple[int, ...]
    layer_experts: tuple[int, ...]
    chosen: float
    other_parameters: int

    @property
    def parameters(self) -> int:
        """Count all parameters; weights that are tied count once."""
        return sum(self.layer_parameters) + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Count the parameters that one token passes by, the whole embedding included."""
        idle = sum(experts * (1 - self.chosen) for experts in self.layer_experts)
        return round(self.parameters - idle)

    @property
    def head_products(self) -> int:
        """Count the weights of the head, which logits are computed with."""
        return self.vocabulary * self.d_model

    @property
    def kv_width(self) -> int:
        """Count the numbers that the keys and values of a token are, in all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.d_head

    def products(self, n_layers: int | None = None, *, with_head: bool = False) -> int:
        """Count the weights that a token is multiplied with in the first layers, or in all."""
        return sum(self.layer_products[:n_layers]) + self.head_products * with_head

    def weights_read(self, n_tokens: float, *, with_head: bool = True) -> float:
        """Count the weights that a pass over some tokens reads, all layers.

        Of the experts it reads those that any token chooses, if each token chooses at random.
        """
        untouched = (1 - self.chosen) ** n_tokens
        idle = sum(experts * untouched for experts in self.layer_experts)
        return sum(self.layer_parameters) - idle + self.head_products * with_head

    def width_of(self, kind: str) -> int:
        """Give the numbers of one activation at a kind of site."""
        widths = {"mlp_post": self.d_mlp, "z": self.n_heads * self.d_head}
        return widths.get(kind, self.d_model)


def known_models() -> dict[str, Mapping[str, Any]]:
    """Read the configurations of well-known models that come with the project, by name."""
    return read_json(data_path("model_configs.json"))


def read_architecture(name_or_path: PathLike) -> Architecture:
    """Count a model's weights from its config.json; no weights are read.

    Args:
        name_or_path: A name of ``known_models``, a config.json, or a folder that holds one.

    Raises:
        ValueError: If there is no such model, or its family cannot be counted.
    """
    known = known_models()
    if str(name_or_path) in known:
        return architecture_of(known[str(name_or_path)], str(name_or_path))
    path = local_path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"no model {str(name_or_path)!r}: give a config.json, a folder that holds one, or one "
            f"of {', '.join(known)}.{did_you_mean(str(name_or_path), known)}"
        )
    config = read_json(path)
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} is no model's config.json: it names no model_type.")
    return architecture_of(config, Path(path).resolve().parent.name)


def architecture_of(config: Mapping[str, Any], name: str) -> Architecture:
    """Count the weights that a configuration describes.

    Args:
        config: Entries of a config.json; what is missing has the family's own default.
        name: What to call the model.

    Raises:
        ValueError: If the family cannot be counted.
    """
    from transformers import AutoConfig

    read = AutoConfig.for_model(**config).get_text_config()
    traits = FAMILIES.get(read.model_type)
    if traits is None:
        raise ValueError(
            f"cannot count the weights of {name!r}, a {read.model_type}; "
            f"families: {', '.join(FAMILIES)}."
        )
    d_model, n_layers = read.hidden_size, read.num_hidden_layers
    n_heads = read.num_attention_heads
    n_kv_heads = getattr(read, "num_key_value_heads", None) or n_heads
    d_head = getattr(read, "head_dim", None) or d_model // n_heads
    attention = _attention(read, traits, n_heads * d_head, n_kv_heads * d_head, d_head)
    norms = traits.norms * traits.norm_vectors * d_model
    mlps = [_mlp(read, traits, layer) for layer in range(n_layers)]
    head = 0 if read.tie_word_embeddings else read.vocab_size * d_model
    positions = read.max_position_embeddings * d_model if traits.positions else 0
    embeddings = read.vocab_size * d_model + positions
    chosen = min((mlp.chosen for mlp in mlps), default=1.0)
    return Architecture(
        name=name,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=max(mlp.neurons for mlp in mlps),
        vocabulary=read.vocab_size,
        is_tied=bool(read.tie_word_embeddings),
        layer_parameters=tuple(attention.parameters + norms + mlp.parameters for mlp in mlps),
        layer_products=tuple(attention.products + mlp.products for mlp in mlps),
        layer_experts=tuple(mlp.experts for mlp in mlps),
        chosen=chosen,
        other_parameters=embeddings + head + traits.norm_vectors * d_model,
    )


@dataclass(frozen=True)
class _Part:
    """Hold the counts of attention or of an MLP."""

    parameters: int
    products: int
    neurons: int = 0
    experts: int = 0
    chosen: float = 1.0


def _attention(config: Any, traits: _Traits, queries: int, keys: int, d_head: int) -> _Part:
    d_model = config.hidden_size
    products = d_model * (queries + 2 * keys) + queries * d_model
    everywhere = traits.all_biased or getattr(config, "attention_bias", False)
    some = traits.query_bias and getattr(config, "qkv_bias", True)
    biases = (queries + 2 * keys) * (everywhere or some) + d_model * everywhere
    norms = {None: 0, "head": 2 * d_head, "all": queries + keys}[traits.query_norm]
    return _Part(products + biases + norms, products)


def _mlp(config: Any, traits: _Traits, layer: int) -> _Part:
    """Count one layer's MLP, or its experts with what chooses among them."""
    d_model = config.hidden_size
    matrices = 3 if traits.gated else 2
    n_experts = _experts_of(config, layer)
    if n_experts:
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        shared = getattr(config, "shared_expert_intermediate_size", 0) or 0
        always = d_model * n_experts + (matrices * shared + 1) * d_model * bool(shared)
        experts, share = matrices * d_model * width * n_experts, config.num_experts_per_tok
        passed = experts * share // n_experts
        neurons = width * share + shared
        return _Part(always + experts, always + passed, neurons, experts, share / n_experts)
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    width = width or 4 * d_model
    products = matrices * d_model * width
    is_biased = traits.all_biased or getattr(config, "mlp_bias", False)
    biases = ((matrices - 1) * width + d_model) * is_biased
    return _Part(products + biases, products, width)


def _experts_of(config: Any, layer: int) -> int:
    """Count the experts of a layer; 0 where its MLP is an ordinary one."""
    n_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    every = getattr(config, "decoder_sparse_step", 1)
    is_dense = layer in (getattr(config, "mlp_only_layers", None) or ()) or (layer + 1) % every
    return 0 if is_dense or not n_experts else int(n_experts)
