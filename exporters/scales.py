"""Scales of weights in blocks, stored in half the bytes: in blocks of 32 they are a fifth of a file.

For run-times that compute with constants when they load a file: they make the scales float32 again, once.
"""

import numpy as np
import onnx_ir as ir

__all__ = ["shorten_scales"]


def shorten_scales(model: ir.Model) -> None:
    """Store scales of blocks in float16 where none of them changes by that."""
    for node in list(model.graph):
        scale = node.inputs[1] if node.op_type == "DequantizeLinear" and "block_size" in node.attributes else None
        if scale is None or scale.const_value is None or scale.dtype != ir.DataType.FLOAT:
            continue
        values = scale.const_value.numpy()
        short = values.astype(np.float16)
        if (short != values).any():
            continue
        name = str(scale.name)
        del model.graph.initializers[name]
        stored = ir.val(name, const_value=ir.tensor(short, name=name))
        model.graph.initializers[name] = stored
        cast = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast")
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, scale.shape
        model.graph.insert_before(node, cast)
        node.replace_input_with(1, cast.outputs[0])
