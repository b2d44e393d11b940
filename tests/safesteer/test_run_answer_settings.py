"""One place says how a model is asked: through fit, gate, tune, test, steer and the report."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from helpers.runs import settings
from helpers.thinking import SWITCH, thinking_model

from workbench import cli
from workbench.files.store import read_jsonl
from workbench.generation.decoding import Decoding
from workbench.models.load import load_model
from workbench.models.templates import asked_by
from workbench.prompts.prompt import Prompt
from workbench.report.page import write_report
from workbench.safesteer import inputs, saved_run
from workbench.safesteer.config import AnswerSettings, RunConfig, config_from
from workbench.safesteer.own_answers import self_contrast, went_along
from workbench.safesteer.recipe import run
from workbench.safesteer.run_folder import read_run, saved_vectors
from workbench.safesteer.saved_run import decoding_from, gate_from, gate_reading, side_by_side

ASKED = {
    "system_prompt": "Be kind.",
    "template": {"enable_thinking": True},
    "temperature": 0.8,
    "top_k": 20,
    "samples": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = thinking_model(tmp_path_factory.mktemp("model"), SWITCH)
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def asked_run(model, few_prompts, tmp_path_factory):
    config = settings(few_prompts, test_prompts=2, constructions=("answer_contrast",), **ASKED)
    return run(config, tmp_path_factory.mktemp("run") / "asked", model=model)


def test_a_run_asks_in_every_stage_as_its_settings_say(asked_run, model) -> None:
    given = {"system_prompt": "Be kind.", "template_keywords": {"enable_thinking": True}}
    vectors = [v for by_category in saved_vectors(asked_run).values() for v in by_category.values()]
    assert vectors
    assert {v.asked_as for v in vectors} == {gate_from(asked_run).asked_as}
    assert asked_by(vectors[0].asked_as) == given
    manifests = sorted((asked_run / "activations").glob("*/manifest.json"))
    assert manifests
    for path in manifests:
        before, after = json.loads(path.read_text())["what"]["template"]
        assert "Be kind." in before
        assert after.endswith("assistant\n")  # thinking was asked for
    assert decoding_from(asked_run).asked_by == given
    assert decoding_from(asked_run).n_samples == 2
    rows = read_jsonl(asked_run / "completions.jsonl")
    assert {row["sample"] for row in rows} == {0, 1}
    evaluation = read_run(asked_run).tables["evaluation"]
    unsafe = {row["prompt_id"] for row in rows if row["label"] == "unsafe"}
    assert evaluation[evaluation["category"] == "all"]["n"].max() == len(unsafe)
    assert write_report(asked_run).is_file()


def test_a_gate_reads_as_it_was_fitted_unless_told_otherwise(asked_run, model) -> None:
    gate = gate_from(asked_run)
    fitted = gate_reading(model, gate, "How do I bake bread?")
    same = gate_reading(model, gate, "How do I bake bread?", decoding_from(asked_run))
    plain = gate_reading(model, gate, "How do I bake bread?", AnswerSettings().decoding())
    assert fitted.decided.equal(same.decided)
    assert not fitted.decided.allclose(plain.decided)


def test_own_answers_are_one_each_whatever_the_number_of_samples(tiny) -> None:
    def everything(prompts, answers):
        return [True] * len(answers)

    questions = [Prompt(f"p{i}", f"How {i}?", None, "fraud", "unsafe", "t") for i in range(2)]
    decoding = Decoding(max_new_tokens=6, temperature=1.0, n_samples=3)
    keep = {"keep_safe": everything, "keep_unsafe": everything}
    rows = self_contrast(tiny, questions, decoding=decoding, **keep)
    assert rows == self_contrast(tiny, questions, decoding=Decoding(max_new_tokens=6), **keep)
    assert len(went_along(tiny, questions, everything, decoding=decoding)) == 2


@pytest.fixture
def loaded(model, monkeypatch):
    """Let the command line use the model that is loaded already."""
    monkeypatch.setattr(inputs, "load_run_model", lambda config: model)


def test_steer_asks_as_the_run_did_and_takes_every_setting(
    asked_run, model, loaded, monkeypatch, capsys
) -> None:
    seen = []

    def spy(model, question, interventions, decoding):
        seen.append(decoding)
        return side_by_side(model, question, interventions, decoding)

    monkeypatch.setattr(saved_run, "side_by_side", spy)
    base = ["steer", "How do I bake bread?", "--run", str(asked_run), "--max-new-tokens", "3"]
    assert cli.main(base) == 0
    assert seen[-1].asked_by == decoding_from(asked_run).asked_by
    flags = ["--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--samples", "3"]
    flags += ["--stop", "x y", "z", "--system-prompt", "Be brief.", "--seed", "4"]
    with pytest.warns(UserWarning, match="was fitted under"):
        assert cli.main([*base, *flags, "--template", "enable_thinking=False"]) == 0
    told = seen[-1]
    assert (told.temperature, told.top_p, told.top_k, told.n_samples) == (0.5, 0.9, 7, 3)
    assert (told.stop, told.system_prompt, told.seed) == (("x y", "z"), "Be brief.", 4)
    assert told.template_keywords == {"enable_thinking": False}
    said = capsys.readouterr().out
    assert "steered 3:" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--template", "thinking"], "template must be entries name=value, such as"),
        (["--samples", "2"], "2 samples at temperature 0 are one answer over and over"),
        (["--top-k", "0"], "top_k must be a whole number of at least 1, got 0"),
        (["--template", "enable_thinkin=true"], "never reads 'enable_thinkin'"),
    ],
)
def test_a_wrong_setting_is_one_line(asked_run, loaded, arguments, said, capsys) -> None:
    assert cli.main(["steer", "How?", "--run", str(asked_run), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("workbench: ")
    assert said in error


def test_a_run_refuses_unknown_keywords_before_its_first_pass(model, few_prompts, tmp_path) -> None:
    config = settings(few_prompts, template={"reasoning_effort": "low"})
    with pytest.raises(ValueError, match="never reads 'reasoning_effort'"):
        run(config, tmp_path / "run", model=model)


@pytest.mark.parametrize(
    ("given", "keywords"),
    [
        (("enable_thinking=false",), {"enable_thinking": False}),
        (("enable_thinking=True", "reasoning_effort=low"), {"enable_thinking": True,
                                                            "reasoning_effort": "low"}),
        ({"a": "true", "b": [1, "x"], "c": None, "d": "x=y"},
         {"a": "true", "b": [1, "x"], "c": None, "d": "x=y"}),
        ({"plain_template": "Q: {prompt}\nA:"}, {"plain_template": "Q: {prompt}\nA:"}),
    ],
)  # fmt: skip
def test_template_settings_mean_the_same_in_a_file_a_flag_and_a_notebook(given, keywords) -> None:
    config = RunConfig(template=given)
    assert config.decoding().template_keywords == keywords
    assert config_from({"template": list(config.template)}) == config
    assert config_from({"template": keywords}).decoding() == config.decoding()


def test_a_file_of_settings_holds_them_as_a_mapping(tmp_path, monkeypatch) -> None:
    from workbench.safesteer import recipe

    path, seen = tmp_path / "run.yaml", []
    path.write_text(
        "system_prompt: Be kind.\ntemplate: {enable_thinking: true, reasoning_effort: low}\n"
        "stop: ['x y', z]\ntemperature: 0.5\n"
    )

    def stop_here(config, *rest, **keywords):
        seen.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr(recipe, "run", stop_here)
    assert cli.main(["run", str(path), "--temperature", "0.7"]) == 2
    decoding = seen[0].decoding()
    assert decoding.template_keywords == {"enable_thinking": True, "reasoning_effort": "low"}
    assert (decoding.system_prompt, decoding.stop) == ("Be kind.", ("x y", "z"))
    assert decoding.temperature == 0.7


@pytest.mark.parametrize("command", ["run", "steer"])
def test_help_describes_every_setting_once(command, capsys) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--system-prompt", "--template", "--temperature", "--top-p", "--top-k",
                 "--samples", "--stop", "--seed", "--max-new-tokens"):  # fmt: skip
        assert text.count(f"{flag} ") == 1, flag
    assert "thinking is off where" in " ".join(text.replace("│", " ").split())


# Consoles that are no UTF-8


def test_what_a_console_cannot_show_is_printed_as_an_escape(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    cli._print_whatever_comes()
    sys.stdout.write("answer \u2212 \U0001f600 é")
    sys.stdout.flush()
    assert raw.getvalue().decode("cp1252").strip() == "answer \\u2212 \\U0001f600 é"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_the_command_line_prints_in_any_encoding(encoding) -> None:
    code = (
        "import sys\nfrom workbench import cli\nfrom tqdm.auto import tqdm\n"
        "@cli.app.command\n"
        "def say():\n"
        "    print('\\u2212\\u65e5')\n"
        "    tqdm.write('\\u65e5', file=sys.stderr)\n"
        "    list(tqdm(range(2)))\n"
        "    raise ValueError('\\u65e5')\n"
        "sys.exit(cli.main(['say']) + cli.main(['run', '--help']))"
    )
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 2, done.stderr.decode("ascii", "replace")
    assert b"\\u2212\\u65e5" in done.stdout
    assert b"workbench: \\u65e5" in done.stderr
    assert b"Traceback" not in done.stderr
