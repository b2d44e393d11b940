"""A judge behind any OpenAI-compatible endpoint: asked with a rubric, patient with failures, never inventing a verdict.

Whatever goes wrong, an answer ends as unscored with the reason: refused by the endpoint or lost on the way (asked again next
time, see ``verdict_cache``), or answered with something that is no verdict (kept). Wrap it in ``verdict_cache.cached``: verdicts
are then on disk as they arrive.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx

from workbench.files.store import key_of
from workbench.judges.base import Verdict
from workbench.judges.cache import NO_ANSWER, check_pairs, is_empty
from workbench.judges.rubrics import Rubric, load_rubrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


PATIENCE = 8
"""Answers in a row without any reply, each after all its tries, after which the endpoint is not asked any more."""


LONGEST_WAIT = 120.0
"""Seconds; an endpoint that asks for a longer pause has said no for now."""


_LARGEST_BODY = 1_000_000


_FATAL = {
    401: "the key was refused",
    402: "there is no credit",
    403: "access was refused",
    404: "no such address or model",
}


_AGAIN = frozenset({408, 409, 425, 429})


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prices:
    """What the endpoint charges, per million tokens, and what may be spent in one call.

    Attributes:
        per_million_in: For tokens sent.
        per_million_out: For tokens received.
        budget: In the same currency; a call whose estimate is higher is not started. None: no limit.
    """

    per_million_in: float
    per_million_out: float
    budget: float | None = None


@dataclass(frozen=True)
class CostEstimate:
    """What a call will take at most, retries aside; ``cost`` is None without prices."""

    requests: int
    tokens_in: int
    tokens_out: int
    cost: float | None

    def __str__(self) -> str:
        spent = (
            "unknown cost (no prices given)"
            if self.cost is None
            else f"a cost of at most {self.cost:.4g}"
        )
        return f"{self.requests} requests, about {self.tokens_in} tokens in, at most {self.tokens_out} out, {spent}"


@dataclass(frozen=True)
class ApiJudge:
    """Judge that asks a language model behind an OpenAI-compatible endpoint (chat completions), with a rubric.

    Attributes:
        rubric: What is asked: ``"unsafe"``, ``"refusal"``, ``"on_topic"``, or a ``Rubric`` of your own.
        model: The endpoint's name of the model.
        base_url: Address up to and with the version, such as ``"http://localhost:8000/v1"``.
        key_env: Environment variable with the key, read when asking and kept nowhere; None for an endpoint without one.
        timeout: Seconds a request may take.
        waits: Seconds before each retry (a random part is added); as many retries. Retry-After goes first.
        concurrency: Requests under way at once.
        requests_per_minute: Rate limit, retries counted; None for none.
        prices: For the estimate that is logged before the first request, and for the budget.
        options: Further fields of the request, or other values of its fields; None takes a field out.
    """

    rubric: str | Rubric
    model: str
    base_url: str
    key_env: str | None = "OPENAI_API_KEY"
    timeout: float = 60.0
    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    concurrency: int = 4
    requests_per_minute: float | None = None
    prices: Prices | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.rubric, str) and self.rubric not in load_rubrics():
            raise ValueError(
                f"unknown rubric {self.rubric!r}; rubrics: {', '.join(load_rubrics())}."
            )
        try:
            url = urlsplit(self.base_url)
            httpx.URL(self.base_url).copy_with(port=url.port)
        except (ValueError, httpx.InvalidURL) as error:
            raise ValueError(f"base_url is not an address ({error}).") from None
        if (
            url.scheme not in ("http", "https")
            or not url.hostname
            or url.query
            or url.fragment
            or "@" in url.netloc
        ):
            raise ValueError(
                "base_url must be http(s)://HOST/PATH without user, password or query; the key comes from key_env."
            )
        if self.key_env is not None and url.scheme == "http" and not _is_loopback(url.hostname):
            raise ValueError(
                f"a key would go to {url.hostname} in the clear; use https, or key_env=None if the endpoint needs no key."
            )
        if self.concurrency < 1 or self.timeout <= 0 or min(self.waits, default=0) < 0:
            raise ValueError(
                "concurrency must be at least 1, timeout above 0 and waits not negative."
            )
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ValueError(
                f"requests_per_minute must be above 0 or None, got {self.requests_per_minute}."
            )

    @property
    def name(self) -> str:
        """Model and rubric, with a key of all that may change a verdict: rubric, model, endpoint and options."""
        rubric = self._rubric
        asked = [
            rubric.instructions,
            {w: list(a) for w, a in rubric.answers.items()},
            self.base_url,
            self._body("", ""),
        ]
        return f"api:{self.model}:{rubric.name}-{key_of(asked)[:8]}"

    def estimate(self, prompts: Sequence[str], responses: Sequence[str]) -> CostEstimate:
        """What asking about these answers takes at most, without asking (tokens by length: three bytes each)."""
        asked = [pair for pair in zip(prompts, responses, strict=True) if not is_empty(pair[1])]
        tokens_in = sum(
            len(message["content"].encode("utf-8", "replace")) // 3 + 8
            for pair in asked
            for message in self._body(*pair)["messages"]
        )
        body = self._body("", "")
        tokens_out = len(asked) * int(
            body.get("max_tokens") or body.get("max_completion_tokens") or 0
        )
        cost = None
        if self.prices is not None:
            cost = (
                tokens_in * self.prices.per_million_in + tokens_out * self.prices.per_million_out
            ) / 1e6
        return CostEstimate(len(asked), tokens_in, tokens_out, cost)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Judge each answer; what ``stream`` gives, in order."""
        verdicts = dict(self.stream(prompts, responses))
        return [verdicts[row] for row in range(len(verdicts))]

    def stream(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge each answer and give each verdict as it arrives, with its row.

        Raises:
            ValueError: If the key is missing, the estimate is above the budget, or the lists differ in length.
            RuntimeError: If the endpoint turned the very first answers down in a way that a retry cannot mend.
        """
        check_pairs(prompts, responses)
        key = self._key()
        estimate = self.estimate(prompts, responses)
        if (
            self.prices is not None
            and self.prices.budget is not None
            and (estimate.cost or 0) > self.prices.budget
        ):
            raise ValueError(
                f"not started: {estimate}, but the budget is {self.prices.budget}; ask about fewer answers."
            )
        _logger.info("%s: %s", self.name, estimate)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        near = _is_loopback(urlsplit(self.base_url).hostname or "")  # a proxy could not reach it
        with httpx.Client(headers=headers, timeout=self.timeout, trust_env=not near) as client:
            asking = _Asking(self, client, key)
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                rows = {
                    pool.submit(asking.verdict, prompt, response): row
                    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
                }
                for done in as_completed(rows):
                    yield rows[done], done.result()
            finally:  # also when the caller stops listening: no request is made that nobody hears
                asking.stopped.set()
                pool.shutdown(cancel_futures=True)
        if asking.given_up and not asking.replies:
            raise RuntimeError(
                f"{self.model!r} at {urlsplit(self.base_url).hostname} judged nothing: {asking.given_up}."
            )

    @property
    def _rubric(self) -> Rubric:
        return load_rubrics()[self.rubric] if isinstance(self.rubric, str) else self.rubric

    def _body(self, prompt: str, response: str) -> dict[str, Any]:
        """The request. The texts travel as JSON strings, so that nothing in them can end the material and begin to instruct."""
        material = json.dumps({"request": prompt, "answer": response}, ensure_ascii=False)
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": self._rubric.instructions},
                {"role": "user", "content": material},
            ],
            "temperature": 0,
            "max_tokens": 300,
        }
        return {
            name: value for name, value in {**body, **self.options}.items() if value is not None
        }

    def _key(self) -> str | None:
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            what = "is not set" if not key else "does not hold a key (one word of plain characters)"
            raise ValueError(
                f"environment variable {self.key_env} {what}; set it, or pass key_env=None if none is needed."
            )
        return key


class _NoAnswerError(Exception):
    """A request that came to nothing; its text says why, and never holds the key or a header."""

    def __init__(
        self, why: str, *, again: bool = True, wait: float = 0.0, fatal: bool = False
    ) -> None:
        super().__init__(why)
        self.again, self.wait, self.fatal = again, wait, fatal


class _Asking:
    """One call of a judge: what its threads share."""

    def __init__(self, judge: ApiJudge, client: httpx.Client, key: str | None) -> None:
        self.judge, self.client, self.key, self.name = judge, client, key, judge.name
        self.stopped = threading.Event()
        self.replies = 0
        self.given_up = ""
        self._failures = 0
        self._next = 0.0
        self._lock = threading.Lock()

    def verdict(self, prompt: str, response: str) -> Verdict:
        """The verdict on one answer, after as many tries as it takes."""
        if is_empty(response):
            return Verdict("degenerate", None, self.name, "empty")
        why = "stopped"
        for wait in (0.0, *self.judge.waits):
            self._wait_for_turn(wait)
            if self.stopped.is_set() or self.given_up:
                return self._unscored(NO_ANSWER + (self.given_up or "stopped"))
            try:
                content = self._ask(prompt, response)
            except _NoAnswerError as error:
                why = str(error)
                if error.fatal or error.wait > LONGEST_WAIT:
                    self._give_up(why)
                if not error.again:
                    return self._unscored(NO_ANSWER + why)
                self._hold(error.wait)
            else:
                with self._lock:
                    self.replies, self._failures = self.replies + 1, 0
                return self._read(content)
        with self._lock:
            self._failures += 1
        if self._failures >= PATIENCE:
            self._give_up(f"{PATIENCE} answers in a row without a reply, the last: {why}")
        return self._unscored(NO_ANSWER + why)

    def _read(self, content: str | None) -> Verdict:
        """The verdict in the judge's reply, or unscored."""
        if content is None:
            return self._unscored("the judge gave no text")
        found = self.judge._rubric.read(content)
        if found is None:
            return self._unscored(f"unparsable: {self._clean(content)!r}")
        word, reason = found
        label, score = self.judge._rubric.answers[word]
        return Verdict(
            label, score, self.name, f"{word}: {self._clean(reason)}" if reason else word
        )

    def _clean(self, text: str) -> str:
        """One line of text from outside, short, printable, and without the key even where the endpoint sends it back."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:200]

    def _ask(self, prompt: str, response: str) -> str | None:
        """Text of one chat completion, None if it was withheld."""
        request = json.dumps(self.judge._body(prompt, response)).encode("ascii")
        deadline = time.monotonic() + self.judge.timeout
        url, body = f"{self.judge.base_url.rstrip('/')}/chat/completions", b""
        try:
            with self.client.stream("POST", url, content=request) as reply:
                for part in reply.iter_bytes():
                    body += part
                    if len(body) > _LARGEST_BODY:
                        raise _NoAnswerError("the reply is too large")
                    if (
                        time.monotonic() > deadline
                    ):  # the client's own limit is per read: a trickle would pass it
                        raise httpx.ReadTimeout("")
        except httpx.TimeoutException:
            raise _NoAnswerError(f"no reply within {self.judge.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise _NoAnswerError(f"the connection failed ({type(error).__name__})") from None
        _check_status(
            reply.status_code, reply.headers.get("Retry-After"), self._clean(_message(body))
        )
        try:
            choice = json.loads(body)["choices"][0]
            content = choice["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _NoAnswerError("the reply is not a chat completion") from None
        if content is None or choice.get("finish_reason") == "content_filter":
            return None
        if not isinstance(content, str):
            raise _NoAnswerError("the reply is not a chat completion")
        return content

    def _wait_for_turn(self, wait: float) -> None:
        """Sleep before a retry, and until the rate limit and the endpoint's own wish allow a request."""
        self.stopped.wait(
            wait * random.uniform(0.5, 1.5)
        )  # or all threads would come back at the same moment
        gap = 60.0 / self.judge.requests_per_minute if self.judge.requests_per_minute else 0.0
        while not self.stopped.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + gap
                    return
                left = self._next - now
            self.stopped.wait(left)

    def _hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def _give_up(self, why: str) -> None:
        with self._lock:
            self.given_up = self.given_up or why

    def _unscored(self, reason: str) -> Verdict:
        return Verdict("unscored", None, self.name, reason)


def _check_status(status: int, retry_after: str | None, message: str) -> None:
    """Raise what a status other than 200 means."""
    if status == 200:
        return
    if status in _FATAL or 300 <= status < 400:
        why = _FATAL.get(status, "the address redirects; give the one it leads to")
        raise _NoAnswerError(f"HTTP {status}, {why}", again=False, fatal=True)
    if status in _AGAIN or status >= 500:
        wait = _retry_after_seconds(retry_after)
        asks = f", to be asked again after {wait:g} s" if wait else ""
        raise _NoAnswerError(f"HTTP {status}{asks}", again=wait <= LONGEST_WAIT, wait=wait)
    raise _NoAnswerError(f"HTTP {status} {message}".rstrip(), again=False)


def _message(body: bytes) -> str:
    """What an endpoint's error says, where it says it in the usual form."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _retry_after_seconds(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 where it says nothing readable."""
    if not value:
        return 0.0
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
