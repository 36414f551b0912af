"""The layer table, read as both TensorRTs write it, and the census: no way into float goes unnoticed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny_quantized import asked, plan_for, quantized

from calibrators.affine import CODES
from calibrators.errors import BackendError, ExportError
from calibrators.plan import QParams, QuantPlan
from exporters.cast import CastBody
from exporters.census import Body
from exporters.tensorrt.layers import Kernel, census_of, kernels_in_json, kernels_in_log

_INT8 = QParams(np.array(0.05, np.float32), np.array(0, np.int8), CODES["int8"], None)
_INT4 = QParams(np.full((2, 2), 0.1, np.float32), np.zeros((2, 2), CODES["int4"].zero_dtype), CODES["int4"], 0, 16)
_FP8 = replace(_INT8, zero_point=np.array(0, CODES["float8_e4m3fn"].zero_dtype), codes=CODES["float8_e4m3fn"])
_NODES = frozenset({"fc", "fc.input.dequantize", "fc.weight.dequantize"})
_OPERANDS = frozenset({"fc", "fc.lhs.dequantize", "fc.rhs.dequantize"})

# Lines that TensorRT for RTX 1.7.1 wrote for the qkv of a test_vit; addresses and dimensions are left out.
_TABLE = """Layers:
Name: __mye20733_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, \
Metadata:\x20
Name: __myl_MulMinMaxRounCast_myl0_1, LayerType: kgen, Inputs: [ { Name: x, Datatype: Float, Format: (Linear) }], \
Constants: [ { Name: s, Datatype: Float, Format: (Linear) }], Outputs: [ { Name: q, Datatype: Int8, Format: x }], \
TacticName: __myl_MulMinMaxRounCast_0x5492, StreamId: 0, Metadata: [ONNX Layer: qkv.input.quantize]
Name: qkv_myl0_2, LayerType: gemm, Inputs: [ { Name: q, Dimensions: [-1,64], Datatype: Int8, Format: (Linear) }], \
Constants: [ { Name: c, Datatype: Int8, Format: (Linear) }, { Name: a, Datatype: Float, Format: (Linear) }], \
Outputs: [ { Name: y, Datatype: Float, Format: (Linear) Row major linear format }], TacticName: __myelin_CASK_STUB, \
StreamId: 0, Metadata: [ONNX Layer: qkv.weight.dequantize]\x1f[ONNX Layer: qkv]\x1e[ONNX Layer: qkv.input.dequantize]
Name: _gemm_mha_v2_myl0_3, LayerType: kgen, Inputs: [ { Name: q, Datatype: Half, Format: (Linear) }, { Name: k, \
Datatype: Half, Format: (Linear) }], Constants: [], Outputs: [ { Name: y, Datatype: Half, Format: (Linear) }], \
TacticName: _gemm_mha_v2_0x1, StreamId: 0, Metadata: [ONNX Layer: qk][ONNX Layer: av]
I/O Tensors:
Name: images, Datatype: Float
"""


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


def test_a_recorded_table_is_read_line_by_line() -> None:
    nothing, quantizes, multiplies, attends = kernels_in_log(_TABLE)
    assert nothing == Kernel("__mye20733_0_myl0_0", "shape_call ", (), (), frozenset())
    assert (quantizes.inputs, quantizes.constants) == (("fp32",), ("fp32",))
    assert quantizes.nodes == {"qkv.input.quantize"}
    assert (multiplies.name, multiplies.kind) == ("qkv_myl0_2", "gemm __myelin_CASK_STUB")
    assert (multiplies.inputs, multiplies.constants) == (("int8",), ("int8", "fp32"))
    assert multiplies.nodes == {"qkv", "qkv.input.dequantize", "qkv.weight.dequantize"}
    assert attends.inputs == ("fp16", "fp16")
    assert attends.nodes == {"qk", "av"}


@pytest.mark.parametrize("line", ["Name: fc, LayerType: gemm", "Layer(gemm): fc, Tactic: 0x1"])
def test_a_table_in_another_form_is_refused_and_shown(line: str) -> None:
    with pytest.raises(BackendError, match="cannot be read, so nobody knows") as caught:
        kernels_in_log(f"Layers:\n{line}\nI/O Tensors:\n")
    assert f"`{line}`" in caught.value.why


@pytest.mark.parametrize(("scheme", "planned"), [("w8a8", "int8"), ("w8a8_fp8", "fp8"), ("w4a16", "int4")])
@pytest.mark.parametrize(("body", "computes"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "BFloat16")])
def test_the_table_of_a_real_build_is_read(
    tmp_path: Path, scheme: str, planned: str, body: Body, computes: str
) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    plan = plan_for("fc", scheme)
    model = quantized("fc", plan)
    ir.save(model if body == "fp32" else CastBody(body)(model).model, tmp_path / "model.onnx")
    _, log = asked(trt, tmp_path / "model.onnx")
    (table,) = [text for _, text in log.messages if text.startswith("Layers:")]
    kernels = kernels_in_log(table)
    assert len(kernels) == table.partition("\nI/O Tensors:")[0].rstrip("\n").count("\n")
    needed = {"fc", *(f"{site}.dequantize" for site in plan.sites)}
    (multiplies,) = [kernel for kernel in kernels if kernel.kind.startswith(("gemm", "runtime_fusion"))]
    assert needed <= multiplies.nodes
    assert multiplies.inputs == (computes if scheme == "w4a16" else planned,)
    assert planned in (multiplies.constants or ())
    census = census_of(kernels, plan, body)
    assert census.precision == {"fc": planned}
    assert census.kernels["matmul"] == 1
    assert sum(census.kernels.values()) == len(kernels)


_OLD = {"LayerType": "CaskGemmMatrixMultiply", "TacticName": "sm80_xmma_gemm_i8f32", "Metadata": "[ONNX Layer: fc]"}


def _inspected(*layers: dict[str, Any]) -> list[Kernel]:
    return kernels_in_json(json.dumps({"Layers": layers, "Bindings": ["images", "logits"]}))


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("Int8", "int8"),
        ("Row major Int8 format", "int8"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Half", "fp16"),
        ("Row major linear FP16 format", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("Int4", "int4"),
        ("FP8", "fp8"),
        ("Int8Like", "Int8Like"),
    ],
)
def test_formats_are_read_from_the_inspector_of_both_versions(written: str, ours: str) -> None:
    (old,) = _inspected({**_OLD, "Name": "fc", "Inputs": [{"Name": "x", "Format/Datatype": written}]})
    (new,) = _inspected({**_OLD, "Name": "fc", "Inputs": [{"Name": "x", "Datatype": written}], "Constants": []})
    assert (old.inputs, old.constants) == ((ours,), None)
    assert (new.inputs, new.constants) == ((ours,), ())


def test_the_inspectors_json_gives_names_kinds_nodes_and_constants() -> None:
    (kernel,) = _inspected(
        {
            **_OLD,
            "Name": "fc + bias",
            "Inputs": [{"Name": "x", "Datatype": "Int8"}],
            "Constants": [{"Name": "w", "Datatype": "Int8"}, {"Name": "b", "Datatype": "Float"}],
            "Metadata": "[ONNX Layer: fc]\x1e[ONNX Layer: bias]\x1f[ONNX Layer: act]",
        }
    )
    assert kernel == Kernel(
        "fc + bias",
        "CaskGemmMatrixMultiply sm80_xmma_gemm_i8f32",
        ("int8",),
        ("int8", "fp32"),
        frozenset({"fc", "bias", "act"}),
    )
    (bare,) = _inspected({"Name": "copy", "LayerType": "Reformat"})
    assert bare == Kernel("copy", "Reformat ", (), None, frozenset())


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", '{"Layers": ["fc"]}', '{"Layers": [{"Name": "fc"}]}', '{"Layers": [{"Name": 1'],
    ids=repr,
)
def test_json_without_details_is_refused(text: str) -> None:
    with pytest.raises(BackendError, match="cannot be read, so nobody knows"):
        kernels_in_json(text)


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
    "int4 is unpacked by a kernel that names the layer": (
        _WEIGHT_ONLY,
        [_kernel("", "int4 fp32", frozenset({"fc", "fc.weight.dequantize"}), "kgen ")],
        "reads fp32, int4, or its weight",
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
    assert caught.value.fix.startswith("spare them with --spare fc,")


def test_all_fallen_layers_are_in_the_advice_and_sound_ones_are_not() -> None:
    plan = _plan(_INT8, *[f"{layer}.{role}" for layer in ("fc", "a", "b") for role in ("input", "weight")])
    with pytest.raises(ExportError, match="`a` in float, and 1 more") as caught:
        census_of([_kernel("int8", "int8")], plan, "fp32")
    assert "--spare a,b," in caught.value.fix


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
        ("kgen __myl_MulMinMaxRounCast_0x1", "fc.input.quantize norm", "other"),
        ("Reformat ", "", "reformat"),
        ("kgen __myl_Move_0x1", "", "reformat"),
        ("shape_call ", "", "other"),
    ],
)
def test_kernels_are_counted_by_what_they_do(kind: str, nodes: str, counted: str) -> None:
    kernel = _kernel("fp32", "", frozenset(nodes.split()), kind)
    assert census_of([kernel, kernel], _plan(_INT8), "fp32").kernels == {counted: 2}
