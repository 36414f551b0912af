"""Weights that a model keeps packed, as floats: for run-times that cannot be told to compute with them as floats.

A layer of which only the weights are quantized multiplies floats. ONNX Runtime's own kernel for it rounds activations
to INT8 unless a session option forbids it, and not every server passes session options on. Where the weights are floats
in the file there is nothing to round. Layers whose inputs are quantized too stay as they are.
"""

from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["unpack_weights"]


def unpack_weights(model: ir.Model) -> int:
    """Replace, in place, weights that meet float inputs by what they stand for; returns how many there were."""
    packed = [node for node in model.graph if _is_packed_weight(node) and not _meets_quantized(node)]
    for node in packed:
        (output,) = node.outputs
        name = str(output.name)
        weight = ir.val(f"{name}.unpacked", const_value=ir.tensor(_values(node), name=f"{name}.unpacked"))
        model.graph.initializers[str(weight.name)] = weight
        ir.convenience.replace_all_uses_with(output, weight)
        model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
    return len(packed)


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """What `value` always is, through a cast; None where that is not known."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        before = _constant(producer.inputs[0])
        return None if before is None else before.astype(np.float32)
    return None if value.const_value is None else value.const_value.numpy()


def _is_packed_weight(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and all(_constant(value) is not None for value in node.inputs[:2])


def _meets_quantized(node: ir.Node) -> bool:
    """Whether a user of this weight has an input that comes out of a DequantizeLinear of its own, not constant."""
    others = [value for user, _ in node.outputs[0].uses() for value in user.inputs]
    makers = [maker for value in others if value is not None and (maker := value.producer()) is not None]
    return any(maker.op_type == "DequantizeLinear" and not _is_packed_weight(maker) for maker in makers)


def _values(node: ir.Node) -> np.ndarray:
    """`(codes - zero_point) * scale` in the type that `node` puts out, by tensor, axis or block."""
    codes, scale = (_constant(value) for value in node.inputs[:2])
    assert codes is not None and scale is not None
    zero = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
    axis = node.attributes.get_int("axis", 1) % max(codes.ndim, 1)
    block = node.attributes.get_int("block_size", 0)

    def spread(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        if block:
            return np.repeat(values, block, axis).take(range(codes.shape[axis]), axis)
        return (
            values.reshape([-1 if at == axis else 1 for at in range(codes.ndim)]) if prod(values.shape) > 1 else values
        )

    shifted = codes.astype(np.float32) - (0 if zero is None else spread(zero))
    return np.asarray(shifted * spread(scale), _type_of(node.inputs[1]))


def _type_of(scale: ir.Value | None) -> np.dtype[Any]:
    """The type of a scale, which what is dequantized by it has too."""
    assert scale is not None
    producer = scale.producer()
    if producer is not None and producer.op_type == "Cast":
        return ir.DataType(producer.attributes.get_int("to", ir.DataType.FLOAT)).numpy()
    assert scale.const_value is not None
    return scale.const_value.dtype.numpy()
