"""What each stage of a run took: its time, and the most memory that the process held meanwhile.

Comes between the pipeline, which announces stages, and whoever watches. Memory is the resident set, libraries and files
that are read where they lie included; what a stage finds there counts as its own. Where a stage takes more than any
before, the kernel's high-water mark says how much; else it is looked at many times a second. Linux alone tells; what a
GPU holds is not in it.
"""

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from dfq_deploy.machine import memory_held
from dfq_deploy.watch import Watch

__all__ = ["Measured", "StageCost"]

_EVERY = 0.02  # seconds


class StageCost(NamedTuple):
    """What a stage took: seconds, and MiB at its peak; None where the system does not say."""

    seconds: float
    peak_mib: float | None


class Measured:
    """A watch that measures stages and passes on what it is told, as long as the block lasts."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._costs: dict[str, StageCost] = {}
        self._stage: str | None = None
        self._begun = 0.0
        self._highest = 0.0  # that the process ever held, when the stage began
        self._seen = 0.0  # since then
        self._lock = threading.Lock()  # or what was seen before a stage would count as its own
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Measured":
        if memory_held()[1]:
            self._looking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._looking.is_alive():
            self._looking.join()

    def stage(self, name: str, already_done: bool) -> None:
        """A stage begins, and the one before has ended; one that an earlier run did costs nothing."""
        self._costs = self.costs()
        self._stage = None if already_done else name
        self._begun = time.monotonic()
        with self._lock:
            self._seen, self._highest = memory_held()
        self._watch.stage(name, already_done)

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        """Passed on."""
        self._watch.progress(done, total, terms)

    def tell(self, text: str) -> None:
        """Passed on."""
        self._watch.tell(text)

    def costs(self) -> dict[str, StageCost]:
        """What each stage has taken so far, in their order."""
        costs = dict(self._costs)
        if self._stage is not None:
            now, highest = memory_held()
            peak = highest if highest > self._highest else max(self._seen, now)
            before = costs.get(self._stage, StageCost(0.0, None))  # a stage may come twice
            seconds = before.seconds + time.monotonic() - self._begun
            costs[self._stage] = StageCost(round(seconds, 2), round(max(peak, before.peak_mib or 0.0), 1) or None)
        return costs

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            with self._lock:
                self._seen = max(self._seen, memory_held()[0])
