"""Two that looked at the same images: the difference in points, its interval, and what n images can show.

A check, a simulation and the gate tell a drop by it. Only images on which the two differ say anything about the
difference, so everything follows from two counts. Knows nothing of models.

Source: the interval is Tango's score interval for a paired difference, Statistics in Medicine 17 (1998); it holds where
few images differ, and where none does it is not empty: ten images that agree leave 28 points open. It excludes 0
exactly where McNemar's test without correction rejects. The power is Connor's, Biometrics 43 (1987).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

__all__ = ["Paired", "images_for_share", "share_interval"]

_CONFIDENCE = 0.95
_POWER = 0.8
_Z = float(stats.norm.ppf(0.5 + _CONFIDENCE / 2))
_Z_POWER = float(stats.norm.ppf(_POWER))
_EDGE = 1e-12
_MOST = 1_000_000  # images; past that a rate is at its limit

Interval = tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """How often only one of two was right, of `n` images; shares of an image occur where n is imagined.

    Attributes:
        n: Number of images.
        lost: Images on which the first was right and the second was not.
        gained: The other way round.
    """

    n: int
    lost: float
    gained: float

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray) -> "Paired":
        """The counts of two boolean arrays (n,)."""
        return cls(len(first), float((first & ~second).sum()), float((second & ~first).sum()))

    @property
    def points(self) -> float:
        """Percentage points that the second loses against the first."""
        return 100.0 * (self.lost - self.gained) / self.n if self.n else 0.0

    @property
    def interval(self) -> Interval:
        """The 95 % interval of `points`."""
        if not self.n:
            return -100.0, 100.0
        value = self.points / 100.0
        low, high = -1.0, 1.0
        if value > -1.0 + _EDGE:
            low = optimize.brentq(lambda delta: self._score(delta) - _Z, -1.0 + _EDGE, value)
        if value < 1.0 - _EDGE:
            high = optimize.brentq(lambda delta: self._score(delta) + _Z, value, 1.0 - _EDGE)
        return 100.0 * low, 100.0 * high

    @property
    def drop(self) -> tuple[float, float, float]:
        """`points` and the ends of their interval, to three digits."""
        value, low, high = (round(number, 3) for number in (self.points, *self.interval))
        return value, low, high

    @property
    def p_value(self) -> float:
        """McNemar's exact test: how likely so uneven counts are where nothing is lost or gained."""
        differ = round(self.lost + self.gained)
        return float(stats.binomtest(round(self.lost), differ).pvalue) if differ else 1.0

    @property
    def smallest_detectable(self) -> float:
        """Points that would have to be lost for these images to show it, at 5 %, two-sided, with 80 % power.

        Images that differ are as frequent as they were found to be, half an image more on either side; 100 where no
        loss could be seen.
        """
        differ = (self.lost + self.gained + 1) / (self.n + 1)

        def beyond(delta: float) -> float:
            share = max(differ, delta)
            return math.sqrt(self.n) * delta - _Z * math.sqrt(share) - _Z_POWER * math.sqrt(share - delta**2)

        return 100.0 * float(optimize.brentq(beyond, 0.0, 1.0)) if beyond(1.0) > 0 else 100.0

    def images_for(self, decided: Callable[[Interval], bool]) -> int | None:
        """The fewest images whose interval would decide, were they like these; None where a million would not."""

        def enough(n: int) -> bool:
            lost, gained = ((count + 0.5) / (self.n + 1) for count in (self.lost, self.gained))
            return decided(Paired(n, n * lost, n * gained).interval)

        return _fewest(enough, self.n)

    def _score(self, delta: float) -> float:
        """How many standard errors the counts are from a difference of `delta`."""
        away = self.lost - self.gained - self.n * delta
        if abs(away) < self.n * _EDGE:
            return 0.0
        linear = (2 * self.n - self.lost + self.gained) * delta - self.lost - self.gained
        gained = math.sqrt(max(0.0, linear**2 + 8 * self.n * self.gained * delta * (1 - delta))) - linear
        variance = 2 * gained / (4 * self.n) + delta * (1 - delta)
        return away / math.sqrt(self.n * max(variance, _EDGE))


def share_interval(share: float, n: int) -> Interval:
    """The 95 % Wilson interval of a share of `n` images, in percent."""
    centre = share + _Z**2 / (2 * n)
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return tuple(100.0 * (centre + sign * spread) / (1 + _Z**2 / n) for sign in (-1, 1))  # type: ignore[return-value]


def images_for_share(percent: float, n: int, decided: Callable[[Interval], bool]) -> int | None:
    """The fewest images that would decide on a share, found to be `percent` on `n`; None where a million would not."""
    share = (percent / 100.0 * n + 0.5) / (n + 1)
    return _fewest(lambda more: decided(share_interval(share, more)), n)


def _fewest(enough: Callable[[int], bool], n: int) -> int | None:
    """The smallest number above `n` that is enough, to two digits, upwards."""
    high = n + 1
    while not enough(high):
        high *= 2
        if high > _MOST:
            return None
    low = max(n, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    digit = int(10 ** max(0, len(str(high)) - 2))
    return -(-high // digit) * digit
