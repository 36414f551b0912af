"""The layer table of a built engine: what each kernel reads, and so what each planned layer is computed in.

TensorRT tells it twice: the builder writes it to its log, with no GPU, and the engine inspector gives it as JSON, with
one. Kernels name the ONNX nodes that they come from, and those are named by layer (`exporters.to_onnx`).
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from calibrators.errors import BackendError
from calibrators.plan import QuantPlan
from exporters.census import Body, Census, precision_of

__all__ = ["Kernel", "census_of", "kernels_in_json", "kernels_in_log"]

_TYPES = {"Int8": "int8", "Int4": "int4", "FP8": "fp8", "Float": "fp32", "FP32": "fp32", "Half": "fp16", "FP16": "fp16"}
_TYPES |= {"BFloat16": "bf16", "BF16": "bf16"}
_ROW = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: .*?, Metadata: (?P<metadata>.*)$"
)
_END_OF_TABLE = "\nI/O Tensors:"
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_MOVES = {"Move", "Repl", "Conc", "Resh", "Tran", "Slic", "Pad"}
_ROUNDS = {"Mul", "Div", "Min", "Max", "Roun", "Cast"}


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Attributes:
        name: As TensorRT calls it.
        kind: Its layer type and tactic, for people.
        inputs: Number formats of the activations that it reads.
        constants: Number formats of the weights that it reads; None where the table does not list them.
        nodes: The ONNX nodes that it comes from.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...] | None
    nodes: frozenset[str]


def kernels_in_log(table: str) -> list[Kernel]:
    """The kernels in the builder's message that begins with `Layers:`.

    Raises:
        BackendError: It does not read as a layer table.
    """
    found = []
    for line in table.partition(_END_OF_TABLE)[0].rstrip("\n").split("\n")[1:]:  # names are parted by \x1e and \x1f
        row = _ROW.match(line)
        if row is None:
            raise _unreadable(line)
        inputs, constants = (tuple(map(_type, _DATATYPE.findall(row[part]))) for part in ("inputs", "constants"))
        nodes = frozenset(_NODE.findall(row["metadata"]))
        found.append(Kernel(row["name"], f"{row['kind']} {row['tactic']}", inputs, constants, nodes))
    return found


def kernels_in_json(text: str) -> list[Kernel]:
    """The kernels in the engine inspector's JSON.

    Raises:
        BackendError: It holds no layer details: the engine was built without them.
    """
    try:
        return [_kernel(layer) for layer in json.loads(text, strict=False)["Layers"]]
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise _unreadable(text) from cause


def _kernel(layer: dict[str, Any]) -> Kernel:
    def types(part: str) -> tuple[str, ...]:
        tensors = layer.get(part, [])
        return tuple(_type(tensor.get("Datatype") or tensor.get("Format/Datatype", "")) for tensor in tensors)

    constants = types("Constants") if "Constants" in layer else None
    nodes = frozenset(_NODE.findall(layer.get("Metadata", "")))
    return Kernel(
        layer["Name"], f"{layer['LayerType']} {layer.get('TacticName', '')}", types("Inputs"), constants, nodes
    )


def _type(text: str) -> str:
    """`int8` for `Int8` and for `Row major Int8 format`; a type that is not known stays as it is written."""
    return next((ours for theirs, ours in _TYPES.items() if theirs in text.split()), text)


def census_of(kernels: list[Kernel], plan: QuantPlan, body: Body) -> Census:
    """What each layer is computed in.

    A layer is quantized when one kernel comes from its node and from the DequantizeLinear of each of its quantized
    operands, and reads as many tensors of the planned format: it then multiplies codes, or unpacks them as it goes.

    Raises:
        ExportError: A layer that the plan quantizes is computed in float.
    """
    found = {layer: _why_float(kernels, plan, layer) for layer in plan.layers}
    return Census.of(plan, found, body=body, kernels=_counts(kernels))


def _why_float(kernels: list[Kernel], plan: QuantPlan, layer: str) -> str:
    wanted = precision_of(plan, layer)
    roles = [role for role in ("input", "weight", "lhs", "rhs") if f"{layer}.{role}" in plan.sites]
    needed = {layer} | {f"{layer}.{role}.dequantize" for role in roles}
    named = [kernel for kernel in kernels if layer in kernel.nodes]
    apart = any(f"{layer}.weight.dequantize" in kernel.nodes for kernel in kernels if layer not in kernel.nodes)
    for kernel in named:
        operands = kernel.inputs + (kernel.constants or ())
        missing = len(roles) - operands.count(wanted)
        unlisted = kernel.constants is None and "weight" in roles  # TensorRT 10 lists no constants
        if needed <= kernel.nodes and missing <= unlisted and kernel.inputs and not apart:
            return ""
    if not named:
        return "no kernel of the engine comes from it."
    reads = ", ".join(sorted({*named[-1].inputs, *(named[-1].constants or ())})) or "nothing"
    return f"its kernel `{named[-1].name}` reads {reads}, or its weight is dequantized by a kernel of its own."


def _counts(kernels: list[Kernel]) -> dict[str, int]:
    """How many kernels are matmuls, fused attention, copies, Q or DQ on their own, and anything else."""
    return dict(Counter(map(_kind, kernels)))


def _kind(kernel: Kernel) -> str:
    """Generated kernels are called by what they do: `__myl_MulMinMaxRounCastReshTran_0x81aa4c9d`."""
    if "mha" in kernel.name + kernel.kind:
        return "attention"
    if re.match(r"gemm|correlation|convolution|runtime_fusion|.*xmma|.*_Fc", kernel.kind, re.IGNORECASE):
        return "matmul"
    named = re.search(r"__myl_([A-Za-z]+)_", kernel.kind)
    steps = set(re.findall(r"[A-Z][a-z]*", named[1])) if named else set()
    if "reformat" in kernel.kind.lower() or (steps and steps <= _MOVES):
        return "reformat"
    rounds = any(node.endswith((".quantize", ".dequantize")) for node in kernel.nodes)
    if rounds and (steps <= _MOVES | _ROUNDS if steps else all("quantize" in node for node in kernel.nodes)):
        return "q/dq alone"
    return "other"


def _unreadable(text: str) -> BackendError:
    return BackendError(
        what="the engine's layer table cannot be read, so nobody knows what it computes in.",
        why=f"this version of TensorRT writes it in another form: `{text[:80]}`.",
        fix="report this version of TensorRT.",
    )
