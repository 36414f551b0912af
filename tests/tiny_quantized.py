"""Models of a few operators, written as ONNX text, with a plan for them: what the TensorRT tests refuse and build."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from calibrators.affine import CODES, choose_qparams
from calibrators.plan import QParams, QuantPlan
from exporters.qdq import InsertQDQ
from exporters.tensorrt.log import Recorder, recorder

_LINEAR = """agraph (float[N, 16, 64] images) => (float[N, 16, 96] logits) {
    [fc] sums = MatMul (images, w)
    [bias] biased = Add (sums, b)
    [end] logits = Relu (biased)
}"""
_ATTENTION = """agraph (float[N, 16, 64] images) => (float[N, 2, 16, 32] logits) {
    [qkv] sums = MatMul (images, w)
    [bias] biased = Add (sums, b)
    [heads] split = Reshape (biased, shape)
    [turned] parts = Transpose <perm = [2, 0, 3, 1, 4]> (split)
    [q] first = Gather <axis = 0> (parts, zero)
    [k] second = Gather <axis = 0> (parts, one)
    [v] third = Gather <axis = 0> (parts, two)
    [kt] columns = Transpose <perm = [0, 1, 3, 2]> (second)
    [qk] scores = MatMul (first, columns)
    [softmax] shares = Softmax (scores)
    [av] logits = MatMul (shares, third)
}"""
_INDICES = {"shape": np.array([-1, 16, 3, 2, 32]), "zero": np.array(0), "one": np.array(1), "two": np.array(2)}
_FORMATS = {"w8a8": ("int8", "int8"), "w8a8_fp8": ("float8_e4m3fn", "float8_e4m3fn"), "w4a16": ("int4", None)}


def values(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal values, other ones for every seed."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def written(text: str, *, opset: int = 20, **constants: np.ndarray) -> ir.Model:
    """The model in `text` with these initializers, its types inferred."""
    head = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
    proto = onnx.parser.parse_model(head + text)
    proto.graph.initializer.extend(ir.to_proto(ir.tensor(v, name=name)) for name, v in constants.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def float_model(layer: str) -> ir.Model:
    """A linear layer `fc` with a ReLU, or an attention whose `qkv` is cut in three."""
    if layer == "fc":
        return written(_LINEAR, w=_weight(layer), b=values(96, seed=1))
    constants: dict[str, Any] = {"w": _weight(layer), "b": values(192, seed=1), **_INDICES}
    return written(_ATTENTION, **constants)


def plan_for(layer: str, scheme: str = "w8a8", *, block: int = 16) -> QuantPlan:
    """A plan for the layer with a weight of `float_model(layer)`."""
    weight, activation = _FORMATS[scheme]
    rows = _weight(layer).T  # (out, in), as torch has it
    sites = {} if activation is None else {f"{layer}.input": _ranged(np.array(4.0), activation, None)}
    if scheme == "w4a16":
        sites[f"{layer}.weight"] = _ranged(np.abs(rows.reshape(len(rows), -1, block)).max(-1), weight, 0, block)
    else:
        sites[f"{layer}.weight"] = _ranged(np.abs(rows).max(-1), weight, 0)
    return QuantPlan(sites, {}, scheme=scheme, model="m", images="i")


def quantized(layer: str, plan: QuantPlan) -> ir.Model:
    """`float_model(layer)` under `plan`."""
    return InsertQDQ(plan)(float_model(layer)).model


def asked(trt: Any, model: Path, target: str = "SM89") -> tuple[Any, Recorder]:
    """What TensorRT for RTX itself makes of a model, none of our rules before it: engine or None, and its log."""
    log = recorder(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        return None, log
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for images in map(network.get_input, range(network.num_inputs)):
        profile.set_shape(images.name, *[(n, *tuple(images.shape)[1:]) for n in (1, 2, 4)])
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    return builder.build_serialized_network(network, config), log


def _weight(layer: str) -> np.ndarray:
    return values(64, 96 if layer == "fc" else 192) / 8


def _ranged(largest: np.ndarray, codes: str, axis: int | None, block: int | None = None) -> QParams:
    return QParams(*choose_qparams(-largest, largest, CODES[codes]), CODES[codes], axis, block)
