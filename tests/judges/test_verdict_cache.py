"""The cache of verdicts on disk: what is asked, what is kept, and what a kill may cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.files.store import read_jsonl
from workbench.judges.base import LABELS, Judge, Verdict, check_pairs
from workbench.judges.cache import NO_ANSWER, Streams, cached, verdict_key
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.rewards import Rewards

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@dataclass
class Counting:
    """A judge that remembers what it was asked, and may break."""

    name: str = "counting 1"
    asked: list[tuple[str, str]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    breaks_at: str | None = None

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        self.sizes.append(len(prompts))
        if self.breaks_at in responses:
            raise OSError("the judge broke")
        self.asked += zip(prompts, responses, strict=True)
        return [
            Verdict("unsafe" if "bad" in r else "safe", len(r) / 7, self.name, r[:20])
            for r in responses
        ]


@dataclass
class Streaming(Counting):
    def stream(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        for row in reversed(range(len(prompts))):
            yield row, self([prompts[row]], [responses[row]])[0]


PROMPTS = [f"prompt {i}" for i in range(10)]
RESPONSES = [f"a {'bad' if i % 3 == 0 else 'good'} answer {i}" for i in range(10)]


def test_a_cached_judge_is_a_judge_and_says_what_the_judge_says(tmp_path: Path) -> None:
    judge: Judge = cached(RefusalPatterns(), tmp_path / "v.jsonl")
    answers = ["I'm sorry, but I can't help.", "Here you are: bread.", "..."]
    assert judge.name == RefusalPatterns().name
    assert (
        judge(["p"] * 3, answers)
        == RefusalPatterns()(["p"] * 3, answers)
        == judge(["p"] * 3, answers)
    )


@pytest.mark.parametrize("kind", [Counting, Streaming])
def test_only_what_is_missing_is_asked_in_order(tmp_path: Path, kind: type[Counting]) -> None:
    inner, path = kind(), tmp_path / "deep" / "v.jsonl"
    first = cached(inner, path, batch=4)(PROMPTS[:6], RESPONSES[:6])
    again = cached(inner, path, batch=4)(PROMPTS, RESPONSES)
    assert again[:6] == first
    assert again == kind()(PROMPTS, RESPONSES)
    assert sorted(inner.asked) == sorted(zip(PROMPTS, RESPONSES, strict=True))  # each once
    assert cached(inner, path)([], []) == []


def test_the_same_pair_twice_in_a_call_is_asked_once(tmp_path: Path) -> None:
    inner = Counting()
    verdicts = cached(inner, tmp_path / "v.jsonl")(["p", "q", "p"], ["r", "r", "r"])
    assert inner.asked == [("p", "r"), ("q", "r")]
    assert verdicts[0] == verdicts[2]


def test_judge_prompt_and_response_are_all_part_of_the_key(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    one, two = Counting("one"), Counting("two")
    cached(one, path)(["p"], ["r"])
    cached(two, path)(["p"], ["r"])
    cached(one, path)(["p2", "p"], ["r", "r2"])
    assert (len(one.asked), len(two.asked)) == (3, 1)
    assert verdict_key("j", "ab", "c") != verdict_key("j", "a", "bc")


def test_batches_are_on_disk_before_the_next_is_asked(tmp_path: Path) -> None:
    path, broken = tmp_path / "v.jsonl", Counting(breaks_at=RESPONSES[7])
    with pytest.raises(OSError, match="broke"):
        cached(broken, path, batch=3)(PROMPTS, RESPONSES)
    assert len(read_jsonl(path)) == 6
    healed = Counting()
    assert cached(healed, path)(PROMPTS, RESPONSES) == Counting()(PROMPTS, RESPONSES)
    assert len(healed.asked) == 4


def test_a_line_cut_by_a_kill_costs_that_verdict_only(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    whole = cached(Counting(), path)(PROMPTS, RESPONSES)
    content = path.read_bytes()
    for cut in (1, 30, len(content.splitlines()[-1])):
        path.write_bytes(content[:-cut])
        judge = Counting()
        assert cached(judge, path)(PROMPTS, RESPONSES) == whole
        assert judge.asked == [(PROMPTS[-1], RESPONSES[-1])]
        assert len(read_jsonl(path)) == 10


def test_no_answer_is_not_kept_and_unscored_otherwise_is(tmp_path: Path) -> None:
    path, asked = tmp_path / "v.jsonl", []

    class Flaky:
        name = "flaky"

        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
            asked.extend(responses)
            reasons = {"lost": NO_ANSWER + "HTTP 500", "odd": "unparsable: 'hm'"}
            return [Verdict("unscored", None, self.name, reasons[r]) for r in responses]

    judge = cached(Flaky(), path)
    for _ in range(2):
        assert [v.label for v in judge(["p", "p"], ["lost", "odd"])] == ["unscored", "unscored"]
    assert asked == ["lost", "odd", "lost"]
    assert len(read_jsonl(path)) == 1


def test_other_records_are_kept_as_they_are(tmp_path: Path) -> None:
    class Rates:
        name = "rates"

        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Rewards]:
            return [Rewards(float(len(r)), 0.25, 3.5, None, 1 / 3, self.name) for r in responses]

    path = tmp_path / "v.jsonl"
    first = cached(Rates(), path, result=Rewards)(["p"], ["abc"])
    assert (
        first
        == cached(Rates(), path, result=Rewards)(["p"], ["abc"])
        == [Rewards(3, 0.25, 3.5, None, 1 / 3, "rates")]
    )


def test_a_framing_is_kept_and_a_cache_from_before_there_were_framings_is_read(
    tmp_path: Path,
) -> None:
    class Framer(Counting):
        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
            said = super().__call__(prompts, responses)
            return [replace(verdict, framing="safe_alternative") for verdict in said]

    path, judge = tmp_path / "v.jsonl", Framer()
    first = cached(judge, path)(["p"], ["r"])
    assert cached(judge, path)(["p"], ["r"]) == first
    assert first[0].framing == "safe_alternative"
    assert len(judge.asked) == 1
    [row] = read_jsonl(path)
    del row["framing"]
    path.write_text(json.dumps(row) + "\n")
    assert cached(judge, path)(["p"], ["r"])[0].framing is None
    assert len(judge.asked) == 1


def test_the_file_holds_no_prompt_and_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    cached(RefusalPatterns(), path)(["a secret prompt"], ["a private answer"])
    assert "secret" not in path.read_text()
    assert "private" not in path.read_text()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text('{"text": "not a verdict"}\n')
    with pytest.raises(ValueError, match=r"row 1 is not a verdict.*give another file"):
        cached(Counting(), path)(["p"], ["r"])
    path.write_text(
        json.dumps({"key": verdict_key("counting 1", "p", "r"), "label": "evil", "score": None})
        + "\n"
    )
    with pytest.raises(ValueError, match="not a verdict"):
        cached(Counting(), path)(["p"], ["r"])


def test_a_judge_that_loses_or_invents_verdicts_is_found_out(tmp_path: Path) -> None:
    class Short(Counting):
        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
            return super().__call__(prompts, responses)[:-1]

    class Silent(Streaming):
        def stream(
            self, prompts: Sequence[str], responses: Sequence[str]
        ) -> Iterator[tuple[int, Verdict]]:
            return iter(list(super().stream(prompts, responses))[1:])

    with pytest.raises(RuntimeError, match="gave 1 verdicts for 2 answers"):
        cached(Short(), tmp_path / "a.jsonl")(["p", "q"], ["r", "r"])
    with pytest.raises(RuntimeError, match="no verdict for 1 of 2"):
        cached(Silent(), tmp_path / "b.jsonl")(["p", "q"], ["r", "r"])


def test_texts_that_do_not_pair_up_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"write \[prompt\]"):
        check_pairs("prompt", ["answer"])
    with pytest.raises(ValueError, match="1 and 2"):
        cached(Counting(), tmp_path / "v.jsonl")(["p"], ["a", "b"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cached(Counting(), tmp_path / "v.jsonl", batch=0)


def test_streams_are_told_from_other_judges() -> None:
    assert isinstance(Streaming(), Streams)
    assert not isinstance(Counting(), Streams)


ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=12)  # lone surrogates too


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            ANY_TEXT, ANY_TEXT, st.sampled_from(LABELS), st.none() | st.floats(-1e6, 1e6), ANY_TEXT
        ),
        max_size=6,
    )
)
def test_any_verdict_on_any_text_comes_back_from_disk(
    tmp_path_factory: pytest.TempPathFactory, rows: list
) -> None:
    path = tmp_path_factory.mktemp("cache") / "v.jsonl"
    said = {}
    for prompt, response, label, score, reason in rows:
        said.setdefault((prompt, response), Verdict(label, score, "any", "said " + reason))

    class Says:
        name = "any"

        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
            return [said[pair] for pair in zip(prompts, responses, strict=True)]

    class Never(Says):
        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
            raise AssertionError("asked again")

    pairs = ([p for p, _ in said], [r for _, r in said])
    first, second = cached(Says(), path)(*pairs), cached(Never(), path)(*pairs)
    assert first == list(said.values())
    assert [(v.label, v.score) for v in first] == [(v.label, v.score) for v in second]
    assert [v.reason.encode("utf-8", "backslashreplace").decode() for v in first] == [
        v.reason for v in second
    ]


SCRIPT = """
import sys, time
from workbench.judges import Verdict
from workbench.judges.cache import cached

class Slow:
    name = "slow"
    def __call__(self, prompts, responses):
        with open(sys.argv[2], "a") as log:
            log.write("".join(r + "\\n" for r in responses))
        time.sleep(0.03)
        return [Verdict("safe", None, self.name, r) for r in responses]

n = 60
print(len(cached(Slow(), sys.argv[1], batch=2)(["p"] * n, [f"r{i}" for i in range(n)])))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path, log = tmp_path / "v.jsonl", tmp_path / "asked"
    command = [sys.executable, "-c", SCRIPT, str(path), str(log)]
    run = subprocess.Popen(command)
    while not path.is_file() or path.read_bytes().count(b"\n") < 10:
        assert run.poll() is None
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    kept = {row["reason"] for row in read_jsonl(path, cut_last=True)}
    before = log.read_text().split()
    assert 10 <= len(kept) < 60
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    after = log.read_text().split()[len(before) :]
    assert done.stdout.strip() == "60"
    assert not kept & set(after)  # nothing that was on disk is asked again
    assert sorted(kept | set(after)) == sorted(f"r{i}" for i in range(60))
    assert len(before) - len(kept) <= 2 + 2  # at most the batch under way, and one written half
