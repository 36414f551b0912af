"""One layer cut out of a quantized model, as a model of its own.

An engine and its reference drift apart through a whole network however equal each layer is, because rounding flips
compound. Fed the same input, a layer must agree to float32 rounding, and that can be tested.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime

from exporters.ort_engine import session_options

__all__ = ["LayerCutter"]


class LayerCutter:
    """Layers of a Q/DQ model, run one by one in ONNX Runtime.

    Args:
        model: The quantized model, its nodes named by layer.
        exact: Compute Q/DQ operator by operator instead of with ONNX Runtime's integer kernels.
    """

    def __init__(self, model: ir.Model, *, exact: bool = False) -> None:
        self._model = model
        self._exact = exact
        self._nodes = {node.name: node for node in model.graph}

    def run(self, layer: str, operands: list[np.ndarray]) -> np.ndarray:
        """What `layer` puts out, bias included, for float operands as they reach it or its Q/DQ, float32."""
        node = self._nodes[layer]
        inputs = [_before_qdq(value) for value in node.inputs[: len(operands)] if value is not None]
        output = _output_of(node, weighted=len(operands) == 1)
        graph = ir.convenience.extract(self._model.graph, inputs, [output])
        feeds = {}
        for value, operand in zip(graph.inputs, operands, strict=True):
            dtype = value.dtype or ir.DataType.FLOAT
            # the batch stays open, as in the whole model: ONNX Runtime fuses otherwise what it would not fuse there
            value.shape, value.dtype = ir.Shape(["batch", *operand.shape[1:]]), dtype
            feeds[str(value.name)] = operand.astype(dtype.numpy())
        for value in (output for inner in graph for output in inner.outputs):
            value.shape = None  # recorded for the whole model; an operand may come with one axis less
        cut = ir.external_data.load_to_model(ir.Model(graph, ir_version=self._model.ir_version))  # it lies in no folder
        proto = ir.to_proto(cut).SerializeToString()
        options = session_options(exact=self._exact)
        session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        found: np.ndarray = session.run(None, feeds)[0]
        return found.astype(np.float32)


def _before_qdq(value: ir.Value) -> ir.Value:
    """The float tensor that DequantizeLinear(QuantizeLinear(tensor)) gives back rounded; others as they are."""
    for op_types in ({"DequantizeLinear"}, {"QuantizeLinear", "DynamicQuantizeLinear"}):
        producer = value.producer()
        if producer is None or producer.op_type not in op_types or producer.inputs[0] is None:
            return value
        value = producer.inputs[0]
    return value


def _output_of(node: ir.Node, *, weighted: bool) -> ir.Value:
    """What a layer puts out: a convolution's after its output's Q/DQ, another layer's with weights after its bias."""
    value = node.outputs[0]
    following = ["QuantizeLinear", "DequantizeLinear"] if node.op_type == "Conv" else ["Add"] if weighted else []
    for op_type in following:
        users = value.consumers()
        if len(users) != 1 or users[0].op_type != op_type:
            break
        others = [v.const_value for v in users[0].inputs if v is not None and v is not value]
        if op_type == "Add" and not all(constant is not None and len(constant.shape) == 1 for constant in others):
            break
        value = users[0].outputs[0]
    return value
