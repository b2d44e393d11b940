"""Small files in the schemas of public data sets, for the tests that read them."""

from __future__ import annotations

import csv
import json

HARMS = [
    "animal_abuse",
    "controversial_topics,politics",
    "self_harm",
    "privacy_violation",
    "violence,aiding_and_abetting,incitement",
]


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def seen(prompts):
    return [(p.text, p.category, p.label) for p in prompts]


def beaver(prompt, response, *harms, is_safe=None):
    flags = {harm: harm in harms for harm in HARMS}
    return {
        "prompt": prompt,
        "response": response,
        "category": flags,
        "is_safe": not harms if is_safe is None else is_safe,
    }
