"""What comparisons are told in: shares with their intervals, and the SQNR."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["Share", "sqnr_db", "sqnr_of", "without_nan"]

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A percentage of `n` images with its 95 % Wilson interval."""

    percent: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: np.ndarray) -> "Share":
        """The share of true values in a boolean array, (n,) or, where the images were looked at k times, (k, n).

        Looking again adds no images: the interval stays that of n.
        """
        n, share = hits.shape[-1], float(hits.mean())
        interval = stats.binomtest(round(share * n), n).proportion_ci(_CONFIDENCE, method="wilson")
        percent, low, high = (round(100 * float(v), 3) for v in (share, interval.low, interval.high))
        return cls(percent, low, high, n)


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantization noise ratio of two powers, in dB; infinite where there is no noise."""
    return round(10 * (math.log10(max(signal, 1e-30)) - math.log10(noise)), 2) if noise else math.inf


def sqnr_of(wanted: np.ndarray, found: np.ndarray) -> float:
    """Signal to quantization noise ratio of `found`, in dB."""
    return sqnr_db(float(np.square(wanted).sum()), float(np.square(wanted - found).sum()))


def without_nan(value: Any) -> Any:
    """`value` as JSON has it: None for what is not finite."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
