"""A sited torch model to float ONNX whose nodes and tensors carry the sites' names.

Each site leaves a marker node in torch's export. This file takes the markers out again and gives what they marked
its name: the layer's node is called `blocks.0.attn.qkv`, its constant `blocks.0.attn.qkv.weight`, its first input
`blocks.0.attn.qkv.input` (two layers that read one tensor share it, under the first one's name). A Linear becomes
MatMul + Add, never Gemm: run-times fuse an INT8 MatMul, not an INT8 Gemm. Weights never pass through the simplifier,
so no size limit of protobuf's is met.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxsim
import torch
from torch import nn

from calibrators.errors import ExportError
from calibrators.files import written_whole
from calibrators.plan import layer_of
from calibrators.sites import MARKER
from exporters.tracing import cannot_export, traced

__all__ = ["export_float", "save_model", "torch_parity"]

_EXTERNAL_DATA_FROM_BYTES = 1 << 31  # protobuf's limit for one message
_STREAMED_FROM_BYTES = 1 << 28  # of a float model: in one file its weights would be in memory three times to be written


def export_float(module: nn.Module, example: torch.Tensor, path: Path, *, outputs: Sequence[str] = ("logits",)) -> None:
    """Write `module` as float ONNX with input `images` (N, C, H, W) and the outputs named, N free.

    Args:
        module: A sited model in evaluation mode.
        example: Images to trace with, (2 or more, C, H, W) float32.
        path: Where the model goes; its weights go beside it if they are many.
        outputs: Names of the tensors that the module puts out, in its order.

    Raises:
        ExportError: torch's exporter cannot express the model, or a site got lost on the way.
    """
    model = traced(module, example, outputs)
    sites = _name_by_sites(model)
    _split_gemm(model)
    _part_from_bounds(model)
    model = _simplified(model)
    _part_from_bounds(model)  # of what the simplifier took out in between: a bias of zeros
    kept = {node.name for node in model.graph} | set(model.graph.initializers)
    lost = sorted(site for site in sites if site not in kept and layer_of(site) not in kept)
    if lost:
        raise ExportError(
            what=f"site `{lost[0]}` is gone from the exported graph, and {len(lost) - 1} more.",
            why="the exporter or the simplifier merged its layer into another one.",
            fix="spare the layer, or report this model.",
        )
    save_model(model, path, external_data_from_bytes=_STREAMED_FROM_BYTES)


def save_model(model: ir.Model, path: Path, *, external_data_from_bytes: int | None = None) -> None:
    """Write `model` to `path`; from `external_data_from_bytes` on, or 2 GiB, weights go to `<path>.data` beside it.

    Raises:
        ExportError: It is no valid ONNX; nothing is written then.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    least = _EXTERNAL_DATA_FROM_BYTES if external_data_from_bytes is None else external_data_from_bytes
    external = f"{path.name}.data" if size >= least else None
    if external is None:
        ir.external_data.load_to_model(model)  # what it was loaded from lies elsewhere
    with written_whole(path) as temporary:
        ir.save(model, temporary, external_data=external)
        try:
            onnx.checker.check_model(str(temporary), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as cause:
            raise ExportError(
                what="the exported model is not valid ONNX.",
                why=str(cause).strip().split("\n")[0],
                fix="report this model.",
            ) from cause


def torch_parity(module: nn.Module, path: Path, images: np.ndarray) -> float:
    """Largest difference of `path` in ONNX Runtime from `module` on `images`, relative to the largest value there.

    Of several outputs the worst: NaN where one has that, infinite where shapes differ. For one that is 0 throughout the
    difference itself.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # a copy of all weights, for three images
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images})
    with torch.inference_mode():
        put_out = module(torch.from_numpy(images))
    wanted = [part.numpy() for part in ([put_out] if isinstance(put_out, torch.Tensor) else put_out)]
    if [part.shape for part in found] != [part.shape for part in wanted]:
        return float("inf")
    return float(np.max([np.abs(a - b).max() / (np.abs(b).max() or 1) for a, b in zip(found, wanted, strict=True)]))


def _name_by_sites(model: ir.Model) -> list[str]:
    """Take the markers out and name what they marked; returns the names of all sites."""
    graph = model.graph
    domain, _, op_type = MARKER.partition("::")
    markers = [node for node in graph if node.domain == domain and node.op_type == op_type]
    names = [marker.attributes["name"].as_string() for marker in markers]
    twice = sorted({layer_of(name) for name in names if names.count(name) > 1})
    if twice:
        raise ExportError(
            what=f"`{twice[0]}` runs more than once in this model, and {len(twice) - 1} more layers do.",
            why="a site is one tensor; a layer that runs twice has two inputs.",
            fix="pick a variant of the model in which each layer runs once.",
        )
    for site, marker in zip(names, markers, strict=True):
        source, marked = marker.inputs[0], marker.outputs[0]
        assert source is not None
        put_out = str(marked.name) if marked.is_graph_output() else ""
        if not site.endswith(".output"):
            _name_consumer(marked, site, source, graph)
        elif not source.is_graph_output():
            source.name = put_out or site
        marked.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(marker, safe=True)
    model.opset_imports.pop(domain, None)
    return names


def _name_consumer(marked: ir.Value, site: str, source: ir.Value, graph: ir.Graph) -> None:
    """Name the node that computes the site's layer, and the tensor that enters it there."""
    (node,) = marked.consumers()
    if site.endswith(".weight"):
        assert source.const_value is not None
        shared = len(source.uses()) > 1  # with a layer that has no site
        source.name = f"{site}.shared" if shared and node.op_type == "Transpose" else site
        if node.op_type == "Transpose":  # MatMul takes (in, out): keep the weight that way
            folded = ir.val(site, const_value=_transposed(source.const_value, site))
            if not shared:
                graph.initializers.pop(site, None)
            graph.initializers[site] = folded
            transposed = node.outputs[0]
            transposed.replace_all_uses_with(folded)
            graph.remove(node, safe=True)
            (node,) = folded.consumers()
        node.name = layer_of(site)
        return
    if site.endswith((".lhs", ".rhs")):
        node.name = layer_of(site)
    named = source.is_graph_input() or source.is_graph_output() or source.is_initializer() or _is_site(source.name)
    if not named:
        source.name = site


def _transposed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The tensor with its axes exchanged: a view of it, copied only when it is written."""
    return ir.tensor(tensor.numpy().T, name=name)


def _is_site(name: str | None) -> bool:
    return name is not None and name.endswith((".input", ".output", ".lhs", ".rhs"))


def _split_gemm(model: ir.Model) -> None:
    """A Linear's Gemm becomes Unsqueeze, MatMul, Add, Squeeze.

    The extra axis is what keeps ONNX Runtime from fusing MatMul and Add back into a Gemm, which it computes in float.
    """
    graph = model.graph
    for gemm in [node for node in graph if node.op_type == "Gemm"]:
        x, weight, bias = [*gemm.inputs, None][:3]
        if x is None or weight is None or weight.const_value is None or not _is_linear(gemm):
            continue
        if gemm.attributes.get_int("transB", 0):
            turned = _transposed(weight.const_value, str(weight.name))
            if len(weight.uses()) > 1:  # as other layers read it, it stays for them
                turned.name = f"{gemm.name}.weight.turned"
                weight = ir.val(turned.name)
                graph.initializers[turned.name] = weight
            weight.const_value, weight.shape = turned, ir.Shape(turned.shape.numpy())
        axis = ir.val(f"{gemm.name}.axis", const_value=ir.tensor(np.array([1]), name=f"{gemm.name}.axis"))
        graph.initializers[f"{gemm.name}.axis"] = axis
        nodes = [ir.node("Unsqueeze", [x, axis], name=f"{gemm.name}.unsqueeze")]
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], weight], name=gemm.name))
        if bias is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias], name=f"{gemm.name}.add"))
        nodes.append(ir.node("Squeeze", [nodes[-1].outputs[0], axis], name=f"{gemm.name}.squeeze"))
        ir.convenience.replace_nodes_and_values(graph, gemm, [gemm], nodes, gemm.outputs, nodes[-1].outputs)


def _is_linear(gemm: ir.Node) -> bool:
    """Whether it is a product and a sum, with no factor."""
    factors = {gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")}
    return factors == {1.0} and not gemm.attributes.get_int("transA", 0)


def _part_from_bounds(model: ir.Model) -> None:
    """A Relu or Clip right after a MatMul becomes Max and Min: ONNX Runtime computes such a pair in float."""
    graph = model.graph
    for node in [node for node in graph if node.op_type in ("Relu", "Clip")]:
        x = node.inputs[0]
        producer = None if x is None else x.producer()
        if producer is None or producer.op_type != "MatMul":
            continue
        low, high = [*node.inputs[1:], None, None][:2]
        if node.op_type == "Relu":
            low = ir.val(f"{node.name}.zero", const_value=ir.tensor(np.float32(0), name=f"{node.name}.zero"))
            graph.initializers[f"{node.name}.zero"] = low
        nodes: list[ir.Node] = []
        for op_type, bound in (("Max", low), ("Min", high)):
            if bound is not None:
                nodes.append(ir.node(op_type, [x, bound], name=f"{node.name}.{op_type.lower()}"))
                x = nodes[-1].outputs[0]
        if nodes:
            ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)


def _simplified(model: ir.Model) -> ir.Model:
    """The graph after onnxsim, which sees the sites' weights as inputs and so leaves them as they are."""
    graph = model.graph
    names = {f"{node.name}.weight" for node in graph if node.name}
    weights = {name: value for name, value in graph.initializers.items() if name in names}
    for name, value in weights.items():
        del graph.initializers[name]
        assert value.const_value is not None
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(value.const_value.shape.numpy())
        graph.inputs.append(value)
    tensors = {name: value.const_value for name, value in weights.items()}
    for value in weights.values():
        value.const_value = None
    try:
        proto, _ = onnxsim.simplify(ir.to_proto(model), skip_fuse_bn=True, skipped_optimizers=["fuse_pad_into_conv"])
    except RuntimeError as cause:
        raise cannot_export(cause) from cause
    simplified: ir.Model = ir.from_proto(proto)
    for value in [v for v in simplified.graph.inputs if v.name in tensors]:
        simplified.graph.inputs.remove(value)
        value.const_value = tensors[str(value.name)]
        simplified.graph.initializers[str(value.name)] = value
    return simplified
