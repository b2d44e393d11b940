"""A chat endpoint on the loopback that answers as a test plans it, or fails as endpoints do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(content: object, **choice: object) -> bytes:
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}
    ).encode()


def says(word: str, reason: str = "because") -> bytes:
    return completion(json.dumps({"reason": reason, "verdict": word}))


class Endpoint:
    """A server that does with each answer what its plan says, try after try.

    The last item of a plan stays. A plan's item is a body (sent with 200),
    (status, headers, body), or the name of a failure.
    """

    def __init__(self) -> None:
        self.plans: dict[str, list[Any]] = {}
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.now = self.most = 0
        self.hold = threading.Event()
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        # Clients that hang up are part of the test.
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = json.loads(request["messages"][1]["content"])["answer"]
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.times.append(time.monotonic())
            self.requests.append(request)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            attempt = self.asked[text]
            self.asked[text] += 1
        try:
            plan = self.plans.get(text) or [says("unsafe" if "bad" in text else "safe")]
            self.act(handler, plan[min(attempt, len(plan) - 1)])
        finally:
            with self.lock:
                self.now -= 1

    def act(self, handler: BaseHTTPRequestHandler, what: Any) -> None:
        if what == "echo":
            what = says("safe", f"you sent {handler.headers['authorization']}")
        if what == "wait":
            time.sleep(0.03)
            what = says("safe")
        if what == "hold":
            self.hold.wait(20)
            what = says("safe")
        if what == "slow":
            time.sleep(1.2)
            what = says("unsafe")  # comes too late to count
        if what == "cut before":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        if what in ("cut in the middle", "trickle"):
            handler.send_response(200)
            handler.send_header("Content-Length", "500")
            handler.end_headers()
            for byte in says("unsafe")[:20]:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.05 if what == "trickle" else 0)
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, body = what if isinstance(what, tuple) else (200, {}, what)
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
