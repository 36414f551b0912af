"""The layer table: read off the log of RTX, and off the JSON of both TensorRTs' inspectors, or refused."""

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tiny_quantized import asked, plan_for, quantized

from calibrators.errors import BackendError
from exporters.cast import CastBody
from exporters.census import Body
from exporters.tensorrt.layers import Kernel, census_of, kernels_in_json, kernels_in_log

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
@pytest.mark.parametrize(("body", "computes"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")])
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


def test_control_characters_may_stand_in_the_json_as_they_are() -> None:
    text = '{"Layers": [{"Name": "a", "LayerType": "b", "Metadata": "[ONNX Layer: fc]\x1e[ONNX Layer: bias]"}]}'
    assert kernels_in_json(text)[0].nodes == {"fc", "bias"}


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", '{"Layers": ["fc"]}', '{"Layers": [{"Name": "fc"}]}', '{"Layers": [{"Name": 1'],
    ids=repr,
)
def test_json_without_details_is_refused(text: str) -> None:
    with pytest.raises(BackendError, match="cannot be read, so nobody knows"):
        kernels_in_json(text)
