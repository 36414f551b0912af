"""Packed weights made floats in the file: where only floats meet them, to the same values, and nowhere else."""

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from exporters.ort_engine import session_options
from exporters.unpack import unpack_weights

_TEXT = """
<ir_version: 10, opset_import: ["": 21]>
agraph (float[N, 64] images) => (float[N, 32] logits) {
    [scale] wide = Cast <to = 1> (short_scale)
    [first] packed = DequantizeLinear <axis = 0, block_size = 32> (codes, wide, zero)
    [fc1] sums = MatMul (images, packed)
    [second] by_channel = DequantizeLinear <axis = 1> (channels, channel_scale)
    [fc2] more = MatMul (sums, by_channel)
    [q] rounded = QuantizeLinear (more, step, nought)
    [dq] steps = DequantizeLinear (rounded, step, nought)
    [third] kept = DequantizeLinear <axis = 1> (channels, channel_scale)
    [fc3] logits = MatMul (steps, kept)
}
"""


def _model() -> ir.Model:
    rng, model = np.random.default_rng(0), ir.from_proto(onnx.parser.parse_model(_TEXT))
    constants = {
        "codes": rng.integers(0, 16, (64, 32)).astype(ml_dtypes.uint4),
        "zero": rng.integers(0, 16, (2, 32)).astype(ml_dtypes.uint4),
        "short_scale": rng.uniform(0.01, 0.1, (2, 32)).astype(np.float16),
        "channels": rng.integers(-128, 128, (32, 32)).astype(np.int8),
        "channel_scale": rng.uniform(0.001, 0.01, 32).astype(np.float32),
        "step": np.float32(0.02),
        "nought": np.int8(0),
    }
    by_name = {str(value.name): value for node in model.graph for value in node.inputs if value is not None}
    for name, array in constants.items():
        by_name[name].const_value = ir.tensor(np.asarray(array), name=name)
        model.graph.initializers[name] = by_name[name]
    return model


def _run(model: ir.Model, options: onnxruntime.SessionOptions) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    found: np.ndarray = session.run(None, {"images": np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)})[
        0
    ]
    return found


def test_weights_that_floats_meet_become_floats_of_the_same_value() -> None:
    wanted = _run(_model(), session_options(exact=True))
    model = _model()
    assert unpack_weights(model) == 2
    assert Counter(node.op_type for node in model.graph) == {"MatMul": 3, "QuantizeLinear": 1, "DequantizeLinear": 2}
    assert "codes" not in model.graph.initializers, "what nobody reads any more is gone"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_array_equal(_run(model, session_options(exact=True)), wanted)


def test_a_weight_is_kept_as_long_as_one_of_its_users_has_quantized_input() -> None:
    model = _model()
    nodes = {node.name: node for node in model.graph}
    nodes["fc2"].replace_input_with(1, nodes["third"].outputs[0])  # shared with fc3
    unpack_weights(model)
    assert [node.name for node in model.graph if node.op_type == "DequantizeLinear"] == ["dq", "third"]


def test_weights_of_a_narrow_body_are_as_narrow() -> None:
    text = _TEXT.replace("float[", "float16[").replace("to = 1", "to = 10")
    model = ir.from_proto(onnx.parser.parse_model(text))
    for name, value in _model().graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(())
        narrow = array.astype(np.float16) if array.dtype == np.float32 else array
        here = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        here.const_value = ir.tensor(narrow, name=name)
        model.graph.initializers[name] = here
    assert unpack_weights(model) == 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
