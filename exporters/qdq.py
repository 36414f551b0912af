"""Float ONNX and a plan in, quantized ONNX out: the pass that writes explicit Q/DQ.

Rules:
1. Each quantized layer reads its input through a QuantizeLinear -> DequantizeLinear of its own, also where two layers
   read one tensor: ONNX Runtime fuses neither of two layers that share a pair. Other readers of the tensor (a residual
   Add) keep the float one.
2. Its weight is stored as codes and read through one DequantizeLinear, per output channel or in blocks of input
   channels; a scheme that leaves activations in float writes nothing else.
3. A convolution's output passes a pair of its own, since run-times fuse an INT8 convolution only then.
4. The operands of an attention matmul are treated like inputs, both or neither.
5. Biases, residual sums, LayerNorm, softmax and GELU stay float; a run-time rounds the bias of a convolution of rule 3.
"""

import numpy as np
import onnx_ir as ir

from calibrators.affine import Codes, quantize
from calibrators.errors import ExportError
from calibrators.plan import QParams, QuantPlan, layer_of
from calibrators.scheme import SCHEMES
from exporters.contract import ContractPass

__all__ = ["InsertQDQ"]

_BLOCKED_OPSET = 21  # the first whose DequantizeLinear knows blocks


class InsertQDQ(ContractPass):
    """Write a plan into a float model whose nodes are named by layer (see `exporters.to_onnx`)."""

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self._plan = plan

    def requires(self, model: ir.Model) -> None:
        """Every layer of the plan is a node of the graph, and no Q/DQ is there yet.

        Raises:
            ExportError: The model and the plan do not belong together.
        """
        ops = {node.op_type for node in model.graph}
        if "QuantizeLinear" in ops or "DequantizeLinear" in ops:
            raise ExportError(
                what="the model is quantized already.",
                why="it holds Q/DQ nodes.",
                fix="start from float.onnx.",
            )
        missing = [layer for layer in self._plan.layers if layer not in {node.name for node in model.graph}]
        if missing:
            raise ExportError(
                what=f"the plan quantizes `{missing[0]}`, which the model does not have ({len(missing)} in all).",
                why="the plan was made for another model.",
                fix="make the plan from the same --model and --checkpoint.",
            )

    def ensures(self, model: ir.Model) -> None:
        """Every layer reads only quantized tensors; where scheme or block say weights alone, activations are float.

        Raises:
            ExportError: A planned site was not written.
        """
        nodes = {node.name: node for node in model.graph}
        scheme = SCHEMES.get(self._plan.scheme)
        alone = scheme is not None and scheme.activation is None
        for layer in self._plan.layers:
            weight = self._plan.sites.get(f"{layer}.weight")
            weight_only = weight is not None and (alone or weight.block is not None)
            for value in nodes[layer].inputs[1 if weight_only else 0 : 2]:
                producer = value.producer() if value is not None else None
                if producer is None or producer.op_type != "DequantizeLinear":
                    raise ExportError(
                        what=f"`{layer}` still reads a float tensor.",
                        why="its plan names only one of its two operands.",
                        fix="make the plan again with `dfq-deploy calibrate`.",
                    )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the pairs, in place."""
        if any(qparams.block for qparams in self._plan.sites.values()):
            model.opset_imports[""] = _BLOCKED_OPSET
        nodes = {node.name: node for node in model.graph}
        for site, qparams in self._plan.sites.items():
            node = nodes[layer_of(site)]
            if site.endswith(".weight"):
                self._quantize_weight(model.graph, node, site, qparams)
            elif site.endswith(".output"):
                self._quantize_output(node, site, qparams)
            else:
                self._quantize_input(node, 1 if site.endswith(".rhs") else 0, site, qparams)
        model.graph.sort()
        return ir.passes.PassResult(model, modified=bool(self._plan.sites))

    def _quantize_input(self, node: ir.Node, index: int, site: str, qparams: QParams) -> None:
        source = node.inputs[index]
        assert source is not None
        node.replace_input_with(index, _pair(source, site, qparams, before=node))

    @staticmethod
    def _quantize_output(node: ir.Node, site: str, qparams: QParams) -> None:
        source = node.outputs[0]
        readers = list(source.uses())
        if source.is_graph_output():
            raise ExportError(
                what=f"`{site}` is the model's output and cannot be quantized.",
                why="outputs leave the engine as float32.",
                fix="spare the layer.",
            )
        dequantized = _pair(source, site, qparams, before=readers[0].node)
        for reader in readers:
            reader.node.replace_input_with(reader.idx, dequantized)

    @staticmethod
    def _quantize_weight(graph: ir.Graph, node: ir.Node, site: str, qparams: QParams) -> None:
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        transposed = node.op_type == "MatMul"  # MatMul holds (in, out), plans speak of torch's (out, in)
        values = weight.const_value.numpy().T if transposed else weight.const_value.numpy()
        codes = quantize(values, *qparams.along(values.ndim), qparams.codes).astype(qparams.codes.name)
        constants = [
            _constant(graph, f"{site}.{qparams.codes.name}", codes, transposed),
            *_constants(graph, site, qparams, transposed),
        ]
        axis = 1 if transposed else 0
        attributes = {"axis": axis} if qparams.block is None else {"axis": 1 - axis, "block_size": qparams.block}
        dequantize = ir.node("DequantizeLinear", constants, attributes=attributes, name=f"{site}.dequantize")
        dequantize.outputs[0].dtype, dequantize.outputs[0].shape = ir.DataType.FLOAT, weight.shape
        graph.insert_before(node, dequantize)
        node.replace_input_with(1, dequantize.outputs[0])
        if not weight.uses():
            del graph.initializers[str(weight.name)]


def _pair(source: ir.Value, site: str, qparams: QParams, *, before: ir.Node) -> ir.Value:
    """`source` through a quantize and a dequantize operator, put into the graph before `before`."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    if qparams.dynamic:
        quantized = ir.node("DynamicQuantizeLinear", [source], num_outputs=3, name=f"{site}.quantize")
        found = list(quantized.outputs[1:])
        for value, dtype in zip(found, (ir.DataType.FLOAT, _onnx_type(qparams.codes)), strict=True):
            value.dtype, value.shape = dtype, ir.Shape([])
    else:
        found = _constants(graph, site, qparams)
        quantized = ir.node("QuantizeLinear", [source, *found], name=f"{site}.quantize")
    dequantized = ir.node("DequantizeLinear", [quantized.outputs[0], *found], name=f"{site}.dequantize")
    graph.insert_before(before, [quantized, dequantized])
    quantized.outputs[0].dtype, quantized.outputs[0].shape = _onnx_type(qparams.codes), source.shape
    dequantized.outputs[0].dtype, dequantized.outputs[0].shape = ir.DataType.FLOAT, source.shape
    return dequantized.outputs[0]


def _constants(graph: ir.Graph, site: str, qparams: QParams, transposed: bool = False) -> list[ir.Value]:
    """Initializers `<site>.scale` and `<site>.zero_point`."""
    return [
        _constant(graph, f"{site}.scale", qparams.scale, transposed),
        _constant(graph, f"{site}.zero_point", qparams.zero_point.astype(qparams.codes.name), transposed),
    ]


def _constant(graph: ir.Graph, name: str, values: np.ndarray, transposed: bool) -> ir.Value:
    array = np.ascontiguousarray(values.T) if transposed else np.array(values)
    constant = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.initializers[name] = constant
    return constant


def _onnx_type(codes: Codes) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(codes.name))
