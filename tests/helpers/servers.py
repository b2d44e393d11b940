"""A live server on a loopback port, in a thread, and clients of it."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "a-key-for-tests-0123456789"


@contextmanager
def live_server(run: Any, model: Any, *, key: str | None = KEY, **how: Any) -> Iterator[str]:
    """Serve a run with a loaded model; yield the address without a path."""
    import uvicorn

    from workbench.serve.command import app_of

    app, _ = app_of(str(run), key=key, name="tiny", model=model, **how)
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, lifespan="on")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def client_of(url: str, key: str = KEY) -> Any:
    """Give OpenAI's own client of a server."""
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=600)


def send(
    url: str, body: Any = None, *, key: str | None = KEY, method: str | None = None, **headers: str
) -> tuple[int, Any]:
    """Send bytes, or something as JSON; return the status and the body that came back."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)
    request.add_header("Content-Type", "application/json")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode()
