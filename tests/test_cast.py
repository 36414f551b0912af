"""Five lines of ONNX text, the pass that casts the body, and what each operator reads and computes then."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from calibrators.affine import CODES
from calibrators.errors import ExportError
from calibrators.plan import QParams, QuantPlan
from dfq_deploy.models.loading import load_model
from exporters.cast import CastBody, NarrowBody
from exporters.cut import LayerCutter
from exporters.qdq import InsertQDQ
from exporters.to_onnx import export_float, save_model

_BODIES = get_args(NarrowBody)
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FP32, _FP16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
_HEAD = '<ir_version: 10, opset_import: ["": 20]>'
_INT8 = CODES["int8"]

_LINEAR = """agraph (float[N, 4] x) => (float[N, 3] y) {
    [fc] m = MatMul (x, w)
    [add] y = Add (m, b)
}"""
_NORMED = """agraph (float[N, 4] x) => (float[N, 3] y) {
    [norm] n = LayerNormalization (x, g, g)
    [fc] m = MatMul (n, w)
    [add] a = Add (m, b)
    [end] y = Relu (a)
}"""
_CONV = """agraph (float[N, 2, 5, 5] x) => (float[N, 3, 4, 4] y) {
    [conv] c = Conv (x, w, b)
    [sum] s = Add (c, one)
    [soft] p = Softmax (c)
    [end] y = Add (s, p)
}"""
_ATTENTION = """agraph (float[N, 5, 4] q, float[N, 4, 5] k, float[N, 5, 4] v) => (float[N, 5, 4] y) {
    [qk] s = MatMul (q, k)
    [masked] m = Add (s, mask)
    [softmax] p = Softmax (m)
    [av] y = MatMul (p, v)
}"""
_RMS_NORM = """agraph (float[N, 4] x) => (float[N, 4] y) {
    [half] h = Mul (x, two)
    [square] s = Mul (h, h)
    [mean] m = ReduceMean <keepdims = 1> (s, axes)
    [shift] e = Add (m, eps)
    [root] r = Sqrt (e)
    [end] y = Div (h, r)
}"""
_WEIGHT_ONLY = """agraph (float[N, 4] x) => (float[N, 3] y) {
    w = DequantizeLinear <axis = 1> (c, s)
    [fc] m = MatMul (x, w)
    y = Add (m, b)
}"""
_ONE = QParams(np.array(0.05, np.float32), np.array(0, np.int8), _INT8, None)
_THREE = QParams(np.array([0.01, 0.02, 0.03], np.float32), np.zeros(3, np.int8), _INT8, 0)
_SITES = {
    "fc.input": QParams(np.array(0.05, np.float32), np.array(0, np.int8), _INT8, None),
    "fc.weight": QParams(np.array([1e-7, 0.02, 0.03], np.float32), np.zeros(3, np.int8), _INT8, 0),
}


def _model(text: str, **constants: np.ndarray | float) -> ir.Model:
    tensors = {name: np.asarray(value) for name, value in constants.items()}
    floats = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in tensors.items()}
    initializers = [ir.tensor(value, name=name) for name, value in floats.items()]
    return ir.from_onnx_text(_HEAD + text, initializers=initializers)


def _linear(text: str = _LINEAR, /, **constants: np.ndarray | float) -> ir.Model:
    return _model(text, **{"w": _values(4, 3), "b": _values(3, seed=1), **constants})


def _quantized(model: ir.Model, sites: Mapping[str, QParams]) -> ir.Model:
    return InsertQDQ(QuantPlan(sites, {}, scheme="w8a8", model="m", images="i"))(model).model


def _cast(model: ir.Model, body: NarrowBody = "fp16") -> ir.Model:
    """`model` with that body, after ONNX's own check that the types of every operator agree."""
    cast = CastBody(body)(model).model
    onnx.checker.check_model(ir.to_proto(cast), full_check=True)
    return cast


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def _reads(model: ir.Model, name: str) -> list[ir.DataType | None]:
    return [value.dtype for value in _node(model, name).inputs if value is not None]


def _gives(model: ir.Model, name: str) -> ir.DataType | None:
    return _node(model, name).outputs[0].dtype


def _casts(model: ir.Model) -> set[str | None]:
    return {node.name for node in model.graph if node.op_type == "Cast"}


def _constant(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def _run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, feeds)[0]
    return found


def _values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("body", _BODIES)
def test_the_body_computes_in_its_type_between_inputs_and_outputs_in_fp32(body: NarrowBody) -> None:
    model = _cast(_linear(), body)
    (x,), (y,) = model.graph.inputs, model.graph.outputs
    assert (x.name, x.dtype, y.name, y.dtype) == ("x", _FP32, "y", _FP32)
    assert {*_reads(model, "fc"), *_reads(model, "add"), _gives(model, "add")} == {_TYPES[body]}
    assert {*model.graph.initializers} == {"w", "b"}, "constants keep their names"
    assert _casts(model) == {f"x.{body}", "y.fp32"}


def test_an_fp16_body_rounds_its_weights_and_little_else() -> None:
    x, w, b = _values(50, 4, seed=2), _values(4, 3), _values(3, seed=1)
    found = _run(_cast(_linear()), x=x)
    np.testing.assert_allclose(found, x @ w + b, atol=4e-3)
    assert np.abs(found - (x @ w + b)).max() > 1e-4, "that is as close as fp32"


def test_one_cast_serves_all_readers_and_none_undoes_another() -> None:
    text = """agraph (float[N, 4] x) => (float[N, 4] y) {
        a = Relu (x)
        p = Softmax (a)
        [norm] n = LayerNormalization (p, g)
        q = Softmax (a)
        b = Add (n, q)
        y = Add (a, b)
    }"""
    model = _cast(_model(text, g=_values(4)))
    assert _casts(model) == {"x.fp16", "a.fp32", "n.fp16", "q.fp16", "y.fp32"}
    assert set(_reads(model, "norm")) == {_FP32}


@pytest.mark.parametrize("body", _BODIES)
def test_a_quantized_layer_stays_in_fp32_from_its_codes_to_its_bias(body: NarrowBody) -> None:
    plain = _quantized(_linear(_NORMED, g=_values(4)), _SITES)
    before = {name: _constant(plain, name).copy() for name in plain.graph.initializers}
    model = _cast(plain, body)
    assert _casts(model) == {f"a.{body}", "y.fp32"}
    assert {*_reads(model, "fc"), *_reads(model, "add")} == {_FP32}
    assert set(_reads(model, "end")) == {_TYPES[body]}
    for name, values in before.items():
        np.testing.assert_array_equal(_constant(model, name), values, err_msg=name)


@pytest.mark.parametrize("body", _BODIES)
def test_a_quantized_layer_computes_the_same_to_the_last_bit_in_any_body(body: NarrowBody) -> None:
    x, g = 3 * _values(50, 4, seed=3), _values(4)
    plain, cast = _quantized(_linear(_NORMED, g=g), _SITES), _cast(_quantized(_linear(_NORMED, g=g), _SITES), body)
    np.testing.assert_array_equal(LayerCutter(cast).run("fc", [x]), LayerCutter(plain).run("fc", [x]))


@pytest.mark.parametrize("body", _BODIES)
def test_a_weight_alone_is_dequantized_to_the_type_of_the_body(body: NarrowBody) -> None:
    codes, scale = np.array([[5, -7, 3], [1, 2, 4]] * 2, np.int8), np.array([0.1, 0.2, 1e-12])
    model = _cast(_model(_WEIGHT_ONLY, c=codes, s=scale, b=_values(3)), body)
    assert set(_reads(model, "fc")) == {_TYPES[body]}
    assert _casts(model) == {f"x.{body}", "y.fp32"}
    assert [_constant(model, name).dtype for name in "sc"] == [_TYPES[body].numpy(), np.dtype(np.int8)]
    assert (_constant(model, "s") > 0).all(), "TensorRT refuses a scale of 0"


def test_two_readers_of_different_types_get_a_dequantizer_each() -> None:
    sites = {"conv.input": _ONE, "conv.weight": _THREE, "conv.output": _ONE}
    plain = _model(_CONV, w=_values(3, 2, 2, 2), b=_values(3), one=1.0)
    model = _cast(_quantized(plain, sites))
    assert _reads(model, "sum") == [_FP16, _FP16]
    assert _reads(model, "soft") == [_FP32]
    read = [_node(model, name).inputs[0] for name in ("sum", "soft")]
    one, two = (value.producer() for value in read if value is not None)
    assert one is not None
    assert two is _node(model, "conv.output.dequantize")
    assert one is not two
    assert (one.op_type, one.inputs[0]) == ("DequantizeLinear", two.inputs[0])
    assert _casts(model) == {"p.fp16", "y.fp32"}


def test_a_sum_of_squares_does_not_overflow() -> None:
    constants: dict[str, np.ndarray | float] = {"two": 2.0, "axes": np.array([-1]), "eps": 1e-6}
    x = np.array([[300, -400, 500, 600], [1e-4, 2e-4, -1e-4, 3e-4]], np.float32)
    wanted = _run(_model(_RMS_NORM, **constants), x=x)
    found = _run(_cast(_model(_RMS_NORM, **constants)), x=x)
    np.testing.assert_allclose(found, wanted, rtol=2e-3)


def test_masks_stay_masks() -> None:
    mask = np.zeros((5, 5))
    mask[:, 3], mask[:, 4] = -np.inf, -1e30
    model = _cast(_model(_ATTENTION, mask=mask))
    assert set(_constant(model, "mask")[0].tolist()) == {0.0, -np.inf, -65504.0}
    q, k, v = _values(2, 5, 4), _values(2, 4, 5, seed=1), _values(2, 5, 4, seed=2)
    wanted = _run(_model(_ATTENTION, mask=mask), q=q, k=k, v=v)
    np.testing.assert_allclose(_run(model, q=q, k=k, v=v), wanted, atol=2e-3)
    assert (_reads(model, "softmax"), _reads(model, "av")) == ([_FP32], [_FP16, _FP16])


@pytest.mark.parametrize(("body", "largest"), [("fp16", 65504.0), ("bf16", 3.3895313892515355e38)])
def test_a_bound_beyond_the_body_becomes_its_largest_number(body: NarrowBody, largest: float) -> None:
    text = "agraph (float[N, 4] x) => (float[N, 4] y) { y = Clip (x, low, high) }"
    limit = float(np.finfo(np.float32).max)
    model = _cast(_model(text, low=-limit, high=limit), body)
    assert [float(_constant(model, name)) for name in ("low", "high")] == [-largest, largest]


def test_a_lower_bound_that_keeps_a_divisor_off_0_does_so_in_fp16() -> None:
    text = """agraph (float[N, 4] x) => (float[N, 4] y) {
        n = ReduceL2 (x, axes)
        c = Clip (n, least)
        y = Div (x, c)
    }"""
    model = _cast(_model(text, axes=np.array([-1]), least=1e-12))
    np.testing.assert_array_equal(_run(model, x=np.zeros((1, 4), np.float32)), np.zeros((1, 4)))


def test_a_filled_tensor_of_large_numbers_stays_finite() -> None:
    text = """agraph (float[N, 4] x) => (float[N, 4] y) {
        shape = Shape (x)
        fill = ConstantOfShape <value = float[1] {-1e30}> (shape)
        zero = Constant <value = float {0.0}> ()
        below = Less (x, zero)
        y = Where (below, fill, x)
    }"""
    found = _run(_cast(_model(text)), x=np.array([[-1, 0, 1, 2]], np.float32))
    np.testing.assert_array_equal(found, [[-65504, 0, 1, 2]])


def test_whole_numbers_and_shapes_are_left_alone() -> None:
    text = """agraph (float[N, 4] x, float[M, 4] z) => (int64[2] s, float[N, 2] y) {
        [shape] s = Shape (z)
        y = Gather <axis = 1> (x, index)
    }"""
    model = _cast(_model(text, index=np.array([0, 2])))
    assert (_reads(model, "shape"), _gives(model, "shape")) == ([_FP32], ir.DataType.INT64)
    assert _constant(model, "index").dtype == np.int64
    assert _casts(model) == {"x.fp16", "y.fp32"}


def test_a_bf16_convolution_needs_and_gets_opset_22() -> None:
    model = _cast(_model(_CONV, w=_values(3, 2, 2, 2), b=_values(3), one=1.0), "bf16")
    assert model.opset_imports[""] == 22
    assert set(_reads(model, "conv")) == {_TYPES["bf16"]}
    assert _cast(_model(_CONV, w=_values(3, 2, 2, 2), b=_values(3), one=1.0)).opset_imports[""] == 20


def test_an_operator_without_the_type_stays_in_fp32() -> None:
    text = 'agraph (float[N, 4] x, float[N, 4] z) => (float[N] y) { [sum] y = Einsum <equation = "ni,ni->n"> (x, z) }'
    model = _cast(_model(text), "bf16")
    assert (_reads(model, "sum"), _casts(model)) == ([_FP32, _FP32], set())


@pytest.mark.parametrize("constant", ["w", "b"])
def test_a_weight_beyond_fp16_is_refused_by_name(constant: str) -> None:
    large: np.ndarray = _values(4, 3) if constant == "w" else _values(3)
    large.flat[1] = 7e4
    with pytest.raises(ExportError, match=rf"`{constant}` does not fit into fp16: it holds 70000\.") as caught:
        _cast(_linear(**{constant: large}))
    assert caught.value.fix == "use --float bf16 or fp32."
    _cast(_linear(**{constant: large}), "bf16")


def test_a_scale_whose_codes_go_beyond_fp16_is_refused() -> None:
    codes, scale = np.full((4, 3), 127, np.int8), np.array([1.0, 520.0, 1.0])
    with pytest.raises(ExportError, match=r"`s` does not fit into fp16: it holds 520\."):
        _cast(_model(_WEIGHT_ONLY, c=codes, s=scale, b=_values(3)))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            """agraph (float[N] x, bool c) => (float[N] y) {
                [choice] y = If (c) <
                    then_branch = t () => (float[N] a) { [inside] a = Relu (x) },
                    else_branch = e () => (float[N] b) { b = Neg (x) }
                >
            }""",
            "`inside`.*branch",
        ),
        ("agraph (float[N] x) => (float16[N] y) { [half] y = Cast <to = 10> (x) }", "`half`.*not compute in float32"),
        ("agraph (float[N] x) => (float[N] y) { [own] a = ours.Op (x)  y = Relu (a) }", "`own`.*not known"),
        (
            """agraph (int8[N] x) => (int64[N] y) {
                s = Constant <value = float {0.1}> ()
                d = DequantizeLinear (x, s)
                y = Cast <to = 7> (d)
            }""",
            "`d`.*cast where it may not be",
        ),
    ],
    ids=["branch", "fp16 already", "unknown operator", "cast dequantizer"],
)
def test_what_cannot_be_cast_is_refused(text: str, why: str) -> None:
    model = _model(text)
    model.opset_imports["ours"] = 1
    with pytest.raises(ExportError) as caught:
        CastBody("fp16")(model)
    assert re.search(why, " ".join(str(caught.value).split()))


def test_a_whole_model_in_fp16_is_close_to_torch(tmp_path: Path) -> None:
    model = load_model("demo")
    export_float(model.module, torch.zeros(2, 3, 32, 32), tmp_path / "float.onnx")
    plain = ir.load(tmp_path / "float.onnx")
    names = {node.name for node in plain.graph}
    images = _values(4, 3, 32, 32)
    with torch.inference_mode():
        wanted = model.module(torch.from_numpy(images)).numpy()
    for body in _BODIES:
        save_model(CastBody(body)(ir.load(tmp_path / "float.onnx")).model, tmp_path / f"{body}.onnx")
        cast = ir.load(tmp_path / f"{body}.onnx")
        assert names <= {node.name for node in cast.graph}, "a node lost its name"
        products = [node for node in cast.graph if node.op_type in ("Conv", "MatMul")]
        assert {value.dtype for node in products for value in node.inputs if value is not None} == {_TYPES[body]}
    found = _run(ir.load(tmp_path / "fp16.onnx"), images=images)
    assert 0 < np.square(found - wanted).sum() / np.square(wanted).sum() < 1e-5
