from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from workbench.models.load import ModelInfo
from workbench.neurons.profiles import Example, Histogram, NeuronProfile
from workbench.neurons.weights import Vocabulary, WeightCosine
from workbench.report.neuron_dashboard import neurons_page, visible_token, write_dashboard

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</style><svg/onload=alert(3)>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "' style='position:fixed",
    "<!-- ",
    "a\u202egnp.exe\x00\ud800\u2028",
)
CLASSES = (("fraud", "safe"), ("fraud", "unsafe"), ("harmless", "neutral"), ("malware", "unsafe"))
INFO = ModelInfo("tiny", None, 3, 8, 16, 2, "float32", "raw", "0" * 16)


class Page(HTMLParser):
    """The page as a browser reads it: tags with attributes, text outside and inside of folds.

    Folds are those of harmful prompts.
    """

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.folded, self.open = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "details":
            self.open.append("harmful" in (dict(attrs).get("class") or ""))

    def handle_endtag(self, tag):
        if tag == "details":
            self.open.pop()

    def handle_data(self, data):
        (self.folded if any(self.open) else self.texts).append(data)

    @property
    def words(self):
        return "".join(self.texts)


def table(n_layers=3, n_neurons=16, categories=("fraud", "malware")):
    rng = np.random.default_rng(0)
    rows = []
    for category in categories:
        n = n_layers * n_neurons
        contribution = rng.normal(size=n) ** 3
        rows.append(
            pd.DataFrame(
                {
                    "category": category,
                    "layer": np.repeat(range(n_layers), n_neurons),
                    "neuron": np.tile(range(n_neurons), n_layers),
                    "rank": pd.Series(-contribution).rank().astype(int),
                    "contribution": contribution,
                    "auroc_twins": rng.uniform(size=n),
                    "auroc_other": rng.uniform(size=n),
                    "auroc_neutral": np.nan,
                    "q_twins": rng.uniform(size=n),
                    "hedges_g": rng.normal(size=n),
                    "p_fwer": rng.uniform(size=n),
                    "inclusion": rng.uniform(size=n),
                    "survives_twins": rng.uniform(size=n) < 0.1,
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


def profile(layer=1, neuron=2, text="words"):
    def example(label, value, word):
        return Example(
            f"{word}-{label}", "fraud", label, ("some", " " + word, "\n"), (0.1, value, -0.2), 1
        )

    return NeuronProfile(
        layer,
        neuron,
        highest=(example("unsafe", 4.0, "secret" + text), example("neutral", 2.0, "open" + text)),
        lowest=(example("safe", -1.0, "low" + text),),
        per_prompt=Histogram((-1.0, 0.0, 1.0), CLASSES, ((1, 2), (0, 3), (2, 2), (0, 0))),
        per_token=Histogram(
            (-1.0, 0.0, 1.0, 2.0), CLASSES, ((1, 2, 0), (0, 3, 1), (2, 2, 2), (1, 0, 0))
        ),
        vocabulary=Vocabulary(((" " + text, 5.0), ("b", 4.0)), (("c", -3.0),), 1.5, 0.2, 0.01, 0.9),
        cosines=tuple(
            WeightCosine(c, s, "L1.resid_mid", 0.25, 0.1)
            for c in ("fraud", "malware")
            for s in ("gate", "out")
        ),
        span="content",
        model=INFO,
    )


def test_the_page_needs_nothing_from_outside_and_runs_nothing():
    html = neurons_page(table(), [profile()], [profile(1, 5)], category="fraud")
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "input",
        "video",
        "audio",
    }
    for _, attributes in page.tags:
        assert not [
            name
            for name in attributes
            if name.startswith("on") or name in ("src", "srcset", "style", "data")
        ]
        assert attributes.get("href", "#").startswith("#")
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html


def test_the_policy_allows_its_own_style_sheet_alone():
    html = neurons_page(table(), [profile()], category="fraud")
    policy = next(
        a["content"]
        for tag, a in Page(html).tags
        if a.get("http-equiv") == "Content-Security-Policy"
    )
    style = re.search(r"<style>(.*?)</style>", html, flags=re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ")[:2] == ["default-src 'none'", f"style-src 'sha256-{digest}'"]
    assert "unsafe" not in policy
    assert html.count("<style") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_wherever_it_comes_from(text, tmp_path):
    name = text.replace("\ud800", "")  # pandas refuses it
    rows = table(categories=(name,))
    rows.attrs = {"site": text, "reference": text}
    hostile = replace(profile(text=text), span=text, model=replace(INFO, name=text))
    hostile = replace(
        hostile,
        cosines=(WeightCosine(text, text, text, 0.1, 0.1), WeightCosine("x", text, text, 0.1, 0.1)),
        per_prompt=replace(hostile.per_prompt, classes=(*CLASSES[:3], (text, "unsafe"))),
        highest=(Example(text, text, text, (text, text), (1.0, 2.0), 1), *hostile.highest),
    )
    written = write_dashboard(
        tmp_path / "page.html", rows, [hostile], [replace(hostile, neuron=9)]
    ).read_text("utf-8")
    page, plain = (
        Page(written),
        Page(neurons_page(table(categories=("plain",)), [profile()], [profile(1, 9)])),
    )
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert not [
        name for _, a in page.tags for name in a if name.startswith("on") or name == "style"
    ]
    assert visible_token(text) in page.words
    for character in "\u202e\x00\ud800\u2028":
        assert character not in written


def test_characters_that_hide_or_reorder_text_are_shown_as_their_code():
    assert visible_token("a\u202eb\x00\ud800\ufeff") == "a[U+202E]b[U+0000][U+D800][U+FEFF]"
    assert visible_token("line\n\tתו é 漢") == "line↵→תו é 漢"


def test_harmful_prompts_are_folded_and_the_others_open():
    page = Page(
        neurons_page(
            table(), [profile(text="word")], [profile(1, 5, text="random")], category="fraud"
        )
    )
    folded = "".join(page.folded)
    assert "secretword" in folded
    assert "secretrandom" in folded
    assert "secretword" not in page.words.replace("secretword-unsafe", "")
    assert "openword" in page.words
    assert "lowword" in page.words
    assert not [
        a
        for tag, a in page.tags
        if tag == "details" and a.get("class") == "harmful" and "open" in a
    ]


def test_tokens_are_colored_by_sign_and_size_and_the_peak_is_framed():
    html = neurons_page(table(), [profile()], category="fraud")
    assert '<i class="p10 peak" title="4"> secretwords</i>' in html
    assert '<i class="n2 peak" title="−1"> lowwords</i>' in html
    assert '<i title="−0.2">↵</i>' in html  # too small for a color
    assert '<i title="0.1">some</i>' in html


def test_controls_stand_beside_targets_of_their_layer():
    targets = [profile(1, 2), profile(2, 2), profile(0, 0)]
    controls = [profile(2, 9), profile(1, 9), profile(1, 10)]
    html = neurons_page(table(), targets, controls, category="fraud")
    pairs = [
        re.findall(r'<article class="card (\w+)[^"]*" id="(\w+)"', part)
        for part in html.split('<div class="pair">')[1:]
    ]
    assert pairs == [
        [("target", "L1N2"), ("control", "L1N9")],
        [("target", "L2N2"), ("control", "L2N9")],
        [("target", "L0N0")],
        [("control", "L1N10")],
    ]
    assert "Chosen neurons beside random ones" in html
    links = set(re.findall(r'href="#(\w+)"', html))
    assert links == set(re.findall(r' id="(\w+)"', html))


def test_every_score_of_the_table_is_shown_and_what_is_missing_is_a_dash():
    rows = table()
    row = rows[(rows.category == "fraud") & (rows.layer == 1) & (rows.neuron == 2)].iloc[0]
    words = Page(neurons_page(rows, [profile()], category="fraud")).words
    assert f"{row.auroc_twins:.2f}" in words
    assert f"{row.q_twins:.3f}".lstrip("0") in words
    assert f"rank {row['rank']}" in words
    bare = neurons_page(
        rows[["category", "layer", "neuron", "contribution"]], [profile()], category="fraud"
    )
    assert "AUROC against" not in bare
    assert "L1 N2" in bare
    assert "AUROC against safe twins" in neurons_page(rows, category="fraud")
    assert "AUROC against everyday" not in neurons_page(rows, category="fraud")  # nan throughout


def test_a_page_of_a_whole_model_stays_small():
    rows = table(30, 1536, ("fraud",))
    html = neurons_page(
        rows, [profile(layer, 3) for layer in range(30)], [profile(layer, 4) for layer in range(30)]
    )
    assert len(html) < 2_000_000
    assert "46,080 in 30 layers" in html


def test_scores_that_are_all_equal_or_rows_of_one_layer_still_draw():
    rows = table(1, 4, ("fraud",)).assign(contribution=0.0)
    assert "nan" not in neurons_page(rows).lower()


def test_a_wrong_table_or_category_is_refused():
    with pytest.raises(
        ValueError, match=r"holds 2 categories; say category=..., one of 'fraud', 'malware'"
    ):
        neurons_page(table())
    with pytest.raises(ValueError, match="Did you mean 'malware'"):
        neurons_page(table(), category="malwar")
    with pytest.raises(ValueError, match="contribution is missing"):
        neurons_page(table().drop(columns="contribution"), category="fraud")
    with pytest.raises(ValueError, match="every row is missing"):
        neurons_page(table().iloc[:0])
