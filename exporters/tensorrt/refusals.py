"""What TensorRT does not take, said before TensorRT is asked, and in words that lead somewhere.

Its own messages name an assertion in its parser or a kernel generator. Each rule here was seen to be refused, or to be
built into something else than was asked for, by TensorRT for RTX 1.7; for plain TensorRT they follow its documentation.
"""

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from calibrators.errors import BackendError
from calibrators.plan import QuantPlan

__all__ = ["DOCUMENTED_BLOCKS", "cannot_time_layers", "refuse_model", "refuse_plan", "refuse_threads"]

DOCUMENTED_BLOCKS = (64, 128)
"""Sizes of INT4 blocks that plain TensorRT documents."""
_FIRST_FP8 = 89  # the first compute capability, times ten, that has FP8
_INTEGER_OPS = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
_ELSEWHERE = "use --backend ort with --provider cpu"
_EXPORT_AGAIN = "export the model again with `dfq-deploy export … --scheme w8a8`."


def refuse_plan(plan: QuantPlan, *, targets: Iterable[str], blocks: tuple[int, ...]) -> None:
    """Return if a plan can be built for `targets` (`sm89`); `blocks` are the sizes of INT4 blocks that are taken.

    Raises:
        BackendError: It cannot.
    """
    if any(not q.codes.signed or q.zero_point.any() for q in plan.sites.values()):
        raise BackendError(
            what=f"TensorRT cannot run this plan ({plan.scheme}): it is asymmetric (zero-point != 0).",
            why="TensorRT quantizes symmetrically, with signed codes.",
            fix=f"use --scheme {plan.scheme.removesuffix('_asym').removesuffix('_dynamic')}, or {_ELSEWHERE}.",
        )
    sizes = {q.block for q in plan.sites.values() if q.block is not None}
    if not sizes <= set(blocks):
        raise BackendError(
            what=f"TensorRT cannot run blocks of {max(sizes - set(blocks))}.",
            why=f"it unpacks INT4 weights inside a matmul in blocks of {', '.join(map(str, blocks))}.",
            fix=f"pass --block 64, or {_ELSEWHERE}.",
        )
    _refuse_fp8({q.codes.name for q in plan.sites.values()}, targets)


def cannot_time_layers() -> BackendError:
    """That TensorRT does not say what each layer takes."""
    return BackendError(
        what="TensorRT does not say how long each layer takes.",
        why="it merges layers with one another and with what lies between them.",
        fix="pass --least size, or --backend ort with --provider cpu.",
    )


def refuse_threads(threads: int | None) -> None:
    """Return if no number of threads is asked for.

    Raises:
        BackendError: One is.
    """
    if threads is not None:
        raise BackendError(
            what="a number of threads means nothing to this engine.",
            why="a GPU computes its calls.",
            fix="leave it out; it is for ONNX Runtime on a CPU.",
        )


def refuse_model(model: ir.Model, *, targets: Iterable[str] = ()) -> None:
    """Return if TensorRT takes each node of a quantized model.

    Raises:
        BackendError: It does not take one of them.
    """
    for node in model.graph:
        for applies, why, fix in _RULES:
            if applies(node):
                raise _refused(node, why, fix)
    _refuse_fp8({str(v.dtype.numpy()) for v in model.graph.initializers.values() if v.dtype is not None}, targets)


def _refuse_fp8(formats: set[str], targets: Iterable[str]) -> None:
    old = [target for target in targets if int(target.removeprefix("sm")) < _FIRST_FP8]
    if old and "float8_e4m3fn" in formats:
        raise BackendError(
            what=f"FP8 cannot be built for {old[0]}.",
            why=f"GPUs have FP8 from sm{_FIRST_FP8} on.",
            fix=f"use --scheme w8a8, or leave {', '.join(old)} out of --target.",
        )


def _refused(node: ir.Node, why: str, fix: str) -> BackendError:
    return BackendError(what=f"TensorRT does not take `{node.name}` ({node.op_type}).", why=why, fix=fix)


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _is_int32_bias(node: ir.Node) -> bool:
    value = node.inputs[0] if node.inputs else None
    return node.op_type == "DequantizeLinear" and value is not None and value.dtype == ir.DataType.INT32


def _is_unsigned(node: ir.Node) -> bool:
    values = [*node.inputs, *node.outputs]
    unsigned = {ir.DataType.UINT8, ir.DataType.UINT4, ir.DataType.UINT16}
    return _is_qdq(node) and any(value is not None and value.dtype in unsigned for value in values)


def _has_zero_point(node: ir.Node) -> bool:
    zero = _constant(node, 2)
    return _is_qdq(node) and zero is not None and bool(zero.astype(np.float32).any())


def _is_one_block(node: ir.Node) -> bool:
    block = node.attributes.get_int("block_size", 0)
    codes = _constant(node, 0)
    return bool(block) and codes is not None and codes.shape[node.attributes.get_int("axis", 1)] <= block


def _has_negative_scale(node: ir.Node) -> bool:
    scale = _constant(node, 1)
    return _is_qdq(node) and scale is not None and bool((scale.astype(np.float32) <= 0).any())


def _is_qdq(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


_RULES: tuple[tuple[Callable[[ir.Node], bool], str, str], ...] = (
    (lambda node: node.op_type in _INTEGER_OPS, "it takes explicit Q/DQ only, not integer operators.", _EXPORT_AGAIN),
    (
        lambda node: node.domain not in ("", "ai.onnx"),
        "of operators that are not standard ONNX it knows few.",
        _EXPORT_AGAIN,
    ),
    (lambda node: node.op_type == "Attention", "its builder refuses it in float32.", "export at opset 22 or below."),
    (_is_int32_bias, "a quantized bias is refused; biases stay in float.", _EXPORT_AGAIN),
    (_is_unsigned, "it quantizes with signed codes only.", "use --scheme w8a8, or --backend ort."),
    (_has_zero_point, "its zero-points must be 0.", "use --scheme w8a8, or --backend ort."),
    (_has_negative_scale, "its scales must be positive.", _EXPORT_AGAIN),
    (_is_one_block, "one block for all rows is dequantized by a kernel of its own.", "pass a smaller --block."),
)
