"""The formulas: NumPy, torch and ONNX Runtime give the same codes, and codes mean what they should."""

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import parser

from calibrators.affine import CODES, Codes, choose_qparams, dequantize, fake_quantize, quantize

FLOATS = st.floats(-(2.0**20), 2.0**20, width=32)
TABLES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=FLOATS)
SHARES = arrays(np.float32, 20, elements=st.floats(0, 1, width=32))

unhurried = settings(deadline=None)
_EVEN = [codes for codes in CODES.values() if not codes.per_octave]  # all but the powers of two
_INTEGERS = [codes for codes in CODES.values() if codes.integers]
_SIMULATED = ("int6", "uint6")  # which nobody else has


def _each(formats: list[Codes]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("codes", formats, ids=[codes.name for codes in formats])


every_integer_format, every_format = _each(_INTEGERS), _each(_EVEN)


@functools.cache
def _session(codes: Codes, per_channel: bool) -> onnxruntime.InferenceSession:
    c = "[C]" if per_channel else "[]"
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        graph (float[N, C] x, float{c} scale, {codes.zero_dtype}{c} zero) => (float[N, C] y, float[N, C] code) {{
            typed = Cast <to = {int(ir.DataType.from_numpy(np.dtype(codes.name)))}> (zero)
            q = QuantizeLinear <axis = 1> (x, scale, typed)
            y = DequantizeLinear <axis = 1> (q, scale, typed)
            code = Cast <to = 1> (q)
        }}""")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _onnx_runtime(
    codes: Codes, values: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values as ONNX Runtime's QuantizeLinear and DequantizeLinear give them, float32."""
    found = _session(codes, scale.ndim == 1).run(None, {"x": values, "scale": scale, "zero": zero})
    return found[1], found[0]


def _qparams(data: st.DataObject, shape: tuple[int, ...], codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    ends = data.draw(arrays(np.float32, (2, *shape), elements=FLOATS))
    return choose_qparams(ends.min(0), ends.max(0), codes)


@_each([codes for codes in _EVEN if codes.name not in _SIMULATED])
@pytest.mark.parametrize("per_channel", [False, True])
@unhurried
@given(data=st.data(), values=TABLES)
@pytest.mark.filterwarnings("ignore:overflow")  # far beyond the range: it saturates
def test_numpy_torch_and_onnx_runtime_agree_to_the_bit(
    codes: Codes, per_channel: bool, data: st.DataObject, values: np.ndarray
) -> None:
    scale, zero = _qparams(data, values.shape[1:] if per_channel else (), codes)
    halves = np.arange(-256.5, 257, dtype=np.float32)[:, None]  # of steps: where rounding decides
    values = np.concatenate([values, halves * np.broadcast_to(scale, values.shape[1:])])
    if codes.name in ("int4", "uint4"):  # beyond an int32 of steps ONNX Runtime wraps round
        values = np.clip(values, -(2**30) * scale, 2**30 * scale)
    ort_codes, ort_values = _onnx_runtime(codes, values, scale, zero)
    in_numpy = quantize(values, scale, zero, codes)
    in_torch = quantize(*map(torch.from_numpy, (values, scale, zero)), codes)
    np.testing.assert_array_equal(in_numpy, ort_codes, strict=True)
    np.testing.assert_array_equal(in_torch.numpy(), in_numpy, strict=True)
    np.testing.assert_array_equal(dequantize(in_numpy, scale, zero), ort_values, strict=True)
    np.testing.assert_array_equal(fake_quantize(values, scale, zero, codes), ort_values, strict=True)


@every_integer_format
def test_ties_go_to_the_even_code(codes: Codes) -> None:
    values = np.array([[-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]], np.float32) / 4
    middle = 0 if codes.signed else (codes.high + 1) // 2
    scale, zero = np.array(0.25, np.float32), np.array(middle, codes.zero_dtype)
    expected = np.array([[-4, -2, -2, 0, 0, 2, 2, 4]]) + zero.astype(int)
    in_torch = quantize(*map(torch.from_numpy, (values, scale, zero)), codes).numpy()
    in_onnx_runtime = in_torch if codes.name in _SIMULATED else _onnx_runtime(codes, values, scale, zero)[0]
    for found in (quantize(values, scale, zero, codes), in_torch, in_onnx_runtime):
        np.testing.assert_array_equal(found, expected)


@every_integer_format
@unhurried
@given(ends=arrays(np.float32, 2, elements=FLOATS), shares=SHARES)
def test_inside_the_range_a_round_trip_is_off_by_half_a_step_at_most(
    codes: Codes, ends: np.ndarray, shares: np.ndarray
) -> None:
    scale, zero = choose_qparams(ends.min(), ends.max(), codes)
    values = np.clip(ends.min() + shares * (ends.max() - ends.min()), ends.min(), ends.max())
    error = np.abs(fake_quantize(values, scale, zero, codes).astype(float) - values)
    assert (error <= scale * 0.5001).all()  # 255 steps of float32 rounding


@unhurried
@given(values=arrays(np.float32, 50, elements=st.floats(-600, 600, width=32)))
def test_fp8_rounds_as_its_dtype_does(values: np.ndarray) -> None:
    grid = np.arange(127, dtype=np.uint8).view("float8_e4m3fn").astype(np.float32)  # every code from 0 to 448
    values = np.concatenate([values, grid, -grid, (grid[1:] + grid[:-1]) / 2])  # ties, too
    found = quantize(values, np.float32(1), np.int8(0), CODES["float8_e4m3fn"])
    np.testing.assert_array_equal(found, np.clip(values, -448, 448).astype("float8_e4m3fn").astype(np.float32))


@every_format
@unhurried
@given(ends=arrays(np.float32, 2, elements=FLOATS))
def test_the_ends_of_the_range_get_the_last_codes(codes: Codes, ends: np.ndarray) -> None:
    ends = np.sort([min(ends.min(), 0), max(ends.max(), 0)]).astype(np.float32)
    assume(ends[1] - ends[0] > 1e-30)
    low, high = quantize(ends, *choose_qparams(*ends, codes), codes)
    exact = low == codes.lowest or high == codes.high
    assert exact if codes.signed else (low <= 1 and high >= codes.high - 1)  # 1 off in a tie


def test_powers_of_two_are_the_nearest_by_their_logarithm() -> None:
    codes = CODES["log2_uint4"]
    scale, zero = choose_qparams(np.float32(0), np.float32(1), codes)
    assert (scale, zero) == (1, 0)
    values = np.array([-1, 0, 1e-9, 2.0**-15, 0.24, 0.36, 0.70, 0.71, 0.99, 1, 2], np.float32)
    wanted = [2.0**-15] * 4 + [0.25, 0.5, 0.5, 1, 1, 1, 1]
    np.testing.assert_array_equal(fake_quantize(values, scale, zero, codes), wanted)
    in_torch = quantize(*map(torch.from_numpy, (values, scale, zero)), codes)
    np.testing.assert_array_equal(in_torch.numpy(), wanted)


@pytest.mark.parametrize(("name", "count"), [("log2_uint4", 16), ("log2_uint6", 64)])
def test_powers_are_as_many_as_their_bits_can_count(name: str, count: int) -> None:
    found = np.unique(quantize(np.geomspace(1e-12, 1, 10000), np.float32(1), np.uint8(0), CODES[name]))
    assert (len(found), found[0], found[-1]) == (count, CODES[name].low, 1)
    np.testing.assert_allclose(found[1:] / found[:-1], 2 ** (1 / CODES[name].per_octave))


@every_format
@unhurried
@given(ends=arrays(np.float32, (2, 3), elements=FLOATS))
def test_zero_stays_zero(codes: Codes, ends: np.ndarray) -> None:
    scale, zero = choose_qparams(ends.min(0), ends.max(0), codes)
    np.testing.assert_array_equal(fake_quantize(np.zeros(3, np.float32), scale, zero, codes), 0)


@unhurried
@given(ends=arrays(np.float32, (2, 3), elements=FLOATS))
def test_signed_formats_are_symmetric(ends: np.ndarray) -> None:
    scale, zero = choose_qparams(ends.min(0), ends.max(0), CODES["int8"])
    mirrored, _ = choose_qparams(-ends.max(0), -ends.min(0), CODES["int8"])
    np.testing.assert_array_equal(zero, np.zeros(3, np.int8), strict=True)
    np.testing.assert_array_equal(scale, mirrored, strict=True)


@every_format
@pytest.mark.parametrize("nearly", [0.0, -0.0, 1e-45])
def test_a_range_that_holds_only_zero_gets_scale_one(codes: Codes, nearly: float) -> None:
    scale, zero = choose_qparams(np.float32(-nearly), np.float32(nearly), codes)
    assert (scale, zero) == (1, 0)
    assert (scale.dtype, zero.dtype) == (np.float32, codes.zero_dtype)


@every_format
def test_values_beyond_the_range_saturate(codes: Codes) -> None:
    scale, zero = choose_qparams(np.float32(-1), np.float32(1), codes)
    far = quantize(np.array([-1e9, 1e9], np.float32), scale, zero, codes)
    np.testing.assert_array_equal(far, [codes.low, codes.high])
