"""Calls in turn: each round has one of each, the order alternates, and what is counted is what was called."""

from collections.abc import Callable

import numpy as np
import pytest

from exporters import turns
from exporters.turns import median_ratio, seconds_in_turn


class Clock:
    """Time that passes only while something is called."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order = ""

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """What takes `seconds` in turn, the last of them for ever."""
        left = list(seconds)

        def called() -> None:
            self.order += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return called


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(turns.time, "perf_counter", lambda: made.now)
    return made


def test_each_call_has_its_own_time_whatever_the_order(clock: Clock) -> None:
    times = seconds_in_turn([clock.call("a", 1.0), clock.call("b", 4.0)], rounds=3)
    np.testing.assert_array_equal(times, [[1, 4]] * 3)
    assert clock.order == "ababab" + "ab" + "ba" + "ab"


def test_a_slow_start_does_not_count(clock: Clock) -> None:
    times = seconds_in_turn([clock.call("a", 9.0, 8.0, 7.0, 1.0, 2.0)], rounds=2)
    np.testing.assert_array_equal(times, [[1], [2]])


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 6), (10.0, 6), (30.5, 11), (60.0, 20)])
def test_as_many_rounds_as_fit_and_no_fewer_than_six(clock: Clock, seconds: float, rounds: int) -> None:
    assert len(seconds_in_turn([clock.call("a", 1.0), clock.call("b", 2.0)], seconds=seconds)) == rounds


def test_no_more_rounds_than_asked_for_although_there_is_time(clock: Clock) -> None:
    assert len(seconds_in_turn([clock.call("a", 1.0)], seconds=100, most=7)) == 7
    assert len(seconds_in_turn([clock.call("a", 1.0)], rounds=9, most=7)) == 9


def test_one_round_is_one_round(clock: Clock) -> None:
    assert seconds_in_turn([clock.call("a", 1.0)], rounds=1, seconds=60).shape == (1, 1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_RESAMPLES", 300)
    random = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        times = random.lognormal(0, 0.5, (60, 2)) * [1.0, 1.5]
        ratio, low, high = median_ratio(times[:, 1], times[:, 0])
        held += low <= 1.5 <= high
        assert low <= ratio <= high
    assert 88 <= held <= 99
