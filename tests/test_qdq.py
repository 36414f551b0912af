"""Five lines of ONNX text, the Q/DQ pass, and a count of what is there."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from calibrators.affine import CODES, choose_qparams, fake_quantize
from calibrators.errors import ExportError
from calibrators.plan import QParams, QuantPlan
from exporters.qdq import InsertQDQ

_INT8 = CODES["int8"]
_HEAD = '<ir_version: 10, opset_import: ["": 20]>'
_X = QParams(np.array(0.05, np.float32), np.array(0, np.int8), _INT8, None)
_W = QParams(np.array([0.01, 0.02, 0.03], np.float32), np.zeros(3, np.int8), _INT8, 0)

_LINEAR = """agraph (float[N, 4] x) => (float[N, 3] y) {
    [fc] m = MatMul (x, w)
    y = Add (m, b)
}"""
_RESIDUAL = """agraph (float[N, 3] x) => (float[N, 3] y) {
    [fc] m = MatMul (x, w)
    y = Add (m, x)
}"""
_SHARED = """agraph (float[N, 4] x) => (float[N, 3] y) {
    [one] a = MatMul (x, w)
    [two] b = MatMul (x, v)
    y = Add (a, b)
}"""
_CONV = """agraph (float[N, 2, 5, 5] x) => (float[N, 3, 4, 4] y) {
    [conv] c = Conv (x, w, b)
    y = Relu (c)
}"""
_ATTENTION = """agraph (float[N, 5, 4] q, float[N, 4, 5] k, float[N, 5, 4] v) => (float[N, 5, 4] y) {
    [qk] s = MatMul (q, k)
    p = Softmax (s)
    [av] y = MatMul (p, v)
}"""


def _model(text: str, **constants: np.ndarray) -> ir.Model:
    return ir.from_onnx_text(_HEAD + text, initializers=[ir.tensor(v, name=k) for k, v in constants.items()])


def _plan(sites: Mapping[str, QParams]) -> QuantPlan:
    return QuantPlan(sites, {}, scheme="w8a8", model="m", images="i")


def _quantized(model: ir.Model, sites: Mapping[str, QParams]) -> ir.Model:
    result = InsertQDQ(_plan(sites))(model)
    assert result.modified
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    return result.model


def _ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def _run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, feeds)[0]
    return found


def _values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _covering(values: np.ndarray, codes_name: str, axis: int | None = None) -> QParams:
    rest = None if axis is None else tuple(i for i in range(values.ndim) if i != axis)
    return QParams(*choose_qparams(values.min(rest), values.max(rest), CODES[codes_name]), CODES[codes_name], axis)


def _rounded(values: np.ndarray, q: QParams, axis: int | None = None) -> np.ndarray:
    rounded: np.ndarray = fake_quantize(values, *replace(q, axis=axis).along(values.ndim), q.codes)
    return rounded


def test_a_linear_layer_gets_one_pair_and_one_dequantized_weight() -> None:
    model = _quantized(_model(_LINEAR, w=_values(4, 3), b=_values(3)), {"fc.input": _X, "fc.weight": _W})
    assert _ops(model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Add": 1}
    stored = model.graph.initializers["fc.weight.int8"].const_value
    assert stored is not None
    assert stored.dtype == ir.DataType.INT8
    assert "w" not in model.graph.initializers, "the float weight stays behind"


def test_the_bias_stays_float() -> None:
    model = _quantized(_model(_LINEAR, w=_values(4, 3), b=_values(3)), {"fc.input": _X, "fc.weight": _W})
    (add,) = (node for node in model.graph if node.op_type == "Add")
    assert add.inputs[1] is model.graph.initializers["b"]


def test_layers_that_read_one_tensor_get_a_pair_each() -> None:
    sites = {"one.input": _X, "one.weight": _W, "two.input": _X, "two.weight": _W}
    model = _quantized(_model(_SHARED, w=_values(4, 3), v=_values(4, 3)), sites)
    assert _ops(model) == {"QuantizeLinear": 2, "DequantizeLinear": 4, "MatMul": 2, "Add": 1}
    assert [node.inputs[0] for node in model.graph if node.op_type == "QuantizeLinear"] == 2 * [model.graph.inputs[0]]
    for layer in ("one", "two"):
        assert _node(model, f"{layer}.input.dequantize").outputs[0].consumers() == (_node(model, layer),)


def test_a_residual_reader_keeps_the_float_tensor() -> None:
    model = _quantized(_model(_RESIDUAL, w=_values(3, 3)), {"fc.input": _X, "fc.weight": _W})
    (add,) = (node for node in model.graph if node.op_type == "Add")
    assert add.inputs[1] is model.graph.inputs[0]


def test_a_layer_that_the_plan_does_not_name_is_left_alone() -> None:
    sites = {"two.input": _X, "two.weight": _W}
    model = _quantized(_model(_SHARED, w=_values(4, 3), v=_values(4, 3)), sites)
    assert [value.name for value in _node(model, "one").inputs if value is not None] == ["x", "w"]


def test_a_convolution_gets_a_pair_behind_it_too() -> None:
    sites = {"conv.input": _X, "conv.weight": _W, "conv.output": _X}
    model = _quantized(_model(_CONV, w=_values(3, 2, 2, 2), b=_values(3)), sites)
    assert _ops(model) == {"QuantizeLinear": 2, "DequantizeLinear": 3, "Conv": 1, "Relu": 1}
    (relu,) = (node for node in model.graph if node.op_type == "Relu")
    assert relu.inputs[0] is not None
    assert relu.inputs[0].producer() is _node(model, "conv.output.dequantize")


@pytest.mark.parametrize(
    ("text", "shape", "layer", "axis"), [(_LINEAR, (4, 3), "fc", 1), (_CONV, (3, 2, 2, 2), "conv", 0)]
)
def test_weight_scales_lie_along_the_output_channels(text: str, shape: tuple[int, ...], layer: str, axis: int) -> None:
    sites = {f"{layer}.input": _X, f"{layer}.weight": _W} | ({"conv.output": _X} if layer == "conv" else {})
    model = _quantized(_model(text, w=_values(*shape), b=_values(3)), sites)
    assert _node(model, f"{layer}.weight.dequantize").attributes["axis"].as_int() == axis


def test_both_operands_of_an_attention_matmul_are_quantized() -> None:
    sites = {f"{matmul}.{side}": _X for matmul in ("qk", "av") for side in ("lhs", "rhs")}
    model = _quantized(_model(_ATTENTION), sites)
    assert _ops(model) == {"QuantizeLinear": 4, "DequantizeLinear": 4, "MatMul": 2, "Softmax": 1}
    read = {value.producer() for matmul in ("qk", "av") for value in _node(model, matmul).inputs if value is not None}
    assert read == {_node(model, f"{site}.dequantize") for site in sites}


@pytest.mark.parametrize("codes", ["int8", "uint8"])
def test_a_quantized_linear_layer_computes_what_the_formulas_say(codes: str) -> None:
    x, w, b = _values(64, 4), _values(4, 3, seed=1), _values(3, seed=2)
    sites = {"fc.input": _covering(x[:32], codes), "fc.weight": _covering(w.T, "int8", 0)}  # the rest saturates
    found = _run(_quantized(_model(_LINEAR, w=w, b=b), sites), x=x)
    wanted = _rounded(x, sites["fc.input"]) @ _rounded(w, sites["fc.weight"], axis=1) + b
    assert not np.allclose(wanted, x @ w + b, atol=1e-4)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_quantized_convolution_computes_what_the_formulas_say() -> None:
    x, w, b = _values(2, 2, 5, 5), _values(3, 2, 2, 2, seed=1), _values(3, seed=2)
    plain = _run(_model(_CONV, w=w, b=b), x=x)
    sites = {"conv.input": _covering(x, "int8"), "conv.weight": _covering(w, "int8", 0)}
    rounded = _model(_CONV, w=_rounded(w, sites["conv.weight"], axis=0), b=b)
    wanted = _run(rounded, x=_rounded(x, sites["conv.input"]))
    sites["conv.output"] = _covering(plain, "int8")
    step = float(sites["conv.output"].scale)
    found = _run(_quantized(_model(_CONV, w=w, b=b), sites), x=x)
    np.testing.assert_allclose(found / step, np.rint(found / step), atol=1e-4, err_msg="the output is off its grid")
    off = np.abs(found - np.rint(wanted / step) * step) / step
    assert off.max() < 1.01, "a tie may fall either way, no more"
    assert (off > 0.5).mean() < 0.03


def test_quantized_attention_matmuls_compute_what_the_formulas_say() -> None:
    q, k, v = _values(2, 5, 4), _values(2, 4, 5, seed=1), _values(2, 5, 4, seed=2)
    sites = {name: _covering(values, "int8") for name, values in {"qk.lhs": q, "qk.rhs": k, "av.rhs": v}.items()}
    sites["av.lhs"] = QParams(np.array(1 / 127, np.float32), np.array(0, np.int8), _INT8, None)
    scores = _rounded(q, sites["qk.lhs"]) @ _rounded(k, sites["qk.rhs"])
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    wanted = _rounded(shares, sites["av.lhs"]) @ _rounded(v, sites["av.rhs"])
    found = _run(_quantized(_model(_ATTENTION), sites), q=q, k=k, v=v)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_model_that_is_quantized_already_is_refused() -> None:
    sites = {"fc.input": _X, "fc.weight": _W}
    model = _quantized(_model(_LINEAR, w=_values(4, 3), b=_values(3)), sites)
    with pytest.raises(ExportError, match="quantized already"):
        InsertQDQ(_plan(sites))(model)


def test_a_plan_of_another_model_is_refused_by_the_name_of_its_layer() -> None:
    model = _model(_LINEAR, w=_values(4, 3), b=_values(3))
    with pytest.raises(ExportError, match=r"`blocks\.0\.fc`, which the model does not have \(1 in all\)"):
        InsertQDQ(_plan({"fc.input": _X, "fc.weight": _W, "blocks.0.fc.input": _X}))(model)
    assert _ops(model) == {"MatMul": 1, "Add": 1}, "the model was changed all the same"


@pytest.mark.parametrize(
    ("text", "sites"), [(_LINEAR, ["fc.input"]), (_LINEAR, ["fc.weight"]), (_ATTENTION, ["qk.lhs"])], ids=str
)
def test_half_a_pair_of_operands_is_refused(text: str, sites: list[str]) -> None:
    model = _model(text, w=_values(4, 3), b=_values(3)) if text == _LINEAR else _model(text)
    with pytest.raises(ExportError, match="still reads a float tensor"):
        InsertQDQ(_plan({site: _W if site.endswith("weight") else _X for site in sites}))(model)


def test_an_output_of_the_model_cannot_be_quantized() -> None:
    text = "agraph (float[N, 2, 5, 5] x) => (float[N, 3, 4, 4] y) { [conv] y = Conv (x, w) }"
    sites = {"conv.input": _X, "conv.weight": _W, "conv.output": _X}
    with pytest.raises(ExportError, match=r"`conv\.output` is the model's output"):
        InsertQDQ(_plan(sites))(_model(text, w=_values(3, 2, 2, 2)))
