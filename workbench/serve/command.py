"""Start the server from the command line, and stop it cleanly."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

LEAST_KEY = 16
"""Characters of a key, at least."""


def serve(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key_env: str = "WORKBENCH_API_KEY",
    key_file: str | None = None,
    name: str | None = None,
    calibrated: bool = False,
    max_tokens: int = 1024,
    max_prompt_tokens: int = 4096,
    max_body: int = 2**20,
    max_requests: int = 256,
    max_rows: int = 32,
    grace: float = 10.0,
) -> None:
    """Serve a run's steered model at an endpoint that OpenAI's clients know.

    Args:
        run: folder of a run
        host: address to listen at; beyond this machine a key is needed
        port: port to listen at; 0 takes a free one
        key_env: environment variable that holds the key; unset, and without --key-file, there is
            none
        key_file: file that holds the key
        name: what the model is called (default: the folder's name)
        calibrated: use the settings of a later 'workbench calibrate'
        max_tokens: tokens of an answer, at most
        max_prompt_tokens: tokens of a prompt, at most
        max_body: bytes of a request, at most
        max_requests: answers that are written or wait, at most
        max_rows: answers that are written at the same time, at most
        grace: seconds in which answers may end when the server is stopped
    """
    check_installed()
    key = read_key(key_env, key_file)
    check_address(host, key)
    listening = _listen(host, port)
    from workbench.serve.prepare import Limits

    limits = Limits(max_tokens, max_prompt_tokens, max_body, max_in_flight=max_requests)
    how: dict[str, Any] = {"key": key, "name": name, "calibrated": calibrated}
    app, called = app_of(run, limits=limits, rows=max_rows, **how)
    shown = f"[{host}]" if ":" in host else host
    where = f"http://{shown}:{listening.getsockname()[1]}/v1"
    sys.stderr.write(f"{called} is served at {where}; stop with Ctrl-C.\n")
    sys.stderr.flush()
    run_server(app, listening, grace_s=grace)


def check_installed() -> None:
    """Raise unless the server's libraries are there.

    Raises:
        RuntimeError: If one is missing.
    """
    from importlib.util import find_spec

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(module) is None:
            raise RuntimeError(
                f"the server needs {module}; install it with pip install 'workbench[serve]'."
            )


def read_key(variable: str, file: str | None) -> str | None:
    """Read the key from a file or an environment variable; None where neither is given.

    Raises:
        ValueError: If it is too short or holds white space.
    """
    from workbench.files.store import existing_file

    if file is not None:
        key = existing_file(file).read_text(encoding="utf-8").strip()
    else:
        key = os.environ.get(variable, "").strip()
        if not key:
            return None
    if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"a key has at least {LEAST_KEY} printable ASCII characters and no space; make one "
            "with python -c 'import secrets; print(secrets.token_urlsafe())'."
        )
    return key


def check_address(host: str, key: str | None) -> None:
    """Raise where anyone could reach the server and there is no key.

    Raises:
        ValueError: If the address is no loopback address and no key is given.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if key is None and not is_loopback:
        raise ValueError(
            f"{host} can be reached from other machines, and there is no key: set "
            "WORKBENCH_API_KEY, give --key-file, or listen at 127.0.0.1."
        )


def app_of(
    run: str,
    *,
    key: str | None,
    name: str | None = None,
    calibrated: bool = False,
    limits: Any = None,
    rows: int = 32,
    model: Any = None,
) -> tuple[Any, str]:
    """Load a run and its model, and make the application that serves them.

    Args:
        run: Folder of a run.
        key: What clients must know; None for a loopback address alone.
        name: What the model is called; None is the folder's name.
        calibrated: Take the settings of a later ``workbench calibrate``.
        limits: What one client may ask for (``prepare.Limits``).
        rows: Answers that are written at the same time, at most.
        model: A loaded model, instead of loading the run's.

    Returns:
        The application, and the name of the model.

    Raises:
        ValueError: If the folder holds no finished run, or its vectors are of another model.
    """
    from workbench.files.store import local_path
    from workbench.safesteer.config import config_from
    from workbench.safesteer.inputs import load_run_model
    from workbench.safesteer.run_folder import read_run
    from workbench.safesteer.saved_run import decoding_from
    from workbench.serve.app import Endpoint
    from workbench.serve.catalogue import Catalogue
    from workbench.serve.desk import Desk
    from workbench.serve.prepare import Limits, Preparer

    limits = limits or Limits()
    read = partial(Catalogue.read, run, calibrated=calibrated)
    catalogue, decoding = read(), decoding_from(run)
    if model is None:
        model = load_run_model(config_from(read_run(run).notes["config"]))
    catalogue.check(model)
    called = name or local_path(run).resolve().name
    desk = Desk(model, max_rows=rows, max_in_flight=limits.max_in_flight)
    preparer = Preparer(model, called, catalogue, decoding, limits)
    return Endpoint(preparer, desk, read, key).app(), called


def run_server(app: Any, listening: socket.socket, *, grace_s: float) -> None:
    """Serve until SIGINT or SIGTERM: no new connections, then the answers under way, then stop."""
    import uvicorn

    class Server(uvicorn.Server):
        """Ends by itself on a signal, where uvicorn would raise the signal once more."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            signals = (signal.SIGINT, signal.SIGTERM)
            before = {one: signal.signal(one, self.handle_exit) for one in signals}
            try:
                yield
            finally:
                for one, handler in before.items():
                    signal.signal(one, handler)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
    Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen at {host} port {port} ({error}); give another --host or --port."
        ) from error
