"""Ask a language model behind an OpenAI-compatible endpoint to judge answers by a rubric.

The requests, their retries and the pauses an endpoint asks for are those of the ``openai`` client.
Whatever goes wrong, an answer ends as unscored with the reason, never with an invented verdict. If
the endpoint refused it or did not reply, it is asked about again next time; if the model replied
with something that is no verdict, that is a result. Wrap the judge in ``workbench.judges.cached``:
verdicts are then on disk as they arrive.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import os
import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from workbench.files.store import key_of
from workbench.judges.base import FRAMINGS, Verdict, is_empty, without_thoughts
from workbench.judges.cache import NO_ANSWER
from workbench.judges.rubrics import Rubric, load_rubrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from openai import APIStatusError, AsyncOpenAI


PATIENCE = 8
"""Answers in a row without a reply, each after all its retries, before the endpoint is given up."""


LONGEST_WAIT = 120.0
"""Seconds; an endpoint that asks for a longer pause has said no for now."""


_FATAL = {
    401: "the key was refused; check the variable that key_env names",
    402: "there is no credit; top up the account or ask another endpoint",
    403: "access was refused; check that the key may use this model",
    404: "no such address or model; check base_url and model",
}


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prices:
    """State what the endpoint charges per million tokens, and what one call may spend.

    Attributes:
        per_million_in: For tokens sent.
        per_million_out: For tokens received.
        budget: In the same currency; a call whose estimate is higher is not started; None for none.
    """

    per_million_in: float
    per_million_out: float
    budget: float | None = None


@dataclass(frozen=True)
class CostEstimate:
    """State what a call takes at most, retries aside; ``cost`` is None without prices."""

    requests: int
    tokens_in: int
    tokens_out: int
    cost: float | None

    def __str__(self) -> str:
        cost = (
            "unknown cost (no prices given)"
            if self.cost is None
            else f"a cost of at most {self.cost:.4g}"
        )
        return (
            f"{self.requests} requests, about {self.tokens_in} tokens in, "
            f"at most {self.tokens_out} out, {cost}"
        )


@dataclass(frozen=True)
class ApiJudge:
    """Judge answers with a language model behind an OpenAI-compatible chat endpoint.

    Attributes:
        rubric: What is asked: ``"framing"``, ``"unsafe"``, ``"refusal"``, ``"on_topic"``, or your
            own ``Rubric``.
        model: The endpoint's name of the model.
        base_url: Address up to and with the version, such as ``"http://localhost:8000/v1"``.
        key_env: Environment variable with the key, read when asking and kept nowhere; None for an
            endpoint that needs none.
        timeout: Seconds a request may take.
        retries: Further tries after a failed one; the client waits longer before each, and as long
            as the endpoint asks for (Retry-After).
        concurrency: Requests under way at once.
        requests_per_minute: Rate limit, retries counted; None for none.
        prices: For the estimate that is logged before the first request, and for the budget.
        options: Further fields of the request, or other values of its fields; None removes a field.
    """

    rubric: str | Rubric
    model: str
    base_url: str
    key_env: str | None = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    concurrency: int = 4
    requests_per_minute: float | None = None
    prices: Prices | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.rubric, str) and self.rubric not in load_rubrics():
            raise ValueError(
                f"unknown rubric {self.rubric!r}; rubrics: {', '.join(load_rubrics())}."
            )
        host = _checked_host(self.base_url)
        in_the_clear = not self.base_url.lower().startswith("https:") and not _is_loopback(host)
        if self.key_env is not None and in_the_clear:
            raise ValueError(
                f"a key would go to {host} in the clear; use https, "
                "or key_env=None if the endpoint needs no key."
            )
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise ValueError(
                "concurrency must be at least 1, timeout above 0 and retries not negative, "
                f"got {self.concurrency}, {self.timeout} and {self.retries}."
            )
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ValueError(
                f"requests_per_minute must be above 0 or None, got {self.requests_per_minute}."
            )

    @property
    def name(self) -> str:
        """Name model and rubric, with a key of all that may change a verdict.

        The key is of the rubric's text, the endpoint, the model and the options.
        """
        rubric = self._rubric
        content = [
            rubric.instructions,
            {word: list(answer) for word, answer in rubric.answers.items()},
            self.base_url,
            self._body("", ""),
        ]
        return f"api:{self.model}:{rubric.name}-{key_of(content)[:8]}"

    def estimate(self, prompts: Sequence[str], responses: Sequence[str]) -> CostEstimate:
        """Estimate what asking about these answers takes at most, without asking.

        Tokens are counted by length: three bytes each.
        """
        pairs = [pair for pair in zip(prompts, responses, strict=True) if not is_empty(pair[1])]
        tokens_in = sum(
            len(message["content"].encode("utf-8", "replace")) // 3 + 8
            for pair in pairs
            for message in self._body(*pair)["messages"]
        )
        body = self._body("", "")
        tokens_out = len(pairs) * int(
            body.get("max_tokens") or body.get("max_completion_tokens") or 0
        )
        cost = None
        if self.prices is not None:
            cost = (
                tokens_in * self.prices.per_million_in + tokens_out * self.prices.per_million_out
            ) / 1e6
        return CostEstimate(len(pairs), tokens_in, tokens_out, cost)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Judge each answer and return the verdicts of ``stream`` in the order of the answers."""
        verdicts = dict(self.stream(prompts, responses))
        return [verdicts[row] for row in range(len(verdicts))]

    def stream(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge each answer and give each verdict as it arrives, with its row.

        Raises:
            ValueError: If the key is missing, the estimate is above the budget, or the lists differ
                in length.
            RuntimeError: If the endpoint replied to nothing and was given up.
        """
        responses = without_thoughts(prompts, responses)
        key = self._key()
        estimate = self.estimate(prompts, responses)
        if (
            self.prices is not None
            and self.prices.budget is not None
            and (estimate.cost or 0) > self.prices.budget
        ):
            raise ValueError(
                f"not started: {estimate}, but the budget is {self.prices.budget}; "
                "ask about fewer answers, or raise the budget."
            )
        _logger.info("%s: %s", self.name, estimate)
        asking = _Asking(self, key)
        yield from asking.verdicts(list(zip(prompts, responses, strict=True)))
        if asking.given_up and not asking.replies:
            raise RuntimeError(
                f"{self.model!r} at {urlsplit(self.base_url).hostname} judged nothing: "
                f"{asking.given_up}."
            )

    @property
    def _rubric(self) -> Rubric:
        return load_rubrics()[self.rubric] if isinstance(self.rubric, str) else self.rubric

    def _body(self, prompt: str, response: str) -> dict[str, Any]:
        """Build the request.

        The texts travel as JSON strings, so that nothing in them can end the material and begin to
        instruct. Lone surrogates are escaped, for the request itself is UTF-8.
        """
        material = json.dumps({"request": prompt, "answer": response}, ensure_ascii=False)
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": self._rubric.instructions},
                {"role": "user", "content": material.encode("utf-8", "backslashreplace").decode()},
            ],
            "temperature": 0,
            "max_tokens": 300,
        }
        return {
            name: value for name, value in {**body, **self.options}.items() if value is not None
        }

    def _key(self) -> str | None:
        """Read the key from the environment; refuse what could not be one."""
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            what = "is not set" if not key else "does not hold a key (one word of plain characters)"
            raise ValueError(
                f"environment variable {self.key_env} {what}; set it, "
                "or pass key_env=None if none is needed."
            )
        return key


class _NoReplyError(Exception):
    """Say why an answer got no reply; the text never holds the key or a header.

    ``concerns`` is the answer alone ("answer"), the endpoint, which may recover ("endpoint"), or
    every further request ("all").
    """

    def __init__(self, why: str, concerns: Literal["answer", "endpoint", "all"]) -> None:
        super().__init__(why)
        self.concerns = concerns


class _Asking:
    """Ask about all answers of one call; holds what its requests share."""

    def __init__(self, judge: ApiJudge, key: str | None) -> None:
        self.judge, self.key, self.name = judge, key, judge.name
        self.replies = 0
        self.given_up = ""
        self._failures_in_a_row = 0
        self._next_turn = 0.0
        self._gap = 60.0 / judge.requests_per_minute if judge.requests_per_minute else 0.0

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Verdict]]:
        """Give rows and verdicts as they arrive; whoever stops listening stops the requests.

        The event loop runs in a thread of its own, for the caller's may have one (a notebook).
        """
        from anyio.from_thread import start_blocking_portal

        arrivals: SimpleQueue[tuple[int, Verdict] | None] = SimpleQueue()
        with start_blocking_portal() as portal:
            work = portal.start_task_soon(self._judge_all, pairs, arrivals.put)
            work.add_done_callback(lambda _: arrivals.put(None))
            while (arrival := arrivals.get()) is not None:
                yield arrival
            work.result()  # raises what went wrong in it

    async def _judge_all(
        self, pairs: Iterable[tuple[str, str]], give: Callable[[tuple[int, Verdict]], None]
    ) -> None:
        """Judge all pairs, as many at once as the judge allows, in their order."""
        waiting = iter(enumerate(pairs))

        async def work(client: AsyncOpenAI) -> None:
            for row, (prompt, response) in waiting:
                give((row, await self._verdict(client, prompt, response)))

        async with self._client() as client, asyncio.TaskGroup() as group:
            for _ in range(self.judge.concurrency):
                group.create_task(work(client))

    def _client(self) -> AsyncOpenAI:
        """Make a client of this judge's settings."""
        import openai

        on_this_machine = _is_loopback(urlsplit(self.judge.base_url).hostname or "")
        return openai.AsyncOpenAI(
            api_key=self.key or "none",  # without one the client would take that of OPENAI_API_KEY
            base_url=self.judge.base_url,
            max_retries=self.judge.retries,
            timeout=self.judge.timeout,
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False,  # the key goes to the given host only
                trust_env=not on_this_machine,  # a proxy could not reach it
                event_hooks={"request": [self._wait_for_turn]},
            ),
        )

    async def _verdict(self, client: AsyncOpenAI, prompt: str, response: str) -> Verdict:
        """Judge one answer, unless the endpoint was given up."""
        if is_empty(response):
            return Verdict("degenerate", None, self.name, "empty")
        if self.given_up:
            return self._unscored(NO_ANSWER + self.given_up)
        try:
            content = await self._ask(client, self.judge._body(prompt, response))
        except _NoReplyError as error:
            self._count_failure(error)
            return self._unscored(NO_ANSWER + str(error))
        self.replies, self._failures_in_a_row = self.replies + 1, 0
        return self._read(content)

    async def _ask(self, client: AsyncOpenAI, body: dict[str, Any]) -> str | None:
        """Get the text of one chat completion, None if it was withheld."""
        import openai

        others = {name: value for name, value in body.items() if name not in ("model", "messages")}
        unsent = ["OpenAI-Organization", "OpenAI-Project", *["Authorization"] * (self.key is None)]
        try:
            async with asyncio.timeout(self._longest):
                reply = await client.chat.completions.with_raw_response.create(
                    model=body["model"],
                    messages=body["messages"],
                    extra_body=others,
                    extra_headers=dict.fromkeys(unsent, openai.Omit()),
                )
        except (openai.APITimeoutError, TimeoutError):
            raise _NoReplyError(
                f"no reply within {self.judge.timeout:g} s", concerns="endpoint"
            ) from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.OpenAIError as error:
            cause = type(error.__cause__ or error).__name__
            raise _NoReplyError(f"the connection failed ({cause})", concerns="endpoint") from None
        return _completion_text(reply.http_response.content)

    @property
    def _longest(self) -> float:
        """Seconds after which an answer is given up: a trickle would pass the client's timeout."""
        turns = self._gap * self.judge.concurrency
        return (self.judge.retries + 1) * (self.judge.timeout + LONGEST_WAIT + turns)

    def _refusal(self, error: APIStatusError) -> _NoReplyError:
        """Say what a status that is no success means, after the client's retries."""
        status = error.status_code
        if status in _FATAL or 300 <= status < 400:
            why = _FATAL.get(status, "the address redirects; give the one it leads to as base_url")
            return _NoReplyError(f"HTTP {status}, {why}", concerns="all")
        message = error.body.get("message") if isinstance(error.body, dict) else None
        why = f"HTTP {status} {self._clean(str(message or ''))}".rstrip()
        wait = _seconds(error.response.headers.get("Retry-After"))
        if wait > LONGEST_WAIT:
            return _NoReplyError(f"{why}, to be asked again after {wait:g} s", concerns="all")
        busy = status in (408, 409, 429) or status >= 500
        return _NoReplyError(why, concerns="endpoint" if busy else "answer")

    def _count_failure(self, error: _NoReplyError) -> None:
        """Give the endpoint up if a failure concerns all requests, or too many in a row failed."""
        if error.concerns == "answer":
            return
        self._failures_in_a_row += 1
        if error.concerns == "all":
            self.given_up = self.given_up or str(error)
        elif self._failures_in_a_row >= PATIENCE:
            self.given_up = self.given_up or (
                f"{PATIENCE} answers in a row without a reply, the last: {error}"
            )

    async def _wait_for_turn(self, _request: object) -> None:
        """Keep to the rate limit before each request, retries included."""
        now = time.monotonic()
        turn = max(now, self._next_turn)
        self._next_turn = turn + self._gap
        await asyncio.sleep(turn - now)

    def _read(self, content: str | None) -> Verdict:
        """Read the verdict in the model's reply; unscored if there is none."""
        if content is None:
            return self._unscored("the judge gave no text")
        rubric = self.judge._rubric
        reading = rubric.read(content)
        if reading is None:
            return self._unscored(f"unparsable: {self._clean(content)!r}")
        word, reason = reading
        label, score = rubric.answers[word]
        reason = f"{word}: {self._clean(reason)}" if reason else word
        framing = word if word in FRAMINGS else None
        return Verdict(label, score, self.name, reason, framing)

    def _clean(self, text: str) -> str:
        """Make one short printable line of a text from outside.

        The key is blanked even where the endpoint sends it back.
        """
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:200]

    def _unscored(self, reason: str) -> Verdict:
        return Verdict("unscored", None, self.name, reason)


def _completion_text(reply: bytes) -> str | None:
    """Take the text out of a chat completion; None if the endpoint withheld it."""
    try:
        choice = json.loads(reply)["choices"][0]
        content = choice["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _NoReplyError("the reply is not a chat completion", concerns="endpoint") from None
    if content is None or choice.get("finish_reason") == "content_filter":
        return None
    if not isinstance(content, str):
        raise _NoReplyError("the reply is not a chat completion", concerns="endpoint")
    return content


def _seconds(retry_after: str | None) -> float:
    """Read the seconds of a Retry-After header; 0 where it holds no number."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def _checked_host(base_url: str) -> str:
    """Give the host of an address, which must be one of http or https without a secret in it."""
    try:
        url = urlsplit(base_url)
        _ = url.port  # raises where it is no port
    except ValueError as error:
        raise ValueError(f"base_url is not an address ({error}).") from None
    if (
        url.scheme not in ("http", "https")
        or not url.hostname
        or url.query
        or url.fragment
        or "@" in url.netloc
        or not base_url.isprintable()
        or " " in base_url
    ):
        raise ValueError(
            "base_url must be http(s)://HOST/PATH without user, password or query; "
            "the key comes from key_env."
        )
    return url.hostname


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
