"""What the service says of itself to Prometheus."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from .watch import Watch

CONTENT_TYPE = CONTENT_TYPE_LATEST
RATE_SECONDS = 60.0
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics(Watch):
    """Counters of one service, in a registry of their own. They may be told from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("cascade_requests_total", "HTTP requests", ["route", "status"], registry=self.registry)
        self._request_seconds = Histogram(
            "cascade_request_seconds",
            "From request to answer",
            ["route"],
            buckets=_LONG_SECONDS,
            registry=self.registry,
        )
        self._picture_seconds = Histogram(
            "cascade_picture_seconds",
            "Time of a finished picture by part: queue, encoders, stage_c, stage_b, stage_a",
            ["part"],
            buckets=_LONG_SECONDS,
            registry=self.registry,
        )
        self._pictures = Counter(
            "cascade_pictures_total",
            "Pictures by what became of them: finished, cancelled, late, failed",
            ["model", "outcome"],
            registry=self.registry,
        )
        self._load = Gauge("cascade_pictures_in_work", "Pictures that wait or are drawn", registry=self.registry)
        self._queue = Gauge("cascade_pictures_waiting", "Pictures whose loops have not begun", registry=self.registry)
        self._rows = Histogram(
            "cascade_call_rows", "Rows of an engine call", ["engine"], buckets=ROWS, registry=self.registry
        )
        self._call_seconds = Histogram(
            "cascade_call_seconds", "Time of an engine call", ["engine"], buckets=CALL_SECONDS, registry=self.registry
        )
        self._ready = Gauge("cascade_ready", "1 while the service takes requests", registry=self.registry)
        rate = Gauge(
            "cascade_pictures_per_second", "Finished pictures of the last minute, a second", registry=self.registry
        )
        rate.set_function(self.pictures_per_second)
        self._ends: deque[float] = deque()

    @contextmanager
    def call(self, engine: str, rows: int) -> Iterator[None]:
        """Note an engine call."""
        started = time.perf_counter()
        yield
        self._call_seconds.labels(engine).observe(time.perf_counter() - started)
        self._rows.labels(engine).observe(rows)

    def taken(self, pictures: int) -> None:
        """Note pictures that were taken on, and wait."""
        self._load.inc(pictures)
        self._queue.inc(pictures)

    def begun(self) -> None:
        """Note that a picture waits no longer."""
        self._queue.dec()

    def ready(self, is_ready: bool) -> None:
        """Note whether requests are taken."""
        self._ready.set(float(is_ready))

    def ended(self, model: str, outcome: str, has_begun: bool, seconds: Mapping[str, float]) -> None:
        """Note what became of a picture."""
        self._load.dec()
        if not has_begun:
            self._queue.dec()
        self._pictures.labels(model, outcome).inc()
        if outcome == "finished":
            for part, passed in seconds.items():
                self._picture_seconds.labels(part).observe(passed)
            now = time.monotonic()
            self._ends.append(now)
            while now - self._ends[0] > RATE_SECONDS:
                self._ends.popleft()

    def pictures_per_second(self) -> float:
        """Finished pictures of the last minute, a second."""
        now = time.monotonic()
        return sum(now - end <= RATE_SECONDS for end in list(self._ends)) / RATE_SECONDS

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Note an HTTP answer."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
