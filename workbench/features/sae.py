"""Read sparse autoencoders (SAEs) from files and compute their features.

A feature stands in for a neuron: a number per token, mostly zero, that writes a row of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from workbench.files.foreign_tensors import PICKLED, file_format, read_foreign
from workbench.files.store import existing_file, local_path, read_json
from workbench.models.sites import HOOK_NAMES, KINDS, Site

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from workbench.files.store import PathLike


ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
"""Kinds of encoder that can be read, by the names sae-lens gives them."""


CONFIG, WEIGHTS, GEMMA_SCOPE = "cfg.json", "sae_weights.safetensors", "params.npz"
"""Files of sae-lens and of Gemma Scope."""


_VECTORS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""Vectors of one number per feature that each kind of encoder has."""


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """Hold a sparse autoencoder of the activations at one site, in float32.

    Attributes:
        name: What results call it.
        site: Where its activations are read.
        architecture: One of ``ARCHITECTURES``.
        encoder: W_enc.
        decoder: W_dec: what one unit of each feature writes, in units of the site.
        decoder_bias: b_dec.
        vectors: Biases, thresholds and scales of the encoder, by their names in the file.
        subtracts_bias: Whether b_dec is taken from the activation before it is encoded.
        k: Features of a token that may be active; topk only.
        by_norm: Whether features are measured in units of the norm of what they write; topk only.
    """

    name: str
    site: Site
    architecture: str
    encoder: Float[Tensor, "d feature"]
    decoder: Float[Tensor, "feature d"]
    decoder_bias: Float[Tensor, " d"]
    vectors: Mapping[str, Float[Tensor, " feature"]]
    subtracts_bias: bool = True
    k: int = 0
    by_norm: bool = False

    def __repr__(self) -> str:
        return (
            f"SparseAutoencoder({self.name!r}, {self.site}, {self.n_features} features, "
            f"{self.architecture})"
        )

    @property
    def n_features(self) -> int:
        """Number of features."""
        return len(self.decoder)

    @property
    def written(self) -> Float[Tensor, "feature d"]:
        """What one unit of each feature writes, in units of the site."""
        return (
            self.decoder / self.decoder.norm(dim=1, keepdim=True) if self.by_norm else self.decoder
        )

    def to(self, device: torch.device | str) -> SparseAutoencoder:
        """Move the weights to a device: that of the model, where features change at every token."""
        moved = {name: tensor.to(device) for name, tensor in self.vectors.items()}
        return replace(
            self,
            encoder=self.encoder.to(device),
            decoder=self.decoder.to(device),
            decoder_bias=self.decoder_bias.to(device),
            vectors=moved,
        )

    def encode(
        self, activation: Float[Tensor, "... d"], features: Sequence[int] | None = None
    ) -> Float[Tensor, "... feature"]:
        """Compute features of activations, in float32.

        Args:
            activation: At the SAE's site; heads are laid side by side.
            features: Which, in this order; all by default.
        """
        # Whether a feature is among the largest k depends on all of them.
        some = features if self.architecture != "topk" else None
        weights = [self.encoder, *self.vectors.values()]
        encoder, *vectors = (
            (w if some is None else w[..., list(some)]).to(activation.device) for w in weights
        )
        x = activation.float()
        if self.subtracts_bias:
            x = x - self.decoder_bias.to(x.device)
        values = self._active(x, encoder, dict(zip(self.vectors, vectors, strict=True)))
        return values if features is None or some is not None else values[..., list(features)]

    def decode(self, features: Float[Tensor, "... feature"]) -> Float[Tensor, "... d"]:
        """Compute the activations that features stand for."""
        device = features.device
        return features @ self.written.to(device) + self.decoder_bias.to(device)

    def _active(
        self,
        x: Float[Tensor, "... d"],
        encoder: Float[Tensor, "d feature"],
        vectors: Mapping[str, Float[Tensor, " feature"]],
    ) -> Float[Tensor, "... feature"]:
        """Compute features of what the encoder reads."""
        if self.architecture == "gated":
            read = x @ encoder
            is_open = read + vectors["b_gate"] > 0
            return (read * vectors["r_mag"].exp() + vectors["b_mag"]).relu() * is_open
        values = x @ encoder + vectors["b_enc"]
        if self.architecture == "jumprelu":
            return values.relu() * (values > vectors["threshold"])
        if self.architecture == "topk":
            if self.by_norm:
                values = values * self.decoder.norm(dim=1).to(values.device)
            largest = values.topk(self.k, dim=-1)
            return torch.zeros_like(values).scatter(-1, largest.indices, largest.values.relu())
        return values.relu()


def load_sae(
    path: PathLike, *, site: Site | None = None, name: str | None = None
) -> SparseAutoencoder:
    """Read a sparse autoencoder from a folder on disk.

    Args:
        path: A folder of sae-lens (cfg.json and sae_weights.safetensors) or of Gemma Scope
            (params.npz), or that file.
        site: Where its activations are read; needed where the files do not say, as in Gemma Scope.
        name: What results call it; the folder's name by default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of a kind that is not read here, damaged, or contradicts ``site``.
    """
    path = local_path(path)
    folder = path if path.is_dir() else path.parent
    name = name or folder.name
    if path.name == GEMMA_SCOPE or (folder / GEMMA_SCOPE).is_file():
        tensors = _tensors(folder / GEMMA_SCOPE)
        return _made(folder / GEMMA_SCOPE, name, _place(folder, site, None), "jumprelu", tensors)
    config_path = existing_file(folder / CONFIG)
    config = _new_style(read_json(config_path))
    if not isinstance(config["architecture"], str) or config["architecture"] not in ARCHITECTURES:
        raise ValueError(
            f"{config_path}: architecture {config['architecture']!r} is not read here; "
            f"architectures: {', '.join(ARCHITECTURES)}."
        )
    _check_plain(config, config_path)
    return _made(
        folder / WEIGHTS,
        name,
        _place(config_path, site, config.get("hook_name")),
        config["architecture"],
        _tensors(folder / WEIGHTS),
        subtracts_bias=bool(config.get("apply_b_dec_to_input", True)),
        k=config.get("k") or 0,
        by_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
    )


def _new_style(config: Any) -> dict[str, Any]:
    """Bring a configuration to the names of sae-lens 6, from which earlier ones differ."""
    config = dict(config) if isinstance(config, dict) else {}
    metadata = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    config = {**config, **{k: v for k, v in metadata.items() if k == "hook_name"}}
    config.setdefault("hook_name", config.get("hook_point"))
    config.setdefault("architecture", "standard")
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation == "topk":
        config["architecture"] = "topk"
        config["k"] = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    elif activation != "relu":
        config["architecture"] = f"{config['architecture']} with {activation}"
    return config


def _check_plain(config: Mapping[str, Any], path: Path) -> None:
    """Refuse what changes features and is not computed here."""
    for key, plain in (
        # It is folded into the weights, or it does nothing where an SAE is used.
        ("normalize_activations", ("none", "expected_average_only_in", None, False, True)),
        ("finetuning_scaling_factor", (False, None)),
    ):
        if config.get(key) not in plain:
            raise ValueError(
                f"{path}: {key}={config[key]!r} is not computed here; fold it into the weights, or "
                "use an SAE without it."
            )
    if config["architecture"] == "topk" and not isinstance(config.get("k"), int):
        raise ValueError(f"{path} is a topk SAE and does not say k; add it.")


def _place(path: Path, site: Site | None, hook_name: Any) -> Site:
    """Find the site of an SAE by what its configuration and its user say."""
    if hook_name is None:
        if site is None:
            raise ValueError(
                f"{path} does not say where the SAE reads; pass site=, for instance "
                f"{Site(20, 'resid_post')!r}."
            )
        return site
    parts = str(hook_name).split(".")
    layer = int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else 0
    said = [Site(layer, kind) for kind in KINDS if Site(layer, kind).hook_name == hook_name]
    if not said:
        kinds = ", ".join(HOOK_NAMES.values())
        raise ValueError(f"{path}: no site is read at {hook_name!r}; sites: {kinds}.")
    if site not in (None, said[0]):
        raise ValueError(
            f"{path} says that the SAE reads {said[0]}, got site={site}; leave it out."
        )
    return said[0]


def _tensors(path: Path) -> dict[str, Float[Tensor, "..."]]:
    """Read the arrays of a file; a pickle is never read."""
    path = existing_file(path)
    if file_format(path) == "pickle":
        raise ValueError(f"{path} is {PICKLED}")
    rows = read_foreign(path).rows
    return {name.replace("w_", "W_", 1): torch.from_numpy(array) for name, array in rows.items()}


def _made(
    path: Path,
    name: str,
    site: Site,
    architecture: str,
    tensors: Mapping[str, Float[Tensor, "..."]],
    *,
    subtracts_bias: bool = False,
    k: int = 0,
    by_norm: bool = False,
) -> SparseAutoencoder:
    """Check the tensors of a file and make an SAE of them."""
    missing = [key for key in ("W_enc", "W_dec", "b_dec") if key not in tensors]
    missing += [key for key in _VECTORS[architecture] if key not in tensors]
    if missing:
        raise ValueError(
            f"{path} has no {missing[0]}, which a {architecture} SAE needs; it has: "
            f"{', '.join(sorted(tensors))}."
        )
    scale = tensors.get("scaling_factor")
    if scale is not None and not torch.allclose(scale, torch.ones_like(scale)):
        raise ValueError(
            f"{path}: scaling_factor is not computed here; fold it into the weights, or use an SAE "
            "without it."
        )
    n, d = tensors["W_dec"].shape if tensors["W_dec"].ndim == 2 else (0, 0)
    shapes = {"W_enc": (d, n), "b_dec": (d,)} | dict.fromkeys(_VECTORS[architecture], (n,))
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape or not tensors[key].isfinite().all():
            raise ValueError(
                f"{path}: {key} must be {shape} finite numbers beside W_dec of "
                f"{tuple(tensors['W_dec'].shape)}, got shape {tuple(tensors[key].shape)}."
            )
    if architecture == "topk" and not 0 < k <= n:
        raise ValueError(f"{path}: k must be from 1 to the {n} features, got {k}.")
    vectors = {key: tensors[key] for key in _VECTORS[architecture]}
    return SparseAutoencoder(
        name, site, architecture, tensors["W_enc"], tensors["W_dec"], tensors["b_dec"], vectors,
        subtracts_bias, k, by_norm,
    )  # fmt: skip
