"""What comparisons are told in: shares with their intervals, and the SQNR."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["Share", "cosine", "sqnr_db", "sqnr_of", "without_nan"]

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A percentage of `n` images, or a mean share of them, with its 95 % interval."""

    percent: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: np.ndarray) -> "Share":
        """The mean of values from 0 to 1, one per image, (n,) or, where the images were looked at k times, (k, n).

        Looking again adds no images: the interval stays that of n. Where all values are 0 or 1 it is Wilson's, else
        Student's; one image alone leaves everything open.
        """
        values = hits.astype(np.float64)
        n, share = values.shape[-1], float(values.mean())
        low, high = 0.0, 1.0
        if np.isin(values, (0.0, 1.0)).all():
            interval = stats.binomtest(round(share * n), n).proportion_ci(_CONFIDENCE, method="wilson")
            low, high = float(interval.low), float(interval.high)
        elif n > 1:
            spread = float(stats.sem(values.reshape(-1, n).mean(0)) * stats.t.ppf(0.5 + _CONFIDENCE / 2, n - 1))
            low, high = max(0.0, share - spread), min(1.0, share + spread)
        percent, low, high = (round(100 * v, 3) for v in (share, low, high))
        return cls(percent, low, high, n)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of vectors along the last axis; 1 of two that are equal, be they zero."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where((a == b).all(-1), 1.0, (a * b).sum(-1) / np.maximum(lengths, 1e-30))


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
