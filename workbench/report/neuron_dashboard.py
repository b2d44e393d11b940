"""One self-contained page a category: where its neurons lie, how they rank, and a card for each of the chosen ones beside its control.

Data in, text out: no model, no script, no network. Prompts and tokens are hostile text: the template escapes every value, characters that
could reorder or hide text are written as their code, and the page's own policy allows nothing but its one style sheet.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.figures.notebook import Html
from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, write_text
from workbench.report.neuron_geometry import anchor, ridges, score_map, svg_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import pandas as pd

    from workbench.neurons.profiles import Example, NeuronProfile


N_LISTED = 40
"""Neurons in the ranked list."""


N_OF_CONTROL = 4
"""Tokens shown at either end of a control."""


TESTS = {"twins": "safe twins", "neutral": "everyday prompts", "other": "other risks"}
"""What AUROC and q are against, and what the page calls it."""


_MAPS = {
    "contribution": ("Contribution", "what the neuron adds to the category's direction"),
    "auroc_twins": ("AUROC against safe twins", ".5 is chance"),
    "auroc_other": ("AUROC against other risks", ".5 is chance"),
    "auroc_neutral": ("AUROC against everyday prompts", "topic and style count here too"),
}


_LONGEST = 80  # characters of one token


_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def neurons_page(
    table: pd.DataFrame,
    profiles: Sequence[NeuronProfile] = (),
    controls: Sequence[NeuronProfile] | None = None,
    *,
    category: str | None = None,
) -> str:
    """A category's neurons as one HTML page that needs nothing else.

    Args:
        table: From ``attribute_neurons`` (or neurons.csv): category, layer, neuron, contribution; all its other scores are shown where they are.
            Keep every neuron in it: the map shows them all.
        profiles: Cards, in this order; see ``profile_neurons``.
        controls: Profiles of random neurons of the same layers (``random_neurons``), shown beside the card of their layer.
        category: Which; may be left out where the table holds one.

    Raises:
        ValueError: If the table is no such table or does not hold the category.
    """
    own = _rows_of(table, category)
    name = str(own["category"].iloc[0])
    controls = list(controls or ())
    scores = {(int(row["layer"]), int(row["neuron"])): row for row in own.to_dict("records")}
    pairs, left = _beside(profiles, controls)
    marked = [(p.layer, p.neuron) for p in profiles] or [
        tuple(pair) for pair in _ranked(own)[["layer", "neuron"]].to_numpy()[:N_LISTED]
    ]
    marks = [(*pair, "target") for pair in marked] + [
        (c.layer, c.neuron, "control") for c in controls
    ]
    linked = {(p.layer, p.neuron) for p in (*profiles, *controls)}
    words = {(p.layer, p.neuron): [word for word, _ in p.vocabulary.promoted[:4]] for p in profiles}

    def card(profile: NeuronProfile, role: str) -> dict[str, Any]:
        return _card(profile, scores.get((profile.layer, profile.neuron), {}), name, role)

    return _template().render(
        category=name,
        facts=_facts(own, table.attrs, profiles, controls),
        maps=[
            score_map(own, score, *titles, marks, linked)
            for score, titles in _MAPS.items()
            if score in own and own[score].notna().any()
        ],
        ranked=_list(own, linked, words),
        tests={
            key: title
            for key, title in TESTS.items()
            if f"auroc_{key}" in own and own[f"auroc_{key}"].notna().any()
        },
        comparison=_comparison(profiles, controls, scores, name) if profiles and controls else [],
        pairs=[
            (card(target, "target"), card(control, "control") if control else None)
            for target, control in pairs
        ],
        left=[card(control, "control") for control in left],
    )


def show_neurons(
    table: pd.DataFrame,
    profiles: Sequence[NeuronProfile] = (),
    controls: Sequence[NeuronProfile] | None = None,
    *,
    category: str | None = None,
    height: int = 900,
) -> Html:
    """A category's neurons as a page inside a notebook: map, ranked list, a card for each profile with its control beside it.

    Args:
        table: From ``attribute_neurons``, whole.
        profiles: Cards, in this order; see ``neuron_profiles.profile_neurons``.
        controls: Profiles of random neurons of the same layers.
        category: Which; may be left out where the table holds one.
        height: Of the frame, in pixels.
    """
    page = html.escape(neurons_page(table, profiles, controls, category=category), quote=True)
    return Html(
        f'<iframe sandbox srcdoc="{page}" style="width:100%;height:{height}px;border:0"></iframe>'
    )


def write_dashboard(
    path: PathLike,
    table: pd.DataFrame,
    profiles: Sequence[NeuronProfile] = (),
    controls: Sequence[NeuronProfile] | None = None,
    *,
    category: str | None = None,
) -> Path:
    """Write the page of ``neurons`` to a file and return its path."""
    write_text(path, neurons_page(table, profiles, controls, category=category))
    return Path(path)


def visible_token(text: object) -> str:
    """Text with line ends and tabs as arrows, and characters that hide or reorder text (bidi marks, NUL, lone surrogates) as their code."""
    arrows = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(
        arrows.get(c) or (f"[U+{ord(c):04X}]" if unicodedata.category(c) in _UNSEEN else c)
        for c in str(text)
    )


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def policy_hash(style: str) -> str:
        return base64.b64encode(hashlib.sha256(str(style).encode("utf-8")).digest()).decode("ascii")

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            value if isinstance(value, Markup | int | float) else visible_token(value)
        ),
    )
    environment.filters |= {
        "policy_hash": policy_hash,
        "number": svg_number,
        "percent": _percent,
        "p": _p_value,
        "two": lambda x: svg_number(x, ".2f"),
    }
    return environment.get_template("neuron_dashboard.html.jinja")


def _rows_of(table: pd.DataFrame, category: str | None) -> pd.DataFrame:
    missing = [
        name
        for name in ("category", "layer", "neuron", "contribution")
        if name not in table.columns
    ]
    if missing or table.empty:
        raise ValueError(
            f"this is no table of attribute_neurons: {missing[0] if missing else 'every row'} is missing."
        )
    known = list(dict.fromkeys(table["category"].astype(str)))
    if category is None and len(known) > 1:
        raise ValueError(
            f"the table holds {len(known)} categories; say category=..., one of {', '.join(map(repr, known))}."
        )
    category = known[0] if category is None else category
    if category not in known:
        raise ValueError(
            f"no neurons of category {category!r}; categories: {', '.join(map(repr, known))}.{did_you_mean(category, known)}"
        )
    return table[table["category"].astype(str) == category]


def _ranked(own: pd.DataFrame) -> pd.DataFrame:
    return (
        own.sort_values("rank")
        if "rank" in own
        else own.sort_values("contribution", ascending=False)
    )


def _beside(
    profiles: Iterable[NeuronProfile], controls: Iterable[NeuronProfile]
) -> tuple[list[tuple[NeuronProfile, NeuronProfile | None]], list[NeuronProfile]]:
    """Each profile with a control of its own layer, as far as they go, and the controls that are left."""
    left = list(controls)
    pairs = []
    for profile in profiles:
        control = next((own for own in left if own.layer == profile.layer), None)
        if control is not None:
            left.remove(control)
        pairs.append((profile, control))
    return pairs, left


def _facts(
    own: pd.DataFrame,
    attrs: Mapping[Any, Any],
    profiles: Sequence[NeuronProfile],
    controls: Sequence[NeuronProfile],
) -> list[tuple[str, str]]:
    facts = [("neurons", f"{len(own):,} in {own['layer'].nunique()} layers")]
    if profiles:
        first = profiles[0]
        n_prompts = sum(map(sum, first.per_prompt.counts))
        facts += [
            ("model", first.model.name),
            ("prompts read", f"{n_prompts:,} (span: {first.span})"),
        ]
        facts.append(("cards", f"{len(profiles)} neurons, {len(controls)} random controls"))
    if "site" in attrs:
        facts.append(
            ("direction", f"unsafe minus {attrs.get('reference', 'reference')} at {attrs['site']}")
        )
    for test, title in {**TESTS, "fwer": "family-wise error"}.items():
        if f"survives_{test}" in own:
            facts.append(
                (f"survive: {title}", f"{int(own[f'survives_{test}'].astype(bool).sum()):,}")
            )
    return facts


def _list(
    own: pd.DataFrame, linked: set[tuple[int, int]], words: Mapping[tuple[int, int], list[str]]
) -> list[dict[str, Any]]:
    rows = []
    for place, row in enumerate(_ranked(own).head(N_LISTED).to_dict("records"), start=1):
        pair = int(row["layer"]), int(row["neuron"])
        rows.append(
            {
                "rank": row.get("rank", place),
                "name": f"L{pair[0]} N{pair[1]}",
                "link": anchor(*pair) if pair in linked else "",
                "words": words.get(pair, []),
                "scores": _scores(row),
            }
        )
    return rows


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's scores as the template wants them; what the table does not have is None."""
    names = (
        "rank",
        "contribution",
        "contribution_share",
        "contribution_half_1",
        "contribution_half_2",
        "inclusion",
        "hedges_g",
        "p_fwer",
    )
    scores = {name: row.get(name) for name in names}
    scores["low"], scores["high"] = row.get("contribution_low"), row.get("contribution_high")
    scores["survives_fwer"] = bool(row.get("survives_fwer", False))
    scores["tests"] = {
        test: {
            "auroc": row.get(f"auroc_{test}"),
            "low": row.get(f"auroc_{test}_low"),
            "high": row.get(f"auroc_{test}_high"),
            "fit": row.get(f"auroc_{test}_fit"),
            "q": row.get(f"q_{test}"),
            "survives": bool(row.get(f"survives_{test}", False)),
        }
        for test in TESTS
        if f"auroc_{test}" in row
    }
    return scores


def _card(
    profile: NeuronProfile, row: Mapping[str, Any], category: str, role: str
) -> dict[str, Any]:
    largest = max(
        (abs(a) for e in (*profile.highest, *profile.lowest) for a in e.activations), default=0.0
    )
    n_shown = None if role == "target" else N_OF_CONTROL
    ends = [
        _end("Highest", profile.highest[:n_shown], largest),
        _end("Lowest", profile.lowest[:n_shown], largest),
    ]
    ends.sort(key=lambda end: -end["reach"])
    groups = _groups(category)
    classes = sorted({own for own, label in profile.per_prompt.classes if label == "unsafe"})
    return {
        "id": anchor(profile.layer, profile.neuron),
        "name": f"L{profile.layer} N{profile.neuron}",
        "role": role,
        "scores": _scores(row) if row else None,
        "ends": ends,
        "per_prompt": ridges(profile.per_prompt, groups, "unsafe"),
        "per_token": ridges(profile.per_token, groups, "unsafe", root=True),
        "by_category": ridges(profile.per_prompt, {own: _is(own) for own in classes}, category)
        if role == "target"
        else None,
        "vocabulary": profile.vocabulary,
        "cosines": [cosine for cosine in profile.cosines if cosine.category == category],
        "other_cosines": _all_cosines(profile) if role == "target" else None,
    }


def _all_cosines(profile: NeuronProfile) -> dict[str, Any] | None:
    """Cosines as a table, a row a category; None where there is but one."""
    sides = list(dict.fromkeys(cosine.side for cosine in profile.cosines))
    value = {(cosine.category, cosine.side): cosine.value for cosine in profile.cosines}
    categories = list(dict.fromkeys(cosine.category for cosine in profile.cosines))
    rows = [(category, [value.get((category, side)) for side in sides]) for category in categories]
    return {"sides": sides, "rows": rows} if len(rows) > 1 else None


def _end(title: str, examples: Sequence[Example], largest: float) -> dict[str, Any]:
    shown = [_example(place, example, largest) for place, example in enumerate(examples, start=1)]
    return {
        "title": title,
        "reach": max((abs(example.value) for example in examples), default=0.0),
        "range": f"{svg_number(examples[0].value)} to {svg_number(examples[-1].value)}"
        if examples
        else "none",
        "harmful": [example for example in shown if example["label"] == "unsafe"],
        "others": [example for example in shown if example["label"] != "unsafe"],
    }


def _example(place: int, example: Example, largest: float) -> dict[str, Any]:
    tokens = []
    for i, (text, value) in enumerate(zip(example.tokens, example.activations, strict=True)):
        shade = min(10, math.ceil(abs(value) / largest * 10 - 0.5)) if largest else 0
        color = f"{'p' if value > 0 else 'n'}{shade}" if shade > 0 else "z"
        short = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
        tokens.append((short, color + (" peak" if i == example.peak else ""), svg_number(value)))
    return {
        "place": place,
        "value": example.value,
        "category": example.category,
        "label": example.label,
        "prompt": example.prompt_id,
        "tokens": tokens,
    }


def _is(category: str, label: str = "unsafe") -> Callable[[str, str], bool]:
    return lambda own, its: own == category and its == label


def _groups(category: str) -> dict[str, Callable[[str, str], bool]]:
    """The classes that a category is told apart from, each prompt in one of them."""
    return {
        "unsafe": _is(category),
        "safe twins": _is(category, "safe"),
        "other risks": lambda own, label: own != category and label == "unsafe",
        "other safe": lambda own, label: own != category and label == "safe",
        "everyday": lambda own, label: own != category and label == "neutral",
    }


def _comparison(
    profiles: Sequence[NeuronProfile],
    controls: Sequence[NeuronProfile],
    scores: Mapping[tuple[int, int], Mapping[str, Any]],
    category: str,
) -> list[tuple[str, str, str]]:
    """Targets and controls side by side, by what the cards show: whether being chosen goes with anything that random neurons lack."""

    def median(
        score: Callable[[Mapping[str, Any]], float],
    ) -> Callable[[Sequence[NeuronProfile]], str]:
        def of(side: Sequence[NeuronProfile]) -> str:
            known = [
                score(scores[p.layer, p.neuron]) for p in side if (p.layer, p.neuron) in scores
            ]
            known = [value for value in known if value == value]
            return svg_number(float(np.median(known))) if known else "–"

        return of

    def from_category(end: str) -> Callable[[Sequence[NeuronProfile]], str]:
        def of(side: Sequence[NeuronProfile]) -> str:
            hits = [
                e.category == category and e.label == "unsafe"
                for p in side
                for e in getattr(p, end)
            ]
            return f"{100 * sum(hits) / len(hits):.0f} % of {len(hits)}" if hits else "–"

        return of

    def cosine(inward: bool) -> Callable[[Sequence[NeuronProfile]], str]:
        def of(side: Sequence[NeuronProfile]) -> str:
            known = [
                [
                    abs(c.value)
                    for c in p.cosines
                    if c.category == category and (c.side != "out") == inward
                ]
                for p in side
            ]
            largest = [max(values) for values in known if values]
            return svg_number(float(np.median(largest)), ".3f") if largest else "–"

        return of

    def pointed(side: Sequence[NeuronProfile]) -> str:
        return f"{sum(min(p.vocabulary.p_promoted, p.vocabulary.p_suppressed) <= 0.025 for p in side)} of {len(side)}"

    rows: dict[str, Callable[[Sequence[NeuronProfile]], str]] = {
        "contribution, median": median(lambda row: float(row["contribution"])),
        "distance of the AUROC from .5, safe twins, median": median(
            lambda row: abs(row.get("auroc_twins", math.nan) - 0.5)
        ),
        "distance of the AUROC from .5, other risks, median": median(
            lambda row: abs(row.get("auroc_other", math.nan) - 0.5)
        ),
        "highest tokens that are in unsafe prompts of the category": from_category("highest"),
        "lowest tokens that are in unsafe prompts of the category": from_category("lowest"),
        "input weights, |cosine| to the category, larger of gate and up, median": cosine(True),
        "output weights, |cosine| to the category, median": cosine(False),
        "vocabulary more pointed than 97.5 % of the layer, at either end": pointed,
    }
    return [(name, of(profiles), of(controls)) for name, of in rows.items()]


def _percent(share: Any) -> str:
    if share is None or share != share:
        return "–"
    return svg_number(100 * share, ".0f" if abs(share) >= 0.0995 else ".2g")


def _p_value(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return (
        "<.001" if value < 0.001 else format(float(value), ".3f").lstrip("0") if value < 1 else "1"
    )
