"""Count what the server does, for Prometheus; no words of a request are ever in a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.serve.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Hold the counters of one server, in a registry of its own.

    Args:
        engine: Its engine.
    """

    def __init__(self, engine: Engine) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        where: dict[str, Any] = {"registry": self.registry, "namespace": "workbench"}
        self.requests = Counter(
            "requests", "Requests by path and status.", ["path", "status"], **where
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts read.", **where)
        self.tokens = Counter("completion_tokens", "Tokens written.", **where)
        self.passes = Counter("passes", "Passes of the model that wrote these tokens.", **where)
        self.answers = Counter(
            "answers", "Answers by how they ended and were steered.", ["finish", "steered"], **where
        )
        self.cancelled = Counter("cancelled", "Answers whose client went away.", **where)
        self.reloads = Counter("reloads", "Times that the vectors were read again.", **where)
        self.first_token = Histogram(
            "first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            **where,
        )
        self.duration = Histogram(
            "request_seconds", "From a request to its whole answer.", buckets=_SECONDS, **where
        )
        running = Gauge("running", "Answers that are written now.", **where)
        waiting = Gauge("waiting", "Answers that wait for a row.", **where)
        running.set_function(lambda: engine.n_running)
        waiting.set_function(lambda: engine.n_waiting)

    def page(self) -> tuple[bytes, str]:
        """Give the page that Prometheus reads, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
