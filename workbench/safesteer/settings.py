"""Settings of steering: where a vector is added, with which sign, how strongly, in which way."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from workbench.files.hints import did_you_mean
from workbench.models.sites import Site, present_sites
from workbench.steering.from_texts import MID_DEPTH
from workbench.steering.interventions import Decay, Intervention, Positions, decayed, raise_to
from workbench.steering.spectral import Fitted, SpectralEdit, steer_by
from workbench.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from workbench.models.hooked_model import HookedModel


BAND, SPREAD = (0.4, 0.63), (0.34, 0.41, 0.48, 0.55)
"""Where vectors are added, as shares of depth: the residual stream at half depth, attention
outputs over a band around it, or the residual stream at four layers. The paper's layers are 14 to
31 of 32, mostly 14."""
BAND_SHARE = 0.41
"""Strength at each of several layers over the strength at one layer: .07 to .17 in the
exploration that both come from."""
Vectors = Mapping[tuple[str, Site], Mapping[str, Fitted]]
"""(construction, site) -> category -> vector, or spectral edit."""
_VARIED = ("positions", "until", "decay", "keep_norm", "form")


Form = Literal["add", "target"]
"""How a vector is applied: "add" a multiple of it, or raise the projection on it to a "target"."""


class Setting(NamedTuple):
    """Say how to steer: construction, sites, sign, relative strength, positions and length."""

    construction: str
    sites: tuple[Site, ...]
    sign: int
    rho: float
    """Relative strength at each site; for the form "target" how far beyond the safe side's mean; of
    a spectral edit the share of its way; the mean one where a raw multiple is given."""
    positions: Positions = "all"
    until: int | None = None
    decay: Decay = "none"
    """How strength falls while an answer is written, see ``steering.decayed``."""
    keep_norm: bool = False
    """Whether each token's activation keeps its norm."""
    form: Form = "add"
    multiplier: float | None = None
    """Raw multiple of the vector at each site, above 0, in place of the relative strength."""

    @property
    def is_plain(self) -> bool:
        """Tell whether a vector is just added, as long as the setting says."""
        return self.decay == "none" and not self.keep_norm and self.form == "add"

    @property
    def name(self) -> str:
        """Name the setting as results call it."""
        where = str(self.sites[0])
        if len(self.sites) > 1:
            where += f"-{self.sites[-1].layer}"
        extent = "" if self.positions == "all" else f" {self.positions}"
        extent += "" if self.until is None else f" first {self.until}"
        extent += "" if self.decay == "none" else f" decay {self.decay}"
        extent += " norm kept" if self.keep_norm else ""
        if self.form == "target":
            return f"{self.construction} {where} target {self.rho:+.3g}{extent}"
        strength = f"{self.rho:.3g}" if self.multiplier is None else f"{self.multiplier:.3g}x"
        return f"{self.construction} {where} {'+' if self.sign > 0 else '-'}{strength}{extent}"

    def times(self, factor: float) -> Setting:
        """Give the same setting with so many times its strength."""
        size = None if self.multiplier is None else self.multiplier * factor
        return self._replace(rho=self.rho * factor, multiplier=size)


class Way(NamedTuple):
    """Say one way in which a run applies vectors."""

    fields: Mapping[str, Any]
    """Fields of ``Setting`` that it sets."""
    summary: str
    """What it does, in a line."""
    is_counted: bool = False
    """Whether it ends after a number of generated tokens that is given beside its name."""


WAYS: Mapping[str, Way] = {
    "add": Way({}, "add the vector at every token, with the same strength"),
    "norm_kept": Way({"keep_norm": True}, "add it, and keep the norm of each activation"),
    "generated": Way({"positions": "generated"}, "add it at generated tokens alone"),
    "first": Way({}, "add it to the prompt and the first n generated tokens", True),
    "linear": Way({"decay": "linear"}, "let strength fall to 0 over n generated tokens", True),
    "sqrt": Way({"decay": "sqrt"}, "let strength fall with the root of the token's number"),
    "altsteer": Way({"decay": "altsteer"}, "let it fall over n tokens as AltSteer does", True),
    "target": Way({"form": "target"}, "raise the projection on it to a target, not beyond"),
}
"""Ways in which a run's tune fold can try vectors, by name; docs/vectors.md describes them."""


def variants_of(names: Sequence[str], n_tokens: int, *, longest: int) -> list[dict[str, Any]]:
    """Look up the fields of ``Setting`` that names of ways stand for, as ``grid`` takes them.

    Args:
        names: Names of ``WAYS``; one that comes again counts once.
        n_tokens: Generated tokens after which a way that is counted ends.
        longest: Tokens of the longest answer (``max_new_tokens``).

    Raises:
        ValueError: If a name is unknown, or a way would do the same as "add" in such short answers.
    """
    variants = []
    for name in dict.fromkeys(names):
        if name not in WAYS:
            raise ValueError(
                f"unknown way to apply a vector {name!r}; known: {', '.join(WAYS)}."
                f"{did_you_mean(name, WAYS)}"
            )
        way = WAYS[name]
        fields = {**way.fields, "until": n_tokens} if way.is_counted else dict(way.fields)
        if not _shows_within(fields, longest):
            counted = f" with applied_tokens {n_tokens}" if way.is_counted else ""
            raise ValueError(
                f"applied {name!r}{counted} does nothing of its own in answers of at most {longest}"
                f" tokens, the last of which is not read again; "
                f"take {'fewer applied_tokens or ' if way.is_counted else ''}more max_new_tokens."
            )
        variants.append(fields)
    return variants


def _shows_within(fields: Mapping[str, Any], longest: int) -> bool:
    """Tell whether a way does something of its own in answers of so many tokens, or fewer."""
    read = torch.arange(longest - 1, dtype=torch.float32)  # the last token is written and not read
    if fields.get("positions") == "generated":
        return len(read) > 0
    if "until" in fields or "decay" in fields:
        shares = decayed(fields.get("decay", "none"), fields.get("until"), read)
        return bool((shares != 1).any())
    return True


def placements(model: HookedModel, among: Container[Site] | None = None) -> list[tuple[Site, ...]]:
    """List the places where vectors are added.

    One residual site at half depth, the attention outputs of a band of layers, and four residual
    sites. Layers of the band that have no attention (recurrent ones) are passed over.

    Args:
        model: A hooked model.
        among: Sites that can be used, for instance those measured; None for all the model has.
    """
    n = model.cfg.n_layers
    first, last = round(BAND[0] * n), max(round(BAND[0] * n), int(BAND[1] * n))
    spread = (Site(layer, "resid_post") for layer in sorted({int(share * n) for share in SPREAD}))
    band = (site for site in present_sites(model, ["attn_out"]) if first <= site.layer <= last)
    places = [(Site(int(MID_DEPTH * n), "resid_post"),), tuple(band), tuple(spread)]
    if among is not None:
        places = [tuple(site for site in place if site in among) for place in places]
    return list(dict.fromkeys(place for place in places if place))


def grid(
    constructions: Sequence[str],
    places: Sequence[tuple[Site, ...]],
    rhos: Sequence[float],
    *,
    signs: Mapping[str, Sequence[int]] | None = None,
    extents: Sequence[tuple[Positions, int | None]] = (("all", None),),
    variants: Sequence[Mapping[str, Any]] = ({},),
) -> list[Setting]:
    """Combine every construction, place, sign, relative strength, extent and variant.

    Where there are several layers, each gets ``BAND_SHARE`` of the strength. A target is set along
    the vector only, so the form "target" has no setting with sign -1.

    Args:
        constructions: Names of vectors.
        places: Each a site or several.
        rhos: Relative strengths at one layer.
        signs: Construction to the signs that are tried; +1 (from unsafe to safe) alone by default.
        extents: Pairs of positions and ``until`` (see ``steering.Intervention``).
        variants: Further fields of ``Setting``, for instance
            ``[{}, {"keep_norm": True}, {"decay": "linear", "until": 24}, {"form": "target"}]``.

    Raises:
        ValueError: If a variant names what is no field of a setting, or what cannot be done.
    """
    settings = []
    for construction in constructions:
        for sites in places:
            for sign in (signs or {}).get(construction, (1,)):
                for rho in rhos:
                    at_each = rho if len(sites) == 1 else round(BAND_SHARE * rho, 4)
                    plain = [
                        Setting(construction, sites, sign, at_each, *extent) for extent in extents
                    ]
                    settings += [_varied(one, fields) for one in plain for fields in variants]
    # A variant that sets what an extent sets, too, comes out alike for several extents.
    allowed = (one for one in settings if one.form != "target" or one.sign > 0)
    return list(dict.fromkeys(allowed))


def raw_grid(
    vectors: Vectors,
    constructions: Sequence[str],
    places: Sequence[tuple[Site, ...]],
    multipliers: Sequence[float],
    *,
    extents: Sequence[tuple[Positions, int | None]] = (("all", None),),
    variants: Sequence[Mapping[str, Any]] = ({},),
) -> list[Setting]:
    """Combine every construction, place, raw multiple of its vectors, extent and variant.

    Each of several layers gets the whole multiple, as in the paper. A construction is passed by
    where it has no vectors: at places of other kinds, and everywhere if it makes spectral edits.

    Args:
        vectors: Vectors of every construction and site, for their relative strength.
        constructions: Names of vectors.
        places: Each a site or several.
        multipliers: Multiples of the vectors; one below 0 turns them round.
        extents: Pairs of positions and ``until`` (see ``steering.Intervention``).
        variants: Further fields of ``Setting``, as in ``grid``.

    Raises:
        ValueError: If a variant names what is no field of a setting, or what cannot be done, such
            as a target at a raw multiple.
    """
    settings = []
    for construction in constructions:
        for sites in places:
            at_sites = [vectors.get((construction, site), {}) for site in sites]
            fitted = [one for by_category in at_sites for one in by_category.values()]
            added = [one for one in fitted if isinstance(one, SteeringVector)]
            if len(added) < len(fitted) or not all(at_sites):
                continue
            for multiplier in multipliers:
                rho = round(sum(v.rho(multiplier) for v in added) / len(added), 4)
                sign, size = (1 if multiplier > 0 else -1), abs(multiplier)
                plain = [
                    Setting(construction, sites, sign, rho, *extent, multiplier=size)
                    for extent in extents
                ]
                settings += [_varied(one, fields) for one in plain for fields in variants]
    return list(dict.fromkeys(settings))


def steering(vectors: Vectors, setting: Setting) -> dict[str, list[Intervention]]:
    """Make the interventions of a setting: for each category its own vectors.

    Raises:
        ValueError: If the setting asks for what cannot be done, or for a target where a vector has
            no ``safe_projection``.
    """
    by_site = [vectors[setting.construction, site] for site in setting.sites]
    return {
        category: [applied(by_category[category], setting) for by_category in by_site]
        for category in by_site[0]
    }


def applied(vector: Fitted, setting: Setting, *, multiplier: float | None = None) -> Intervention:
    """Apply one vector or edit as a setting says, whatever construction and site it is of.

    Args:
        vector: A steering vector, a spectral edit, or a control of one.
        setting: Its sign, strength, extent, decay and form count.
        multiplier: Used instead of the setting's strength where a vector is added.

    Raises:
        ValueError: If the setting asks for what cannot be done, or for a target where the vector
            has no ``safe_projection``.
    """
    _check(setting)
    extent: dict[str, Any] = {"positions": setting.positions, "until": setting.until}
    if setting.form == "target":
        if isinstance(vector, SpectralEdit):
            raise ValueError(
                f"setting {setting.name!r}: a spectral edit has no direction to set a target on; "
                "take the form 'add'."
            )
        return raise_to(vector, vector.target_for(setting.rho), **extent)
    if multiplier is None:
        multiplier = multiplier_of(vector, setting)
    way: dict[str, Any] = {"decay": setting.decay, "keep_norm": setting.keep_norm}
    return steer_by(vector, multiplier, **extent, **way)


def multiplier_of(vector: Fitted, setting: Setting) -> float:
    """Find the multiplier that gives a vector a setting's sign and strength; an edit's is rho.

    Raises:
        ValueError: If the vector is zero, or the norm of the residual stream was not measured.
    """
    if setting.multiplier is not None:
        return setting.sign * setting.multiplier
    return setting.sign * vector.multiplier_for(setting.rho)


def _varied(setting: Setting, fields: Mapping[str, Any]) -> Setting:
    """Change fields of a setting.

    Raises:
        ValueError: If one is no field, or the result cannot be done.
    """
    unknown = [name for name in fields if name not in _VARIED]
    if unknown:
        raise ValueError(
            f"a variant of settings cannot have {unknown[0]!r}; allowed: {', '.join(_VARIED)}."
        )
    varied = setting._replace(**fields)
    # A target with sign -1 is left out by ``grid``; a raw multiple takes none with either sign.
    if varied.form != "target" or varied.sign > 0 or varied.multiplier is not None:
        _check(varied)
    return varied


def _check(setting: Setting) -> None:
    """Raise where a setting asks for what cannot be done."""
    if setting.form not in get_args(Form):
        raise ValueError(f"unknown form {setting.form!r}; allowed: {', '.join(get_args(Form))}.")
    if setting.form == "target" and (
        setting.decay != "none"
        or setting.keep_norm
        or setting.sign < 0
        or setting.multiplier is not None
    ):
        raise ValueError(
            f"setting {setting.name!r}: a target is set along the vector (sign 1) and takes no "
            "decay and no keep_norm, nor a raw multiple; leave them out, or add the vector "
            "(form 'add')."
        )
