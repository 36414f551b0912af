"""The census of TensorRT's kernels: what proves a layer quantized, and that no way into float goes unnoticed."""

from dataclasses import replace

import numpy as np
import pytest

from calibrators.affine import CODES
from calibrators.errors import ExportError
from calibrators.plan import QParams, QuantPlan
from exporters.tensorrt.layers import Kernel, census_of

_INT8 = QParams(np.array(0.05, np.float32), np.array(0, np.int8), CODES["int8"], None)
_INT4 = QParams(np.full((2, 2), 0.1, np.float32), np.zeros((2, 2), CODES["int4"].zero_dtype), CODES["int4"], 0, 16)
_FP8 = replace(_INT8, zero_point=np.array(0, CODES["float8_e4m3fn"].zero_dtype), codes=CODES["float8_e4m3fn"])
_NODES = frozenset({"fc", "fc.input.dequantize", "fc.weight.dequantize"})
_OPERANDS = frozenset({"fc", "fc.lhs.dequantize", "fc.rhs.dequantize"})


def _plan(q: QParams, *sites: str, spared: tuple[str, ...] = ()) -> QuantPlan:
    reasons = dict.fromkeys(spared, "asked for")
    return QuantPlan(dict.fromkeys(sites, q), reasons, scheme="w8a8", model="m", images="i")


_LINEAR = _plan(_INT8, "fc.input", "fc.weight")
_FP8_LINEAR = _plan(_FP8, "fc.input", "fc.weight")
_WEIGHT_ONLY = _plan(_INT4, "fc.weight")
_MATMUL = _plan(_INT8, "fc.lhs", "fc.rhs")


def _kernel(inputs: str, constants: str | None = "", nodes: frozenset[str] = _NODES, kind: str = "gemm ") -> Kernel:
    listed = None if constants is None else tuple(constants.split())
    return Kernel("fc_myl0_1", kind, tuple(inputs.split()), listed, nodes)


_QUANTIZED = {
    "int8": (_LINEAR, _kernel("int8", "int8 fp32")),
    "fp8": (_FP8_LINEAR, _kernel("fp8", "fp8 fp32")),
    "int4, fp16 activations": (
        _WEIGHT_ONLY,
        _kernel("fp16", "int4 fp16", frozenset({"fc", "fc.weight.dequantize"})),
    ),
    "int8 of TensorRT 10": (_LINEAR, _kernel("int8", None)),
    "attention": (
        _MATMUL,
        _kernel("int8 int8", "", _OPERANDS),
    ),
    "attention of TensorRT 10": (
        _MATMUL,
        _kernel("int8 int8 fp32", None, _OPERANDS),
    ),
}


@pytest.mark.parametrize("case", _QUANTIZED)
def test_a_kernel_that_reads_all_codes_itself_proves_its_layer_quantized(case: str) -> None:
    plan, kernel = _QUANTIZED[case]
    rest = _kernel("fp32", "fp32", frozenset({"fc", "bias"}), "kgen ")
    for kernels in ([kernel, rest], [rest, kernel]):
        assert list(census_of(kernels, plan, "fp16").precision) == ["fc"]


_FLOAT: dict[str, tuple[QuantPlan, list[Kernel], str]] = {
    "the weight is float": (_LINEAR, [_kernel("int8", "fp32")], "reads fp32, int8, or"),
    "the input is float": (_LINEAR, [_kernel("fp32", "int8")], "reads fp32, int8, or"),
    "both are float": (_LINEAR, [_kernel("fp32", "fp32")], "reads fp32, or"),
    "both are fp16": (_LINEAR, [_kernel("fp16", "fp16")], "reads fp16, or"),
    "int8 where fp8 was asked for": (
        _FP8_LINEAR,
        [_kernel("int8", "int8")],
        "reads int8, or",
    ),
    "the weight has a kernel of its own": (
        _LINEAR,
        [
            _kernel("", "int8 fp32", frozenset({"fc.weight.dequantize"}), "kgen "),
            _kernel("int8 fp32", "", frozenset({"fc", "fc.input.dequantize"})),
        ],
        "reads fp32, int8, or its weight is dequantized by a kernel of its own.",
    ),
    "the input has a kernel of its own": (
        _LINEAR,
        [
            _kernel("int8", "fp32", frozenset({"fc.input.dequantize"}), "kgen "),
            _kernel("fp32", "int8", frozenset({"fc", "fc.weight.dequantize"})),
        ],
        "reads fp32, int8, or",
    ),
    "int4 is unpacked before": (
        _WEIGHT_ONLY,
        [
            _kernel("", "int4 fp32", frozenset({"fc.weight.dequantize"}), "kgen "),
            _kernel("fp32 fp32", "", frozenset({"fc"})),
        ],
        "`fc_myl0_1` reads fp32, or its weight",
    ),
    "int4 is unpacked before in TensorRT 10": (
        _WEIGHT_ONLY,
        [
            _kernel("", None, frozenset({"fc.weight.dequantize"}), "kgen "),
            _kernel("fp32", None, frozenset({"fc", "fc.weight.dequantize"})),
        ],
        "reads fp32, or its weight",
    ),
    "int4 is unpacked by a kernel that names the layer": (
        _WEIGHT_ONLY,
        [_kernel("", "int4 fp32", frozenset({"fc", "fc.weight.dequantize"}), "kgen ")],
        "reads fp32, int4, or its weight",
    ),
    "codes of the next layer's weight": (
        _LINEAR,
        [_kernel("int8", "int8", frozenset({"fc", "fc.input.dequantize"}))],
        "reads int8, or its weight",
    ),
    "the weight has a kernel of its own in TensorRT 10": (
        _LINEAR,
        [
            _kernel("", None, frozenset({"fc.weight.dequantize"})),
            _kernel("int8", None, frozenset({"fc", "fc.input.dequantize"})),
        ],
        "reads int8, or its weight",
    ),
    "float in TensorRT 10": (_LINEAR, [_kernel("fp32", None)], "reads fp32, or"),
    "one operand of attention": (
        _MATMUL,
        [_kernel("int8 fp32", "", _OPERANDS)],
        "reads fp32, int8, or",
    ),
    "one operand of attention in TensorRT 10": (
        _MATMUL,
        [_kernel("int8 fp32", None, _OPERANDS)],
        "reads fp32, int8, or",
    ),
    "no kernel": (_LINEAR, [], "no kernel of the engine comes from it."),
    "kernels of others only": (
        _LINEAR,
        [_kernel("int8", "int8", frozenset({"fc2", "fc2.input.dequantize", "fc.weight.dequantize"}))],
        "no kernel of the engine comes from it.",
    ),
}


@pytest.mark.parametrize("case", _FLOAT)
def test_every_way_into_float_is_found_and_named(case: str) -> None:
    plan, kernels, why = _FLOAT[case]
    with pytest.raises(ExportError) as caught:
        census_of(kernels, plan, "fp32")
    assert caught.value.what.startswith("the engine computes `fc` in float, and 0 more")
    assert why in caught.value.why
    assert caught.value.fix.startswith("spare them with --spare auto,fc,")


def test_all_fallen_layers_are_in_the_advice_and_sound_ones_are_not() -> None:
    plan = _plan(_INT8, *[f"{layer}.{role}" for layer in ("fc", "a", "b") for role in ("input", "weight")])
    with pytest.raises(ExportError, match="`a` in float, and 1 more") as caught:
        census_of([_kernel("int8", "int8")], plan, "fp32")
    assert "--spare auto,a,b," in caught.value.fix


def test_a_spared_layer_is_the_bodys_with_its_reason() -> None:
    plan = _plan(_INT8, "fc.input", "fc.weight", spared=("head.input", "head.weight"))
    census = census_of([_kernel("int8", "int8")], plan, "bf16")
    assert census.counts == {"int8": 1, "bf16": 1}
    assert census.reasons == {"head": "asked for"}


@pytest.mark.parametrize(
    ("kind", "nodes", "counted"),
    [
        ("gemm __myelin_CASK_STUB", "fc", "matmul"),
        ("correlation __myelin_CASK_STUB", "conv", "matmul"),
        ("runtime_fusion ", "fc fc.weight.dequantize", "matmul"),
        ("CaskGemmMatrixMultiply sm80_xmma_gemm_i8f32", "fc", "matmul"),
        ("kgen _gemm_mha_v2_0x1", "qk av", "attention"),
        ("kgen __myl_MulMinMaxRounCast_0x1", "fc.input.quantize", "q/dq alone"),
        ("kgen __myl_CastMul_0x1", "fc.weight.dequantize", "q/dq alone"),
        ("kgen __myl_MulMinMaxRounCastReshTran_0x1", "fc.input.quantize transpose", "q/dq alone"),
        ("kgen __myl_MeanSubMulMinMaxRounCast_0x1", "fc.input.quantize norm", "other"),
        ("kgen __myl_MoveReplConc_0x1", "qk", "reformat"),
        ("Reformat ", "", "reformat"),
        ("kgen __myl_Move_0x1", "", "reformat"),
        ("shape_call ", "", "other"),
    ],
)
def test_kernels_are_counted_by_what_they_do(kind: str, nodes: str, counted: str) -> None:
    kernel = _kernel("fp32", "", frozenset(nodes.split()), kind)
    assert census_of([kernel, kernel], _plan(_INT8), "fp32").kernels == {counted: 2}
