"""Write a page about a category's neurons: a map, a ranked list, and a card per neuron.

The card of each chosen neuron stands beside that of a random one, its control. The page is made of
data alone: it needs no model, no script and no network. Prompts and tokens are hostile text: the
template escapes every value, characters that could reorder or hide text are written as their code,
and the page's own policy allows nothing but its one style sheet.
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
from workbench.files.store import PathLike, local_path, write_text
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
"""Prompts that AUROC and q compare with, and what the page calls them."""


_MAPS = {
    "contribution": ("Contribution", "what the neuron adds to the category's direction"),
    "auroc_twins": ("AUROC against safe twins", ".5 is chance"),
    "auroc_other": ("AUROC against other risks", ".5 is chance"),
    "auroc_neutral": ("AUROC against everyday prompts", "topic and style count here too"),
}


_LONGEST = 80
"""Characters of a token that are shown."""

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of characters that hide or reorder others."""


def neurons_page(
    table: pd.DataFrame,
    profiles: Sequence[NeuronProfile] = (),
    controls: Sequence[NeuronProfile] | None = None,
    *,
    category: str | None = None,
) -> str:
    """Render a category's neurons as one HTML page that needs nothing else.

    Args:
        table: Result of ``attribute_neurons`` (or neurons.csv) with columns category, layer, neuron
            and contribution; its other scores are shown where it has them. Keep every neuron in it:
            the map shows them all.
        profiles: Neurons that get a card, in this order; see ``profile_neurons``.
        controls: Profiles of random neurons of the same layers (``random_neurons``), each shown
            beside a card of its layer.
        category: The category to show; may be left out where the table holds only one.

    Raises:
        ValueError: If the table is no such table or does not hold the category.
    """
    rows = _rows_of(table, category)
    name = str(rows["category"].iloc[0])
    controls = list(controls or ())
    scores = {(int(row["layer"]), int(row["neuron"])): row for row in rows.to_dict("records")}
    pairs, left = _beside(profiles, controls)
    marked = [(p.layer, p.neuron) for p in profiles] or [
        tuple(pair) for pair in _ranked(rows)[["layer", "neuron"]].to_numpy()[:N_LISTED]
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
        facts=_facts(rows, table.attrs, profiles, controls),
        maps=[
            score_map(rows, score, *titles, marks, linked)
            for score, titles in _MAPS.items()
            if score in rows and rows[score].notna().any()
        ],
        ranked=_list(rows, linked, words),
        tests={
            key: title
            for key, title in TESTS.items()
            if f"auroc_{key}" in rows and rows[f"auroc_{key}"].notna().any()
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
    """Show a category's neurons in a notebook: map, ranked list, and a card per profile.

    Args:
        table: Result of ``attribute_neurons``, with all its neurons.
        profiles: Neurons that get a card, in this order; see ``profile_neurons``.
        controls: Profiles of random neurons of the same layers, shown beside the cards.
        category: The category to show; may be left out where the table holds only one.
        height: Height of the frame in pixels.
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
    """Write the page of ``neurons_page`` to a file and return its path."""
    write_text(path, neurons_page(table, profiles, controls, category=category))
    return local_path(path)


def visible_token(text: object) -> str:
    """Write line ends and tabs as arrows, and characters that hide or reorder text as codes.

    The latter are bidi marks, control characters such as NUL, and lone surrogates.
    """
    arrows = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(
        arrows.get(c) or (f"[U+{ord(c):04X}]" if unicodedata.category(c) in _UNSEEN else c)
        for c in str(text)
    )


def _template() -> Any:
    """Load the template; whatever it prints is escaped, hidden characters written as codes."""
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
    """Return the rows of the category, or of the only one that the table holds."""
    needed = ("category", "layer", "neuron", "contribution")
    missing = [name for name in needed if name not in table.columns]
    if missing or table.empty:
        raise ValueError(
            "this is no table of attribute_neurons: "
            f"{missing[0] if missing else 'every row'} is missing."
        )
    known = list(dict.fromkeys(table["category"].astype(str)))
    names = ", ".join(map(repr, known))
    if category is None and len(known) > 1:
        raise ValueError(
            f"the table holds {len(known)} categories; say category=..., one of {names}."
        )
    category = known[0] if category is None else category
    if category not in known:
        raise ValueError(
            f"no neurons of category {category!r}; categories: {names}."
            f"{did_you_mean(category, known)}"
        )
    return table[table["category"].astype(str) == category]


def _ranked(rows: pd.DataFrame) -> pd.DataFrame:
    if "rank" in rows:
        return rows.sort_values("rank")
    return rows.sort_values("contribution", ascending=False)


def _beside(
    profiles: Iterable[NeuronProfile], controls: Iterable[NeuronProfile]
) -> tuple[list[tuple[NeuronProfile, NeuronProfile | None]], list[NeuronProfile]]:
    """Pair each profile with a control of its layer while there are any; return the rest too."""
    left = list(controls)
    pairs = []
    for profile in profiles:
        control = next((other for other in left if other.layer == profile.layer), None)
        if control is not None:
            left.remove(control)
        pairs.append((profile, control))
    return pairs, left


def _facts(
    rows: pd.DataFrame,
    attrs: Mapping[Any, Any],
    profiles: Sequence[NeuronProfile],
    controls: Sequence[NeuronProfile],
) -> list[tuple[str, str]]:
    """Return what the head of the page says: names and values."""
    facts = [("neurons", f"{len(rows):,} in {rows['layer'].nunique()} layers")]
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
        if f"survives_{test}" in rows:
            facts.append(
                (
                    f"survive the test: {title}",
                    f"{int(rows[f'survives_{test}'].astype(bool).sum()):,}",
                )
            )
    return facts


def _list(
    rows: pd.DataFrame, linked: set[tuple[int, int]], words: Mapping[tuple[int, int], list[str]]
) -> list[dict[str, Any]]:
    """Return the lines of the ranked list."""
    lines = []
    for place, row in enumerate(_ranked(rows).head(N_LISTED).to_dict("records"), start=1):
        pair = int(row["layer"]), int(row["neuron"])
        lines.append(
            {
                "rank": row.get("rank", place),
                "name": f"L{pair[0]} N{pair[1]}",
                "link": anchor(*pair) if pair in linked else "",
                "words": words.get(pair, []),
                "scores": _scores(row),
            }
        )
    return lines


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's scores for the template; what the table does not have is None."""
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
    """Return what the card of a neuron shows; a control shows less."""
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
    risks = sorted({name for name, label in profile.per_prompt.classes if label == "unsafe"})
    return {
        "id": anchor(profile.layer, profile.neuron),
        "name": f"L{profile.layer} N{profile.neuron}",
        "role": role,
        "scores": _scores(row) if row else None,
        "ends": ends,
        "per_prompt": ridges(profile.per_prompt, groups, "unsafe"),
        "per_token": ridges(profile.per_token, groups, "unsafe", root=True),
        "by_category": ridges(profile.per_prompt, {name: _is(name) for name in risks}, category)
        if role == "target"
        else None,
        "vocabulary": profile.vocabulary,
        "cosines": [cosine for cosine in profile.cosines if cosine.category == category],
        "other_cosines": _all_cosines(profile) if role == "target" else None,
    }


def _all_cosines(profile: NeuronProfile) -> dict[str, Any] | None:
    """Return the cosines as a table, one row per category; None where there is only one."""
    sides = list(dict.fromkeys(cosine.side for cosine in profile.cosines))
    value = {(cosine.category, cosine.side): cosine.value for cosine in profile.cosines}
    categories = list(dict.fromkeys(cosine.category for cosine in profile.cosines))
    rows = [(category, [value.get((category, side)) for side in sides]) for category in categories]
    return {"sides": sides, "rows": rows} if len(rows) > 1 else None


def _end(title: str, examples: Sequence[Example], largest: float) -> dict[str, Any]:
    """Return the tokens at one end of a neuron's range, those in harmful prompts apart."""
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
    """Return a prompt's tokens, each with its color class and value."""
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
    """Return the test whether a prompt has this category and label."""
    return lambda its_category, its_label: its_category == category and its_label == label


def _groups(category: str) -> dict[str, Callable[[str, str], bool]]:
    """Return tests for the category's prompts and those it is compared with; each fits one."""
    return {
        "unsafe": _is(category),
        "safe twins": _is(category, "safe"),
        "other risks": lambda its, label: its != category and label == "unsafe",
        "other safe": lambda its, label: its != category and label == "safe",
        "everyday": lambda its, label: its != category and label == "neutral",
    }


def _comparison(
    profiles: Sequence[NeuronProfile],
    controls: Sequence[NeuronProfile],
    scores: Mapping[tuple[int, int], Mapping[str, Any]],
    category: str,
) -> list[tuple[str, str, str]]:
    """Compare chosen and random neurons by what the cards show.

    It says whether being chosen goes with anything that random neurons lack. A line is the name of
    a quantity, its value for the chosen neurons, and its value for the random ones.
    """
    lines = []
    for name, score in (
        ("contribution, median", lambda row: float(row["contribution"])),
        ("distance of the AUROC from .5, safe twins, median", _distance("auroc_twins")),
        ("distance of the AUROC from .5, other risks, median", _distance("auroc_other")),
    ):
        medians = [_median_score(side, scores, score) for side in (profiles, controls)]
        lines.append((name, *medians))
    for end in ("highest", "lowest"):
        shares = [_share_in_category(side, end, category) for side in (profiles, controls)]
        lines.append((f"{end} tokens that are in unsafe prompts of the category", *shares))
    for name, inward in (
        ("input weights, |cosine| to the category, larger of gate and up, median", True),
        ("output weights, |cosine| to the category, median", False),
    ):
        cosines = [_median_cosine(side, category, inward=inward) for side in (profiles, controls)]
        lines.append((name, *cosines))
    pointed = [_n_pointed(side) for side in (profiles, controls)]
    lines.append(("vocabulary more pointed than 97.5 % of the layer, at either end", *pointed))
    return [(name, chosen, random) for name, chosen, random in lines]


def _distance(column: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda row: abs(row.get(column, math.nan) - 0.5)


def _median_score(
    side: Sequence[NeuronProfile],
    scores: Mapping[tuple[int, int], Mapping[str, Any]],
    score: Callable[[Mapping[str, Any]], float],
) -> str:
    """Return the median of a score over the neurons that the table has it for."""
    values = [score(scores[p.layer, p.neuron]) for p in side if (p.layer, p.neuron) in scores]
    known = [value for value in values if not math.isnan(value)]
    return svg_number(float(np.median(known))) if known else "–"


def _share_in_category(side: Sequence[NeuronProfile], end: str, category: str) -> str:
    """Return the share of tokens at one end that are in unsafe prompts of the category."""
    hits = [
        example.category == category and example.label == "unsafe"
        for profile in side
        for example in getattr(profile, end)
    ]
    return f"{100 * sum(hits) / len(hits):.0f} % of {len(hits)}" if hits else "–"


def _median_cosine(side: Sequence[NeuronProfile], category: str, *, inward: bool) -> str:
    """Return the median of each neuron's largest absolute cosine to the category's direction."""
    cosines = [
        [
            abs(cosine.value)
            for cosine in profile.cosines
            if cosine.category == category and (cosine.side != "out") == inward
        ]
        for profile in side
    ]
    largest = [max(values) for values in cosines if values]
    return svg_number(float(np.median(largest)), ".3f") if largest else "–"


def _n_pointed(side: Sequence[NeuronProfile]) -> str:
    """Count neurons whose vocabulary is more pointed than that of 97.5 % of their layer."""
    vocabularies = [profile.vocabulary for profile in side]
    n_pointed = sum(min(v.p_promoted, v.p_suppressed) <= 0.025 for v in vocabularies)
    return f"{n_pointed} of {len(side)}"


def _percent(share: Any) -> str:
    if share is None or share != share:
        return "–"
    return svg_number(100 * share, ".0f" if abs(share) >= 0.0995 else ".2g")


def _p_value(value: Any) -> str:
    if value is None or value != value:
        return "–"
    if value < 0.001:
        return "<.001"
    return format(float(value), ".3f").lstrip("0") if value < 1 else "1"
