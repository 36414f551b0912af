"""Float32 ONNX in, ONNX with an fp16 or bf16 body out: the pass that writes the types into the graph.

Rules:
1. Inputs and outputs of the model stay fp32.
2. Operators that square, sum up, divide or exponentiate (`_FLOAT32`) run in fp32, and so does arithmetic that serves
   only them. An operator whose schema does not take the body's type stays in fp32 too.
3. QuantizeLinear reads fp32 by the plan's own scale, so that its codes are the plan's. DequantizeLinear gives each
   reader the type that it computes in, by the type of its scale; nothing is cast behind it.
4. A layer with a scale that the body's type holds badly dequantizes and multiplies in fp32, cast behind its product.
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

__all__ = ["Body", "CastBody"]

Body = Literal["fp16", "bf16"]
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FP32 = ir.DataType.FLOAT
_BF16_OPSET = 22  # the first in which Conv and the pools take bfloat16
_WIDEST_CODE = 255

# Squares and sums overflow fp16 (a ViT's activation of 580, squared), and their differences cancel in bf16.
_STATISTICS = {"CumSum", "Exp", "Log", "LpPool", "Pow", "Reciprocal", "Sqrt"}
_STATISTICS |= {f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Mean", "Prod", "Sum", "SumSquare")}
_FLOAT32 = {f"{name}Normalization" for name in ("Batch", "Group", "Instance", "Layer", "Lp", "MeanVariance", "RMS")}
_FLOAT32 |= _STATISTICS | {"Cast", "LogSoftmax", "QuantizeLinear", "Softmax", "Softplus"}
_ARITHMETIC = {"Abs", "Add", "Div", "Mul", "Neg", "Sub"}
_AS_READ = {"ConstantOfShape", "DequantizeLinear"}  # whose type is what their readers want
_BOUNDED = {"Clip", "ConstantOfShape", "Max", "Min", "Where"}  # whose constants are bounds or masks


class CastBody(ir.passes.InPlacePass):
    """Give a float32 model a body of another type; run it last, after `exporters.qdq.InsertQDQ`.

    Args:
        body: The type to compute in.
    """

    def __init__(self, body: Body) -> None:
        super().__init__()
        self._body = body
        self._type = _TYPES[body]
        self._forms: dict[ir.Value, ir.Value] = {}  # a value in the other of the two types

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> ir.passes.PassResult:
        """Run the pass; an ExportError comes out as it is, not as onnx-ir wraps it."""
        try:
            return super().__call__(model_or_result)
        except (ir.passes.PreconditionError, ir.passes.PostconditionError) as wrapped:
            if isinstance(wrapped.__cause__, ExportError):
                raise wrapped.__cause__ from None
            raise

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
            wrong += [v for v in node.inputs if v is not None and node.op_type == "Cast" and _dequantizes(v)]
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
        graph.sort()
        self._forms.clear()
        castable = {node: _castable(node, self._type, model.opset_imports) for node in graph}
        kept = self._kept(graph, castable)
        for node, indices in castable.items():
            for index, value in enumerate(node.inputs):
                wanted = self._type if index in indices and node not in kept else _FP32
                if value is not None and value.dtype in (_FP32, self._type) and value.dtype != wanted:
                    node.replace_input_with(index, self._form(value, node))
            if node not in kept:
                self._give(node)
        for index, value in enumerate(graph.outputs):
            if value.dtype == self._type:
                graph.outputs[index] = self._output(value)
        common.RemoveUnusedNodesPass()(model)
        for value, form in self._forms.items():
            if form.is_initializer() and value.name not in graph.initializers:
                form.name = value.name
        return ir.passes.PassResult(model, modified=True)

    def _kept(self, graph: ir.Graph, castable: Mapping[ir.Node, set[int]]) -> set[ir.Node]:
        """The nodes that stay in fp32."""
        kept: set[ir.Node] = set()
        statistics: set[ir.Node] = set()
        for node in reversed(graph):
            readers = {reader for output in node.outputs for reader in output.consumers()}
            if node.op_type in _STATISTICS or (node.op_type in _ARITHMETIC and readers and readers <= statistics):
                statistics.add(node)
            if node.op_type in _AS_READ:
                stays = bool(readers & kept) or any(output.is_graph_output() for output in node.outputs)
            else:
                stays = node.op_type in _FLOAT32 or node in statistics or not castable[node]
            if stays or any(self._is_coarse(value) for value in node.inputs if _dequantizes(value)):
                kept.add(node)
        return kept

    def _is_coarse(self, dequantized: ir.Value | None) -> bool:
        """Whether the body's type holds the scale of `dequantized` worse than two roundings would, or not at all."""
        assert dequantized is not None
        scale = _array(_producer(dequantized).inputs[1])
        error = np.abs(scale.astype(self._type.numpy()).astype(np.float32) - scale)
        return bool((error > float(self._type.eps) * scale).any() or scale.max() * _WIDEST_CODE > float(self._type.max))

    def _give(self, node: ir.Node) -> None:
        """Let `node` put out the body's type."""
        for output in node.outputs:
            if output.dtype == _FP32:
                output.dtype = self._type
                if node.op_type == "ConstantOfShape":
                    fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
                    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(self._fitted(fill, node, node.name)))

    def _form(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """`value` in the other of the two types: made for its first reader, there for all."""
        if value.is_initializer():
            held = self._fitted(_array(value), reader, value.name)  # each reader may refuse
        if value in self._forms:
            return self._forms[value]
        graph = reader.graph
        assert isinstance(graph, ir.Graph)
        dtype, suffix = (self._type, self._body) if value.dtype == _FP32 else (_FP32, "fp32")
        name = f"{value.name}.{suffix}"
        if value.is_initializer():
            form = ir.val(name, const_value=ir.tensor(held, name=name))
            graph.initializers[name] = form
        else:
            if _dequantizes(value):
                source = _producer(value)
                inputs = [self._form(v, source) if v is not None and v.dtype == _FP32 else v for v in source.inputs]
                node = ir.Node("", source.op_type, inputs, source.attributes, name=name)
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
        _producer(value).append(cast)
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = value.name, _FP32, value.shape
        value.name = f"{value.name}.{self._body}"
        return cast.outputs[0]

    def _fitted(self, values: np.ndarray, reader: ir.Node, name: str | None) -> np.ndarray:
        """Constants of `reader` in the body's type."""
        largest = float(self._type.max)
        finite = np.isfinite(values)
        beyond = values[finite & (np.abs(values) > largest)]
        if reader.op_type not in _BOUNDED and not (reader.op_type == "Add" and (beyond < 0).all()) and beyond.size:
            raise ExportError(
                what=f"`{name}` does not fit into {self._body}: it holds {beyond[np.abs(beyond).argmax()]:.6g}.",
                why=f"the largest number of {self._body} is {largest:.6g}.",
                fix="use --float bf16 or fp32." if self._body == "fp16" else "use --float fp32.",
            )
        held = np.where(finite, np.clip(values, -largest, largest), values).astype(self._type.numpy())
        least = np.nextafter(held.dtype.type(0), held.dtype.type(1))
        return np.where((held == 0) & (values != 0), np.copysign(least, values).astype(held.dtype), held)


def _castable(node: ir.Node, dtype: ir.DataType, opsets: Mapping[str, int]) -> set[int]:
    """Indices of the float inputs of `node` that its schema lets have `dtype`; none of an operator without schema."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
    except onnx.defs.SchemaError:
        return set()
    formal = schema.inputs
    return {
        index
        for index, value in enumerate(node.inputs)
        if value is not None
        and value.dtype == _FP32
        and f"tensor({dtype.name.lower()})" in formal[min(index, len(formal) - 1)].types
    }


def _dequantizes(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _producer(value: ir.Value) -> ir.Node:
    producer = value.producer()
    assert producer is not None
    return producer


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
