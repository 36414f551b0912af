"""What TensorRT does not take is refused in our words first, and TensorRT for RTX, asked directly, still needs it.

Each case is a model of a few operators. If RTX one day builds one of them as it stands, the rule can go.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from tiny_quantized import asked, float_model, values, written

from calibrators.errors import BackendError
from exporters.backends import BuildOptions
from exporters.tensorrt.builder import build_engine
from exporters.tensorrt.layers import Kernel, kernels_in_log
from exporters.tensorrt.refusals import refuse_model

_GRAPH = "agraph (float[N, 64] images) => (float[N, 32] logits) {"
_ACTIVATION = f"""{_GRAPH}
    [quantize] codes = QuantizeLinear (images, scale, zero)
    [dequantize] rounded = DequantizeLinear (codes, scale, zero)
    [weight] w = DequantizeLinear <axis = 1> (c, scales, zeros)
    [fc] logits = MatMul (rounded, w)
}}"""
_BLOCKS = f"""{_GRAPH}
    [weight] w = DequantizeLinear <axis = 0, block_size = SIZE> (c, scales, zeros)
    [fc] logits = MatMul (images, w)
}}"""
_BIAS = f"""{_GRAPH}
    [dequantize] bias = DequantizeLinear (c, scale)
    [fc] sums = MatMul (images, w)
    [add] logits = Add (sums, bias)
}}"""
_DYNAMIC = f"""{_GRAPH}
    [quantize] codes, scale, zero = DynamicQuantizeLinear (images)
    [dequantize] rounded = DequantizeLinear (codes, scale, zero)
    [fc] logits = MatMul (rounded, w)
}}"""
_QLINEAR = f"""{_GRAPH}
    [quantize] codes = QuantizeLinear (images, scale, zero)
    [fc] sums = QLinearMatMul (codes, scale, zero, c, scale, zero, scale, zero)
    [dequantize] logits = DequantizeLinear (sums, scale, zero)
}}"""
_INTEGER = """agraph (float[N, 64] images) => (int32[N, 32] logits) {
    [quantize] codes = QuantizeLinear (images, scale, zero)
    [fc] logits = MatMulInteger (codes, c)
}"""
_CONTRIB = f"""{_GRAPH}
    [fc] logits = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 32> (images, c, scales)
}}"""
_ATTENTION = """agraph (float[N, 2, 16, 32] q, float[N, 2, 16, 32] k, float[N, 2, 16, 32] v)
    => (float[N, 2, 16, 32] logits) { [attention] logits = Attention (q, k, v) }"""

_SCALE, _ZERO = np.array(0.05, np.float32), np.array(0, np.int8)
_CODES = np.clip(np.rint(30 * values(64, 32)), -127, 127).astype(np.int8)
_SCALES, _ZEROS = np.full(32, 1 / 30, np.float32), np.zeros(32, np.int8)
_W = values(64, 32)


def _activation(**other: np.ndarray) -> ir.Model:
    return written(
        _ACTIVATION, **{"scale": _SCALE, "zero": _ZERO, "c": _CODES, "scales": _SCALES, "zeros": _ZEROS} | other
    )


def _blocks(size: int, codes: type, *, zero: int = 0, scale: float = 0.5) -> ir.Model:
    numbers = np.clip(np.rint(2 * _W), -7, 7) + (8 if codes is ml_dtypes.uint4 else 0)
    scales = np.full((64 // size, 32), scale, np.float32)
    zeros: np.ndarray = np.full(scales.shape, zero).astype(codes)
    return written(_BLOCKS.replace("SIZE", str(size)), opset=21, c=numbers.astype(codes), scales=scales, zeros=zeros)


_INTEGERS = "it takes explicit Q/DQ only, not integer operators."
_REFUSED: dict[str, tuple[Callable[[], ir.Model], str, str, str]] = {  # model, refused node, why, words of the fix
    "attention": (lambda: written(_ATTENTION, opset=23), "attention", "its builder refuses it in float32.", "opset 22"),
    "int32 bias": (
        lambda: written(_BIAS, w=_W, c=np.arange(32, dtype=np.int32), scale=_SCALE),
        "dequantize",
        "a quantized bias is refused; biases stay in float.",
        "export",
    ),
    "zero-point": (lambda: _activation(zero=np.array(3, np.int8)), "quantize", "its zero-points must be 0.", "w8a8"),
    "weight zero-point": (
        lambda: _activation(zeros=np.full(32, 2, np.int8)),
        "weight",
        "its zero-points must be 0.",
        "w8a8",
    ),
    "uint8": (
        lambda: _activation(zero=np.array(128, np.uint8)),
        "quantize",
        "it quantizes with signed codes only.",
        "w8a8",
    ),
    "dynamic": (lambda: written(_DYNAMIC, w=_W), "quantize", _INTEGERS, "export"),
    "MatMulInteger": (lambda: written(_INTEGER, scale=_SCALE, zero=_ZERO, c=_CODES), "fc", _INTEGERS, "export"),
    "QLinearMatMul": (lambda: written(_QLINEAR, scale=_SCALE, zero=_ZERO, c=_CODES), "fc", _INTEGERS, "export"),
    "MatMulNBits": (
        lambda: written(_CONTRIB, c=np.zeros((32, 2, 16), np.uint8), scales=np.ones(64, np.float32)),
        "fc",
        "of operators that are not standard ONNX it knows few.",
        "export",
    ),
    "uint4": (lambda: _blocks(16, ml_dtypes.uint4), "weight", "it quantizes with signed codes only.", "w8a8"),
    "int4 zero-point": (lambda: _blocks(16, ml_dtypes.int4, zero=1), "weight", "its zero-points must be 0.", "w8a8"),
    "negative scale": (lambda: _activation(scale=-_SCALE), "quantize", "its scales must be positive.", "export"),
    "negative scales": (
        lambda: _activation(scales=np.where(np.arange(32) == 3, -1, 1) * _SCALES),
        "weight",
        "its scales must be positive.",
        "export",
    ),
    "zero scales": (lambda: _activation(scales=0 * _SCALES), "weight", "its scales must be positive.", "export"),
}
"""Refused by RTX too."""
_MISBUILT: dict[str, tuple[Callable[[], ir.Model], str, str, str]] = {
    "one block": (
        lambda: _blocks(64, ml_dtypes.int4),
        "weight",
        "one block for all rows is dequantized by a kernel of its own.",
        "--block",
    ),
    "uint8 from 0": (
        lambda: _activation(zero=np.array(0, np.uint8)),
        "quantize",
        "it quantizes with signed codes only.",
        "w8a8",
    ),
    "negative scales of blocks": (
        lambda: _blocks(16, ml_dtypes.int4, scale=-0.5),
        "weight",
        "its scales must be positive.",
        "export",
    ),
}
"""Taken by RTX without a word."""
_SOUND: dict[str, Callable[[], ir.Model]] = {
    "opset 23": lambda: written(f"{_GRAPH} [fc] logits = MatMul (images, w) }}", opset=23, w=_W),
    "int8": _activation,
    "int4 in blocks of 16": lambda: _blocks(16, ml_dtypes.int4),
    "int4 in blocks of 32": lambda: _blocks(32, ml_dtypes.int4),
    "float": lambda: float_model("qkv"),
}


@pytest.fixture(scope="module")
def binding() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


def _saved(model: ir.Model, folder: Path) -> Path:
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _kernels(trt: Any, model: ir.Model, folder: Path) -> list[Kernel]:
    engine, log = asked(trt, _saved(model, folder))
    assert engine is not None, log.errors()
    return kernels_in_log(next(text for _, text in log.messages if text.startswith("Layers:")))


@pytest.mark.parametrize("name", [*_REFUSED, *_MISBUILT])
def test_we_refuse_it_by_node_with_the_reason_and_the_way_out(name: str) -> None:
    model, node, why, fix = (_REFUSED | _MISBUILT)[name]
    with pytest.raises(BackendError) as caught:
        refuse_model(model())
    assert caught.value.what.startswith(f"TensorRT does not take `{node}` (")
    assert caught.value.why == why
    assert fix in caught.value.fix
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("name", _REFUSED)
def test_rtx_refuses_it_too(binding: Any, tmp_path: Path, name: str) -> None:
    engine, log = asked(binding, _saved(_REFUSED[name][0](), tmp_path))
    assert engine is None
    assert log.errors()


def test_rtx_unpacks_a_single_block_of_int4_in_a_kernel_of_its_own(binding: Any, tmp_path: Path) -> None:
    kernels = _kernels(binding, _MISBUILT["one block"][0](), tmp_path)
    (unpacks,) = [kernel for kernel in kernels if "weight" in kernel.nodes]
    (multiplies,) = [kernel for kernel in kernels if "fc" in kernel.nodes]
    assert unpacks is not multiplies
    assert "int4" not in multiplies.inputs + (multiplies.constants or ())


def test_rtx_takes_uint8_for_int8(binding: Any, tmp_path: Path) -> None:
    (multiplies,) = [k for k in _kernels(binding, _MISBUILT["uint8 from 0"][0](), tmp_path) if "gemm" in k.kind]
    assert multiplies.inputs == ("int8",)


def test_rtx_takes_negative_scales_of_blocks_silently(binding: Any, tmp_path: Path) -> None:
    (multiplies,) = [
        k for k in _kernels(binding, _MISBUILT["negative scales of blocks"][0](), tmp_path) if "fc" in k.nodes
    ]
    assert "int4" in (multiplies.constants or ()), "what it computes nobody has seen; ours are positive"


@pytest.mark.parametrize("name", _SOUND)
def test_what_rtx_takes_is_not_refused(binding: Any, tmp_path: Path, name: str) -> None:
    refuse_model(_SOUND[name](), targets=["sm75", "sm89"])
    assert _kernels(binding, _SOUND[name](), tmp_path)


def test_the_first_refusal_comes_before_any_call_of_tensorrt(tmp_path: Path) -> None:
    nothing = ModuleType("tensorrt")
    for name in _REFUSED:
        with pytest.raises(BackendError, match="TensorRT does not take"):
            build_engine(nothing, _saved(_REFUSED[name][0](), tmp_path), tmp_path / "e", BuildOptions(batch=(1, 2, 4)))
