from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
from helpers.synthetic_run import HOSTILE, write_run

from workbench.figures import wording
from workbench.report import conclusion
from workbench.report import page as report
from workbench.report.page import write_report
from workbench.safesteer.run_folder import read_run

CATEGORIES = ("fraud", "malware")
OPTIONAL = (
    "separability.csv",
    "tuning.csv",
    "gate_rates.csv",
    "evaluation.csv",
    "scores.csv",
    "neurons.csv",
    "completions.jsonl",
)
EVIL_NAME = "<img src=x onerror=\"document.title='owned'\">"


class Page(HTMLParser):
    """What a browser would see: elements with attributes, scripts, and text.

    The text is that outside of scripts and styles.
    """

    def __init__(self, path):
        super().__init__()
        self.elements, self.scripts, self._texts, self._inside = [], [], [], None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs)) if tag in ("script", "style") else self._inside
        if tag == "script":
            self.scripts.append((dict(attrs), []))

    def handle_endtag(self, tag):
        self._inside = None if self._inside and self._inside[0] == tag else self._inside

    def handle_data(self, data):
        if self._inside is None:
            self._texts.append(data)
        elif self._inside[0] == "script":
            self.scripts[-1][1].append(data)

    @property
    def text(self):
        return " ".join("".join(self._texts).split())

    def named(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), prompts_each=4, categories=CATEGORIES)


@pytest.fixture(scope="module")
def page(folder):
    return Page(write_report(folder))


def judged(tmp_path, effect, *, prompts_each=24, change=None):
    """Conclude from a run with a known effect, after a change of its tables."""
    tables = read_run(
        write_run(tmp_path / "run", effect=effect, prompts_each=prompts_each, categories=CATEGORIES)
    ).tables
    frame, scores = (
        (change or (lambda x: x))(tables["evaluation"]),
        (change or (lambda x: x))(tables["scores"]),
    )
    return conclusion.conclude(frame, conclusion.control_differences(scores))


def test_the_page_refers_to_nothing_outside(page):
    for _, attrs in page.elements:
        for name, value in attrs.items():
            if name in (
                "src",
                "href",
                "srcset",
                "action",
                "data",
                "poster",
                "xlink:href",
                "background",
            ):
                assert value.startswith("#")
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"link", "base", "iframe", "img", "object", "embed", "form"}
    )
    styles = re.search(r"<style>(.*?)</style>", page.source, re.S)[1]
    assert not re.search(r"url\(|@import|https?:", styles)
    page_script = "".join(page.scripts[-1][1])
    assert not re.search(
        r"https?:|fetch\(|import\(|XMLHttpRequest|WebSocket|innerHTML|eval\(", page_script
    )
    assert "cdn" not in page.source.replace("".join(page.scripts[-2][1]), "").lower()


def test_only_the_two_scripts_of_the_page_may_run(page):
    policy = next(
        attrs["content"]
        for attrs in page.named("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    running = ["".join(body) for attrs, body in page.scripts if "type" not in attrs]
    hashes = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in running]
    allowed = " ".join(f"'sha256-{digest}'" for digest in sorted(hashes))
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    assert " ".join(sorted(directives["script-src"].split())) == allowed
    assert len(running) == 2
    assert "connect-src" not in directives
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]


def test_figures_are_data_and_the_library_comes_once(page):
    figures = [
        json.loads("".join(body))
        for attrs, body in page.scripts
        if attrs.get("type") == "application/json"
    ]
    assert (
        len(figures) == len(page.scripts) - 2 == 14
    )  # the opening, 4 results, separability, tuning, front, 3 of the gate, 3 of neurons
    assert all(figure["data"] for figure in figures)
    assert page.source.count("* plotly.js v") == 1


def test_hostile_texts_are_read_and_not_run(tmp_path):
    run = write_run(tmp_path, prompts_each=len(HOSTILE), categories=("fraud",), hostile=False)
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    plain = Page(write_report(run))
    for place, row in enumerate(rows):
        row["text"] = row["prompt"] = HOSTILE[place % len(HOSTILE)]
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(run))
    for text in HOSTILE:
        assert " ".join(wording.visible(text).split()) in page.text
    assert [tag for tag, _ in page.elements] == [
        tag for tag, _ in plain.elements
    ]  # text has become text, nothing else
    assert [attrs.keys() for _, attrs in page.elements] == [
        attrs.keys() for _, attrs in plain.elements
    ]


def test_characters_that_hide_or_reorder_are_spelled_out(page):
    assert "⟨U+202E⟩" in page.source
    assert not set(page.source) & set("\u202e\u2066\u200e\u200b\x00\x07\x1b\ud800")


def test_hostile_names_are_read_and_not_run(tmp_path):
    run = write_run(tmp_path, prompts_each=2, categories=(EVIL_NAME, 'a"b</script>'))
    for path in (run / "run.json", *run.glob("*.csv"), run / "completions.jsonl"):
        path.write_text(path.read_text().replace("prompt contrast", "<b onclick=1>x</b>"))
    notes = json.loads((run / "run.json").read_text())
    notes["model"]["name"] = notes["judges"][0]["name"] = notes["config"]["dtype"] = (
        "<script>1</script>"
    )
    notes["started"] = ["<i>"]
    notes["versions"] = {"<i>x</i>": "\ud800"}
    (run / "run.json").write_text(json.dumps(notes))
    page = Page(write_report(run))
    assert {"img", "b", "i"}.isdisjoint(tag for tag, _ in page.elements)
    assert sum("type" not in attrs for attrs, _ in page.scripts) == 2
    assert page.text.count("<script>1</script>") >= 3
    assert EVIL_NAME in page.text
    assert "date not noted" in page.text


def test_the_page_is_the_same_each_time(folder):
    first = write_report(folder)
    assert first == folder / "report.html"
    before = first.read_bytes()
    assert write_report(folder).read_bytes() == before


def test_the_page_says_what_it_must(page):
    for words in (
        "Content warning",
        "proxy",
        "The trap:",
        "kappa .80 with human labels",
        "answered 8 unsafe prompts of 2 risk categories and 4 harmless ones",
        "14 March 2026",
        "3f1c9a5be2d04477",
        "does not certify that a model is safe",
        "12 min 12 s",
        "vectors/ (4 files)",
        "L12–18.attn_out",
    ):
        assert words in page.text
    anchors = {attrs["href"][1:] for attrs in page.named("a")}
    assert anchors <= {attrs["id"] for _, attrs in page.elements if "id" in attrs}


def test_a_judge_without_agreement_is_said_so_in_red(page):
    red = [attrs for attrs in page.named("span") if attrs.get("class") == "red"]
    assert (
        len(red) == 4
    )  # safety wording, and three built-in rules; the refusal judge has an agreement
    assert page.text.count("none measured") == 4


def test_only_changes_beyond_their_interval_are_bold(folder, page):
    frame = read_run(folder).tables["evaluation"]
    versus = conclusion.control_differences(read_run(folder).tables["scores"])
    n_clear = sum(conclusion.clear(row) != 0 for row in frame.to_dict("records"))
    n_versus = sum(conclusion.clear(row) != 0 for row in versus.to_dict("records"))
    assert 0 < n_clear < len(frame)
    assert (
        sum(attrs.get("class") == "clear" for attrs in page.named("td")) == 2 * n_clear + n_versus
    )


def test_unsafe_answers_are_folded_and_harmless_ones_are_not(page):
    groups = [attrs for attrs in page.named("details") if "answer-group" in attrs.get("class", "")]
    assert ["open" in attrs for attrs in groups] == [False, False, True]
    assert ["unsafe" in attrs["class"] for attrs in groups] == [True, True, False]


def test_left_out_prompts_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_PROMPTS", 5)
    page = Page(write_report(write_run(tmp_path, prompts_each=4, categories=CATEGORIES)))
    assert len(page.named("article")) == 5
    assert "5 prompts, the first of each category in turn, none picked by hand" in page.text
    assert "7 more are left out here" in page.text


def test_whitespace_of_answers_is_kept(page):
    assert re.search(r"\.said \{[^}]*white-space: pre-wrap", page.source)
    assert "fit:\n\n1. Start with a plan" in page.source


def test_what_a_run_left_out_is_said_at_the_top_and_where_the_section_would_stand(tmp_path):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    notes = json.loads((run / "run.json").read_text())
    notes["left_out"] = {"neurons": "the model mixes experts <b>.", "judge of safety": "none fits."}
    (run / "run.json").write_text(json.dumps(notes))
    (run / "neurons.csv").unlink()
    page = Page(write_report(run))
    top, rest = page.text.split("Results on the test prompts", 1)
    assert "What this run does without: neurons: the model mixes experts <b>. judge of" in top
    assert "Left out. This run has no neuron scores: the model mixes experts <b>." in rest
    assert "Not computed." not in page.text
    for broken in ([], "x", {"gate": ["a"]}):
        notes["left_out"] = broken
        (run / "run.json").write_text(json.dumps(notes))
        if isinstance(broken, dict):
            assert "gate: ['a']" in Page(write_report(run)).text
        else:
            with pytest.raises(ValueError, match="'left_out' must be an object"):
                write_report(run)


def test_the_gate_sentence_says_how_often_it_opens_for_the_right_category(tmp_path):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    rates = pd.read_csv(run / "gate_rates.csv")
    rates["own_low"], rates["own_high"] = 0.2, 0.45
    rates.loc[rates["set"] != "risky", ["own_low", "own_high"]] = None
    rates.loc[rates["set"] == "risky", "own_rate"] = 0.31
    rates.to_csv(run / "gate_rates.csv", index=False)
    text = Page(write_report(run)).text
    assert (
        "it opened for 58 % [39 %, 76 %] of the 24 risky ones, and for the right category, whose "
        "vector should come through, for 31 % [20 %, 45 %]; the table has the counts." in text
    )


def test_no_loss_that_so_few_prompts_can_never_show_is_called_that(tmp_path):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    notes = json.loads((run / "run.json").read_text())
    notes["config"] |= {"refusal_rise": 0.02, "degenerate_rise": 0.02}
    (run / "run.json").write_text(json.dumps(notes))
    for n, p, said in (
        (148, 0.06, "cannot be shown with 148 prompts (149 needed)"),
        (149, 0.049, ">yes<"),
        (149, 0.06, ">not shown<"),
    ):
        frame = pd.read_csv(run / "evaluation.csv").assign(no_loss_p=float("nan"))
        shares = frame["metric"].isin(["refusal", "degenerate"]) & frame["difference"].notna()
        frame.loc[shares, ["n", "no_loss_p"]] = [n, p]
        frame.to_csv(run / "evaluation.csv", index=False)
        assert said in Page(write_report(run)).source


@pytest.mark.parametrize("missing", [*[(name,) for name in OPTIONAL], OPTIONAL])
def test_what_was_not_computed_is_said_and_is_no_crash(tmp_path, missing):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    for name in missing:
        (run / name).unlink()
    page = Page(write_report(run))
    said = [name for name in missing if name != "scores.csv"]
    assert page.text.count("Not computed.") == len(said)
    assert all(f"{name} is missing or empty" in page.text for name in said)
    assert ("nothing to conclude" in page.text) == ("evaluation.csv" in missing)


def test_the_gates_section_says_what_was_asked_and_what_was_counted(page):
    assert "The gate reads the user's words at L11.resid_post" in page.text
    assert (
        "at most 2 % of everyday prompts and 10 % of safe prompts that look risky open it"
        in page.text
    )
    assert "oracle gate" in page.text
    assert "Gate and harm: four cells" in page.text


def test_the_agreement_of_two_judges_is_shown_condition_by_condition(page):
    assert "Do two judges agree?" in page.text
    assert "0.40 [0.20, 0.60]" in page.text
    assert "“judged safe” compared with “safety wording”" in page.text


def test_a_second_judge_is_named_where_two_judges_are_compared(tmp_path):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    frame = pd.read_csv(run / "judge_agreement.csv")
    frame.assign(first="safe", second="safe_2").to_csv(run / "judge_agreement.csv", index=False)
    page = Page(write_report(run))
    assert "“judged safe” compared with “safe to the second judge”" in page.text
    assert "safety wording answers" not in page.text


def test_a_gate_that_stays_closed_is_said_in_red(tmp_path):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    notes = json.loads((run / "run.json").read_text())
    notes["gate"]["threshold"] = "inf"
    (run / "run.json").write_text(json.dumps(notes))
    assert "so the gate stays closed" in Page(write_report(run)).text


def test_a_table_without_rows_counts_as_not_computed(tmp_path):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    header = (run / "neurons.csv").read_text().split("\n")[0]
    (run / "neurons.csv").write_text(header + "\n")
    assert "no neuron scores" in Page(write_report(run)).text


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"is no run folder \(it has no run.json\)"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no run folder"):
        write_report(tmp_path)
    for content, words in (
        ("{", "not valid JSON"),
        ("[]", "its format is None"),
        ('{"format": "x"}', "its format is 'x'"),
    ):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=words) as caught:
            write_report(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "run.json").write_text('{"format": "workbench run 1", "judges": 3}')
    with pytest.raises(ValueError, match="'judges' must be a list, got 3"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_only_began_gives_a_page(tmp_path):
    (tmp_path / "run.json").write_text('{"format": "workbench run 1"}')
    assert "no answers to test prompts were made" in Page(write_report(tmp_path)).text


@pytest.mark.parametrize(
    "content",
    ["condition,category\na,b\n", "condition,category,metric,value\n", "\x00\xff", 'a,"b\n'],
)
def test_a_damaged_table_is_one_clear_error(tmp_path, content):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    (run / "evaluation.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"evaluation\.csv cannot be read") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_a_number_that_is_none_is_one_clear_error(tmp_path):
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    path = run / "separability.csv"
    path.write_text(re.sub(r"0\.\d+", "much", path.read_text(), count=1))
    with pytest.raises(ValueError, match=r"separability\.csv cannot be read"):
        write_report(run)


def test_a_real_effect_is_reported_with_its_control_and_its_price(tmp_path):
    outcome = judged(tmp_path, "helps")
    assert outcome.tone == "better"
    assert outcome.headline.startswith("Steering helped on this measure. With answer contrast")
    assert "more than with a random vector of the same size" in outcome.headline
    assert "not proof of a safer answer" in outcome.points[-1].text


@pytest.mark.parametrize("seed", range(4))
def test_a_null_is_reported_as_a_null(tmp_path, seed):
    tables = read_run(
        write_run(tmp_path, effect="null", prompts_each=20, categories=CATEGORIES, seed=seed)
    ).tables
    outcome = conclusion.conclude(
        tables["evaluation"], conclusion.control_differences(tables["scores"])
    )
    assert outcome.tone == "null"
    assert outcome.headline.startswith("No effect found.")
    assert "not excluded" in outcome.headline


def test_harm_is_reported_as_harm(tmp_path):
    outcome = judged(tmp_path, "harms")
    assert outcome.tone == "worse"
    assert outcome.headline.startswith("Steering did not help.")


@pytest.mark.parametrize(
    ("control", "does_no_less", "other"),
    [
        ("random", "a random vector of the same size does", "shuffled labels do"),
        ("shuffled labels", "shuffled labels do", "a random vector of the same size does"),
    ],
)
def test_an_effect_that_a_control_has_too_is_left_open(tmp_path, control, does_no_less, other):
    def control_is_as_good(frame):
        copies = frame[frame["condition"] == "answer contrast"].assign(condition=control)
        return pd.concat([frame[frame["condition"] != control], copies])

    outcome = judged(tmp_path, "helps", change=control_is_as_good)
    assert outcome.tone == "open"
    assert "cannot be put down to the vector" in outcome.headline
    assert f"it is not shown that {does_no_less} less" in outcome.headline
    assert f"{other} less" not in outcome.headline


def test_the_headline_is_about_the_condition_chosen_before_the_test_fold(tmp_path):
    tables = read_run(
        write_run(tmp_path, effect="helps", prompts_each=24, categories=CATEGORIES)
    ).tables
    versus = conclusion.control_differences(tables["scores"])
    chosen = "prompt contrast"  # the other one helps
    outcome = conclusion.conclude(tables["evaluation"], versus, main_condition=chosen)
    assert "answer contrast" not in outcome.headline
    assert chosen in outcome.headline
    assert any(point.about.startswith("answer contrast") for point in outcome.points)


def test_an_effect_without_a_control_is_left_open(tmp_path):
    outcome = judged(
        tmp_path, "helps", change=lambda frame: frame[~frame["condition"].map(wording.is_control)]
    )
    assert outcome.tone == "open"
    assert "this run has none" in outcome.headline
    assert any("Not compared" in point.text for point in outcome.points)


def test_more_relevant_answers_are_never_called_help(tmp_path):
    renamed = {"safe_helpful_proxy": "relevant_answer", "relevant_answer": "unused"}
    outcome = judged(
        tmp_path,
        "helps",
        change=lambda frame: frame.assign(metric=frame["metric"].replace(renamed)),
    )
    assert outcome.tone == "open"
    assert "helped" not in outcome.headline
    assert "more relevant answers are not safer answers" in outcome.points[-1].text


def test_no_change_at_all_is_not_called_certain():
    ends = {"difference": 0.0, "difference_low": 0.0, "difference_high": 0.0, "p": 1.0, "n": 24}
    base = {
        "condition": "unsteered",
        "category": "all",
        "metric": "safe_helpful_proxy",
        "value": 0.0,
        "n": 24,
    }
    frame = pd.DataFrame([base, {**base, "condition": "steered", **ends}])
    headline = conclusion.conclude(frame).headline
    assert "steered no change in any of 24 prompts" in headline
    assert "[0, 0]" not in headline


def test_what_is_not_clear_is_listed_apart_and_nothing_is_lost(tmp_path):
    tables = read_run(write_run(tmp_path, prompts_each=12, categories=CATEGORIES)).tables
    versus = conclusion.control_differences(tables["scores"])
    outcome = conclusion.conclude(tables["evaluation"], versus)
    assert not any("No clear difference" in point.text for point in outcome.points)
    measured = wording.main_metrics(tables["evaluation"]["metric"])
    labels = {wording.metric(name).label for name in measured}
    for condition in ("prompt contrast", "answer contrast"):
        for other in ("unsteered", "a random vector"):
            about = f"{condition}, against {other}"
            said = " ".join(point.text for point in outcome.points if point.about == about)
            unclear = {m for c in outcome.unclear if c.about == about for m in c.measures}
            assert {label for label in labels if label in said} == labels - unclear
    assert outcome.n_unclear == sum(len(comparison.measures) for comparison in outcome.unclear) > 0


def test_what_is_not_clear_is_folded_and_counted_on_the_page(folder, page):
    tables = read_run(folder).tables
    versus = conclusion.control_differences(tables["scores"])
    n_unclear = conclusion.conclude(tables["evaluation"], versus).n_unclear
    assert f"{n_unclear} other differences are not clear: open for the list" in page.text
    box = page.source.split('<section class="conclusion')[1].split("</section>")[0]
    assert "No clear difference" in box
    assert "No clear difference" not in box.split("<details>")[0]


def test_the_page_names_the_judges_of_the_runs_notes(tmp_path, page):
    assert "“refusal patterns 1” scored “refusals”" in page.text
    assert "methods built into workbench scored “relevant answers”" in page.text
    assert "Fixed rules" not in page.text
    run = write_run(tmp_path, prompts_each=2, categories=CATEGORIES)
    notes = json.loads((run / "run.json").read_text())
    notes["judges"][1]["name"] = "framing judge 1"
    (run / "run.json").write_text(json.dumps(notes))
    assert "“framing judge 1” scored “safe and helpful (proxy)”" in Page(write_report(run)).text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_the_figures_and_runs_nothing_else(tmp_path):
    path = write_report(
        write_run(tmp_path / "run", prompts_each=3, categories=(EVIL_NAME, "fraud"))
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    more = "--disable-background-networking --disable-component-update --virtual-time-budget=4000"
    command = [
        "chromium",
        *flags.split(),
        *more.split(),
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    result = subprocess.run(
        [*command, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in result.stderr  # no refused script, no exception
    (tmp_path / "dom.html").write_text(result.stdout, encoding="utf-8")
    page = Page(tmp_path / "dom.html")
    assert re.search("<title>Steering SmolLM2", result.stdout)
    assert len([attrs for attrs in page.named("svg") if attrs.get("class") == "main-svg"]) >= 10
    assert {"iframe", "img"}.isdisjoint(tag for tag, _ in page.elements)
    assert all(attrs.get("href", "#").startswith("#") for attrs in page.named("a"))


def test_thoughts_are_folded_escaped_and_answers_cut_in_them_are_counted(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "completions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert "thoughts, not judged" not in Page(write_report(tmp_path)).source
    rows[0] |= {"thinking": f"They ask. {EVIL_NAME}", "sample": 0}
    rows[1] |= {"thinking": "They ask", "text": "", "finish": "length", "sample": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = Page(write_report(tmp_path)).source
    assert source.count('<details class="thoughts">') == 2
    assert EVIL_NAME not in source
    assert f"1 of {len(rows)} answers were cut at the length limit while the model" in source
    assert f"{rows[1]['condition']} (2)" in source
