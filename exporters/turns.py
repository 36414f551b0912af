"""Calls timed in turn, so that whatever else the machine does falls on all of them, and the ratio of their times."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["FEWEST_ROUNDS", "median_ratio", "seconds_in_turn"]

FEWEST_ROUNDS = 6  # however long one takes; fewer do not hold the median between their ends 95 % of the time
_RESAMPLES = 2000


def seconds_in_turn(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int | None = None,
    seconds: float = 0.0,
    most: float = math.inf,
    warm_up: int = 3,
) -> np.ndarray:
    """Seconds that each call took, (rounds, calls), after a warm-up; every other round goes backwards.

    Args:
        calls: What is timed; a round is one of each.
        rounds: How many; if None, as many as fit `seconds`, and no fewer than 6.
        seconds: How long, where `rounds` does not say.
        most: Rounds beyond which `seconds` are not used up.
        warm_up: Rounds before these, which do not count.
    """
    for _ in range(warm_up):
        for call in calls:
            call()
    found: list[list[float]] = []
    least, most = (FEWEST_ROUNDS, most) if rounds is None else (rounds, rounds)
    end = time.perf_counter() + seconds
    while len(found) < least or (len(found) < most and time.perf_counter() < end):
        took = [0.0] * len(calls)
        order = range(len(calls)) if len(found) % 2 == 0 else reversed(range(len(calls)))
        for which in order:
            start = time.perf_counter()
            calls[which]()
            took[which] = time.perf_counter() - start
        found.append(took)
    return np.asarray(found, np.float64)


def median_ratio(seconds: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """The median over rounds of `seconds` over `others`, both (rounds,), and its 95 % interval by bootstrap."""
    rounds, random = seconds / others, np.random.default_rng(0)
    medians = [np.median(random.choice(rounds, len(rounds))) for _ in range(_RESAMPLES)]
    low, high = np.percentile(medians, (2.5, 97.5)).tolist()
    return float(np.median(rounds)), low, high
