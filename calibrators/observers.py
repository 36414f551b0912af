"""Observers: what range of values passes a site, seen batch by batch.

Each holds a state whose size does not depend on the number of images, gives the same range however the images
are split into batches, and can be merged with another of its kind that saw other images.
"""

import math
from typing import Protocol

import numpy as np
import torch

from calibrators.affine import Codes
from calibrators.errors import PlanError, RecipeError
from calibrators.range_search import least_divergence, least_squared_error

__all__ = ["OBSERVERS", "Entropy", "MinMax", "Observer", "Percentile", "SquaredError", "observer_named"]


class Observer(Protocol):
    """What watches one activation site."""

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor Inf has been seen."""
        ...

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

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor Inf has been seen; true before anything was."""
        return all(end is None or bool(end.isfinite().all()) for end in (self._low, self._high))

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


class Histogram:
    """Counts of what passes, on a grid that fits whatever comes: the base of observers that look beyond the extremes.

    A histogram over (-R, R) with R a power of two that doubles when a larger value comes, by adding up pairs of bins.
    All grids are therefore nested: the counts are exact, and depend on the values alone, not on their order, their
    batches or the shards that were merged. A bin is R / 4096 wide, R at most twice the largest absolute value.
    """

    _BINS = 8192
    _SMALLEST = 2.0**-64  # that the first grid is made for; zeros alone must not make it coarse
    _UNITS = 2.0**16  # what the largest weight counts as
    _PART = 2**22  # values counted at once, which bounds what counting takes

    def __init__(self, weight: torch.Tensor | None = None) -> None:
        """Nothing counted yet.

        Args:
            weight: How much each value counts, not negative, of a shape that broadcasts against a batch; all the same
                where it is None or 0. It is rounded to 1/65536 of its largest, so that 2 ** 37 values add up exactly.
        """
        weight = torch.ones(()).double() if weight is None or not weight.any() else weight.double()
        self._weight = (weight * (self._UNITS / weight.max())).round()
        self._minmax = MinMax()
        self._counts = torch.zeros(self._BINS, dtype=torch.float64)
        self._exponent: int | None = None  # R = 2 ** exponent

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor Inf has been seen."""
        return self._minmax.finite

    def update(self, values: torch.Tensor) -> None:
        """Take in one batch; none is counted any more once NaN or Inf was seen."""
        values = values.detach().float()
        self._minmax.update(values)
        if not self.finite:
            return
        low, high = map(float, self._minmax.range())
        self._widen(math.frexp(max(-low, high, self._SMALLEST))[1])
        assert self._exponent is not None
        half = self._BINS // 2
        for part in torch.split(values, max(1, self._PART * len(values) // values.numel())):
            bins = (part * (half * 2.0**-self._exponent)).floor().long() + half  # scaling by a power of two is exact
            weight = self._weight.to(part.device).expand_as(part)
            self._counts += torch.bincount(bins.flatten(), weight.flatten(), self._BINS).cpu()

    def merge(self, other: Observer) -> None:
        """Take in another of the same kind, with the same weight."""
        assert isinstance(other, type(self))
        assert torch.equal(self._weight, other._weight)
        self._minmax.merge(other._minmax)
        if other._exponent is not None:
            self._widen(other._exponent)
            other._widen(self._exponent or 0)
            self._counts += other._counts

    def _counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges of the bins, (n + 1,), and how much lies in each, (n,), both float64."""
        if self._exponent is None:
            raise _nothing_seen()
        reach = 2.0**self._exponent
        return np.linspace(-reach, reach, self._BINS + 1), self._counts.numpy()

    def _distribution(self) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """The bins that were hit: their middles (n,), how much lies in each (n,), and the true extremes."""
        ends = self._minmax.range()
        edges, counts = self._counted()
        hit = np.flatnonzero(counts)
        return np.clip((edges[hit] + edges[hit + 1]) / 2, *ends), counts[hit], ends

    def _widen(self, exponent: int) -> None:
        """Let the histogram reach 2 ** exponent; it never shrinks."""
        if self._exponent is None:
            self._exponent = exponent
        for _ in range(self._exponent, exponent):
            half = self._counts.reshape(-1, 2).sum(1)
            quarter = torch.zeros(self._BINS // 4, dtype=half.dtype)
            self._counts = torch.cat([quarter, half, quarter])
        self._exponent = max(self._exponent, exponent)


class Percentile(Histogram):
    """The values below which all but a small share of them lie, on either side.

    Exact to one bin, and never wider than the true minimum and maximum.
    """

    def __init__(self, percentile: float = 99.999) -> None:
        if not 50 < percentile <= 100:
            raise RecipeError(
                what=f"{percentile} is no usable percentile.",
                why="it is the share of values, in percent, that stays below the upper end of the range.",
                fix="pass --percentile between 50 and 100, such as 99.99.",
            )
        super().__init__()
        self._percentile = percentile

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The two percentiles, scalars.

        Raises:
            PlanError: Nothing was seen, or NaN or Inf was.
        """
        low, high = self._minmax.range()
        edges, counts = self._counted()
        allowed = counts.sum() * (1 - self._percentile / 100)
        # The first bin, from either side, up to which more than the allowed share has been counted.
        lower = edges[int(np.searchsorted(np.cumsum(counts), allowed, side="right"))]
        upper = edges[self._BINS - int(np.searchsorted(np.cumsum(counts[::-1]), allowed, side="right"))]
        return np.maximum(low, np.float32(lower)), np.minimum(high, np.float32(upper))


class Entropy(Histogram):
    """The range whose codes tell most about how values are distributed; see `least_divergence`.

    It is found from where values lie to one bin.
    """

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self._codes = codes

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The range of least Kullback-Leibler divergence, scalars.

        Raises:
            PlanError: Nothing was seen, or NaN or Inf was.
        """
        return least_divergence(*self._distribution(), self._codes)


class SquaredError(Histogram):
    """The range with the least mean squared error of rounding and clipping; see `least_squared_error`.

    Each value is taken for the middle of its bin. That shifts the root of the mean squared error of any range by half a
    bin at most, since a value's distance from its nearest code changes by no more than the value.

    With weights by `channel_weights` it is the squared error of the output of the layer that reads the values, as far
    as errors in different channels are independent.

    Source: the weights are the diagonal of WᵀW, the Hessian of a layer's squared output error with regard to its input;
    what the errors of two channels do to an output together, the rest of WᵀW, is left out. BRECQ (arXiv 2102.05426) and
    PTQ4ViT (arXiv 2111.12293) weight the errors of outputs by squared gradients of the model's loss, which takes
    backward passes; here all outputs count alike.
    """

    def __init__(self, codes: Codes, weight: torch.Tensor | None = None) -> None:
        super().__init__(weight)
        self._codes = codes

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The range of least error, scalars.

        Raises:
            PlanError: Nothing was seen, or NaN or Inf was.
        """
        return least_squared_error(*self._distribution(), self._codes)


OBSERVERS = ("minmax", "percentile", "entropy", "mse", "hessian")


def observer_named(name: str, percentile: float, codes: Codes | None, weight: torch.Tensor | None = None) -> Observer:
    """A fresh activation observer.

    Args:
        name: One of `OBSERVERS`; `hessian` is `mse` with weights.
        percentile: Matters to `percentile` only.
        codes: The format that values shall get, or None where they stay float; matters to those that search a range.
        weight: What an error counts, by channel; matters to `hessian` only.

    Raises:
        RecipeError: There is no such observer, the percentile is out of range, or no range can be searched for `codes`.
    """
    if name == "minmax":
        return MinMax()
    if name == "percentile":
        return Percentile(percentile)
    if name not in OBSERVERS:
        raise RecipeError(
            what=f"there is no observer named `{name}`.",
            why=f"the observers are {', '.join(OBSERVERS)}.",
            fix="pass one of them with --observer.",
        )
    if codes is None or (name == "entropy" and codes.mantissa is not None):
        raise RecipeError(
            what=f"the observer `{name}` has nothing to search.",
            why="the scheme leaves activations in float." if codes is None else f"{codes.name} has no even steps.",
            fix="pass --observer minmax, or another --scheme.",
        )
    return Entropy(codes) if name == "entropy" else SquaredError(codes, weight if name == "hessian" else None)


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
