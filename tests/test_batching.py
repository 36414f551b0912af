"""Requests that wait together are computed together, and each gets the rows that are its own."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from dfq_deploy.serving.batching import Batcher, BatchingOptions, FullError

_OPTIONS = BatchingOptions(largest=8, gather=True, delay_s=0.0, places=100)


class Engine:
    """Doubles what it gets, once the gate is open; an image of -1 breaks the call."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.sizes.append(len(images))
        self.entered.set()
        assert self.gate.wait(20)
        if (images == -1).any():
            raise ValueError("-1")
        return 2 * images

    async def until_called(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 20)


def _images(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None]


def _with(
    engine: Callable[[np.ndarray], np.ndarray],
    play: Callable[[Batcher], Awaitable[None]],
    options: BatchingOptions = _OPTIONS,
) -> None:
    async def main() -> None:
        batcher = Batcher(engine, options)
        batcher.start()
        async with asyncio.timeout(30):
            await play(batcher)
            await batcher.close()

    asyncio.run(main())


async def _ask(batcher: Batcher, *values: float) -> list[float]:
    with batcher.place():
        found: list[float] = (await batcher(_images(*values)))[:, 0].tolist()
    return found


def test_what_waited_while_the_engine_was_busy_goes_together_in_order() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        engine.gate.clear()
        asked = [asyncio.create_task(_ask(batcher, 0))]
        await engine.until_called()
        asked += [asyncio.create_task(_ask(batcher, *values)) for values in ([1, 2, 3], [4], [5, 6, 7, 8], [9])]
        await asyncio.sleep(0)
        engine.gate.set()
        assert await asyncio.gather(*asked) == [[0], [2, 4, 6], [8], [10, 12, 14, 16], [18]]

    _with(engine, play)
    assert engine.sizes == [1, 8, 1], "as many as fit; the next waits, and nobody overtakes it"


def test_a_request_that_does_not_fit_waits_and_is_not_overtaken() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        engine.gate.clear()
        asked = [asyncio.create_task(_ask(batcher, 0))]
        await engine.until_called()
        asked += [asyncio.create_task(_ask(batcher, *([n] * n))) for n in (5, 6, 1)]
        await asyncio.sleep(0)
        engine.gate.set()
        assert await asyncio.gather(*asked) == [[0], [10] * 5, [12] * 6, [2]]

    _with(engine, play)
    assert engine.sizes == [1, 5, 7]


def test_the_first_waits_for_others_as_long_as_it_is_told() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        first = asyncio.create_task(_ask(batcher, 1))
        await asyncio.sleep(0.01)
        assert engine.sizes == []
        assert await asyncio.gather(first, _ask(batcher, *[2] * 7)) == [[2], [4] * 7]
        assert engine.sizes == [8], "a full batch waits no longer"

    _with(engine, play, BatchingOptions(largest=8, gather=True, delay_s=20, places=100))


def test_a_lone_request_goes_when_the_delay_is_over() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        assert await _ask(batcher, 1) == [2]

    _with(engine, play, BatchingOptions(largest=8, gather=True, delay_s=0.02, places=100))
    assert engine.sizes == [1]


def test_without_gathering_each_request_is_a_call_of_its_own() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        found = await asyncio.gather(*(_ask(batcher, n, n) for n in range(5)))
        assert found == [[2 * n, 2 * n] for n in range(5)]

    _with(engine, play, BatchingOptions(largest=8, gather=False, delay_s=20, places=100))
    assert engine.sizes == [2] * 5


def test_who_finds_no_place_is_told_when_to_come_again() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        engine.gate.clear()
        asked = [asyncio.create_task(_ask(batcher, n)) for n in range(3)]
        await engine.until_called()
        assert batcher.inside == 3
        with pytest.raises(FullError, match="no room") as full:
            await _ask(batcher, 3)
        assert full.value.again_s >= 1
        engine.gate.set()
        assert await asyncio.gather(*asked) == [[0], [2], [4]]
        assert batcher.inside == 0
        assert await _ask(batcher, 3) == [6]

    _with(engine, play, BatchingOptions(largest=8, gather=True, delay_s=0, places=3))


def test_a_call_that_fails_fails_for_its_own_requests_alone() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        broken = await asyncio.gather(*(_ask(batcher, n) for n in (1, -1)), return_exceptions=True)
        assert [str(error) for error in broken] == ["-1", "-1"]
        assert await _ask(batcher, 5) == [10]

    _with(engine, play, BatchingOptions(largest=8, gather=True, delay_s=0.01, places=100))


def test_closing_answers_whoever_is_inside_and_lets_nobody_in() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        engine.gate.clear()
        asked = [asyncio.create_task(_ask(batcher, n)) for n in range(20)]
        await engine.until_called()
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        assert not closing.done() and not batcher.open
        with pytest.raises(FullError):
            await _ask(batcher, 99)
        engine.gate.set()
        await closing
        assert await asyncio.gather(*asked) == [[2 * n] for n in range(20)]

    _with(engine, play)


def test_a_request_that_was_given_up_does_not_keep_others_from_their_answers() -> None:
    engine = Engine()

    async def play(batcher: Batcher) -> None:
        engine.gate.clear()
        asked = [asyncio.create_task(_ask(batcher, n)) for n in range(4)]
        await engine.until_called()
        asked[2].cancel()
        engine.gate.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [one for one in found if isinstance(one, list)] == [[0], [2], [6]]
        assert batcher.inside == 0

    _with(engine, play)


def test_a_crowd_gets_its_own_answers_whatever_the_sizes() -> None:
    rng, engine = np.random.default_rng(0), Engine()
    sizes = rng.integers(1, 9, 300).tolist()

    async def one(batcher: Batcher, which: int, size: int) -> None:
        await asyncio.sleep(float(rng.uniform(0, 0.05)))
        assert await _ask(batcher, *[which] * size) == [2 * which] * size

    async def play(batcher: Batcher) -> None:
        await asyncio.gather(*(one(batcher, which, size) for which, size in enumerate(sizes)))

    _with(engine, play, BatchingOptions(largest=8, gather=True, delay_s=0.001, places=300))
    assert sum(engine.sizes) == sum(sizes) and max(engine.sizes) <= 8
