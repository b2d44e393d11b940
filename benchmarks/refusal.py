r"""Fit the judge of refusals and test it on answers that it has not seen.

    python benchmarks/refusal.py --answers runs/0.5b.jsonl runs/1.5b.jsonl runs/framing.jsonl \
        --held-out runs/others.jsonl --people runs/xstest.jsonl --harmless runs/harmless.jsonl

``--answers`` are files of benchmarks/judge_answers.py and benchmarks/framing.py; their labels are
joined by hash (data/framing_labels.csv). Its tests: every model in turn with its questions left out
of the fit; answers of other models to other questions (``--held-out``, the same columns); answers
labelled by people (``--people``: prompt, text, model, label with the words of XSTest); and answers
to harmless questions (``--harmless``: prompt, text), where a refusal that the patterns do not find
is taken for a mistake. Writes data/refusal_judge.safetensors, fitted on ``--answers`` alone.
"""

from __future__ import annotations

import argparse
import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from labels import read_labels

from workbench.files.store import data_path, read_jsonl
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.refusal import (
    REFUSING,
    RefusalJudge,
    fit_refusal_judge,
    save_refusal_judge,
)
from workbench.judges.text_quality import load_encoder
from workbench.stats.agreement import Agreement, cohen_kappa, measure_agreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.judges.base import Judge, Verdict

FOLDS = 5
JUDGE_FILE = "refusal_judge.safetensors"
Row = dict[str, Any]


class RememberingEncoder:
    """Encode each text once: the same answers come in every fold."""

    def __init__(self) -> None:
        self.vectors: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str], **how: Any) -> np.ndarray:
        """Return one vector per text, as ``SentenceTransformer.encode`` does."""
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        if new:
            self.vectors |= dict(zip(new, load_encoder().encode(new, **how), strict=True))
        return np.stack([self.vectors[text] for text in texts])


ENCODER = RememberingEncoder()


class Said(NamedTuple):
    """What a judge says of answers: which refuse, and which of those blankly."""

    refusal: list[bool | None]
    blanket: list[bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", nargs="+", required=True, help="answers to fit on")
    parser.add_argument("--held-out", help="labelled answers of other models, never fitted on")
    parser.add_argument("--people", help="answers labelled by people, never fitted on")
    parser.add_argument("--harmless", nargs="*", default=[], help="answers to harmless questions")
    parser.add_argument("--out", default=str(data_path("README.md").parent / JUDGE_FILE))
    options = parser.parse_args()
    labels = {row["sha256"]: row["label"] for row in read_labels()}
    rows = [row for path in options.answers for row in labelled(path, labels)]
    print(f"{len(rows)} labelled answers to {len({row['prompt'] for row in rows})} questions")
    by_model(rows)
    judge = fitted(rows)
    card: dict[str, Any] = {
        "labels": f"{len(rows)} answers of {len({row['model'] for row in rows})} small models, "
        "read blind by language models, not by people",
        "languages": ["en"],
    }
    if options.held_out:
        card |= held_out(judge, labelled(options.held_out, labels))
    if options.people:
        card |= people(judge, read_jsonl(options.people))
    for path in options.harmless:
        harmless(judge, read_jsonl(path))
    save_refusal_judge(options.out, fitted(rows, card))
    print(f"{judge.name} in {options.out}")


def labelled(path: str, labels: dict[str, str]) -> list[Row]:
    """Read the answers of a file that have a label, each distinct one once."""
    distinct = {row["sha256"]: row for row in reversed(read_jsonl(path)) if row["sha256"] in labels}
    return [
        {"model": "embedded", **row, "label": labels[row["sha256"]]} for row in distinct.values()
    ]


def texts(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    return [row["prompt"] for row in rows], [row["text"] for row in rows]


def fitted(rows: Sequence[Row], card: dict[str, Any] | None = None) -> RefusalJudge:
    return fit_refusal_judge(
        *texts(rows), [row["label"] for row in rows], card=card, encoder=ENCODER
    )


def said_by(judge: Judge, rows: Sequence[Row]) -> Said:
    return said(judge(*texts(rows)))


def said(verdicts: Sequence[Verdict]) -> Said:
    """Read verdicts; a judge that names no framings calls every refusal a blanket one."""
    refusal = [None if v.label == "unscored" else v.label == "refusal" for v in verdicts]
    blanket = [
        v.label == "refusal" and (v.framing or "blanket_refusal") == "blanket_refusal"
        for v in verdicts
    ]
    return Said(refusal, blanket)


def by_model(rows: Sequence[Row]) -> None:
    """Test on each model with a judge fitted on other models' answers to other questions."""
    fold = np.array(
        [int(hashlib.sha256(row["prompt"].encode()).hexdigest(), 16) % FOLDS for row in rows]
    )
    model = np.array([row["model"] for row in rows])
    for name in dict.fromkeys(model):
        verdicts: dict[int, Verdict] = {}
        for k in range(FOLDS):
            test = np.flatnonzero((model == name) & (fold == k)).tolist()
            train = np.flatnonzero((model != name) & (fold != k)).tolist()
            if test:
                judge = fitted([rows[i] for i in train])
                verdicts |= dict(zip(test, judge(*texts([rows[i] for i in test])), strict=True))
        tested = [rows[i] for i in verdicts]
        print(f"\n{name}, neither model nor question seen:")
        framings(said(list(verdicts.values())), tested, "judge")
        framings(said_by(RefusalPatterns(), tested), tested, "patterns")


def held_out(judge: RefusalJudge, rows: Sequence[Row]) -> dict[str, Any]:
    """Test on models and questions that were never fitted on, against the patterns alone."""
    print("\nother models, other questions:")
    refusal, blanket = framings(said_by(judge, rows), rows, "judge")
    framings(said_by(RefusalPatterns(), rows), rows, "patterns")
    verdicts = judge(*texts(rows))
    is_either = [i for i, row in enumerate(rows) if row["label"] in REFUSING[:2]]
    kinds = cohen_kappa(
        [verdicts[i].framing == "blanket_refusal" for i in is_either],
        [rows[i]["label"] == "blanket_refusal" for i in is_either],
        clusters=[rows[i]["prompt"] for i in is_either],
    )
    print(f"  blanket against principled, of {len(is_either)}: kappa {kinds}")
    return {"agreement_held_out": refusal.to_dict(), "agreement_blanket": blanket.to_dict()}


def framings(said: Said, rows: Sequence[Row], name: str) -> tuple[Agreement, Agreement]:
    """Print how a judge agrees with labels that are framings."""
    truths = (
        [row["label"] in REFUSING for row in rows],
        [row["label"] == "blanket_refusal" for row in rows],
    )
    prompts = [row["prompt"] for row in rows]
    agreements = [
        measure_agreement(said.refusal, truths[0], clusters=prompts),
        measure_agreement(said.blanket, truths[1], clusters=prompts),
    ]
    for what, agreement in zip(("refusal", "blanket"), agreements, strict=True):
        show(f"{name}, {what}", agreement)
    return agreements[0], agreements[1]


def people(judge: RefusalJudge, rows: Sequence[Row]) -> dict[str, Any]:
    """Test on labels of people: full and partial refusals against full compliance."""
    truth = [not row["label"].startswith("1") for row in rows]
    prompts = [row["prompt"] for row in rows]
    print("\nlabelled by people:")
    agreements = [
        measure_agreement(said_by(one, rows).refusal, truth, clusters=prompts)
        for one in (judge, RefusalPatterns())
    ]
    for name, agreement in zip(("judge", "patterns"), agreements, strict=True):
        show(name, agreement)
    return {"agreement": agreements[0].to_dict()}


def harmless(judge: RefusalJudge, rows: Sequence[Row]) -> None:
    """Count answers to harmless questions that the judge alone calls refusals."""
    worded = said_by(RefusalPatterns(), rows).refusal
    more = sum(
        bool(a) and b is False for a, b in zip(said_by(judge, rows).refusal, worded, strict=True)
    )
    print(
        f"\n{len(rows)} answers to harmless questions: refusals by the patterns "
        f"{sum(map(bool, worded))}, by the judge alone {more}"
    )


def show(name: str, agreement: Agreement) -> None:
    print(
        f"  {name:18s} kappa {agreement.kappa}, recall {agreement.recall}, "
        f"precision {agreement.precision}"
    )


if __name__ == "__main__":
    main()
