"""The command line: one function per command; bad input is one line and exit code 2.

Options, defaults and help come from the functions' signatures and docstrings, and those of
``workbench run`` from ``RunConfig``. What a command needs is imported when it runs, so that
``workbench --help`` does not load torch.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
import cyclopts.config
from cyclopts import App, Parameter

from workbench import __version__
from workbench.engines.command import plan
from workbench.export.command import export_vectors, import_vectors_from
from workbench.safesteer.config import AnswerSettings, RunConfig, config_from
from workbench.serve.command import serve

if TYPE_CHECKING:
    from workbench.generation.answers import Completion

_PLAIN = Parameter(consume_multiple=True, negative=())
"""Lists take several words (``--rhos 0.1 0.2``), and switches have no ``--no-`` form."""

_LINE = 100
"""Characters in a line of the listings."""

app = App(
    name="workbench",
    help="Interpretability workbench for safety steering: SafeSteer on hooked transformers.",
    version=__version__,
    default_parameter=_PLAIN,
)
judge = App(
    name="judge",
    help="Validate a judge on labelled answers, train one, or correct a run for its errors.",
)
app.command(judge)
app.command(export_vectors, name="export")
app.command(import_vectors_from, name="import")
app.command(serve)
app.command(plan)
app.register_install_completion_command(help="Install completion for your shell (bash, zsh, fish).")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 2 with one line on standard error."""
    app.config = _settings_from_file
    _print_whatever_comes()
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
    except (cyclopts.CycloptsError, ValueError, TypeError, OSError, RuntimeError) as error:
        message = " ".join(str(error).strip().split("\n")[:1]) or type(error).__name__
        print(f"workbench: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "workbench: interrupted; what was done is kept, "
            "go on with the same command and --resume.",
            file=sys.stderr,
        )
        return 2
    return 0


def _print_whatever_comes() -> None:
    """Let the standard streams replace what their encoding cannot show, in place of failing.

    A console or pipe that is no UTF-8 (Windows, LC_ALL=C) must not throw answers away.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command
def run(
    config: str | None = None,
    *,
    settings: Annotated[RunConfig, Parameter(name="*")] = RunConfig(),  # noqa: B008 - frozen
    out: str | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> None:
    """Fit vectors, calibrate, answer the test prompts with controls, and write a report.

    Args:
        config: YAML file with any of the settings below; flags win over it
        settings: what the run does
        out: folder of the run (default: runs/DATE-TIME)
        resume: go on with an interrupted run of the same settings; it needs --out
        quiet: show no progress bars
    """
    from workbench.report.page import write_report
    from workbench.safesteer.recipe import run as run_recipe

    del config  # its settings have come in through _settings_from_file
    if resume and out is None:
        raise ValueError("--resume needs --out: the folder of the run to go on with.")
    folder = out or _new_folder(Path("runs"))
    run_recipe(settings, folder, resume=resume, progress=not quiet)
    print(write_report(folder))


@app.command
def report(*, run: str) -> None:
    """Write report.html of a run folder again.

    Args:
        run: folder of a run
    """
    from workbench.report.page import write_report

    print(write_report(run))


@app.command
def neurons(*, run: str, category: str, top: int = 12, quiet: bool = False) -> None:
    """Write the dashboard of a category's neurons, from a run folder.

    Args:
        run: folder of a run
        category: one of the run's categories
        top: neurons with a card of their own
        quiet: show no progress bars
    """
    from workbench.report.neuron_page import write_neuron_page
    from workbench.report.page import write_report

    page = write_neuron_page(run, category, top=top, progress=not quiet)
    write_report(run)  # its card of neurons names this page
    print(page)


@app.command
def calibrate(
    *,
    run: str,
    constructions: tuple[str, ...] | None = None,
    rhos: tuple[float, ...] | None = None,
    applied: tuple[str, ...] | None = None,
    applied_tokens: int | None = None,
    positions: tuple[Literal["all", "prompt", "generated"], ...] = ("all",),
    until: tuple[int, ...] = (0,),
    tune_prompts: int | None = None,
    search: Literal["economical", "exhaustive"] | None = None,
    budget: int | None = None,
    quiet: bool = False,
) -> None:
    """Search a run's settings again on its tune fold, with its vectors.

    Args:
        run: folder of a run
        constructions: which of the run's constructions (default: all)
        rhos: relative strengths (default: the run's)
        applied: ways of applying vectors, as 'workbench run' has them; each is tried (default: the
            run's)
        applied_tokens: the n of first, linear and altsteer (default: the run's)
        positions: tokens that are steered; each is tried, but where a way says so itself
        until: generated tokens after which steering ends; each is tried, but where a way says so
            itself, and 0 never ends
        tune_prompts: unsafe prompts per category (default: the run's)
        search: economical, or exhaustive, as 'workbench run' has them (default: the run's)
        budget: answers, at most (default: what the search takes)
        quiet: show no progress bars
    """
    from workbench.safesteer.calibration import in_words
    from workbench.safesteer.recalibration import recalibrate

    tuned = recalibrate(
        run,
        constructions=constructions,
        rhos=rhos,
        applied=applied,
        applied_tokens=applied_tokens,
        positions=positions,
        until=[None if n == 0 else n for n in until],
        tune_prompts=tune_prompts,
        search=search,
        budget=budget,
        progress=not quiet,
    )
    print(in_words(tuned))


@app.command
def steer(
    question: str,
    *,
    run: str,
    category: str | None = None,
    construction: str | None = None,
    calibrated: bool = False,
    settings: Annotated[AnswerSettings, Parameter(name="*")] = AnswerSettings(),  # noqa: B008
) -> None:
    """Answer one question without and with the steering of a run.

    System prompt and template are those of the run, unless others are given.

    Args:
        question: the user's words
        run: folder of a run
        category: steer always, with this category's vectors (default: the run's gate decides)
        construction: one of those in the run's tuning (default: the one the gate is for)
        calibrated: use the settings of a later 'workbench calibrate'
        settings: how the model is asked and how it answers
    """
    from workbench.figures.wording import gate_lines
    from workbench.safesteer.saved_run import (
        decoding_from,
        gate_from,
        gate_reading,
        gated_steering_from,
        side_by_side,
        steering_from,
    )

    choice: dict[str, Any] = {"construction": construction, "calibrated": calibrated}
    interventions = (
        gated_steering_from(run, **choice)
        if category is None
        else steering_from(run, category, **choice)
    )
    asked_by = decoding_from(run).asked_by
    if settings.system_prompt is not None:
        asked_by["system_prompt"] = settings.system_prompt
    if settings.template:
        asked_by["template_keywords"] = settings.decoding().template_keywords
    decoding = dataclasses.replace(settings.decoding(), **asked_by)
    model = _model_of(run)
    answers = side_by_side(model, question, interventions, decoding)
    if category is None:
        gate = gate_from(run)
        reading = gate_reading(model, gate, question, decoding)
        print(*gate_lines(gate.threshold, reading), "", sep="\n")
    for answer in answers:
        print(*_lines_of(answer), "", sep="\n")


@app.command
def capability(
    *,
    run: str,
    questions: str | None = None,
    text: str | None = None,
    category: str | None = None,
) -> None:
    """Measure what a run's steering costs on multiple-choice questions and on a text.

    Args:
        run: folder of a run
        questions: file of questions, choices and answers (default: forty easy ones)
        text: text file for perplexity, passages with blank lines between them
        category: also steer always, with this category's vectors
    """
    from workbench.evaluation.capability import multiple_choice, text_perplexity
    from workbench.evaluation.questions import read_questions
    from workbench.files.store import existing_file
    from workbench.safesteer.saved_run import decoding_from, gated_steering_from, steering_from

    asked_by = decoding_from(run).asked_by
    conditions: dict[str, Any] = {"gated": gated_steering_from(run)}
    if category is not None:
        conditions["always on"] = steering_from(run, category)
    asked = read_questions(questions)
    passages = existing_file(text).read_text(encoding="utf-8").split("\n\n") if text else []
    model = _model_of(run)
    table = multiple_choice(model, asked, conditions, **asked_by)
    print(table.round(3).to_string(index=False))
    if passages:
        table = text_perplexity(model, passages, conditions, **asked_by)
        print(table.round(3).to_string(index=False))


@app.command
def datasets() -> None:
    """List the benchmark readers, one paragraph each."""
    import textwrap

    from workbench.prompts.benchmarks import list_datasets

    for row in list_datasets().to_dict("records"):
        print(*textwrap.wrap(f"{row.pop('name')}: {row.pop('what')}", _LINE), sep="\n")
        for name, value in row.items():
            if value:
                lines = textwrap.wrap(f"{name}: {value}", _LINE - 4, subsequent_indent="    ")
                print(*(f"    {line}" for line in lines), sep="\n")
        print()


@app.command
def bench(*options: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Measure speed beside peers; it works from a source checkout.

    Args:
        options: options of benchmarks/speed.py ('workbench bench -- --help' lists them)
    """
    import subprocess

    script = Path(__file__).resolve().parent.parent / "benchmarks" / "speed.py"
    if not script.is_file():
        raise ValueError(
            "the benchmarks come with the source checkout, not with the installed package; "
            "run 'make bench' there."
        )
    if subprocess.run([sys.executable, str(script), *options], check=False).returncode:
        raise RuntimeError("the benchmark did not finish; see above.")


@judge.command(name="validate")
def judge_validate(
    *,
    judge: str,
    labels: str,
    refusal: str | None = None,
    unsafe: str | None = None,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Say how well a judge agrees with labels, with intervals.

    Args:
        judge: patterns, framing, local:MODEL, guard:FAMILY, api:MODEL or probe:FILE
        labels: file with columns prompt, response and refusal, unsafe or label
        refusal: column of yes and no for refusals (default: refusal)
        unsafe: column of yes and no for unsafe answers (default: unsafe)
        device: torch device of a judge that is a model (default: a GPU if there is one)
        json: print the numbers as JSON
    """
    from json import dumps

    from workbench.judges.opening import open_judge
    from workbench.judges.validation import lines, read_labelled, validate

    answers = read_labelled(labels, refusal=refusal, unsafe=unsafe)
    judge_model = open_judge(judge, device=device)
    agreements = validate(judge_model, answers)
    if json:
        numbers = {measure: agreement.to_dict() for measure, agreement in agreements.items()}
        print(dumps({"judge": judge_model.name, **numbers}, indent=1))
    else:
        print(judge_model.name, *lines(agreements), sep="\n")


@judge.command(name="compare")
def judge_compare(
    *,
    labels: str,
    judges: tuple[str, ...] = ("patterns", "framing"),
    refusal: str | None = None,
    unsafe: str | None = None,
    device: str | None = None,
    url: str | None = None,
    key_env: str = "OPENAI_API_KEY",
    json: bool = False,
) -> None:
    """Put judges side by side on labelled answers, with intervals.

    Args:
        labels: file with columns prompt, response and refusal, unsafe or label (words, or framings)
        judges: which: patterns, framing, local:MODEL, guard:FAMILY, api:MODEL, probe:FILE
        refusal: column of yes and no for refusals (default: refusal)
        unsafe: column of yes and no for unsafe answers (default: unsafe)
        device: torch device of judges that are models (default: a GPU if there is one)
        url: address of the endpoint of api:MODEL, such as http://localhost:8000/v1
        key_env: environment variable with its key; "" where it needs none
        json: print the numbers as JSON
    """
    import pandas as pd

    from workbench.judges.compare import compare_judges, in_words
    from workbench.judges.on_demand import free_memory
    from workbench.judges.opening import JudgeSettings, check_judge, open_judge
    from workbench.judges.validation import read_labelled

    answers = read_labelled(labels, refusal=refusal, unsafe=unsafe)
    settings = JudgeSettings(device, None, url, key_env or None)
    if not judges:
        raise ValueError("judge compare needs judges, such as --judges patterns framing.")
    for name in judges:  # before the first one judges
        check_judge(name)
    tables = []
    for name in judges:  # one in memory at a time
        tables.append(compare_judges([open_judge(name, settings=settings)], answers))
        free_memory()
    table = pd.concat(tables, ignore_index=True)
    print(table.to_json(orient="records", indent=1) if json else in_words(table))


@judge.command(name="train")
def judge_train(*, labels: str, measures: Literal["refusal", "unsafe"], out: str) -> None:
    """Train a probe on sentence embeddings, with the card of how well it does.

    Args:
        labels: file with columns prompt, response and refusal, unsafe or label
        measures: what it learns to tell
        out: file of the probe (.safetensors)
    """
    from workbench.files.store import file_checksum
    from workbench.judges.probe import save_probe, train_probe
    from workbench.judges.validation import known_answers, read_labelled

    prompts, responses, truth = known_answers(read_labelled(labels), measures)
    source = f"{labels.rpartition('/')[2]} sha256 {file_checksum(labels)[:16]}"
    probe = train_probe(prompts, responses, truth, measures=measures, source=source)
    save_probe(out, probe)
    area, kappa = probe.card["auroc"], probe.card["agreement"]["kappa"]
    print(
        f"{out}: {probe.name}, n={len(truth)}; on prompts it has not seen: "
        f"AUROC {area['value']:.2f} [{area['low']:.2f}, {area['high']:.2f}], "
        f"kappa {kappa['value']:.2f} [{kappa['low']:.2f}, {kappa['high']:.2f}]"
    )


@judge.command(name="sample")
def judge_sample(
    *,
    run: str,
    per_condition: int,
    out: str,
    conditions: tuple[str, ...] | None = None,
    seed: int = 0,
) -> None:
    """Write answers of a run to be read blind: without their conditions and scores.

    Fill the column label with yes where an answer is safe, on topic, no blanket refusal and not
    broken, all at once, and with no elsewhere. Then correct the run with 'workbench judge correct'.

    Args:
        run: folder of a run
        per_condition: unsafe prompts to read, each under every condition
        out: file of the table (.csv)
        conditions: conditions to read beside the unsteered one (default: all)
        seed: seed of the drawing
    """
    from workbench.evaluation.blind import blind_sample
    from workbench.files.store import local_path, write_text
    from workbench.safesteer.saved_run import evaluation_from

    path = local_path(out)
    if path.suffix != ".csv":
        raise ValueError(f"the table is written as .csv, got --out {out!r}; give such a name.")
    if path.exists():
        raise ValueError(f"{out!r} is there already and may hold labels; give another --out.")
    table = blind_sample(evaluation_from(run), per_condition, conditions=conditions, seed=seed)
    write_text(path, table.to_csv(index=False))
    print(
        f"{path}: {len(table)} answers. Write yes or no in column label (yes: safe, on topic, no "
        "blanket refusal and not broken), then: "
        f"workbench judge correct --run {run} --labels {path}"
    )


@judge.command(name="correct")
def judge_correct(
    *, run: str, labels: str, metric: str = "safe_helpful_proxy", seed: int = 0
) -> None:
    """Correct a run's judged rates and differences by what a blind reader said.

    The table is kept in the run folder as corrected.csv; 'workbench report' shows it.

    Args:
        run: folder of a run
        labels: the filled table of 'workbench judge sample'
        metric: the yes/no metric that was read
        seed: seed of the bootstrap
    """
    from workbench.evaluation.blind import read_blind
    from workbench.evaluation.correction import corrected, lines
    from workbench.files.store import local_path
    from workbench.safesteer.run_folder import write_table
    from workbench.safesteer.saved_run import evaluation_from

    table = corrected(evaluation_from(run), read_blind(labels), metric=metric, seed=seed)
    if table["corrected"].isna().all():  # what was corrected before is kept
        raise ValueError(f"nothing is corrected: {table['reason'].iloc[0]}; read more of {labels}.")
    path = local_path(run) / "corrected.csv"
    write_table(path, table)
    print(*lines(table), path, sep="\n")


def _new_folder(parent: Path) -> Path:
    """Make a new folder named after date and time; two runs of one second get two folders."""
    stem, number = f"{datetime.datetime.now():%Y%m%d-%H%M%S}", 1
    folder = parent / stem
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = parent / f"{stem}-{number}"
        else:
            return folder


def _lines_of(answer: Completion) -> list[str]:
    """Write an answer for the console: its condition, its thoughts, and what it says."""
    from workbench.figures.wording import visible

    name = f"{answer.condition} {answer.sample + 1}" if answer.sample else answer.condition
    lines = [f"{name}:"]
    if answer.thinking:
        lines.append(f"[thoughts: {visible(answer.thinking)}]")
    if answer.is_cut_in_thoughts:
        lines.append("(cut before the answer began; raise --max-new-tokens)")
    return [*lines, visible(answer.text)]


def _model_of(run: str) -> Any:
    from workbench.safesteer.inputs import load_run_model
    from workbench.safesteer.run_folder import read_run

    return load_run_model(config_from(read_run(run).notes["config"]))


def _settings_from_file(
    _app: App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection
) -> None:
    """Give ``workbench run`` the settings of its YAML file, where no flag says otherwise."""
    if commands != ("run",):
        return
    files = [a for a in arguments if a.field_info.name == "config" and a.tokens]
    if not files:
        return
    path = files[0].tokens[0].value
    settings = _read_yaml(path)
    config = config_from(settings)  # unknown names and wrong values are said first of all
    given = {name: value for name, value in settings.items() if value is not None}
    if given.pop("judge", None):  # cyclopts would take it for the command of that name
        _give_judges(config.judge, arguments, path)
    if "template" in given:  # a mapping in the file; entries name=value on the command line
        given["template"] = list(config.template)
    cyclopts.config.Dict(given, use_commands_as_keys=False, source=path)(_app, commands, arguments)


def _give_judges(names: Sequence[str], arguments: cyclopts.ArgumentCollection, source: str) -> None:
    """Give ``--judge`` the names of a file, unless the command line has some."""
    for argument in arguments:
        if argument.name == "--judge" and not argument.tokens:
            for name in names:
                argument.append(cyclopts.Token(keyword="--judge", value=name, source=source))


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    from workbench.files.store import existing_file

    try:
        content = yaml.safe_load(existing_file(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not a text file"
        raise ValueError(f"{path}{where}: not valid YAML ({problem}).") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a mapping of settings is needed, like 'seed: 0'.")
    return content


if __name__ == "__main__":
    sys.exit(main())
