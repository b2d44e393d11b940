from __future__ import annotations

import json
import re
import unicodedata

import pandas as pd
import pytest
from helpers.synthetic_run import HOSTILE, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import figures
from workbench.evaluation import metrics as evaluation
from workbench.figures import notebook as drawing
from workbench.figures import wording
from workbench.generation import answers as generation
from workbench.safesteer.run_folder import read_run

CATEGORIES = ("fraud", "malware")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return read_run(
        write_run(tmp_path_factory.mktemp("run"), prompts_each=6, categories=CATEGORIES)
    ).tables


def drawn(figure):
    """The figure as the page gets it."""
    return json.loads(figure.to_json())


def row(condition, metric="refusal", value=0.5, change=None, category="all"):
    low, middle, high = change or (float("nan"),) * 3
    ends = {"low": value - 0.1, "high": value + 0.1, "n": 20, "n_unscored": 0}
    return {
        "condition": condition,
        "category": category,
        "metric": metric,
        "value": value,
        **ends,
        "p": 0.01,
    } | {
        "difference": middle,
        "difference_low": low,
        "difference_high": high,
    }


def test_words_agree_with_the_modules_that_measure():
    assert wording.UNSTEERED == generation.UNSTEERED
    assert wording.ALL_CATEGORIES == evaluation.ALL
    assert set(evaluation.METRICS) <= set(wording.METRICS)
    assert {name for name in evaluation.METRICS if wording.metric(name).share} == set(
        evaluation.RATES
    )


def test_the_unsafe_rate_goes_by_the_name_that_papers_give_it():
    assert wording.metric("unsafe").label == "unsafe responses (%UR)"
    for category in ("all", "fraud"):
        frame = pd.DataFrame([row("unsteered", "unsafe", 0.4, category=category)])
        title = drawn(figures.evaluation(frame, category, ["unsafe"]))["layout"]["annotations"][0]
        assert title["text"] == "<b>unsafe responses<br>(%UR)</b>"


def test_every_figure_is_the_same_each_time_and_is_valid_json(tables):
    for draw in (
        lambda: figures.separability(tables["separability"]),
        lambda: figures.tuning(tables["tuning"]),
        lambda: figures.evaluation(tables["evaluation"], "fraud"),
        lambda: figures.neuron_map(tables["neurons"], "fraud"),
        lambda: figures.layer_scores(tables["neurons"]),
    ):
        figure = drawn(draw())
        assert figure["data"]
        assert figure == drawn(draw())


def test_a_figure_does_not_change_its_table(tables):
    before = {name: frame.copy() for name, frame in tables.items() if frame is not None}
    figures.separability(tables["separability"])
    figures.tuning(tables["tuning"])
    figures.evaluation(tables["evaluation"])
    figures.neuron_map(tables["neurons"], "fraud")
    for name, frame in before.items():
        pd.testing.assert_frame_equal(tables[name], frame)


def test_evaluation_fills_a_change_only_where_its_interval_leaves_out_zero():
    frame = pd.DataFrame(
        [
            row("unsteered"),
            row("sure", change=(0.1, 0.2, 0.3)),
            row("unsure", change=(-0.1, 0.1, 0.3)),
            row("random", change=(-0.2, -0.1, -0.01)),
        ]
    )
    below = [
        trace
        for trace in drawn(figures.evaluation(frame))["data"]
        if trace["yaxis"] == "y2" and trace["x"]
    ]
    assert [trace["marker"]["symbol"] for trace in below] == [
        ["circle"],
        ["circle-open"],
        ["diamond"],
    ]
    assert [trace["x"] for trace in below] == [[20.0], [10.0], [-10.0]]  # points, not shares


def test_evaluation_puts_the_unsteered_model_first_and_shows_controls_apart():
    frame = pd.DataFrame(
        [row("random", change=(0, 0, 0)), row("steered", change=(0, 0, 0)), row("unsteered")]
    )
    figure = drawn(figures.evaluation(frame))
    assert figure["layout"]["yaxis"]["ticktext"] == ["unsteered", "random", "steered"]
    symbols = [trace["marker"]["symbol"][0] for trace in figure["data"] if trace["yaxis"] == "y"]
    assert symbols == ["square", "diamond", "circle"]


def test_an_interval_without_ends_has_no_bar():
    frame = pd.DataFrame([row("unsteered") | {"low": float("-inf"), "high": float("inf")}])
    bar = drawn(figures.evaluation(frame))["data"][0]["error_x"]
    assert bar["array"] == [0.0]
    assert bar["arrayminus"] == [0.0]


def test_tuning_rings_exactly_what_was_chosen(tables):
    frame = tables["tuning"]
    rings = [
        t
        for t in drawn(figures.tuning(frame, ["refusal"]))["data"]
        if t["marker"].get("size") == 18 and "name" not in t
    ]
    shown = sorted((x, y) for trace in rings for x, y in zip(trace["x"], trace["y"], strict=True))
    chosen = frame[frame["chosen"] & (frame["metric"] == "refusal")]
    assert shown == sorted(zip(chosen["sign"] * chosen["rho"], chosen["value"], strict=True))


def test_tuning_crosses_what_breaks_too_much_text(tables):
    frame = tables["tuning"].assign(feasible=False)
    traces = [t for t in drawn(figures.tuning(frame, ["refusal"]))["data"] if t.get("error_y")]
    assert traces
    for trace in traces:  # the unsteered model, at strength 0, is not part of the grid
        assert {s for s, x in zip(trace["marker"]["symbol"], trace["x"], strict=True) if x} == {"x"}


def test_separability_has_a_line_per_category_in_every_panel(tables):
    frame = tables["separability"]
    figure = drawn(figures.separability(frame))
    assert len(figure["data"]) == len(CATEGORIES) * 2 * 3
    assert sum(trace["showlegend"] for trace in figure["data"]) == len(CATEGORIES)
    assert all(
        (shape["type"], shape["y0"], shape["y1"]) == ("line", 0.5, 0.5)
        for shape in figure["layout"]["shapes"]
    )
    assert len(figure["layout"]["shapes"]) == 6


def test_neurons_are_the_largest_of_their_category(tables):
    rows = tables["neurons"][tables["neurons"]["category"] == "malware"]
    shown = drawn(figures.neuron_map(tables["neurons"], "malware", top=10))["data"][0]["y"]
    assert sorted(map(abs, shown)) == sorted(rows["contribution"].abs().nlargest(10))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.floats(-5, 5, allow_nan=False)),
        min_size=1,
        max_size=12,
    )
)
def test_layer_scores_lose_nothing(rows):
    frame = pd.DataFrame(rows, columns=["category", "layer", "contribution"])
    tiles = drawn(figures.layer_scores(frame))["data"][0]
    assert sum(map(sum, tiles["z"])) == pytest.approx(frame["contribution"].sum(), abs=1e-9)
    assert len(tiles["z"]) == frame["category"].nunique()


def test_errors_say_what_is_there(tables):
    with pytest.raises(ValueError, match=r"no rows of category 'fruad'; there are: 'fraud'"):
        figures.neuron_map(tables["neurons"], "fruad")
    with pytest.raises(ValueError, match=r"evaluation needs columns .*'value' is missing"):
        figures.evaluation(tables["evaluation"].drop(columns="value"))
    with pytest.raises(
        ValueError, match=r"no rows of metrics \['blue'\]; metrics: safe_helpful_proxy"
    ):
        figures.evaluation(tables["evaluation"], metrics=["blue"])
    with pytest.raises(ValueError, match=r"separability: there are no rows"):
        figures.separability(tables["separability"][:0])


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_as_plain_text(name):
    name = name.replace("\ud800", "")  # no table can hold half a character
    frame = pd.DataFrame(
        [row("unsteered"), row(name, change=(0, 0.1, 0.2)), row("unsteered", category=name)]
    )
    neuron = pd.DataFrame([{"category": name, "layer": 1, "neuron": 2, "contribution": 0.5}])
    auroc = pd.DataFrame(
        [{"layer": 1, "category": name, "against": name, "kind": name, "auroc": 0.7}]
    )
    setting = pd.DataFrame(
        [{"construction": name, "sites": name, "sign": 1, "rho": 0.1, "metric": name, "value": 0.2}]
    )
    for figure in (
        figures.evaluation(frame),
        figures.evaluation(frame, category=name),
        figures.neuron_map(neuron, name),
        figures.layer_scores(neuron),
        figures.separability(auroc),
        figures.tuning(setting),
    ):
        tags = set(re.findall(r"<[^>]*>", " ".join(texts(drawn(figure)))))
        assert tags <= {"<b>", "</b>", "<br>", "<extra>", "</extra>"}
        assert not any(
            char in "\u202e\u2066\u200b\x00" for text in texts(drawn(figure)) for char in text
        )


def texts(value):
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in inside for text in texts(item)]


@given(st.text())
def test_visible_text_hides_nothing_and_stays_so(text):
    shown = wording.visible(text)
    hiding = {
        char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }
    assert hiding <= set("\n\t\u200c\u200d")
    assert wording.visible(shown) == shown
    shown.encode("utf-8")


@given(st.sampled_from([*wording.METRICS, "something"]), st.floats(-200, 200), st.booleans())
def test_numbers_never_show_a_negative_zero(name, value, signed):
    shown = wording.number(name, value, signed=signed)
    assert not re.fullmatch(r"[−+]0(\.0*)?( %| points)?", shown) or abs(value) < 0.005
    assert "-" not in shown


def test_sites_of_neighboring_layers_are_a_range():
    assert wording.short_sites("L12.attn_out L13.attn_out L14.attn_out") == "L12–14.attn_out"
    assert wording.short_sites("L12.attn_out L14.attn_out") == "L12.attn_out L14.attn_out"
    assert wording.short_sites("L15.resid_post") == "L15.resid_post"


def test_only_the_first_figure_of_a_notebook_brings_the_library(monkeypatch, tables):
    monkeypatch.setattr(drawing, "_library_shown", False)
    figure = figures.layer_scores(tables["neurons"])
    first, second = (figures.show(figure)._repr_html_() for _ in range(2))
    assert len(first) > 1_000_000 > len(second)
    assert "plotly.js comes with the first figure" in second
    assert len(figures.show(figure, library=True)._repr_html_()) > 1_000_000


def test_a_shown_figure_loads_nothing_and_offers_no_upload(tables):
    markup = figures.show(figures.layer_scores(tables["neurons"]), library=False)._repr_html_()
    assert not re.search(r"\b(src|href)=|import\(|fetch\(|https?:", markup)
    assert "modeBarButtons" in markup
    assert "sendDataToCloud" not in markup


@pytest.mark.parametrize("text", HOSTILE)
def test_a_shown_figure_keeps_hostile_text_inside_its_script(text):
    go = pytest.importorskip("plotly.graph_objects")
    text = text.replace("\ud800", "")
    figure = go.Figure(go.Scatter(x=[1], y=[1], text=[text]))
    plain = go.Figure(go.Scatter(x=[1], y=[1], text=["text"]))
    shown, expected = (
        re.findall(r"<[^>]*>", figures.show(f, library=False).markup) for f in (figure, plain)
    )
    assert [tag.split()[0] for tag in shown] == [tag.split()[0] for tag in expected]


def test_token_scores_show_hostile_tokens_as_text():
    tokens = ["Hello", *HOSTILE, " world"]
    markup = figures.token_scores(tokens, [0.5, *[-1.0] * len(HOSTILE), 2.0])._repr_html_()
    call = markup.rsplit("CircuitsVis.render(", 1)[1]
    assert call.index("</script>") == call.index("<")  # nothing in the call ends the script early
    assert "&lt;script&gt;" in json.loads(
        '"' + call.split('"tokens": ["Hello", "')[1].split('", "')[0] + '"'
    )
    assert "unpkg" not in markup


def test_token_scores_take_tensors_and_refuse_what_does_not_fit():
    torch = pytest.importorskip("torch")
    assert "Html(" in repr(figures.token_scores(["a", "b"], torch.tensor([0.0, 0.0])))
    with pytest.raises(ValueError, match="one score per token, got 1 tokens and 2 scores"):
        figures.token_scores(["a"], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        figures.token_scores(["a"], [float("nan")])
