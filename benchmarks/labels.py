"""Read the labels of answers that were read blind: ids and hashes, no text."""

from __future__ import annotations

import csv
import hashlib

from workbench.files.store import data_path

LABELS_FILE = "framing_labels.csv"


def digest(prompt_id: str, text: str) -> str:
    """Hash an answer, as the label files name it."""
    return hashlib.sha256(f"{prompt_id}\0{text}".encode()).hexdigest()[:16]


def read_labels() -> list[dict[str, str]]:
    """Read the rows of data/framing_labels.csv."""
    with data_path(LABELS_FILE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
