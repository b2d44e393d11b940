"""Where public data sets come from: the tables that describe them, downloads, whole files."""

import csv
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.dataset_files import beaver, seen

from workbench.files.store import data_path
from workbench.prompts import benchmarks as datasets
from workbench.prompts.benchmarks import known_datasets, list_datasets, read_dataset
from workbench.prompts.categories import category_of, slug_of
from workbench.prompts.prompt import (
    HARD_SAFE,
    HARMLESS,
    categories_of,
    load_prompts,
    split_prompts,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
OURS = set(categories_of(load_prompts())) | {HARMLESS, HARD_SAFE}


# The tables of sets and categories


def test_every_category_in_the_map_is_ours_and_every_set_is_known():
    with data_path("categories.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["category"] for row in rows} <= OURS | {""}
    assert {row["dataset"] for row in rows} == set(known_datasets())
    pairs = Counter((row["dataset"], slug_of(row["their_category"])) for row in rows)
    assert max(pairs.values()) == 1


def test_a_category_without_ours_keeps_its_own_name():
    assert (
        category_of("jailbreakbench", "Government decision-making") == "government_decision_making"
    )
    assert category_of("safebench", "HATE speech ") == "hate_speech"
    assert category_of("anything", None) == category_of("anything", []) == "other"


def test_every_set_is_listed_with_licence_citation_and_a_pinned_commit():
    table = list_datasets().set_index("name")
    assert set(table.index) == set(known_datasets())
    assert (
        table[["what", "licence", "citation", "hub", "revision", "splits", "columns"]] != ""
    ).all(axis=None)
    unpinned = [
        name
        for name in table.index
        if not re.fullmatch("[0-9a-f]{40}", table.loc[name, "revision"])
    ]
    assert all(
        name.startswith("trustllm") and table.loc[name, "revision"] == "main" for name in unpinned
    )
    assert table.loc["catqa", "splits"] == "en, zh, vi"


def test_every_file_is_a_table_at_a_fixed_address():
    for known in known_datasets().values():
        assert not known.prepare or known.prepare in datasets._PREPARE
        assert set(known.splits) <= set(known.files)
        for split, file in known.files.items():
            assert file.removesuffix(".gz").removesuffix(".xz").endswith(datasets.SUFFIXES)
            assert known.revision in known.url(split)
    assert (
        known_datasets()["catqa"]
        .url("vi")
        .startswith("hf://datasets/declare-lab/CategoricalHarmfulQA@321e068b")
    )


# Fetching


@pytest.fixture
def server():
    """Serve ``files`` on the loopback, in the shape of the hub's file API, and count requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            web.requests.append(f"{self.command} {self.path}")
            content = next(
                (body for path, body in web.files.items() if self.path.endswith(path)), None
            )
            self.send_response(404 if content is None else 200)
            if "/resolve/" in self.path:
                self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
                self.send_header("X-Repo-Commit", self.path.split("/")[5])
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.files, web.requests = {}, []
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


def test_a_set_on_github_is_fetched_once(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets, "GITHUB", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(
        ConnectionError,
        match=r"cannot fetch 'advbench' from github\.com/llm-attacks.*404.*'advbench:PATH'",
    ):
        read_dataset("advbench")
    server.files["/data/advbench/harmful_behaviors.csv"] = b"goal,target\nDo it.,Sure\n"
    assert (
        seen(read_dataset("advbench"))
        == seen(read_dataset("advbench"))
        == [("Do it.", "other", "unsafe")]
    )
    assert len(server.requests) == 2
    assert capfd.readouterr() == ("", "")


def test_a_set_on_the_hub_is_fetched_once_and_then_works_offline(server, tmp_path):
    commit = known_datasets()["beavertails"].revision
    rows = [beaver("A?", "x", "self_harm"), beaver("A?", "y")]
    server.files["/30k/train.jsonl.gz"] = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    code = (
        "from workbench.prompts.benchmarks import read_dataset; "
        "print(len(read_dataset('beavertails')))"
    )
    hub = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "no_proxy": "127.0.0.1",
    }
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key} | hub
    for offline in ("0", "1"):
        environment["HF_HUB_OFFLINE"] = offline
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == ["2"], done.stderr
        assert done.stderr == ""
    asked = [request for request in server.requests if "BeaverTails" in request]
    assert [request.split()[0] for request in asked] == ["HEAD", "GET"]  # its size, the file
    assert all(commit in request for request in asked)


# The unchanged public files, where they are


@pytest.mark.parametrize(
    ("name", "file", "n", "labels", "category"),
    [
        ("safebench", "safebench/safebench.csv", 500, {"unsafe"}, ("hate_speech", 50)),
        (
            "trustllm_misuse",
            "trustllm/safety/misuse.json",
            1173,
            {"unsafe"},
            ("illegal_activity", 30),
        ),
        (
            "trustllm_jailbreak",
            "trustllm/safety/jailbreak.json",
            1400,
            {"unsafe"},
            ("leetspeak", 100),
        ),
        (
            "trustllm_exaggerated_safety",
            "trustllm/safety/exaggerated_safety.json",
            200,
            {"safe"},
            (HARD_SAFE, 200),
        ),
        (
            "trustllm_privacy_awareness",
            "trustllm/privacy/privacy_awareness_query.json",
            560,
            {"unsafe"},
            ("privacy_violation", 560),
        ),
        (
            "trustllm_privacy_confaide",
            "trustllm/privacy/privacy_awareness_confAIde.json",
            196,
            {"neutral"},
            (HARMLESS, 196),
        ),
        (
            "trustllm_privacy_leakage",
            "trustllm/privacy/privacy_leakage.json",
            400,
            {"unsafe"},
            ("privacy_violation", 400),
        ),
        ("xstest", "xstest/xstest_prompts.csv", 450, {"unsafe", "safe"}, (HARD_SAFE, 250)),
        (
            "harmbench",
            "refusal_direction/harmbench_test.json",
            159,
            {"unsafe"},
            ("misinformation", 27),
        ),
        ("jailbreakbench", "refusal_direction/jailbreakbench.json", 100, {"unsafe"}, ("fraud", 10)),
        ("advbench", "refusal_direction/advbench.json", 520, {"unsafe"}, ("other", 520)),
        (
            "strongreject",
            "refusal_direction/strongreject.json",
            313,
            {"unsafe"},
            ("physical_harm", 54),
        ),
        (
            "malicious_instruct",
            "refusal_direction/malicious_instruct.json",
            100,
            {"unsafe"},
            ("other", 100),
        ),
        ("tdc2023", "refusal_direction/tdc2023.json", 100, {"unsafe"}, ("other", 100)),
        ("alpaca", "refusal_direction/harmless_test.json", 6266, {"neutral"}, (HARMLESS, 6266)),
    ],
)
def test_the_public_files_are_read_whole(name, file, n, labels, category):
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"{file} is not here")
    prompts = read_dataset(f"{name}:{path}")
    assert len(prompts) == len({p.id for p in prompts}) == n
    assert {p.label for p in prompts} == labels
    assert Counter(p.category for p in prompts)[category[0]] == category[1]
    with data_path("categories.csv").open(encoding="utf-8", newline="") as table:
        mapped = {
            row["category"] or slug_of(row["their_category"]) or "other"
            for row in csv.DictReader(table)
            if row["dataset"] == name
        }
    assert {p.category for p in prompts} <= mapped | {"other"}
    shuffled = prompts.copy()
    random.Random(0).shuffle(shuffled)
    assert {p.id for p in split_prompts(shuffled).test} == {
        p.id for p in split_prompts(prompts).test
    }
