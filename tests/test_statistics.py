"""Intervals and powers against other ways to the same numbers, and the gate's verdicts against their definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calibrators.errors import RecipeError
from dfq_deploy.gating.checks import band_check, drop_check, exact_check, ratio_check, share_check, verdict_between
from dfq_deploy.gating.limits import GateLimits
from dfq_deploy.measures import Share
from dfq_deploy.statistics import Paired, images_for_share, share_interval

_COUNTS = st.integers(1, 2000).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda lost: st.tuples(st.just(n), st.just(lost), st.integers(0, n - lost)))
)


@given(_COUNTS)
def test_the_interval_is_tangos(counts: tuple[int, int, int]) -> None:
    """At either end the score statistic, here with the constrained maximum found by search, is 1.96."""
    n, lost, gained = counts
    pair = Paired(n, lost, gained)
    low, high = pair.interval
    assert -100 <= low <= pair.points <= high <= 100
    assert (low, high) == pytest.approx(tuple(-end for end in reversed(Paired(n, gained, lost).interval)), abs=1e-6)
    mcnemar = (lost - gained) / math.sqrt(lost + gained) if lost + gained else 0.0
    if abs(abs(mcnemar) - 1.959964) > 1e-6:  # it leaves 0 out exactly where McNemar's test rejects
        assert (low > 0 or high < 0) == (abs(mcnemar) > 1.959964)


@pytest.mark.parametrize("counts", [(44, 9, 2), (921, 12, 7), (50, 1, 0), (360, 0, 5)])
def test_at_the_ends_the_likelihood_is_as_unlikely_as_it_should_be(counts: tuple[int, int, int]) -> None:
    n, lost, gained = counts
    for end in Paired(n, lost, gained).interval:
        delta = end / 100
        shares = np.linspace(max(0.0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9, 2_000_001)  # of gained; lost is + delta
        likelihood = lost * np.log(shares + delta) + gained * np.log(shares)
        likelihood += (n - lost - gained) * np.log(1 - 2 * shares - delta)
        share = shares[likelihood.argmax()]
        score = (lost - gained - n * delta) / math.sqrt(n * (2 * share + delta - delta**2))
        assert abs(score) == pytest.approx(1.959964, abs=2e-3)


@pytest.mark.parametrize(("n", "open_points"), [(10, 27.75), (32, 10.72), (921, 0.4154)])
def test_images_that_all_agree_leave_something_open(n: int, open_points: float) -> None:
    assert Paired(n, 0, 0).interval == pytest.approx((-open_points, open_points), abs=5e-3)
    assert open_points == pytest.approx(100 * 1.959964**2 / (n + 1.959964**2), abs=5e-3)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        lost, gained, _rest = rng.multinomial(300, [0.03, 0.01, 0.96])
        low, high = Paired(300, float(lost), float(gained)).interval
        held += low <= 2.0 <= high
    assert stats.binomtest(held, 600, 0.95).pvalue > 1e-4


def test_the_smallest_detectable_drop_is_seen_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    pair = Paired(1500, 40, 35)
    drop, differ = pair.smallest_detectable / 100, (40 + 35 + 1) / 1501
    draws = rng.multinomial(1500, [(differ + drop) / 2, (differ - drop) / 2, 1 - differ], size=2000)
    seen = np.mean([stats.binomtest(int(a), int(a + b)).pvalue < 0.05 for a, b, _ in draws[:600]])
    score = np.mean(np.abs(draws[:, 0] - draws[:, 1]) / np.sqrt(draws[:, 0] + draws[:, 1]) > 1.959964)
    assert score == pytest.approx(0.8, abs=0.03)
    assert seen <= score + 0.03, "the exact test sees no more"


@given(_COUNTS)
def test_more_images_see_smaller_drops(counts: tuple[int, int, int]) -> None:
    n, lost, gained = counts
    few, many = Paired(n, lost, gained), Paired(4 * n, 4 * lost, 4 * gained)
    assert 0 < many.smallest_detectable <= few.smallest_detectable <= 100


def test_no_image_shows_nothing() -> None:
    none = Paired(0, 0, 0)
    assert (none.points, none.interval, none.smallest_detectable, none.p_value) == (0.0, (-100.0, 100.0), 100.0, 1.0)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_a_share_has_the_interval_of_scipy(counts: tuple[int, int]) -> None:
    n, hits = counts
    wanted = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert share_interval(hits / n, n) == pytest.approx((100 * wanted.low, 100 * wanted.high), abs=1e-6)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-1.5, 1.5), "pass"),
        ((-1.0, 1.6), "undecided"),
        ((-1.6, 1.0), "undecided"),
        ((-9.0, 9.0), "undecided"),
        ((1.6, 2.0), "fail"),
        ((-2.0, -1.6), "fail"),
    ],
)
def test_a_verdict_is_where_the_interval_is(interval: tuple[float, float], verdict: str) -> None:
    assert verdict_between(interval, -1.5, 1.5) == verdict


@pytest.mark.parametrize(
    ("counts", "verdict", "said"),
    [
        ((10, 0, 0), "undecided", "use at least 1600 images"),
        ((921, 3, 1), "pass", "+0.22 points lost against float (95 % interval -0.31 to 0.86"),
        ((921, 60, 5), "fail", "1.5 allowed"),
        ((921, 5, 60), "fail", "an improvement that nothing explains"),
        ((10, 0, 10), "fail", "an improvement that nothing explains"),
        ((100_000, 1500, 0), "undecided", "a million images would not decide"),
    ],
)
def test_a_drop_is_judged_both_ways(counts: tuple[int, int, int], verdict: str, said: str) -> None:
    check = drop_check("drop", Paired(*counts), 1.5, said="lost against float")
    assert check.verdict == verdict
    assert said in check.reason


def test_the_images_asked_for_decide() -> None:
    pair = Paired(100, 1, 0)
    wanted = pair.images_for(lambda ends: verdict_between(ends, -1.5, 1.5) != "undecided")
    assert wanted is not None
    lost, gained = 1.5 / 101 * wanted, 0.5 / 101 * wanted
    assert verdict_between(Paired(wanted, lost, gained).interval, -1.5, 1.5) == "pass"
    assert verdict_between(Paired(wanted // 2, lost / 2, gained / 2).interval, -1.5, 1.5) == "undecided"


@pytest.mark.parametrize(("hits", "n", "verdict"), [(10, 10, "undecided"), (32, 32, "pass"), (10, 32, "fail")])
def test_a_share_is_judged(hits: int, n: int, verdict: str) -> None:
    check = share_check("agreement", Share.of(np.arange(n) < hits), 80.0, said="it agrees")
    assert check.verdict == verdict
    assert ("use at least 26 images" in check.reason) == (verdict == "undecided")
    assert images_for_share(80.0, 1000, lambda ends: verdict_between(ends, 80.0, 100.0) != "undecided") is None


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ((1.0, 0.5, 3.0), "at least 40 images"),
        ((3.0, 1.0, 5.0), "at least 40 images"),
        ((1.0, 0.0, math.inf), "use more images"),
    ],
)
def test_a_distance_says_how_many_images_would_decide(ratio: tuple[float, float, float], said: str) -> None:
    assert said in ratio_check("engine_reference", ratio, 2.0, n=10, found=("undecided", "so far")).reason


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.9, 1.2), "pass"), ((1.2, 1.3), "undecided"), ((1.3, 1.4), "fail"), ((0.5, 0.7), "fail")],
)
def test_a_time_has_to_stay_in_its_band(interval: tuple[float, float], verdict: str) -> None:
    check = band_check("latency", (sum(interval) / 2, interval), 1.0, 25.0, say=lambda ratio: f"{ratio:.2f}")
    assert check.verdict == verdict
    assert ("an improvement; if it is meant" in check.reason) == (interval == (0.5, 0.7))
    assert ("quieter machine" in check.reason) == (verdict == "undecided")


def test_what_chance_has_no_part_in_is_counted() -> None:
    found = exact_check("plan", ["one", "two"], "none")
    assert (found.value, found.interval, found.verdict, found.reason) == (2.0, (2.0, 2.0), "fail", "one (2 in all)")


@pytest.mark.parametrize("wrong", [{"max_drop": 0.0}, {"min_agreement": 101.0}, {"size_band": math.inf}])
def test_a_limit_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="is no limit"):
        GateLimits(**wrong)
