"""Float32 ONNX in, ONNX with an fp16 or bf16 body out: the pass that writes the types into the graph.

Rules:
1. Inputs and outputs of the model stay fp32.
2. Operators that square, sum up, divide or exponentiate (`_FLOAT32`) run in fp32, and so does arithmetic that serves
   only them. So does an operator whose schema does not take the body's type.
3. A quantized layer runs in fp32 from its QuantizeLinear to its bias: its codes and scales are the plan's, and its
   integer GEMM puts out fp32. (With scales in fp16, TensorRT lets the bare integer sums leave the GEMM in fp16; half
   of DeiT-T's layers have sums beyond 65504.)
4. The DequantizeLinear of a weight alone gives the body's type, by the type of its scale. Nothing is ever cast between
   a DequantizeLinear and its reader.
5. A constant is cast under its own name; one that does not fit is refused. Bounds and masks become the largest finite
   value instead. What is infinite stays so, and what is not 0 does not become 0.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.version_converter import ConvertVersionPass

from calibrators.errors import ExportError
from exporters.contract import ContractPass

__all__ = ["CastBody", "NarrowBody", "widen"]

NarrowBody = Literal["fp16", "bf16"]
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FP32 = ir.DataType.FLOAT
_BF16_OPSET = 22  # the first in which Conv and the pools take bfloat16
_WIDEST_CODE = 128  # an INT8 weight may be its scale times this

# Squares and sums overflow fp16 (a ViT's activation of 580, squared), and their differences cancel in bf16.
_STATISTICS = {"CumSum", "Exp", "Log", "LpPool", "Pow", "Reciprocal", "Sqrt"}
_STATISTICS |= {f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Mean", "Prod", "Sum", "SumSquare")}
_FLOAT32 = {f"{name}Normalization" for name in ("Batch", "Group", "Instance", "Layer", "Lp", "MeanVariance", "RMS")}
_FLOAT32 |= _STATISTICS | {"Cast", "LogSoftmax", "QuantizeLinear", "Softmax", "Softplus"}
_ARITHMETIC = {"Abs", "Add", "Div", "Mul", "Neg", "Sub"}
_ANY = {"Shape", "Size"}  # which read a tensor of either type alike
_BOUNDED = {"Clip", "ConstantOfShape", "Max", "Min", "Where"}  # whose constants are bounds or masks


class CastBody(ContractPass):
    """Give a float32 model a body of another type; run it last, after `exporters.qdq.InsertQDQ`.

    Args:
        body: The type to compute in.
    """

    def __init__(self, body: NarrowBody) -> None:
        super().__init__()
        self._body = body
        self._type = _TYPES[body]
        self._forms: dict[ir.Value, ir.Value] = {}  # a value in the other of the two types

    def requires(self, model: ir.Model) -> None:
        """The model computes in float32, all of it in the main graph.

        Raises:
            ExportError: It does not.
        """
        for node in model.graph.all_nodes():
            inner = node.graph is not model.graph
            types = {value.dtype for value in node.outputs}
            if types & {*_TYPES.values(), ir.DataType.DOUBLE} or (inner and types & {_FP32, None}):
                raise ExportError(
                    what=f"`{node.name or node.op_type}` cannot be cast to {self._body}.",
                    why="it is inside a branch or a loop." if inner else "it does not compute in float32.",
                    fix="use --float fp32.",
                )

    def ensures(self, model: ir.Model) -> None:
        """Inputs and outputs are fp32, and nothing is cast between a DequantizeLinear and its reader.

        Raises:
            ExportError: They are not, or something is.
        """
        wrong = [value for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype == self._type]
        for node in model.graph:
            wrong += [v for v in node.inputs if v is not None and node.op_type == "Cast" and _is_dequantized(v)]
        if wrong:
            raise ExportError(
                what=f"`{wrong[0].name}` is cast where it may not be.",
                why="inputs and outputs are fp32, and what DequantizeLinear gives is read as it is.",
                fix="use --float fp32, or report this model.",
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cast the body, in place."""
        graph = model.graph
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        if self._body == "bf16" and model.opset_imports[""] < _BF16_OPSET:
            ConvertVersionPass(_BF16_OPSET)(model)
        common.ShapeInferencePass()(model)
        _check_types(graph)
        graph.sort()
        self._forms = {}
        castable = {node: _castable(node, self._type, model.opset_imports) for node in graph}
        kept = _kept(graph, castable)
        for node, indices in castable.items():
            if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == _FP32 and "value" in node.attributes:
                fill = self._fitted(node.attributes["value"].as_tensor().numpy(), node, str(node.name))
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill.astype(np.float32)))
            if node.op_type not in _ANY:
                self._cast(node, set() if node in kept else indices)
            for output in node.outputs:
                if output.dtype == _FP32 and node not in kept:
                    output.dtype = self._type
        for index, value in enumerate(graph.outputs):
            if value.dtype == self._type:
                graph.outputs[index] = self._output(value)
        common.RemoveUnusedNodesPass()(model)
        for value, form in self._forms.items():
            if form.is_initializer() and value.name not in graph.initializers:
                form.name = value.name
        return ir.passes.PassResult(model, modified=True)

    def _cast(self, node: ir.Node, indices: set[int]) -> None:
        """Let `node` read the body's type at `indices` and fp32 elsewhere."""
        for index, value in enumerate(node.inputs):
            wanted = self._type if index in indices else _FP32
            if value is not None and value.dtype in (_FP32, self._type) and value.dtype != wanted:
                node.replace_input_with(index, self._form(value, node))

    def _form(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """`value` in the other of the two types: made for its first reader, there for all."""
        constant = value.const_value if value.is_initializer() else None
        held = None if constant is None else self._fitted(constant.numpy(), reader, str(value.name))  # or refused
        if value in self._forms:
            return self._forms[value]
        graph, source = reader.graph, value.producer()
        assert isinstance(graph, ir.Graph)
        dtype, suffix = (self._type, self._body) if value.dtype == _FP32 else (_FP32, "fp32")
        name = f"{value.name}.{suffix}"
        if held is not None:
            form = ir.val(name, const_value=ir.tensor(held, name=name))
            graph.initializers[name] = form
        else:
            if source is not None and source.op_type == "DequantizeLinear":
                inputs = [self._form(v, source) if v is not None and v.dtype == _FP32 else v for v in source.inputs]
                node = ir.Node("", source.op_type, inputs, source.attributes, name=f"{source.name}.{suffix}")
            else:
                node = ir.node("Cast", [value], {"to": dtype}, name=name)
            graph.insert_before(reader, node)
            form = node.outputs[0]
            form.name, form.dtype, form.shape = name, dtype, value.shape
        self._forms[value] = form
        return form

    def _output(self, value: ir.Value) -> ir.Value:
        """An fp32 output of the model under the name of `value`, which has the body's type."""
        cast = ir.node("Cast", [value], {"to": _FP32}, name=f"{value.name}.fp32")
        producer = value.producer()
        assert producer is not None
        producer.append(cast)
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = value.name, _FP32, value.shape
        value.name = f"{value.name}.{self._body}"
        return cast.outputs[0]

    def _fitted(self, values: np.ndarray, reader: ir.Node, name: str) -> np.ndarray:
        """A constant that `reader` reads, in the body's type."""
        largest = float(self._type.max)
        limit = largest / (_WIDEST_CODE if reader.op_type == "DequantizeLinear" else 1)
        finite = np.isfinite(values)
        beyond = values[finite & (np.abs(values) > limit)]
        mask = reader.op_type == "Add" and bool((beyond < 0).all())
        if beyond.size and not mask and reader.op_type not in _BOUNDED:
            raise ExportError(
                what=f"`{name}` does not fit into {self._body}: it holds {beyond[np.abs(beyond).argmax()]:.6g}.",
                why=f"the largest number that fits there is {limit:.6g}.",
                fix="use --float bf16 or fp32." if self._body == "fp16" else "use --float fp32.",
            )
        held = np.where(finite, np.clip(values, -largest, largest), values).astype(self._type.numpy())
        least = np.nextafter(held.dtype.type(0), held.dtype.type(1))
        return np.where((held == 0) & (values != 0), np.copysign(least, values).astype(held.dtype), held)


def _check_types(graph: ir.Graph) -> None:
    for node in graph:
        if any(value.dtype is None and (value.uses() or value.is_graph_output()) for value in node.outputs):
            raise ExportError(
                what=f"`{node.name or node.op_type}` cannot be cast.",
                why=f"what type {node.op_type} puts out is not known.",
                fix="use --float fp32.",
            )


def widen(model: ir.Model) -> None:
    """Let a model with a bf16 body compute in fp32 with the constants that it has, in place.

    For run-times without bf16. Only constants are rounded then, not what passes between operators.
    """
    bf16 = ir.DataType.BFLOAT16
    for initializer in model.graph.initializers.values():
        if initializer.dtype == bf16:
            assert initializer.const_value is not None
            array = initializer.const_value.numpy().astype(np.float32)
            initializer.const_value, initializer.dtype = ir.tensor(array, name=initializer.name), _FP32
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == bf16:
            node.attributes["to"] = ir.AttrInt64("to", _FP32)
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            fill = node.attributes["value"].as_tensor().numpy()
            wide = fill.astype(np.float32) if fill.dtype == bf16.numpy() else fill
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(wide))
        for output in node.outputs:
            if output.dtype == bf16:
                output.dtype = _FP32


def _kept(graph: ir.Graph, castable: Mapping[ir.Node, set[int]]) -> set[ir.Node]:
    """The nodes that stay in fp32."""
    products = {node for node in graph if sum(map(_is_dequantized, node.inputs)) > 1}
    kept = products | {node for node in graph if node.op_type in _FLOAT32 or not castable[node]}
    for reader in (reader for product in products for reader in product.outputs[0].consumers()):
        if reader.op_type == "Add" and any(v is not None and v.is_initializer() for v in reader.inputs):
            kept.add(reader)  # the bias
    statistics: set[ir.Node] = set()
    for node in reversed(graph):
        readers = {reader for output in node.outputs for reader in output.consumers()}
        if node.op_type in _STATISTICS or (node.op_type in _ARITHMETIC and readers and readers <= statistics):
            statistics.add(node)
        for_kept = node.op_type == "DequantizeLinear" and (readers & kept or node.outputs[0].is_graph_output())
        if node in statistics or for_kept:
            kept.add(node)
    return kept


def _castable(node: ir.Node, dtype: ir.DataType, opsets: Mapping[str, int]) -> set[int]:
    """Indices of the float inputs of `node` that its schema lets have `dtype`; none of an operator without schema."""
    try:
        formal = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain).inputs
    except onnx.defs.SchemaError:
        return set()
    name = f"tensor({dtype.name.lower()})"
    floats = [index for index, value in enumerate(node.inputs) if value is not None and value.dtype == _FP32]
    return {index for index in floats if name in formal[min(index, len(formal) - 1)].types}


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
