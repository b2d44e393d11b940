"""One live server for the tests that do not change it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.servers import client_of, live_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def served(finished: Path, tiny: Any) -> Iterator[str]:
    """The address of a server of the tiny run, with a key."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(module, reason="the server comes with pip install 'workbench[serve]'")
    from workbench.serve.prepare import Limits

    limits = Limits(max_tokens=64, max_prompt_tokens=300, max_body=20_000)
    with live_server(finished, tiny, limits=limits) as url:
        yield url


@pytest.fixture
def client(served: str) -> Any:
    """OpenAI's client of that server."""
    return client_of(served)
