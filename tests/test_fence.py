"""Fences stand where a quantized matmul is cut and nowhere else, change no value, and keep the weight in its codes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tiny_quantized import asked, float_model, plan_for, quantized, values, written

from calibrators.errors import ExportError
from calibrators.plan import QuantPlan
from exporters.cast import CastBody
from exporters.census import Body
from exporters.ort_engine import session_options
from exporters.qdq import InsertQDQ
from exporters.tensorrt.fence import put_fences
from exporters.tensorrt.layers import census_of, kernels_in_log

_HEAD = "agraph (float[N, 16, 64] images) => (float[N, A, B] logits) { [qkv] sums = MatMul (images, w)"
_PLACES: dict[str, tuple[str, bool]] = {  # what reads the matmul, and whether a fence belongs there
    "reshape": ("y = Reshape (sums, shape)  logits = Relu (y)", True),
    "transpose": ("y = Transpose <perm = [0, 2, 1]> (sums)  logits = Relu (y)", True),
    "split": ("y, z = Split <axis = 2, num_outputs = 2> (sums)  logits = Add (y, z)", True),
    "two gathers": ("y = Gather (sums, one)  z = Gather (sums, two)  logits = Add (y, z)", True),
    "bias, then reshape": ("s = Add (sums, b)  y = Reshape (s, shape)  logits = Relu (y)", True),
    "activation": ("y = Relu (sums)  logits = Reshape (y, shape)", False),
    "bias, then activation": ("s = Add (sums, b)  logits = Relu (s)", False),
    "cut and read whole": ("y = Transpose <perm = [0, 2, 1]> (sums)  z = ReduceSum (sums)  logits = Add (y, z)", False),
    "the end": ("logits = Add (sums, b)", False),
}


def _placed(name: str) -> ir.Model:
    constants: dict[str, Any] = {
        "w": values(64, 192) / 8,
        "b": values(192, seed=1),
        "shape": np.array([-1, 48, 64]),
        "one": np.array([1]),
        "two": np.array([2]),
    }
    return written(f"{_HEAD}  {_PLACES[name][0]} }}", **constants)


def _typed(dtype: str, rest: str, **more: np.ndarray) -> ir.Model:
    """A float model of that type whose matmul is cut, at the opset that has a bfloat16 Clip."""
    text = f"agraph ({dtype}[N, 16, 64] images) => ({dtype}[N, 48, 64] logits) {{ [qkv] sums = MatMul (images, w)"
    constants: dict[str, Any] = {"w": values(64, 192).astype(ir.DataType[dtype.upper()].numpy()), **more}
    return written(f"{text}  {rest} }}", opset=22, shape=np.array([-1, 48, 64]), **constants)


def _fences(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Clip"]


def _run(model: ir.Model, images: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, session_options(exact=True), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"images": images})[0]
    return found


def _model(plan: QuantPlan, body: Body = "fp32", *, fences: bool) -> ir.Model:
    model = quantized("qkv", plan)
    model = model if body == "fp32" else CastBody(body)(model).model
    if fences:
        put_fences(model, plan)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


@pytest.mark.parametrize("name", _PLACES)
def test_a_fence_stands_only_where_the_matmul_is_cut(name: str) -> None:
    plan, model = plan_for("qkv"), _placed(name)
    put_fences(InsertQDQ(plan)(model).model, plan)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [fence.name for fence in _fences(model)] == (["qkv.fence"] if _PLACES[name][1] else [])
    for fence in _fences(model):
        (source, *_), (output,) = fence.inputs, fence.outputs
        assert source is not None
        assert source.consumers() == (fence,), "a cut goes round the fence"
        assert output.consumers()
        assert (output.dtype, output.shape) == (source.dtype, source.shape)


def test_what_the_plan_does_not_name_gets_no_fence() -> None:
    model = float_model("qkv")
    put_fences(model, QuantPlan({}, {}, scheme="w8a8", model="m", images="i"))
    assert not _fences(model)


def test_a_weight_alone_gets_no_fence() -> None:
    plan = plan_for("qkv", "w4a16")
    assert not _fences(_model(plan, fences=True)), "TensorRT keeps INT4 inside the matmul without one"


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_fence_changes_no_value(size: float) -> None:
    plan, images = plan_for("qkv"), size * values(4, 16, 64, seed=2)
    wanted = _run(_model(plan, fences=False), images)
    found = _run(_model(plan, fences=True), images)
    assert wanted.std() > 1e-3
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_a_fence_lets_the_largest_finite_values_through(dtype: str) -> None:
    kind = ir.DataType[dtype.upper()].numpy()
    largest = float(np.finfo(kind).max)
    extreme = np.resize(np.array([largest, -largest, np.finfo(kind).smallest_subnormal, -0.0], kind), 192)
    model = _typed(dtype, "s = Add (sums, b)  logits = Reshape (s, shape)", b=extreme)
    wanted = _run(model, np.zeros((1, 16, 64), kind))
    put_fences(model, plan_for("qkv"))
    found = _run(model, np.zeros((1, 16, 64), kind))
    assert len(_fences(model)) == 1
    assert found.tobytes() == wanted.tobytes()
    assert {largest, -largest} <= set(found.ravel().tolist())


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        ("float", 3.4028234663852886e38),
        ("float16", 65504.0),
        ("bfloat16", 3.3895313892515355e38),
    ],
)
def test_the_bounds_are_the_largest_finite_values_of_the_type(dtype: str, largest: float) -> None:
    model = _typed(dtype, "logits = Reshape (sums, shape)")
    put_fences(model, plan_for("qkv"))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (fence,) = _fences(model)
    bounds = [value.const_value.numpy() for value in fence.inputs[1:] if value is not None and value.const_value]
    assert [float(bound) for bound in bounds] == [-largest, largest]
    assert {value.dtype for value in (*fence.inputs, *fence.outputs) if value is not None} == {
        ir.DataType[dtype.upper()]
    }


def test_fences_share_their_bounds_and_a_second_pass_adds_none() -> None:
    site = plan_for("qkv").sites["qkv.input"]
    plan = QuantPlan({"one.input": site, "two.input": site}, {}, scheme="w8a8", model="m", images="i")
    model = written(
        """agraph (float[N, 16, 64] images) => (float[N, 64, 16] logits) {
            [one] a = MatMul (images, w)  [turn] b = Transpose <perm = [0, 2, 1]> (a)
            [two] c = MatMul (images, w)  [back] d = Transpose <perm = [0, 2, 1]> (c)
            logits = Add (b, d)
        }""",
        w=values(64, 64),
    )
    put_fences(model, plan)
    put_fences(model, plan)
    first, second = _fences(model)
    assert {first.name, second.name} == {"one.fence", "two.fence"}
    for bound in (1, 2):
        assert first.inputs[bound] is second.inputs[bound]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def _census(path: Path, model: ir.Model, plan: QuantPlan, body: Body) -> dict[str, int]:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    ir.save(model, path)
    _, log = asked(trt, path)
    kernels = kernels_in_log(next(text for _, text in log.messages if text.startswith("Layers:")))
    return census_of(kernels, plan, body).counts


@pytest.mark.parametrize(("scheme", "format"), [("w8a8", "int8"), ("w8a8_fp8", "fp8")])
def test_rtx_keeps_the_weight_in_its_codes_only_behind_a_fence(tmp_path: Path, scheme: str, format: str) -> None:
    plan = plan_for("qkv", scheme)
    with pytest.raises(ExportError, match="`qkv` in float") as caught:
        _census(tmp_path / "model.onnx", _model(plan, fences=False), plan, "fp32")
    assert "its weight is dequantized by a kernel of its own" in caught.value.why
    assert caught.value.fix.startswith("spare them with --spare auto,qkv")
    assert _census(tmp_path / "model.onnx", _model(plan, fences=True), plan, "fp32") == {format: 1}


@pytest.mark.parametrize("body", ["fp16", "bf16"])
@pytest.mark.parametrize(("scheme", "format"), [("w8a8", "int8"), ("w8a8_fp8", "fp8")])
def test_in_a_half_body_the_cast_behind_the_layer_is_its_fence(
    tmp_path: Path, scheme: str, format: str, body: Body
) -> None:
    plan = plan_for("qkv", scheme)
    model = _model(plan, body, fences=True)
    assert not _fences(model)
    assert _census(tmp_path / "model.onnx", model, plan, body) == {format: 1}
