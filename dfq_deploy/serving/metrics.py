"""What the server counts and times, for Prometheus to fetch, and for its last line.

Each server has a registry of its own: two in one process do not count together.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

__all__ = ["CONTENT_TYPE", "Meters", "Told"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = tuple(2**power for power in range(11))


class Told:
    """The status that a request was answered with; whoever answers sets it."""

    status = 500


class Meters:
    """Counters and clocks of one server.

    Args:
        inside: How many requests wait or are computed at this moment.
    """

    def __init__(self, inside: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        here = self._registry
        self._requests = Counter("dfq_requests", "Inference requests answered", ["model", "status"], registry=here)
        self._images = Counter("dfq_images", "Images that the engine computed", registry=here)
        self._batches = Histogram("dfq_batch_images", "Images in a call", buckets=_BATCHES, registry=here)
        self._seconds = self._clock("dfq_request_seconds", "From a request's headers to its answer")
        self._engine = self._clock("dfq_engine_seconds", "Time of a call of the engine")
        self._waited = self._clock("dfq_wait_seconds", "From a parsed request to its call")
        Gauge("dfq_inside", "Requests that wait or are computed", registry=here).set_function(inside)
        self.answered = self.refused = 0

    def _clock(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_SECONDS, registry=self._registry)

    def called(self, images: int, seconds: float, waited: list[float]) -> None:
        """A call of the engine ended."""
        self._images.inc(images)
        self._batches.observe(images)
        self._engine.observe(seconds)
        for one in waited:
            self._waited.observe(one)

    @contextmanager
    def request(self, model: str) -> Iterator[Told]:
        """One request for `model`, from its headers to its answer."""
        told, start = Told(), time.perf_counter()
        try:
            yield told
        finally:
            self._requests.labels(model, told.status).inc()
            self._seconds.observe(time.perf_counter() - start)
            self.answered += told.status == 200
            self.refused += told.status != 200

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
