"""How much of what passes a site a given range would cut off, counted while an observer finds a range of its own.

One walk over images answers both questions: what range would these give, and how well would the range that others gave
serve them. The counts are exact, whatever the batches, and memory does not grow with the number of images.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from calibrators.observers import Observer
from calibrators.plan import QParams

__all__ = ["CutOff", "reach"]

Reach = tuple[float, float]
"""Lowest and highest value that a format does not cut off."""


class CutOff:
    """An observer that leaves the range to `observer` and counts what lies beyond each of `reaches`.

    Args:
        observer: Finds the range of what passes.
        reaches: What is not cut off, by a name that the caller chooses.
    """

    def __init__(self, observer: Observer, reaches: Mapping[str, Reach]) -> None:
        self._observer, self._reaches = observer, reaches
        self._beyond = dict.fromkeys(reaches, 0)
        self._seen = 0

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor Inf has been seen."""
        return self._observer.finite

    def update(self, values: torch.Tensor) -> None:
        """Take in one batch."""
        self._observer.update(values)
        values = values.detach().float()
        self._seen += values.numel()
        for name, (low, high) in self._reaches.items():
            self._beyond[name] += int(((values < low) | (values > high)).sum())

    def merge(self, other: Observer) -> None:
        """Take in another one with the same reaches."""
        assert isinstance(other, CutOff)
        assert self._reaches == other._reaches
        self._observer.merge(other._observer)
        self._seen += other._seen
        for name in self._beyond:
            self._beyond[name] += other._beyond[name]

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The observer's range."""
        return self._observer.range()

    def shares(self) -> dict[str, float]:
        """The share of the values that each reach cuts off, 0 to 1."""
        return {name: beyond / self._seen for name, beyond in self._beyond.items()}


def reach(qparams: QParams) -> Reach:
    """The ends beyond which a value is cut off: further than rounding moves any, half a step, past the last code.

    Args:
        qparams: An activation's: one scale for the whole tensor.
    """
    codes, scale, zero = qparams.codes, float(qparams.scale), float(qparams.zero_point)
    step = 1.0 if codes.mantissa is None else 2.0 ** (math.floor(math.log2(codes.high)) - codes.mantissa)
    return (codes.low - zero - step / 2) * scale, (codes.high - zero + step / 2) * scale
