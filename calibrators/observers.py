"""Observers: what range of values passes a site, seen batch by batch.

Each holds a state whose size does not depend on the number of images, gives the same range however the images
are split into batches, and can be merged with another of its kind that saw other images.
"""

import math
from typing import Protocol

import numpy as np
import torch

from calibrators.errors import PlanError, RecipeError

__all__ = ["OBSERVERS", "MinMax", "Observer", "Percentile", "observer_named"]


class Observer(Protocol):
    """What watches one activation site."""

    def update(self, values: torch.Tensor) -> None:
        """Take in the values of one batch."""
        ...

    def merge(self, other: "Observer") -> None:
        """Take in all that another observer of the same kind has seen."""
        ...

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value to represent, float32, of one shape."""
        ...


class MinMax:
    """The smallest and largest value; with `axis`, one pair per index along it."""

    def __init__(self, axis: int | None = None) -> None:
        self._axis = axis
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None

    def update(self, values: torch.Tensor) -> None:
        """Take in one batch; NaN and Inf are kept and refused by `range`."""
        values = values.detach().float()
        if self._axis is None:
            self._widen(*values.aminmax())
        else:
            self._widen(*values.movedim(self._axis, 0).flatten(1).aminmax(dim=1))

    def merge(self, other: Observer) -> None:
        """Take in another MinMax."""
        assert isinstance(other, MinMax)
        if other._low is not None and other._high is not None:
            self._widen(other._low, other._high)

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """Minimum and maximum: scalars, or (n,) along `axis`.

        Raises:
            PlanError: Nothing was seen, or NaN or Inf was.
        """
        if self._low is None or self._high is None:
            raise _nothing_seen()
        return _finite(self._low.cpu().numpy()), _finite(self._high.cpu().numpy())

    def _widen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)


class Percentile:
    """The values below which all but a small share of them lie, on either side.

    A histogram over (-R, R) with R a power of two that doubles when a larger value comes, by adding up pairs of
    bins. All grids are therefore nested, and the result depends on the values alone, not on their order. It is
    exact to one bin, R / 4096, and never wider than the true minimum and maximum.
    """

    _BINS = 8192
    _SMALLEST = 2.0**-64  # that the first grid is made for; zeros alone must not make it coarse

    def __init__(self, percentile: float = 99.999) -> None:
        if not 50 < percentile <= 100:
            raise RecipeError(
                what=f"{percentile} is no usable percentile.",
                why="it is the share of values, in percent, that stays below the upper end of the range.",
                fix="pass --percentile between 50 and 100, such as 99.99.",
            )
        self._percentile = percentile
        self._minmax = MinMax()
        self._counts = torch.zeros(self._BINS, dtype=torch.float64)
        self._exponent: int | None = None  # R = 2 ** exponent

    def update(self, values: torch.Tensor) -> None:
        """Take in one batch."""
        values = values.detach().float()
        self._minmax.update(values)
        largest = float(values.abs().amax())
        if not math.isfinite(largest):
            return
        self._widen(math.frexp(max(largest, self._SMALLEST))[1])
        assert self._exponent is not None
        half = self._BINS / 2
        # Scaling by a power of two is exact; histc alone rounds values that lie near the edge of a bin.
        bins = (values * (half * 2.0**-self._exponent)).floor()
        for part in torch.split(bins.flatten(), 2**24):  # it counts in float32, too
            self._counts += torch.histc(part, self._BINS, -half, half).cpu()

    def merge(self, other: Observer) -> None:
        """Take in another Percentile."""
        assert isinstance(other, Percentile)
        self._minmax.merge(other._minmax)
        if other._exponent is not None:
            self._widen(other._exponent)
            other._widen(self._exponent or 0)
            self._counts += other._counts

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The two percentiles, scalars.

        Raises:
            PlanError: Nothing was seen, or NaN or Inf was.
        """
        low, high = self._minmax.range()
        if self._exponent is None:
            raise _nothing_seen()
        edges = np.linspace(-(2.0**self._exponent), 2.0**self._exponent, self._BINS + 1)
        counts = self._counts.numpy()
        allowed = counts.sum() * (1 - self._percentile / 100)
        # The first bin, from either side, up to which more than the allowed share has been counted.
        lower = edges[int(np.searchsorted(np.cumsum(counts), allowed, side="right"))]
        upper = edges[self._BINS - int(np.searchsorted(np.cumsum(counts[::-1]), allowed, side="right"))]
        return np.maximum(low, np.float32(lower)), np.minimum(high, np.float32(upper))

    def _widen(self, exponent: int) -> None:
        """Let the histogram reach 2 ** exponent; it never shrinks."""
        if self._exponent is None:
            self._exponent = exponent
        for _ in range(self._exponent, exponent):
            half = self._counts.reshape(-1, 2).sum(1)
            quarter = torch.zeros(self._BINS // 4, dtype=half.dtype)
            self._counts = torch.cat([quarter, half, quarter])
        self._exponent = max(self._exponent, exponent)


OBSERVERS = {"minmax": MinMax, "percentile": Percentile}


def observer_named(name: str, percentile: float) -> Observer:
    """A fresh activation observer; `percentile` matters to `percentile` only.

    Raises:
        RecipeError: There is no such observer, or the percentile is out of range.
    """
    if name == "percentile":
        return Percentile(percentile)
    if name == "minmax":
        return MinMax()
    raise RecipeError(
        what=f"there is no observer named `{name}`.",
        why=f"the observers are {', '.join(OBSERVERS)}.",
        fix="pass one of them with --observer.",
    )


def _finite(bound: np.ndarray) -> np.ndarray:
    if not np.isfinite(bound).all():
        raise PlanError(
            what="the values hold NaN or Inf.",
            why="the model puts it out for at least one of the images, or its weights hold it.",
            fix="check the checkpoint and the images; `dfq-deploy check` on the float model helps.",
        )
    return bound


def _nothing_seen() -> PlanError:
    return PlanError(
        what="no value has passed.",
        why="the model never used this place.",
        fix="leave the site out of the plan.",
    )
