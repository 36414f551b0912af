"""The best range of a number format for counted values: the one of least squared error, or of least divergence.

A search tries shares of the extreme values, geometrically spaced, as ends of the range. Formats with one scale for
both signs get the same share at both ends; for asymmetric ones a coarse grid of pairs is refined, end by end. What a
candidate is worth is computed with `choose_qparams` and `fake_quantize` themselves, so that the range found means in a
plan exactly what it meant here. No torch.
"""

import math
from collections.abc import Callable

import numpy as np

from calibrators.affine import Codes, choose_qparams, fake_quantize, quantize

__all__ = ["least_divergence", "least_squared_error"]

_HEADROOM = (1.0, 1.2)  # more costs real images more in rounding than it saves them in clipping
_SHARES = np.float32(1.03) ** np.arange(16, -101, -1, dtype=np.float32)  # 1.6 down to 0.05, through 1
_COARSE = 8  # one share in so many is tried for both ends of an asymmetric range


def least_squared_error(
    values: np.ndarray, counts: np.ndarray, ends: tuple[np.ndarray, np.ndarray], codes: Codes
) -> tuple[np.ndarray, np.ndarray]:
    """The range with the least mean squared error of rounding and clipping.

    The mean is over the values times each factor of `_HEADROOM`, since images that were not seen have activations
    beyond the largest seen.

    Args:
        values: Seen values (n,) float64, in ascending order.
        counts: How often, or with what weight, each was seen (n,).
        ends: The smallest and the largest value, which `values` may know less exactly.
        codes: The number format.
    """
    scaled = np.stack([factor * values for factor in _HEADROOM])

    def error(scale: np.ndarray, zero_point: np.ndarray) -> float:
        lost = fake_quantize(scaled, scale, zero_point, codes) - scaled
        return float((np.square(lost, out=lost) @ counts).sum())

    return _least(error, ends, codes, _SHARES)


def least_divergence(
    values: np.ndarray, counts: np.ndarray, ends: tuple[np.ndarray, np.ndarray], codes: Codes
) -> tuple[np.ndarray, np.ndarray]:
    """The range within the ends with the least Kullback-Leibler divergence of what codes can tell from what was seen.

    What was seen has the values beyond the range at its ends. Codes tell how many of the values within each of them
    got, and no more: these lie evenly on the values with that code. Where there is one scale for both signs, absolute
    values are compared. Arguments are those of `least_squared_error`.

    Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017. Bins belong to the code that they are rounded to, not
    to 128 equal runs of bins from 0 on; candidates are as for the squared error, not each bin; asymmetric formats have
    two ends.
    """
    if codes.signed:
        values, place = np.unique(np.abs(values), return_inverse=True)
        counts = np.bincount(place, counts)

    def divergence(scale: np.ndarray, zero_point: np.ndarray) -> float:
        within = np.abs(fake_quantize(values, scale, zero_point, codes) - values) <= 0.5001 * scale
        if not within.any():
            return math.inf
        first, last = np.flatnonzero(within)[[0, -1]]
        told = counts[first : last + 1]
        seen = told.copy()
        seen[0] += counts[:first].sum()
        seen[-1] += counts[last + 1 :].sum()
        code = (quantize(values[first : last + 1], scale, zero_point, codes) - codes.low).astype(np.int64)
        evenly = (np.bincount(code, told) / np.maximum(np.bincount(code), 1))[code]
        seen, evenly = seen / seen.sum(), evenly / evenly.sum()
        return float((seen * np.log(seen / evenly)).sum())

    return _least(divergence, ends, codes, _SHARES[_SHARES <= 1])


def _least(
    loss: Callable[[np.ndarray, np.ndarray], float],
    ends: tuple[np.ndarray, np.ndarray],
    codes: Codes,
    shares: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The range of least loss, which is a function of scale and zero-point; of equals the widest."""
    low, high = shares * np.minimum(ends[0], np.float32(0)), shares * np.maximum(ends[1], np.float32(0))

    def best(lows: np.ndarray, highs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = int(np.argmin([loss(*qparams) for qparams in zip(*choose_qparams(lows, highs, codes), strict=True)]))
        return lows[index], highs[index]

    if codes.signed:
        return best(low, high)
    # Zero-points are whole, so moving one end at a time gets stuck unless it begins near the best of all pairs.
    found = best(*(end.ravel() for end in np.meshgrid(low[::_COARSE], high[::_COARSE], indexing="ij")))
    found = best(low, np.full_like(low, found[1]))
    return best(np.full_like(high, found[0]), high)
