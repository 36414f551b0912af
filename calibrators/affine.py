"""The quantization formulas, for NumPy arrays and torch tensors alike.

The only place that chooses a scale, rounds or saturates. Rounding is to the nearest code, ties to the even
one, after a true division by the scale: what ONNX's QuantizeLinear does, so that a plan means the same in
torch, in NumPy and in an engine. Scales are float32, and so is everything else unless bounds come in float64.

Source: ONNX operators QuantizeLinear and DequantizeLinear, version 21; E4M3: Micikevicius et al., "FP8 Formats for
Deep Learning", arXiv 2209.05433.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (makes NumPy know int4 and float8_e4m3fn by name)
import numpy as np
from array_api_compat import array_namespace

__all__ = ["CODES", "Codes", "choose_qparams", "dequantize", "fake_quantize", "quantize"]


@dataclass(frozen=True)
class Codes:
    """A number format.

    Attributes:
        name: The name of its NumPy dtype, where it has one.
        low: Its smallest code.
        high: Its largest code.
        lowest: The code that the lower end of a range gets. INT8 leaves -128 unused, so that a weight and its negative
            have the same codes but for the sign; of INT4's few codes none is left unused.
        mantissa: Bits after the binary point where codes are floating-point numbers; None for others.
        per_octave: Codes per factor of two where they are even in the logarithm, from `low` to `high`; 0 for others.
    """

    name: str
    low: float
    high: int
    lowest: int
    mantissa: int | None = None
    per_octave: int = 0

    @property
    def integers(self) -> bool:
        """Whether codes are integers, a step apart."""
        return self.mantissa is None and not self.per_octave

    @property
    def signed(self) -> bool:
        """Whether codes below zero exist; signed formats are used symmetrically, with zero-point 0."""
        return self.low < 0

    @property
    def zero_dtype(self) -> str:
        """NumPy dtype of zero-points, as plans hold them."""
        return "int8" if self.signed else "uint8"


CODES = {
    codes.name: codes
    for codes in (
        Codes("int8", -128, 127, lowest=-127),
        Codes("uint8", 0, 255, lowest=0),
        Codes("int4", -8, 7, lowest=-8),
        Codes("uint4", 0, 15, lowest=0),
        Codes("int6", -32, 31, lowest=-32),
        Codes("uint6", 0, 63, lowest=0),
        Codes("log2_uint4", 2.0**-15, 1, lowest=0, per_octave=1),
        Codes("log2_uint6", 2.0**-31.5, 1, lowest=0, per_octave=2),
        Codes("float8_e4m3fn", -448, 448, lowest=-448, mantissa=3),
    )
}
_SMALLEST_NORMAL = 2.0**-6  # of E4M3; below it the grid is even


def choose_qparams(low: np.ndarray, high: np.ndarray, codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero-point (`codes.zero_dtype`) that cover the range from `low` to `high`.

    Signed: zero-point 0 and the smallest scale with which both ends fit, max(low / lowest, high / high code). Unsigned:
    asymmetric; the range is widened to hold 0, so that zero (padding, a ReLU's floor) is exact. A range that holds
    only 0 gets scale 1. Bounds in float64 are computed with as such and the scale is rounded once: 127 times a scale,
    which float32 cannot always hold, gives that scale again. Both results have the shape of `low`.
    """
    kind = np.result_type(low, high, np.float32)
    low = np.minimum(np.asarray(low, kind), kind.type(0))
    high = np.maximum(np.asarray(high, kind), kind.type(0))
    if codes.signed:
        steps = np.maximum(low / kind.type(codes.lowest), high / kind.type(codes.high))
    else:
        steps = (high - low) / kind.type(codes.high - codes.lowest)
    scale = steps.astype(np.float32)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))
    if codes.signed:
        return scale, np.zeros(scale.shape, codes.zero_dtype)
    zero_point = np.clip(np.rint(codes.lowest - low / scale), codes.lowest, codes.high)
    return scale, np.asarray(zero_point, codes.zero_dtype)


def quantize(values: Any, scale: Any, zero_point: Any, codes: Codes) -> Any:
    """Codes of `values` as floats of the same shape: clip(round(values / scale) + zero_point, low, high).

    `scale` and `zero_point` must broadcast against `values`; see `QParams.along` in `calibrators.plan`.
    """
    xp = array_namespace(values)
    steps = xp.asarray(values / scale)
    if codes.per_octave:
        exponents = xp.log2(xp.clip(steps, codes.low, codes.high))
        return xp.exp2(xp.round(exponents * codes.per_octave) / codes.per_octave)
    if codes.mantissa is not None:
        steps = xp.clip(steps, codes.low, codes.high)
        binade = xp.floor(xp.log2(xp.clip(xp.abs(steps), _SMALLEST_NORMAL, None)))
        spacing = 2.0 ** (binade - codes.mantissa)
        return xp.round(steps / spacing) * spacing
    # In place: a pass over a large activation costs less than the memory for another one. Gradients need each step.
    free = None if getattr(steps, "requires_grad", False) else steps
    rounded = xp.round(steps, out=free)
    rounded += zero_point
    return xp.clip(rounded, codes.low, codes.high, out=free)


def dequantize(quantized: Any, scale: Any, zero_point: Any) -> Any:
    """The values that codes stand for: (quantized - zero_point) * scale."""
    return (quantized - zero_point) * scale


def fake_quantize(values: Any, scale: Any, zero_point: Any, codes: Codes) -> Any:
    """`values` as they come back from a round trip through `codes`, same shape and dtype."""
    quantized = quantize(values, scale, zero_point, codes)
    if getattr(quantized, "requires_grad", False):
        return dequantize(quantized, scale, zero_point)
    quantized -= zero_point
    quantized *= scale
    return quantized
