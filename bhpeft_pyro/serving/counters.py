"""What a service counts, for Prometheus: `GET /metrics`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .feedback import Seen
from .rounds import Row

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        count = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self.requests = count(
            "bhpeft_requests", "Requests, by path and HTTP status", ["path", "status"]
        )
        self.seconds = histogram(
            "bhpeft_request_seconds", "From a request to its answer", ["path"], buckets=_SECONDS
        )
        self.running = gauge("bhpeft_requests_running", "Requests being read, queued or answered")
        self.batch_texts = histogram(
            "bhpeft_batch_texts", "Texts predicted together", buckets=_TEXTS
        )
        self.batch_seconds = histogram(
            "bhpeft_batch_seconds", "Of predicting a batch", buckets=_SECONDS
        )
        self.tokens = count("bhpeft_tokens", "Tokens that were predicted, padded")
        self.texts = count(
            "bhpeft_texts",
            "Texts, by round, main reason to doubt, and whether answered under the promise",
            ["round", "reason", "answered"],
        )
        self.exchanges = count("bhpeft_exchanges", "Rounds exchanged, by the new one", ["round"])
        self.labels = gauge(
            "bhpeft_feedback",
            "Labels of the round that came back; answered and wrong ones are of texts at random",
            ["what"],
        )
        self.holds = gauge(
            "bhpeft_promise_holds",
            "0 if labels or texts speak against the promise; NaN if there is none",
        )

    def feedback(self, seen: Seen) -> None:
        """Note what labels say."""
        for what in ("labels", "answered", "wrong"):
            self.labels.labels(what).set(seen.tally.plain[what])
        self.holds.set(math.nan if seen.holds is None else float(seen.holds))

    def batch(self, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch; the engine's thread calls it."""
        self.batch_texts.observe(texts)
        self.batch_seconds.observe(seconds)
        self.tokens.inc(tokens)

    def answers(self, round: str, rows: Iterable[Row]) -> None:
        """Count answers."""
        for row in rows:
            answered = row.get("answered")
            named = "unknown" if answered is None else "yes" if answered else "no"
            self.texts.labels(round, row["reason"] or "none", named).inc()

    def text(self) -> bytes:
        """All counters as Prometheus reads them."""
        return generate_latest(self._registry)
