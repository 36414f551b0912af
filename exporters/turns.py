"""Calls timed in turn, so that whatever else the machine does falls on all of them."""

import time
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["seconds_in_turn"]

_FEWEST = 5  # rounds, however long one takes


def seconds_in_turn(
    calls: Sequence[Callable[[], object]], *, rounds: int | None = None, seconds: float = 0.0, warm_up: int = 3
) -> np.ndarray:
    """Seconds that each call took, (rounds, calls), after a warm-up; every other round goes backwards.

    Args:
        calls: What is timed; a round is one of each.
        rounds: How many; if None, as many as fit `seconds`, and no fewer than 5.
        seconds: How long, where `rounds` does not say.
        warm_up: Rounds before these, which do not count.
    """
    for _ in range(warm_up):
        for call in calls:
            call()
    found: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(found) < (_FEWEST if rounds is None else rounds) or (rounds is None and time.perf_counter() < end):
        took = [0.0] * len(calls)
        order = range(len(calls)) if len(found) % 2 == 0 else reversed(range(len(calls)))
        for which in order:
            start = time.perf_counter()
            calls[which]()
            took[which] = time.perf_counter() - start
        found.append(took)
    return np.asarray(found, np.float64)
