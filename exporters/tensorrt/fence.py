"""A fence behind each quantized matmul whose output is cut into pieces, so that TensorRT keeps its weight whole.

Attention slices one qkv matmul into three. TensorRT moves the slices into the weight, dequantizes that in a kernel of
its own and multiplies in float: seen in TensorRT for RTX 1.7 on every INT8 and FP8 qkv of DeiT-T and ViT-B. It does not
move them through a Clip. The Clip here has the largest finite values as its bounds, so it changes no finite value, and
becomes part of the kernel that adds the bias.
"""

import numpy as np
import onnx_ir as ir

from calibrators.plan import QuantPlan

__all__ = ["put_fences"]

_CUTTING = {"Reshape", "Slice", "Split", "Transpose", "Gather", "Squeeze"}


def put_fences(model: ir.Model, plan: QuantPlan) -> None:
    """Put the fences into `model`, in place."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "MatMul" and f"{node.name}.input" in plan.sites]:
        output = node.outputs[0]
        users = output.consumers()
        if len(users) == 1 and users[0].op_type == "Add":
            output = users[0].outputs[0]
        uses = list(output.uses())
        if not uses or not {use.node.op_type for use in uses} <= _CUTTING:
            continue
        assert output.dtype is not None, "a model of to_onnx knows its types"
        limits = _limits(output.dtype)
        bounds = []
        for end, limit in zip(("lowest", "highest"), limits, strict=True):
            name = f"{end}.{output.dtype.name.lower()}"
            if name not in graph.initializers:
                graph.initializers[name] = ir.val(name, const_value=ir.tensor(limit, name=name))
            bounds.append(graph.initializers[name])
        fence = ir.node("Clip", [output, *bounds], name=f"{node.name}.fence")
        fence.outputs[0].dtype, fence.outputs[0].shape = output.dtype, output.shape
        graph.insert_before(uses[0].node, fence)
        for use in uses:
            use.node.replace_input_with(use.idx, fence.outputs[0])
    graph.sort()


def _limits(dtype: ir.DataType) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest finite value of a floating-point type."""
    highest = np.array(dtype.max, dtype.numpy())
    return -highest, highest
