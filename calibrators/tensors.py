"""Which tensor of the float ONNX model an activation site is.

Nodes are named by layer and tensors by site, but a tensor that two layers read carries one site's name, and the model's
input is called `images`. Whoever works with tensors by name (ONNX Runtime, TensorRT's cache) asks here.
"""

from collections.abc import Iterable
from pathlib import Path

import onnx

from calibrators.errors import PlanError
from calibrators.plan import layer_of

__all__ = ["tensors_of"]


def tensors_of(sites: Iterable[str], path: Path) -> dict[str, str]:
    """The tensor in the model `path` of each of `sites` that is not a weight.

    Raises:
        PlanError: The file is no ONNX model, or has no node for one of the sites.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as cause:  # protobuf's errors, in whichever of its implementations is installed
        raise PlanError(
            what=f"`{path}` cannot be read as an ONNX model.",
            why=f"{type(cause).__name__}: {cause}.",
            fix="pass the float.onnx of the model that the plan was made for (export --keep-float).",
        ) from cause
    nodes = {node.name: node for node in graph.node}
    tensors = {}
    for site in sites:
        layer, ending = layer_of(site), site.rpartition(".")[2]
        if ending == "weight":
            continue
        if layer not in nodes:
            raise PlanError(
                what=f"`{path}` has no node `{layer}`.",
                why=f"site `{site}` belongs to that layer of the model.",
                fix="pass the float.onnx of the model that the plan was made for (export --keep-float).",
            )
        node = nodes[layer]
        tensors[site] = node.output[0] if ending == "output" else node.input[1 if ending == "rhs" else 0]
    return tensors
