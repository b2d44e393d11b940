"""The endpoint: OpenAI's paths, and who may use them.

Bodies are read by hand, so that no more than the limit is ever held, and only after the key was
checked. Every error is an error object of OpenAI's, of one line.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

try:
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the server needs FastAPI; install it with pip install 'workbench[serve]'."
    ) from error

from workbench.files.hints import one_line
from workbench.serve.answers import Heading, chunk, event, response, usage
from workbench.serve.catalogue import Catalogue
from workbench.serve.desk import Desk, Pending
from workbench.serve.errors import RequestError
from workbench.serve.requests import Settings, read_chat, read_completion

if TYPE_CHECKING:
    from workbench.generation.running import Asked
    from workbench.serve.prepare import Preparer

log = logging.getLogger(__name__)

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/steering",
    "/admin/reload",
    "/metrics",
    "/health",
)
"""Paths that are counted by name."""

DISCARDED = 2**24
"""Bytes over the limit that are still received and thrown away: who is answered while it sends may
see a broken connection in place of the answer."""

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


class Endpoint:
    """Answer requests for one model.

    Args:
        preparer: Turns requests into answers that are to be written.
        desk: Hands them to the model.
        read: Reads the run's steering again.
        key: What clients must know; None lets everyone in who reaches a loopback address.
    """

    def __init__(
        self, preparer: Preparer, desk: Desk, read: Callable[[], Catalogue], key: str | None
    ) -> None:
        self.preparer, self.desk, self.read = preparer, desk, read
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()
        self._one_thread = ThreadPoolExecutor(1, "workbench-encode")
        self._reloading = asyncio.Lock()
        self._since = int(time.time())

    def app(self) -> FastAPI:
        """Make the application."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        guarded = APIRouter(dependencies=[Depends(self._check_client)])
        routes: tuple[tuple[str, Any, str], ...] = (
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{name:path}", self.model, "GET"),
            ("/v1/steering", self.steering, "GET"),
            ("/admin/reload", self.reload, "POST"),
            ("/metrics", self.metrics, "GET"),
        )
        for path, handler, method in routes:
            guarded.add_api_route(path, handler, methods=[method], response_model=None)
        app.include_router(guarded)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_exception_handler(RequestError, _refuse)
        app.add_exception_handler(HTTPException, _refuse_http)
        app.add_exception_handler(Exception, _fail)
        app.add_middleware(_Counted, counter=self.desk.metrics.requests)
        return app

    @asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self.desk.open()
        try:
            yield
        finally:
            await asyncio.to_thread(self.desk.close)
            self._one_thread.shutdown(wait=False)

    async def _check_client(self, request: Request) -> None:
        """Let in who knows the key; without one, who asks for this machine by name.

        A web page can make a browser send requests to a loopback address, but under its own name.
        """
        if self._digest is not None:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(given.strip().encode()).digest()
            if kind.lower() != "bearer" or not hmac.compare_digest(digest, self._digest):
                raise RequestError(
                    401, "a valid key is needed: Authorization: Bearer KEY.", code="invalid_api_key"
                )
        elif request.url.hostname not in LOOPBACK:
            raise RequestError(
                403, "without a key this server answers to the name of this machine alone."
            )
        if request.url.path == "/admin/reload" and self._digest is None:
            raise RequestError(403, "this path needs a key; start the server with one.")

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        given = read_chat(await self._body(request))
        asked = await self._prepared(self.preparer.chat, given)
        return await self._answer(request, given, asked, is_chat=True)

    async def completions(self, request: Request) -> Response:
        """Go on from texts."""
        given = read_completion(await self._body(request))
        asked = await self._prepared(self.preparer.completion, given)
        return await self._answer(request, given, asked, is_chat=False)

    async def models(self) -> Response:
        """List the names of the model: with the run's steering, without, and by category."""
        listed = [self._named(name) for name in self.preparer.names]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, name: str) -> Response:
        """Tell of one name of the model."""
        self.preparer.choice(name, None)  # refuses an unknown one
        return JSONResponse(self._named(name))

    async def steering(self) -> Response:
        """List what a request may be steered with."""
        catalogue = self.preparer.catalogue
        return JSONResponse(
            {
                "default": catalogue.main,
                "vectors": catalogue.names,
                "categories": catalogue.categories,
                "gate": catalogue.gate is not None,
            }
        )

    async def reload(self) -> Response:
        """Read the run's vectors, settings and gate again; answers under way keep the old ones."""
        async with self._reloading:
            try:
                catalogue = await asyncio.to_thread(self.read)
                await asyncio.wrap_future(self.desk.engine.call(catalogue.check))
            except (ValueError, OSError, KeyError, TypeError) as error:
                raise RequestError(
                    409, f"nothing was reloaded, the old vectors stay: {one_line(error)}."
                ) from error
            self.preparer.catalogue = catalogue
        self.desk.metrics.reloads.inc()
        names = {"vectors": len(catalogue.names), "categories": catalogue.categories}
        return JSONResponse({"status": "reloaded", **names})

    async def health(self) -> Response:
        """Say whether answers can be written."""
        is_well = self.desk.engine.is_alive
        return JSONResponse({"status": "ok" if is_well else "down"}, 200 if is_well else 503)

    async def metrics(self) -> Response:
        """Give the counters to Prometheus."""
        page, kind = self.desk.metrics.page()
        return Response(page, headers={"content-type": kind})

    def _named(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._since, "owned_by": "workbench"}

    async def _body(self, request: Request) -> bytes:
        """Read a body of JSON, up to the limit."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "send JSON: Content-Type: application/json.")
        limits, body, size = self.preparer.limits, bytearray(), 0
        too_large = RequestError(413, f"a body has at most {limits.max_body} bytes here.")
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > limits.max_body + DISCARDED:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limits.max_body + DISCARDED:
                        raise too_large
                    if size <= limits.max_body:
                        body += part
        except TimeoutError as error:
            raise RequestError(408, "the body did not arrive in time.") from error
        if size > limits.max_body:
            raise too_large
        return bytes(body)

    async def _prepared(self, prepare: Callable[[Any], list[Asked]], given: Any) -> list[Asked]:
        """Encode in one thread of its own: tokenizers do not like several at once."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._one_thread, prepare, given)

    async def _answer(
        self, request: Request, given: Settings, asked: list[Asked], *, is_chat: bool
    ) -> Response:
        name = given.model or self.preparer.name
        heading = Heading.of(name, is_chat=is_chat, steering=self._in_words(given, asked))
        n_prompt = sum(len(one.encoded.ids) for one in asked if one.sample == 0)
        pending = self.desk.ask(asked, is_stream=given.stream)
        gone = _until_gone(request)
        if given.stream:
            wants_usage = given.stream_options is not None and given.stream_options.include_usage
            events = self._events(pending, heading, n_prompt if wants_usage else None, gone)
            return StreamingResponse(
                events,
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        if not await self.desk.whole(pending, gone):
            return Response(status_code=499)  # nobody reads it
        if pending.failed:
            raise _could_not()
        return JSONResponse(response(heading, pending.answers, n_prompt))

    async def _events(
        self,
        pending: Pending,
        heading: Heading,
        n_prompt: int | None,
        gone: Callable[[], Awaitable[None]],
    ) -> AsyncIterator[bytes]:
        """Write the events of a stream."""
        begun: set[int] = set()
        ended: set[int] = set()
        async for _ in self.desk.changes(pending, gone):
            if pending.failed:
                yield event(_could_not().body())
                return
            for i, answer in enumerate(pending.answers):
                if i in ended or not answer.tokens:
                    continue
                new = chunk(heading, i, answer, is_first=i not in begun)
                begun.add(i)
                if answer.has_ended:
                    ended.add(i)
                if new is not None:
                    yield event(new)
        if not pending.have_ended:
            return
        if n_prompt is not None:
            counted = usage(pending.answers, n_prompt)
            yield event(heading.object([], is_chunk=True, usage=counted))
        yield event("[DONE]")

    def _in_words(self, given: Settings, asked: list[Asked]) -> dict[str, Any]:
        """Say what a request is steered with."""
        if not asked[0].interventions:
            return {"steered": False}
        choice = self.preparer.choice(given.model, given.steering)
        named = {"category": choice.category, "rho": choice.rho, "scale": choice.scale}
        return {
            "steered": True,
            "vector": choice.vector or self.preparer.catalogue.main,
            **{name: value for name, value in named.items() if value is not None},
        }


class _Counted:
    """Counts responses by path and status."""

    def __init__(self, app: Any, counter: Any) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.counter.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


def _could_not() -> RequestError:
    return RequestError(
        500,
        "the model could not write this answer: its numbers left what can be held, or a pass "
        "failed; ask with less steering.",
        code="generation_failed",
    )


def _until_gone(request: Request) -> Callable[[], Awaitable[None]]:
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return gone


async def _refuse(_request: Request, error: Any) -> JSONResponse:
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}
    return JSONResponse(error.body(), error.status, headers=headers.get(error.status))


async def _refuse_http(_request: Request, error: Any) -> JSONResponse:
    said = {404: "no such path here.", 405: "this path takes another method."}
    message = said.get(error.status_code, "the request could not be read.")
    refused = RequestError(error.status_code, message)
    return JSONResponse(refused.body(), error.status_code, headers=error.headers)


async def _fail(_request: Request, _error: Any) -> JSONResponse:
    return JSONResponse(RequestError(500, "an error of the server's own; see its log.").body(), 500)
