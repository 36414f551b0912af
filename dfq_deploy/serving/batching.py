"""Requests wait here and go to the engine together: those that wait, up to the largest batch, make one call.

The first of a batch waits for others no longer than the delay; what came while the engine was busy goes at once. Images
keep the order they came in, and each request gets the rows that are its own. So many requests are taken in and no more:
whoever finds the house full is told when to come again. No HTTP here.
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from calibrators.errors import DeployError

__all__ = ["Batcher", "BatchingOptions", "FullError", "Watcher"]

_USUAL_S = 0.1  # of a call for each of its requests, before one was seen


class FullError(DeployError):
    """There is no place for another request.

    Attributes:
        again_s: Whole seconds after which one may be free.
    """

    def __init__(self, inside: int, again_s: int) -> None:
        self.again_s = again_s
        super().__init__(
            what="there is no room for this request.",
            why=f"{inside} are waiting or being computed.",
            fix=f"send it again in {again_s} s.",
        )


class Watcher(Protocol):
    """Who wants to know what the batcher does."""

    def called(self, images: int, seconds: float, waited: list[float]) -> None:
        """A call of the engine ended: its images, its time, and how long each request had waited for it."""
        ...


@dataclass(frozen=True)
class BatchingOptions:
    """How requests become batches.

    Attributes:
        largest: Most images of a call; no request has more.
        gather: Put requests that wait into one call.
        delay_s: How long the first waits for others.
        places: Most requests that are inside at a time.
    """

    largest: int
    gather: bool
    delay_s: float
    places: int


@dataclass(frozen=True)
class _Job:
    images: np.ndarray
    answer: asyncio.Future[np.ndarray]
    arrived: float


class Batcher:
    """Lets requests in, and calls the engine, in one thread.

    Args:
        call: Logits (N, classes) of images (N, C, H, W).
        options: How requests become batches.
        watcher: Told of each call.
    """

    def __init__(
        self, call: Callable[[np.ndarray], np.ndarray], options: BatchingOptions, watcher: Watcher | None = None
    ) -> None:
        self._call, self._options, self._watcher = call, options, watcher
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._inside, self._seconds = 0, _USUAL_S
        self._worker: asyncio.Task[None] | None = None
        self._open = False

    @property
    def inside(self) -> int:
        """Requests that were let in and have no answer yet."""
        return self._inside

    @property
    def open(self) -> bool:
        """Whether requests are let in, as far as there is room."""
        return self._open

    def start(self) -> None:
        """Begin to work, in the event loop that runs."""
        self._worker, self._open = asyncio.create_task(self._work()), True

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request while the block lasts.

        Raises:
            FullError: There is none, or the house is closed.
        """
        if not self._open or self._inside >= self._options.places:
            raise FullError(self._inside, max(1, math.ceil(self._inside * self._seconds)))
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes) of images (n, C, H, W); whoever calls holds a place, and n is at most the largest."""
        loop = asyncio.get_running_loop()
        job = _Job(images, loop.create_future(), loop.time())
        self._waiting.put_nowait(job)
        return await job.answer

    async def close(self) -> None:
        """Let nobody in, answer whoever is inside, and stop."""
        self._open = False
        if self._worker is not None:
            await self._waiting.join()
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._thread.shutdown()

    async def _work(self) -> None:
        held: _Job | None = None
        while True:
            batch = [held or await self._waiting.get()]
            held = None
            while held is None and (job := await self._next(batch)):
                if sum(len(j.images) for j in (*batch, job)) <= self._options.largest:
                    batch.append(job)
                else:
                    held = job
            await self._compute(batch)

    async def _next(self, batch: list[_Job]) -> _Job | None:
        """The request that waits longest, if it comes while `batch` waits for it."""
        room = self._options.largest - sum(len(job.images) for job in batch)
        if not self._options.gather or room <= 0:
            return None
        if not self._waiting.empty():
            return self._waiting.get_nowait()
        try:
            async with asyncio.timeout_at(batch[0].arrived + self._options.delay_s):
                return await self._waiting.get()
        except TimeoutError:
            return None

    async def _compute(self, batch: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        images = batch[0].images if len(batch) == 1 else np.concatenate([job.images for job in batch])
        try:
            logits = await loop.run_in_executor(self._thread, self._call, images)
            rows = np.split(logits, np.cumsum([len(job.images) for job in batch])[:-1])
            for job, own in zip(batch, rows, strict=True):
                if not job.answer.done():  # whoever waited may have been told to go
                    job.answer.set_result(own)
        except Exception as error:  # whatever the engine raises is for those who asked; the next batch may fare better
            for job in batch:
                if not job.answer.done():
                    job.answer.set_exception(error)
        finally:
            for _ in batch:
                self._waiting.task_done()
        seconds = loop.time() - start
        self._seconds = seconds / len(batch)
        if self._watcher is not None:
            self._watcher.called(len(images), seconds, [start - job.arrived for job in batch])
