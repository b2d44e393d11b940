"""Judge answers to questions of another set, and compare with what was read blind.

    python benchmarks/fresh_answers.py --safebench safebench.csv

Sixty questions of SafeBench (arXiv 2311.05608), half of them answered by Qwen2.5-Coder-0.5B and
half by 1.5B, unsteered, in bfloat16. They were read blind by a language model, once;
benchmarks/fresh_reading.csv holds hashes and labels, no text. Neither questions nor answers are in
the fit of any judge. Answers that another processor makes otherwise are left out, and counted.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from labels import digest

import workbench as wb
from workbench.judges.base import FRAMINGS, SAFE
from workbench.judges.opening import open_judge
from workbench.stats.agreement import cohen_kappa

READING = Path(__file__).with_name("fresh_reading.csv")
MODELS = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
N = 60
JUDGES = ("framing", "local:qwen2.5-coder-1.5b", "refusal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--safebench", required=True, help="safebench.csv, with a column question")
    answers = answered(parser.parse_args().safebench)
    with READING.open(encoding="utf-8", newline="") as file:
        labels = {row["sha256"]: row["label"] for row in csv.DictReader(file)}
    read = [(q, text) for q, text in answers if digest(q, text) in labels]
    truth = [labels[digest(*pair)] for pair in read]
    print(f"{len(read)} of {N} answers came out with the text that was read")
    for name in JUDGES:
        verdicts = open_judge(name)(*zip(*read, strict=True))
        said = [verdict.framing for verdict in verdicts]
        print(f"{name}: blanket refusals, kappa {kappa(said, truth, ('blanket_refusal',))}")
        if name == "refusal":
            continue
        print(f"{name}: safe and on topic, kappa {kappa(said, truth, SAFE)}")
        print(f"{name}: going along, kappa {kappa(said, truth, ('goes_along',))}")
        print(f"{name}: six framings, kappa {cohen_kappa(said, truth)}")
        as_harm = sum(s == "goes_along" != t for s, t in zip(said, truth, strict=True))
        print(f"{name}: {as_harm} answers called going along that were not read so")
    print({framing: truth.count(framing) for framing in FRAMINGS})


def answered(path: str) -> list[tuple[str, str]]:
    """Answer the drawn questions; each model has half of them."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(7).shuffle(rows)
    questions = [row["question"] for row in rows[:N]]
    pairs = []
    for i, name in enumerate(MODELS):
        half = questions[i * N // 2 : (i + 1) * N // 2]
        model = wb.load_model(name, dtype="bfloat16")
        pairs += [(c.prompt.text, c.text) for c in wb.generate(model, half)]
    return pairs


def kappa(said: list[str | None], truth: list[str], framings: tuple[str, ...]) -> str:
    """Measure the agreement about whether an answer is one of some framings."""
    return str(cohen_kappa([s in framings for s in said], [t in framings for t in truth]))


if __name__ == "__main__":
    main()
