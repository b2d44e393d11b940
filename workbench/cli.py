"""The command line: one function a sub-command, each calls one function of a room. Bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import datetime
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 2 with one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error).strip().split("\n")[0] or type(error).__name__
        print(f"workbench: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "workbench: interrupted; what was done is kept, go on with the same command and --resume.",
            file=sys.stderr,
        )
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    from workbench.report.page import write_report
    from workbench.safesteer.config import config_from
    from workbench.safesteer.recipe import run

    given = {name: value for name in _RUN_OPTIONS if (value := getattr(options, name)) is not None}
    config = config_from({**_read_yaml(options.config), **given})
    out = options.out or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = run(config, out, resume=options.resume, progress=not options.quiet)
    print(write_report(folder))


def _report(options: argparse.Namespace) -> None:
    from workbench.report.page import write_report

    print(write_report(options.run))


def _neurons(options: argparse.Namespace) -> None:
    from workbench.report.neuron_page import write_neuron_page

    print(
        write_neuron_page(
            options.run, options.category, top=options.top, progress=not options.quiet
        )
    )


def _datasets(_: argparse.Namespace) -> None:
    from workbench.prompts.benchmarks import list_datasets

    print(list_datasets().to_string(index=False))


def _calibrate(options: argparse.Namespace) -> None:
    from workbench.safesteer.calibration import in_words
    from workbench.safesteer.recalibration import recalibrate

    tuned = recalibrate(
        options.run,
        constructions=options.constructions,
        rhos=options.rhos,
        positions=options.positions,
        until=[None if n == 0 else n for n in options.until],
        tune_prompts=options.tune_prompts,
        budget=options.budget,
        progress=not options.quiet,
    )
    print(in_words(tuned))


def _steer(options: argparse.Namespace) -> None:
    from workbench.figures.wording import gate_lines, visible
    from workbench.safesteer.config import config_from
    from workbench.safesteer.inputs import load_run_model
    from workbench.safesteer.run_folder import read_run
    from workbench.safesteer.saved_run import (
        gate_from,
        gate_reading,
        gated_steering_from,
        side_by_side,
        steering_from,
    )

    chosen: dict[str, Any] = {
        "construction": options.construction,
        "calibrated": options.calibrated,
    }
    if options.category is None:
        interventions = gated_steering_from(options.run, **chosen)
    else:
        interventions = steering_from(options.run, options.category, **chosen)
    model = load_run_model(config_from(read_run(options.run).notes["config"]))
    answers = side_by_side(
        model, options.question, interventions, max_new_tokens=options.max_new_tokens
    )
    if options.category is None:
        gate = gate_from(options.run)
        print(
            *gate_lines(gate.threshold, gate_reading(model, gate, options.question)), "", sep="\n"
        )
    for answer in answers:
        print(f"{answer.condition}:\n{visible(answer.text)}\n")


def _capability(options: argparse.Namespace) -> None:
    from workbench.evaluation.capability import multiple_choice, read_questions, text_perplexity
    from workbench.files.store import existing_file
    from workbench.safesteer.config import config_from
    from workbench.safesteer.inputs import load_run_model
    from workbench.safesteer.run_folder import read_run
    from workbench.safesteer.saved_run import gated_steering_from, steering_from

    conditions: dict[str, Any] = {"gated": gated_steering_from(options.run)}
    if options.category is not None:
        conditions["always on"] = steering_from(options.run, options.category)
    questions = read_questions(options.questions)
    text = existing_file(options.text).read_text(encoding="utf-8") if options.text else ""
    model = load_run_model(config_from(read_run(options.run).notes["config"]))
    print(multiple_choice(model, questions, conditions).round(3).to_string(index=False))
    if text:
        print(
            text_perplexity(model, text.split("\n\n"), conditions).round(3).to_string(index=False)
        )


def _bench(options: argparse.Namespace) -> None:
    import subprocess
    from pathlib import Path

    script = Path(__file__).resolve().parent.parent / "benchmarks" / "speed.py"
    if not script.is_file():
        raise ValueError(
            "the benchmarks come with the source checkout, not with the installed package; run 'make bench' there."
        )
    if subprocess.run([sys.executable, str(script), *options.arguments], check=False).returncode:
        raise RuntimeError("the benchmark did not finish; see above.")


def _judge_validate(options: argparse.Namespace) -> None:
    import json

    from workbench.judges.validation import lines, open_judge, read_labelled, validate

    answers = read_labelled(options.labels)
    judge = open_judge(options.judge, device=options.device)
    found = validate(judge, answers)
    if options.json:
        print(
            json.dumps(
                {"judge": judge.name, **{measure: own.to_dict() for measure, own in found.items()}},
                indent=1,
            )
        )
    else:
        print(judge.name, *lines(found), sep="\n")


def _judge_train(options: argparse.Namespace) -> None:
    from workbench.files.store import file_checksum
    from workbench.judges.probe import save_probe, train_probe
    from workbench.judges.validation import known_answers, read_labelled

    prompts, responses, truth = known_answers(read_labelled(options.labels), options.measures)
    source = f"{options.labels.rpartition('/')[2]} sha256 {file_checksum(options.labels)[:16]}"
    probe = train_probe(prompts, responses, truth, measures=options.measures, source=source)
    save_probe(options.out, probe)
    area, kappa = probe.card["auroc"], probe.card["agreement"]["kappa"]
    print(
        f"{options.out}: {probe.name}, n={len(truth)}; on prompts it has not seen: AUROC {area['value']:.2f} "
        f"[{area['low']:.2f}, {area['high']:.2f}], kappa {kappa['value']:.2f} [{kappa['low']:.2f}, {kappa['high']:.2f}]"
    )


_RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "help": "hub name, local folder, .gguf file, or 'embedded' (default: SmolLM2-135M-Instruct)"
    },
    "device": {"help": "torch device (default: a GPU if there is one)"},
    "dtype": {"help": "float32, bfloat16 or float16 (default: float32)"},
    "packing": {
        "help": "packed linear layers on the processor: auto, on or off (default: auto, where measured to be faster)"
    },
    "prompts": {
        "help": "data sets: a jsonl file of prompts, 'safebench:PATH', or a hub set by name (default: the project's own)"
    },
    "categories": {"nargs": "+", "help": "risk categories (default: all)"},
    "seed": {"type": int, "help": "of folds, controls and bootstrap (default: 0)"},
    "tune_prompts": {
        "type": int,
        "help": "unsafe prompts a category that choose sign and strength (default: 6)",
    },
    "test_prompts": {
        "type": int,
        "help": "unsafe prompts a category that are reported (default: the whole test fold)",
    },
    "max_new_tokens": {"type": int, "help": "length limit of answers (default: 64)"},
    "constructions": {
        "nargs": "+",
        "help": "vectors that are compared (default: those that are no mere baselines)",
    },
    "rhos": {"type": float, "nargs": "+", "help": "relative strengths tried (default: 0.09 0.17)"},
    "relevance_loss": {
        "type": float,
        "help": "largest loss of relevance that counts as none (default: 0.05)",
    },
    "refusal_rise": {
        "type": float,
        "help": "largest rise of the refusal rate that counts as none (default: 0.02)",
    },
    "degenerate_rise": {
        "type": float,
        "help": "largest rise of broken answers that counts as none (default: 0.02)",
    },
    "neutral_kl": {
        "type": float,
        "help": "largest KL on neutral prompts, nats a token (default: no limit)",
    },
    "neutral_rate": {
        "type": float,
        "help": "share of neutral prompts that may open the gate (default: 0.02)",
    },
    "hard_safe_rate": {
        "type": float,
        "help": "share of safe prompts that look risky that may (default: 0.1)",
    },
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="workbench",
        description="Interpretability workbench for safety steering: SafeSteer on hooked transformers.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    run = command(
        "run",
        _run,
        "fit vectors, calibrate, answer the test prompts with controls, and write a report",
    )
    run.add_argument("config", nargs="?", help="YAML file with any of the settings below")
    for name, keywords in _RUN_OPTIONS.items():
        run.add_argument(f"--{name.replace('_', '-')}", dest=name, **keywords)
    run.add_argument("--out", help="folder of the run (default: runs/DATE-TIME)")
    run.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run of the same settings"
    )
    run.add_argument("--quiet", action="store_true", help="no progress bars")

    report = command("report", _report, "write report.html of a run folder again")
    report.add_argument("--run", required=True, help="folder of a run")

    neurons = command(
        "neurons", _neurons, "write the dashboard of a category's neurons, from a run folder"
    )
    neurons.add_argument("--run", required=True, help="folder of a run")
    neurons.add_argument("--category", required=True, help="one of the run's categories")
    neurons.add_argument(
        "--top", type=int, default=12, help="neurons with a card of their own (default: 12)"
    )
    neurons.add_argument("--quiet", action="store_true", help="no progress bars")

    calibrate = command(
        "calibrate", _calibrate, "search a run's settings again on its tune fold, with its vectors"
    )
    calibrate.add_argument("--run", required=True, help="folder of a run")
    calibrate.add_argument(
        "--constructions", nargs="+", help="which of the run's constructions (default: all)"
    )
    calibrate.add_argument(
        "--rhos", type=float, nargs="+", help="relative strengths (default: the run's)"
    )
    calibrate.add_argument(
        "--positions",
        nargs="+",
        choices=("all", "prompt", "generated"),
        default=["all"],
        help="tokens steered; each is tried",
    )
    calibrate.add_argument(
        "--until",
        type=int,
        nargs="+",
        default=[0],
        help="generated tokens after which steering ends; each is tried (default: 0, never)",
    )
    calibrate.add_argument(
        "--tune-prompts", type=int, help="unsafe prompts a category (default: the run's)"
    )
    calibrate.add_argument(
        "--budget", type=int, help="answers, at most (default: what successive halving takes)"
    )
    calibrate.add_argument("--quiet", action="store_true", help="no progress bars")

    steer = command("steer", _steer, "answer one question without and with the steering of a run")
    steer.add_argument("question", help="the user's words")
    steer.add_argument("--run", required=True, help="folder of a run")
    steer.add_argument(
        "--category",
        help="steer always, with this category's vectors (default: the run's gate decides)",
    )
    steer.add_argument(
        "--construction", help="one of those in the run's tuning (default: the one the gate is for)"
    )
    steer.add_argument(
        "--calibrated",
        action="store_true",
        help="with the settings of a later 'workbench calibrate'",
    )
    steer.add_argument(
        "--max-new-tokens", type=int, default=64, help="length limit of the answers (default: 64)"
    )

    capability = command(
        "capability",
        _capability,
        "what a run's steering costs on multiple-choice questions and on a text",
    )
    capability.add_argument("--run", required=True, help="folder of a run")
    capability.add_argument(
        "--questions", help="file of questions, choices and answers (default: forty easy ones)"
    )
    capability.add_argument(
        "--text", help="text file, passages with blank lines between them, for perplexity"
    )
    capability.add_argument("--category", help="also always on, with this category's vectors")

    bench = command(
        "bench",
        _bench,
        "measure speed beside peers (from a source checkout); further options go to benchmarks/speed.py",
    )
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="options of benchmarks/speed.py")

    command("datasets", _datasets, "list the benchmark readers")

    judges = commands.add_parser("judge", help="validate a judge on labelled answers, or train one")
    kinds = judges.add_subparsers(required=True, metavar="COMMAND")
    labels = "file with columns prompt, response and refusal, unsafe or label"
    check = kinds.add_parser("validate", help="agreement of a judge with labels, with intervals")
    check.set_defaults(command=_judge_validate)
    check.add_argument(
        "--judge",
        required=True,
        help="patterns, framing, a guard family, or the file of a trained probe",
    )
    check.add_argument("--labels", required=True, help=labels)
    check.add_argument(
        "--device", help="torch device of a judge that is a model (default: a GPU if there is one)"
    )
    check.add_argument("--json", action="store_true", help="numbers as JSON")
    train = kinds.add_parser(
        "train", help="train a probe on sentence embeddings, with the card of how well it does"
    )
    train.set_defaults(command=_judge_train)
    train.add_argument("--labels", required=True, help=labels)
    train.add_argument(
        "--measures", choices=("refusal", "unsafe"), required=True, help="what it learns to tell"
    )
    train.add_argument("--out", required=True, help="file of the probe (.safetensors)")
    return parser


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
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
